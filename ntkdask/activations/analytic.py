"""Smooth activations whose duals are elementary functions. MATH.md §2; Han et al. 2022, Table 1.

Throughout, p = a², q = b², s = abc, r² = 1 − c². The formulas are written so that nothing cancels: 1 − c² as (1 − c)(1 + c), p + q
− 2s as (a − b)² + 2ab(1 − c), arcsines as arctan2 of two exact parts. They hold for any a, b >= 0, including 0 and large values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ntkdask.activations.base import ActivationFunction, set_number
from ntkdask.activations.probit import gelu_dual, gelu_dual_derivative, one_minus_square
from ntkdask.arrays import Array, namespace, special
from ntkdask.errors import InputError
from ntkdask.registry import register


def _half_distance(a: Array, b: Array, c: Array) -> Array:
    """(p + q)/2 − s."""
    return 0.5 * (a - b) ** 2 + a * b * (1.0 - c)


def _gaussian_determinant(a: Array, b: Array, c: Array, factor: float) -> Array:
    """(1 + 2Ap)(1 + 2Aq) − 4A²s² for A = factor."""
    p, q = 2 * factor * a * a, 2 * factor * b * b
    return 1.0 + (p + q) + p * q * one_minus_square(c)


@register("activation")
@dataclass(frozen=True)
class Erf(ActivationFunction):
    """σ(t) = erf(t).

    k = (2/π)·arcsin(2s/√((1+2p)(1+2q))), k' = (4/π)/√((1+2p)(1+2q) − 4s²), with p = a², q = b², s = abc.

    References
    ----------
    Williams 1996, eq. 11.
    """

    name: ClassVar[str] = "erf"

    def __call__(self, t: Array) -> Array:
        """erf(t)."""
        return special(t).erf(t)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.arctan2(2 * (a * b * c), xp.sqrt(_gaussian_determinant(a, b, c, 1.0))) / (math.pi / 2)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return 4 / math.pi / xp.sqrt(_gaussian_determinant(a, b, c, 1.0))


@register("activation")
@dataclass(frozen=True)
class Exp(ActivationFunction):
    """σ(t) = exp(At).

    k = exp(A²(p+q)/2 + A²s), k' = A²k, with p = a², q = b², s = abc; infinite where they overflow float64.

    Parameters
    ----------
    A : float
        The rate; any finite number.

    References
    ----------
    Mairal et al. 2014.
    """

    A: float = 1.0
    name: ClassVar[str] = "exp"

    def __post_init__(self) -> None:
        set_number(self, "A")

    def __call__(self, t: Array) -> Array:
        """exp(At)."""
        return namespace(t).exp(self.A * t)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.exp(self.A**2 * (0.5 * (a * a + b * b) + a * b * c))

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return self.A**2 * self._dual(xp, a, b, c)


def _sinusoid_parts(xp: ModuleType, factor: float, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """(e^{−A²(p+q)/2}·sinh(A²s), e^{−A²(s+(p+q)/2)}) for A = factor, the first with the relative accuracy of s."""
    square = factor**2
    magnitude = xp.abs(c)
    odd = -0.5 * xp.exp(-square * _half_distance(a, b, magnitude)) * xp.expm1(-2 * square * (a * b * magnitude))
    return xp.copysign(odd, c), xp.exp(-square * _half_distance(a, b, -c))


@register("activation")
@dataclass(frozen=True)
class Sin(ActivationFunction):
    """σ(t) = sin(At + B).

    k = S + sin²(B)·E, k' = A²(S + cos²(B)·E), where S = e^{−A²(p+q)/2}·sinh(A²s), E = e^{−A²(s+(p+q)/2)}, p = a², q = b², s = abc.

    Parameters
    ----------
    A : float
        The frequency; any finite number.
    B : float
        The phase in radians; any finite number.

    References
    ----------
    Louart et al. 2018; Han et al. 2022, Table 1.
    """

    A: float = 1.0
    B: float = 0.0
    name: ClassVar[str] = "sin"

    def __post_init__(self) -> None:
        set_number(self, "A")
        set_number(self, "B")

    def __call__(self, t: Array) -> Array:
        """sin(At + B)."""
        return namespace(t).sin(self.A * t + self.B)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        odd, even = _sinusoid_parts(xp, self.A, a, b, c)
        return odd + math.sin(self.B) ** 2 * even

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        odd, even = _sinusoid_parts(xp, self.A, a, b, c)
        return self.A**2 * (odd + math.cos(self.B) ** 2 * even)


@register("activation")
@dataclass(frozen=True)
class Cos(ActivationFunction):
    """σ(t) = cos(At + B) = sin(At + B + π/2).

    k = S + cos²(B)·E, k' = A²(S + sin²(B)·E), S and E as in `Sin`.

    Parameters
    ----------
    A : float
        The frequency; any finite number.
    B : float
        The phase in radians; any finite number.

    References
    ----------
    Louart et al. 2018; Han et al. 2022, Table 1.
    """

    A: float = 1.0
    B: float = 0.0
    name: ClassVar[str] = "cos"

    def __post_init__(self) -> None:
        set_number(self, "A")
        set_number(self, "B")

    def __call__(self, t: Array) -> Array:
        """cos(At + B)."""
        return namespace(t).cos(self.A * t + self.B)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        odd, even = _sinusoid_parts(xp, self.A, a, b, c)
        return odd + math.cos(self.B) ** 2 * even

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        odd, even = _sinusoid_parts(xp, self.A, a, b, c)
        return self.A**2 * (odd + math.sin(self.B) ** 2 * even)


@register("activation")
@dataclass(frozen=True)
class RBFActivation(ActivationFunction):
    """σ(t) = √2·sin(√2·At + π/4), whose dual is the Gaussian kernel.

    k = exp(−A²(p + q − 2s)), k' = 2A²k, with p = a², q = b², s = abc.

    Parameters
    ----------
    A : float
        The frequency; any finite number. The kernel is exp(−A²‖x − y‖²).

    Notes
    -----
    Its name in `get` is "rbf"; the class is not called RBF, because that is the kernel `kernels.RBF`.

    References
    ----------
    Rahimi & Recht 2007.
    """

    A: float = 1.0
    name: ClassVar[str] = "rbf"

    def __post_init__(self) -> None:
        set_number(self, "A")

    def __call__(self, t: Array) -> Array:
        """√2·sin(√2·At + π/4)."""
        return math.sqrt(2) * namespace(t).sin(math.sqrt(2) * self.A * t + math.pi / 4)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return xp.exp(-2 * self.A**2 * _half_distance(a, b, c))

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return 2 * self.A**2 * self._dual(xp, a, b, c)


@register("activation")
@dataclass(frozen=True)
class Gaussian(ActivationFunction):
    """σ(t) = exp(−At²).

    k = D^{−1/2}, k' = 4A²s·D^{−3/2}, D = (1+2Ap)(1+2Aq) − 4A²s², with p = a², q = b², s = abc.

    Parameters
    ----------
    A : float
        The inverse width; positive and finite.

    References
    ----------
    Williams 1996.
    """

    A: float = 1.0
    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        set_number(self, "A", positive=True)

    def __call__(self, t: Array) -> Array:
        """exp(−At²)."""
        return namespace(t).exp(-self.A * (t * t))

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return 1.0 / xp.sqrt(_gaussian_determinant(a, b, c, self.A))

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        determinant = _gaussian_determinant(a, b, c, self.A)
        return 4 * self.A**2 * (a * b * c / determinant) / xp.sqrt(determinant)


@register("activation")
@dataclass(frozen=True)
class Gabor(ActivationFunction):
    """σ(t) = exp(−t²)·sin(t).

    k = D^{−1/2}e^g·sinh(s/D), k' = D^{−1/2}e^g[cosh(s/D)(1/D + 8s²/D²) + 4s·sinh(s/D)(1/D + (1+p+q)/D²)], where
    D = (1+2p)(1+2q) − 4s², g = (1+p+q)/(2D) − ½, p = a², q = b², s = abc.

    Notes
    -----
    |s|/D <= 1/4, so nothing overflows.

    References
    ----------
    Han et al. 2022, Appendix F; MATH.md §2.
    """

    name: ClassVar[str] = "gabor"

    def __call__(self, t: Array) -> Array:
        """exp(−t²)·sin(t)."""
        xp = namespace(t)
        return xp.exp(-(t * t)) * xp.sin(t)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        inverse = 1.0 / _gaussian_determinant(a, b, c, 1.0)
        envelope = xp.sqrt(inverse) * xp.exp(0.5 * (1.0 + (a * a + b * b)) * inverse - 0.5)
        return envelope * xp.sinh(a * b * c * inverse)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        inverse = 1.0 / _gaussian_determinant(a, b, c, 1.0)
        spread = (1.0 + (a * a + b * b)) * inverse
        ratio = a * b * c * inverse
        envelope = xp.sqrt(inverse) * xp.exp(0.5 * spread - 0.5)
        even = xp.cosh(ratio) * (inverse + 8 * ratio * ratio)
        return envelope * (even + 4 * ratio * xp.sinh(ratio) * (1.0 + spread))


@register("activation")
@dataclass(frozen=True)
class GELU(ActivationFunction):
    """σ(t) = t·Φ(t) = (t/2)(1 + erf(t/√2)), Φ the standard normal CDF; the duals are `probit.gelu_dual` and `gelu_dual_derivative`.

    References
    ----------
    Tsuchida et al. 2021; Han et al. 2022.
    """

    name: ClassVar[str] = "gelu"

    def __call__(self, t: Array) -> Array:
        """t·Φ(t)."""
        return t * special(t).ndtr(t)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return gelu_dual(a, b, c)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return gelu_dual_derivative(a, b, c)


@register("activation")
@dataclass(frozen=True)
class NormalizedGaussian(ActivationFunction):
    """The activation whose dual is k = ab·exp(scale·(c − 1)), k' = scale·exp(scale·(c − 1)); no σ is known.

    Parameters
    ----------
    scale : float
        Positive and finite.

    Raises
    ------
    InputError
        When it is called: exact kernels and features made from the dual need no σ, finite networks and quadrature do.

    References
    ----------
    Shankar et al. 2020; Han et al. 2022, eq. 13.
    """

    scale: float = 1.0
    name: ClassVar[str] = "normalized_gaussian"
    homogeneous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_number(self, "scale", positive=True)

    def __call__(self, t: Array) -> Array:
        """Raise InputError: no σ is known."""
        raise InputError(
            "activation 'normalized_gaussian' was asked for σ(t), but only its dual activation is known. Use it in exact "
            "kernels and in features made from the dual; a finite network or quadrature needs another activation."
        )

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return a * b * xp.exp(self.scale * (c - 1.0))

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return self.scale * xp.exp(self.scale * (c - 1.0))
