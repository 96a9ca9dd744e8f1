"""Ridge regression on features as scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ntkdask.datasets.rows import Rows
from ntkdask.estimators.base import RidgeBase, Source, found_resources
from ntkdask.estimators.inputs import fitted_here
from ntkdask.estimators.kinds import ClassifierPart, RegressorPart
from ntkdask.features.base import FeatureMap
from ntkdask.planning.resources import RidgePlan
from ntkdask.workflows.ridge.options import RidgeOptions
from ntkdask.workflows.ridge.recipe import RidgeRecipe, predictions_plan


class _Ridge(RidgeBase):
    """What the two ridge estimators share; see their texts."""

    _parts = ("features",)

    def __init__(
        self,
        features: FeatureMap | None = None,
        alphas: Sequence[float] = (1.0,),
        fit_intercept: bool = True,
        selection: str = "gcv",
        solver: str = "auto",
        client: Any = None,
        url: Any = None,
    ) -> None:
        self.features = features
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.selection = selection
        self.solver = solver
        self.client = client
        self.url = url

    @property
    def coef_(self) -> np.ndarray:
        """Weights of the features, (n_targets, n_components) or, for one target, (n_components,), float64."""
        check_is_fitted(self)
        return self._coefficients(self.model_.weights.T)

    @property
    def intercept_(self) -> np.ndarray | float:
        """Intercept of every target, (n_targets,) or a number, float64; 0 without an intercept."""
        check_is_fitted(self)
        return self._coefficients(self.model_.intercept)

    def _takes_images(self, fitted: bool) -> bool:
        return (self.model_.map if fitted else self.features) is not None

    def _recipe(self, source: Source, dtype: str) -> RidgeRecipe:
        options = RidgeOptions(tuple(np.atleast_1d(self.alphas)), self.fit_intercept, self.selection, self.solver)
        return RidgeRecipe(fitted_here(self.features, source.x, source.targets, dtype), options)

    def _predict_plan(self, rows: Rows, x: Any) -> RidgePlan:
        return predictions_plan(self.model_, rows, found_resources(self.client, x))

    def _coefficients(self, values: np.ndarray) -> Any:
        raise NotImplementedError


class RidgeClassifier(ClassifierPart, _Ridge):
    """Ridge regression of features onto zero-mean one-hot targets; the class with the largest output.

    min_W ‖Y − Φ(x)W − 1bᵀ‖² + α‖W‖², Y = 1 − 1/C in the column of the class, −1/C elsewhere. α multiplies the identity
    beside the unnormalised ΦᵀΦ, as in scikit-learn.

    features: a feature map such as `NTKRandomFeatures`; None takes X as it is.
    alphas: one α > 0, or several to choose from by `selection`: "gcv" (generalised cross-validation), "loo" (exact
    leave-one-out), "kfold" (5 folds) or "holdout" (a fifth of the rows), by squared error. Rows that repeat share a fold.
    solver: "eigh", "tridiagonal" (not for "loo"), "cholesky" (one α, or folds), or "auto".
    client: a Dask client, see `connect`; None computes here. With a client X is written once to `<url>/inputs`; without a
    url to a temporary folder of this machine for as long as fit or predict takes, which the workers must see: local
    clusters do. Pickles leave the client out, clones share it.
    url: a folder that keeps partial results: an equal fit, even after a crash, goes on from there; one of other data or
    parameters raises FingerprintError.

    X: (n, d), images (n, h, w, c) when there are features, NumPy, CuPy, data frames, dask arrays, or a dataset or its url,
    which brings its own labels 0..C−1 and weights (leave y out). float64, integers and bool compute in float64, float32 and
    float16 in float32, uint8 images in float32 after division by 255. Without client and url, dask arrays are computed
    into memory. Feature maps that depend on data are fitted to X and y, batch by batch; a map that is fitted already is used as it is.
    What such a map learned from y makes "gcv" and "loo" too sanguine; for "kfold" and "holdout" it is fitted anew without each fold.

    After fit: `alpha_`, `alpha_path_` (a dict with alpha and score per α, smaller is better; empty for one), `classes_`,
    `coef_`, `intercept_` (of the decision function and the features, (m,) and a number for two classes), `model_`, `n_features_in_`.
    Predictions are NumPy arrays. Source: Zandieh et al. 2021, §5.1.

    >>> X, y = np.array([[0.0], [1.0], [9.0], [10.0]]), np.array(["low", "low", "high", "high"])
    >>> print(*RidgeClassifier(alphas=(0.1, 1.0)).fit(X, y).predict([[2.0], [8.0]]))
    low high
    """


class RidgeRegressor(RegressorPart, _Ridge):
    """Ridge regression of features onto one or several targets: min_W ‖Y − Φ(x)W − 1bᵀ‖² + α‖W‖².

    Parameters, inputs and attributes are those of `RidgeClassifier`, without `classes_`; y is (n,) or (n, k), and `coef_`,
    `intercept_` and predictions have the shapes of scikit-learn's Ridge. One α is chosen for all the targets.

    >>> X = np.array([[0.0], [1.0], [2.0]])
    >>> RidgeRegressor(alphas=(1e-9,)).fit(X, 2 * X[:, 0] + 1).predict([[3.0]]).round(3)
    array([7.])
    """
