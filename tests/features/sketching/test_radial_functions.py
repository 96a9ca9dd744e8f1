"""Radial functions of activations against closed forms, Gauss–Hermite quadrature and the dual activations they add up to."""

import math

import numpy as np
import pytest

from ntkdask import activations
from ntkdask.activations.polynomial import hermite_weights
from ntkdask.errors import InputError
from ntkdask.features.sketching.radial_functions import active_degrees, radial_functions, slope_functions

LENGTHS = np.array([1e-6, 0.3, 1.0, 1.7, 2.0, 5.5])
SMOOTH = {
    "erf": {},
    "sin": {"B": 0.3},
    "gaussian": {},
    "gelu": {},
    "tanh": {},
    "softplus": {},
    "exp": {"A": 0.5},
    "gabor": {},
}
KINKED = {
    "relu": {},
    "abrelu": {"A": 0.5, "B": 1.5},
    "leaky_relu": {},
    "abs": {},
    "identity": {},
    "elu": {},
    "step": {},
}
OTHERS = {
    "sign": {},
    "rectified_monomial": {"q": 2},
    "normalized_gaussian": {"scale": 1.5},
    "monomial": {"q": 4},
    "cos": {},
}


def hermite(order, t):
    """He_order(t)/√order! by the three-term recurrence."""
    before, now = np.zeros_like(t), np.ones_like(t)
    for j in range(order):
        before, now = now, (t * now - math.sqrt(j) * before) / math.sqrt(j + 1)
    return now


def quadrature(sigma, a, degree, nodes=180):
    """(degree + 1, n): E[σ(at)He_ℓ(t)]/√ℓ! by Gauss–Hermite, for smooth σ."""
    t, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / math.sqrt(2 * math.pi)
    return np.array([[float(weights @ (sigma(s * t) * hermite(order, t))) for s in a] for order in range(degree + 1)])


@pytest.mark.parametrize("name", SMOOTH)
def test_against_gauss_hermite(name):
    sigma, a = activations.get(name, **SMOOTH[name]), LENGTHS[:3]
    np.testing.assert_allclose(radial_functions(sigma, a, 12), quadrature(sigma, a, 12), rtol=0, atol=2e-9)


