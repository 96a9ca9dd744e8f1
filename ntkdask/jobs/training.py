"""What a job computes, whatever file or call it came from: data, split, preprocessing, and what is fitted to them.

`TrainingJob` holds what every job has; `RidgeJob` fits ridge regression on features, `kernel_job.KernelRidgeJob` on a kernel matrix.
`run.run_job` runs any of them in a folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkdask import registry
from ntkdask.datasets import Dataset, open_parts
from ntkdask.datasets.rows import DatasetRows
from ntkdask.errors import DiskSpaceError, InputError, JobError
from ntkdask.execution.progress import Listener, Record
from ntkdask.features.base import FeatureMap
from ntkdask.planning.pace import duration, elapsed_seconds
from ntkdask.planning.tiles import Plan, format_bytes
from ntkdask.preprocessing import Step
from ntkdask.store import free_bytes
from ntkdask.workflows.ridge.calibrate import calibrate_features
from ntkdask.workflows.ridge.fit import RidgeFit, RidgeOptions, fit_ridge
from ntkdask.workflows.ridge.plan import Costs, Resources, RidgePlan, RidgeShape, costs_of, plan_ridge
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS

NUMERICS = 2
"""Raised when a change makes equal parameters give other numbers; part of every fingerprint."""


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
    what its stages' names begin with."""

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


