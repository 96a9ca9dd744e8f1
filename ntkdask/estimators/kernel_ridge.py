"""Kernel ridge regression as scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ntkdask.estimators.kernel_ridge_base import KernelRidgeBase
from ntkdask.estimators.kinds import ClassifierPart, RegressorPart
from ntkdask.kernels import Kernel


class _KernelRidge(KernelRidgeBase):
    """The parameters of both estimators."""

    def __init__(
        self,
        kernel: Kernel | str | None = None,
        alphas: float | Sequence[float] | np.ndarray = (1.0,),
        fit_intercept: bool = True,
        selection: str = "auto",
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        client: Any = None,
        url: Any = None,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
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
        self.cv = cv
        self.scoring = scoring


class KernelRidgeClassifier(ClassifierPart, _KernelRidge):
    """Kernel ridge regression onto zero-mean one-hot targets; the class with the largest output.

    f(x) = Σ_i k(x, x_i) β_i + b with (K + αI)β = Y − 1b and Σβ = 0: the intercept is not penalised, as in `RidgeClassifier`, whose
    fit on features φ this is for k = ⟨φ, φ⟩. α multiplies the identity beside the unnormalised K; α = 0 interpolates.

    Parameters
    ----------
    kernel : Kernel, "precomputed" or None
        The kernel k, such as `NTK(network)` or `RBF(gamma)`. None: `NTK(fully_connected(1))`. Its parameters are set as
        `kernel__gamma`. "precomputed": X is the matrix, K(training, training) in `fit` and K(test, training) in `predict`, in memory
        and without client and url; which rows repeat is not known then.
    alphas : float or sequence of float
        One α >= 0, or several, of which `selection` chooses one. α = 0 interpolates.
    fit_intercept : bool
        Whether to fit the intercept b, which is not penalised. False: b = 0.
    selection : {"auto", "gcv", "loo", "kfold", "holdout"}
        How one of several alphas is chosen, by squared error: "gcv" generalised cross-validation (out of core from a stochastic
        trace), "loo" exact leave-one-out (not out of core), "kfold" 5 folds, "holdout" a fifth of the rows. "auto": "gcv" where
        the kernel matrix is in one memory, "holdout" out of core. Rows that repeat share a fold.
    solver : {"auto", "eigh", "cholesky", "tiled_cholesky", "cg"}
        "eigh" and "cholesky" hold the kernel matrix in one memory; "tiled_cholesky" and "cg" (preconditioned conjugate gradients) work
        out of core, on the tiles that a url or a client stores. "auto": the cheapest that fits the workers.
    tolerance : float
        Relative residual at which "cg" stops, between 0 and 1.
    max_iterations : int
        Iterations of "cg", at most.
    client : distributed.Client or None
        The cluster that computes; see `connect`. None: everything happens in this process. With a client, X in memory is written
        once to `<url>/inputs`; without a url, to a temporary folder of this machine for as long as `fit` or `predict` takes.
        Workers must see that folder: those of a local cluster do. Pickles leave the client out; clones share it.
    url : str, Path or None
        Folder that keeps the kernel matrix in tiles and other partial results. An equal fit, even after a crash, goes on from
        there. None: nothing is kept.
    cv : int, splitter, iterable or None
        Folds that choose alpha, instead of those of `selection`: a number of folds, a splitter of scikit-learn, or (train, test) row
        numbers. Where every row is held out once, the squared error comes from sums, without a fit for each fold. None: those of
        `selection`, a way that holds no rows out ("gcv") included.
    scoring : str, callable or None
        What held-out rows are scored by, as in scikit-learn ("r2", or scorer(estimator, X, y)), the mean over folds; it needs `cv`,
        or selection "kfold" or "holdout", and rows in memory, and takes a fit for each fold and alpha. None: the squared error.
    class_weight : dict, "balanced" or None
        A weight for each class, {label: weight}, by which the weights of its rows are multiplied; a class that is not named has 1.
        "balanced": n/(C·rows of the class). None: 1. For a dataset the labels are 0 … C − 1.

    Attributes
    ----------
    alpha_ : float
        The α of the model.
    alpha_path_ : list of dict
        A row for each of the alphas with the keys "alpha", "score" (smaller is better) and, where `solver_` is "eigh",
        "effective_dimension". Empty for one α.
    best_score_ : float
        The score of `alpha_`, larger is better: minus the smallest score of the path. Only where alpha was chosen among several.
    classes_ : array (C,)
        The labels, sorted; the number of a label is the column of its target. For a dataset, and for C labels of 0 and 1 a row,
        0 … C − 1.
    dual_coef_ : array (n, C), float64
        Coefficients β of the training rows; (n,) for two classes. The rows are in the order of the fit: with selection "kfold" or
        "holdout" group after group.
    intercept_ : array (C,), float64, or float
        Intercept b; a number for two classes, 0 without an intercept.
    model_ : KernelRidgeModel
        Preprocessing, kernel, training rows and coefficients of the fit.
    solver_ : str
        The solver that was used, one of `solver` but not "auto".
    fit_facts_ : dict
        How it was solved: the solver, why it was taken, and its spectrum, or the iterations and the residual of every solve.
    n_features_in_ : int
        Numbers in a row of X; for images the product of a row's shape.

    Notes
    -----
    X is (n, d) or (n, *row_shape), such as images (n, h, w, c): a NumPy or CuPy array, a torch tensor, a data frame, a dask
    array, or a dataset or its url. A dataset brings its own labels 0 … C − 1 and weights: leave y and sample_weight out. Rows
    that are float64, integers or bool are computed in float64; float32 and float16 in float32; uint8 images in float32 after
    division by 255. Without client and url a dask array is computed into memory. Predictions are NumPy arrays, or lazy for a
    dask array. With a url, or a
    client, the kernel matrix is stored in tiles there.

    `fit` warns (ConvergenceWarning) where "cg" stops short of the tolerance. It raises InputError for data that it cannot use,
    MemoryBudgetError where no tile or solver fits the workers, and FingerprintError where `url` holds a fit of other data or
    parameters.

    y of several labels a row is (n, C) of 0 and 1; each is then a problem of its own with targets ±1, and one α serves all. Outputs
    are no probabilities, so there is no `predict_proba`: scikit-learn's `CalibratedClassifierCV(estimator)` gives calibrated ones.

    References
    ----------
    MATH.md §6; Arora et al. 2019 (NTK regression).

    Examples
    --------
    >>> X, y = np.array([[0.0, 1], [1, 1], [9, 1], [10, 1]]), np.array(["low", "low", "high", "high"])
    >>> print(*KernelRidgeClassifier(alphas=(0.1, 1.0)).fit(X, y).predict([[2.0, 1], [8, 1]]))
    low high
    """

    def __init__(
        self,
        kernel: Kernel | str | None = None,
        alphas: float | Sequence[float] | np.ndarray = (1.0,),
        fit_intercept: bool = True,
        selection: str = "auto",
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        client: Any = None,
        url: Any = None,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        super().__init__(
            kernel,
            alphas,
            fit_intercept,
            selection,
            solver,
            tolerance,
            max_iterations,
            client,
            url,
            cv=cv,
            scoring=scoring,
        )
        self.class_weight = class_weight


class KernelRidgeRegressor(RegressorPart, _KernelRidge):
    """Kernel ridge regression onto one or several targets.

    f(x) = Σ_i k(x, x_i) β_i + b with (K + αI)β = Y − 1b and Σβ = 0: the intercept is not penalised, as in `RidgeRegressor`, whose
    fit on features φ this is for k = ⟨φ, φ⟩. α multiplies the identity beside the unnormalised K; α = 0 interpolates. One α is chosen
    for all the targets.

    Parameters
    ----------
    kernel : Kernel, "precomputed" or None
        The kernel k, such as `NTK(network)` or `RBF(gamma)`. None: `NTK(fully_connected(1))`. Its parameters are set as
        `kernel__gamma`. "precomputed": X is the matrix, K(training, training) in `fit` and K(test, training) in `predict`, in memory
        and without client and url; which rows repeat is not known then.
    alphas : float or sequence of float
        One α >= 0, or several, of which `selection` chooses one. α = 0 interpolates.
    fit_intercept : bool
        Whether to fit the intercept b, which is not penalised. False: b = 0.
    selection : {"auto", "gcv", "loo", "kfold", "holdout"}
        How one of several alphas is chosen, by squared error: "gcv" generalised cross-validation (out of core from a stochastic
        trace), "loo" exact leave-one-out (not out of core), "kfold" 5 folds, "holdout" a fifth of the rows. "auto": "gcv" where
        the kernel matrix is in one memory, "holdout" out of core. Rows that repeat share a fold.
    solver : {"auto", "eigh", "cholesky", "tiled_cholesky", "cg"}
        "eigh" and "cholesky" hold the kernel matrix in one memory; "tiled_cholesky" and "cg" (preconditioned conjugate gradients) work
        out of core, on the tiles that a url or a client stores. "auto": the cheapest that fits the workers.
    tolerance : float
        Relative residual at which "cg" stops, between 0 and 1.
    max_iterations : int
        Iterations of "cg", at most.
    client : distributed.Client or None
        The cluster that computes; see `connect`. None: everything happens in this process. With a client, X in memory is written
        once to `<url>/inputs`; without a url, to a temporary folder of this machine for as long as `fit` or `predict` takes.
        Workers must see that folder: those of a local cluster do. Pickles leave the client out; clones share it.
    url : str, Path or None
        Folder that keeps the kernel matrix in tiles and other partial results. An equal fit, even after a crash, goes on from
        there. None: nothing is kept.
    cv : int, splitter, iterable or None
        Folds that choose alpha, instead of those of `selection`: a number of folds, a splitter of scikit-learn, or (train, test) row
        numbers. Where every row is held out once, the squared error comes from sums, without a fit for each fold. None: those of
        `selection`, a way that holds no rows out ("gcv") included.
    scoring : str, callable or None
        What held-out rows are scored by, as in scikit-learn ("r2", or scorer(estimator, X, y)), the mean over folds; it needs `cv`,
        or selection "kfold" or "holdout", and rows in memory, and takes a fit for each fold and alpha. None: the squared error.
    alpha_per_target : bool
        Whether every target has an α of its own, chosen by "gcv" or "loo" in memory, without client and url.
    store_cv_results : bool
        Whether the squared leave-one-out errors are kept in `cv_results_`; for selection "loo", without client and url.

    Attributes
    ----------
    alpha_ : float or array (n_targets,)
        The α of the model; of every target with `alpha_per_target`.
    alpha_path_ : list of dict
        A row for each of the alphas with the keys "alpha", "score" (smaller is better) and, where `solver_` is "eigh",
        "effective_dimension". Empty for one α.
    best_score_ : float or array (n_targets,)
        The score of `alpha_`, larger is better: minus the smallest score of the path, or of every target's. Only where alpha was
        chosen among several.
    cv_results_ : array (n, n_alphas) or (n, n_targets, n_alphas)
        With `store_cv_results`, the squared leave-one-out error of every row for every target and α, times the row's weight.
    dual_coef_ : array (n, n_targets), float64
        Coefficients β of the training rows; (n,) for one target. The rows are in the order of the fit: with selection "kfold" or
        "holdout" group after group.
    intercept_ : array (n_targets,), float64, or float
        Intercept b; a number for y (n,), an array (1,) for y (n, 1), 0 without an intercept.
    model_ : KernelRidgeModel
        Preprocessing, kernel, training rows and coefficients of the fit.
    solver_ : str
        The solver that was used, one of `solver` but not "auto".
    fit_facts_ : dict
        How it was solved: the solver, why it was taken, and its spectrum, or the iterations and the residual of every solve.
    n_features_in_ : int
        Numbers in a row of X; for images the product of a row's shape.

    Notes
    -----
    y is (n,) or (n, k). Predictions have the shape of scikit-learn's KernelRidge, that of y, (n,) for a single column.

    X is (n, d) or (n, *row_shape), such as images (n, h, w, c): a NumPy or CuPy array, a torch tensor, a data frame, a dask
    array, or a dataset or its url. A dataset brings its own targets and weights: leave y and sample_weight out. Rows that are
    float64, integers or bool are computed in float64; float32 and float16 in float32; uint8 images in float32 after division by
    255. Without client and url a dask array is computed into memory. Predictions are NumPy arrays, or lazy for a dask array.
    With a url, or a client, the kernel matrix is stored in tiles there.

    `fit` warns (ConvergenceWarning) where "cg" stops short of the tolerance. It raises InputError for data that it cannot use,
    MemoryBudgetError where no tile or solver fits the workers, and FingerprintError where `url` holds a fit of other data or
    parameters.

    References
    ----------
    MATH.md §6; Arora et al. 2019 (NTK regression).

    Examples
    --------
    >>> from ntkdask.kernels import RBF
    >>> X = np.linspace(0, 3, 30)[:, None]
    >>> KernelRidgeRegressor(RBF(1.0), alphas=(1e-8,)).fit(X, np.sin(X[:, 0])).predict([[1.0]]).round(3)
    array([0.841])
    """

    def __init__(
        self,
        kernel: Kernel | str | None = None,
        alphas: float | Sequence[float] | np.ndarray = (1.0,),
        fit_intercept: bool = True,
        selection: str = "auto",
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        client: Any = None,
        url: Any = None,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
        alpha_per_target: bool = False,
        store_cv_results: bool = False,
    ) -> None:
        super().__init__(
            kernel,
            alphas,
            fit_intercept,
            selection,
            solver,
            tolerance,
            max_iterations,
            client,
            url,
            cv=cv,
            scoring=scoring,
        )
        self.alpha_per_target = alpha_per_target
        self.store_cv_results = store_cv_results
