"""Recipes: what is fitted to training rows, as objects that jobs and estimators hold; they plan, tell the costs, and fit.

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
    """The facts of a requested fit on which its plan depends.

    Parameters
    ----------
    n_total : int
        Rows of the dataset, selected or not.
    n_train : int
        Training rows of one fit.
    n_predicted : int
        Rows that are predicted in all.
    row_shape : tuple of int
        Shape of a row.
    row_bytes : int
        Stored bytes of a row.
    n_targets : int
        Number of columns of the targets.
    n_fits : int
        How often a model is fitted: the number of outer folds.
    inner_folds : int
        Groups of training rows for selection "kfold".
    steps : tuple of Step
        Preprocessing.
    plan : Plan
        Requested sizes and dtype.
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
        """The request of one fit to all of these rows, or of predictions for them."""
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
    """A model to be fitted, with the options of its solver.

    Subclasses are frozen dataclasses; P is the class of their plans.
    """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The entries of the fingerprint that the recipe decides; one of its keys is "solver"."""

    @abstractmethod
    def plan(self, request: FitRequest, resources: Resources, *, stored: bool = True) -> P:
        """Choose sizes that fit the workers.

        Parameters
        ----------
        request : FitRequest
            Rows, targets, preprocessing, requested sizes.
        resources : Resources
            Memory, threads and slots of the workers.
        stored : bool
            Whether partial results are kept in a folder.

        Raises
        ------
        MemoryBudgetError
            When no sizes fit, with the numbers.
        """

    @abstractmethod
    def stored_plan(self, table: Mapping[str, Any]) -> P:
        """The plan from the table that a run's record holds."""

    @abstractmethod
    def costs(self, request: FitRequest, plan: P) -> Costs:
        """Memory of every task, flops, tasks and disk of a run under a plan."""

    @abstractmethod
    def selection(self, plan: P) -> str:
        """How alpha is chosen under a plan."""

    @abstractmethod
    def n_groups(self, plan: P, inner_folds: int) -> int:
        """The number of groups into which training rows are dealt for choosing alpha; 1 where none are held out."""

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
        """Fit to the selected rows.

        Parameters
        ----------
        rows : Rows
            Training rows, targets, weights and part numbers.
        groups : sequence of tuples of int
            Parts of the rows: the folds that choose alpha, or one group of all. Empty: every row, one group.
        plan : P
            Sizes and threads, which decide the bits.
        site : Site
            Where the stages run; a run in its folder is resumed.
        steps : tuple of Step
            Preprocessing.
        n_classes : int or None
            Labels 0 … n_classes − 1 become zero-mean one-hot targets. None: targets are numbers.
        n_targets : int
            Columns of the targets.

        Returns
        -------
        RidgeFit
            The model at the chosen alpha and the path of scores.
        """

    def measured(self, request: FitRequest, resources: Resources, site: Site, *, always: bool = False) -> Resources:
        """`resources` with the measured pace of the kernel or the map, where it decides the plan; always: also to predict time."""
        return resources

    def time_words(self, request: FitRequest, plan: P, resources: Resources) -> dict[str, str]:
        """{name: text} of the times in a printed plan, at the pace of `resources`; empty where none was measured."""
        return {}

    def size_words(self, request: FitRequest, plan: P) -> dict[str, str]:
        """{name: text} of the sizes in a printed plan."""
        return {}
