"""PolySketch: sketches of x^{⊗k} ⊗ e₁^{⊗(p−k)} for all k in one pass through a binary tree of TensorSRHTs.

Leaf i is (H D_i x)[p_i], a signed and sampled Hadamard transform, or, for sparse rows, (H C_i x)[p_i] with a CountSketch C_i; an inner
node multiplies its two children, signs, transforms and samples the product for its parent. Of the vectors that a node takes while
leaves turn from e₁ to x one after the other, each is transformed once, and those of e₁ alone are constants: about p·log₂p
transforms of a row for all powers, 2p for one. The order of the work is planned by `poly_program`; a compiled loop takes a row through
all of it in cache. Called by the sketches of neural kernels; knows no kernels itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import seeds, threads
from ntkdask.arrays import Array, flatten_rows, is_device_array, namespace, require_float, to_device
from ntkdask.cache import shared
from ntkdask.compiled import compiled_as_written
from ntkdask.errors import InputError
from ntkdask.features.base import require_components, row_blocks
from ntkdask.features.sketching.count_sketch import CountSketch
from ntkdask.features.sketching.hadamard import (
    Factor,
    aligned,
    load_signed,
    over_rows,
    padded_size,
    row_memory,
    sampled_hadamard,
    transform_row,
    unit_stride,
    walsh_hadamard,
)
from ntkdask.features.sketching.poly_program import (
    JOIN,
    JOIN_CONSTANT,
    LEAF,
    OUT,
    OUT_SINGLE,
    Program,
    edges_of,
    program,
    split,
)
from ntkdask.features.sketching.sparse_rows import SparseRows, is_sparse, sparse_rows

DEVICE_BLOCK_BYTES = 2**28
"""Bytes of the vectors of one block of rows on a GPU."""

LEAVES = ("srht", "count")


@dataclass(frozen=True)
class Tables:
    """The random numbers of a sketch for rows of one width, dtype and device; w = `PolySketch.width`.

    leaf_signs: (p, d). buckets: (p, d) int32 with leaves="count", else (p, 0). node_signs: (n_edges, w) with the factor 1/√w of the
    node. rows: (n_edges, w) uint32, sampled entries. constants: (n_edges, w), an edge's samples of e₁ alone times the signs of the
    edge above. e1: (m,), the sketch of e₁^{⊗p}.
    """

    leaf_signs: Array
    buckets: Array
    node_signs: Array
    rows: Array
    constants: Array
    e1: Array

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in vars(self).values())


@dataclass(frozen=True)
class PolySketch:
    """Sketches S_k x of x^{⊗k} ⊗ e₁^{⊗(p−k)}, k = 0 … p = degree, all with the same randomness: E⟨S_k x, S_k y⟩ = ⟨x, y⟩^k.

    S_0 is the same vector for every row, of norm 1 in expectation. For unit vectors at p = 2 the variance is at most
    ((1+2α²)² − α⁴)/m, α = ⟨x, y⟩, m = n_components; each further node of the tree adds about as much. Inner nodes have
    `width` entries. leaves: "srht", Hadamard transforms of x itself, for dense rows; "count", CountSketches of x, for SciPy CSR rows
    in time proportional to their non-zeros (dense rows give the same sketches), at a larger variance.
    Raises InputError for a degree or a number of components below 1. Source: Zandieh et al. 2021, Lemma 1; Ahle et al. 2020.
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
        """(n, *s) → (len(degrees), n, n_components) of x's dtype, times `scale`; all k = 0 … degree without `degrees`.

        x: float32 or float64, NumPy or CuPy, or a SciPy sparse matrix with leaves="count". out: written and returned when given; any
        strides that leave the last axis contiguous serve, such as `wide.transpose(1, 0, 2)` of an (n, len(degrees), n_components)
        direct sum. Raises InputError for degrees outside 0 … degree, an `out` that does not fit, sparse rows with leaves="srht".
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
                _on_host(steps, tables, rows, out, scale)
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
        constants, e1 = _of_e1(p, leaves, node_signs, rows)
        arrays = (leaf_signs, buckets, node_signs.astype(dtype), rows, constants.astype(dtype))
        return Tables(*(to_device(a, device) for a in (*arrays, e1[: self.n_components].astype(dtype))))

    def _on_device(self, steps: Program, tables: Tables, x: Array, out: Array, scale: float) -> None:
        """The same steps on a GPU, a block of rows at a time; on NumPy arrays too, where the tests compare the two."""
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
    """`leaves` when it is known; InputError otherwise."""
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


def _of_e1(degree: int, leaves: np.ndarray, node_signs: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(constants, root) in float64: what every edge samples from e₁ alone, times the signs above, and the root's product.

    leaves: (p, size), the transformed leaves of e₁, or (p, 1) where all their entries are equal.
    """
    edges = edges_of(degree)
    number = {edge: e for e, edge in enumerate(edges)}
    samples = np.empty(rows.shape)
    for e, (first, end) in enumerate(edges):
        if end - first == 1:
            samples[e] = leaves[first, rows[e] % leaves.shape[1]]
        else:
            left, right = number[first, split(first, end)], number[split(first, end), end]
            samples[e] = walsh_hadamard((node_signs[e] * samples[left] * samples[right])[None])[0, rows[e]]
    constants = samples.copy()
    for e, (first, end) in enumerate(edges):
        if end - first > 1:
            for child in ((first, split(first, end)), (split(first, end), end)):
                constants[number[child]] = samples[number[child]] * node_signs[e]
    if degree == 1:
        return constants, samples[0]
    return constants, samples[number[0, split(0, degree)]] * samples[number[split(0, degree), degree]]