@dataclass(frozen=True)
class RidgeJob(TrainingJob):
    """Ridge regression on the features of a map (None: on the rows themselves)."""

    features: FeatureMap | None
    options: RidgeOptions

    def selection_under(self, plan: RidgePlan) -> str:
        """How alpha is chosen."""
        return self.options.selection

    def n_inner(self, plan: RidgePlan) -> int:
        """Into how many groups training rows are dealt for choosing alpha."""
        return self._n_groups

    def model_config(self) -> dict[str, Any]:
        """Features and solver."""
        solver = {**asdict(self.options), "folds": self.inner_folds, "holdout": self.holdout}
        return {"features": registry.to_config(self.features), "solver": solver}

    def shape(self) -> RidgeShape:
        """What the plan depends on."""
        data = self.train
        m = int(np.prod(data.row_shape)) if self.features is None else self.features.n_components
        return RidgeShape(
            data.n, self.n_train, data.row_shape, self.row_bytes, m, self.n_targets, self._n_groups, self.options.selection,
            self.n_outer,
        )  # fmt: skip

    @property
    def _n_groups(self) -> int:
        return self.options.n_groups(self.inner_folds)

    def plan_for(self, resources: Resources) -> tuple[RidgePlan, Costs]:
        """Sizes that fit, and what they cost; MemoryBudgetError when nothing fits."""
        plan = plan_ridge(self.shape(), self.features, self.steps, plan=self.plan, resources=resources)
        return plan, self.costs_under(plan)

    def costs_under(self, plan: RidgePlan) -> Costs:
        """What a run under a stored plan costs."""
        return costs_of(self.shape(), self.features, self.steps, plan)

    def stored_plan(self, table: Mapping[str, Any]) -> RidgePlan:
        """The plan that a run's record holds."""
        return RidgePlan(**table)

    def fit(self, fold: Fold, plan: RidgePlan, site: Site) -> RidgeFit:
        """Preprocessing, Gram sums and ridge on the training rows of one outer fold."""
        return fit_ridge(
            fold.train, fold.groups, self.options, plan, features=self.features, steps=self.steps, n_classes=self.n_classes,
            k=self.n_targets, url=site.url, client=site.client, listener=site.listener, record=site.record, name=site.name,
        )  # fmt: skip

    def measured(self, resources: Resources, client: Any = None, *, always: bool = False) -> Resources:
        """With the pace of the map where the time is to be told; it decides nothing."""
        if not always:
            return resources
        plan, m = self.plan_for(resources)[0], self.shape().m
        pace = calibrate_features(
            self.features, self.train.row_shape, plan.dtype, plan.batch_rows, m,
            client=client, slots=resources.slots, n_threads=resources.threads, device=plan.device,
        )  # fmt: skip
        return replace(resources, row_pace=pace)

    def time_words(self, plan: RidgePlan, resources: Resources) -> dict[str, str]:
        """Seconds of the Gram sums, features and products, and of predictions; neither reading nor solving is among them."""
        pace, shape, slots = resources.row_pace, self.shape(), resources.slots
        if pace is None:
            return {}
        rows = shape.n_runs * shape.n_train * (2 if shape.selection == "loo" else 1)
        slabs, tiles = (-(-shape.n_total // size) for size in (plan.slab_rows, plan.tile_rows))
        mapped, products = (
            elapsed_seconds(work, shape.n_runs * slabs, slots)
            for work in (rows * pace.row_seconds, pace.product_seconds(rows, shape.m))
        )
        predict = elapsed_seconds(self.n_predicted * pace.row_seconds, max(1, tiles), slots)
        on = f"on {slots} slot{'s' if slots != 1 else ''}"
        return {
            "pace": f"{duration(pace.row_seconds)} a row of features, measured on batches of {pace.rows:,} with {pace.threads} "
            f"thread{'s' if pace.threads != 1 else ''}",
            "time of gram-slab": f"{duration(mapped + products)} {on}: features {duration(mapped)}, products {duration(products)}",
            "time of predict": f"{duration(predict)} {on}",
        }  # fmt: skip

    def size_words(self, plan: RidgePlan) -> dict[str, str]:
        """Features and slabs."""
        shape = self.shape()
        return {
            "features": f"{shape.m:,} ({plan.dtype}), targets {shape.k}, fits {shape.n_runs}, groups of rows {shape.n_groups}",
            "slabs": f"{-(-shape.n_total // plan.slab_rows)} of {plan.slab_rows:,} rows, batches of {plan.batch_rows:,}",
        }


def open_job_data(url: str | None, train: str | None, test: str | None, split: Any) -> tuple[Dataset, Dataset | None]:
    """(train, test) datasets of a job: `url` with parts or with a split, or two urls; errors where they disagree."""
    if url is not None:
        parts = open_parts(url)
        if split is not None:
            if "all" not in parts:
                raise JobError(
                    f"{url} has parts {', '.join(parts)} and the job has a split: use one of them as url, or drop the split."
                )
            return require_labels(parts["all"]), None
        if not {"train", "test"} <= set(parts):
            raise JobError(
                f"{url} has no train and test parts: add split = {{ test = 0.2 }} or {{ folds = 5 }} to [data]."
            )
        return _compatible(parts["train"], parts["test"])
    return _compatible(_only(train), _only(test))


def _only(url: str | None) -> Dataset:
    parts = open_parts(str(url))
    if "all" not in parts:
        raise JobError(f"{url} has parts {', '.join(parts)}: name one of them, as in {url}/train.")
    return parts["all"]


def require_labels(data: Dataset) -> Dataset:
    """`data` when it has targets, and classes in the plural; InputError otherwise."""
    if data.kind == "unlabelled":
        raise InputError(f"dataset {data.url} has no targets. Import it again with them (--target).")
    counts = [c for c in dict(data.provenance.get("counts") or {}).values() if c]
    if data.kind == "classification" and counts and len(counts) < 2:
        raise InputError(f"dataset {data.url} has one class only; a classifier needs at least two. Check --target.")
    return data


def _compatible(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    for name in ("row_shape", "kind", "class_names", "target_shape"):
        a, b = getattr(train, name), getattr(test, name)
        if a != b:
            raise InputError(
                f"train and test disagree: {name} is {a} in {train.url} and {b} in {test.url}. Import both the same way."
            )
    return require_labels(train), require_labels(test)


def require_disk(folder: Path, costs: Costs) -> None:
    """DiskSpaceError, with the numbers, when `folder` has less room than a run writes."""
    free = free_bytes(folder)
    if costs.disk_bytes > free:
        raise DiskSpaceError(
            f"the run writes up to {format_bytes(costs.disk_bytes)} to {folder}, where {format_bytes(free)} are free. "
            "Free some space, choose another --folder, or use fewer n_components."
        )
