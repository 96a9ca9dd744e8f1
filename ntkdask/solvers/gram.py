"""Sums over rows that ridge regression needs: ΦᵀΦ, ΦᵀY, Φᵀ1, Yᵀ1, ‖Y‖², Σw, about a fixed point, accumulated in float64.

float32 features are multiplied in float32 (one SYRK a batch) and added to a float64 accumulator: twice the rate of
float64 products, and the accumulation over batches loses nothing; narrow ones are multiplied in float64. One triangle is
computed, added and stored. Sums of disjoint row sets add; the sums of a set minus those of a fold are those of the rest; sums
about one point move to another (MATH.md §6). Arrays in, arrays out: the walk over a dataset is in `workflows.stream`.

The centred Gram Σ w(φ − φ̄)(φ − φ̄)ᵀ is the same from any fixed point c: G̃ − s̃s̃ᵀ/W with φ̃ = φ − c. About zero that difference
loses digits as (mean ÷ deviation)², about a c near the mean none. c need not be the mean: that of a sample will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ntkdask import lapack
from ntkdask.arrays import Array, is_device_array, namespace, to_host
from ntkdask.threads import on_threads

PANEL = 256
_CAST_ROWS = 64
_STRETCH_ROWS = 1024
_SUMS = ("gram", "cross", "features", "targets", "squares", "weight", "rows")
NARROW = 128
"""Rows of up to this many features are multiplied in float64, whatever their dtype: that costs little beside reading them."""
GRID = 4.0
"""c lies on a grid of a feature's deviation, rounded down to a power of two, over this: most differences are then exact."""
NEAR = 0.5
"""A mean within so many deviations of 0 is left alone: zeros stay zeros."""


