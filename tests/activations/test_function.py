"""Activations of any function: both methods against closed forms; quadrature and Theorem 3 by themselves; errors."""

import functools

import cloudpickle
import numpy as np
import pytest

from ntkdask import activations, registry
from ntkdask.activations import derivative_from_dual, from_function, quadrature_dual
from ntkdask.errors import InputError
from ntkdask.networks import Activation, Dense, Network

RNG = np.random.default_rng(0)
A, B, C = RNG.uniform(0.05, 1.5, (7, 1)), RNG.uniform(0.05, 1.5, 5), RNG.uniform(-1, 1, (7, 5))


def relu(t):
    return np.maximum(t, 0)


@pytest.mark.parametrize("method", ["hermite", "quadrature"])
@pytest.mark.parametrize("with_derivative", [False, True])
def test_both_methods_meet_their_tolerance(method, with_derivative):
    exact = activations.get("silu")
    sigma = from_function(exact, exact.derivative if with_derivative else None, method=method, tolerance=1e-7)
    np.testing.assert_allclose(sigma.dual(A, B, C), exact.dual(A, B, C), atol=1e-7)
    np.testing.assert_allclose(sigma.dual_derivative(A, B, C), exact.dual_derivative(A, B, C), atol=2e-7)
    assert sigma.error_estimate(1.5) <= 1e-7
    assert sigma.second_moment() == pytest.approx(exact.second_moment(), rel=1e-7)
    np.testing.assert_array_equal(sigma(C), exact(C))


def test_tight_tolerances():
    exact = activations.get("gelu")
    sigma = from_function(exact, tolerance=1e-12)
    np.testing.assert_allclose(sigma.dual(A, B, C), exact.dual(A, B, C), atol=1e-12)
    np.testing.assert_allclose(sigma.dual_derivative(A, B, C), exact.dual_derivative(A, B, C), atol=1e-11)


def test_polynomials_need_their_degree_and_no_more():
    exact = activations.get("polynomial", coefficients=(1, 0, -1, 0.5))
    sigma = from_function(exact, degree=3, tolerance=1e-12)
    np.testing.assert_allclose(sigma.dual(A, B, C), exact.dual(A, B, C), rtol=1e-11, atol=1e-12)
    with pytest.raises(InputError, match="hermite with degree 2 errs by"):
        from_function(exact, degree=2).dual(A, B, C)
    quadrature = from_function(exact, method="quadrature", degree=4, tolerance=1e-12)
    np.testing.assert_allclose(quadrature.dual(A, B, C), exact.dual(A, B, C), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ["hermite", "quadrature"])
def test_what_is_too_rough_is_refused_and_never_wrong(method):
    sigma = from_function(relu, method=method)
    with pytest.raises(
        InputError, match=rf"asked for its dual to tolerance 1.0e-08, but {method}.*tolerance >= .*closed form"
    ):
        sigma.dual(A, B, C)
    with pytest.raises(InputError, match=r"asked for the dual of its derivative .*Use "):
        sigma.dual_derivative(A, B, C)
    with pytest.raises(InputError, match="errs by about"):
        Network((Dense(), Activation(sigma), Dense()))
    assert sigma.error_estimate(1.0) > 1e-8
    rough = from_function(relu, method=method, tolerance=1e-2)
    size = np.sqrt(0.25 * A * A * B * B)
    assert (np.abs(rough.dual(A, B, C) - activations.get("relu").dual(A, B, C)) <= 1e-2 * size).all()


