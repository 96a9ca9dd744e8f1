"""Two ways to a dual activation that need no formula: Gauss-Hermite quadrature, and the derivative from the dual alone.

Han et al. 2022, eq. 15 and Theorem 3. Called by `from_function` and, as a check, by tests; closed forms are faster and more accurate
where they exist.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import scipy.special

from ntkdask.activations.base import common_arrays
from ntkdask.activations.expansion import BLOCK_ENTRIES, DEVICE_BLOCK_ENTRIES, by_blocks
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError


@functools.lru_cache(maxsize=16)
def _rule(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (ascending, symmetric) and weights of the Gauss rule for E[f(t)], t ~ N(0, 1)."""
    nodes, weights = scipy.special.roots_hermitenorm(degree)
    return nodes, weights / math.sqrt(2 * math.pi)


def quadrature_dual(f: Callable[[Array], Array], a: Array, b: Array, c: Array, degree: int = 64) -> Array:
    """E[f(u)f(v)] by the product Gauss-Hermite rule of `degree`² nodes; exact for polynomials of degree < `degree`.

    Parameters
    ----------
    f : callable
        Elementwise on float64 arrays.
    a, b : array, float32 or float64, or number
        Standard deviations, >= 0.
    c : array, float32 or float64, or number
        Correlations, clipped to [−1, 1]; shapes broadcast.
    degree : int
        Nodes on each axis, 1 to 1000.

    Returns
    -------
    array of the broadcast shape and the common dtype
        Swapping a and b changes no bit.

    Raises
    ------
    InputError
        For another degree.

    Notes
    -----
    With the symmetric root of the covariance: u = a(√((1+c)/2)·x + √((1−c)/2)·y), v = b(… − …). Time: 2·degree² evaluations of f per
    entry; memory: a few arrays of a block of rows. Errors fall quickly for smooth f, and like 1/degree where f has a kink.

    References
    ----------
    Han et al. 2022, eq. 15.

    Examples
    --------
    >>> round(float(quadrature_dual(lambda t: t, 2.0, 3.0, 0.5)), 12)
    3.0
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= 1000:
        raise InputError(f"quadrature_dual: degree is {degree!r}, expected an integer from 1 to 1000.")
    xp, dtype, (a, b, c) = common_arrays(a, b, c)
    a, b, c = (v.astype(xp.float64, copy=False) for v in (a, b, xp.clip(c, -1.0, 1.0)))
    nodes, weights = _rule(degree)
    entries = DEVICE_BLOCK_ENTRIES if is_device_array(c) else BLOCK_ENTRIES
    half = degree // 2  # y and −y are added first: the sum is symmetric in u and v

    def expectation(a: Array, b: Array, c: Array) -> Array:
        shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
        sums, differences = xp.sqrt((1.0 + c) / 2), xp.sqrt((1.0 - c) / 2)
        # few entries: many nodes y at once, in a leading axis, as far as a block's memory goes
        together = max(1, entries // max(1, math.prod(shape)))
        columns = [slice(start, min(start + together, half)) for start in range(0, half, together)]
        parts = [[xp.asarray(v[k]).reshape(-1, *(1,) * len(shape)) for v in (nodes, weights)] for k in columns]
        total = xp.zeros(shape)
        for x, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            inner = f(a * (sums * x)) * f(b * (sums * x)) * (float(weights[half]) if degree % 2 else 0.0)
            for y, other in parts:
                up, down = sums * x + differences * y, sums * x - differences * y
                inner = inner + (other * (f(a * up) * f(b * down) + f(a * down) * f(b * up))).sum(axis=0)
            total += weight * inner
        return total

    return by_blocks(expectation, a, b, c, entries).astype(dtype, copy=False)


_WINDOW = 0.4
_POINTS = 14


@functools.cache
def _chebyshev() -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev points of (0, 1), and the matrix that takes values there to coefficients in T_0, T_1, … of 2x − 1."""
    points = (1 - np.cos((np.arange(_POINTS) + 0.5) * math.pi / _POINTS)) / 2
    return points, np.linalg.inv(np.polynomial.chebyshev.chebvander(2 * points - 1, _POINTS - 1))


