"""What people give estimators by mistake: each is refused with what to do, or means what it means in scikit-learn."""

import numpy as np
import pytest
from estimator_examples import MAP, X, Y
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import Ridge

import ntkdask as nd
from ntkdask.errors import InputError
from ntkdask.estimators import (
    FeatureTransformer,
    KernelRidgeClassifier,
    KernelRidgeRegressor,
    RidgeClassifier,
    RidgeRegressor,
)
from ntkdask.features import NTKRandomFeatures, Nystrom
from ntkdask.kernels import NTK, RBF, both
from ntkdask.networks import fully_connected

NETWORK = fully_connected(1)
LABELS = (Y > 0).astype(int)

NO_MAPS = {
    "a kernel": (NTK(NETWORK), "is the kernel NTK;.*KernelRidge"),
    "a kernel of two matrices": (both(NETWORK), "is the kernel NNGPAndNTK"),
    "a network": (NETWORK, r"is a Network;.*NTKRandomFeatures\(network"),
    "a name": ("ntk", "is 'ntk'; give one of ntkdask.features"),
    "a class of maps": (NTKRandomFeatures, "is the class NTKRandomFeatures"),
    "a class of kernels": (RBF, "is the class RBF"),
    "a transformer": (FeatureTransformer(MAP), "is the scikit-learn transformer FeatureTransformer;.*make_pipeline"),
    "scikit-learn's map": (RBFSampler(), "is the scikit-learn transformer RBFSampler"),
    "a number": (512, "is 512"),
    "a function": (np.tanh, "is <ufunc 'tanh'>"),
}
NO_KERNELS = {
    "a map": (MAP, r"is the feature map \w+; .*`target`"),
    "a map to be fitted": (Nystrom(RBF(1.0), 4), "is the feature map Nystrom"),
    "a network": (NETWORK, r"is a Network; .*NTK\(network\)"),
    "a name": ("ntk", "is 'ntk'; give one of ntkdask.kernels"),
    "a class": (NTK, "is the class NTK"),
    "a transformer": (FeatureTransformer(MAP), "is a FeatureTransformer;"),
}


@pytest.mark.parametrize("kind", [RidgeClassifier, RidgeRegressor, FeatureTransformer])
@pytest.mark.parametrize("wrong", NO_MAPS)
def test_what_is_no_map_is_refused_with_what_to_give(kind, wrong):
    given, said = NO_MAPS[wrong]
    with pytest.raises(InputError, match=f"{kind.__name__}: (features|map) {said}"):
        kind(given).fit(X, LABELS)


@pytest.mark.parametrize("kind", [KernelRidgeClassifier, KernelRidgeRegressor])
@pytest.mark.parametrize("wrong", NO_KERNELS)
def test_what_is_no_kernel_is_refused_with_what_to_give(kind, wrong):
    given, said = NO_KERNELS[wrong]
    with pytest.raises(InputError, match=f"{kind.__name__}: kernel {said}"):
        kind(given).fit(X, LABELS)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nd.kernel_matrix(MAP, X), "kernel_matrix: kernel is the feature map"),
        (lambda: nd.plan_kernel_matrix(MAP, X), "kernel_matrix: kernel is the feature map"),
        (lambda: Nystrom(MAP, 4), "Nystrom: kernel is the feature map"),
        (lambda: nd.kernels.FlipAveraged(MAP), "FlipAveraged: kernel is the feature map"),
        (lambda: nd.featurize(NTK(NETWORK), X), "featurize: map is the kernel NTK"),
        (lambda: nd.featurize(NTKRandomFeatures, X), "featurize: map is the class"),
        (lambda: nd.approximation_error(NTK(NETWORK), X), "approximation_error: map is the kernel NTK"),
        (lambda: KernelRidgeRegressor(both(NETWORK)).fit(X, Y), "gives nngp and ntk in one call"),
    ],
)
def test_kernels_and_maps_are_told_apart_everywhere(call, said):
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize("kind", [RidgeClassifier, RidgeRegressor, KernelRidgeClassifier, KernelRidgeRegressor])
def test_an_unknown_parameter_names_the_nearest(kind):
    for call in (lambda: kind(alpha=1.0), lambda: kind().set_params(alpha=1.0)):
        with pytest.raises(
            InputError, match=f"Invalid parameter 'alpha' for {kind.__name__}; did you mean 'alphas'"
        ) as caught:
            call()
        assert isinstance(caught.value, TypeError)  # as Python calls an unexpected keyword
    assert kind(None, (2.0,)).set_params(alphas=(3.0,)).alphas == (3.0,)


