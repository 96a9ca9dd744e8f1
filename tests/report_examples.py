"""Metrics of runs as they write them, for the tests of reports: ridge on features, kernel ridge by eigh and by gradients."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.report.page import write_report

HOSTILE = "<script>alert('x')</script>"


def alpha_path() -> list[dict[str, float]]:
    alphas = np.logspace(-4, 2, 7)
    return [
        {"alpha": a, "score": 0.03 + 0.01 * abs(math.log10(a)), "effective_dimension": 300 / (1 + a)}
        for a in alphas.tolist()
    ]


def classification(k: int = 3, folds: int = 1) -> dict[str, Any]:
    counts = (np.eye(k, dtype=int) * 9 + np.arange(k * k).reshape(k, k) % 2).tolist()
    fold = {
        "n_train": 1437,
        "n_test": 360,
        "alpha": 1.0,
        "selection": "gcv",
        "score_name": "GCV",
        "alpha_path": alpha_path(),
        "train": {"accuracy": 1.0, "mse": 0.0004},
        "test": {"accuracy": 0.98, "mse": 0.0088, "confusion": counts},
    }
    return {
        "name": "digits-ntkrf",
        "task": "classification",
        "finished": "2026-11-21T07:00:00+00:00",
        "ntkdask": "0.1.0",
        "versions": {"numpy": "2.4.6"},
        "blas": "openblas 0.3.30 SkylakeX",
        "threads_per_task": 1,
        "workers": 2,
        "job": {
            "name": "digits-ntkrf",
            "data": {"url": "data/digits.zarr", "split": {"test": 0.2}, "preprocess": ["standardize"]},
            "network": {"preset": "fully_connected", "depth": 2, "activation": "relu"},
            "features": {"type": "NTKRandomFeatures", "n_components": 4096, "sampling": "gaussian"},
            "solver": {"alphas": {"logspace": [-4, 2, 7]}, "selection": "gcv"},
        },
        "plan": {"slab_rows": 360, "flops": 1.2e12, "worker_bytes": 412000000, "worker_budget_bytes": 2**31},
        "data": {"n": 1797, "row_shape": [8, 8, 1], "class_names": [f"class-{i}" for i in range(k)]},
        "seconds": {"preprocess": 0.2, "gram-slab": 3.9, "solve": 2.7, "total": 8.6},
        "folds": [{**copy.deepcopy(fold), "fold": i} for i in range(folds)],
        "test": {"accuracy": 0.98104, "accuracy_std": 0.003, "mse": 0.0088},
        "tasks": {"gram-slab": {"count": 3, "seconds": [0.5, 0.6, 0.7], "peak_bytes": 512000000, "rows": 1437}},
        "memory": {"planned_bytes": 412000000, "budget_bytes": 2**31, "measured_peak_bytes": 391000000},
        "warnings": [],
        "notes": ["alpha chosen by GCV on training rows; test rows never entered"],
    }


def regression(folds: int = 2) -> dict[str, Any]:
    metrics = classification(folds=folds)
    target = np.random.default_rng(0).normal(size=300)
    for fold in metrics["folds"]:
        scatter = {"target": target.tolist(), "predicted": (0.8 * target).tolist()}
        fold["train"] = {"mse": 9.0, "rmse": 3.0, "r2": 0.76}
        fold["test"] = {"mse": 13.0 + fold["fold"], "rmse": 3.6, "r2": 0.65, "scatter": scatter}
    return {**metrics, "task": "regression", "test": {"rmse": 3.61, "rmse_std": 0.04, "r2": 0.652}}


def page_of(tmp_path: Path, metrics: dict[str, Any]) -> str:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    for element in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(element)
    return page


def drawn(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "figures").glob("*.svg")}


def spectrum(n: int = 1437, negative: int = 60) -> list[list[float]]:
    """All n eigenvalues, the last `negative` of them of the size of float32's rounding; thinned as a run does."""
    values = 200.0 / np.arange(1, n + 1) ** 1.5
    values[n - negative :] = -np.linspace(1e-7, 3e-6, negative)
    places = np.unique(np.geomspace(1, n, 200).astype(int)) - 1
    return [[int(p) + 1, float(values[p])] for p in places]


def heat_map(keys: list[Any], by: str) -> dict[str, Any]:
    """Rows alike where their keys are near."""
    at = np.array(keys, dtype=float)
    values = np.exp(-((at[:, None] - at) ** 2) / 4) * 0.6 + 0.4 * np.eye(len(at))
    return {"values": values.round(4).tolist(), "labels": keys, "sorted_by": by}


