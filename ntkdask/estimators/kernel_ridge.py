"""Kernel ridge regression as scikit-learn estimators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from ntkdask import registry
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import Rows
from ntkdask.errors import InputError
from ntkdask.estimators.base import SEED, RidgeBase, Source, found_resources
from ntkdask.estimators.inputs import numerics_dtype
from ntkdask.estimators.kinds import ClassifierPart, RegressorPart
from ntkdask.execution.progress import NUMERICS, Record
from ntkdask.execution.site import Site
from ntkdask.files import require_disk
from ntkdask.kernels import NTK, Kernel
from ntkdask.kernels.base import completed
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.kernel_ridge.costs import kernel_costs
from ntkdask.workflows.kernel_ridge.fit import fit_kernel_ridge
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan, KernelShape, measured, plan_kernel_ridge
from ntkdask.workflows.model import KernelRidgeModel, RidgeFit
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS


class _KernelRidge(RidgeBase):
    """What the two kernel ridge estimators share; see their texts."""

    _parts = ("kernel",)

    def __init__(
        self,
        kernel: Kernel | None = None,
        alphas: Sequence[float] = (1.0,),
        fit_intercept: bool = True,
        selection: str = "auto",
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        client: Any = None,
        url: Any = None,
    ) -> None:
        self.kernel = kernel
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.selection = selection
        self.solver = solver
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.client = client
        self.url = url

    @property
    def dual_coef_(self) -> np.ndarray:
        """Coefficients of the training rows, (n, n_targets) or, for one target (or two classes), (n,), float64; rows in the order
        of the fit: with selection="kfold" or "holdout" group after group.
        """
        check_is_fitted(self)
        return self._coefficients(self.model_.coefficients.T).T

    @property
    def intercept_(self) -> np.ndarray | float:
        """Intercept of every target, (n_targets,) or a number, float64; 0 without an intercept."""
        check_is_fitted(self)
        return self._coefficients(self.model_.intercept)

    def _takes_images(self, fitted: bool) -> bool:
        return True

    def _fit_rows(self, source: Source, n_classes: int | None, k: int) -> RidgeFit:
        kernel = NTK(fully_connected(1)) if self.kernel is None else self.kernel
        if isinstance(kernel, type) or not callable(kernel) or not hasattr(kernel, "workspace_bytes"):
            raise InputError(
                f"{type(self).__name__}: kernel is {kernel!r}; give one of ntkdask.kernels, such as RBF(0.1)."
            )
        alphas: Any = self.alphas
        options = KernelRidgeOptions(
            alphas, self.fit_intercept, self.selection, self.solver, self.tolerance, self.max_iterations
        )
        dtype, folder = numerics_dtype(source.x), source.folder
        # in memory nothing is recorded, and a kernel need not be describable
        fingerprint = (
            {}
            if folder is None
            else {
                "data": source.digest,
                "n_classes": n_classes,
                "kernel": registry.to_config(kernel),
                "dtype": dtype,
                "solver": {**asdict(options), "folds": INNER_FOLDS, "holdout": HOLDOUT, "seed": SEED},
                "numerics": NUMERICS,
            }
        )
        record = Record.open(folder, fingerprint)
        found = found_resources(self.client, source.x)
        shape, asked = _shape(source.rows, k), Plan(dtype=dtype)
        if folder is not None and completed(kernel).is_slow and "plan" not in record.stages:
            found = measured(found, kernel, shape, options, (), plan=asked, site=Site(client=self.client))
        plan = plan_kernel_ridge(shape, kernel, options, (), plan=asked, resources=found, stored=folder is not None)
        if folder is not None:
            require_disk(
                folder, kernel_costs(shape, kernel, options, (), plan).disk_bytes, "the fit", "or choose another url"
            )
            plan = KernelRidgePlan(**record.once("plan", plan.to_json))
        selection = options.selection_of(plan.solver)
        rows, groups = source.dealt(selection, options.n_groups(plan.solver, INNER_FOLDS), record)
        fit = fit_kernel_ridge(
            rows,
            groups,
            options,
            plan,
            kernel=kernel,
            n_classes=n_classes,
            site=Site(folder, self.client, record=record, threads=plan.threads),
        )
        self.solver_, self.fit_facts_ = plan.solver, fit.facts
        note = convergence_note(fit.facts)
        if note:
            warnings.warn(f"{type(self).__name__}: {note}", ConvergenceWarning, stacklevel=4)
        return fit if self.url is not None else _in_memory(fit)

    def _predict_plan(self, rows: Rows, x: Any) -> RidgePlan:
        model, found = self.model_, found_resources(self.client, x)
        shape = KernelShape(
            rows.n_total, len(model.coefficients), rows.row_shape, _row_bytes(rows), model.intercept.size
        )
        dtype = model.preprocessor.dtype
        # the sizes of predictions do not depend on how the model was solved
        options, asked = KernelRidgeOptions(solver="cg"), Plan(dtype=dtype)
        if self.client is not None and completed(model.kernel).is_slow:
            found = measured(found, model.kernel, shape, options, (), plan=asked, site=Site(client=self.client))
        return plan_kernel_ridge(shape, model.kernel, options, (), plan=asked, resources=found)

    def _coefficients(self, values: np.ndarray) -> Any:
        raise NotImplementedError


class KernelRidgeClassifier(ClassifierPart, _KernelRidge):
    """Kernel ridge regression onto zero-mean one-hot targets; the class with the largest output.

    f(x) = Σ_i k(x, x_i) β_i + b with (K + αI)β = Y − 1b and Σβ = 0: the intercept is not penalised, as in `RidgeClassifier`, whose
    fit on features φ this is for k = ⟨φ, φ⟩. α multiplies the identity beside the unnormalised K; α = 0 interpolates.

    kernel: such as `NTK(network)`, `RBF(gamma)`; None is NTK(fully_connected(1)). Its parameters are set as `kernel__gamma`.
    alphas: one α >= 0, or several to choose from by `selection`: "gcv" (from a stochastic trace out of core), "loo" (not out of
    core), "kfold" (5 folds), "holdout" (a fifth of the rows), by squared error; "auto" is GCV in one memory and a holdout out of
    core. Rows that repeat share a fold.
    solver: "eigh", "cholesky" (in one memory), "tiled_cholesky", "cg" (out of core, for a url or a client), or "auto", the cheapest
    that fits the workers. tolerance: relative residual of "cg", within max_iterations; what it reached is in `fit_facts_`, and short
    of it there is a ConvergenceWarning.
    client, url, X, y, sample_weight: as in `RidgeClassifier`; with a url (or a client) the kernel matrix is stored in tiles there.

    After fit: `alpha_`, `alpha_path_`, `classes_`, `dual_coef_`, `intercept_`, `model_`, `solver_`, `fit_facts_` (how it was solved).
    Source: MATH.md §6; Arora et al. 2019 (NTK regression).

    >>> X, y = np.array([[0.0, 1], [1, 1], [9, 1], [10, 1]]), np.array(["low", "low", "high", "high"])
    >>> print(*KernelRidgeClassifier(alphas=(0.1, 1.0)).fit(X, y).predict([[2.0, 1], [8, 1]]))
    low high
    """


class KernelRidgeRegressor(RegressorPart, _KernelRidge):
    """Kernel ridge regression onto one or several targets: f(x) = Σ_i k(x, x_i) β_i + b, (K + αI)β = Y − 1b, Σβ = 0.

    Parameters, inputs and attributes are those of `KernelRidgeClassifier`, without `classes_`; y is (n,) or (n, k), and predictions
    have the shape of scikit-learn's KernelRidge. One α is chosen for all the targets.

    >>> from ntkdask.kernels import RBF
    >>> X = np.linspace(0, 3, 30)[:, None]
    >>> KernelRidgeRegressor(RBF(1.0), alphas=(1e-8,)).fit(X, np.sin(X[:, 0])).predict([[1.0]]).round(3)
    array([0.841])
    """


def _in_memory(fit: RidgeFit) -> RidgeFit:
    """The fit with its training rows in memory: without a url their folder goes with the call."""
    model = fit.model
    if not isinstance(model, KernelRidgeModel) or not isinstance(model.points, Dataset):
        return fit
    return replace(fit, model=replace(model, points=model.points.rows(0, model.points.n)))


def _row_bytes(rows: Rows) -> int:
    return int(np.prod(rows.row_shape, dtype=int)) * np.dtype(rows.dtype).itemsize


def _shape(rows: Rows, k: int) -> KernelShape:
    return KernelShape(rows.n_total, rows.n_total, rows.row_shape, _row_bytes(rows), k, inner_folds=INNER_FOLDS)
