"""What the two kernel ridge estimators share: the recipe, given kernel matrices, the solver that was used."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted

from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import MemoryRows, Rows
from ntkdask.errors import InputError
from ntkdask.estimators.base import RidgeBase, found_resources
from ntkdask.estimators.choice import Choice
from ntkdask.estimators.inputs import numerics_dtype
from ntkdask.estimators.precomputed import GivenColumns, TrainingMatrix, check_matrix, is_precomputed
from ntkdask.estimators.source import Source
from ntkdask.execution.site import Site
from ntkdask.kernels import NTK
from ntkdask.kernels.base import parts_of, require_kernel
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import RidgePlan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan
from ntkdask.workflows.kernel_ridge.recipe import KernelRidgeRecipe, predictions_plan
from ntkdask.workflows.model import KernelRidgeModel, RidgeFit


class KernelRidgeBase(RidgeBase):
    """What the two kernel ridge estimators share; see their docstrings."""

    alpha_per_target = False
    store_cv_results = False
    _parts = ("kernel",)

    kernel: Any
    fit_intercept: bool
    solver: str
    tolerance: float
    max_iterations: int

    @property
    def dual_coef_(self) -> np.ndarray:
        """Coefficients of the training rows, (n, n_targets) or, for one target or two classes, (n,), float64.

        The rows are in the order of the fit: with selection="kfold" or "holdout" group after group.
        """
        check_is_fitted(self)
        return self._coefficients(self.model_.coefficients.T).T

    @property
    def intercept_(self) -> np.ndarray | float:
        """Intercept of every target, (n_targets,) or a number, float64; 0 without an intercept."""
        check_is_fitted(self)
        return self._intercepts(self.model_.intercept)

    def _takes_images(self, fitted: bool) -> bool:
        return not is_precomputed(self.kernel)

    def _chosen(self, x: Any, y: Any, weights: Any) -> Choice:
        # before a search cuts it
        return super()._chosen(check_matrix(self, x) if is_precomputed(self.kernel) else x, y, weights)

    def _located(self, x: Any, targets: Any, weights: Any, folder: Path | None) -> tuple[Rows, str]:
        if not is_precomputed(self.kernel):
            return super()._located(x, targets, weights, folder)
        numbers = np.arange(len(x), dtype=numerics_dtype(x))[:, None]
        check_consistent_length(x, targets)
        return MemoryRows(numbers, targets, weights), ""

    def _recipe(self, source: Source, dtype: str) -> KernelRidgeRecipe:
        kernel: Any = NTK(fully_connected(1)) if self.kernel is None else self.kernel
        if is_precomputed(kernel):
            kernel = TrainingMatrix(source.x)
        parts = parts_of(require_kernel(kernel, type(self).__name__))
        if parts:
            raise InputError(
                f"{type(self).__name__}: {type(kernel).__name__} gives {' and '.join(parts)} in one call. Fit NNGP(network) or "
                "NTK(network)."
            )
        choice = source.choice
        options = KernelRidgeOptions(
            choice.alphas,
            self.fit_intercept,
            choice.selection,
            self.solver,
            self.tolerance,
            self.max_iterations,
            self.alpha_per_target,
            self.store_cv_results,
        )
        return KernelRidgeRecipe(kernel, options)

    def _fitted(self, fit: RidgeFit, plan: KernelRidgePlan) -> RidgeFit:
        self.solver_, self.fit_facts_ = plan.solver, fit.facts
        note = convergence_note(fit.facts)
        if note:
            warnings.warn(f"{type(self).__name__}: {note}", ConvergenceWarning, stacklevel=5)
        if is_precomputed(self.kernel):
            return replace(fit, model=self._with_columns(fit.model))
        return fit if self.url is not None else _in_memory(fit)

    def _with_columns(self, model: Any) -> KernelRidgeModel:
        """The model of a given matrix as one of rows of K(test, training)."""
        dtype, row_shape = model.preprocessor.dtype, (self.n_features_in_,)
        return replace(model, kernel=GivenColumns(), preprocessor=FittedPreprocessor.for_rows(row_shape, dtype, dtype))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = is_precomputed(self.kernel)
        return tags

    def _predict_plan(self, rows: Rows, x: Any) -> RidgePlan:
        return predictions_plan(self.model_, rows, found_resources(self.client, x), Site(client=self.client))

    def _coefficients(self, values: np.ndarray) -> Any:
        raise NotImplementedError

    def _intercepts(self, values: np.ndarray) -> Any:
        return self._coefficients(values)


def _in_memory(fit: RidgeFit) -> RidgeFit:
    """The fit with its training rows in memory: without a url the folder that holds them is deleted after the call."""
    model = fit.model
    if not isinstance(model, KernelRidgeModel) or not isinstance(model.points, Dataset):
        return fit
    return replace(fit, model=replace(model, points=model.points.rows(0, model.points.n)))
