"""What the tests of activations share: every activation with the derivative that it is tested against, and two references.

`polar_expectation` is quadrature with nothing in common with the package's; `TWINS` are the formulas of MATH.md §2 in 60 digits.
"""

import math
from itertools import pairwise

import mpmath
import numpy as np
from numpy.polynomial import hermite_e
from scipy.special import erf, expit, ndtr

mpmath.mp.dps = 60


def _density(t):
    return np.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _hermite(q):
    return hermite_e.HermiteE.basis(q)


def _step(t):
    return (t > 0).astype(float)


EXAMPLES = [
    # name, parameters, σ, σ'
    ("relu", {}, lambda t: np.maximum(t, 0), _step),
    (
        "abrelu",
        {"A": 0.5, "B": 1.5},
        lambda t: np.where(t < 0, -0.5 * t, 1.5 * t),
        lambda t: np.where(t < 0, -0.5, 1.5),
    ),
    ("abrelu", {"A": 2, "B": -1}, lambda t: np.where(t < 0, -2 * t, -t), lambda t: np.where(t < 0, -2.0, -1.0)),
    ("leaky_relu", {}, lambda t: np.where(t < 0, 0.01 * t, t), lambda t: np.where(t < 0, 0.01, 1)),
    ("leaky_relu", {"slope": 0.3}, lambda t: np.where(t < 0, 0.3 * t, t), lambda t: np.where(t < 0, 0.3, 1)),
    ("abs", {}, np.abs, np.sign),
    ("identity", {}, lambda t: t, np.ones_like),
    ("step", {}, _step, np.zeros_like),
    ("sign", {}, np.sign, np.zeros_like),
    ("rectified_monomial", {"q": 0}, _step, np.zeros_like),
    ("rectified_monomial", {"q": 1}, lambda t: np.maximum(t, 0), _step),
    ("rectified_monomial", {}, lambda t: np.maximum(t, 0) ** 2, lambda t: 2 * np.maximum(t, 0)),
    ("rectified_monomial", {"q": 7}, lambda t: np.maximum(t, 0) ** 7, lambda t: 7 * np.maximum(t, 0) ** 6),
    ("erf", {}, erf, lambda t: 2 / math.sqrt(math.pi) * np.exp(-t * t)),
    ("exp", {"A": 0.7}, lambda t: np.exp(0.7 * t), lambda t: 0.7 * np.exp(0.7 * t)),
    ("sin", {}, np.sin, np.cos),
    ("sin", {"A": 1.3, "B": 0.4}, lambda t: np.sin(1.3 * t + 0.4), lambda t: 1.3 * np.cos(1.3 * t + 0.4)),
    ("cos", {}, np.cos, lambda t: -np.sin(t)),
    ("cos", {"A": -0.8, "B": 2.0}, lambda t: np.cos(-0.8 * t + 2), lambda t: 0.8 * np.sin(-0.8 * t + 2)),
    (
        "rbf",
        {"A": 0.9},
        lambda t: math.sqrt(2) * np.sin(math.sqrt(2) * 0.9 * t + math.pi / 4),
        lambda t: 1.8 * np.cos(math.sqrt(2) * 0.9 * t + math.pi / 4),
    ),
    ("gaussian", {"A": 0.6}, lambda t: np.exp(-0.6 * t * t), lambda t: -1.2 * t * np.exp(-0.6 * t * t)),
    ("gabor", {}, lambda t: np.exp(-t * t) * np.sin(t), lambda t: np.exp(-t * t) * (np.cos(t) - 2 * t * np.sin(t))),
    ("gelu", {}, lambda t: t * ndtr(t), lambda t: ndtr(t) + t * _density(t)),
    ("elu", {}, lambda t: np.where(t > 0, t, np.expm1(np.minimum(t, 0))), lambda t: np.exp(np.minimum(t, 0))),
    ("hermite", {"q": 0}, np.ones_like, np.zeros_like),
    ("hermite", {}, lambda t: t * t - 1, lambda t: 2 * t),
    ("hermite", {"q": 9}, _hermite(9), _hermite(9).deriv()),
    ("monomial", {}, lambda t: t * t, lambda t: 2 * t),
    ("monomial", {"q": 5}, lambda t: t**5, lambda t: 5 * t**4),
    ("monomial", {"q": 20}, lambda t: t**20, lambda t: 20 * t**19),
    ("polynomial", {"coefficients": (2.5,)}, lambda t: 2.5 + 0 * t, np.zeros_like),
    (
        "polynomial",
        {"coefficients": [1, -2, 0, 0.5, 0.25]},
        np.polynomial.Polynomial([1, -2, 0, 0.5, 0.25]),
        np.polynomial.Polynomial([-2, 0, 1.5, 1]),
    ),
    ("tanh", {}, np.tanh, lambda t: 4 * expit(2 * t) * expit(-2 * t)),
    ("sigmoid", {}, expit, lambda t: expit(t) * expit(-t)),
    ("silu", {}, lambda t: t * expit(t), lambda t: expit(t) + t * expit(t) * expit(-t)),
    ("softplus", {}, lambda t: np.logaddexp(0, t), expit),
]
IDS = [f"{name}-{','.join(f'{k}={v}' for k, v in parameters.items())}" for name, parameters, _, _ in EXAMPLES]
WITHOUT_FUNCTION = [("normalized_gaussian", {}), ("normalized_gaussian", {"scale": 2.5})]
ALL = [(name, parameters) for name, parameters, _, _ in EXAMPLES] + WITHOUT_FUNCTION
ALL_IDS = [*IDS, *(f"{name}-{parameters}" for name, parameters in WITHOUT_FUNCTION)]
NOT_WEAKLY_DIFFERENTIABLE = {"step", "sign"}


