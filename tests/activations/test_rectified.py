"""The arc-cosine functions: closed values, edges, digits near one; the Hermite coefficients of ReLU."""

import math

import numpy as np
import pytest
from activation_examples import polar_expectation
from reference import kappa

from ntkdask import activations
from ntkdask.activations import ReLU, kappa0, kappa1
from ntkdask.activations.rectified import angular_moment

TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@both_dtypes
def test_closed_values(dtype):
    c = np.array([-1, -0.5, 0, 0.5, 1], dtype)
    r = math.sqrt(3) / 2
    np.testing.assert_allclose(kappa0(c), [0, 1 / 3, 1 / 2, 2 / 3, 1], atol=TOLERANCE[dtype])
    expected = [0, (r - math.pi / 6) / math.pi, 1 / math.pi, (r + math.pi / 3) / math.pi, 1]
    np.testing.assert_allclose(kappa1(c), expected, atol=TOLERANCE[dtype])
    assert kappa0(c).dtype == kappa1(c).dtype == dtype


def test_kappas_agree_with_the_angle_formulas():
    c = np.linspace(-1, 1, 201)
    for order, function in ((0, kappa0), (1, kappa1)):
        np.testing.assert_allclose(function(c), [kappa(order, v) for v in c], atol=TOLERANCE["float64"])
        np.testing.assert_allclose(math.pi * function(c), angular_moment(order, c), atol=1e-14)


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
    assert ReLU().slopes == (0, 1)


def test_special_cases_are_each_other():
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(0, 3, 50), rng.uniform(0, 3, 50), rng.uniform(-1, 1, 50)
    pairs = [
        ("relu", {}, "abrelu", {}),
        ("relu", {}, "rectified_monomial", {"q": 1}),
        ("step", {}, "rectified_monomial", {"q": 0}),
        ("abs", {}, "abrelu", {"A": 1, "B": 1}),
        ("identity", {}, "leaky_relu", {"slope": 1}),
        ("identity", {}, "monomial", {"q": 1}),
        ("identity", {}, "hermite", {"q": 1}),
        ("monomial", {"q": 3}, "polynomial", {"coefficients": (0, 0, 0, 1)}),
        ("hermite", {"q": 3}, "polynomial", {"coefficients": (0, -3, 0, 1)}),
        ("cos", {"A": 1.1, "B": 0.3}, "sin", {"A": 1.1, "B": 0.3 + math.pi / 2}),
    ]
    for left, with_left, right, with_right in pairs:
        first, second = activations.get(left, **with_left), activations.get(right, **with_right)
        t = np.linspace(-2, 2, 8)
        np.testing.assert_allclose(first(t), second(t), atol=1e-14)
        np.testing.assert_allclose(first.dual(a, b, c), second.dual(a, b, c), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            first.dual_derivative(a, b, c), second.dual_derivative(a, b, c), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("order", [0, 1, 2, 5, 60, 150])
def test_angular_moments_at_the_ends(order):
    """J_n(1) = π(2n − 1)‼, J_n(−1) = 0, J_n(0) = 2π·E[tⁿ₊]²."""
    size = math.pi * math.prod(range(1, 2 * order, 2))
    assert float(angular_moment(order, np.array(1.0))) == pytest.approx(size, rel=1e-12)
    assert abs(float(angular_moment(order, np.array(-1.0)))) <= 1e-12 * size
    half = math.exp(order / 2 * math.log(2) + math.lgamma((order + 1) / 2)) / (2 * math.sqrt(math.pi))  # E[tⁿ₊]
    assert float(angular_moment(order, np.array(0.0))) == pytest.approx(2 * math.pi * half**2, rel=1e-11)


def test_hermite_coefficients_of_relu():
    """k(1, 1, c) = Σ c_i²·i!·c^i with the coefficients of MATH.md §2; at |c| <= 0.9 degree 160 leaves nothing."""

    def coefficient(i):
        if i < 2:
            return (1 / math.sqrt(2 * math.pi), 0.5)[i]
        if i % 2:
            return 0.0
        double_factorial = math.prod(range(2, i - 1, 2))
        return (-1) ** (i // 2 - 1) / (math.sqrt(2 * math.pi) * i * (i - 1) * double_factorial)

    c = np.linspace(-0.9, 0.9, 7)
    total = sum(coefficient(i) ** 2 * float(math.factorial(i)) * c**i for i in range(160))
    np.testing.assert_allclose(ReLU().dual(1.0, 1.0, c), total, atol=1e-9)
    for i in range(8):
        basis = np.polynomial.hermite_e.HermiteE.basis(i)
        found = polar_expectation(ReLU(), basis, 1, 1, 1) / math.factorial(i)
        assert found == pytest.approx(coefficient(i), abs=1e-12)
