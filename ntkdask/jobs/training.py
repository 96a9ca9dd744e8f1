"""The training job that a file or a call describes: data, split, preprocessing, and the recipe that is fitted to them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.datasets import Dataset
from ntkdask.execution.progress import NUMERICS
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import Step
from ntkdask.workflows.recipe import FitRequest, Recipe
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS


@dataclass(frozen=True)
class SplitRule:
    """How rows are split: into folds (cross-validation) or by a test fraction.

    Parameters
    ----------
    folds : int or None
        Outer folds; every one is the test rows of one fit.
    test : float or None
        Share of the rows that are test rows.
    shuffle : bool
        At random by the seed; False: in contiguous stretches of rows, the last ones to test.
    """

    folds: int | None = None
    test: float | None = None
    shuffle: bool = True


@dataclass(frozen=True)
class TrainingJob:
    """Data, split, preprocessing and a recipe; `jobs.run.run_job` runs it in a folder.

    Parameters
    ----------
    name : str
        Name of the run and its report.
    train : Dataset
        Rows that are split; the training rows where `test` is given.
    test : Dataset or None
        Rows to test on. None: rows of `train`, by the split.
    split : SplitRule or None
        How `train` is split. None where `test` is given.
    steps : tuple of Step
        Preprocessing, fitted to training rows alone.
    recipe : Recipe
        What is fitted: ridge on features, kernel ridge.
    inner_folds : int
        Groups of training rows for k-fold selection of alpha.
    holdout : float
        Share of training rows that selection "holdout" holds out.
    train_rows, test_rows : int or None
        How many training and test rows are taken, at random by the seed; fewer rows are among more of the same seed. None: all.
    seed : int
        Seed of the split.
    plan : Plan
        Requested sizes and dtype.
    """

    name: str
    train: Dataset
    test: Dataset | None
    split: SplitRule | None
    steps: tuple[Step, ...]
    recipe: Recipe[Any]
    inner_folds: int = field(default=INNER_FOLDS, kw_only=True)
    holdout: float = field(default=HOLDOUT, kw_only=True)
    train_rows: int | None = field(default=None, kw_only=True)
    test_rows: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    plan: Plan = field(default_factory=Plan, kw_only=True)

    def request(self) -> FitRequest:
        """The facts of the job on which the plan of its recipe depends."""
        data = self.train
        return FitRequest(
            n_total=data.n,
            n_train=self.n_train,
            n_predicted=self.n_predicted,
            row_shape=data.row_shape,
            row_bytes=int(np.prod(data.row_shape)) * np.dtype(data.dtype).itemsize,
            n_targets=self.n_targets,
            n_fits=self.n_outer,
            inner_folds=self.inner_folds,
            steps=self.steps,
            plan=self.plan,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the results, except the plan, which the run's record keeps."""
        recipe = self.recipe.config()
        return {
            "train": self.train.digest,
            "test": None if self.test is None else self.test.digest,
            "split": None if self.split is None else asdict(self.split),
            "train_rows": self.train_rows,
            "test_rows": self.test_rows,
            "preprocess": registry.to_config(self.steps),
            **recipe,
            "solver": {**recipe["solver"], "folds": self.inner_folds, "holdout": self.holdout},
            "seed": self.seed,
            "dtype": self.plan.dtype,
            "numerics": NUMERICS,
        }

    @property
    def n_classes(self) -> int | None:
        """Number of classes; None for regression."""
        return len(self.train.class_names or ()) if self.train.kind == "classification" else None

    @property
    def n_targets(self) -> int:
        """Number of columns of the targets."""
        if self.n_classes is not None:
            return self.n_classes
        return int(np.prod(self.train.target_shape or (1,)))

    @property
    def n_outer(self) -> int:
        """How many times a model is fitted and tested."""
        return (self.split.folds or 1) if self.split else 1

    @property
    def n_train(self) -> int:
        """About how many rows train a fit."""
        share = 1.0 if self.split is None else 1 - (self.split.test or 1 / self.n_outer)
        rows = round(share * self.train.n)
        return rows if self.train_rows is None else min(rows, self.train_rows)

    @property
    def n_predicted(self) -> int:
        """About how many rows are predicted in all."""
        if self.test is not None:
            rows = self.test.n
        elif self.n_outer > 1:
            rows = self.train.n
        else:
            share = self.split.test if self.split and self.split.test else 1.0
            rows = round(share * self.train.n)
        return rows if self.test_rows is None else min(rows, self.test_rows)
