"""scikit-learn's Ridge, RidgeCV and KernelRidge in its own words, computed by ours: a thin shim to run its tests.

Sparse rows become dense, as ours take sparse rows through a map only. All solvers are "auto": they differ in speed alone.
"""

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.metrics.pairwise import pairwise_kernels

from ntkdask.estimators import KernelRidgeRegressor, RidgeClassifier, RidgeRegressor


def dense(x):
    return x.toarray() if issparse(x) else x


class _Shim(BaseEstimator):
    def fit(self, X, y, sample_weight=None):
        self.inner_ = self._ours().fit(dense(X), y, sample_weight)
        for name in ("coef_", "intercept_", "alpha_", "best_score_", "cv_results_", "classes_", "n_features_in_"):
            if hasattr(self.inner_, name):
                setattr(self, name, getattr(self.inner_, name))
            else:
                vars(self).pop(name, None)
        self.solver_ = getattr(self, "solver", None)
        return self

    def predict(self, X):
        return self.inner_.predict(dense(X))


class _Classifier(ClassifierMixin, _Shim):
    def decision_function(self, X):
        return self.inner_.decision_function(dense(X))


class Ridge(MultiOutputMixin, RegressorMixin, _Shim):
    def __init__(
        self,
        alpha=1.0,
        *,
        fit_intercept=True,
        copy_X=True,
        max_iter=None,
        tol=1e-4,
        solver="auto",
        positive=False,
        random_state=None,
    ):
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.copy_X = copy_X
        self.max_iter = max_iter
        self.tol = tol
        self.solver = solver
        self.positive = positive
        self.random_state = random_state

    def _ours(self):
        return RidgeRegressor(alphas=self.alpha, fit_intercept=self.fit_intercept)


class RidgeCV(MultiOutputMixin, RegressorMixin, _Shim):
    def __init__(
        self,
        alphas=(0.1, 1.0, 10.0),
        *,
        fit_intercept=True,
        scoring=None,
        cv=None,
        gcv_mode=None,
        store_cv_results=False,
        alpha_per_target=False,
    ):
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.scoring = scoring
        self.cv = cv
        self.gcv_mode = gcv_mode
        self.store_cv_results = store_cv_results
        self.alpha_per_target = alpha_per_target

    def _ours(self):
        return RidgeRegressor(
            alphas=self.alphas,
            fit_intercept=self.fit_intercept,
            selection="loo" if self.cv is None else "kfold",
            cv=self.cv,
            # with folds theirs takes R² where no score is given
            scoring="r2" if self.cv is not None and self.scoring is None else self.scoring,
            store_cv_results=self.store_cv_results,
            alpha_per_target=self.alpha_per_target,
        )


class RidgeClassifierShim(_Classifier):
    def __init__(
        self,
        alpha=1.0,
        *,
        fit_intercept=True,
        copy_X=True,
        max_iter=None,
        tol=1e-4,
        class_weight=None,
        solver="auto",
        positive=False,
        random_state=None,
    ):
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.copy_X = copy_X
        self.max_iter = max_iter
        self.tol = tol
        self.class_weight = class_weight
        self.solver = solver
        self.positive = positive
        self.random_state = random_state

    def fit(self, X, y, sample_weight=None):
        super().fit(X, y, sample_weight)
        # theirs has a row of coefficients for two classes
        self.coef_, self.intercept_ = np.atleast_2d(self.coef_), np.atleast_1d(self.intercept_)
        return self

    def _ours(self):
        return RidgeClassifier(alphas=self.alpha, fit_intercept=self.fit_intercept, class_weight=self.class_weight)


class RidgeClassifierCV(_Classifier):
    def __init__(
        self,
        alphas=(0.1, 1.0, 10.0),
        *,
        fit_intercept=True,
        scoring=None,
        cv=None,
        class_weight=None,
        store_cv_results=False,
    ):
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.scoring = scoring
        self.cv = cv
        self.class_weight = class_weight
        self.store_cv_results = store_cv_results

    def _ours(self):
        return RidgeClassifier(
            alphas=self.alphas,
            fit_intercept=self.fit_intercept,
            selection="loo" if self.cv is None else "kfold",
            cv=self.cv,
            scoring="accuracy" if self.cv is not None and self.scoring is None else self.scoring,
            class_weight=self.class_weight,
        )


class KernelRidge(MultiOutputMixin, RegressorMixin, BaseEstimator):
    def __init__(self, alpha=1, *, kernel="linear", gamma=None, degree=3, coef0=1, kernel_params=None):
        self.alpha = alpha
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.kernel_params = kernel_params

    def _matrix(self, X):
        if self.kernel == "precomputed":
            return X
        kind = {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}
        return pairwise_kernels(dense(X), self.X_fit_, metric=self.kernel, filter_params=True, **kind)

    def fit(self, X, y, sample_weight=None):
        self.X_fit_ = dense(X)
        self.inner_ = KernelRidgeRegressor("precomputed", self.alpha, fit_intercept=False)
        self.inner_.fit(self._matrix(X), y, sample_weight)
        self.dual_coef_ = self.inner_.dual_coef_
        return self

    def predict(self, X):
        return self.inner_.predict(self._matrix(X))


LINEAR = {
    "Ridge": Ridge,
    "RidgeCV": RidgeCV,
    "RidgeClassifier": RidgeClassifierShim,
    "RidgeClassifierCV": RidgeClassifierCV,
}
