"""The point from which Gram sums are taken, so that features far from zero keep their digits.

The centred Gram Σ w(φ − φ̄)(φ − φ̄)ᵀ is the same from any fixed point c: G̃ − s̃s̃ᵀ/W with φ̃ = φ − c. About zero that difference
loses digits as (mean ÷ deviation)², about a c near the mean none. c need not be the mean: that of a sample will do. MATH.md §6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array

NARROW = 128
"""Rows of up to this many features are multiplied in float64, whatever their dtype: that costs little beside reading them."""
GRID = 4.0
"""c lies on a grid of a feature's deviation, rounded down to a power of two, over this: most differences are then exact."""
NEAR = 0.5
"""A mean within so many deviations of 0 is left alone: zeros stay zeros."""


@dataclass(frozen=True, eq=False)
class Centre:
    """The point that is subtracted from every row before its products are summed.

    Parameters
    ----------
    features : array (m,), float64
        c, numbers that the features' dtype holds exactly.
    targets : array (k,), float64
        The same for the targets.
    """

    features: np.ndarray
    targets: np.ndarray

    @classmethod
    def zero(cls, m: int, k: int) -> Centre:
        """The origin, for m features and k targets."""
        return cls(np.zeros(m), np.zeros(k))

    @classmethod
    def of_sample(cls, phi: np.ndarray, y: np.ndarray, counts: np.ndarray) -> Centre:
        """Near the means of a sample phi (b, m), y (b, k), row i counted counts[i] times; 0 where means are far below deviations."""
        # features that overflow are named by the slabs that meet them
        with np.errstate(invalid="ignore", over="ignore"):
            return cls(_near_mean(phi, counts), _near_mean(y, counts))

    def equals(self, other: Centre) -> bool:
        """Whether both are the same point."""
        return self is other or all(
            np.array_equal(a, b) for a, b in ((self.features, other.features), (self.targets, other.targets))
        )

    def to_state(self) -> dict[str, np.ndarray]:
        """Arrays for the store."""
        return {"features": self.features, "targets": self.targets}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Centre:
        """The point that `to_state` described."""
        return cls(arrays["features"], arrays["targets"])


def _near_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A number near the mean of each column (b, m), which the columns' dtype holds; float64."""
    if not len(values):
        return np.zeros(values.shape[1])
    # from the first row: a constant column keeps its value to the last digit
    deviations = values.astype(np.float64) - values[0].astype(np.float64)
    offset = counts @ deviations / counts.sum()
    deviation = np.sqrt(counts @ (deviations - offset) ** 2 / counts.sum())
    mean = values[0] + offset
    step = np.exp2(np.floor(np.log2(np.where(deviation > 0, deviation, 1.0)))) / GRID
    rounded = np.where(deviation > 0, np.round(mean / step) * step, mean).astype(values.dtype).astype(np.float64)
    return np.where(np.isfinite(rounded) & (np.abs(mean) > NEAR * deviation), rounded, 0.0)


def widened(phi: Array) -> Array:
    """Features (b, m) as they are multiplied: narrow ones in float64. No centre helps where groups of rows lie far apart."""
    return phi.astype("float64", copy=False) if phi.shape[1] <= NARROW else phi
