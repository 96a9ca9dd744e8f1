"""Small data, plans, job files and naive float64 twins that the workflows' and the command line's tests share."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.datasets import Dataset, write_dataset
from ntkdask.execution.progress import Record, Silent
from ntkdask.execution.site import Site
from ntkdask.execution.window import Done
from ntkdask.features import NTKRandomFeatures
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule, TrainingJob
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import Resources, RidgePlan
from ntkdask.store import TileStore
from ntkdask.workflows.ridge.fit import RidgeOptions
from ntkdask.workflows.ridge.recipe import RidgeRecipe

ONE_THREAD = Resources(memory_bytes=None, threads=1, solve_threads=1, slots=1)


def feature_map(n_components: int = 48, seed: int = 0, depth: int = 1) -> NTKRandomFeatures:
    return NTKRandomFeatures(fully_connected(depth), n_components=n_components, seed=seed)


def ridge_plan(dtype: str = "float64", slab_rows: int = 64, batch_rows: int = 32, tile_rows: int = 50) -> RidgePlan:
    return RidgePlan(dtype, slab_rows, batch_rows, tile_rows, threads=1, solve_threads=1, device=False)


def regression_data(n: int = 150, d: int = 6, k: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (n, d) of unequal scales, targets (n, k) or (n,): a smooth function and noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.logspace(0, 1, d) + 3
    y = np.sin(x @ rng.normal(size=(d, k)) / d) + 0.1 * rng.normal(size=(n, k))
    return x, (y[:, 0] if k == 1 else y)


def class_data(n: int = 150, d: int = 6, n_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (n, d) float32 in overlapping clusters, labels (n,) that cover every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    centres = rng.normal(size=(n_classes, d))
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels


def stored(folder: Path, x: Any, targets: Any, name: str = "data.zarr", **keywords: Any) -> Dataset:
    return write_dataset(folder / name, x, targets, **keywords)


def ridge_job(data: Dataset, test: Dataset | None = None, **changes: Any) -> TrainingJob:
    """Ridge on features with one held-out quarter and three alphas, unless `changes` say otherwise."""
    given = {"split": None if test else SplitRule(test=0.25), "steps": (), **changes}
    options = given.pop("options", RidgeOptions((0.01, 1.0, 100.0)))
    return TrainingJob("tiny", data, test, recipe=RidgeRecipe(given.pop("features", feature_map()), options), **given)


def site_of(
    url: Path | None = None,
    client: Any = None,
    listener: Any = None,
    record: Record | None = None,
    name: str = "",
    threads: int = 1,
) -> Site:
    """A site of one thread a task."""
    return Site(url, client, listener or Silent(), record or Record(), name, threads)


def sited(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a fit, those of a site put into one."""
    own = {k: v for k, v in keywords.items() if k in ("url", "client", "listener", "record", "name")}
    return {k: v for k, v in keywords.items() if k not in own} | {"site": site_of(**own)}


COMMAND = [sys.executable, "-m", "ntkdask", "run"]
"""`ntkdask run` in a process of its own."""

SMALL_JOB = {
    "data": {"url": "d.zarr", "split": {"test": 0.2}, "preprocess": ["standardize"]},
    "network": {"preset": "fully_connected", "depth": 1},
    "features": {"type": "NTKRandomFeatures", "n_components": 64},
    "solver": {"alphas": {"logspace": [-2, 2, 5]}},
    "run": {"n_workers": 1, "worker_memory": "1 GiB"},
}


def job_text(name: str, **tables: dict[str, Any] | None) -> str:
    """A job file: the keys of `tables` over those of SMALL_JOB; None leaves a key or a whole table out."""
    lines = [f"name = {_toml(name)}"]
    for table in {**SMALL_JOB, **tables}:
        if table in tables and tables[table] is None:
            continue
        lines.append(f"[{table}]")
        keys = {**SMALL_JOB.get(table, {}), **(tables.get(table) or {})}
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def naive_sums(phi: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """What GramSums holds, in float64 and in one product."""
    phi, y = phi.astype(np.float64), y.astype(np.float64).reshape(len(y), -1)
    w = np.ones(len(phi)) if weights is None else weights
    return {
        "gram": (phi * w[:, None]).T @ phi,
        "cross": (phi * w[:, None]).T @ y,
        "features": w @ phi,
        "targets": w @ y,
        "squares": w @ y**2,
        "weight": w.sum(),
        "rows": int((w > 0).sum()),
    }


def naive_ridge(
    phi: np.ndarray, y: np.ndarray, alpha: float, weights: np.ndarray | None = None, intercept: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(weights (m, k), intercept (k,)) of the weighted ridge problem, by the normal equations."""
    phi, y = phi.astype(np.float64), y.astype(np.float64).reshape(len(y), -1)
    w = np.ones(len(phi)) if weights is None else weights
    mean, target_mean = (w @ phi / w.sum(), w @ y / w.sum()) if intercept else (0.0 * phi[0], 0.0 * y[0])
    centred = phi - mean
    gram = (centred * w[:, None]).T @ centred + alpha * np.eye(phi.shape[1])
    solution = np.linalg.solve(gram, (centred * w[:, None]).T @ (y - target_mean))
    return solution, target_mean - mean @ solution


def run(job: Any, folder: Path, client: Any = None, **keywords: Any) -> dict[str, Any]:
    """The metrics of a job run with one thread a task, here or on a cluster."""
    return run_job(job, folder, resources=ONE_THREAD, client=client, **keywords)


def flip_bit(path: Path, position: int = 5) -> None:
    """Damage a file in one bit of the byte at `position`."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def damage(url: Path | str, index: tuple[int, ...]) -> None:
    """Flip a bit of a committed tile of the store at `url`."""
    flip_bit(TileStore.open(url).chunk_path(index))


class Counter:
    """A listener that counts tasks by stage and, at task number `stop_at`, dies as a killed driver would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.labels: list[str] = []
        self.stages: list[tuple[str, int, int]] = []
        self._stop_at = stop_at

    def stage(self, label: str, total: int, done: int = 0) -> None:
        self.stages.append((label, total, done))

    def task(self, label: str, done: Done) -> None:
        self.labels.append(label)
        if len(self.labels) == self._stop_at:
            raise Killed

    def count(self, label: str) -> int:
        return self.labels.count(label)


class Held(Counter):
    """Waits, after so many tasks, for a kill: it falls in the middle of a run however busy the machine is."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self._tasks = tasks

    def task(self, label: str, done: Done) -> None:
        super().task(label, done)
        if len(self.labels) == self._tasks:
            time.sleep(600)


class Killed(BaseException):
    """Raised in place of a SIGKILL: nothing catches it."""
