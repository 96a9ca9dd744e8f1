"""A small picture of a kernel: the correlations of a few training rows, sorted by class or by target."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.datasets import Dataset
from ntkdask.kernels import Kernel
from ntkdask.workflows.kernel_ridge.gather import Labels

ROWS = 96
"""Rows of the picture, at most."""


def heat_map(kernel: Kernel, points: np.ndarray | Dataset, labels: Labels, n_classes: int | None) -> dict[str, Any]:
    """The correlations k(x_i, x_j)/√(k(x_i, x_i)·k(x_j, x_j)) of m rows as a table, ready for JSON.

    Its keys are "values" (m, m), "labels" (m classes or targets) and "sorted_by" ("class" or "target"). At most `ROWS` rows are taken,
    spaced evenly over the sorted training rows, so that classes keep their shares. A row whose k(x, x) is 0 has correlation 0.
    """
    keys = labels.targets.argmax(axis=1) if n_classes is not None else labels.targets[:, 0]
    order = np.argsort(keys, kind="stable")
    chosen = order[np.linspace(0, labels.n - 1, min(ROWS, labels.n)).round().astype(int)]
    k = to_host(kernel(_rows(points, chosen))).astype(np.float64)
    size = np.sqrt(np.maximum(np.diag(k), 0.0))
    k = np.divide(k, np.outer(size, size), out=np.zeros_like(k), where=np.outer(size, size) > 0)
    names = [int(v) if n_classes is not None else float(v) for v in keys[chosen]]
    return {"values": k.round(4).tolist(), "labels": names, "sorted_by": "target" if n_classes is None else "class"}


def _rows(points: np.ndarray | Dataset, numbers: np.ndarray) -> np.ndarray:
    if isinstance(points, Dataset):
        return np.concatenate([points.rows(int(i), int(i) + 1) for i in numbers])
    return points[numbers]