def triangle_panels(m: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of the lower block triangle of an (m, m) matrix, panel by panel of 256 columns."""
    for j in range(0, m, PANEL):
        yield slice(j, m), slice(j, min(j + PANEL, m))


def packed_size(m: int) -> int:
    """How many numbers the packed lower block triangle of an (m, m) matrix has."""
    return sum((r.stop - r.start) * (c.stop - c.start) for r, c in triangle_panels(m))


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


@dataclass
class GramSums:
    """Sums over a set of rows with weights w (1 without); everything is float64. φ and y are counted from `centre`.

    Parameters
    ----------
    gram : array (m, m), Fortran order
        The lower triangle of Σ w φφᵀ; the upper one is undefined.
    cross : array (m, k)
        Σ w φyᵀ.
    features : array (m,)
        Σ w φ.
    targets : array (k,)
        Σ w y.
    squares : array (k,)
        Σ w y².
    weight : float
        Σ w.
    rows : int
        How many rows have w > 0.
    centre : Centre or None
        The point that was subtracted from features and targets. None: the origin.
    """

    gram: Array
    cross: Array
    features: Array
    targets: Array
    squares: Array
    weight: float
    rows: int
    centre: Centre | None = None

    @classmethod
    def zeros(cls, m: int, k: int, like: Array | None = None, centre: Centre | None = None) -> GramSums:
        """Empty sums for m features and k targets about a centre, on the device of `like`."""
        xp = np if like is None else namespace(like)
        return cls(xp.zeros((m, m), order="F"), xp.zeros((m, k)), xp.zeros(m), xp.zeros(k), xp.zeros(k), 0.0, 0, centre)

    def add(self, phi: Array, y: Array, weights: Array | None = None, product: Array | None = None) -> None:
        """Add a batch in place.

        Parameters
        ----------
        phi : array (b, m), float32 or float64
            Features; the centre is subtracted in place, and they are multiplied by √w when there are weights.
        y : array (b, k), float64
            Targets.
        weights : array (b,), float64, optional
            Weights; None: all 1.
        product : array (m, m) of phi's dtype, Fortran order, optional
            Scratch to reuse; zero at first.
        """
        phi = widened(phi)
        if self.centre is not None:
            xp = namespace(phi)
            phi -= xp.asarray(self.centre.features, dtype=phi.dtype)
            y = y - xp.asarray(self.centre.targets)
        if weights is not None:
            root = namespace(phi).sqrt(weights)
            phi *= root[:, None].astype(phi.dtype)
            y = y * root[:, None]
        ones = root if weights is not None else namespace(phi).ones(phi.shape[0])
        self._add_products(phi, product)
        # float64 right-hand sides: k is small, and cancellation against the mean would cost float32 digits
        right = namespace(phi).concatenate([y, ones[:, None]], axis=1)
        totals = _tall_product(phi, right)
        self.cross += totals[:, :-1]
        self.features += totals[:, -1]
        self.targets += ones @ y
        self.squares += namespace(phi).einsum("ij,ij->j", y, y)
        self.weight += float(ones @ ones)
        self.rows += int((ones > 0).sum())

    def _add_products(self, phi: Array, product: Array | None) -> None:
        if is_device_array(phi):
            for rows, columns in triangle_panels(phi.shape[1]):
                self.gram[rows, columns] += phi[:, rows].T @ phi[:, columns]
            return
        if phi.dtype == np.float64:
            lapack.syrk(1.0, phi.T, 1.0, self.gram)
            return
        # zeros: SYRK leaves the upper triangle alone, and diagonal panels are added and packed whole
        c = np.zeros((phi.shape[1],) * 2, np.float32, order="F") if product is None else product
        lapack.syrk(1.0, phi.T, 0.0, c)

        def add(panel: tuple[slice, slice]) -> None:
            self.gram[panel] += c[panel]

        # memory-bound, and NumPy lets go of the interpreter: as many panels at a time as the task has threads
        on_threads(add, list(triangle_panels(phi.shape[1])))

    def __iadd__(self, other: GramSums) -> GramSums:
        """Add the sums of other rows in place."""
        other = self._alike(other)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def minus(self, other: GramSums) -> GramSums:
        """The sums of the rows of this set that are not in the subset `other`."""
        other = self._alike(other)
        return replace(self, **{name: getattr(self, name) - getattr(other, name) for name in _SUMS})

    def move(self, centre: Centre | None) -> None:
        """Count from another centre, in place: G − d sᵀ − s dᵀ + W ddᵀ, B − d tᵀ − s eᵀ + W d eᵀ, d and e the steps to it."""
        old, new = (c or Centre.zero(*self.cross.shape) for c in (self.centre, centre))
        xp = namespace(self.gram)
        d, e = xp.asarray(new.features - old.features), xp.asarray(new.targets - old.targets)
        features = self.features - self.weight * d
        for rows, columns in triangle_panels(d.size):
            self.gram[rows, columns] -= xp.outer(features[rows], d[columns]) + xp.outer(d[rows], self.features[columns])
        self.cross = self.cross - xp.outer(d, self.targets) - xp.outer(features, e)
        self.squares = self.squares - 2 * e * self.targets + self.weight * e**2
        self.features, self.targets, self.centre = features, self.targets - self.weight * e, centre

    def _alike(self, other: GramSums) -> GramSums:
        """`other` about this centre: itself, or a copy."""
        origin = Centre.zero(*self.cross.shape)
        if (self.centre or origin).equals(other.centre or origin):
            return other
        moved = replace(other, gram=other.gram.copy(order="F"))
        moved.move(self.centre)
        return moved

    def to_host(self) -> GramSums:
        """The same sums in NumPy arrays; these sums themselves where they are on the host."""
        if not is_device_array(self.gram):
            return self
        host: dict[str, Any] = {n: to_host(getattr(self, n)) for n in ("cross", "features", "targets", "squares")}
        return replace(self, gram=np.asfortranarray(to_host(self.gram)), **host)

    def pack(self) -> np.ndarray:
        """All the sums as one float64 vector on the host, the Gram matrix as its lower block triangle; the centre is not in it."""
        m, k = self.cross.shape
        out = np.empty(packed_length(m, k))
        position = 0
        for rows, columns in triangle_panels(m):
            panel = to_host(self.gram[rows, columns])
            out[position : position + panel.size] = panel.ravel(order="F")
            position += panel.size
        rest = [to_host(a).ravel() for a in (self.cross, self.features, self.targets, self.squares)]
        out[position:] = np.concatenate([*rest, [self.weight, float(self.rows)]])
        return out

    @classmethod
    def unpack(cls, vector: np.ndarray, m: int, k: int, centre: Centre | None = None) -> GramSums:
        """The sums about `centre` that `pack` packed."""
        gram = np.zeros((m, m), order="F")
        position = 0
        for rows, columns in triangle_panels(m):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            size = shape[0] * shape[1]
            gram[rows, columns] = vector[position : position + size].reshape(shape, order="F")
            position += size
        rest = np.split(vector[position:], np.cumsum([m * k, m, k, k]))
        return cls(gram, rest[0].reshape(m, k), rest[1], rest[2], rest[3], float(rest[4][0]), int(rest[4][1]), centre)


def packed_length(m: int, k: int) -> int:
    """The length of the vector that `GramSums.pack` makes."""
    return packed_size(m) + m * k + m + 2 * k + 2


def _tall_product(phi: Array, right: Array) -> Array:
    """phiᵀ·right with float64 sums, in pieces of rows so that the float64 copy of phi stays small.

    It is summed over stretches of 1 024 rows, then over those: how many run at a time does not change the bits.
    """

    def stretch(start: int) -> Array:
        total = 0.0
        for first in range(start, min(start + _STRETCH_ROWS, phi.shape[0]), _CAST_ROWS):
            rows = slice(first, min(first + _CAST_ROWS, phi.shape[0]))
            total = total + phi[rows].astype(right.dtype).T @ right[rows]
        return total

    starts = range(0, phi.shape[0], _STRETCH_ROWS)
    return sum([stretch(s) for s in starts] if is_device_array(phi) else on_threads(stretch, starts))


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
