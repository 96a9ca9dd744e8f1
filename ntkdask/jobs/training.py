"""What a job computes, whatever file or call it came from: data, split, preprocessing, and what is fitted to them.

`TrainingJob` holds what every job has; `RidgeJob` fits ridge regression on features, `kernel_job.KernelRidgeJob` on a kernel matrix.
`run.run_job` runs any of them in a folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkdask import registry
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import DatasetRows
from ntkdask.execution.progress import NUMERICS, Listener, Record
from ntkdask.planning.resources import Costs, Resources, RidgePlan
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import Step
from ntkdask.workflows.model import RidgeFit
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS


@dataclass(frozen=True)
class SplitRule:
    """How rows are dealt: folds (cross-validation) or a test fraction; neither when train and test are given."""

    folds: int | None = None
    test: float | None = None
    shuffle: bool = True


class Fold(NamedTuple):
    """Rows of one outer fold: all training parts grouped for the choice of alpha, and the rows to test on."""

    train: DatasetRows
    groups: list[tuple[int, ...]]
    test: DatasetRows


@dataclass(frozen=True)
class Site:
    """Where a fit runs and what it tells: its folder, the cluster (None: here), who listens, what earlier runs finished, and
    what its stages' names begin with.
    """

    url: Path
    client: Any
    listener: Listener
    record: Record
    name: str


@dataclass(frozen=True)
class TrainingJob(ABC):
    """Data, split and preprocessing; a subclass says what is fitted, what it costs and how alpha is chosen.

    train_rows, test_rows: how many rows of each side are taken, at random by the seed, fewer being part of more; None: all.
    """

    name: str
    train: Dataset
    test: Dataset | None
    split: SplitRule | None
    steps: tuple[Step, ...]
    inner_folds: int = field(default=INNER_FOLDS, kw_only=True)
    holdout: float = field(default=HOLDOUT, kw_only=True)
    train_rows: int | None = field(default=None, kw_only=True)
    test_rows: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    plan: Plan = field(default_factory=Plan, kw_only=True)

    @abstractmethod
    def selection_under(self, plan: RidgePlan) -> str:
        """How alpha is chosen."""

    @abstractmethod
    def n_inner(self, plan: RidgePlan) -> int:
        """Into how many groups training rows are dealt for choosing alpha."""

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """The subclass's part of the fingerprint."""

    @abstractmethod
    def plan_for(self, resources: Resources) -> tuple[RidgePlan, Costs]:
        """Sizes that fit, and what they cost; MemoryBudgetError when nothing fits."""

    @abstractmethod
    def costs_under(self, plan: RidgePlan) -> Costs:
        """What a run under a stored plan costs."""

    @abstractmethod
    def stored_plan(self, table: Mapping[str, Any]) -> RidgePlan:
        """The plan that a run's record holds."""

    @abstractmethod
    def fit(self, fold: Fold, plan: RidgePlan, site: Site) -> RidgeFit:
        """Fit to the training rows of one outer fold; the model is stored."""

    def measured(self, resources: Resources, client: Any = None, *, always: bool = False) -> Resources:
        """`resources` with the pace of the job's kernel where that decides the plan (always: or only tells the time)."""
        return resources

    def time_words(self, plan: RidgePlan, resources: Resources) -> dict[str, str]:
        """What a printed plan says of time, with the pace of `resources`."""
        return {}

    def size_words(self, plan: RidgePlan) -> dict[str, str]:
        """What a printed plan says of the fit's own sizes."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the results, except the plan, which the run's record keeps."""
        return {
            "train": self.train.digest,
            "test": None if self.test is None else self.test.digest,
            "split": None if self.split is None else asdict(self.split),
            "train_rows": self.train_rows,
            "test_rows": self.test_rows,
            "preprocess": registry.to_config(self.steps),
            **self.model_config(),
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
        """Columns of the targets."""
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
        else:
            rows = (
                self.train.n
                if self.n_outer > 1
                else round((self.split.test or 1.0 if self.split else 1.0) * self.train.n)
            )
        return rows if self.test_rows is None else min(rows, self.test_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return int(np.prod(self.train.row_shape)) * np.dtype(self.train.dtype).itemsize
