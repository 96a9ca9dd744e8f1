"""class_weight is that of scikit-learn's RidgeClassifier: in memory, of datasets, with weights, by classes."""

import numpy as np
import pytest
from estimator_examples import LABELS, WEIGHTS, X
from sklearn import linear_model
from sklearn.base import clone

from ntkdask import write_dataset
from ntkdask.errors import FingerprintError, InputError
from ntkdask.estimators import KernelRidgeClassifier, RidgeClassifier
from ntkdask.kernels import RBF

GIVEN = {"ant": 5.0, "cow": 0.2}


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("class_weight", ["balanced", GIVEN])
def test_classifier_is_ridge_classifier(class_weight, weights):
    ours = RidgeClassifier(alphas=0.5, class_weight=class_weight).fit(X, LABELS, weights)
    theirs = linear_model.RidgeClassifier(alpha=0.5, class_weight=class_weight).fit(X, LABELS, weights)
    np.testing.assert_allclose(2 * ours.decision_function(X) + 2 / 3 - 1, theirs.decision_function(X), atol=1e-8)
    plain = RidgeClassifier(alphas=0.5).fit(X, LABELS, weights)
    assert np.abs(plain.decision_function(X) - ours.decision_function(X)).max() > 1e-3


def test_kernel_classifier_multiplies_weights():
    balanced = len(LABELS) / (3 * np.array([(label == LABELS).sum() for label in LABELS]))
    ours = KernelRidgeClassifier(RBF(0.1), class_weight="balanced").fit(X, LABELS, WEIGHTS)
    same = KernelRidgeClassifier(RBF(0.1)).fit(X, LABELS, WEIGHTS * balanced)
    np.testing.assert_allclose(ours.decision_function(X), same.decision_function(X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "class_weight", "selection"),
    [(None, "balanced", "gcv"), (WEIGHTS + 1, {0: 5.0, 2: 0.2}, "kfold")],
    ids=str,
)
def test_classes_of_datasets_weigh(tmp_path, weights, class_weight, selection):
    labels = np.unique(LABELS, return_inverse=True)[1]
    dataset = write_dataset(tmp_path / "d", X, labels, kind="classification", weights=weights)
    model = RidgeClassifier(alphas=(0.1, 10.0), selection=selection, class_weight=class_weight)
    arrays = clone(model).fit(X, labels, weights).decision_function(X)
    np.testing.assert_allclose(model.fit(dataset).decision_function(X), arrays, rtol=1e-9, atol=1e-10)


def test_a_url_keeps_fits_of_class_weights_apart(tmp_path):
    dataset = write_dataset(tmp_path / "d", X, np.unique(LABELS, return_inverse=True)[1], kind="classification")
    RidgeClassifier(url=tmp_path / "fit").fit(dataset)
    with pytest.raises(FingerprintError):
        RidgeClassifier(url=tmp_path / "fit", class_weight="balanced").fit(dataset)


@pytest.mark.parametrize(
    ("class_weight", "message"),
    [("balance", "expected None"), ({"ant": -1.0}, "negative"), ({"ant": 0, "bee": 0}, "one class")],
)
def test_wrong_class_weights_are_named(class_weight, message):
    with pytest.raises(InputError, match=message):
        RidgeClassifier(class_weight=class_weight).fit(X, LABELS)
