"""Several labels a row, and probabilities by calibration, as scikit-learn's RidgeClassifier has them."""

import numpy as np
import pytest
from estimator_examples import ALPHAS, LABELS, WEIGHTS, Y2, X
from sklearn import linear_model
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.multioutput import MultiOutputClassifier

from ntkdask.errors import InputError
from ntkdask.estimators import KernelRidgeClassifier, RidgeClassifier
from ntkdask.kernels import RBF

MANY = np.stack([Y2[:, 0] > 3.0, Y2[:, 1] > 2.5, Y2[:, 0] > Y2[:, 1]], axis=1).astype(int)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_several_labels_are_those_of_ridge_classifier(weights, class_weight):
    ours = RidgeClassifier(alphas=2.0, class_weight=class_weight).fit(X, MANY, weights)
    theirs = linear_model.RidgeClassifier(alpha=2.0, class_weight=class_weight).fit(X, MANY, weights)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-7)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    assert ours.score(X, MANY) == theirs.score(X, MANY)


def test_two_labels_a_row_are_not_two_classes():
    ours = RidgeClassifier(alphas=ALPHAS, selection="loo").fit(X, MANY[:, :2].astype(bool))
    theirs = linear_model.RidgeClassifierCV(ALPHAS).fit(X, MANY[:, :2])
    assert ours.alpha_ == theirs.alpha_
    assert ours.predict(X).shape == ours.decision_function(X).shape == (90, 2)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), rtol=1e-8, atol=1e-9)
    again = ours.fit(X, LABELS == "bee")
    assert again.decision_function(X).shape == (90,)


def test_kernels_have_several_labels_and_urls(tmp_path):
    model = KernelRidgeClassifier(RBF(0.1), url=tmp_path / "fit").fit(X, MANY)
    each = MultiOutputClassifier(KernelRidgeClassifier(RBF(0.1))).fit(X, MANY)
    np.testing.assert_array_equal(model.predict(X), each.predict(X))


@pytest.mark.parametrize("y", [MANY + 1, 2 * MANY - 1])
def test_labels_that_are_not_zero_and_one_are_refused(y):
    with pytest.raises(InputError, match="0 and 1"):
        RidgeClassifier().fit(X, y)


@pytest.mark.parametrize("labels", [LABELS, LABELS == "bee"], ids=["three", "two"])
@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration_gives_probabilities(method, labels):
    kind = {"method": method, "cv": 3}
    ours = CalibratedClassifierCV(RidgeClassifier(alphas=0.5, class_weight="balanced"), **kind).fit(X, labels, WEIGHTS)
    theirs = CalibratedClassifierCV(linear_model.RidgeClassifier(alpha=0.5, class_weight="balanced"), **kind).fit(
        X, labels, WEIGHTS
    )
    found = ours.predict_proba(X)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    np.testing.assert_allclose(found, theirs.predict_proba(X), atol=1e-3)
    assert not hasattr(RidgeClassifier(), "predict_proba")


def test_a_fitted_kernel_model_is_calibrated():
    model = KernelRidgeClassifier(RBF(0.1)).fit(X[:60], LABELS[:60])
    calibrated = CalibratedClassifierCV(FrozenEstimator(model)).fit(X[60:], LABELS[60:])
    np.testing.assert_array_equal(calibrated.classes_, model.classes_)
    assert calibrated.score(X[:60], LABELS[:60]) > 0.6