def polar_expectation(f, g, a, b, c, angles=64, panels=20, reach=26.0):
    """E[f(u)g(v)], (u, v) ~ N(0, [[a², abc], [abc, b²]]), as ∫∫ f(ar cos θ)g(br cos(θ − arccos c)) re^{−r²/2} dr dθ/2π.

    Gauss–Legendre, in θ crowded towards the angles where u or v change sign (kinks and steep parts stand there), in r on
    `panels` panels of [0, reach], finer near 0.
    """
    theta = math.acos(c)
    kinks = sorted(
        {t % (2 * math.pi) for t in (0.5 * math.pi, 1.5 * math.pi, theta + 0.5 * math.pi, theta - 0.5 * math.pi)}
    )
    x, w = np.polynomial.legendre.leggauss(angles)
    x, w = (x + 1) / 2, w / 2
    x, w = x * x * (3 - 2 * x), w * 6 * x * (1 - x)
    z, v = np.polynomial.legendre.leggauss(16)
    edges = reach * np.linspace(0, 1, panels + 1) ** 1.5
    r = (edges[:-1, None] + (edges[1:, None] - edges[:-1, None]) * (z + 1) / 2).ravel()
    radial = (np.diff(edges)[:, None] / 2 * v).ravel() * r * np.exp(-r * r / 2)
    total = 0.0
    for low, high in pairwise([*kinks, kinks[0] + 2 * math.pi]):
        angle = low + (high - low) * x
        left, right = f(a * r * np.cos(angle)[:, None]), g(b * r * np.cos(angle - theta)[:, None])
        total += (high - low) * float(w @ (left * right) @ radial)
    return total / (2 * math.pi)


def _phi2(h, k, c):
    """Φ₂(h, k; c): Φ(h)Φ(k) + ∫ from 0 to arcsin c of exp(−(h² − 2hk sin θ + k²)/(2cos²θ)) dθ/2π."""

    def slope(theta):
        return mpmath.exp(-(h * h - 2 * h * k * mpmath.sin(theta) + k * k) / (2 * mpmath.cos(theta) ** 2))

    return mpmath.ncdf(h) * mpmath.ncdf(k) + mpmath.quad(slope, [0, mpmath.asin(c)]) / (2 * mpmath.pi)


