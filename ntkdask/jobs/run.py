"""A whole job in a run folder: data → split → preprocessing → Gram → ridge → predictions → metrics, resumable throughout.

folder/record.json         fingerprint, plan, results of finished stages
folder/state/              split, preprocessing, models (Zarr, by digest)
folder/fold-<i>/gram-*     partial sums (Zarr tiles)
folder/fold-<i>/predictions
folder/metrics.json
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import threads
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import DatasetRows, selected_count
from ntkdask.execution.map_reduce import Done
from ntkdask.execution.progress import DRIVER, Listener, Record, Silent
from ntkdask.files import exclusive, local_path, remove, require_disk, sweep, write_text
from ntkdask.jobs.training import Fold, Site, TrainingJob
from ntkdask.planning.resources import Costs, Resources, RidgePlan, require_memory
from ntkdask.states import load_state, save_state
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.model import RidgeFit
from ntkdask.workflows.predict import evaluate, predict
from ntkdask.workflows.split import LEFT_OUT, deal, deal_inner, group_rows, hold_out, keep, state_of


class _Recorder:
    """Passes on what a listener hears and keeps seconds and peaks by label."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peaks: dict[str, int] = defaultdict(int)
        self.stage_seconds: dict[str, float] = defaultdict(float)
        self._current: tuple[str, float] | None = None

    def stage(self, label: str, total: int, done: int = 0) -> None:
        self.finish()
        self._current = (label, time.perf_counter())
        self.listener.stage(label, total, done)

    def task(self, label: str, done: Done) -> None:
        self.seconds[label].append(done.seconds)
        if done.worker != DRIVER:
            self.peaks[label] = max(self.peaks[label], done.peak_bytes)
        self.listener.task(label, done)

    def finish(self) -> None:
        if self._current is not None:
            label, started = self._current
            self.stage_seconds[label] += time.perf_counter() - started
            self._current = None


