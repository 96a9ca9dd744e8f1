"""Activations with one kink at 0: their duals are made of the arc-cosine kernels κ₀ and κ₁. MATH.md §2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ntkdask.activations.base import ActivationFunction
from ntkdask.arrays import Array, namespace
from ntkdask.registry import register


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

    @property
    def slopes(self) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0

    def __call__(self, t: Array) -> Array:
        """max(t, 0)."""
        return namespace(t).maximum(t, 0)

    def dual(self, a: Array, b: Array, c: Array) -> Array:
        """ab·κ₁(c)/2."""
        return a * b * kappa1(c) * 0.5

    def dual_derivative(self, a: Array, b: Array, c: Array) -> Array:
        """κ₀(c)/2."""
        return kappa0(c) * 0.5
