"""Gaussian expectations of products of Φ(t), t·Φ(t), φ(t), of which the duals of GELU and the logistic family are made.

Φ and φ are the normal CDF and density; (u, v) ~ N(0, [[a², abc], [abc, b²]]), p = a², q = b², s = abc, h = 1 + p + q,
D = (1+p)(1+q) − s² = h + pq(1 − c²). All functions take float64 arrays that broadcast, c within [−1, 1]. Every form is symmetric in a
and b to the last bit and free of cancellation, normwise, for any a, b >= 0. Formulas: MATH.md §2 (GELU), rearranged.
"""

from __future__ import annotations

import math

from ntkdask.arrays import Array, namespace


def one_minus_square(c: Array) -> Array:
    """1 − c² without cancellation."""
    return (1.0 - c) * (1.0 + c)


def determinant(a: Array, b: Array, c: Array) -> Array:
    """D = (1 + a²)(1 + b²) − (abc)²."""
    p, q = a * a, b * b
    return 1.0 + (p + q) + p * q * one_minus_square(c)


def probit_dual(a: Array, b: Array, c: Array) -> Array:
    """E[Φ(u)Φ(v)] = ¼ + arctan(s/√D)/2π."""
    xp = namespace(c)
    return 0.25 + xp.arctan2(a * b * c, xp.sqrt(determinant(a, b, c))) / (2 * math.pi)


def centred_probit_dual(a: Array, b: Array, c: Array) -> Array:
    """E[(2Φ(u) − 1)(2Φ(v) − 1)] = (2/π)·arctan(s/√D)."""
    xp = namespace(c)
    return xp.arctan2(a * b * c, xp.sqrt(determinant(a, b, c))) / (math.pi / 2)


def density_dual(a: Array, b: Array, c: Array) -> Array:
    """E[φ(u)φ(v)] = 1/(2π√D)."""
    return 1.0 / (2 * math.pi * namespace(c).sqrt(determinant(a, b, c)))


def gelu_dual(a: Array, b: Array, c: Array) -> Array:
    """E[uΦ(u)vΦ(v)] = s·P + pq[(1 − c²) + c²(1 + h)/M]/(2π√D), P = E[Φ(u)Φ(v)], M = (1+p)(1+q)."""
    xp = namespace(c)
    p, q = a * a, b * b
    s, square = a * b * c, one_minus_square(c)
    root = xp.sqrt(1.0 + (p + q) + p * q * square)
    probit = 0.25 + xp.arctan2(s, root) / (2 * math.pi)
    rest = square + c * c * ((2.0 + (p + q)) / ((1.0 + p) * (1.0 + q)))
    return s * probit + p * q * rest / (2 * math.pi * root)


def gelu_dual_derivative(a: Array, b: Array, c: Array) -> Array:
    """E[g'(u)g'(v)] for g(t) = tΦ(t): P + s/(2π√D)·[2(1+h)/M + (c² − h(1 − c²))/D − h(1+h)c²/(MD)]."""
    xp = namespace(c)
    p, q = a * a, b * b
    s, square, c2 = a * b * c, one_minus_square(c), c * c
    h, m = 1.0 + (p + q), (1.0 + p) * (1.0 + q)
    d = h + p * q * square
    root = xp.sqrt(d)
    bracket = 2 * (1.0 + h) / m + (c2 - h * square) / d - (h / d) * ((1.0 + h) / m) * c2
    return 0.25 + xp.arctan2(s, root) / (2 * math.pi) + s / (2 * math.pi * root) * bracket


def smooth_ramp_dual(a: Array, b: Array, c: Array) -> Array:
    """E[F(u)F(v)] for F(t) = tΦ(t) + φ(t), the integral of Φ; softplus is a mixture of such F.

    It is gelu_dual + [1 + p(1 + q(1 − c²))/(1+q) + q(1 + p(1 − c²))/(1+p)]/(2π√D), with the cross terms E[uΦ(u)φ(v)] from Stein's
    lemma.
    """
    p, q, square = a * a, b * b, one_minus_square(c)
    cross = p * (1.0 + q * square) / (1.0 + q) + q * (1.0 + p * square) / (1.0 + p)
    return gelu_dual(a, b, c) + (1.0 + cross) * density_dual(a, b, c)
