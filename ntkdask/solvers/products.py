"""Products of one tile with float64 vectors: T·R and Tᵀ·L in one pass over the tile.

Conjugate gradients on a float32 matrix still need products that are right to float64 rounding: the entries of the matrix are
given, but its product with a vector is not to be rounded once more. A strip of rows is cast to float64 where it stays in the
second-level cache, and both products are taken from there: 3.0 ms for a float32 tile of 2 048² on one thread with one
right-hand side, 8.2 ms with eleven, against 2.8 ms and 14.5 ms for the two float64 products of a whole float64 tile. All strips
share one buffer. Dask's nanny sets MALLOC_TRIM_THRESHOLD_, under which every allocation of a strip would be fresh pages from
the system: 19 ms of processor time instead of 3. Called by `matrices.operator` for every tile of a stored matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ntkdask.arrays import Array, is_device_array, namespace

STRIP_ROWS = 32
"""Rows of a strip: 512 KiB in float64 for tiles of 2 048 columns."""
DEVICE_STRIP_ROWS = 1024


def tile_product(tile: Array, right: Array) -> Array:
    """T·R in float64: tile (r, c) float32 or float64, right (c, k) float64 → (r, k)."""
    xp = namespace(tile)
    out = xp.empty((tile.shape[0], right.shape[1]))
    for rows, strip in _strips(tile):
        xp.matmul(strip, right, out=out[rows])
    return out


def tile_products(tile: Array, right: Array, left: Array) -> tuple[Array, Array]:
    """(T·R, Tᵀ·L) in float64: tile (r, c) float32 or float64, right (c, k), left (r, k) float64 → (r, k), (c, k)."""
    xp = namespace(tile)
    down, across = xp.empty((tile.shape[0], right.shape[1])), xp.zeros((tile.shape[1], left.shape[1]))
    of_strip = xp.empty(across.shape)
    for rows, strip in _strips(tile):
        xp.matmul(strip, right, out=down[rows])
        xp.matmul(strip.T, left[rows], out=of_strip)
        across += of_strip
    return down, across


def products_bytes(rows: int, columns: int, k: int) -> int:
    """Peak bytes of `tile_products` on the host beyond tile and vectors: results, one strip, one product of a strip."""
    return 8 * (k * (rows + 2 * columns) + STRIP_ROWS * columns)


def _strips(tile: Array) -> Iterator[tuple[slice, Array]]:
    """(rows, those rows of the tile in float64); the latter are valid until the next strip."""
    size = DEVICE_STRIP_ROWS if is_device_array(tile) else STRIP_ROWS
    buffer = None if tile.dtype == np.float64 else namespace(tile).empty((min(size, tile.shape[0]), tile.shape[1]))
    for start in range(0, tile.shape[0], size):
        rows = slice(start, min(start + size, tile.shape[0]))
        if buffer is None:
            yield rows, tile[rows]
            continue
        strip = buffer[: rows.stop - start]
        strip[...] = tile[rows]
        yield rows, strip