def run_job(
    job: TrainingJob,
    folder: Path,
    *,
    resources: Resources | None = None,
    client: Any = None,
    listener: Listener | None = None,
    overwrite: bool = False,
    resolved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a job in `folder`, or go on with one that was cut off there; returns the metrics, also written to metrics.json.

    FingerprintError when the folder holds another job's run and `overwrite` is False. resolved: the job as tables, for the
    report.
    """
    started = time.perf_counter()
    folder = local_path(folder)  # workers of a running scheduler may be at home in another folder
    resources = resources or Resources.here()
    recorder = _Recorder(listener or Silent())
    with exclusive(folder):
        if overwrite:
            for path in folder.iterdir():
                if path.name != ".lock":
                    remove(path)
        sweep(folder)
        record = Record.open(folder, job.fingerprint())
        # the first run's sizes and threads, whatever cluster goes on with it: they decide the bits
        plan = job.stored_plan(record.once("plan", lambda: job.plan_for(job.measured(resources, client))[0].to_json()))
        costs = job.costs_under(plan)
        require_memory(costs, resources)
        require_disk(folder, costs.disk_bytes, "the run", "choose another --folder, or use fewer n_components")
        folds = _folds(job, plan, folder, record, client)
        rows = [_run_fold(job, i, fold, folder, plan, record, client, recorder) for i, fold in enumerate(folds)]
        recorder.finish()
        seconds = {**recorder.stage_seconds, "total": time.perf_counter() - started}
        metrics = _metrics(job, rows, plan, costs, resources, recorder, seconds, resolved)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def _run_fold(
    job: TrainingJob,
    index: int,
    fold: Fold,
    folder: Path,
    plan: RidgePlan,
    record: Record,
    client: Any,
    listener: Listener,
) -> dict[str, Any]:
    name = f"fold-{index}/"
    fit = job.fit(fold, plan, Site(folder / name, client, listener, record, name))
    scores = predict(
        str(fit.url),
        fold.test,
        plan,
        k=job.n_targets,
        url=folder / name / "predictions",
        client=client,
        listener=listener,
        fingerprint={**record.fingerprint, "model": fit.url},
    )
    assert isinstance(scores, TileStore)
    tested = evaluate(scores, fold.test, job.train.class_names if job.n_classes else None)
    parts = tuple(sorted({p for g in fold.groups for p in g}))
    return {
        "fold": index,
        "n_train": selected_count(fold.train, parts),
        "n_test": tested["rows"],
        "alpha": fit.model.alpha,
        "selection": job.selection_under(plan) if fit.path else "given",
        "score_name": fit.score_name,
        "alpha_path": fit.path,
        "model": fit.url,
        "test": tested,
        **fit.facts,
        **_constant(fit),
    }


def _constant(fit: RidgeFit) -> dict[str, Any]:
    count = sum(int(state.get("constant", 0)) for state in fit.model.preprocessor.states)
    return {"constant_features": count} if count else {}


def _folds(job: TrainingJob, plan: RidgePlan, folder: Path, record: Record, client: Any) -> list[Fold]:
    """Outer folds; part number = outer·n_inner + inner, dealt once and stored as a state."""
    url = record.once("split", lambda: _deal(job, plan, folder, client))
    inner, train_url = job.n_inner(plan), job.train.url
    rows = DatasetRows(train_url, url, digest=job.train.digest)
    if job.test is not None:
        groups: list[tuple[int, ...]] = [(i,) for i in range(inner)]
        return [Fold(rows.select(*range(inner)), groups, _test_rows(job, job.test, folder, record))]
    outer = job.n_outer if job.split and job.split.folds else 2
    folds = []
    for held in range(outer) if job.n_outer > 1 else [1]:
        others = [o for o in range(outer) if o != held]
        groups = [tuple(o * inner + i for o in others) for i in range(inner)]
        test = rows.select(*(held * inner + i for i in range(inner)))
        folds.append(Fold(rows.select(*(p for g in groups for p in g)), groups, test))
    return folds


def _deal(job: TrainingJob, plan: RidgePlan, folder: Path, client: Any) -> str:
    groups = group_rows(DatasetRows(job.train.url, digest=job.train.digest), client)
    outer = np.zeros(len(groups), np.int16)
    if job.split is not None and job.split.folds:
        outer = deal(groups, job.split.folds, shuffle=job.split.shuffle, seed=job.seed, path=("split", "outer"))
    elif job.split is not None and job.split.test:
        outer = hold_out(groups, job.split.test, shuffle=job.split.shuffle, seed=job.seed, path=("split", "outer"))
    outer = keep(outer, 0, job.train_rows, job.seed)
    if job.test is None:
        outer = keep(outer, 1, job.test_rows, job.seed)
    kept = outer != LEFT_OUT
    inner = np.zeros(len(groups), np.int16)
    count = job.n_inner(plan)
    if count > 1:
        inner[kept] = deal_inner(groups[kept], job.selection_under(plan), count, job.holdout, job.seed)
    return save_state(folder / "state", state_of(np.where(kept, outer * count + inner, LEFT_OUT)))


def _test_rows(job: TrainingJob, test: Dataset, folder: Path, record: Record) -> DatasetRows:
    """Rows of a test dataset: all, or so many as the job says."""
    if job.test_rows is None:
        return DatasetRows(test.url, digest=test.digest)

    def dealt() -> str:
        return save_state(folder / "state", state_of(keep(np.zeros(test.n, np.int16), 0, job.test_rows, job.seed)))

    return DatasetRows(test.url, record.once("test-rows", dealt), (0,), digest=test.digest)


def _metrics(
    job: TrainingJob,
    folds: list[dict[str, Any]],
    plan: RidgePlan,
    costs: Costs,
    resources: Resources,
    recorder: _Recorder,
    seconds: dict[str, float],
    resolved: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the report reads; see report.py."""
    versions = {n: importlib.metadata.version(n) for n in ("numpy", "scipy", "dask", "distributed", "zarr", "numba")}
    test = {}
    for name in ("accuracy", "mse", "rmse", "r2"):
        values = [f["test"][name] for f in folds if name in f["test"]]
        if values:
            test[name] = float(np.mean(values))
            test[f"{name}_std"] = float(np.std(values))
    data = job.train
    notes = ["alpha was chosen on training rows alone; test rows never entered preprocessing, features or solver."]
    notes += [
        f"fold {f['fold']}: {f['constant_features']} constant features were set to 0."
        for f in folds
        if "constant_features" in f
    ]
    short = [(f["fold"], convergence_note(f)) for f in folds]
    notes += [f"fold {fold}: {note}" for fold, note in short if note]
    return {
        "name": job.name,
        "task": "classification" if job.n_classes else "regression",
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ntkdask": importlib.metadata.version("ntkdask"),
        "versions": {"python": platform.python_version(), **versions},
        "blas": threads.blas_name(),
        "threads_per_task": plan.threads,
        "workers": resources.slots,
        "job": dict(resolved or job.fingerprint()),
        "plan": {
            **plan.to_json(),
            "tasks": costs.tasks,
            "flops": costs.flops,
            "disk_bytes": costs.disk_bytes,
            "worker_bytes": costs.worker_bytes,
            "worker_budget_bytes": resources.memory_bytes,
            "device_bytes": costs.device_memory,
        },
        "data": {
            "url": data.url,
            "digest": data.digest,
            "n": data.n,
            "row_shape": list(data.row_shape),
            "dtype": data.dtype,
            "class_names": list(data.class_names or ()),
            "provenance": data.provenance,
        },
        "seconds": seconds,
        "folds": folds,
        "test": test,
        "tasks": {
            label: {"count": len(s), "seconds": s, "peak_bytes": recorder.peaks[label]}
            for label, s in recorder.seconds.items()
        },
        "memory": {
            "planned_bytes": costs.worker_bytes,
            "budget_bytes": resources.memory_bytes,
            "measured_peak_bytes": max(recorder.peaks.values(), default=None),
        },
        "notes": notes,
    }


def split_parts(folder: Path) -> np.ndarray:
    """(n,) int16 part of every row of a run's training data (for notebooks and checks)."""
    stages = json.loads((folder / "record.json").read_text(encoding="utf-8"))["stages"]
    return load_state(stages["split"])[0]["part"]