def test_of_relu_in_closed_form():
    """MATH.md §2: c₀ = 1/√2π, c₁ = ½, even i: (−1)^{i/2−1}/(√2π·i(i−1)(i−2)!!), odd i >= 3: 0; r_i = √i!·c_i·a."""
    expected = [1 / math.sqrt(2 * math.pi), 0.5]
    for i in range(2, 21):
        double = math.prod(range(i - 2, 0, -2))
        c = (-1) ** (i // 2 - 1) / (math.sqrt(2 * math.pi) * i * (i - 1) * double) if i % 2 == 0 else 0.0
        expected.append(math.sqrt(math.factorial(i)) * c)
    found = radial_functions(activations.get("relu"), LENGTHS, 20)
    np.testing.assert_allclose(found, np.outer(expected, LENGTHS), rtol=1e-13, atol=0)


def test_of_polynomials_are_those_of_theorem_1():
    coefficients = (0.3, -1.0, 0.2, 0.5, 0.01)
    found = radial_functions(activations.get("polynomial", coefficients=coefficients), LENGTHS, 6)
    expected = np.concatenate([hermite_weights(coefficients, LENGTHS), np.zeros((2, LENGTHS.size))])
    assert np.abs(found - expected).max() <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("name", {**SMOOTH, **KINKED, **OTHERS})
def test_add_up_to_the_dual_activation(name):
    """k_σ(a, b, c) = Σ r_ℓ(a)r_ℓ(b)c^ℓ; at |c| <= ½ degrees above 60 are below rounding."""
    sigma = activations.get(name, **{**SMOOTH, **KINKED, **OTHERS}[name])
    r, c = radial_functions(sigma, LENGTHS, 60), np.array([-0.5, 0.0, 0.4])
    found = np.einsum("la,lb,lc->abc", r, r, c ** np.arange(61)[:, None])
    size = np.sqrt(sigma.dual(LENGTHS, LENGTHS, np.ones(6)))
    exact = sigma.dual(LENGTHS[:, None, None], LENGTHS[:, None], c)
    assert (np.abs(found - exact) / (size[:, None, None] * size[:, None])).max() <= 1e-12


@pytest.mark.parametrize("name", ["erf", "gelu", "relu", "softplus", "tanh", "normalized_gaussian", "exp"])
def test_slopes_add_up_to_the_dual_of_the_derivative(name):
    sigma = activations.get(name, **({"A": 0.5} if name == "exp" else {}))
    a, c = np.array([1e-9, 1e-3, 0.5, 1.0, 3.0]), np.array([-0.4, 0.0, 0.4])
    s = slope_functions(sigma, a, 60)
    assert s.shape == (60, 5)
    found = np.einsum("la,lb,lc->abc", s, s, c ** np.arange(60)[:, None])
    exact = sigma.dual_derivative(a[:, None, None], a[:, None], c)
    size = np.sqrt(sigma.dual_derivative(a, a, np.ones(5)))
    error = np.abs(found - exact) / (size[:, None, None] * size[:, None])
    assert error[1:, 1:].max() <= 1e-11
    assert error.max() <= 2e-5  # lengths below 2e-5 count as that


def test_slopes_from_known_values():
    sigma, a = activations.get("gelu"), np.array([0.5, 2.0])
    known = radial_functions(sigma, a, 9)
    np.testing.assert_array_equal(slope_functions(sigma, a, 9, known), slope_functions(sigma, a, 9))
    mixed = np.array([0.0, 2.0])
    short = slope_functions(sigma, mixed, 9, radial_functions(sigma, mixed, 9))
    np.testing.assert_allclose(short[:, 1], slope_functions(sigma, a, 9)[:, 1], rtol=1e-12, atol=1e-15)
    assert short[0, 0] == pytest.approx(0.5, abs=1e-4)  # gelu'(0)


EVEN_ABOVE, ODD_ABOVE, ALL = (0, 1, 2, 4, 6), (0, 1, 3, 5), tuple(range(7))


@pytest.mark.parametrize(
    ("name", "parameters", "degrees"),
    [
        ("relu", {}, EVEN_ABOVE),
        ("gelu", {}, EVEN_ABOVE),
        ("silu", {}, EVEN_ABOVE),
        ("softplus", {}, EVEN_ABOVE),
        ("abrelu", {"A": 1.0, "B": 2.0}, EVEN_ABOVE),
        ("abs", {}, (0, 2, 4, 6)),
        ("gaussian", {}, (0, 2, 4, 6)),
        ("erf", {}, (1, 3, 5)),
        ("tanh", {}, (1, 3, 5)),
        ("sin", {}, (1, 3, 5)),
        ("sigmoid", {}, ODD_ABOVE),
        ("step", {}, ODD_ABOVE),
        ("sign", {}, (1, 3, 5)),
        ("identity", {}, (1,)),
        ("cos", {"B": 0.3}, ALL),
        ("elu", {}, ALL),
        ("rbf", {}, ALL),
        ("normalized_gaussian", {}, ALL),
        ("polynomial", {"coefficients": (1.0, 2.0)}, (0, 1)),
    ],
)
def test_degrees_that_vanish_at_every_length_are_known(name, parameters, degrees):
    sigma = activations.get(name, **parameters)
    assert active_degrees(sigma, 6) == degrees
    r = np.abs(radial_functions(sigma, LENGTHS, 6)).max(axis=1)
    size = math.sqrt(float(sigma.dual(5.5, 5.5, 1.0)))
    for degree in range(7):
        assert (r[degree] > 1e-6 * size) == (degree in degrees)


def test_of_long_rows_approach_those_of_their_limits():
    a = np.array([1e8, 1e30])
    sign, relu = (radial_functions(activations.get(name), np.ones(2), 8) for name in ("sign", "relu"))
    np.testing.assert_allclose(radial_functions(activations.get("erf"), a, 8), sign, atol=1e-7)
    np.testing.assert_allclose(radial_functions(activations.get("gelu"), a, 8) / a, relu, atol=1e-7)


def test_of_length_zero_are_the_limit():
    for name in ("erf", "gelu", "cos", "softplus"):
        sigma = activations.get(name)
        found = radial_functions(sigma, np.zeros(1), 5)[:, 0]
        np.testing.assert_allclose(found, [float(sigma(np.zeros(1))[0]), 0, 0, 0, 0, 0], atol=1e-15)
    np.testing.assert_allclose(
        radial_functions(activations.get("step"), np.zeros(1), 5),
        radial_functions(activations.get("step"), np.ones(1), 5),
    )


def test_a_row_does_not_depend_on_the_rows_beside_it():
    a = np.random.default_rng(0).uniform(0.01, 9.0, 400)
    for name in ("gelu", "sin"):
        sigma = activations.get(name)
        whole = radial_functions(sigma, a, 10)
        alone = np.concatenate([radial_functions(sigma, a[i : i + 1], 10) for i in range(0, 400, 37)], axis=1)
        np.testing.assert_allclose(whole[:, ::37], alone, rtol=0, atol=1e-14)
    assert radial_functions(activations.get("gelu"), a[:0], 3).shape == (4, 0)


@pytest.mark.parametrize(
    ("function", "length", "message"),
    [
        (lambda t: np.maximum(t - 1.0, 0.0), 1.0, "kinks or jumps elsewhere than at 0"),
        (lambda t: np.exp(t * t / 3), 1.0, "grows too fast"),
        (lambda t: np.sin(1e5 * t), 1.0, "oscillates too fast"),
        (np.sin, 1e6, "standard deviation of 1.05e.06.*oscillates too fast"),
    ],
)
def test_activations_without_a_usable_expansion_are_refused(function, length, message):
    with pytest.raises(InputError, match=message):
        radial_functions(activations.from_function(function), np.array([length]), 6)
