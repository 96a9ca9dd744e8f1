"""Correlations of rows, kept so that nothing is lost near ±1: each as its signed half deficit.

For c = ⟨x̂, ŷ⟩ the half deficit is u = (1 − |c|)/2 = sin²(θ/2), θ the angle to ±ŷ, and v = ±u carries the sign of c (−0.0 for
opposite rows). κ₀ turns an error ε of c near ±1 into √(2ε)/π; a small u has its own exponent. u comes from a product of
normalised rows, and where it is small, so that the product has lost it, from u = ‖x̂ ∓ ŷ‖²/4 in float64. Duplicate rows give
u = 0 exactly. A zero row has c = 0, so u = ½, with every row. MATH.md §1 (rounding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask import threads
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.compiled import compiled
from ntkdask.kernels.blocks import Block

WIDE_FEATURES = 64
"""Features of a row that a float64 product converts at a time."""

STRIP_ENTRIES = 2**13
"""Entries of a block that a float64 product in the place of differences takes at a time."""

MANY = 8
"""A float64 product costs about as much as the differences of one entry in eight."""

DEVICE_PAIR_ELEMENTS = 2**20
"""Float64 elements of the differences of rows that are held at a time on a GPU."""

ROW_ELEMENTS = 2**20
"""Elements of rows below which another thread costs more than it saves."""

DEVICE_ROW_ELEMENTS = 2**22
"""Elements of rows that are converted at a time on a GPU."""


@dataclass(frozen=True)
class UnitRows:
    """Rows and their lengths. rows: (n, d) as given. unit: rows/‖rows‖ in the dtype of products, zero rows stay zero; None where
    products are taken in float64 from the rows themselves. squares: (n,) float64 ‖x_i‖².
    """

    rows: Array
    unit: Array | None
    squares: Array

    @property
    def inverse(self) -> Array:
        """(n,) float64 1/‖x_i‖, 0 for zero rows."""
        xp = namespace(self.squares)
        positive = self.squares > 0
        return xp.where(positive, 1.0 / xp.sqrt(xp.where(positive, self.squares, 1.0)), 0.0)


def unit_rows(x: Array, dtype: np.dtype | None) -> UnitRows:
    """Lengths of the rows (n, d), summed in float64, and with a `dtype` the rows divided by them."""
    xp = namespace(x)
    squares = row_squares(x)
    if dtype is None:
        return UnitRows(x, None, squares)
    unit = xp.empty(x.shape, dtype)
    if is_device_array(x):
        inverse = UnitRows(x, None, squares).inverse
        for part in _row_parts(x, DEVICE_ROW_ELEMENTS):
            unit[part] = x[part] * inverse[part, None]
    else:
        x = np.ascontiguousarray(x)
        threads.on_threads(lambda part: _normalise(x[part], squares[part], unit[part]), _thread_parts(x))
    return UnitRows(x, unit, squares)


def row_squares(x: Array) -> Array:
    """(n, d) → (n,) float64 ‖x_i‖²; each depends on its own row alone, so that any batching gives the same bits."""
    xp = namespace(x)
    squares = xp.empty(x.shape[0], xp.float64)
    if is_device_array(x):
        for part in _row_parts(x, DEVICE_ROW_ELEMENTS):
            squares[part] = xp.sum(xp.square(x[part].astype(xp.float64)), axis=1)
        return squares
    x = np.ascontiguousarray(x)
    threads.on_threads(lambda part: _squares(x[part], squares[part]), _thread_parts(x))
    return squares


def half_deficits(v: Array, x: UnitRows, y: UnitRows, block: Block, near: float) -> None:
    """v (R, C) = signed half deficits of the rows x[block.rows], y[block.columns], exact to rounding below `near` too.

    v: C-ordered, float32 (from products of unit rows in float32) or float64.
    """
    xp = namespace(v)
    if x.unit is None or y.unit is None:
        v[...] = wide_products(x, y, block)
    else:
        xp.matmul(x.unit[block.rows], y.unit[block.columns].T, out=v)
    offset = block.shape[1] if block.diagonal is None else block.diagonal
    count = _from_correlations(v, v.dtype.type(near), offset)
    if count:
        recompute(v, x, y, block, near, count / v.size)


def recompute(v: Array, x: UnitRows, y: UnitRows, block: Block, near: float, share: float) -> None:
    """Replace the entries of v with |v| < near by exact ones. share: roughly, the part of v that they are.

    Differences give all digits of a float64; where many float32 entries are near, a float64 product has the digits they need.
    """
    if share > 1 / MANY and v.dtype == np.float32:
        _by_products(v, x, y, block, near)
    else:
        _by_differences(v, x, y, block, near)


def wide_products(x: UnitRows, y: UnitRows, block: Block) -> Array:
    """(R, C) float64 correlations ⟨x̂, ŷ⟩, a few features at a time."""
    xp = namespace(x.squares)
    total = xp.zeros(block.shape)
    left, right = x.inverse[block.rows, None], y.inverse[block.columns, None]
    for first in range(0, x.rows.shape[1], WIDE_FEATURES):
        part = slice(first, first + WIDE_FEATURES)
        total += (x.rows[block.rows, part] * left) @ (y.rows[block.columns, part] * right).T
    return total


def _by_differences(v: Array, x: UnitRows, y: UnitRows, block: Block, near: float) -> None:
    """u = ‖x̂ ∓ ŷ‖²/4 in float64, which is 0 for duplicates. On the CPU the diagonal of a symmetric matrix is left alone."""
    if not is_device_array(v):
        offset = block.shape[1] if block.diagonal is None else block.diagonal
        left, right = x.inverse[block.rows], y.inverse[block.columns]
        _differences(v, v.dtype.type(near), offset, x.rows[block.rows], left, y.rows[block.columns], right)
        return
    xp = namespace(v)
    i, j = xp.nonzero(xp.abs(v) < near)
    left, right = x.inverse, y.inverse
    step = max(1, DEVICE_PAIR_ELEMENTS // x.rows.shape[1])
    for first in range(0, len(i), step):
        rows, columns = i[first : first + step], j[first : first + step]
        sign = xp.copysign(1.0, v[rows, columns].astype(xp.float64))
        a, b = rows + block.top, columns + block.left
        difference = x.rows[a] * left[a, None]
        difference -= y.rows[b] * (sign * right[b])[:, None]
        v[rows, columns] = xp.copysign(xp.sum(difference * difference, axis=1) / 4, sign)


def _by_products(v: Array, x: UnitRows, y: UnitRows, block: Block, near: float) -> None:
    xp = namespace(v)
    step = v.shape[0] if is_device_array(v) else max(1, STRIP_ENTRIES // v.shape[1])
    for first in range(0, v.shape[0], step):
        strip = v[first : first + step]
        top = block.top + first
        exact = signed_half_deficits(wide_products(x, y, Block(top, top + len(strip), block.left, block.right, False)))
        strip[...] = xp.where(xp.abs(strip) < near, exact, strip)


def signed_half_deficits(c: Array) -> Array:
    """±(1 − |c|)/2 with the sign of c, of any shape; rounding past ±1 is clipped."""
    xp = namespace(c)
    return xp.copysign(xp.maximum(1.0 - xp.abs(c), 0.0) / 2, c)


def correlations(v: Array) -> Array:
    """c = ±(1 − 2|v|) in place of v, which is returned."""
    xp = namespace(v)
    c = 1 - 2 * xp.abs(v)
    return xp.copysign(c, v, out=v)


def product_bytes(rows: int, columns: int, d: int) -> int:
    """Temporaries of `wide_products` on a block of (rows, columns) with d features: the sum, a product, its operands, and NumPy's
    buffer for casts.
    """
    return 8 * (2 * rows * columns + (rows + columns) * min(d, WIDE_FEATURES)) + 2**16


def refining_bytes(rows: int, columns: int, d: int) -> int:
    """Temporaries of `half_deficits` on a block of (rows, columns), beyond v."""
    strip = min(rows, max(1, STRIP_ENTRIES // max(1, columns)))
    return product_bytes(strip, columns, d) + 8 * 3 * strip * columns


def _from_correlations(v: Array, near: float, diagonal: int) -> int:
    """v = signed half deficits of the correlations in v, in place; how many are below `near`; on the CPU, off the diagonal."""
    if not is_device_array(v):
        return _deficits(v, near, diagonal)
    xp = namespace(v)
    v[...] = signed_half_deficits(v)
    return int(xp.count_nonzero(xp.abs(v) < near))


def _row_parts(x: Array, elements: int) -> list[slice]:
    n, d = x.shape
    step = max(1, elements // d)
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]


def _thread_parts(x: Array) -> list[slice]:
    """Row ranges, one for each thread that the work deserves."""
    n = x.shape[0]
    parts = max(1, min(threads.current(), n, x.size // ROW_ELEMENTS))
    return [slice(n * part // parts, n * (part + 1) // parts) for part in range(parts)]


@compiled
def _squares(x, squares):
    for i in range(x.shape[0]):
        row, total = x[i], 0.0
        for k in range(row.size):
            value = np.float64(row[k])
            total += value * value
        squares[i] = total


@compiled
def _normalise(x, squares, unit):
    for i in range(x.shape[0]):
        row, out = x[i], unit[i]
        inverse = 1.0 / math.sqrt(squares[i]) if squares[i] > 0 else 0.0
        if squares[i] != squares[i]:
            inverse = squares[i]
        for k in range(row.size):
            out[k] = row[k] * inverse


@compiled
def _deficits(v, near, diagonal):
    count = 0
    zero, half, one = v.dtype.type(0), v.dtype.type(0.5), v.dtype.type(1)
    for i in range(v.shape[0]):
        row = v[i]
        for j in range(row.size):
            u = half * (one - abs(row[j]))
            u = zero if u < zero else u
            row[j] = math.copysign(u, row[j])
        found = 0
        for j in range(row.size):
            found += abs(row[j]) < near
        if diagonal + i < row.size and abs(row[diagonal + i]) < near:
            found -= 1
        count += found
    return count


@compiled
def _differences(v, near, diagonal, x, left, y, right):
    for i in range(v.shape[0]):
        row, a = v[i], x[i]
        for j in range(row.size):
            if abs(row[j]) < near and j != diagonal + i:
                sign = math.copysign(1.0, row[j])
                b, total, scale, other = y[j], 0.0, left[i], sign * right[j]
                for k in range(a.size):
                    difference = a[k] * scale - b[k] * other
                    total += difference * difference
                row[j] = math.copysign(0.25 * total, sign)
