"""Activations with one kink or jump at 0, whose duals are made of the arc-cosine kernels. MATH.md §2.

Duals of piecewise-linear activations are computed in the dtype of their arrays: κ₀ and κ₁ are good to 1e-5 in float32 except where
|c| > 0.999, where callers who need more pass float64 (MATH.md §1, rounding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ntkdask.activations.base import ActivationFunction, set_degree, set_number
from ntkdask.arrays import Array, namespace
from ntkdask.registry import register


def kappa0(cosine: Array) -> Array:
    """Arc-cosine kernel of order 0 for unit vectors, κ₀(c) = (π − arccos c)/π.

    Parameters
    ----------
    cosine : array of any shape, float32 or float64
        Cosines; rounding may push them past ±1, so they are clipped.

    Returns
    -------
    array of the same shape and dtype
        Normalised as E[2·step(u)·step(v)], so κ₀(1) = 1 and κ₀(0) = 1/2.

    References
    ----------
    Cho & Saul 2009, eq. 3; Zandieh et al. 2021, eq. 2.

    Examples
    --------
    >>> import numpy as np
    >>> float(kappa0(np.array(0.0)))
    0.5
    """
    xp = namespace(cosine)
    c = xp.clip(cosine, -1.0, 1.0)
    return 1.0 - xp.arccos(c) / math.pi


def kappa1(cosine: Array) -> Array:
    """Arc-cosine kernel of order 1 for unit vectors, κ₁(c) = (√(1 − c²) + c(π − arccos c))/π.

    Parameters
    ----------
    cosine : array of any shape, float32 or float64
        Cosines; rounding may push them past ±1, so they are clipped.

    Returns
    -------
    array of the same shape and dtype
        Normalised as E[2·relu(u)·relu(v)], so κ₁(1) = 1 and κ₁(0) = 1/π.

    References
    ----------
    Cho & Saul 2009, eq. 6; Zandieh et al. 2021, eq. 2.

    Examples
    --------
    >>> import numpy as np
    >>> float(kappa1(np.array(1.0)))
    1.0
    """
    xp = namespace(cosine)
    c = xp.clip(cosine, -1.0, 1.0)
    # (1 − c)(1 + c), not 1 − c²: no cancellation near |c| = 1
    return (xp.sqrt((1.0 - c) * (1.0 + c)) + c * (math.pi - xp.arccos(c))) / math.pi


@dataclass(frozen=True)
class PiecewiseLinear(ActivationFunction):
    """σ(t) = −A·min(t, 0) + B·max(t, 0) with (A, B) = `slopes`; the base class of all activations of this form.

    k = ab[(A+B)²/2·κ₁(c) − AB·c], k' = (A+B)²/2·κ₀(c) − AB.

    References
    ----------
    Cho & Saul 2009; Tsuchida et al. 2018.
    """

    homogeneous: ClassVar[bool] = True
    _any_precision: ClassVar[bool] = True

    @property
    def slopes(self) -> tuple[float, float]:
        """(A, B)."""
        raise NotImplementedError

    def __call__(self, t: Array) -> Array:
        """−A·min(t, 0) + B·max(t, 0)."""
        xp, (low, high) = namespace(t), self.slopes
        return high * xp.maximum(t, 0) - low * xp.minimum(t, 0)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        low, high = self.slopes
        return a * b * ((low + high) ** 2 / 2 * kappa1(c) - low * high * c)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        low, high = self.slopes
        return (low + high) ** 2 / 2 * kappa0(c) - low * high


@register("activation")
@dataclass(frozen=True)
class ReLU(PiecewiseLinear):
    """σ(t) = max(t, 0): k = ab·κ₁(c)/2, k' = κ₀(c)/2.

    References
    ----------
    Cho & Saul 2009.
    """

    name: ClassVar[str] = "relu"

    @property
    def slopes(self) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0

    def __call__(self, t: Array) -> Array:
        """max(t, 0)."""
        return namespace(t).maximum(t, 0)


@register("activation")
@dataclass(frozen=True)
class ABReLU(PiecewiseLinear):
    """σ(t) = −A·min(t, 0) + B·max(t, 0): k = ab[(A+B)²/2·κ₁(c) − AB·c], k' = (A+B)²/2·κ₀(c) − AB. The defaults are ReLU.

    Parameters
    ----------
    A : float
        Minus the slope for t < 0; any finite number.
    B : float
        The slope for t > 0; any finite number.

    References
    ----------
    Tsuchida et al. 2018.
    """

    A: float = 0.0
    B: float = 1.0
    name: ClassVar[str] = "abrelu"

    def __post_init__(self) -> None:
        set_number(self, "A")
        set_number(self, "B")

    @property
    def slopes(self) -> tuple[float, float]:
        """(A, B)."""
        return self.A, self.B


@register("activation")
@dataclass(frozen=True)
class LeakyReLU(PiecewiseLinear):
    """σ(t) = t for t >= 0, slope·t for t < 0: `ABReLU` with A = −slope, B = 1.

    Parameters
    ----------
    slope : float
        The slope for t < 0; any finite number.

    References
    ----------
    Maas et al. 2013.
    """

    slope: float = 0.01
    name: ClassVar[str] = "leaky_relu"

    def __post_init__(self) -> None:
        set_number(self, "slope")

    @property
    def slopes(self) -> tuple[float, float]:
        """(−slope, 1)."""
        return -self.slope, 1.0


@register("activation")
@dataclass(frozen=True)
class Abs(PiecewiseLinear):
    """σ(t) = |t|: k = ab(2κ₁(c) − c), k' = 2κ₀(c) − 1.

    References
    ----------
    Louart et al. 2018.
    """

    name: ClassVar[str] = "abs"

    @property
    def slopes(self) -> tuple[float, float]:
        """(1, 1)."""
        return 1.0, 1.0

    def __call__(self, t: Array) -> Array:
        """|t|."""
        return namespace(t).abs(t)


@register("activation")
@dataclass(frozen=True)
class Identity(PiecewiseLinear):
    """σ(t) = t: k = abc, k' = 1."""

    name: ClassVar[str] = "identity"

    @property
    def slopes(self) -> tuple[float, float]:
        """(−1, 1)."""
        return -1.0, 1.0

    def __call__(self, t: Array) -> Array:
        """t itself."""
        return t

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return a * b * c

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.ones_like(c)


