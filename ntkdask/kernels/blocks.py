"""Kernel matrices block by block: small enough to stay in cache between the product and what follows it.

A symmetric matrix computes the blocks on and below its diagonal and mirrors them. On the CPU each thread of the task takes the next
block when it is free, with BLAS on one thread. The cut into blocks does not depend on the number of threads, so neither do the bits.
On a GPU the blocks follow one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from ntkdask import threads
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.compiled import compiled

MIRROR = 16
"""Rows and columns of the pieces that are transposed at a time: one cache line of float32 each way."""


@dataclass(frozen=True)
class Block:
    """Rows `top:bottom` and columns `left:right` of a matrix.

    Parameters
    ----------
    top, bottom : int
        First row, and last row + 1.
    left, right : int
        First column, and last column + 1.
    mirrored : bool
        Whether the matrix is symmetric, so that the block's transpose is written as well.
    """

    top: int
    bottom: int
    left: int
    right: int
    mirrored: bool

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.bottom - self.top, self.right - self.left

    @property
    def diagonal(self) -> int | None:
        """The block's column in which its first row meets the diagonal of a symmetric matrix; None when it does not."""
        return self.top - self.left if self.mirrored and self.right == self.bottom else None


def cut(n: int, m: int | None, rows: int, columns: int) -> list[Block]:
    """Blocks of at most (rows, columns) that cover (n, m), or, for m=None, the lower triangle of (n, n).

    `columns` is a multiple of `rows`, so that a block meets the diagonal in all of its rows or in none.
    """
    blocks = []
    for top in range(0, n, rows):
        bottom = min(top + rows, n)
        end = bottom if m is None else m
        blocks += [Block(top, bottom, left, min(left + columns, end), m is None) for left in range(0, end, columns)]
    return blocks


def workers(blocks: int) -> int:
    """Number of threads that share so many blocks."""
    return max(1, min(threads.current(), blocks))


def over_blocks(blocks: list[Block], start: Callable[[], Callable[[Block], None]], device: bool = False) -> None:
    """Call start() once in each thread, and the function that it returns on every block that the thread takes.

    start() makes the temporaries of a thread. On a device one thread takes all blocks in order.
    """
    if device:
        fill = start()
        for block in blocks:
            fill(block)
        return
    waiting: SimpleQueue[Block] = SimpleQueue()
    for block in blocks:
        waiting.put(block)

    def drain(_: int) -> None:
        fill = start()
        while True:
            try:
                block = waiting.get_nowait()
            except Empty:
                return
            fill(block)

    count = workers(len(blocks))
    if count > 1:
        threads.on_threads(drain, range(count))
        return
    with threads.limited(1):
        drain(0)


def put(values: Array, out: Array, block: Block) -> None:
    """out[block] = values, and the transpose where the block is mirrored. values: (rows, columns), floating; cast to out's dtype."""
    if not is_device_array(out):
        ones = np.ones(max(block.shape), values.dtype)
        place(values, ones[: block.shape[0]], ones[: block.shape[1]], out, block.top, block.left, block.mirrored)
        return
    out[block.rows, block.columns] = values
    if not block.mirrored:
        return
    inner = block.diagonal
    outside = block.shape[1] if inner is None else inner
    left = slice(block.left, block.left + outside)
    out[left, block.rows] = out[block.rows, left].T
    if inner is not None:
        xp = namespace(out)
        square = out[block.rows, block.rows]
        out[block.rows, block.rows] = xp.tril(square) + xp.tril(square, -1).T


@compiled
def place(tile, scale_rows, scale_columns, out, top, left, mirrored):
    """out[top + i, left + j] = tile[i, j]·scale_rows[i]·scale_columns[j], and the transpose when mirrored.

    Parameters
    ----------
    tile : array (R, C), float32 or float64
        Overwritten.
    scale_rows, scale_columns : array (R,), (C,), of the tile's dtype
        Factors.
    out : array (n, m), C-ordered, of any floating dtype
        The matrix.
    top, left : int
        Where the tile begins in it.
    mirrored : bool
        Whether the tile's entries below the diagonal of `out` are written above it, too.
    """
    n_rows, n_columns = tile.shape
    for i in range(n_rows):
        row, scale = tile[i], scale_rows[i]
        target = out[top + i, left : left + n_columns]
        for j in range(n_columns):
            row[j] = row[j] * (scale * scale_columns[j])
        for j in range(n_columns):
            target[j] = row[j]
    if not mirrored:
        return
    for first in range(0, n_columns, MIRROR):
        last = min(first + MIRROR, n_columns)
        for start in range(0, n_rows, MIRROR):
            stop = min(start + MIRROR, n_rows)
            for j in range(first, last):
                target = out[left + j, top : top + n_rows]
                for i in range(max(start, left + j - top + 1), stop):
                    target[i] = tile[i, j]
