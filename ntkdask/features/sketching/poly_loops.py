"""The steps of a `PolySketch` on the CPU: a compiled loop takes one row through all of them in cache.

The order of the work is that of `poly_program`, the random numbers are those of `poly_tables`. The task's threads share the rows.
Arguments of the loops are grouped in plain tuples, which Numba recognises at once; for named tuples each call would take 0.1 ms more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkdask.compiled import compiled_as_written
from ntkdask.features.sketching.hadamard import load_signed, transform_row
from ntkdask.features.sketching.operands import aligned, over_rows, padded_size, row_memory
from ntkdask.features.sketching.poly_program import JOIN, JOIN_CONSTANT, LEAF, OUT, OUT_SINGLE, Program
from ntkdask.features.sketching.poly_tables import Tables
from ntkdask.features.sketching.sparse_rows import SparseRows


def run_on_host(program: Program, tables: Tables, x: Any, out: np.ndarray, scale: float) -> None:
    """Write scale times the sketches of x to `out` (n_powers, n, m), by the steps of the program.

    x: (n, d) dense with unit stride, or `SparseRows`.
    """
    n_powers, n, m = out.shape
    span = sum((length - 1) * step for length, step in zip(out.shape, out.strides, strict=True)) // out.itemsize + 1
    memory = np.lib.stride_tricks.as_strided(out, (span,), (out.itemsize,))
    output = (memory, out.strides[0] // out.itemsize, out.strides[1] // out.itemsize, m)
    rows: tuple
    if isinstance(x, SparseRows):
        rows = (x.data, 0, True, x.columns, x.starts)
    else:
        empty = np.empty(0, np.int32)
        rows = (*row_memory(x), False, empty, empty)
    is_count, w = tables.buckets.size > 0, tables.rows.shape[1]
    size = w if is_count else padded_size(x.shape[1])
    leaf_of_edge = np.array([first for first, _ in program.edges])
    leaves = (leaf_of_edge, tables.leaf_signs, is_count, tables.buckets)
    nodes = (tables.rows, tables.node_signs, tables.constants)

    def work(start: int, stop: int) -> None:
        slots = aligned(program.n_slots * w, out.dtype).reshape(program.n_slots, w)
        scratch = (aligned(size, out.dtype), aligned(w, out.dtype), slots)
        _run_rows(rows, program.steps, leaves, nodes, output, scratch, start, stop, out.dtype.type(scale))

    n_leaves = int((program.steps[:, 0] == LEAF).sum())
    joins = int((program.steps[:, 0] <= JOIN_CONSTANT).sum()) - n_leaves
    over_rows(work, n, n * (n_leaves * (size + w) + 2 * joins * w + n_powers * m))


@compiled_as_written
def _run_rows(x, steps, leaves, nodes, out, scratch, first, last, scale):
    """Rows first … last − 1 through all steps, whose kinds are those of `poly_program`.

    x: (values, stride, is_csr, columns, starts), dense memory with a stride or a CSR matrix. leaves: (leaf of each edge, leaf signs,
    is_count, buckets). nodes: (sampled entries, node signs, constants). out: (memory, elements between powers, elements between rows,
    length of a row). scratch: (a leaf, a node, slots (n_slots, w)).
    """
    leaf_of_edge, _, _, _ = leaves
    sampled, node_signs, constants = nodes
    memory, stride_power, stride_row, width = out
    leaf, node, slots = scratch
    for r in range(first, last):
        for step in range(steps.shape[0]):
            kind, a, b, edge, target = steps[step]
            if kind == LEAF:
                _load_leaf(x, leaves, leaf_of_edge[edge], r, leaf)
                transform_row(leaf, leaf, 0)
                _sample(leaf, sampled[edge], slots[target])
            elif kind <= JOIN_CONSTANT:
                if kind == JOIN:
                    _multiply_signed(slots[a], slots[b], node_signs[edge], node)
                else:
                    _multiply(slots[a], constants[b], node)
                transform_row(node, node, 0)
                _sample(node, sampled[edge], slots[target])
            else:
                start = target * stride_power + r * stride_row
                row, left = memory[start : start + width], slots[a]
                if kind == OUT_SINGLE:
                    for j in range(row.size):
                        row[j] = scale * left[j]
                else:
                    right = slots[b] if kind == OUT else constants[b]
                    for j in range(row.size):
                        row[j] = scale * (left[j] * right[j])


@compiled_as_written
def _load_leaf(x, leaves, i, r, leaf):
    """`leaf` ← what leaf i of the tree transforms of row r: the signed row, or its CountSketch."""
    values, stride, is_csr, columns, starts = x
    _, leaf_signs, is_count, buckets = leaves
    if not is_count:
        load_signed(values, r * stride, leaf_signs[i], leaf)
        return
    for j in range(leaf.size):
        leaf[j] = 0
    if is_csr:
        for j in range(starts[r], starts[r + 1]):
            leaf[buckets[i, columns[j]]] += leaf_signs[i, columns[j]] * values[j]
    else:
        for j in range(leaf_signs.shape[1]):
            leaf[buckets[i, j]] += leaf_signs[i, j] * values[r * stride + j]


@compiled_as_written
def _sample(transformed, indices, samples):
    """samples[j] ← transformed[indices[j]]."""
    for j in range(indices.size):
        samples[j] = transformed[indices[j]]


@compiled_as_written
def _multiply(left, right, node):
    """`node` ← left · right."""
    for j in range(node.size):
        node[j] = left[j] * right[j]


@compiled_as_written
def _multiply_signed(left, right, signs, node):
    """`node` ← signs · (left · right)."""
    for j in range(node.size):
        node[j] = signs[j] * (left[j] * right[j])
