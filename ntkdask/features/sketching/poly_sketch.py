"""PolySketch: sketches of x^{⊗k} ⊗ e₁^{⊗(p−k)} for all k in one pass through a binary tree of TensorSRHTs.

Leaf i is (H D_i x)[p_i], a signed and sampled Hadamard transform, or, for sparse rows, (H C_i x)[p_i] with a CountSketch C_i;
an inner node multiplies its two children, signs and transforms the product and samples it for its parent. While leaves turn
from e₁ to x one after the other, each vector that a node takes is transformed once, and those of e₁ alone are constants: about
p·log₂p transforms of a row for all powers, 2p for one. The order of the work is planned by `poly_program`, the random numbers
are kept in `poly_tables`, and the compiled loop `poly_loops` takes a row through all of it in cache. Called by the sketches of
neural kernels; knows no kernels itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import seeds, threads
from ntkdask.arrays import Array, flatten_rows, is_device_array, is_sparse, namespace, require_float, to_device
from ntkdask.cache import shared
from ntkdask.errors import InputError
from ntkdask.features.base import require_components, row_blocks
from ntkdask.features.sketching.count_sketch import CountSketch
from ntkdask.features.sketching.hadamard import sampled_hadamard, walsh_hadamard
from ntkdask.features.sketching.operands import Factor, padded_size, unit_stride
from ntkdask.features.sketching.poly_loops import run_on_host
from ntkdask.features.sketching.poly_program import (
    JOIN,
    JOIN_CONSTANT,
    LEAF,
    OUT,
    OUT_SINGLE,
    Program,
    edges_of,
    program,
)
from ntkdask.features.sketching.poly_tables import Tables, samples_of_e1
from ntkdask.features.sketching.sparse_rows import SparseRows, sparse_rows

DEVICE_BLOCK_BYTES = 2**28
"""Bytes of the vectors of one block of rows on a GPU."""

LEAVES = ("srht", "count")


@dataclass(frozen=True)
class PolySketch:
    """Sketches S_k x of x^{⊗k} ⊗ e₁^{⊗(p−k)}, k = 0 … p = degree, all with the same randomness: E⟨S_k x, S_k y⟩ = ⟨x, y⟩^k.

    S_0 is the same vector for every row, of norm 1 in expectation. Inner nodes have `width` entries.

    Parameters
    ----------
    degree : int
        p >= 1.
    n_components : int
        m >= 1, the length of a sketch.
    seed : int
        Seed of all random numbers.
    path : tuple
        Place of this sketch in its map, which with the seed fixes the numbers.
    leaves : {"srht", "count"}
        "srht": Hadamard transforms of x itself, for dense rows. "count": CountSketches of x, for SciPy CSR rows in time
        proportional to their non-zeros, at a larger variance (dense rows give the same sketches).

    Raises
    ------
    InputError
        For a degree or a number of components below 1.

    Notes
    -----
    For unit vectors at p = 2 the variance is at most ((1+2α²)² − α⁴)/m, α = ⟨x, y⟩; each further node of the tree
    adds about as much.

    References
    ----------
    Zandieh et al. 2021, Lemma 1; Ahle et al. 2020.
    """

    degree: int
    n_components: int
    seed: int
    path: seeds.Path = ()
    leaves: str = "srht"

    def __post_init__(self) -> None:
        require_components(self.degree, "degree")
        require_components(self.n_components)
        require_leaves(self.leaves)

    @property
    def width(self) -> int:
        """Entries of a vector inside the tree: n_components, or the next power of two."""
        return padded_size(self.n_components)

    def __call__(
        self, x: Any, *, degrees: Iterable[int] | None = None, out: Array | None = None, scale: float = 1.0
    ) -> Array:
        """The sketches of rows: (n, *s) → (len(degrees), n, n_components) of x's dtype, times `scale`.

        Parameters
        ----------
        x : array (n, *s), float32 or float64
            NumPy or CuPy, or a SciPy sparse matrix with leaves="count".
        degrees : iterable of int, optional
            The powers k; None: all of 0 … degree.
        out : array (len(degrees), n, n_components), optional
            Written and returned when given. Any strides with a contiguous last axis will do, such as those of
            `wide.transpose(1, 0, 2)` for an (n, len(degrees), n_components) direct sum.
        scale : float
            Factor of the sketches.

        Raises
        ------
        InputError
            For degrees outside 0 … degree, an `out` that does not fit, and sparse rows with leaves="srht".
        """
        rows = rows_for_leaves(x, self.leaves)
        asked = self._degrees(degrees)
        rows = rows if isinstance(rows, SparseRows) else unit_stride(rows)
        like = rows.data if isinstance(rows, SparseRows) else rows
        out = _checked_out(out, like, (len(asked), rows.shape[0], self.n_components))
        scale /= math.sqrt(self.n_components)
        tables = self._tables(rows.shape[1], like)
        for position, k in enumerate(asked):
            if k == 0:
                out[position] = tables.e1 * out.dtype.type(scale)
        steps = program(self.degree, asked)
        if len(steps.steps) and rows.shape[0]:
            if is_device_array(rows):
                self._on_device(steps, tables, rows, out, scale)
            else:
                run_on_host(steps, tables, rows, out, scale)
        return out

    def workspace_bytes(self, n: int, d: int, itemsize: int, degrees: Iterable[int] | None = None) -> int:
        """Peak bytes of a call on (n, d) rows of unit stride, output and random numbers included."""
        asked = self._degrees(degrees)
        steps, w, edges = program(self.degree, asked), self.width, len(edges_of(self.degree))
        size = padded_size(d) if self.leaves == "srht" else w
        tables = edges * w * (4 + 2 * itemsize) + self.degree * d * (itemsize + 4) + self.n_components * itemsize
        scratch = threads.current() * ((steps.n_slots + 1) * w + size) * itemsize
        drawing = 24 * max(size, w, d) + 16 * (w + size) + 8 * size + 5 * edges * w * 8
        return len(asked) * n * self.n_components * itemsize + tables + scratch + drawing + 64 * 1024

    def _degrees(self, degrees: Iterable[int] | None) -> tuple[int, ...]:
        if degrees is None:
            return tuple(range(self.degree + 1))
        asked = tuple(int(k) for k in degrees)
        for k in asked:
            if not 0 <= k <= self.degree:
                raise InputError(f"degrees has {k}, but this sketch gives the powers 0 to {self.degree}.")
        return asked

    def _leaf(self, i: int) -> CountSketch:
        return CountSketch(self.width, self.seed, (*self.path, "leaf", i))

    def _tables(self, d: int, like: Array) -> Tables:
        """Random numbers for rows of d features like `like`, drawn once per process and device."""
        device = is_device_array(like)
        key = ("poly-sketch", self, d, like.dtype.name, device and like.device.id)
        return shared.get(key, lambda: self._drawn(d, like.dtype, device))

    def _drawn(self, d: int, dtype: np.dtype, device: bool) -> Tables:
        p, w, count = self.degree, self.width, self.leaves == "count"
        edges, size = edges_of(p), w if count else padded_size(d)
        leaf_signs, buckets = np.empty((p, d), dtype), np.empty((p, d if count else 0), np.int32)
        node_signs, rows = np.ones((len(edges), w)), np.empty((len(edges), w), np.uint32)
        first_of_leaf = np.zeros((p, size if count else 1))  # the leaf of e₁, before or (srht) after its transform
        for e, (first, end) in enumerate(edges):
            is_leaf, path = end - first == 1, (*self.path, "signs", first, end)
            if is_leaf and count:
                drawn = self._leaf(first).buckets(d, dtype)
                leaf_signs[first], buckets[first] = drawn.sign, drawn.bucket
                first_of_leaf[first, drawn.bucket[0]] = drawn.sign[0]
            elif is_leaf:
                leaf_signs[first] = seeds.signs(self.seed, path, size, dtype.name)[:d]
                first_of_leaf[first] = leaf_signs[first, 0]
            if end - first < p and not is_leaf:
                node_signs[e] = seeds.signs(self.seed, path, w) / math.sqrt(w)
            high = size if is_leaf else w
            rows[e] = seeds.balanced_integers(self.seed, (*self.path, "rows", first, end), high, w)
        leaves = walsh_hadamard(first_of_leaf) if count else np.broadcast_to(first_of_leaf, (p, 1))
        constants, e1 = samples_of_e1(p, leaves, node_signs, rows)
        arrays = (leaf_signs, buckets, node_signs.astype(dtype), rows, constants.astype(dtype))
        return Tables(*(to_device(a, device) for a in (*arrays, e1[: self.n_components].astype(dtype))))

    def _on_device(self, steps: Program, tables: Tables, x: Array, out: Array, scale: float) -> None:
        """The same steps on a GPU, a block of rows at a time; the tests run it on NumPy arrays too, and compare."""
        rows_of_block = max(1, DEVICE_BLOCK_BYTES // (self.width * x.itemsize * (steps.n_slots + 2)))
        for block in row_blocks(x.shape[0], rows_of_block):
            self._block_on_device(steps, tables, x[block], out[:, block], x.dtype.type(scale))

    def _block_on_device(self, steps: Program, tables: Tables, x: Array, out: Array, scale: Any) -> None:
        xp, w, m = namespace(x), self.width, self.n_components
        slots, ones = xp.empty((steps.n_slots, x.shape[0], w), x.dtype), xp.ones(w, x.dtype)
        for kind, a, b, edge, target in steps.steps.tolist():
            rows, leaf = tables.rows[edge], steps.edges[edge][0]
            if kind == LEAF and self.leaves == "count":
                sampled_hadamard((Factor(self._leaf(leaf)(x), ones, rows, w),), 1.0, slots[target])
            elif kind == LEAF:
                factor = Factor(x, tables.leaf_signs[leaf], rows, padded_size(x.shape[1]))
                sampled_hadamard((factor,), 1.0, slots[target])
            elif kind == JOIN:
                sampled_hadamard((Factor(slots[a] * slots[b], tables.node_signs[edge], rows, w),), 1.0, slots[target])
            elif kind == JOIN_CONSTANT:
                sampled_hadamard((Factor(slots[a] * tables.constants[b], ones, rows, w),), 1.0, slots[target])
            elif kind == OUT_SINGLE:
                out[target] = slots[a, :, :m] * scale
            else:
                other = slots[b, :, :m] if kind == OUT else tables.constants[b, :m]
                out[target] = slots[a, :, :m] * other * scale


def require_leaves(leaves: str) -> str:
    """`leaves` when it is "srht" or "count"; InputError otherwise."""
    if leaves not in LEAVES:
        raise InputError(f"leaves is {leaves!r}, expected 'srht' (dense rows) or 'count' (sparse rows).")
    return leaves


def rows_for_leaves(x: Any, leaves: str) -> Any:
    """x as an array (n, d), or as `SparseRows` where it is sparse and leaves="count"; InputError for sparse x otherwise."""
    if isinstance(x, SparseRows) or is_sparse(x):
        if leaves != "count":
            raise InputError("x is sparse, but leaves='srht' takes dense rows. Use leaves='count', or x.toarray().")
        rows: Any = x if isinstance(x, SparseRows) else sparse_rows(x)
    else:
        rows = flatten_rows(require_float(x))
    if not rows.shape[1]:
        raise InputError(f"x has shape {rows.shape}; a sketch needs at least one column.")
    return rows


def _checked_out(out: Array | None, like: Array, shape: tuple[int, int, int]) -> Array:
    if out is None:
        return namespace(like).empty(shape, dtype=like.dtype)
    if out.shape != shape or out.dtype != like.dtype or is_device_array(out) != is_device_array(like):
        raise InputError(f"out is {out.dtype} {out.shape}, but the result is {like.dtype} {shape}, on the device of x.")
    if (shape[2] > 1 and out.strides[2] != out.itemsize) or any(s < 0 or s % out.itemsize for s in out.strides[:2]):
        raise InputError(f"out has strides {out.strides}; its last axis must be contiguous and none may run backwards.")
    return out
