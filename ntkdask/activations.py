"""Activations σ with their dual activations: what infinitely many neurons do to a covariance.

k_σ(a, b, c) = E[σ(u)σ(v)] and k_σ'(a, b, c) = E[σ'(u)σ'(v)] for (u, v) ~ N(0, [[a², abc], [abc, b²]]). Formulas and
their sources: MATH.md §2. Each activation is a frozen dataclass, registered under its class name and found by
`get("relu")`; a new one is a new class and nothing else. Arrays are NumPy or CuPy, float32 or float64; the result has
their dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError, nearest
from ntkdask.registry import register

_by_name: dict[str, type[ActivationFunction]] = {}


@dataclass(frozen=True)
class ActivationFunction:
    """σ, its dual and the dual of its derivative. Subclasses give the four methods below."""

    name: ClassVar[str] = ""
    homogeneous: ClassVar[bool] = False
    """σ(st) = sσ(t) for s >= 0, so that k_σ(a, b, c) = ab·k_σ(1, 1, c)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            _by_name[cls.name] = cls

    def __call__(self, t: Array) -> Array:
        """σ(t), elementwise."""
        raise NotImplementedError

    def dual(self, a: Array, b: Array, c: Array) -> Array:
        """k_σ(a, b, c); a, b >= 0 are standard deviations, c a correlation (clipped to [-1, 1])."""
        raise NotImplementedError

    def dual_derivative(self, a: Array, b: Array, c: Array) -> Array:
        """k_σ'(a, b, c), the dual activation of the (almost everywhere) derivative of σ."""
        raise NotImplementedError

    def second_moment(self) -> float:
        """E[σ(t)²] for t ~ N(0, 1), the constant that `normalize=True` divides by."""
        one = 1.0
        return float(self.dual(*(_scalar(one) for _ in range(3))))


def _scalar(value: float) -> Array:
    import numpy as np

    return np.asarray(value, dtype=np.float64)


def kappa0(cosine: Array) -> Array:
    """Arc-cosine kernel of order 0: κ₀(c) = (π − arccos c)/π, so κ₀(1) = 1, κ₀(0) = 1/2.

    cosine: any shape, floating; rounding may push it past ±1, so it is clipped. Same shape and dtype out.
    Normalised as E[2·step(u)·step(v)]. Source: Cho & Saul 2009, eq. 3; Zandieh et al. 2021, eq. 2.

    >>> import numpy as np
    >>> float(kappa0(np.array(0.0)))
    0.5
    """
    xp = namespace(cosine)
    c = xp.clip(cosine, -1.0, 1.0)
    return 1.0 - xp.arccos(c) / math.pi


def kappa1(cosine: Array) -> Array:
    """Arc-cosine kernel of order 1: κ₁(c) = (√(1 − c²) + c(π − arccos c))/π, so κ₁(1) = 1, κ₁(0) = 1/π.

    cosine: any shape, floating; clipped to [−1, 1]. Same shape and dtype out. Normalised as E[2·relu(u)·relu(v)].
    Source: Cho & Saul 2009, eq. 6; Zandieh et al. 2021, eq. 2.

    >>> import numpy as np
    >>> float(kappa1(np.array(1.0)))
    1.0
    """
    xp = namespace(cosine)
    c = xp.clip(cosine, -1.0, 1.0)
    # (1 − c)(1 + c), not 1 − c²: no cancellation near |c| = 1
    return (xp.sqrt((1.0 - c) * (1.0 + c)) + c * (math.pi - xp.arccos(c))) / math.pi


@register("activation")
@dataclass(frozen=True)
class ReLU(ActivationFunction):
    """σ(t) = max(t, 0): k = ab·κ₁(c)/2, k' = κ₀(c)/2. Source: Cho & Saul 2009."""

    name: ClassVar[str] = "relu"
    homogeneous: ClassVar[bool] = True

    def __call__(self, t: Array) -> Array:
        """max(t, 0)."""
        return namespace(t).maximum(t, 0)

    def dual(self, a: Array, b: Array, c: Array) -> Array:
        """ab·κ₁(c)/2."""
        return a * b * kappa1(c) * 0.5

    def dual_derivative(self, a: Array, b: Array, c: Array) -> Array:
        """κ₀(c)/2."""
        return kappa0(c) * 0.5


def get(name: str | ActivationFunction, **parameters: float) -> ActivationFunction:
    """The activation called `name` with its parameters; an activation object is returned as it is.

    Raises InputError for an unknown name (naming the nearest) or parameters it does not take.
    """
    if isinstance(name, ActivationFunction):
        return name
    if not isinstance(name, str) or name not in _by_name:
        raise InputError(f"unknown activation {name!r}{nearest(str(name), _by_name)}")
    try:
        return _by_name[name](**parameters)
    except TypeError as error:
        raise InputError(f"activation {name!r} does not take these parameters: {error}") from error
