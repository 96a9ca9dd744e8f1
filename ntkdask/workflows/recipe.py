"""What is fitted to training rows, as an object that jobs and estimators both hold: its plan, its costs, its fit, its words.

`ridge.recipe` fits ridge regression on features, `kernel_ridge.recipe` kernel ridge regression on a kernel matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.planning.resources import Costs, Resources, RidgePlan
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import Step
from ntkdask.workflows.model import RidgeFit
from ntkdask.workflows.split import INNER_FOLDS

P = TypeVar("P", bound=RidgePlan)


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """What a fit is asked to do, as far as its plan depends on it.

    Parameters
    ----------
    n_total : int
        Rows of the dataset, selected or not.
    n_train : int
        Rows of one fit.
    n_predicted : int
        Rows that are predicted in all.
    row_shape : tuple of int
        Shape of a row.
    row_bytes : int
        Stored bytes of a row.
    n_targets : int
        Columns of the targets.
    n_fits : int
        How often a model is fitted: outer folds.
    inner_folds : int
        Groups of rows that k-fold selection deals.
    steps : tuple of Step
        Preprocessing.
    plan : Plan
        Sizes and dtype that were asked for.
    """

    n_total: int
    n_train: int
    row_shape: tuple[int, ...]
    row_bytes: int
    n_targets: int
    n_predicted: int = 0
    n_fits: int = 1
    inner_folds: int = INNER_FOLDS
    steps: tuple[Step, ...] = ()
    plan: Plan = Plan()

    @classmethod
    def of_rows(cls, rows: Rows, n_targets: int, dtype: str) -> FitRequest:
        """The request of one fit to all of these rows, or of predicting them."""
        row_bytes = math.prod(rows.row_shape) * np.dtype(rows.dtype).itemsize
        return cls(
            n_total=rows.n_total,
            n_train=rows.n_total,
            row_shape=rows.row_shape,
            row_bytes=row_bytes,
            n_targets=n_targets,
            plan=Plan(dtype=dtype),
        )


class Recipe(ABC, Generic[P]):
    """A model to be fitted, with the options of its solver; a frozen dataclass. P: the class of its plans."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What decides the results, as the fingerprint keeps it; "solver" among its keys."""

    @abstractmethod
    def plan(self, request: FitRequest, resources: Resources, *, stored: bool = True) -> P:
        """Sizes that fit; MemoryBudgetError, with the numbers, when none do. stored: results go to a folder."""

    @abstractmethod
    def stored_plan(self, table: Mapping[str, Any]) -> P:
        """The plan that a run's record holds."""

    @abstractmethod
    def costs(self, request: FitRequest, plan: P) -> Costs:
        """Memory of every task, flops, tasks and disk of a run under a plan."""

    @abstractmethod
    def selection(self, plan: P) -> str:
        """How alpha is chosen under a plan."""

    @abstractmethod
    def n_groups(self, plan: P, inner_folds: int) -> int:
        """Into how many groups training rows are dealt for choosing alpha."""

    @abstractmethod
    def fit(
        self,
        rows: Rows,
        groups: Sequence[tuple[int, ...]],
        plan: P,
        site: Site,
        *,
        steps: tuple[Step, ...] = (),
        n_classes: int | None = None,
        n_targets: int = 1,
    ) -> RidgeFit:
        """Fit to the selected rows, dealt into groups of parts; labels below n_classes, or numbers in n_targets columns."""

    def measured(self, request: FitRequest, resources: Resources, site: Site, *, always: bool = False) -> Resources:
        """`resources` with the pace of what is computed, where that decides the plan; always: also where it only predicts time."""
        return resources

    def time_words(self, request: FitRequest, plan: P, resources: Resources) -> dict[str, str]:
        """What a printed plan says of time, at the pace of `resources`."""
        return {}

    def size_words(self, request: FitRequest, plan: P) -> dict[str, str]:
        """What a printed plan says of the fit's own sizes."""
        return {}
