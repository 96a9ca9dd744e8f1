"""Rows, kernels and tolerances of the tests of stored kernel matrices."""

from pathlib import Path

import dask.array as da
import numpy as np
from job_examples import stored

from ntkdask import kernels
from ntkdask.kernels import NTK
from ntkdask.networks import fully_connected
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan, MatrixShape, plan_matrix

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
PAIR = kernels.both(fully_connected(2))


def kernel(depth: int = 2) -> NTK:
    return NTK(fully_connected(depth))


def rows(n: int = 60, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def close(found, expected: np.ndarray, dtype: str = "float32") -> bool:
    found = np.asarray(found)
    return found.dtype == dtype and np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


def images(n: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)


def given(tmp_path: Path, x: np.ndarray, source: str):
    if source in ("dataset", "url"):
        dataset = stored(tmp_path / "given", x, np.zeros(len(x)), overwrite=True)
        return dataset if source == "dataset" else dataset.url
    return da.from_array(x, chunks=(25, 4, 2, 3)) if source == "dask" else x


def plan_of(n: int = 34_298, m: int | None = None, **changes) -> MatrixPlan:
    options = {"row_shape": (9,), "row_bytes": 72, "dtype": "float32"}
    sizes = {name: changes.pop(name, value) for name, value in options.items()}
    return plan_matrix(kernel(), MatrixShape(n, m, **sizes), **changes)
