"""Correlations of rows, kept so that nothing is lost near ±1: each as its signed half deficit.

For c = ⟨x̂, ŷ⟩ the half deficit is u = (1 − |c|)/2 = sin²(θ/2), θ the angle to ±ŷ, and v = ±u has the sign of c (−0.0 for opposite
rows). κ₀ turns an error ε of c near ±1 into √(2ε)/π, but a small u has an exponent of its own. u comes from a product of normalised
rows. Where it is so small that the product has lost it, u = ‖x̂ ∓ ŷ‖²/4 is computed in float64. Duplicate rows give u = 0 exactly. A
zero row has c = 0, so u = ½, with every row. MATH.md §1 (rounding).
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
"""Features of a row that a float64 product converts to float64 at a time."""

STRIP_ENTRIES = 2**13
"""Entries of a block for which a float64 product, in place of differences, is taken at a time."""

MANY = 8
"""A float64 product of a block costs about as much as the differences of one entry in so many."""

DEVICE_PAIR_ELEMENTS = 2**20
"""Float64 elements of the differences of rows that are held at a time on a GPU."""

ROW_ELEMENTS = 2**20
"""Elements of rows below which another thread costs more than it saves."""

DEVICE_ROW_ELEMENTS = 2**22
"""Elements of rows that are converted at a time on a GPU."""


@dataclass(frozen=True)
class UnitRows:
    """Rows and their lengths.

    Parameters
    ----------
    rows : array (n, d), float32 or float64
        As given.
    unit : array (n, d) or None
        rows/‖rows‖ in the dtype of products, zero rows stay zero; None where products are taken in float64 from `rows`.
    squares : array (n,), float64
        ‖x_i‖².
    """

    rows: Array
    unit: Array | None
    squares: Array

    @property
    def inverse(self) -> Array:
        """1/‖x_i‖, 0 for zero rows: (n,) float64."""
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
    """‖x_i‖² of rows (n, d): (n,) float64. Each depends on its own row alone, so any batching gives the same bits."""
    xp = namespace(x)
    squares = xp.empty(x.shape[0], xp.float64)
    if is_device_array(x):
        for part in _row_parts(x, DEVICE_ROW_ELEMENTS):
            squares[part] = xp.sum(xp.square(x[part].astype(xp.float64)), axis=1)
        return squares
    x = np.ascontiguousarray(x)
    threads.on_threads(lambda part: _squares(x[part], squares[part]), _thread_parts(x))
    return squares


def half_deficits(v: Array, x: UnitRows, y: UnitRows, block: Block, threshold: float) -> None:
    """v (R, C) = signed half deficits of the rows x[block.rows] and y[block.columns], those below `threshold` exact to rounding, too.

    Parameters
    ----------
    v : array (R, C), C-ordered, float32 or float64
        The result; in float32 it comes from products of unit rows in float32.
    x, y : UnitRows
        All rows on either side.
    block : Block
        Which of them.
    threshold : float
        Half deficits below it are computed again in float64.
    """
    xp = namespace(v)
    if x.unit is None or y.unit is None:
        v[...] = wide_products(x, y, block)
    else:
        xp.matmul(x.unit[block.rows], y.unit[block.columns].T, out=v)
    offset = block.shape[1] if block.diagonal is None else block.diagonal
    count = _from_correlations(v, v.dtype.type(threshold), offset)
    if count:
        recompute(v, x, y, block, threshold, count / v.size)


def recompute(v: Array, x: UnitRows, y: UnitRows, block: Block, threshold: float, share: float) -> None:
    """Replace the entries of v with |v| < threshold by exact ones.

    Differences give all digits of a float64. Where many entries of a float32 v are below the threshold, a float64 product has the
    digits that they need and is faster.

    Parameters
    ----------
    v : array (R, C), float32 or float64
        Signed half deficits.
    x, y : UnitRows
        All rows on either side.
    block : Block
        Which of them v is of.
    threshold : float
        Half deficits below it are replaced.
    share : float
        About which part of the entries of v these are.
    """
    if share > 1 / MANY and v.dtype == np.float32:
        _by_products(v, x, y, block, threshold)
    else:
        _by_differences(v, x, y, block, threshold)


def wide_products(x: UnitRows, y: UnitRows, block: Block) -> Array:
    """Correlations ⟨x̂, ŷ⟩ (R, C) in float64, from a few features at a time."""
    xp = namespace(x.squares)
    total = xp.zeros(block.shape)
    left, right = x.inverse[block.rows, None], y.inverse[block.columns, None]
    for first in range(0, x.rows.shape[1], WIDE_FEATURES):
        part = slice(first, first + WIDE_FEATURES)
        total += (x.rows[block.rows, part] * left) @ (y.rows[block.columns, part] * right).T
    return total


def _by_differences(v: Array, x: UnitRows, y: UnitRows, block: Block, threshold: float) -> None:
    """Replace entries by u = ‖x̂ ∓ ŷ‖²/4 in float64, which is 0 for duplicates. The CPU leaves the diagonal of a symmetric matrix."""
    if not is_device_array(v):
        offset = block.shape[1] if block.diagonal is None else block.diagonal
        left, right = x.inverse[block.rows], y.inverse[block.columns]
        _differences(v, v.dtype.type(threshold), offset, x.rows[block.rows], left, y.rows[block.columns], right)
        return
    xp = namespace(v)
    i, j = xp.nonzero(xp.abs(v) < threshold)
    left, right = x.inverse, y.inverse
    step = max(1, DEVICE_PAIR_ELEMENTS // x.rows.shape[1])
    for first in range(0, len(i), step):
        rows, columns = i[first : first + step], j[first : first + step]
        sign = xp.copysign(1.0, v[rows, columns].astype(xp.float64))
        a, b = rows + block.top, columns + block.left
        difference = x.rows[a] * left[a, None]
        difference -= y.rows[b] * (sign * right[b])[:, None]
        v[rows, columns] = xp.copysign(xp.sum(difference * difference, axis=1) / 4, sign)


def _by_products(v: Array, x: UnitRows, y: UnitRows, block: Block, threshold: float) -> None:
    """Replace entries by half deficits of products in float64, some rows at a time."""
    xp = namespace(v)
    step = v.shape[0] if is_device_array(v) else max(1, STRIP_ENTRIES // v.shape[1])
    for first in range(0, v.shape[0], step):
        strip = v[first : first + step]
        top = block.top + first
        exact = signed_half_deficits(wide_products(x, y, Block(top, top + len(strip), block.left, block.right, False)))
        strip[...] = xp.where(xp.abs(strip) < threshold, exact, strip)


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
    """Bytes of the temporaries of `wide_products` on a block of (rows, columns) with d features.

    They are the sum, a product, its operands, and NumPy's buffer for casts.
    """
    return 8 * (2 * rows * columns + (rows + columns) * min(d, WIDE_FEATURES)) + 2**16


def refining_bytes(rows: int, columns: int, d: int) -> int:
    """Bytes of the temporaries of `half_deficits` on a block of (rows, columns), beyond v."""
    strip = min(rows, max(1, STRIP_ENTRIES // max(1, columns)))
    return product_bytes(strip, columns, d) + 8 * 3 * strip * columns


def _from_correlations(v: Array, threshold: float, diagonal: int) -> int:
    """Turn correlations v into signed half deficits, in place; returns how many are below `threshold`, on the CPU off the diagonal."""
    if not is_device_array(v):
        return _deficits(v, threshold, diagonal)
    xp = namespace(v)
    v[...] = signed_half_deficits(v)
    return int(xp.count_nonzero(xp.abs(v) < threshold))


def _row_parts(x: Array, elements: int) -> list[slice]:
    """Row ranges of at most about so many elements."""
    n, d = x.shape
    step = max(1, elements // d)
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]


def _thread_parts(x: Array) -> list[slice]:
    """Row ranges, one for each thread for which there is enough work."""
    n = x.shape[0]
    parts = max(1, min(threads.current(), n, x.size // ROW_ELEMENTS))
    return [slice(n * part // parts, n * (part + 1) // parts) for part in range(parts)]


@compiled
def _squares(x, squares):
    """squares (n,) = ‖x_i‖², summed in float64 in the order of the features."""
    for i in range(x.shape[0]):
        row, total = x[i], 0.0
        for k in range(row.size):
            value = np.float64(row[k])
            total += value * value
        squares[i] = total


@compiled
def _normalise(x, squares, unit):
    """unit (n, d) = x_i/‖x_i‖; a zero row stays zero, a row with a NaN becomes NaN."""
    for i in range(x.shape[0]):
        row, out = x[i], unit[i]
        inverse = 1.0 / math.sqrt(squares[i]) if squares[i] > 0 else 0.0
        if squares[i] != squares[i]:
            inverse = squares[i]
        for k in range(row.size):
            out[k] = row[k] * inverse


@compiled
def _deficits(v, threshold, diagonal):
    """Turn correlations v into signed half deficits, in place; returns how many off the diagonal are below `threshold`.

    diagonal: the column in which the first row meets the diagonal of a symmetric matrix.
    """
    count = 0
    zero, half, one = v.dtype.type(0), v.dtype.type(0.5), v.dtype.type(1)
    for i in range(v.shape[0]):
        row = v[i]
        for j in range(row.size):
            u = half * (one - abs(row[j]))
            u = zero if u < zero else u
            row[j] = math.copysign(u, row[j])
        below = 0
        for j in range(row.size):
            below += abs(row[j]) < threshold
        if diagonal + i < row.size and abs(row[diagonal + i]) < threshold:
            below -= 1
        count += below
    return count


@compiled
def _differences(v, threshold, diagonal, x, left, y, right):
    """Replace entries of v below `threshold`, but for the diagonal, by those of differences of rows. left, right: 1/‖x_i‖, 1/‖y_j‖."""
    for i in range(v.shape[0]):
        row, a = v[i], x[i]
        for j in range(row.size):
            if abs(row[j]) < threshold and j != diagonal + i:
                sign = math.copysign(1.0, row[j])
                b, total, scale, other = y[j], 0.0, left[i], sign * right[j]
                for k in range(a.size):
                    difference = a[k] * scale - b[k] * other
                    total += difference * difference
                row[j] = math.copysign(0.25 * total, sign)
