"""Hermite expansions and mixtures: what tanh, sigmoid, SiLU and softplus are made of."""

import math
import tracemalloc

import numpy as np
import pytest
from activation_examples import polar_expectation
from scipy.special import expit, ndtr

from ntkdask import activations
from ntkdask.activations import expansion
from ntkdask.activations.expansion import coefficients, expand, expand_slope, expanded_dual
from ntkdask.activations.logistic import MAX_DEGREE, TOLERANCE, logistic_mixture
from ntkdask.activations.polynomial import hermite_weights
from ntkdask.errors import InputError

LOGISTIC = ["tanh", "sigmoid", "silu", "softplus"]


def test_coefficients_of_a_polynomial_are_theorem_1():
    """h_j(a) = r_j(a): trapezoidal rule against Han et al., Theorem 1, top degree included."""
    polynomial = (0.5, -1.0, 2.0, 0.25, -0.125)
    a = np.array([0.0, 0.3, 1.0, 2.5])
    found = coefficients(np.polynomial.Polynomial(polynomial), a, 8, 1e-13)
    np.testing.assert_allclose(found.values[:5], hermite_weights(polynomial, a), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.values[5:], 0, atol=1e-12)
    assert found.error <= 1e-13


def test_coefficients_of_exp():
    """E[e^{at}He_j(t)]/√j! = a^j·e^{a²/2}/√j!."""
    a = np.array([0.2, 1.5])
    found = coefficients(np.exp, a, 40, 1e-13).values
    expected = [a**j * np.exp(a * a / 2) / math.sqrt(math.factorial(j)) for j in range(40)]
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_tail_is_the_error():
    """With degree J the error of k(a, a, 1) is the tail; elsewhere the tail bounds it."""
    f, a = np.tanh, np.array([2.0])
    one = np.ones(1)
    exact = polar_expectation(f, f, 2, 2, 1)
    for degree in (8, 32, 64):
        found = coefficients(f, a, degree, 1e-12)
        k, _ = expanded_dual(lambda values, d=degree: coefficients(f, values, d, 1e-12), a, a, one)
        assert found.tail == pytest.approx((exact - k[0]) / exact, rel=1e-3, abs=1e-11)
        c = np.linspace(-1, 1, 9)
        k, error = expanded_dual(lambda values, d=degree: coefficients(f, values, d, 1e-12), a, a, c)
        truth = activations.get("tanh").dual(2.0, 2.0, c)
        assert (np.abs(k - truth) <= (found.tail + 1e-11) * exact).all()
        assert error == found.error


def test_the_degree_follows_the_tolerance():
    a = np.array([0.5, 1.5])
    lengths = [len(expand(np.tanh, a, tolerance, 512).values) for tolerance in (1e-3, 1e-6, 1e-12)]
    assert lengths == sorted(set(lengths))
    kinked = expand(np.abs, a, 1e-10, 512)
    assert kinked.error > 1e-10


def test_slope_coefficients_are_those_of_the_derivative():
    a = np.array([0.0, 1e-3, 0.4, 1.2])
    slope = expand_slope(np.tanh, a, 1e-11, 256, 40)
    direct = expand(lambda t: 1 / np.cosh(t) ** 2, a, 1e-12, 256, 40)
    count = min(len(slope.values), len(direct.values))
    assert count >= 40
    np.testing.assert_allclose(slope.values[:count], direct.values[:count], atol=2e-9)
    np.testing.assert_allclose(slope.values[:count, 2:], direct.values[:count, 2:], atol=1e-12)


@pytest.mark.parametrize("name", LOGISTIC)
def test_expansion_and_mixture_agree(name):
    sigma, rng = activations.get(name), np.random.default_rng(1)
    a, b = 10 ** rng.uniform(-6, math.log10(sigma.SERIES_LIMIT), (2, 40))
    a[0] = b[0] = sigma.SERIES_LIMIT
    a[1] = 0.0
    c = np.concatenate([[1.0, 1.0, -1.0], rng.uniform(-1, 1, 37)])
    for derivative in (False, True):
        mixture = sigma.mixture_dual(a, b, c, derivative=derivative)
        series = sigma.expansion_dual(a, b, c, derivative=derivative)
        one = np.ones(40)
        size = np.sqrt(
            sigma.mixture_dual(a, a, one, derivative=derivative) * sigma.mixture_dual(b, b, one, derivative=derivative)
        )
        assert (np.abs(mixture - series) <= 1e-11 * size).all()


