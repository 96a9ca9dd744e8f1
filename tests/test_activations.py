"""Activations: their duals against quadrature, closed values, names."""

import math

import numpy as np
import pytest
from reference import gaussian_expectation, kappa

from ntkdask import activations, registry
from ntkdask.activations import ActivationFunction, ReLU, kappa0, kappa1
from ntkdask.errors import InputError

TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
# Every activation with the derivative that its dual_derivative is the dual of. A class without a line here fails below.
EXAMPLES = {"relu": ({}, lambda t: (t > 0).astype(float))}


def test_every_activation_has_an_example():
    classes = [registry.lookup(name) for name in registry.names("activation")]
    assert {cls.name for cls in classes} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(("a", "b", "c"), [(1, 1, 0.3), (0.7, 2.0, -0.8), (1.5, 0.2, 0.0), (1, 1, 1), (0.5, 2, -1)])
def test_duals_are_gaussian_expectations(name, a, b, c):
    parameters, derivative = EXAMPLES[name]
    sigma = activations.get(name, **parameters)
    size = math.sqrt(gaussian_expectation(sigma, sigma, a, a, 1) * gaussian_expectation(sigma, sigma, b, b, 1))
    arrays = [np.array([value], dtype=float) for value in (a, b, c)]
    assert abs(sigma.dual(*arrays)[0] - gaussian_expectation(sigma, sigma, a, b, c)) <= 1e-12 * size
    expected = gaussian_expectation(derivative, derivative, a, b, c)
    assert abs(sigma.dual_derivative(*arrays)[0] - expected) <= 1e-12


@pytest.mark.parametrize("name", EXAMPLES)
def test_derivative_dual_is_the_slope_of_the_dual(name):
    """Theorem 3 of Han et al.: k_σ' = (1/ab)·∂k_σ/∂c."""
    sigma, step = activations.get(name, **EXAMPLES[name][0]), 1e-6
    c = np.linspace(-0.9, 0.9, 7)
    a, b = np.full(7, 0.8), np.full(7, 1.3)
    slope = (sigma.dual(a, b, c + step) - sigma.dual(a, b, c - step)) / (2 * step)
    np.testing.assert_allclose(sigma.dual_derivative(a, b, c), slope / (a * b), atol=1e-8)


@pytest.mark.parametrize("name", EXAMPLES)
def test_second_moment_is_the_dual_at_one(name):
    sigma = activations.get(name, **EXAMPLES[name][0])
    assert sigma.second_moment() == pytest.approx(gaussian_expectation(sigma, sigma, 1, 1, 1), rel=1e-13)


@pytest.mark.parametrize("name", EXAMPLES)
@both_dtypes
def test_dtype_is_kept_and_broadcasting_works(name, dtype):
    sigma = activations.get(name, **EXAMPLES[name][0])
    a, b, c = np.ones((3, 1), dtype), np.ones(4, dtype), np.zeros((3, 4), dtype)
    for value in (sigma(c), sigma.dual(a, b, c), sigma.dual_derivative(a, b, c)):
        assert value.shape == (3, 4)
        assert value.dtype == dtype


@both_dtypes
def test_closed_values(dtype):
    c = np.array([-1, -0.5, 0, 0.5, 1], dtype)
    r = math.sqrt(3) / 2
    np.testing.assert_allclose(kappa0(c), [0, 1 / 3, 1 / 2, 2 / 3, 1], atol=TOLERANCE[dtype])
    expected = [0, (r - math.pi / 6) / math.pi, 1 / math.pi, (r + math.pi / 3) / math.pi, 1]
    np.testing.assert_allclose(kappa1(c), expected, atol=TOLERANCE[dtype])


def test_kappas_agree_with_the_angle_formulas():
    c = np.linspace(-1, 1, 201)
    for order, function in ((0, kappa0), (1, kappa1)):
        np.testing.assert_allclose(function(c), [kappa(order, v) for v in c], atol=TOLERANCE["float64"])


@both_dtypes
def test_kappas_clip_what_rounding_pushes_past_one(dtype):
    c = np.array([-1.0001, 1.0001], dtype)
    np.testing.assert_array_equal(kappa0(c), np.array([0, 1], dtype))
    np.testing.assert_allclose(kappa1(c), [0, 1], atol=TOLERANCE[dtype])
    assert (kappa1(np.linspace(-1, 1, 1001).astype(dtype)) >= -TOLERANCE[dtype]).all()


def test_kappa1_does_not_cancel_near_one():
    """1 − κ₁(1 − ε) = ε − O(ε^1.5): the difference is seen at ε = 1e-12."""
    epsilon = 1e-12
    assert 1 - float(kappa1(np.array(1 - epsilon))) == pytest.approx(epsilon, rel=1e-3)


def test_relu():
    np.testing.assert_array_equal(ReLU()(np.array([-2.0, 0.0, 3.0])), [0, 0, 3])
    assert ReLU().second_moment() == 0.5
    assert ReLU.homogeneous


def test_get():
    relu = activations.get("relu")
    assert relu == ReLU()
    assert activations.get(relu) is relu
    with pytest.raises(InputError, match="unknown activation 'rellu'; did you mean 'relu'"):
        activations.get("rellu")
    with pytest.raises(InputError, match="unknown activation 3"):
        activations.get(3)
    with pytest.raises(InputError, match=r"'relu' does not take these parameters.*slope"):
        activations.get("relu", slope=0.1)


def test_unfinished_activations_say_so():
    with pytest.raises(NotImplementedError):
        ActivationFunction()(np.zeros(1))
