"""Deal the rows of a job into outer folds and, within their training rows, into groups for choosing alpha.

Every row has one part number, outer·n_inner + inner, dealt once by the seed and kept as a state of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import DatasetRows
from ntkdask.execution.progress import RECORD, Record
from ntkdask.execution.site import Site
from ntkdask.files import local_path
from ntkdask.jobs.training import TrainingJob
from ntkdask.states import load_state, save_state
from ntkdask.workflows.split import LEFT_OUT, deal, deal_inner, group_rows, hold_out, keep, state_of


class Fold(NamedTuple):
    """One outer fold: its training rows, their parts grouped for the choice of alpha, and the rows to test on."""

    train: DatasetRows
    groups: list[tuple[int, ...]]
    test: DatasetRows


def outer_folds(job: TrainingJob, plan: Any, site: Site) -> list[Fold]:
    """The outer folds of a job under a plan of its recipe; a single one where the job does not cross-validate."""
    url = site.once("split", lambda: _deal(job, plan, site))
    inner = job.recipe.n_groups(plan, job.inner_folds)
    rows = DatasetRows(job.train.url, url, digest=job.train.digest)
    if job.test is not None:
        return [Fold(rows.select(*range(inner)), [(i,) for i in range(inner)], _test_rows(job, job.test, site))]
    outer = job.n_outer if job.split and job.split.folds else 2
    folds = []
    for held in range(outer) if job.n_outer > 1 else [1]:
        others = [o for o in range(outer) if o != held]
        groups = [tuple(o * inner + i for o in others) for i in range(inner)]
        test = rows.select(*(held * inner + i for i in range(inner)))
        folds.append(Fold(rows.select(*(part for group in groups for part in group)), groups, test))
    return folds


def stored_parts(folder: Path) -> np.ndarray:
    """(n,) int16 part of every row of a run's dataset; read by notebooks and checks."""
    record = Record.read(local_path(folder) / RECORD)
    return load_state(record.stages["split"])[0]["part"]


def _deal(job: TrainingJob, plan: Any, site: Site) -> str:
    """Deal the rows and store their part numbers; the url of the state."""
    groups = group_rows(DatasetRows(job.train.url, digest=job.train.digest), site.client)
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
    count = job.recipe.n_groups(plan, job.inner_folds)
    if count > 1:
        inner[kept] = deal_inner(groups[kept], job.recipe.selection(plan), count, job.holdout, job.seed)
    return save_state(site.states, state_of(np.where(kept, outer * count + inner, LEFT_OUT)))


def _test_rows(job: TrainingJob, test: Dataset, site: Site) -> DatasetRows:
    """Rows of a test dataset: all, or as many as the job's test_rows, at random by the seed."""
    if job.test_rows is None:
        return DatasetRows(test.url, digest=test.digest)

    def dealt() -> str:
        return save_state(site.states, state_of(keep(np.zeros(test.n, np.int16), 0, job.test_rows, job.seed)))

    return DatasetRows(test.url, site.once("test-rows", dealt), (0,), digest=test.digest)
