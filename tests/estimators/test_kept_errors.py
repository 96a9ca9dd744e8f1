"""An alpha for every target, kept leave-one-out errors, the best score: those of scikit-learn's RidgeCV."""

import numpy as np
import pytest
from estimator_examples import WEIGHTS, Y2, X, Y
from sklearn.base import clone
from sklearn.linear_model import RidgeCV

from ntkdask.errors import InputError
from ntkdask.estimators import KernelRidgeRegressor, RidgeRegressor
from ntkdask.features import ArcCosineFeatures
from ntkdask.kernels import RBF

ALPHAS = (1e-3, 0.1, 1.0, 10.0, 100.0, 1e4)
NOISE = np.random.default_rng(5).normal(size=90)
# a target that wants little and one that wants much shrinkage
TARGETS = np.stack([X @ np.arange(6.0), NOISE, Y], axis=1)
LINEAR = "precomputed"


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("kernel", [False, True], ids=["primal", "dual"])
def test_alphas_and_errors_are_those_of_ridge_cv(kernel, fit_intercept, weights):
    options = {"fit_intercept": fit_intercept, "alpha_per_target": True, "store_cv_results": True}
    theirs = RidgeCV(ALPHAS, **options).fit(X, TARGETS, weights)
    model = (
        KernelRidgeRegressor(LINEAR, ALPHAS, selection="loo")
        if kernel
        else RidgeRegressor(alphas=ALPHAS, selection="loo")
    )
    ours = model.set_params(**options).fit(X @ X.T if kernel else X, TARGETS, weights)
    np.testing.assert_array_equal(ours.alpha_, theirs.alpha_)
    assert len(set(ours.alpha_)) > 1
    np.testing.assert_allclose(ours.cv_results_, theirs.cv_results_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.predict(X @ X.T if kernel else X), theirs.predict(X), rtol=1e-6, atol=1e-8)
    # theirs divides by the number of rows, ours by their weight
    rows = 1.0 if weights is None else len(X) / weights.sum()
    np.testing.assert_allclose(ours.best_score_, theirs.best_score_ * rows, rtol=1e-6)


@pytest.mark.parametrize("selection", ["gcv", "loo"])
@pytest.mark.parametrize("solver", ["auto", "eigh"])
@pytest.mark.parametrize(
    "model", [RidgeRegressor(ArcCosineFeatures(40)), KernelRidgeRegressor(RBF(0.1))], ids=["primal", "dual"]
)
def test_each_target_is_fitted_as_alone(model, solver, selection):
    model = clone(model).set_params(alphas=ALPHAS, selection=selection, solver=solver)
    ours = clone(model).set_params(alpha_per_target=True).fit(X, TARGETS)
    for j in range(3):
        alone = clone(model).fit(X, TARGETS[:, j])
        assert ours.alpha_[j] == alone.alpha_
        assert ours.best_score_[j] == pytest.approx(alone.best_score_, rel=1e-8)
        np.testing.assert_allclose(ours.predict(X)[:, j], alone.predict(X), rtol=1e-7, atol=1e-9)
    # the path is that of one alpha for all
    np.testing.assert_allclose(
        [row["score"] for row in ours.alpha_path_],
        [row["score"] for row in clone(model).fit(X, TARGETS).alpha_path_],
        rtol=1e-8,
    )


@pytest.mark.parametrize("alphas", [ALPHAS, (3.0,)])
def test_errors_of_one_target_have_two_axes(alphas):
    ours = RidgeRegressor(alphas=alphas, selection="loo", store_cv_results=True).fit(X, Y)
    theirs = RidgeCV(list(alphas), store_cv_results=True).fit(X, Y)
    assert ours.cv_results_.shape == theirs.cv_results_.shape == (90, len(alphas))
    np.testing.assert_allclose(ours.cv_results_, theirs.cv_results_, rtol=1e-7)
    assert ours.alpha_ == theirs.alpha_
    again = ours.set_params(store_cv_results=False).fit(X, Y)
    assert not hasattr(again, "cv_results_")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store_cv_results": True}, "makes none"),
        ({"alpha_per_target": True, "selection": "kfold"}, "not by selection"),
        ({"alpha_per_target": True, "cv": 3}, "leave cv"),
        ({"alpha_per_target": True, "selection": "gcv", "url": "somewhere"}, "leave client and url"),
        ({"alpha_per_target": True, "selection": "gcv", "solver": "cholesky"}, "spectrum"),
    ],
    ids=str,
)
def test_what_keeps_no_errors_says_so(options, message):
    for model in (RidgeRegressor(), KernelRidgeRegressor(RBF(0.1))):
        with pytest.raises(InputError, match=message):
            model.set_params(alphas=ALPHAS, **options).fit(X, Y2)