@pytest.mark.parametrize("name", LOGISTIC)
def test_the_series_limit_is_kept(name):
    """At the largest a that takes the series, σ and σ' meet its tolerance by its largest degree."""
    sigma = activations.get(name)
    a = np.array([sigma.SERIES_LIMIT])
    for f in (sigma, sigma.derivative):
        assert expand(f, a, TOLERANCE, MAX_DEGREE).error <= TOLERANCE


def test_the_logistic_function_is_a_mixture_of_normal_distributions():
    t = np.concatenate([np.linspace(-40, 40, 1001), np.logspace(-9, 2, 50)])
    mixture = logistic_mixture()
    np.testing.assert_allclose(sum(w * ndtr(s * t) for w, s in mixture), expit(t), atol=2e-12)
    density = sum(w * s * np.exp(-((s * t) ** 2) / 2) / math.sqrt(2 * math.pi) for w, s in mixture)
    np.testing.assert_allclose(density, expit(t) * expit(-t), atol=5e-12)
    assert all(w > 0 and s > 0 for w, s in mixture)


def test_many_values_are_halved_until_they_fit(monkeypatch):
    sigma, rng = activations.get("tanh"), np.random.default_rng(2)
    a, b, c = rng.uniform(0.1, 2, (30, 1)), rng.uniform(0.1, 2, 20), rng.uniform(-1, 1, (30, 20))
    whole = sigma.expansion_dual(a, b, c)
    monkeypatch.setattr(expansion, "COEFFICIENT_ROWS", 7)
    monkeypatch.setattr(expansion, "BLOCK_ENTRIES", 50)
    np.testing.assert_allclose(sigma.expansion_dual(a, b, c), whole, rtol=1e-11, atol=1e-13)
    full = np.broadcast_to(a, c.shape), np.broadcast_to(b, c.shape), c
    np.testing.assert_allclose(sigma.expansion_dual(*full), whole, rtol=1e-11, atol=1e-13)
    same = sigma.expansion_dual(np.full(9, 1.0), np.full(9, 1.0), c[0, :9])
    np.testing.assert_allclose(same, sigma.expansion_dual(np.ones(()), np.ones(()), c[0, :9]), rtol=1e-14)


def test_memory_does_not_grow_with_the_degree():
    """800² entries at degree about 250: far below one array of c's shape per degree."""
    sigma, rng = activations.get("tanh"), np.random.default_rng(3)
    a, c = rng.uniform(0.5, 2, 800), rng.uniform(-1, 1, (800, 800))
    sigma.expansion_dual(a[:2, None], a[:2], c[:2, :2])
    tracemalloc.start()
    sigma.dual(a[:, None], a, c)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * c.nbytes


def test_functions_that_overflow_are_refused():
    with pytest.raises(InputError, match="gives NaN or inf"):
        coefficients(lambda t: np.exp(t**4), np.array([3.0]), 8, 1e-10)
    with pytest.raises(InputError, match="second moment does not converge"):
        coefficients(lambda t: np.exp(0.24 * t * t), np.array([1.2]), 8, 1e-10)


def test_a_function_that_is_zero():
    found = expand(np.zeros_like, np.array([0.5, 1.0]), 1e-10, 64)
    assert found.error <= 1e-10
    assert (found.values == 0).all()


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "softplus"])
def test_an_entry_does_not_depend_on_its_tile(name):
    """Degree and method follow from the entry's own standard deviations, not from the largest ones of a call."""
    sigma, rng = activations.get(name), np.random.default_rng(0)
    a = np.concatenate([np.geomspace(0.02, 2 * sigma.SERIES_LIMIT, 9), [0.0]])
    c = rng.choice([-1.0, 1.0, 0.9], (10, 10))
    for dual in (sigma.dual, sigma.dual_derivative):
        whole = dual(a[:, None], a, c)
        alone = np.array([[float(dual(a[i], a[j], c[i, j])) for j in range(10)] for i in range(10)])
        size = np.sqrt(dual(a, a, np.ones(10)))
        scale = np.maximum(np.outer(size, size), 1e-300)
        assert (np.abs(whole - alone) / scale).max() <= 2e-14
