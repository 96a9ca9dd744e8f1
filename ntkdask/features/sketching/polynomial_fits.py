"""Polynomials with non-negative coefficients for dot-product kernels: κ(α) ≈ Σ_j c_j α^j on [−1, 1].

The kernels of a fully connected network of homogeneous activations without biases are Σ(x, z) = ‖x‖‖z‖κ(cos) for one function κ of
the cosine. A sketch of Σ_j c_j α^j has features √c_j·S_j x, so no c_j may be negative. Two sources of coefficients: a fit to κ
itself, and the truncated Taylor series of κ₀ and κ₁. Called by the feature maps; random numbers and sketches are elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls
from scipy.special import gammaln

from ntkdask.activations import NormalizedGaussian
from ntkdask.activations.rectified import PiecewiseLinear
from ntkdask.errors import InputError, nearest
from ntkdask.kernels.neural import NNGP, NTK
from ntkdask.networks import Activation, Dense, Network, Residual
from ntkdask.networks.network import every_layer

NEGLIGIBLE = 1e-12
"""Part of the sum of its coefficients below which one is rounding."""

Part = Literal["ntk", "nngp"]
KERNELS: dict[str, Any] = {"ntk": NTK, "nngp": NNGP}
EXPANSIONS = ("fit", "taylor")
GRID = 2001
"""Points of [−1, 1] at which a polynomial is fitted, and at which its error is taken."""

ENDPOINT_WEIGHT = 1e5
"""Weight of κ(1) = Σ_j c_j in a fit; what is left of its residual, below 1e-6, is removed by a common factor."""


def require_homogeneous(network: Network, name: str = "homogeneous_coefficients") -> Network:
    """`network` when its kernels are ‖x‖‖z‖κ(cos); InputError, naming the layer and what to use instead, otherwise."""
    if not isinstance(network, Network):
        raise InputError(f"{name}: network is {network!r}; give a Network, for example fully_connected(1).")
    if network.takes_images:
        raise InputError(f"{name} takes networks of vectors; this one takes images. Use CNTKSketch.")
    for position, layer in enumerate(every_layer(network.layers)):
        if isinstance(layer, Dense) and layer.bias_variance > 0:
            raise InputError(
                f"{name}: layer {position} is {layer}; with biases the kernel is no function of norms and cosine. "
                "Use bias_variance=0, or NTKRandomFeatures."
            )
        if isinstance(layer, Activation) and not layer.sigma.homogeneous:
            raise InputError(
                f"{name}: layer {position} is {layer.sigma}, which is not homogeneous (σ(at) = a·σ(t) for a > 0). "
                "Use relu, leaky_relu, abrelu, abs, normalized_gaussian, or a sketch for general activations."
            )
        if not isinstance(layer, (Dense, Activation, Residual)):
            raise InputError(
                f"{name}: layer {position} is {type(layer).__name__}; expected Dense, homogeneous Activation or Residual."
            )
    return network


def kernel_of_cosine(network: Network, cosine: Any, part: Part = "ntk") -> np.ndarray:
    """κ(c) of a homogeneous network: its kernel of two unit vectors of cosine c, without `scale_inputs`; float64, shape of `cosine`.

    Raises InputError for other networks and parts. Source: MATH.md §1; Han et al. 2022, eq. 18, 19.

    >>> from ntkdask.networks import fully_connected
    >>> kernel_of_cosine(fully_connected(1), [1.0, 0.0]).round(6)
    array([2.     , 0.31831])
    """
    if part not in KERNELS:
        raise InputError(f"unknown part {part!r}{nearest(str(part), KERNELS)}")
    require_homogeneous(network, "kernel_of_cosine")
    c = np.clip(np.asarray(cosine, np.float64), -1.0, 1.0)
    units = np.stack([c.ravel(), np.sqrt((1.0 - c) * (1.0 + c)).ravel()], axis=1)
    kernel = KERNELS[part](dataclasses.replace(network, scale_inputs=False))
    return np.asarray(kernel(np.array([[1.0, 0.0]]), units)).reshape(c.shape)


def nonnegative_fit(function: Callable[[np.ndarray], np.ndarray], degree: int, exact_end: bool = True) -> np.ndarray:
    """Coefficients c_j >= 0, (degree + 1,) float64, of the polynomial closest to `function` at Chebyshev points of [−1, 1].

    Least squares; the points are dense near the steep end at 1. exact_end: Σ_j c_j = function(1), which must be positive. Raises
    InputError for a degree below 1, and where no polynomial with non-negative coefficients is better than zero.
    """
    degree = require_degree(degree)
    points = np.cos(np.pi * np.arange(GRID) / (GRID - 1))  # the first is 1
    target = function(points)
    powers, right = points[:, None] ** np.arange(degree + 1), target / abs(target[0])
    if exact_end:
        powers[0] *= ENDPOINT_WEIGHT
        right[0] *= ENDPOINT_WEIGHT
    coefficients, _ = nnls(powers, right, maxiter=100 * (degree + 1))
    if not coefficients.any():
        raise InputError(
            f"no polynomial of degree {degree} with non-negative coefficients fits this function, which is {target[0]:.3g} at 1."
        )
    coefficients[coefficients < NEGLIGIBLE * coefficients.sum()] = 0.0
    return coefficients * (target[0] / coefficients.sum() if exact_end else abs(target[0]))


@functools.cache
def _fitted(network: Network, degree: int, part: Part, exact_diagonal: bool) -> tuple[float, ...]:
    return tuple(nonnegative_fit(lambda c: kernel_of_cosine(network, c, part), degree, exact_diagonal).tolist())


def homogeneous_coefficients(
    network: Network, degree: int, part: Part = "ntk", exact_diagonal: bool = True
) -> np.ndarray:
    """Coefficients c_j >= 0, (degree + 1,) float64, of Σ_j c_j α^j ≈ κ(α): a `nonnegative_fit`.

    Parameters
    ----------
    network : Network
        Fully connected, of homogeneous activations, without biases (`require_homogeneous`).
    degree : int
        Degree >= 1 of the polynomial.
    part : {"ntk", "nngp"}
        The kernel whose κ is fitted.
    exact_diagonal : bool
        Whether Σ_j c_j = κ(1).

    Raises
    ------
    InputError
        For other networks, a degree below 1, and a kernel that is zero on the diagonal.

    Notes
    -----
    The error is `fit_error`, largest near α = 1, and at 1 without `exact_diagonal`.

    References
    ----------
    Zandieh et al. 2021, Remark 1; MATH.md §4.

    >>> from ntkdask.networks import fully_connected
    >>> round(float(homogeneous_coefficients(fully_connected(1), 8).sum()), 12)
    2.0
    """
    degree = require_degree(degree)
    require_homogeneous(network)
    if not kernel_of_cosine(network, 1.0, part) > 0:
        raise InputError(f"the {part} of {network} is zero; there is nothing to fit. Make a layer trainable.")
    return np.array(_fitted(network, degree, part, exact_diagonal))


def fit_error(network: Network, coefficients: Any, part: Part = "ntk") -> float:
    """max_α |Σ_j c_j α^j − κ(α)|/κ(1) over 2 001 points of [−1, 1]: the bias of a sketch, in parts of the diagonal."""
    points = np.linspace(-1.0, 1.0, GRID)
    target = kernel_of_cosine(network, points, part)
    fitted = np.polynomial.polynomial.polyval(points, np.asarray(coefficients, np.float64))
    return float(np.abs(fitted - target).max() / target[-1])


def taylor_coefficients(order: int, degree: int) -> np.ndarray:
    """Coefficients (degree + 1,) float64 of the Taylor series of κ₀ or κ₁ at 0, up to α^degree; all are >= 0.

    κ₀ = ½ + Σ_i a_i α^{2i+1}/π, κ₁ = 1/π + α/2 + Σ_i a_i α^{2i+2}/(π(2i+2)), a_i = (2i)!/(4^i i!² (2i+1)).
    order: 0 or 1. Raises InputError for other orders and for degrees below 1. Source: Zandieh et al. 2021, eq. 6.

    >>> taylor_coefficients(1, 2) * np.pi
    array([1.        , 1.57079633, 0.5       ])
    """
    degree = require_degree(degree)
    if order not in (0, 1):
        raise InputError(f"order is {order!r}; there are Taylor series of κ₀ and κ₁.")
    out = np.zeros(degree + 1)
    i = np.arange((degree - order + 1) // 2)
    series = np.exp(gammaln(2 * i + 1) - 2 * gammaln(i + 1) - i * math.log(4)) / (2 * i + 1) / math.pi
    if order == 0:
        out[0] = 0.5
        out[1::2] = series
    else:
        out[0], out[1] = 1 / math.pi, 0.5
        out[2::2] = series / (2 * i + 2)
    return out


def taylor_tail(order: int, degree: int) -> float:
    """The largest error on [−1, 1] of the series of κ₀ or κ₁ cut after α^degree: what it lacks at α = 1.

    >>> round(taylor_tail(0, 8), 3), round(taylor_tail(1, 8), 4)
    (0.091, 0.0035)
    """
    return float(1.0 - taylor_coefficients(order, degree).sum())


@functools.cache
def _dual_fits(layer: Activation, degree: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    sigma, gain, one = layer.sigma, layer.gain, np.ones(GRID)
    value = nonnegative_fit(lambda c: gain * sigma.dual(one, one, c), degree)
    slope = nonnegative_fit(lambda c: gain * sigma.dual_derivative(one, one, c), degree)
    return tuple(value.tolist()), tuple(slope.tolist())


def activation_coefficients(layer: Activation, degree: int, expansion: str = "fit") -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of κ and κ' of one homogeneous activation, (degree + 1,) float64: k_σ(a, b, c) = ab·κ(c), k_σ' = κ'(c).

    Parameters
    ----------
    layer : Activation
        The activation; both results include its `gain`.
    degree : int
        Degree >= 1 of the polynomials.
    expansion : {"fit", "taylor"}
        "fit": `nonnegative_fit`, exact at c = 1. "taylor": the truncated series at 0 of activations with one kink at 0 (κ₀ and
        κ₁) and of the normalised Gaussian.

    Raises
    ------
    InputError
        For other activations and expansions.

    References
    ----------
    Zandieh et al. 2021, eq. 6; MATH.md §2.
    """
    sigma, gain = layer.sigma, layer.gain
    if not sigma.homogeneous:
        raise InputError(f"{sigma} is not homogeneous, so its dual is no function of the cosine alone.")
    if expansion == "fit":
        value, slope = (np.array(fitted) for fitted in _dual_fits(layer, require_degree(degree)))
        return value, slope
    if expansion != "taylor":
        raise InputError(f"unknown expansion {expansion!r}{nearest(str(expansion), EXPANSIONS)}")
    degree = require_degree(degree)
    if isinstance(sigma, PiecewiseLinear):
        low, high = sigma.slopes
        value, slope = ((low + high) ** 2 / 2 * taylor_coefficients(order, degree) for order in (1, 0))
        value[1] -= low * high
        slope[0] -= low * high
        # (A − B)²/4 to rounding
        return gain * np.maximum(value, 0.0), gain * np.maximum(slope, 0.0)
    if isinstance(sigma, NormalizedGaussian):
        j = np.arange(degree + 1)
        value = gain * np.exp(j * math.log(sigma.scale) - sigma.scale - gammaln(j + 1))
        return value, sigma.scale * value
    raise InputError(f"the Taylor series of {sigma} is not known; use expansion='fit'.")


def require_degree(degree: Any) -> int:
    """`degree` as an int >= 1; InputError otherwise."""
    if isinstance(degree, bool) or not hasattr(degree, "__index__") or degree.__index__() < 1:
        raise InputError(f"degree is {degree!r}, expected an integer >= 1.")
    return int(degree.__index__())


def require_coefficients(coefficients: Any) -> np.ndarray:
    """Coefficients of a polynomial that can be sketched, (degree + 1,) float64.

    Raises InputError for fewer than two, and for negative, infinite or all-zero ones.
    """
    values = np.asarray(coefficients, np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise InputError(
            f"coefficients are {coefficients!r}, expected at least two finite numbers, from the constant term on."
        )
    if (values < 0).any():
        worst = int(values.argmin())
        raise InputError(
            f"the coefficient of α^{worst} is {values[worst]:.3g}; a feature map needs non-negative ones. Fit with that constraint "
            "(ntkdask.features.sketching.polynomial_fits.homogeneous_coefficients) or drop the term."
        )
    if not values.any():
        raise InputError("all coefficients are zero; there is nothing to sketch.")
    return values
