"""Polynomials for kernels of homogeneous activations: against naive kernels, the constraints of the fits, the numbers of MATH.md."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import reference

from ntkdask import activations
from ntkdask.errors import InputError
from ntkdask.features.sketching.polynomial_fits import (
    activation_coefficients,
    fit_error,
    homogeneous_coefficients,
    kernel_of_cosine,
    nonnegative_fit,
    require_coefficients,
    taylor_coefficients,
    taylor_tail,
)
from ntkdask.networks import Activation, AvgPool, Conv, Dense, Flatten, LayerNorm, Network, Residual, fully_connected

POINTS = np.linspace(-1, 1, 41)
GAUSSIAN = activations.get("normalized_gaussian", scale=0.7)
ABRELU = activations.get("abrelu", A=0.5, B=1.5)
HOMOGENEOUS = ["relu", "abs", ABRELU, activations.get("leaky_relu", slope=0.3), GAUSSIAN]
RESIDUAL = Network((Dense(), Residual((Activation("relu"), Dense(0.5))), Activation("abs"), Dense()))


def unit_rows(cosine):
    return np.array([[1.0, 0.0]]), np.array([[cosine, math.sqrt(1 - cosine**2)]])


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_kernel_of_cosine_is_the_papers_recursion(depth):
    network = fully_connected(depth)
    for cosine in POINTS:
        expected = reference.papers_recursion(depth, *unit_rows(cosine))[0, 0]
        assert abs(kernel_of_cosine(network, cosine) - expected) <= 1e-12 * (depth + 1)
    np.testing.assert_array_equal(
        kernel_of_cosine(dataclasses.replace(network, scale_inputs=True), POINTS), kernel_of_cosine(network, POINTS)
    )


@pytest.mark.parametrize("part", ["ntk", "nngp"])
@pytest.mark.parametrize("network", [fully_connected(2, sigma) for sigma in HOMOGENEOUS] + [RESIDUAL], ids=str)
def test_fits_are_non_negative_exact_at_one_and_close(network, part):
    errors = []
    for degree in (2, 8, 32):
        c = homogeneous_coefficients(network, degree, part)
        assert c.shape == (degree + 1,)
        assert c.dtype == np.float64
        assert (c >= 0).all()
        top = float(kernel_of_cosine(network, 1.0, part))
        assert abs(c.sum() - top) <= 1e-12 * top
        errors.append(fit_error(network, c, part))
        naive = max(
            abs(sum(v * a**j for j, v in enumerate(c)) - float(kernel_of_cosine(network, a, part))) for a in POINTS
        )
        assert naive <= errors[-1] * top + 1e-12
    assert errors[0] <= 0.25
    assert errors[1] <= 0.4 * errors[0] or errors[1] < 0.06
    assert errors[2] <= 0.6 * errors[1] or errors[2] < 1e-6


@pytest.mark.parametrize(("degree", "percent"), [(8, 4.6), (16, 3.2), (32, 2.2)])
def test_errors_at_depth_three_are_those_of_math_md(degree, percent):
    free = homogeneous_coefficients(fully_connected(3), degree, exact_diagonal=False)
    assert round(100 * fit_error(fully_connected(3), free), 1) == percent
    exact = fit_error(fully_connected(3), homogeneous_coefficients(fully_connected(3), degree))
    assert fit_error(fully_connected(3), free) < exact < 1.1 * fit_error(fully_connected(3), free)


def test_a_free_fit_misses_the_diagonal_and_no_other_polynomial_near_it_is_better():
    network, rng = fully_connected(2), np.random.default_rng(0)
    c = homogeneous_coefficients(network, 6, exact_diagonal=False)
    assert abs(c.sum() - 3) > 0.01
    chebyshev = np.cos(np.pi * np.arange(2001) / 2000)
    powers, target = chebyshev[:, None] ** np.arange(7), kernel_of_cosine(network, chebyshev)
    best = np.sum((powers @ c - target) ** 2)
    for _ in range(200):
        other = np.maximum(c + 0.05 * rng.standard_normal(7), 0)
        assert np.sum((powers @ other - target) ** 2) > best


def test_a_polynomial_is_found_again():
    c = np.array([0.5, 0.0, 2.0, 0.25])
    np.testing.assert_allclose(nonnegative_fit(lambda t: np.polynomial.polynomial.polyval(t, c), 3), c, atol=1e-8)
    found = nonnegative_fit(lambda t: np.polynomial.polynomial.polyval(t, c), 6)
    np.testing.assert_allclose(found, [*c, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("order", [0, 1])
def test_taylor_coefficients_are_the_derivatives_at_zero(order):
    with mpmath.workdps(40):

        def kappa(c):
            angle = mpmath.acos(c)
            value = mpmath.pi - angle
            return (value if order == 0 else mpmath.sqrt(1 - c * c) + c * value) / mpmath.pi

        expected = [float(value) for value in mpmath.taylor(kappa, 0, 12)]
    np.testing.assert_allclose(taylor_coefficients(order, 12), expected, atol=1e-14)
    for degree in (1, 2, 3, 11):
        np.testing.assert_allclose(taylor_coefficients(order, degree), expected[: degree + 1], atol=1e-14)


def test_tails_are_those_of_math_md():
    assert round(taylor_tail(0, 8), 3) == 0.091
    assert round(taylor_tail(0, 64), 3) == 0.032
    assert round(taylor_tail(1, 8), 4) == 0.0035
    for order in (0, 1):
        for cosine in POINTS:
            series = np.polynomial.polynomial.polyval(cosine, taylor_coefficients(order, 8))
            assert abs(series - reference.kappa(order, cosine)) <= taylor_tail(order, 8) + 1e-15


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sigma", HOMOGENEOUS, ids=str)
@pytest.mark.parametrize(("expansion", "tolerance"), [("fit", 0.09), ("taylor", 0.2)])
def test_coefficients_of_activations_give_their_duals(sigma, expansion, tolerance, normalize):
    layer = Activation(sigma, normalize=normalize)
    one = np.ones_like(POINTS)
    exact = [layer.gain * f(one, one, POINTS) for f in (layer.sigma.dual, layer.sigma.dual_derivative)]
    for c, values in zip(activation_coefficients(layer, 8, expansion), exact, strict=True):
        assert (c >= 0).all()
        found = np.polynomial.polynomial.polyval(POINTS, c)
        assert np.abs(found - values).max() <= tolerance * values[-1]
        if expansion == "fit":
            assert abs(c.sum() - values[-1]) <= 1e-12 * values[-1]


def test_fits_are_closer_than_series():
    relu, one = Activation("relu"), np.ones_like(POINTS)
    for part, exact in enumerate((relu.sigma.dual, relu.sigma.dual_derivative)):
        errors = [
            np.abs(
                np.polynomial.polynomial.polyval(POINTS, activation_coefficients(relu, 8, kind)[part])
                - 2 * exact(one, one, POINTS)
            )
            for kind in ("fit", "taylor")
        ]
        assert errors[0].max() < 0.5 * errors[1].max()


def test_other_networks_are_refused():
    cases = {
        "bias": Network((Dense(bias_variance=0.1), Activation("relu"), Dense())),
        "not homogeneous": fully_connected(1, "erf"),
        "LayerNorm": Network((Dense(), LayerNorm(), Activation("relu"), Dense())),
        "takes images": Network((Conv(), Activation("relu"), AvgPool(2), Flatten())),
        "give a Network": "relu",
        "is zero": Network((Dense(trainable=False), Activation("relu"), Dense(trainable=False))),
    }
    for message, network in cases.items():
        with pytest.raises(InputError, match=message):
            homogeneous_coefficients(network, 4)
    residual = Network((Dense(), Residual((Dense(), Activation("relu"), Dense(bias_variance=0.1)))))
    with pytest.raises(InputError, match="bias"):
        homogeneous_coefficients(residual, 4)


def test_other_arguments_are_refused():
    for degree in (0, -1, 2.5, True, "8"):
        with pytest.raises(InputError, match="degree is"):
            homogeneous_coefficients(fully_connected(1), degree)
        with pytest.raises(InputError, match="degree is"):
            taylor_coefficients(0, degree)
    with pytest.raises(InputError, match="order is 2"):
        taylor_coefficients(2, 4)
    with pytest.raises(InputError, match=r"unknown part 'nkt'.*'ntk'"):
        homogeneous_coefficients(fully_connected(1), 4, "nkt")
    with pytest.raises(InputError, match=r"unknown expansion 'tailor'.*'taylor'"):
        activation_coefficients(Activation("relu"), 4, "tailor")
    with pytest.raises(InputError, match="not homogeneous"):
        activation_coefficients(Activation("erf"), 4)
    with pytest.raises(InputError, match="no polynomial"):
        nonnegative_fit(lambda t: -1 - 0 * t, 3, exact_end=False)


def test_coefficients_that_cannot_be_sketched_are_refused():
    assert require_coefficients((0, 1, 2)).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(InputError, match=r"α\^2 is -0.5; a feature map needs non-negative"):
        require_coefficients([1.0, 0.0, -0.5, -0.1])
    for bad in ([1.0], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(InputError, match="at least two finite numbers"):
            require_coefficients(bad)
    with pytest.raises(InputError, match="all coefficients are zero"):
        require_coefficients([0.0, 0.0])
