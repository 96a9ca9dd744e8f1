"""The data of one fit of an estimator: where tasks read it, its folds, and what the fit is known by in its folder."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.datasets.rows import DatasetRows, MemoryRows, Rows
from ntkdask.estimators.choice import SEED, Choice
from ntkdask.execution.progress import NUMERICS, Record
from ntkdask.states import content_digest, save_state
from ntkdask.workflows.recipe import Recipe
from ntkdask.workflows.sparse import SparseState
from ntkdask.workflows.split import HOLDOUT, deal_inner, group_rows, state_of


@dataclass
class Source:
    """The checked data of a fit, and where it runs.

    Parameters
    ----------
    x : array, dask array or Dataset, (n, ...)
        Checked rows.
    targets : array or None
        int64 labels or float64 targets. None: those of the dataset x.
    rows : Rows
        x and its targets as tasks read them.
    digest : str
        Digest of their content; "" where nothing is stored.
    folder : Path or None
        Where the fit keeps its results. None: nowhere.
    client : distributed.Client or None
        Whose workers compute. None: this process.
    held : ExitStack
        Closes, after the fit, what was opened for it: the lock of the folder, temporary folders.
    choice : Choice
        The alphas, and how one is chosen.
    """

    x: Any
    targets: Any
    rows: Rows
    digest: str
    folder: Path | None
    client: Any
    held: contextlib.ExitStack
    choice: Choice

    def dealt(self, selection: str, n_groups: int, record: Record) -> tuple[Rows, list[tuple[int, ...]]]:
        """The rows with part numbers, and the groups of parts.

        Where alpha is chosen by folds or by a holdout, every part is a group; else the rows are returned as they are, without groups.
        """
        rows, folder = self.rows, self.folder
        if n_groups == 1:
            return rows, []

        def numbers() -> np.ndarray:
            if self.choice.parts is not None:
                return self.choice.parts
            return deal_inner(group_rows(rows, self.client), selection, n_groups, HOLDOUT, SEED, rows.row_weights())

        groups: list[tuple[int, ...]] = [(i,) for i in range(n_groups)]
        if isinstance(rows, MemoryRows):
            return replace(rows, numbers=numbers()), groups
        assert isinstance(rows, (DatasetRows, SparseState))
        # tasks read a dataset's part numbers from a state; without a folder it is deleted after this fit
        states = (
            folder / "state"
            if folder
            else Path(self.held.enter_context(tempfile.TemporaryDirectory(prefix="ntkdask-")))
        )
        return replace(rows, parts_url=record.once("split", lambda: save_state(states, state_of(numbers())))), groups


def fingerprint(recipe: Recipe[Any], source: Source, n_classes: int | None, dtype: str) -> dict[str, Any]:
    """Everything that decides the result of a fit; one with another fingerprint is not resumed."""
    config = recipe.config()
    parts = source.choice.parts
    dealt: dict[str, Any] = {"folds": source.choice.inner_folds, "holdout": HOLDOUT, "seed": SEED}
    if parts is not None:
        dealt["parts"] = content_digest(parts)
    return {
        "data": source.digest,
        "n_classes": n_classes,
        **config,
        "dtype": dtype,
        "solver": {**config["solver"], **dealt},
        "numerics": NUMERICS,
    }