def dense(**more: Any) -> dict[str, Any]:
    return {"type": "Dense", "weight_variance": 1.0, "bias_variance": 0.0, "trainable": True, **more}


def activation(**table: Any) -> dict[str, Any]:
    return {"type": "Activation", "function": table, "normalize": True}


def solver(**more: Any) -> dict[str, Any]:
    settings = {"fit_intercept": True, "tolerance": 1e-6, "max_iterations": 1000, "folds": 5, "holdout": 0.2}
    return {"alphas": [0.0, 1e-3, 0.1, 10.0], "selection": "auto", "solver": "auto", **settings, **more}


def kernel_plan(**more: Any) -> dict[str, Any]:
    tiles = {"matrix_tile": 384, "rank": 1437, "cache_bytes": 8271376, "memory_bytes": None, "device_bytes": 0}
    return {"dtype": "float32", "worker_budget_bytes": 2**31, **tiles, **more}


def kernel_classification(k: int = 3, folds: int = 1) -> dict[str, Any]:
    """NTK by an eigendecomposition, alpha by GCV with 0 on the grid, slightly negative eigenvalues."""
    metrics = classification(k, folds)
    reason = "about 1.7 s and 376 MiB a worker; cholesky about 0.64 s"
    layers = [dense(), activation(type="ReLU"), dense()]
    metrics["job"] = {
        "name": "digits-ntk",
        "data": metrics["job"]["data"],
        "network": {"type": "Network", "layers": layers, "scale_inputs": False},
        "kernel": {"type": "NTK"},
        "solver": solver(),
    }
    metrics["plan"] = kernel_plan(solver="eigh", reason=reason)
    path = [
        {"alpha": 0.0, "score": math.inf, "effective_dimension": 1437.0},
        {"alpha": 1e-3, "score": 0.006, "effective_dimension": 1400.0},
        {"alpha": 0.1, "score": 0.005, "effective_dimension": 900.0},
        {"alpha": 10.0, "score": 0.02, "effective_dimension": 100.0},
    ]
    rows = np.sort(np.arange(24) % k).tolist()
    for fold in metrics["folds"]:
        del fold["train"]
        fold.update(alpha=0.1, alpha_path=copy.deepcopy(path), solver="eigh", solver_reason=reason)
        fold.update(spectrum=spectrum(), smallest_alpha=6e-6, heat_map=heat_map(rows, "class"))
    return metrics


def kernel_regression(folds: int = 2) -> dict[str, Any]:
    """RBF by conjugate gradients, alpha by a holdout; all solves converged."""
    metrics = regression(folds)
    metrics["job"] = {
        "name": "protein-rbf",
        "data": metrics["job"]["data"],
        "kernel": {"type": "RBF", "gamma": 0.1},
        "solver": solver(alphas=[1e-3, 0.1, 10.0], selection="holdout", solver="cg"),
    }
    metrics["plan"] = kernel_plan(solver="cg", reason="as asked")
    for fold in metrics["folds"]:
        del fold["train"]
        solves = [
            {
                "alpha": alpha,
                "held_out": held,
                "iterations": 40,
                "residual": 3e-7,
                "converged": True,
                "reason": "converged",
            }
            for alpha, held in ((10.0, 1), (0.1, 1), (1e-3, 1), (0.1, None))
        ]
        path = [{"alpha": 1e-3, "score": 0.5}, {"alpha": 0.1, "score": 0.3}, {"alpha": 10.0, "score": 0.4}]
        fold.update(selection="holdout", score_name="holdout MSE", alpha=0.1, alpha_path=path, solves=solves)
        fold.update(solver="cg", solver_reason="as asked")
        fold["heat_map"] = heat_map(np.linspace(-2, 3, 30).round(3).tolist(), "target")
    return metrics


def spoilt(value: Any) -> Any:
    """The same tables with NaN for every number."""
    if isinstance(value, dict):
        return {k: spoilt(v) for k, v in value.items()}
    if isinstance(value, list):
        return [spoilt(v) for v in value]
    return math.nan if isinstance(value, (int, float)) else value


def damaged(value: Any) -> Iterable[Any]:
    """`value` with one part at a time, at any depth, replaced by what does not belong there."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    few = list(parts)[: 2 if isinstance(value, list) else None]
    for key, part in few:
        for other in (None, 3.5, "text", [[]], {"a": {}}):
            changed = copy.copy(value)
            changed[key] = other
            yield changed
        for inner in damaged(part):
            changed = copy.copy(value)
            changed[key] = inner
            yield changed
