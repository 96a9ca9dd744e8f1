"""Sums over rows that ridge regression needs: ΦᵀΦ, ΦᵀY, Φᵀ1, Yᵀ1, ‖Y‖², Σw, accumulated in float64.

float32 features are multiplied in float32 (one SYRK a batch) and added to a float64 accumulator: twice the rate of
float64 products, and the accumulation over batches loses nothing. One triangle is computed, added and stored. Sums of
disjoint row sets add; the sums of a set minus those of a fold are those of the rest. Arrays in, arrays out: the walk
over a dataset is in `workflows.stream`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import blas

from ntkdask.arrays import Array, is_device_array, namespace, to_host
from ntkdask.threads import on_threads

PANEL = 256
_CAST_ROWS = 64
_STRETCH_ROWS = 1024


def triangle_panels(m: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of the lower block triangle of an (m, m) matrix, panel by panel of 256 columns."""
    for j in range(0, m, PANEL):
        yield slice(j, m), slice(j, min(j + PANEL, m))


def packed_size(m: int) -> int:
    """How many numbers the packed lower block triangle of an (m, m) matrix has."""
    return sum((r.stop - r.start) * (c.stop - c.start) for r, c in triangle_panels(m))


@dataclass
class GramSums:
    """Sums over a set of rows with weights w (1 without); everything is float64.

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
    """

    gram: Array
    cross: Array
    features: Array
    targets: Array
    squares: Array
    weight: float
    rows: int

    @classmethod
    def zeros(cls, m: int, k: int, like: Array | None = None) -> GramSums:
        """Empty sums for m features and k targets, on the device of `like`."""
        xp = np if like is None else namespace(like)
        return cls(xp.zeros((m, m), order="F"), xp.zeros((m, k)), xp.zeros(m), xp.zeros(k), xp.zeros(k), 0.0, 0)

    def add(self, phi: Array, y: Array, weights: Array | None = None, product: Array | None = None) -> None:
        """Add a batch in place.

        Parameters
        ----------
        phi : array (b, m), float32 or float64
            Features; multiplied in place by √w when there are weights.
        y : array (b, k), float64
            Targets.
        weights : array (b,), float64, optional
            Weights; None: all 1.
        product : array (m, m) of phi's dtype, Fortran order, optional
            Scratch to reuse; zero at first.
        """
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
            self.gram = blas.dsyrk(1.0, phi.T, beta=1.0, c=self.gram, overwrite_c=1, lower=1)
            return
        # zeros: SYRK leaves the upper triangle alone, and diagonal panels are added and packed whole
        c = np.zeros((phi.shape[1],) * 2, np.float32, order="F") if product is None else product
        c = blas.ssyrk(1.0, phi.T, beta=0.0, c=c, overwrite_c=1, lower=1)

        def add(panel: tuple[slice, slice]) -> None:
            self.gram[panel] += c[panel]

        # memory-bound, and NumPy lets go of the interpreter: as many panels at a time as the task has threads
        on_threads(add, list(triangle_panels(phi.shape[1])))

    def __iadd__(self, other: GramSums) -> GramSums:
        """Add the sums of other rows in place."""
        for name in ("gram", "cross", "features", "targets", "squares", "weight", "rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def minus(self, other: GramSums) -> GramSums:
        """The sums of the rows of this set that are not in the subset `other`."""
        return GramSums(
            self.gram - other.gram,
            self.cross - other.cross,
            self.features - other.features,
            self.targets - other.targets,
            self.squares - other.squares,
            self.weight - other.weight,
            self.rows - other.rows,
        )

    def to_host(self) -> GramSums:
        """The same sums in NumPy arrays; these sums themselves where they are on the host."""
        if not is_device_array(self.gram):
            return self
        return GramSums(
            np.asfortranarray(to_host(self.gram)),
            to_host(self.cross),
            to_host(self.features),
            to_host(self.targets),
            to_host(self.squares),
            self.weight,
            self.rows,
        )

    def pack(self) -> np.ndarray:
        """All the sums as one float64 vector on the host, the Gram matrix as its lower block triangle."""
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
    def unpack(cls, vector: np.ndarray, m: int, k: int) -> GramSums:
        """The sums that `pack` packed."""
        gram = np.zeros((m, m), order="F")
        position = 0
        for rows, columns in triangle_panels(m):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            size = shape[0] * shape[1]
            gram[rows, columns] = vector[position : position + size].reshape(shape, order="F")
            position += size
        rest = np.split(vector[position:], np.cumsum([m * k, m, k, k]))
        return cls(gram, rest[0].reshape(m, k), rest[1], rest[2], rest[3], float(rest[4][0]), int(rest[4][1]))


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
