"""Sketch of a sum of powers of the cosine, Σ_ℓ w_ℓ(x)w_ℓ(y)·cos^ℓ: what `HomogeneousSketch` and `HermiteSketch` are made of.

Each degree gets components of its own, as many as its weight asks for; degree 0 needs one and is exact, degree 1 is an SRHT, or exact
where rows are short. Not a feature map of a network itself: the weights come from the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError
from ntkdask.features.sketching.count_sketch import CountSketch
from ntkdask.features.sketching.operands import checked_out
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.features.sketching.sketches import SRHT
from ntkdask.features.sketching.sparse_rows import SparseRows


@dataclass(frozen=True)
class DotProductSketch:
    """φ(x) = ⊕_ℓ w_ℓ(x)·Q_ℓ x̂, Q_ℓ a sketch of x̂^{⊗ℓ}: E⟨φ(x), φ(y)⟩ = Σ_ℓ w_ℓ(x)w_ℓ(y)⟨x̂, ŷ⟩^ℓ, variance O(1/n_components).

    Parameters
    ----------
    degrees : tuple of int
        Degrees ℓ >= 0, ascending.
    shares : tuple of float
        The share of the components that each degree gets, >= 0. The variance is least for shares ∝ w_ℓ², where it is about (Σ_ℓ
        w_ℓ²)²/n_components. Each degree has a PolySketch of its own, whose inner nodes are no wider than its components need.
    n_components : int
        Number of components, at least one for each degree.
    seed : int
        Seed of all random numbers.
    path : tuple
        Place of this sketch in the map, which with the seed fixes the numbers.
    leaves : {"srht", "count"}
        "srht" for dense rows, "count" for sparse ones too, as in `PolySketch`.

    Raises
    ------
    InputError
        For fewer components than degrees.

    References
    ----------
    Han et al. 2022, Algorithm 1, lines 4-6.
    """

    degrees: tuple[int, ...]
    shares: tuple[float, ...]
    n_components: int
    seed: int
    path: seeds.Path = ()
    leaves: str = "srht"

    def __post_init__(self) -> None:
        if self.n_components < len(self.degrees):
            raise InputError(
                f"n_components={self.n_components} leaves none for some of the {len(self.degrees)} powers of the expansion "
                f"(degrees {', '.join(map(str, self.degrees))}). Use n_components >= {len(self.degrees)} or a smaller degree."
            )

    def widths(self, d: int) -> tuple[int, ...]:
        """Components of each degree for unit rows of d features; what degrees 0 and 1 do not need goes to the others."""
        limits = tuple({0: 1, 1: d}.get(degree, self.n_components) for degree in self.degrees)
        return _allocated(self.shares, limits, self.n_components)

    def powers(self, unit: Array, out: Array | None = None) -> Array:
        """Sketches of the powers of unit rows, ⊕_ℓ Q_ℓ x̂ without weights: (n, d) → (n, n_components) of their dtype.

        unit: rows of length 1, or 0 (then all components but the constant vanish); with leaves="count" they may be
        `SparseRows`. out: written and returned when given; a slice of columns of a C-ordered array will do. Components that no
        degree needs are 0.
        """
        start, widths = 0, self.widths(unit.shape[1])
        is_sparse = isinstance(unit, SparseRows)
        out = checked_out(out, unit.data if is_sparse else unit, (unit.shape[0], self.n_components))
        for degree, width in zip(self.degrees, widths, strict=True):
            part = out[:, start : start + width]
            if degree == 0:
                part[...] = 1
            elif degree == 1 and width == unit.shape[1]:
                part[...] = unit.dense() if is_sparse else unit
            elif degree == 1:
                self._linear(width)(unit, out=part)
            else:
                self._tensor(degree, width)(unit, degrees=(degree,), out=part[None])
            start += width
        out[:, start:] = 0
        return out

    def weigh(self, powers: Array, weights: Array, d: int, out: Array) -> Array:
        """Write ⊕_ℓ w_ℓ(x)·Q_ℓ x̂ to `out`, from the `powers` of rows of d features; `out` may be `powers` itself.

        weights: (len(degrees), n), or (len(degrees), 1) for weights that do not depend on the row.
        """
        start = 0
        for width, weight in zip(self.widths(d), weights, strict=True):
            part = slice(start, start + width)
            namespace(out).multiply(powers[:, part], weight[:, None].astype(out.dtype), out=out[:, part])
            start += width
        if out is not powers:
            out[:, start:] = 0
        return out

    def _linear(self, width: int) -> SRHT | CountSketch:
        return (CountSketch if self.leaves == "count" else SRHT)(width, self.seed, (*self.path, 1))

    def _tensor(self, degree: int, width: int) -> PolySketch:
        return PolySketch(degree, width, self.seed, (*self.path, degree), self.leaves)

    def workspace_bytes(self, n: int, d: int, itemsize: int) -> int:
        """Peak bytes of `powers` on (n, d) rows beyond its arguments: scratch and the random numbers of all degrees."""
        held, scratch = 0, 0
        for degree, width in zip(self.degrees, self.widths(d), strict=True):
            if degree == 1:
                scratch = max(scratch, self._linear(width).workspace_bytes(0, d, itemsize))
                held += (d + width) * max(4, itemsize)
            elif degree > 1:
                held += self._tensor(degree, width).workspace_bytes(0, d, itemsize, (degree,))
        return held + scratch


def allocate(shares: Sequence[float], limits: Sequence[int], total: int) -> tuple[int, ...]:
    """Integers proportional to `shares` that sum to `total`, each between 1 and its limit.

    They sum to less than `total` where the limits do. Deterministic: the largest remainders are rounded up, the first ones
    among ties. Needs total >= len(shares) and limits >= 1.
    """
    wanted = np.ones(len(shares))
    left, open_ = float(total - len(shares)), np.array(limits) > 1
    weights = np.asarray(shares, np.float64)
    room = np.array(limits, np.float64) - 1
    while left > 0 and open_.any():
        active = np.where(open_, weights, 0.0)
        active = active if active.sum() > 0 else open_.astype(np.float64)
        extra = left * active / active.sum()
        full = open_ & (extra >= room)
        if not full.any():
            wanted += extra
            break
        wanted[full] += room[full]
        left -= room[full].sum()
        open_ &= ~full
    widths = np.floor(wanted + 1e-9).astype(int)
    spare = min(total, sum(limits)) - int(widths.sum())
    order = np.argsort(-(wanted - widths), kind="stable")
    for i in [i for i in order if widths[i] < limits[i]][:spare]:
        widths[i] += 1
    return tuple(int(width) for width in widths)


_allocated = functools.lru_cache(maxsize=1024)(allocate)  # asked for again by every block of rows


def scaled_rows(x: Array, scales: Array, constants: Array | None = None) -> Array:
    """The rows [scales_i·x_i, constants_i], (n, d) or (n, d + 1) in x's dtype; scales and constants are (n,) float64."""
    xp, (n, d) = namespace(x), x.shape
    out = xp.empty((n, d + (constants is not None)), x.dtype)
    xp.multiply(x, scales[:, None], out=out[:, :d])
    if constants is not None:
        out[:, d] = constants
    return out