def _checked_out(out: Array | None, like: Array, shape: tuple[int, int, int]) -> Array:
    if out is None:
        return namespace(like).empty(shape, dtype=like.dtype)
    if out.shape != shape or out.dtype != like.dtype or is_device_array(out) != is_device_array(like):
        raise InputError(f"out is {out.dtype} {out.shape}, but the result is {like.dtype} {shape}, on the device of x.")
    if (shape[2] > 1 and out.strides[2] != out.itemsize) or any(s < 0 or s % out.itemsize for s in out.strides[:2]):
        raise InputError(f"out has strides {out.strides}; its last axis must be contiguous and none may run backwards.")
    return out


# --- CPU --------------------------------------------------


def _on_host(steps: Program, tables: Tables, x: Any, out: np.ndarray, scale: float) -> None:
    k, n, m = out.shape
    span = sum((length - 1) * step for length, step in zip(out.shape, out.strides, strict=True)) // out.itemsize + 1
    flat_out = np.lib.stride_tricks.as_strided(out, (span,), (out.itemsize,))
    stride_k, stride_n = out.strides[0] // out.itemsize, out.strides[1] // out.itemsize
    is_count, is_csr = tables.buckets.size > 0, isinstance(x, SparseRows)
    w, size = tables.rows.shape[1], tables.rows.shape[1] if is_count else padded_size(x.shape[1])
    leaf_of_edge = np.array([first for first, _ in steps.edges])
    if is_csr:
        flat, stride, columns, starts = x.data, 0, x.columns, x.starts
    else:
        flat, stride = row_memory(x)
        columns = starts = np.empty(0, np.int32)

    def work(start: int, stop: int) -> None:
        leaf, node = aligned(size, out.dtype), aligned(w, out.dtype)
        slots = aligned(steps.n_slots * w, out.dtype).reshape(steps.n_slots, w)
        _run_rows(
            flat,
            stride,
            is_csr,
            columns,
            starts,
            steps.steps,
            leaf_of_edge,
            tables.leaf_signs,
            is_count,
            tables.buckets,
            tables.node_signs,
            tables.rows,
            tables.constants,
            flat_out,
            stride_k,
            stride_n,
            m,
            start,
            stop,
            out.dtype.type(scale),
            leaf,
            node,
            slots,
        )

    leaves = int((steps.steps[:, 0] == LEAF).sum())
    joins = int((steps.steps[:, 0] <= JOIN_CONSTANT).sum()) - leaves
    over_rows(work, n, n * (leaves * (size + w) + 2 * joins * w + k * m))


@compiled_as_written
def _run_rows(
    x,
    stride,
    is_csr,
    columns,
    starts,
    steps,
    leaf_of_edge,
    leaf_signs,
    is_count,
    buckets,
    node_signs,
    rows,
    constants,
    out,
    stride_k,
    stride_n,
    m,
    first,
    last,
    scale,
    leaf,
    node,
    slots,
):
    """Rows first … last−1 through all steps; kinds of steps as in `poly_program`."""
    for r in range(first, last):
        for step in range(steps.shape[0]):
            kind, a, b, edge, target = steps[step]
            if kind == LEAF:
                i = leaf_of_edge[edge]
                if is_count:
                    for j in range(leaf.size):
                        leaf[j] = 0
                    if is_csr:
                        for j in range(starts[r], starts[r + 1]):
                            leaf[buckets[i, columns[j]]] += leaf_signs[i, columns[j]] * x[j]
                    else:
                        for j in range(leaf_signs.shape[1]):
                            leaf[buckets[i, j]] += leaf_signs[i, j] * x[r * stride + j]
                else:
                    load_signed(x, r * stride, leaf_signs[i], leaf)
                transform_row(leaf, leaf, 0)
                samples, indices = slots[target], rows[edge]
                for j in range(indices.size):
                    samples[j] = leaf[indices[j]]
            elif kind <= JOIN_CONSTANT:
                left = slots[a]
                if kind == JOIN:
                    right, signs = slots[b], node_signs[edge]
                    for j in range(node.size):
                        node[j] = signs[j] * (left[j] * right[j])
                else:
                    constant = constants[b]
                    for j in range(node.size):
                        node[j] = left[j] * constant[j]
                transform_row(node, node, 0)
                samples, indices = slots[target], rows[edge]
                for j in range(indices.size):
                    samples[j] = node[indices[j]]
            else:
                start = target * stride_k + r * stride_n
                row, left = out[start : start + m], slots[a]
                if kind == OUT_SINGLE:
                    for j in range(m):
                        row[j] = scale * left[j]
                else:
                    right = slots[b] if kind == OUT else constants[b]
                    for j in range(m):
                        row[j] = scale * (left[j] * right[j])