@pytest.mark.parametrize("kind", [RidgeRegressor, KernelRidgeRegressor])
@pytest.mark.parametrize(
    "alphas",
    [
        [[1.0, 2.0]],
        [[1.0], [2.0]],
        np.ones((1, 2)),
        [1, [2]],
        (1, 1.0, "1"),
        "1",
        True,
        (True, 1),
        None,
        [None],
        1j,
        {1.0, 2.0},
        {"a": 1.0},
        iter([1.0]),
    ],
)
def test_alphas_are_numbers_in_a_flat_sequence(kind, alphas):
    with pytest.raises(InputError, match=r"alphas is .*; expected a number or a list of numbers"):
        kind(alphas=alphas).fit(X, Y)


@pytest.mark.parametrize(
    ("alphas", "chosen"),
    [
        (2, 2.0),
        (np.float32(0.5), 0.5),
        (np.array(0.25), 0.25),
        (range(1, 2), 1.0),
        ([np.int64(3)], 3.0),
        (np.array([4.0]), 4.0),
    ],
)
def test_numbers_of_any_kind_are_alphas(alphas, chosen):
    for kind in (RidgeRegressor, KernelRidgeRegressor):
        assert kind(alphas=alphas).fit(X, Y).alpha_ == chosen


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_intercepts_have_the_shape_of_a_row_of_targets(fit_intercept):
    """As scikit-learn's Ridge: a number for y (n,), an array for columns, be it one."""
    for kind in (RidgeRegressor, KernelRidgeRegressor):
        for columns in (1, 2):
            y = np.column_stack([Y + i for i in range(columns)])
            assert np.shape(kind(fit_intercept=fit_intercept).fit(X, y).intercept_) == (columns,)
        assert np.shape(kind(fit_intercept=fit_intercept).fit(X, Y).intercept_) == ()
    theirs = Ridge().fit(X, Y[:, None])
    np.testing.assert_allclose(RidgeRegressor().fit(X, Y[:, None]).intercept_, theirs.intercept_, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("selection", ["kfold", "holdout"])
@pytest.mark.parametrize("kind", [RidgeRegressor, KernelRidgeRegressor])
def test_rows_of_weight_zero_are_not_dealt_to_folds(kind, selection):
    """Twelve rows count, of which some folds got none; they choose alpha as if they were alone."""
    model = kind(alphas=(0.1, 10.0), selection=selection)
    weights = np.zeros(len(X))
    weights[:12] = 1 + np.arange(12) % 2
    alone = kind(alphas=(0.1, 10.0), selection=selection).fit(X[:12], Y[:12], weights[:12])
    model.fit(X, Y, weights)
    assert model.alpha_ == alone.alpha_
    np.testing.assert_allclose(
        [row["score"] for row in model.alpha_path_], [row["score"] for row in alone.alpha_path_], rtol=1e-9
    )
    few = np.where(np.arange(len(X)) < 3, 1.0, 0.0)
    if selection == "kfold":
        with pytest.raises(InputError, match="positive weight, 5 folds of 3 distinct rows"):
            model.fit(X, Y, few)
    else:
        assert np.isfinite(model.fit(X, Y, few).alpha_)
