"""Radial functions of an activation: the Hermite coefficients of σ(a·), for every length a of a row. Han et al. 2022, §3.1.

r_ℓ(a) = E[σ(at)·He_ℓ(t)]/√ℓ!, t ~ N(0, 1), so that σ(at) = Σ_ℓ r_ℓ(a)·He_ℓ(t)/√ℓ! and k_σ(a, b, c) = Σ_ℓ r_ℓ(a)r_ℓ(b)c^ℓ. For a
polynomial σ they are the r_{σ,ℓ} of Theorem 1; for another σ they expand σ(a·) at each a separately, which is at least as good
as any one polynomial. `activations.expansion` gives the same for smooth σ to serve whole kernels; here σ may have a kink or
jump at 0 (each half-line is integrated separately), a row's numbers depend on that row alone, and the degrees that vanish for
every a are known. Called by the maps of general activations.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import numpy as np

from ntkdask.activations import ActivationFunction, NormalizedGaussian
from ntkdask.activations.expansion import REACHES, SMALLEST_SLOPE
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError

POINTS = 16
"""Gauss–Legendre points of a panel."""
MAX_SPLITS = 64
TOLERANCE = 1e-11
BLOCK_ENTRIES, DEVICE_BLOCK_ENTRIES = 2**13, 2**21
"""Values of σ that are held at once."""

SMALLEST = 1e-290
"""Lengths below count as this: at 0 a jump takes its limit, as the dual activations do (MATH.md §1)."""

Rule = tuple[np.ndarray, np.ndarray, np.ndarray]


def radial_functions(sigma: ActivationFunction, a: Array, degree: int) -> Array:
    """r_ℓ(a_i) for ℓ = 0 … degree, (degree + 1, n), for lengths a (n,) float64, finite and >= 0; on a's device.

    They are right to about 1e-11 of √E σ(at)². A homogeneous σ takes r_ℓ(a) = a·r_ℓ(1), the normalised Gaussian
    √(e^{−s}s^ℓ/ℓ!)·a. Raises InputError where σ has no usable expansion: kinks or jumps elsewhere than at 0, growth like
    e^{t²/4}, oscillations that are too fast at the longest row.

    >>> from ntkdask import activations
    >>> radial_functions(activations.get("relu"), np.array([2.0]), 2).round(4).tolist()
    [[0.7979], [1.0], [0.5642]]
    """
    xp = namespace(a)
    if sigma.homogeneous:
        return xp.asarray(_at_length_one(sigma, degree))[:, None] * a
    out = xp.empty((degree + 1, a.size))
    if not a.size:
        return out
    a = xp.maximum(a, SMALLEST)
    # one rule for all lengths of an octave: what a row gets does not depend on the rows beside it
    octaves = xp.ceil(xp.log2(xp.where(xp.isfinite(a) & (a > 1.0), a, 1.0))).astype(xp.int64)
    for octave in xp.unique(octaves).tolist():
        chosen = xp.nonzero(octaves == octave)[0]
        t, even, odd = (xp.asarray(part) for part in _rule(sigma, degree, octave))
        step = max(1, (DEVICE_BLOCK_ENTRIES if is_device_array(a) else BLOCK_ENTRIES) // t.size)
        for first in range(0, chosen.size, step):
            rows = chosen[first : first + step]
            out[:, rows] = _integrals(xp, sigma, a[rows], t, even, odd)[0].T
    return out


def slope_functions(sigma: ActivationFunction, a: Array, degree: int, values: Array | None = None) -> Array:
    """The radial functions of σ', √(ℓ+1)·r_{ℓ+1}(a)/a for ℓ = 0 … degree − 1, (degree, n) (Theorem 3, term by term).

    values: r_ℓ(a), where they are known. Lengths below `SMALLEST_SLOPE` are replaced by it, so that the quotient keeps its
    digits.
    """
    xp = namespace(a)
    if values is None or not a.size or float(a.min()) < SMALLEST_SLOPE:
        a = xp.maximum(a, SMALLEST_SLOPE)
        values = radial_functions(sigma, a, degree)
    return values[1:] * (xp.sqrt(xp.arange(1.0, degree + 1))[:, None] / a)


def active_degrees(sigma: ActivationFunction, degree: int) -> tuple[int, ...]:
    """The ℓ <= degree for which r_ℓ is not zero for every a, by the symmetry of σ.

    Where the odd part of σ is linear (ReLU, GELU, SiLU, softplus) odd degrees above 1 vanish; where the even part is constant
    (sin, erf, tanh, sigmoid) even degrees above 0 vanish.
    """
    if isinstance(sigma, NormalizedGaussian):
        return tuple(range(degree + 1))
    t = np.linspace(0.0625, 5.0, 80)
    with np.errstate(over="ignore"):
        right, left = (np.asarray(sigma(u), np.float64) for u in (t, -t))
    even, odd = (right + left) / 2, (right - left) / 2
    rounding = 1e-13 * np.abs(np.concatenate([left, right])).max()
    linear = odd[0] / t[0] * t
    return tuple(
        low
        for low in range(degree + 1)
        if (np.abs(odd if low == 1 else odd - linear) if low % 2 else np.abs(even - even[0] * (low > 0))).max()
        > rounding
    )


def _at_length_one(sigma: ActivationFunction, degree: int) -> np.ndarray:
    """r_ℓ(1) of a homogeneous σ, (degree + 1,), in closed form."""
    low = np.arange(degree + 1)
    if isinstance(sigma, NormalizedGaussian):
        log_factorial = np.array([math.lgamma(n + 1) for n in low])
        return np.exp((low * math.log(sigma.scale) - sigma.scale - log_factorial) / 2)
    if sigma.slopes is None:
        raise InputError(f"{sigma!r} is homogeneous but has no known slopes; its Hermite expansion is not known.")
    # σ = (B − A)/2·t + (A + B)/2·|t|
    down, up = sigma.slopes
    values = np.zeros(degree + 1)
    for n in range(0, degree + 1, 2):
        # E|t|He_n(t)/√n! = √(2/π)·(−1)^{n/2−1}·(n−3)!!/√n!, 1 in the place of the rest for n = 0
        log_double = math.lgamma(n) - math.lgamma(n / 2) - (n / 2 - 1) * math.log(2) if n else 0.0
        size = math.exp(log_double - math.lgamma(n + 1) / 2) / max(1, n - 1)
        values[n] = (down + up) / 2 * math.sqrt(2 / math.pi) * size * (-1 if n and n % 4 == 0 else 1)
    if degree:
        values[1] = (up - down) / 2
    return values


@functools.lru_cache(maxsize=64)
def _rule(sigma: ActivationFunction, degree: int, octave: int) -> Rule:
    """The quadrature rule with which r_ℓ(2^octave) has converged; InputError where none has."""
    a = np.array([2.0 ** (octave - 1), 2.0**octave])
    for reach in REACHES:
        splits, (rule, values, ends) = 1, _measured(sigma, a, degree, octave, 1, reach)
        if ends > TOLERANCE:
            continue
        while splits < MAX_SPLITS:
            finer, better, _ = _measured(sigma, a, degree, octave, 2 * splits, reach)
            if float(np.abs(better - values).max()) <= TOLERANCE:
                return rule
            splits, rule, values = 2 * splits, finer, better
        raise InputError(
            f"{sigma!r} has no usable Hermite expansion at a standard deviation of {a[-1]:.3g}: it has kinks or jumps elsewhere than "
            "at 0, or oscillates too fast there. Scale the inputs down or use another activation."
        )
    raise InputError(
        f"{sigma!r} has no usable Hermite expansion at a standard deviation of {a[-1]:.3g}: it grows too fast there for "
        "its Gaussian second moment. Scale the inputs down or use another activation."
    )


def _measured(
    sigma: ActivationFunction, a: np.ndarray, degree: int, octave: int, splits: int, reach: float
) -> tuple[Rule, np.ndarray, float]:
    """(a rule, r_ℓ(a)/√E σ(at)² by it, what the integrand still contributes at the end of the rule)."""
    t, weights = _half_line(octave, splits, reach)
    even, odd = _hermite_tables(t, weights, degree)
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite values are looked for below
        values, square = _integrals(np, sigma, a, t, even, odd)
        edge = np.abs(np.concatenate([sigma(a * reach), sigma(-a * reach)])).max() * math.exp(-reach * reach / 4)
    if not (np.isfinite(square).all() and math.isfinite(edge)):
        return (t, even, odd), values, math.inf
    scale = np.sqrt(np.maximum(square, 1e-300))
    return (t, even, odd), values / scale[:, None], float(edge / scale.max())


def _integrals(
    xp: ModuleType, sigma: ActivationFunction, a: Array, t: Array, even: Array, odd: Array
) -> tuple[Array, Array]:
    """(r_ℓ(a) (n, degree + 1), E σ(at)² (n,)) by a rule on t > 0."""
    right, left = sigma(a[:, None] * t), sigma(a[:, None] * -t)
    out = xp.empty((a.size, even.shape[1] + odd.shape[1]))
    out[:, 0::2] = (right + left) @ even
    out[:, 1::2] = (right - left) @ odd
    return out, (right * right + left * left) @ even[:, 0]


def _half_line(octave: int, splits: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of ∫₀^reach φ(t)·dt.

    Panels halve towards 0 until σ(at) is smooth in the first one; each panel has `splits` parts.
    """
    levels = octave + 4
    corners = np.concatenate([[0.0], reach * 2.0 ** -np.arange(levels, -1, -1.0)])
    widths = np.repeat(np.diff(corners), splits) / splits
    starts = np.repeat(corners[:-1], splits) + np.tile(np.arange(splits), levels + 1) * widths
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    t = (starts[:, None] + widths[:, None] * (points + 1) / 2).ravel()
    density = np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    return t, (widths[:, None] / 2 * weights).ravel() * density


def _hermite_tables(t: np.ndarray, weights: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """He_ℓ(t)/√ℓ!·weight for the even and for the odd ℓ <= degree, (N, ⌈·⌉) each."""
    # the recurrence carries e^{−t²/4}: Hermite functions stay bounded where He_ℓ itself overflows
    half = np.exp(-t * t / 4)
    before, now = np.zeros_like(t), half
    table = np.empty((degree + 1, t.size))
    for low in range(degree + 1):
        table[low] = now
        before, now = now, (t * now - math.sqrt(low) * before) / math.sqrt(low + 1)
    table *= weights / half
    return np.ascontiguousarray(table[0::2].T), np.ascontiguousarray(table[1::2].T)
