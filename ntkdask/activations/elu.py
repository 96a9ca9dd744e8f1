"""ELU: its dual by one Gauss-Legendre sum per entry, uniformly accurate in a, b and c. Called by networks and kernels.

MATH.md §2 gives k with bivariate normal CDFs, but its terms are O(1) where k is O(ab), and e^{…}Φ₂ over- and underflows. Here the
same function comes from Theorem 3 of Han et al. applied twice, ∂k/∂c = ab·k', ∂k'/∂c = ab·E₂ with E₂ = E[e^{u+v}; u, v < 0], and from
∂E₂/∂c = ab·E₂ + g(c) (Price's theorem; the δ of (e^t·1_{t<0})' gives g):

    g(ρ) = 1/(2πr) − [a·E(ar) + b·E(br)]/√(2π),  r = √(1 − ρ²),  E(x) = ½·erfcx(x/√2) = E[e^{xt}; t < 0].

These equations are solved from a start ρ₀ where k, k', E₂ are one-dimensional integrals. With X = ab(c − ρ),

    k' = k'₀ + E₂₀(e^{X₀} − 1) + ∫ g(ρ)(e^X − 1)dρ,   k = k₀ + X₀k'₀ + E₂₀(e^{X₀} − 1 − X₀) + ∫ g(ρ)(e^X − 1 − X)dρ,

over ρ from ρ₀ to c. ρ₀ = 0 where ab <= 1 (every term is O(ab), so small values keep their digits), ρ₀ = 1 elsewhere (X <= 0, so no
term outgrows k). In θ = arcsin ρ the integrand is smooth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np

from ntkdask.activations.base import ActivationFunction, largest
from ntkdask.arrays import Array, namespace, special
from ntkdask.registry import register

RULES = ((1.5, 20, False), (4.0, 32, False), (300.0, 128, True))
"""(largest a or b, nodes, whether they crowd towards the ends, where the integrand has boundary layers of width 1/a)."""
LAST_RULE = (256, True)


@functools.cache
def _rule(nodes: int, crowded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], symmetric about ½: Gauss-Legendre, or that composed with x³(10 − 15x + 6x²)."""
    x, weights = np.polynomial.legendre.leggauss(nodes)
    x, weights = (x + 1) / 2, weights / 2
    return (x**3 * (10 - 15 * x + 6 * x * x), weights * 30 * (x * (1 - x)) ** 2) if crowded else (x, weights)


def _lower_exponential(a: Array) -> Array:
    """E[e^{at}; t < 0] for a standard normal t."""
    return 0.5 * special(a).erfcx(a / math.sqrt(2))


def _mean(a: Array) -> Array:
    """E[elu(at)] = E[e^{at}; t < 0] − ½ + a/√(2π), by its power series where that cancels: relative accuracy for any a."""
    xp = namespace(a)
    x = xp.minimum(a / math.sqrt(2), 0.5)
    series = xp.zeros_like(a)
    for n in range(24, 1, -1):
        series = (series + (-1) ** n / math.gamma(n / 2 + 1)) * x
    series = series * x  # Σ_{n=2} (−x)ⁿ/Γ(n/2 + 1)
    direct = special(a).erfcx(a / math.sqrt(2)) - 1.0 + a * math.sqrt(2 / math.pi)
    return 0.5 * xp.where(a < 0.5 * math.sqrt(2), series, direct)


def _integral(a: Array, b: Array, c: Array, start: Array, weigh: Callable[[Array, Array], Array]) -> Array:
    """∫ g(ρ)·weigh(e^X − 1, X)dρ for ρ from sin(start) to c."""
    xp, erfcx = namespace(c), special(c).erfcx
    nodes, crowded = next(((n, how) for limit, n, how in RULES if largest(a, b) <= limit), LAST_RULE)
    end, ab = xp.arcsin(c), a * b
    length = end - start
    total = xp.zeros(np.broadcast_shapes(ab.shape, c.shape), dtype=xp.float64)
    scaled_a, scaled_b = a / math.sqrt(2), b / math.sqrt(2)
    points, weights = _rule(nodes, crowded)
    for point, remaining, weight in zip(points.tolist(), points[::-1].tolist(), weights.tolist(), strict=True):
        theta = start + length * point
        r = xp.cos(theta)
        # sin(end) − sin(θ) by the product formula: exact to rounding where θ is near the end
        x = 2 * ab * xp.cos(0.5 * (end + theta)) * xp.sin((0.5 * remaining) * length)
        # g(ρ)dρ = g(sin θ)·r dθ, times 2π
        layers = scaled_a * erfcx(scaled_a * r) + scaled_b * erfcx(scaled_b * r)
        total += weight * (1.0 - math.sqrt(math.pi) * r * layers) * weigh(xp.expm1(x), x)
    return total * (length / (2 * math.pi))


@register("activation")
@dataclass(frozen=True)
class ELU(ActivationFunction):
    """σ(t) = t for t > 0, e^t − 1 below.

    Notes
    -----
    The formulas of the duals stand at the top of the module. Their error is at most 1e-12 normwise for a, b <= 1e4
    (measured against 1 200 nodes), and they are finite beyond. An entry takes 20 nodes of two erfcx where a, b <= 1.5, 32 up to 4,
    128 up to 300 and 256 beyond.

    References
    ----------
    Tsuchida et al. 2021 has the closed form that the tests compare with; MATH.md §2.
    """

    name: ClassVar[str] = "elu"

    def __call__(self, t: Array) -> Array:
        """t for t > 0, e^t − 1 below."""
        xp = namespace(t)
        return xp.where(t > 0, t, xp.expm1(xp.minimum(t, 0)))

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        lower, ab = _lower_exponential, a * b
        small = ab <= 1.0
        from_zero = xp.where(small, ab * c, 0.0)
        zero = _mean(a) * _mean(b) + from_zero * ((0.5 + lower(a)) * (0.5 + lower(b)))
        zero = zero + lower(a) * lower(b) * (xp.expm1(from_zero) - from_zero)
        sum_ab = lower(a + b)
        one = 0.5 * ab * c + (sum_ab - (lower(a) + lower(b)) + 0.5) + sum_ab * xp.expm1(-ab * (1.0 - c))
        start = xp.where(small, 0.0, math.pi / 2)
        return xp.where(small, zero, one) + _integral(a, b, c, start, lambda e, x: e - x)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        lower, ab = _lower_exponential, a * b
        small = ab <= 1.0
        zero = (0.5 + lower(a)) * (0.5 + lower(b)) + lower(a) * lower(b) * xp.expm1(xp.where(small, ab * c, 0.0))
        one = 0.5 + lower(a + b) * xp.exp(-ab * (1.0 - c))
        start = xp.where(small, 0.0, math.pi / 2)
        return xp.where(small, zero, one) + _integral(a, b, c, start, lambda e, x: e)
