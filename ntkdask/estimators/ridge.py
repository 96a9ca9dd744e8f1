"""Ridge regression on features as scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ntkdask.datasets.rows import Rows
from ntkdask.estimators.base import RidgeBase, found_resources
from ntkdask.estimators.inputs import fitted_here
from ntkdask.estimators.kinds import ClassifierPart, RegressorPart
from ntkdask.estimators.source import Source
from ntkdask.features.base import FeatureMap, require_map, takes_sparse
from ntkdask.planning.resources import RidgePlan
from ntkdask.workflows.ridge.options import RidgeOptions
from ntkdask.workflows.ridge.recipe import RidgeRecipe, predictions_plan


class _Ridge(RidgeBase):
    """What the two ridge estimators share; see their docstrings."""

    alpha_per_target = False
    store_cv_results = False
    _parts = ("features",)

    def __init__(
        self,
        features: FeatureMap | None = None,
        alphas: float | Sequence[float] | np.ndarray = (1.0,),
        fit_intercept: bool = True,
        selection: str = "gcv",
        solver: str = "auto",
        client: Any = None,
        url: Any = None,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
    ) -> None:
        self.features = features
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.selection = selection
        self.solver = solver
        self.client = client
        self.url = url
        self.cv = cv
        self.scoring = scoring

    @property
    def coef_(self) -> np.ndarray:
        """Weights of the features, (n_targets, n_components) or, for one target or two classes, (n_components,), float64."""
        check_is_fitted(self)
        return self._coefficients(self.model_.weights.T)

    @property
    def intercept_(self) -> np.ndarray | float:
        """Intercept of every target, (n_targets,) or a number, float64; 0 without an intercept."""
        check_is_fitted(self)
        return self._intercepts(self.model_.intercept)

    def _takes_images(self, fitted: bool) -> bool:
        return (self.model_.map if fitted else self.features) is not None

    def _takes_sparse(self, fitted: bool) -> bool:
        return takes_sparse(self.model_.map if fitted else self.features)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = takes_sparse(self.features)
        return tags

    def _recipe(self, source: Source, dtype: str) -> RidgeRecipe:
        if self.features is not None:
            require_map(self.features, f"{type(self).__name__}: features")
        options = RidgeOptions(
            source.choice.alphas,
            self.fit_intercept,
            source.choice.selection,
            self.solver,
            by_target=self.alpha_per_target,
            keep_errors=self.store_cv_results,
        )
        return RidgeRecipe(fitted_here(self.features, source.x, source.targets, dtype), options)

    def _predict_plan(self, rows: Rows, x: Any) -> RidgePlan:
        return predictions_plan(self.model_, rows, found_resources(self.client, x))

    def _coefficients(self, values: np.ndarray) -> Any:
        raise NotImplementedError

    def _intercepts(self, values: np.ndarray) -> Any:
        return self._coefficients(values)


class RidgeClassifier(ClassifierPart, _Ridge):
    """Ridge regression of features onto zero-mean one-hot targets; the class with the largest output.

    min_W ‖Y − Φ(x)W − 1bᵀ‖² + α‖W‖², Y = 1 − 1/C in the column of the class, −1/C elsewhere. α multiplies the identity
    beside the unnormalised ΦᵀΦ, as in scikit-learn.

    Parameters
    ----------
    features : FeatureMap or None
        Feature map φ, such as `NTKRandomFeatures`. None: X as it is, (n, d). Its parameters are set as `features__n_components`.
        A map that depends on data is fitted to X and y, batch by batch; a map that is fitted already is used as it is.
    alphas : float or sequence of float
        One α > 0, or several, of which `selection` chooses one.
    fit_intercept : bool
        Whether to fit the intercept b, which is not penalised. False: b = 0.
    selection : {"gcv", "loo", "kfold", "holdout"}
        How one of several alphas is chosen, by squared error: "gcv" generalised cross-validation, "loo" exact leave-one-out, "kfold"
        5 folds, "holdout" a fifth of the rows. Rows that repeat share a fold.
    solver : {"auto", "eigh", "tridiagonal", "cholesky"}
        Factorisation of the Gram matrix: "eigh" the whole spectrum, "tridiagonal" (not for "loo"), "cholesky" (for one α, or with
        folds). "auto": Cholesky for one α, tridiagonal for several; the whole spectrum where rows hardly outnumber features, or
        α is near rounding. Where they do not outnumber features "tridiagonal" takes the whole spectrum, too.
    client : distributed.Client or None
        The cluster that computes; see `connect`. None: everything happens in this process. With a client, X in memory is written
        once to `<url>/inputs`; without a url, to a temporary folder of this machine for as long as `fit` or `predict` takes.
        Workers must see that folder: those of a local cluster do. Pickles leave the client out; clones share it.
    url : str, Path or None
        Folder that keeps partial results. An equal fit, even after a crash, goes on from there. None: nothing is kept.
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
        A row for each of the alphas with the keys "alpha", "score" (smaller is better) and, for "gcv" and "loo",
        "effective_dimension". Empty for one α.
    best_score_ : float
        The score of `alpha_`, larger is better: minus the smallest score of the path. Only where alpha was chosen among several.
    classes_ : array (C,)
        The labels, sorted; the number of a label is the column of its target. For a dataset, and for C labels of 0 and 1 a row,
        0 … C − 1.
    coef_ : array (C, n_components), float64
        Weights of the features in the decision function; (n_components,) for two classes.
    intercept_ : array (C,), float64, or float
        Intercept of the decision function; a number for two classes, 0 without an intercept.
    model_ : RidgeModel
        Preprocessing, map and weights of the fit.
    n_features_in_ : int
        Numbers in a row of X; for images the product of a row's shape.

    Notes
    -----
    X is (n, d), or (n, *row_shape), such as images (n, h, w, c), when there are features: a NumPy or CuPy array, a torch tensor,
    a data frame, a dask array, or a dataset or its url. A dataset brings its own labels 0 … C − 1 and weights: leave y and
    sample_weight out. Rows that are float64, integers or bool are computed in float64; float32 and float16 in float32; uint8
    images in float32 after division by 255. Without client and url a dask array is computed into memory. Predictions are
    NumPy arrays, or lazy for a dask array.

    A map that learned from y makes the scores of "gcv" and "loo" too good; for "kfold" and "holdout" it is fitted anew without
    each fold. `fit` raises InputError for data that it cannot use, and FingerprintError where `url` holds a fit of other data or
    parameters.

    y of several labels a row is (n, C) of 0 and 1; each is then a problem of its own with targets ±1, and one α serves all. Outputs
    are no probabilities, so there is no `predict_proba`: scikit-learn's `CalibratedClassifierCV(estimator)` gives calibrated ones.

    References
    ----------
    Zandieh et al. 2021, §5.1.

    Examples
    --------
    >>> X, y = np.array([[0.0], [1.0], [9.0], [10.0]]), np.array(["low", "low", "high", "high"])
    >>> print(*RidgeClassifier(alphas=(0.1, 1.0)).fit(X, y).predict([[2.0], [8.0]]))
    low high
    """

    def __init__(
        self,
        features: FeatureMap | None = None,
        alphas: float | Sequence[float] | np.ndarray = (1.0,),
        fit_intercept: bool = True,
        selection: str = "gcv",
        solver: str = "auto",
        client: Any = None,
        url: Any = None,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        super().__init__(features, alphas, fit_intercept, selection, solver, client, url, cv=cv, scoring=scoring)
        self.class_weight = class_weight


class RidgeRegressor(RegressorPart, _Ridge):
    """Ridge regression of features onto one or several targets.

    min_W ‖Y − Φ(x)W − 1bᵀ‖² + α‖W‖². α multiplies the identity beside the unnormalised ΦᵀΦ, as in scikit-learn; one α is chosen for
    all the targets.

    Parameters
    ----------
    features : FeatureMap or None
        Feature map φ, such as `NTKRandomFeatures`. None: X as it is, (n, d). Its parameters are set as `features__n_components`.
        A map that depends on data is fitted to X and y, batch by batch; a map that is fitted already is used as it is.
    alphas : float or sequence of float
        One α > 0, or several, of which `selection` chooses one.
    fit_intercept : bool
        Whether to fit the intercept b, which is not penalised. False: b = 0.
    selection : {"gcv", "loo", "kfold", "holdout"}
        How one of several alphas is chosen, by squared error: "gcv" generalised cross-validation, "loo" exact leave-one-out, "kfold"
        5 folds, "holdout" a fifth of the rows. Rows that repeat share a fold.
    solver : {"auto", "eigh", "tridiagonal", "cholesky"}
        Factorisation of the Gram matrix: "eigh" the whole spectrum, "tridiagonal" (not for "loo"), "cholesky" (for one α, or with
        folds). "auto": Cholesky for one α, tridiagonal for several; the whole spectrum where rows hardly outnumber features, or
        α is near rounding. Where they do not outnumber features "tridiagonal" takes the whole spectrum, too.
    client : distributed.Client or None
        The cluster that computes; see `connect`. None: everything happens in this process. With a client, X in memory is written
        once to `<url>/inputs`; without a url, to a temporary folder of this machine for as long as `fit` or `predict` takes.
        Workers must see that folder: those of a local cluster do. Pickles leave the client out; clones share it.
    url : str, Path or None
        Folder that keeps partial results. An equal fit, even after a crash, goes on from there. None: nothing is kept.
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
        A row for each of the alphas with the keys "alpha", "score" (smaller is better) and, for "gcv" and "loo",
        "effective_dimension". Empty for one α.
    best_score_ : float or array (n_targets,)
        The score of `alpha_`, larger is better: minus the smallest score of the path, or of every target's. Only where alpha was
        chosen among several.
    cv_results_ : array (n, n_alphas) or (n, n_targets, n_alphas)
        With `store_cv_results`, the squared leave-one-out error of every row for every target and α, times the row's weight.
    coef_ : array (n_targets, n_components), float64
        Weights of the features; (n_components,) for one target, as in scikit-learn's Ridge.
    intercept_ : array (n_targets,), float64, or float
        Intercept of every target; a number for y (n,), an array (1,) for y (n, 1), 0 without an intercept.
    model_ : RidgeModel
        Preprocessing, map and weights of the fit.
    n_features_in_ : int
        Numbers in a row of X; for images the product of a row's shape.

    Notes
    -----
    y is (n,) or (n, k). Predictions have the shape of y, (n,) for a single column, and are float64.

    X is (n, d), or (n, *row_shape), such as images (n, h, w, c), when there are features: a NumPy or CuPy array, a torch tensor,
    a data frame, a dask array, or a dataset or its url. A dataset brings its own targets and weights: leave y and sample_weight
    out. Rows that are float64, integers or bool are computed in float64; float32 and float16 in float32; uint8 images in float32
    after division by 255. Without client and url a dask array is computed into memory. Predictions are NumPy arrays, or lazy
    for a dask array.

    A map that learned from y makes the scores of "gcv" and "loo" too good; for "kfold" and "holdout" it is fitted anew without
    each fold. `fit` raises InputError for data that it cannot use, and FingerprintError where `url` holds a fit of other data or
    parameters.

    References
    ----------
    Zandieh et al. 2021, §5.1.

    Examples
    --------
    >>> X = np.array([[0.0], [1.0], [2.0]])
    >>> RidgeRegressor(alphas=(1e-9,)).fit(X, 2 * X[:, 0] + 1).predict([[3.0]]).round(3)
    array([7.])
    """

    def __init__(
        self,
        features: FeatureMap | None = None,
        alphas: float | Sequence[float] | np.ndarray = (1.0,),
        fit_intercept: bool = True,
        selection: str = "gcv",
        solver: str = "auto",
        client: Any = None,
        url: Any = None,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
        alpha_per_target: bool = False,
        store_cv_results: bool = False,
    ) -> None:
        super().__init__(features, alphas, fit_intercept, selection, solver, client, url, cv=cv, scoring=scoring)
        self.alpha_per_target = alpha_per_target
        self.store_cv_results = store_cv_results
