"""A whole job in a run folder: data → split → preprocessing → fit → predictions → metrics, resumable throughout.

folder/record.json         fingerprint, plan, results of finished stages
folder/state/              split, preprocessing, models (Zarr, by digest)
folder/fold-<i>/           partial sums or kernel tiles, predictions (Zarr tiles)
folder/metrics.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkdask.datasets.rows import selected_count
from ntkdask.execution.peak import run_peak
from ntkdask.execution.progress import Listener, Record, Silent
from ntkdask.execution.site import Site
from ntkdask.files import exclusive, local_path, remove, require_disk, sweep, write_text
from ntkdask.jobs.folds import Fold, outer_folds
from ntkdask.jobs.metrics import Recorder, Sizes, run_metrics
from ntkdask.jobs.training import TrainingJob
from ntkdask.planning.resources import Costs, Resources, RidgePlan, require_memory
from ntkdask.store import TileStore
from ntkdask.workflows.model import RidgeFit
from ntkdask.workflows.predict import evaluate, predict


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
    """Run a job in `folder`, or resume one that was interrupted there.

    Parameters
    ----------
    job : TrainingJob
        Data, split, preprocessing and the recipe that is fitted.
    folder : Path
        Folder of this run alone. Workers must see it under the same path.
    resources : Resources or None
        The resources of the workers. None: this process alone.
    client : distributed.Client or None
        Whose workers compute; None: a loop here.
    listener : Listener or None
        Hears of stages and tasks.
    overwrite : bool
        First delete the run that is there.
    resolved : mapping or None
        The job as tables, for the report.

    Returns
    -------
    dict
        The metrics, also written to metrics.json.

    Raises
    ------
    FingerprintError
        When the folder holds another job's run and `overwrite` is False, with the keys that differ.
    MemoryBudgetError, DiskSpaceError
        With the numbers, before anything runs.
    """
    recorder = Recorder(listener or Silent())
    folder = local_path(folder)  # workers of a running scheduler may have another working directory
    resources = resources or Resources.here()
    with exclusive(folder), run_peak() as peak:
        if overwrite:
            for path in folder.iterdir():
                if path.name != ".lock":
                    remove(path)
        sweep(folder)
        site = Site(folder, client, recorder, Record.open(folder, job.fingerprint()))
        sizes = _sizes(job, resources, site)
        folds = outer_folds(job, sizes.plan, site)
        rows = [_run_fold(job, i, fold, sizes.plan, site) for i, fold in enumerate(folds)]
        recorder.run_peak = peak.bytes
        metrics = run_metrics(job, rows, sizes, recorder, resolved)
        # in the file, models are named from the folder on: it may be moved
        kept = {**metrics, "folds": [{**f, "model": os.path.relpath(f["model"], folder)} for f in metrics["folds"]]}
        write_text(folder / "metrics.json", json.dumps(kept, indent=1))
    return metrics


def _sizes(job: TrainingJob, resources: Resources, site: Site) -> Sizes:
    """The sizes and threads that the first run planned: they decide the bits, whatever cluster resumes it."""
    request, recipe = job.request(), job.recipe

    def require(plan: RidgePlan) -> Costs:
        costs = recipe.costs(request, plan)
        require_memory(costs, resources)
        require_disk(site.home, costs.disk_bytes, "the run", "choose another --folder, or use fewer n_components")
        return costs

    def planned() -> dict[str, Any]:
        plan = recipe.plan(request, recipe.measured(request, resources, site))
        require(plan)  # before it is recorded: what the error advises is another job
        return plan.to_json()

    plan = recipe.stored_plan(site.once("plan", planned))
    return Sizes(plan, require(plan), resources)


def _run_fold(job: TrainingJob, index: int, fold: Fold, plan: RidgePlan, site: Site) -> dict[str, Any]:
    """Fit to the training rows of an outer fold and predict its test rows; returns the fold's table of the metrics."""
    here = site.within(f"fold-{index}")
    fit = job.recipe.fit(
        fold.train, fold.groups, plan, here, steps=job.steps, n_classes=job.n_classes, n_targets=job.n_targets
    )
    scores = predict(
        str(fit.url),
        fold.test,
        plan,
        job.n_targets,
        here,
        store=here.home / "predictions",
        fingerprint={**site.record.fingerprint, "model": fit.url},
    )
    assert isinstance(scores, TileStore)
    tested = evaluate(scores, fold.test, job.train.class_names if job.n_classes else None)
    return {
        "fold": index,
        "n_train": selected_count(fold.train),
        "n_test": tested["rows"],
        "alpha": fit.model.alpha,
        "selection": job.recipe.selection(plan) if fit.path else "given",
        "score_name": fit.score_name,
        "alpha_path": fit.path,
        "model": fit.url,
        "test": tested,
        **fit.facts,
        **_constant(fit),
    }


def _constant(fit: RidgeFit) -> dict[str, Any]:
    """{"constant_features": how many constant features preprocessing set to 0}, empty where there were none."""
    count = sum(int(state.get("constant", 0)) for state in fit.model.preprocessor.states)
    return {"constant_features": count} if count else {}