def _kappas(c):
    r, left = mpmath.sqrt(1 - c * c), mpmath.pi - mpmath.acos(c)
    return left / mpmath.pi, (r + c * left) / mpmath.pi


def _erf(a, b, c):
    p, q, s = a * a, b * b, a * b * c
    m = (1 + 2 * p) * (1 + 2 * q)
    return 2 / mpmath.pi * mpmath.asin(2 * s / mpmath.sqrt(m)), 4 / mpmath.pi / mpmath.sqrt(m - 4 * s * s)


def _sin(a, b, c):
    p, q, s = a * a, b * b, a * b * c
    high = mpmath.exp(s - (p + q) / 2) / 2
    low = mpmath.exp(-s - (p + q) / 2) / 2
    return high - low, high + low


def _rbf(a, b, c):
    k = mpmath.exp(-(a * a + b * b - 2 * a * b * c))
    return k, 2 * k


def _gaussian(a, b, c):
    p, q, s = a * a, b * b, a * b * c
    d = (1 + 2 * p) * (1 + 2 * q) - 4 * s * s
    return d ** mpmath.mpf(-0.5), 4 * s * d ** mpmath.mpf(-1.5)


def _gabor(a, b, c):
    p, q, s = a * a, b * b, a * b * c
    d = (1 + 2 * p) * (1 + 2 * q) - 4 * s * s
    front = mpmath.exp(-mpmath.mpf(0.5) + (1 + p + q) / (2 * d)) / mpmath.sqrt(d)
    even = mpmath.cosh(s / d) * (1 / d + 8 * s * s / d**2)
    return front * mpmath.sinh(s / d), front * (even + 4 * s * mpmath.sinh(s / d) * (1 / d + (1 + p + q) / d**2))


def _gelu(a, b, c):
    p, q, s = a * a, b * b, a * b * c
    m = (1 + p) * (1 + q)
    d, w = m - s * s, (1 - p * q) / m
    probit = mpmath.mpf(1) / 4 + mpmath.asin(s / mpmath.sqrt(m)) / (2 * mpmath.pi)
    rest = p * q + s * s * w
    front = 1 / (2 * mpmath.pi * mpmath.sqrt(d))
    return s * probit + rest * front, probit + s * front * (1 + 2 * w + rest / d)


def _elu(a, b, c):
    kappa0, kappa1 = _kappas(c)
    p, q, s, r = a * a, b * b, a * b * c, mpmath.sqrt(1 - c * c)

    def cross(a, b):
        inner = s * _phi2(b * c, -b, -c) + a * mpmath.npdf(b * c) * mpmath.ncdf(-b * r) - a * c * mpmath.npdf(b) / 2
        return mpmath.exp(b * b / 2) * inner - a * (1 - c) / mpmath.sqrt(8 * mpmath.pi)

    both = mpmath.exp((p + q) / 2 + s) * _phi2(-a - b * c, -b - a * c, c)
    k = a * b * kappa1 / 2 + cross(a, b) + cross(b, a) + both + kappa0 / 2
    k -= mpmath.exp(p / 2) * _phi2(-a, -a * c, c) + mpmath.exp(q / 2) * _phi2(-b, -b * c, c)
    slope = kappa0 / 2 + mpmath.exp(q / 2) * _phi2(b * c, -b, -c) + mpmath.exp(p / 2) * _phi2(a * c, -a, -c) + both
    return k, slope


TWINS = {"erf": _erf, "sin": _sin, "rbf": _rbf, "gaussian": _gaussian, "gabor": _gabor, "gelu": _gelu, "elu": _elu}
"""name: (a, b, c) → (k, k') as MATH.md §2 writes them, with default parameters, on mpmath numbers."""
