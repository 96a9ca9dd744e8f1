"""kernel="precomputed" is scikit-learn's: fits, folds, weights, searches, and what is refused."""

import numpy as np
import pytest
from estimator_examples import ALPHAS, LABELS, WEIGHTS, Y2, X, Y
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict
from sklearn.utils.estimator_checks import parametrize_with_checks

from ntkdask.errors import InputError
from ntkdask.estimators import KernelRidgeClassifier, KernelRidgeRegressor
from ntkdask.kernels import RBF

KERNEL = RBF(0.1)
K, TEST = KERNEL(X), KERNEL(X[:7] + 0.1, X)
GIVEN = "precomputed"


@parametrize_with_checks(
    [KernelRidgeRegressor(GIVEN), KernelRidgeClassifier(GIVEN)],
    expected_failed_checks=lambda e: {
        "check_estimators_dtypes": "a matrix rounded to integers is not positive definite, which is an error here"
    },
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("y", [Y, Y2], ids=["1-d", "2-d"])
def test_regressor_is_kernel_ridge(y, weights):
    ours = KernelRidgeRegressor(GIVEN, alphas=0.3, fit_intercept=False).fit(K, y, weights)
    theirs = KernelRidge(alpha=0.3, kernel=GIVEN).fit(K, y, weights)
    np.testing.assert_allclose(ours.predict(TEST), theirs.predict(TEST), rtol=1e-8)
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"selection": "loo"}, {"selection": "kfold"}, {"cv": 3}, {"cv": 3, "scoring": "r2"}], ids=str
)
def test_a_given_matrix_is_fitted_as_its_kernel(options):
    for estimator, y in ((KernelRidgeRegressor, Y2), (KernelRidgeClassifier, LABELS)):
        if "scoring" in options and y is LABELS:
            options = {**options, "scoring": "accuracy"}
        given = estimator(GIVEN, ALPHAS, **options).fit(K, y)
        own = estimator(KERNEL, ALPHAS, **options).fit(X, y)
        assert given.predict(TEST).shape == own.predict(X[:7]).shape
        if options == {"selection": "kfold"}:
            continue  # folds are dealt by the bytes of rows, which are not those of the matrix
        assert given.alpha_ == own.alpha_
        outputs = [
            m.decision_function(x) if y is LABELS else m.predict(x) for m, x in ((given, TEST), (own, X[:7] + 0.1))
        ]
        np.testing.assert_allclose(*outputs, rtol=1e-8, atol=1e-9)


def test_searches_cut_both_axes():
    folds = KFold(3)
    ours = cross_val_predict(KernelRidgeRegressor(GIVEN, fit_intercept=False), K, Y, cv=folds)
    np.testing.assert_allclose(ours, cross_val_predict(KernelRidge(kernel=GIVEN), K, Y, cv=folds), rtol=1e-8)
    search = GridSearchCV(KernelRidgeRegressor(), {"kernel": [GIVEN], "alphas": [0.1, 1.0]}, cv=folds).fit(K, Y)
    assert search.best_params_["kernel"] == GIVEN


def test_what_is_no_matrix_is_refused(tmp_path):
    for x, options, message in (
        (X, {}, "square"),
        (K, {"url": tmp_path / "fit"}, "leave client and url out"),
        (np.zeros((90, 90, 1)), {}, "2-d|dim 3"),
    ):
        with pytest.raises(ValueError, match=message):
            KernelRidgeRegressor(GIVEN, **options).fit(x, Y)
    with pytest.raises(ValueError, match="features"):
        KernelRidgeRegressor(GIVEN).fit(K, Y).predict(TEST[:, :5])
    with pytest.raises(InputError, match="kernel"):
        KernelRidgeRegressor("rbf").fit(X, Y)
