"""Polynomial activations: Hermite polynomials, monomials and any other, each with a finite closed dual. MATH.md §2.

Sums run degree by degree in place, so they take two arrays of c's shape, whatever the degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ntkdask.activations.base import MAX_DEGREE, ActivationFunction, set_degree
from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError
from ntkdask.registry import register


def _homogeneous_sum(coefficients: Sequence[float], w: Array, s: Array, degree: int) -> Array:
    """Σ_j C_j·w^j·s^(degree − 2j), j = 0 … ⌊degree/2⌋, by Horner's rule in s²."""
    xp = namespace(s)
    square, power = s * s, xp.ones_like(w * s)
    total = xp.full_like(power, coefficients[0])
    for coefficient in coefficients[1:]:
        power *= w
        total *= square
        total += coefficient * power
    return total * s if degree % 2 else total


def _falling(n: int) -> list[float]:
    """n!²/((2^j·j!)²·(n − 2j)!) for j = 0 … ⌊n/2⌋, exact integers rounded once."""
    n2 = math.factorial(n) ** 2
    return [float(n2 // ((2**j * math.factorial(j)) ** 2 * math.factorial(n - 2 * j))) for j in range(n // 2 + 1)]


@register("activation")
@dataclass(frozen=True)
class Hermite(ActivationFunction):
    """σ = h_q, the probabilists' Hermite polynomial, not normalised: E h_q(t)² = q!.

    k = Σ_j q!²/((2^j j!)²(q−2j)!)·((p−1)(q'−1))^j·s^{q−2j} with p = a², q' = b², s = abc; k' is q² times the k of degree q − 1.

    Parameters
    ----------
    q : int
        The degree, 0 <= q <= 150.

    References
    ----------
    Daniely et al. 2016 for a = b = 1; MATH.md §2 in general.
    """

    q: int = 2
    name: ClassVar[str] = "hermite"

    def __post_init__(self) -> None:
        set_degree(self, "q")

    def __call__(self, t: Array) -> Array:
        """h_q(t) by h_{n+1} = t·h_n − n·h_{n−1}."""
        xp = namespace(t)
        before, now = xp.zeros_like(t), xp.ones_like(t)
        for n in range(self.q):
            before, now = now, t * now - n * before
        return now

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        # (a − 1)(a + 1), not a² − 1: h_q has its zeros there
        w = ((a - 1.0) * (a + 1.0)) * ((b - 1.0) * (b + 1.0))
        return _homogeneous_sum(_falling(self.q), w, a * b * c, self.q)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return self.q**2 * Hermite(self.q - 1)._dual(xp, a, b, c) if self.q else xp.zeros_like(c)


@register("activation")
@dataclass(frozen=True)
class Monomial(ActivationFunction):
    """σ(t) = t^q; q = 1 is the identity.

    k = (ab)^q Σ_j q!²/((2^j j!)²(q−2j)!)·c^{q−2j}; k' is q² times the k of degree q − 1.

    Parameters
    ----------
    q : int
        The power, 0 <= q <= 150.

    References
    ----------
    Han et al. 2022, Table 1.
    """

    q: int = 2
    name: ClassVar[str] = "monomial"

    def __post_init__(self) -> None:
        set_degree(self, "q")

    def __call__(self, t: Array) -> Array:
        """t^q."""
        return t**self.q

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return (a * b) ** self.q * _homogeneous_sum(_falling(self.q), xp.ones_like(c), c, self.q)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return self.q**2 * Monomial(self.q - 1)._dual(xp, a, b, c) if self.q else xp.zeros_like(c)


def hermite_weights(coefficients: Sequence[float], a: Array) -> list[Array]:
    """Coefficients of σ(at) in h_ℓ/√ℓ!, ℓ = 0 … q: r_ℓ(a) = Σ_i a_{ℓ+2i}(ℓ+2i)!/(2^i i! √ℓ!)·a^{ℓ+2i}.

    Parameters
    ----------
    coefficients : sequence of q + 1 float
        a_0 … a_q of σ(t) = Σ a_j t^j.
    a : array of any shape, float64
        Standard deviations.

    Returns
    -------
    list of q + 1 arrays of a's shape
        r_0(a) … r_q(a).

    References
    ----------
    Han et al. 2022, Theorem 1, with the sum taken up to the top degree.
    """
    xp, degree = namespace(a), len(coefficients) - 1
    square, weights, power = a * a, [], xp.ones_like(a)
    for low in range(degree + 1):
        total = xp.zeros_like(a)
        for i in range((degree - low) // 2, -1, -1):
            n = low + 2 * i
            # (ℓ+2i)!/(2^i i! √ℓ!) as a product of an exact integer and √ℓ!: no overflow before the value itself does
            factor = float(math.factorial(n) // (2**i * math.factorial(i) * math.factorial(low)))
            total = total * square + coefficients[n] * (factor * math.sqrt(math.factorial(low)))
        weights.append(power * total)
        power = power * a
    return weights


def correlate(weights_a: Sequence[Array], weights_b: Sequence[Array], c: Array) -> Array:
    """Σ_ℓ r_ℓ(a)·r_ℓ(b)·c^ℓ by Horner's rule, in two arrays of the broadcast shape; symmetric in a and b to the last bit."""
    total = weights_a[-1] * weights_b[-1] + namespace(c).zeros_like(c)
    for left, right in zip(weights_a[-2::-1], weights_b[-2::-1], strict=True):
        total *= c
        total += left * right
    return total


@register("activation")
@dataclass(frozen=True)
class Polynomial(ActivationFunction):
    """σ(t) = Σ_j coefficients[j]·t^j.

    k = Σ_ℓ r_ℓ(a)r_ℓ(b)c^ℓ with r_ℓ of `hermite_weights`; k' is the same for the coefficients of the derivative.

    Parameters
    ----------
    coefficients : sequence of 1 to 151 float
        Finite numbers, lowest degree first.

    Raises
    ------
    InputError
        For no coefficients, more than 151, or some that are not finite numbers.

    References
    ----------
    Han et al. 2022, Theorem 1.
    """

    coefficients: tuple[float, ...]
    name: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        values = self.coefficients
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(
                f"activation 'polynomial': coefficients is {values!r}, expected numbers, lowest degree first."
            )
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"activation 'polynomial': coefficients is {values!r}, expected numbers: {error}."
            ) from error
        if not numbers or len(numbers) > MAX_DEGREE + 1 or not all(map(math.isfinite, numbers)):
            raise InputError(
                f"activation 'polynomial': coefficients has {len(numbers)} values {numbers[:4]}..., expected 1 to "
                f"{MAX_DEGREE + 1} finite numbers, lowest degree first."
            )
        object.__setattr__(self, "coefficients", numbers)

    def __call__(self, t: Array) -> Array:
        """Σ_j coefficients[j]·t^j by Horner's rule."""
        total = namespace(t).full_like(t, self.coefficients[-1])
        for coefficient in self.coefficients[-2::-1]:
            total = total * t + coefficient
        return total

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return correlate(hermite_weights(self.coefficients, a), hermite_weights(self.coefficients, b), c)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        slopes = [j * value for j, value in enumerate(self.coefficients)][1:] or [0.0]
        return correlate(hermite_weights(slopes, a), hermite_weights(slopes, b), c)
