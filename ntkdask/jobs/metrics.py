"""The metrics of a finished run, metrics.json, which its report reads: results, sizes, seconds, memory, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import threads
from ntkdask.execution.progress import DRIVER, Listener
from ntkdask.execution.window import Done
from ntkdask.jobs.training import TrainingJob
from ntkdask.planning.resources import Costs, Resources, RidgePlan
from ntkdask.workflows.kernel_ridge.path import convergence_note

PACKAGES = ("numpy", "scipy", "dask", "distributed", "zarr", "numba")
"""The packages whose versions a run records."""


class Recorder:
    """A listener that passes calls on to another one, and keeps seconds and peak bytes by label."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peaks: dict[str, int] = defaultdict(int)
        self.run_peak = 0
        """The highest peak of all tasks of the run, which `run_job` sets at its end."""
        self.stage_seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()
        self._current: tuple[str, float] | None = None

    def stage(self, label: str, total: int, done: int = 0) -> None:
        """A stage begins; the stage before it ends."""
        self._end_stage()
        self._current = (label, time.perf_counter())
        self.listener.stage(label, total, done)

    def task(self, label: str, done: Done) -> None:
        """One task finished; the memory of steps that the driver runs itself is not counted."""
        self.seconds[label].append(done.seconds)
        if done.worker != DRIVER:
            self.peaks[label] = max(self.peaks[label], done.peak_bytes)
        self.listener.task(label, done)

    def finished(self) -> dict[str, float]:
        """End the last stage; seconds by stage, and those of the run as "total"."""
        self._end_stage()
        return {**self.stage_seconds, "total": time.perf_counter() - self._started}

    def _end_stage(self) -> None:
        if self._current is not None:
            label, started = self._current
            self.stage_seconds[label] += time.perf_counter() - started
            self._current = None


@dataclass(frozen=True)
class Sizes:
    """The plan of a run, its costs, and the resources of the workers."""

    plan: RidgePlan
    costs: Costs
    resources: Resources

    def to_json(self) -> dict[str, Any]:
        """The table "plan" of the metrics."""
        costs = self.costs
        return {
            **self.plan.to_json(),
            "tasks": costs.tasks,
            "flops": costs.flops,
            "disk_bytes": costs.disk_bytes,
            "worker_bytes": costs.worker_bytes,
            "worker_budget_bytes": self.resources.memory_bytes,
            "device_bytes": costs.device_memory,
        }


def run_metrics(
    job: TrainingJob,
    folds: list[dict[str, Any]],
    sizes: Sizes,
    recorder: Recorder,
    resolved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The tables of metrics.json.

    Parameters
    ----------
    job : TrainingJob
        The job that ran.
    folds : list of dict
        The table of every outer fold.
    sizes : Sizes
        Plan, costs and resources.
    recorder : Recorder
        Seconds and peak bytes of the tasks.
    resolved : mapping or None
        The job as tables. None: its fingerprint.
    """
    seconds = recorder.finished()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "name": job.name,
        "task": "classification" if job.n_classes else "regression",
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ntkdask": importlib.metadata.version("ntkdask"),
        "versions": {"python": platform.python_version(), **versions},
        "blas": threads.blas_name(),
        "threads_per_task": sizes.plan.threads,
        "workers": sizes.resources.slots,
        "job": dict(resolved or job.fingerprint()),
        "plan": sizes.to_json(),
        "data": _data(job),
        "seconds": seconds,
        "folds": folds,
        "test": _over_folds(folds),
        "tasks": {
            label: {"count": len(taken), "seconds": taken, "peak_bytes": recorder.peaks[label]}
            for label, taken in recorder.seconds.items()
        },
        "memory": {
            "planned_bytes": sizes.costs.worker_bytes,
            "budget_bytes": sizes.resources.memory_bytes,
            "measured_peak_bytes": max(recorder.run_peak, *recorder.peaks.values(), 0) or None,
        },
        "notes": _notes(folds),
    }


def _data(job: TrainingJob) -> dict[str, Any]:
    data = job.train
    return {
        "url": data.url,
        "digest": data.digest,
        "n": data.n,
        "row_shape": list(data.row_shape),
        "dtype": data.dtype,
        "class_names": list(data.class_names or ()),
        "provenance": data.provenance,
    }


def _over_folds(folds: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation over the folds of every score that they have."""
    test = {}
    for name in ("accuracy", "mse", "rmse", "r2"):
        values = [f["test"][name] for f in folds if name in f["test"]]
        if values:
            test[name] = float(np.mean(values))
            test[f"{name}_std"] = float(np.std(values))
    return test


def _notes(folds: list[dict[str, Any]]) -> list[str]:
    notes = ["alpha was chosen on training rows alone; test rows never entered preprocessing, features or solver."]
    constant = [f for f in folds if "constant_features" in f]
    notes += [f"fold {f['fold']}: {f['constant_features']} constant features were set to 0." for f in constant]
    short = [(f["fold"], convergence_note(f)) for f in folds]
    return notes + [f"fold {fold}: {note}" for fold, note in short if note]