@register("activation")
@dataclass(frozen=True)
class Step(ActivationFunction):
    """σ(t) = 1 for t >= 0, else 0: k = κ₀(c)/2, k' = 0.

    Notes
    -----
    k' is that of the almost everywhere derivative, as in neural-tangents. k does not depend on a and b, not even in the limit where
    they are 0.

    References
    ----------
    Cho & Saul 2009, order 0.
    """

    name: ClassVar[str] = "step"

    def __call__(self, t: Array) -> Array:
        """1 for t >= 0, else 0."""
        return (t >= 0).astype(t.dtype)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return 0.5 * kappa0(c)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.zeros_like(c)


@register("activation")
@dataclass(frozen=True)
class Sign(ActivationFunction):
    """σ(t) = sign(t), 0 at t = 0: k = (2/π)·arcsin c, k' = 0, that of the almost everywhere derivative, as in neural-tangents."""

    name: ClassVar[str] = "sign"

    def __call__(self, t: Array) -> Array:
        """sign(t)."""
        return namespace(t).sign(t)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.arcsin(c) / (math.pi / 2)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.zeros_like(c)


@register("activation")
@dataclass(frozen=True)
class RectifiedMonomial(ActivationFunction):
    """σ(t) = t^q for t >= 0, else 0; q = 0 is step, q = 1 is relu.

    k = (ab)^q J_q(c)/2π, k' = q²(ab)^{q−1} J_{q−1}(c)/2π (0 for q = 0), J_n as in `angular_moment`.

    Parameters
    ----------
    q : int
        The power, 0 <= q <= 150.

    References
    ----------
    Cho & Saul 2009, eqs. 4-6.
    """

    q: int = 2
    name: ClassVar[str] = "rectified_monomial"

    def __post_init__(self) -> None:
        set_degree(self, "q")

    def __call__(self, t: Array) -> Array:
        """t^q for t >= 0, else 0."""
        return namespace(t).maximum(t, 0) ** self.q * (t >= 0)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return (a * b) ** self.q * (angular_moment(self.q, c) / (2 * math.pi))

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        if self.q == 0:
            return xp.zeros_like(c)
        return self.q**2 * (a * b) ** (self.q - 1) * (angular_moment(self.q - 1, c) / (2 * math.pi))


def angular_moment(order: int, cosine: Array) -> Array:
    """J_n(c) = 2π·E[uⁿ₊vⁿ₊] for standard normal u, v of correlation c, so J_n(1) = π·(2n − 1)‼.

    J₀ = π − arccos c, J₁ = r + c·J₀, J_n = (2n − 1)c·J_{n−1} + (n − 1)²r²·J_{n−2}, r² = (1 − c)(1 + c).

    Parameters
    ----------
    order : int
        n >= 0.
    cosine : array of any shape, float32 or float64
        c, within [−1, 1].

    Returns
    -------
    array of the same shape and dtype

    Notes
    -----
    The errors of the recurrence grow no faster than J_n(1), so it is accurate normwise.

    References
    ----------
    Cho & Saul 2009, eqs. 4-6; the recurrence: MATH.md §2.
    """
    xp = namespace(cosine)
    square = (1.0 - cosine) * (1.0 + cosine)
    before, now = xp.sqrt(square), math.pi - xp.arccos(cosine)
    for n in range(1, order + 1):
        # J₁ = c·J₀ + r: r stands where (n − 1)²r²·J_{n−2} stands in later steps
        rest = before if n == 1 else (n - 1) ** 2 * square * before
        before, now = now, (2 * n - 1) * cosine * now + rest
    return now