def test_zero_and_tiny_standard_deviations():
    sigma, exact = from_function(np.tanh), activations.get("tanh")
    a = np.array([0.0, 1e-12, 1e-5, 1e-3])
    np.testing.assert_allclose(sigma.dual(a, 1.0, 0.5), exact.dual(a, 1.0, 0.5), atol=1e-10)
    np.testing.assert_allclose(sigma.dual_derivative(a, 1.0, 0.5), exact.dual_derivative(a, 1.0, 0.5), atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": 3}, "function is 3, expected a function of an array"),
        ({"function": np.tanh, "derivative": "no"}, "derivative is 'no', expected a function"),
        ({"function": np.sum}, r"took a float64 array of shape \(3, 2\) and gave float64 of shape \(\)"),
        ({"function": float}, r"fails on a float64 array of shape \(3, 2\)"),
        ({"function": lambda t: t + 1j}, "complex128.*expected finite real numbers"),
        ({"function": lambda t: np.where(t > 0, t, np.nan)}, "expected finite real numbers"),
        ({"function": np.tanh, "method": "magic"}, "method is 'magic', expected 'hermite' or 'quadrature'"),
        ({"function": np.tanh, "degree": 0}, "degree is 0, expected None or an integer from 1 to 1024"),
        ({"function": np.tanh, "degree": 200, "method": "quadrature"}, "integer from 1 to 128"),
        ({"function": np.tanh, "tolerance": 0.0}, "tolerance is 0.0, expected a float >= 1e-13"),
        ({"function": np.tanh, "tolerance": "tight"}, "tolerance is 'tight'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        from_function(**arguments)


def test_in_a_network_in_memory():
    sigma = from_function(np.tanh)
    network = Network((Dense(), Activation(sigma), Dense()))
    assert network.layers[1].gain == pytest.approx(Activation("tanh").gain, rel=1e-8)
    again = cloudpickle.loads(cloudpickle.dumps(network))
    np.testing.assert_array_equal(again.layers[1].sigma.dual(A, B, C), sigma.dual(A, B, C))
    local = cloudpickle.loads(cloudpickle.dumps(from_function(lambda t: t * t)))
    assert local.dual(1.0, 1.0, 1.0) == pytest.approx(3)


def test_it_cannot_be_described():
    sigma = from_function(np.tanh)
    for value in (sigma, Activation(sigma), Network((Dense(), Activation(sigma), Dense()))):
        for describe in (registry.to_config, registry.digest):
            with pytest.raises(InputError, match=r"FromFunction holds the function .*never stored or loaded"):
                describe(value)
    assert "FromFunction" not in registry.names()
    with pytest.raises(InputError, match="unknown activation 'from_function'"):
        activations.get("from_function")


def test_quadrature_is_exact_for_polynomials_and_symmetric():
    exact = activations.get("monomial", q=6)
    for degree in (7, 8):
        rule = functools.partial(quadrature_dual, exact, degree=degree)
        np.testing.assert_allclose(rule(A, B, C), exact.dual(A, B, C), rtol=1e-11, atol=1e-13)
        np.testing.assert_array_equal(rule(A, B, C), rule(B, A, C))
    assert quadrature_dual(np.tanh, A.astype("float32"), B.astype("float32"), C.astype("float32")).dtype == np.float32


def test_quadrature_converges_slowly_at_a_kink():
    """Han et al. use eq. 15 for any σ; for ReLU 64 nodes a side give three digits."""
    exact = activations.get("relu").dual(A, B, C)
    size = A * B / 2
    coarse, fine = (np.abs(quadrature_dual(relu, A, B, C, n) - exact) / size for n in (8, 64))
    assert 1e-6 < fine.max() < 0.2 * coarse.max()
    assert fine.max() < 5e-3


@pytest.mark.parametrize("degree", [0, 1001, 2.5, True])
def test_quadrature_refuses_bad_degrees(degree):
    with pytest.raises(InputError, match="expected an integer from 1 to 1000"):
        quadrature_dual(np.tanh, A, B, C, degree)


@pytest.mark.parametrize("name", ["gelu", "relu", "abs", "erf", "normalized_gaussian", "elu"])
def test_derivatives_from_duals_are_as_accurate_as_documented(name):
    """1e-10 inside, 1e-8 up to the ends, for a and b from 0.1 to 4."""
    sigma, rng = activations.get(name), np.random.default_rng(4)
    a, b = rng.uniform(0.1, 4, (2, 300))
    inside = rng.uniform(-0.95, 0.95, 300)
    ends = np.concatenate(
        [np.cos(np.exp(rng.uniform(-18, -1, 149))), -np.cos(np.exp(rng.uniform(-18, -1, 149))), [1.0, -1.0]]
    )
    one = np.ones(300)
    size = np.sqrt(sigma.dual_derivative(a, a, one) * sigma.dual_derivative(b, b, one))
    for c, tolerance in ((inside, 1e-10), (ends, 1e-8)):
        error = np.abs(derivative_from_dual(sigma.dual, a, b, c) - sigma.dual_derivative(a, b, c)) / size
        assert error.max() <= tolerance
    value = derivative_from_dual(sigma.dual, 1.0, np.ones(3, "float32"), np.zeros((2, 3), "float32"))
    assert value.shape == (2, 3)
    assert value.dtype == np.float32