def derivative_from_dual(dual: Callable[[Array, Array, Array], Array], a: Array, b: Array, c: Array) -> Array:
    """The dual of the derivative from the dual alone: k_σ'(a, b, c) = (1/ab)·∂k_σ/∂c.

    Parameters
    ----------
    dual : callable
        (a, b, c) → k_σ on float64 arrays, for any weakly differentiable σ.
    a, b : array, float32 or float64, or number
        Standard deviations; those below 1e-3 are raised to it.
    c : array, float32 or float64, or number
        Correlations, clipped to [−1, 1]; shapes broadcast.

    Returns
    -------
    array of the broadcast shape and the common dtype

    Notes
    -----
    With c = ±cos φ, φ <= π/2 the angle to the nearer end, k is smooth in φ where it is not in c. It is interpolated at
    14 Chebyshev points of a window of width 0.4 that holds φ: [φ − 0.2, φ + 0.2], or near an end [0, 0.4], where (k(φ) − k(0))/φ² is
    interpolated (dk/dφ = 0 at φ = 0). A call takes 15 evaluations of `dual` and a few arrays of c's shape.

    Measured on closed forms, the error is at most 1e-10 of √(k'(a, a, 1)·k'(b, b, 1)) for 0.1 <= a, b <= 4 and |c| <= 0.95, and 1e-8
    up to |c| = 1. It grows like ε·k/(ab) for smaller a, b, and for larger ones as k turns sharper than the window.

    References
    ----------
    Han et al. 2022, Theorem 3.
    """
    xp, dtype, (a, b, c) = common_arrays(a, b, c)
    a, b = (xp.maximum(v.astype(xp.float64, copy=False), 1e-3) for v in (a, b))
    c = xp.clip(c.astype(xp.float64, copy=False), -1.0, 1.0)
    sign = xp.where(c >= 0, 1.0, -1.0)
    # |c| = 1 − 2sin²(φ/2): φ keeps its digits near 0
    phi = 2 * xp.arcsin(xp.sqrt((1.0 - xp.abs(c)) / 2))
    near_end = phi < _WINDOW / 2
    low = xp.where(near_end, 0.0, phi - _WINDOW / 2)
    points, to_coefficients = _chebyshev()
    at_end = xp.asarray(dual(a, b, sign))
    position = 2 * (phi - low) / _WINDOW - 1
    value = slope = 0.0
    basis = [np.polynomial.chebyshev.Chebyshev(column) for column in to_coefficients.T]
    for point, polynomial in zip(points.tolist(), basis, strict=True):
        angle = low + _WINDOW * point
        k = dual(a, b, sign * xp.cos(angle))
        k = xp.where(near_end, (k - at_end) / (angle * angle), k)
        value = value + k * _clenshaw(polynomial.coef, position)
        slope = slope + k * _clenshaw(polynomial.deriv().coef, position)
    slope = slope * (2 / _WINDOW)
    sine = xp.sin(phi)
    # dk/dc = −sign·(dk/dφ)/sin φ; near an end dk/dφ = 2φm + φ²m' with m = (k − k(0))/φ²
    ratio = xp.where(phi > 0, phi / xp.where(phi > 0, sine, 1.0), 1.0)
    rate = xp.where(near_end, ratio * (2 * value + phi * slope), slope / xp.where(near_end, 1.0, sine))
    return xp.asarray(-sign * rate / (a * b)).astype(dtype, copy=False)


def _clenshaw(coefficients: np.ndarray, x: Array) -> Array:
    """Σ_j coefficients[j]·T_j(x)."""
    xp = namespace(x)
    later, now = xp.zeros_like(x), xp.zeros_like(x)
    for coefficient in coefficients[:0:-1].tolist():
        later, now = now, 2 * x * now - later + coefficient
    return x * now - later + float(coefficients[0])
