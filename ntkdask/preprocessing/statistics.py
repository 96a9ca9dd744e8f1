"""Sums over rows that a preprocessing step is fitted from: moments of each feature, second moments of all pairs.

Both start empty, take row blocks by `update`, and combine by `merge`, which is what a tree reduction over slabs calls.
They hold float64 whatever the rows' dtype. Nothing here knows which step asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, flatten_rows, namespace, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.preprocessing.rows import BLOCK_ELEMENTS, block_bytes, row_blocks


def _require_width(width: int, expected: int) -> None:
    if width != expected:
        raise InputError(f"rows have {width} features, the statistics {expected}: they belong to different datasets.")


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, means and sums of squared deviations of n rows: the variance is m2 / n.

    Immutable: 16 d bytes cost nothing to copy.

    Parameters
    ----------
    n : int
        Rows so far.
    mean : array (d,), float64, on the host
        Mean of each feature.
    m2 : array (d,), float64, on the host
        Sum of squared deviations from the mean, of each feature.
    """

    n: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def empty(cls, d: int) -> Moments:
        """Moments of no rows of d features."""
        return cls(0, np.zeros(d), np.zeros(d))

    @classmethod
    def of(cls, x: Array) -> Moments:
        """Moments of the rows of x, (n, *s), any real dtype, flattened to d = prod(s) features."""
        return cls.empty(flatten_rows(x).shape[1]).update(x)

    def update(self, x: Array) -> Moments:
        """Moments of these rows and those of x, (n, *s). Two passes within a block, `merge` between blocks."""
        flat = flatten_rows(x)
        _require_width(flat.shape[1], self.mean.size)
        total = self
        for rows in row_blocks(flat.shape[0], flat.shape[1]):
            total = total.merge(_block_moments(flat[rows]))
        return total

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows.

        mean = mean_a + δ n_b / n,  m2 = m2_a + m2_b + δ² n_a n_b / n,  δ = mean_b − mean_a,  n = n_a + n_b.
        Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm", eq. 2.1. Equal constants merge
        to m2 = 0 exactly, so m2 == 0 tells a constant feature.
        """
        _require_width(other.mean.size, self.mean.size)
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        return Moments(n, mean, self.m2 + other.m2 + delta * delta * (self.n * (other.n / n)))

    def over_channels(self, channels: int) -> Moments:
        """Moments over rows and positions, of features laid out as (positions, channels): n · positions rows."""
        mean, m2 = self.mean.reshape(-1, channels), self.m2.reshape(-1, channels)
        # Shifted by the first position, as in a block: channels that are constant keep a spread of exactly zero.
        centre = mean[0] + (mean - mean[0]).mean(axis=0)
        spread = m2.sum(axis=0) + self.n * np.square(mean - centre).sum(axis=0)
        return Moments(self.n * mean.shape[0], centre, spread)

    @staticmethod
    def rows_per_update(d: int) -> int:
        """The number of rows that an update takes best; more gain nothing."""
        return max(1, BLOCK_ELEMENTS // d)

    @staticmethod
    def workspace_bytes(n: int, d: int) -> int:
        """Peak bytes of `of` or `update` on n rows, the result included."""
        return 2 * block_bytes(n, d) + 96 * d + 2**16


def _block_moments(block: Array) -> Moments:
    xp = namespace(block)
    # The shift keeps data of mean 1e6 and std 1 accurate, and makes a constant feature's m2 exactly zero.
    shift = block[0].astype("float64")
    deviations = block.astype("float64")
    deviations -= shift
    offset = deviations.mean(axis=0)
    deviations -= offset
    m2 = xp.einsum("ij,ij->j", deviations, deviations)
    return Moments(block.shape[0], to_host(shift + offset), to_host(m2))


@dataclass(eq=False)
class SecondMoments:
    """Uncentred second moments of n rows: xtx = Σ x xᵀ, so the covariance about zero is xtx / n.

    d = 3072 takes 75 MB, so `update` adds in place: one task walks its blocks with one accumulator.

    Parameters
    ----------
    n : int
        Rows so far.
    xtx : array (d, d), float64
        Σ x xᵀ, on the device of the rows.
    """

    n: int
    xtx: Array

    @classmethod
    def empty(cls, d: int, device: bool = False) -> SecondMoments:
        """Second moments of no rows of d features, on the GPU when `device`."""
        return cls(0, to_device(np.zeros((d, d)), device))

    @classmethod
    def of(cls, x: Array) -> SecondMoments:
        """Second moments of the rows of x, (n, *s), any real dtype, flattened to d = prod(s) features."""
        flat = flatten_rows(x)
        return cls(0, namespace(x).zeros((flat.shape[1], flat.shape[1]), dtype="float64")).update(flat)

    def update(self, x: Array) -> SecondMoments:
        """Add the rows of x, (n, *s), on the device of xtx, in place; returns self.

        The products run in float64 as well as the sums: float32 products drown eigenvalues below 1e-7 of the largest.
        """
        flat = flatten_rows(x)
        _require_width(flat.shape[1], self.xtx.shape[0])
        size = self.rows_per_update(flat.shape[1])
        for start in range(0, flat.shape[0], size):
            block = flat[start : start + size].astype("float64")
            self.xtx += block.T @ block
        self.n += flat.shape[0]
        return self

    def merge(self, other: SecondMoments) -> SecondMoments:
        """Second moments of both sets of rows; neither changes, so a task may be retried."""
        _require_width(other.xtx.shape[0], self.xtx.shape[0])
        return SecondMoments(self.n + other.n, self.xtx + other.xtx)

    def to_host(self) -> SecondMoments:
        """These second moments in host memory, ready to be stored or sent."""
        return SecondMoments(self.n, to_host(self.xtx))

    @staticmethod
    def rows_per_update(d: int) -> int:
        """The number of rows that an update takes best: adding the (d, d) product is then cheap beside computing it."""
        return max(256, d)

    @staticmethod
    def workspace_bytes(n: int, d: int) -> int:
        """Peak bytes of `of` or `update` on n rows, the accumulator included."""
        return 16 * d * d + 8 * d * min(n, SecondMoments.rows_per_update(d)) + 2**16
