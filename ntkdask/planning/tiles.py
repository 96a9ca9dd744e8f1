"""Tiles, slabs and budgets: pure integer planning, no arrays.

A map cuts rows (and columns) into tiles; a reduction cuts rows into slabs whose partial sums are combined in a fixed binary tree.
Sizes follow from the data, the stated budget and, where features are slow, their pace (measured once and stored with the plan), never
from the number of workers, so that a run gives equal bits on any cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.planning.pace import TILE_SECONDS
from ntkdask.wording import format_bytes

SLAB_ROWS = 4096
"""Least rows of a slab, but where time cuts it: with fewer, committing its m²/2 sums costs over a tenth of accumulating them."""
MOST_SLABS = 1024
"""The most slabs into which time cuts a sum: each may have to be kept for a while."""


@dataclass(frozen=True)
class Plan:
    """How to cut a computation; the planner chooses what is None.

    Parameters
    ----------
    tile_rows : int, optional
        Rows of a stored tile; of a slab for reductions.
    tile_cols : int, optional
        Columns of a stored tile.
    memory_bytes : int, optional
        Budget of one task.
    dtype : {"float32", "float64"}, optional
        Of the numerics.

    Raises
    ------
    InputError
        For sizes that are not integers >= 1, and for another dtype.
    """

    tile_rows: int | None = None
    tile_cols: int | None = None
    memory_bytes: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("tile_rows", "tile_cols", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"Plan: {name} is {value!r}, expected an integer >= 1.")
        if self.dtype not in (None, "float32", "float64"):
            raise InputError(f"Plan: dtype is {self.dtype!r}, expected 'float32' or 'float64'.")


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) and, for matrices, columns [col_start, col_stop), at `index` in its grid."""

    index: tuple[int, ...]
    start: int
    stop: int
    col_start: int = 0
    col_stop: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    def __str__(self) -> str:
        columns = f", columns {self.col_start}:{self.col_stop}" if self.col_stop else ""
        return f"tile {self.index} (rows {self.start}:{self.stop}{columns})"


@dataclass(frozen=True)
class TileGrid:
    """An (n, m) matrix cut into tiles, the last of each axis ragged.

    Parameters
    ----------
    n, m : int
        Rows and columns of the matrix.
    tile_rows, tile_cols : int
        Rows and columns of a tile.
    symmetric : bool
        Keep the tiles on and below the diagonal; then n = m and tile_rows = tile_cols.
    """

    n: int
    m: int
    tile_rows: int
    tile_cols: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if min(self.n, self.m, self.tile_rows, self.tile_cols) < 1:
            raise InputError(f"TileGrid: sizes must be at least 1, got {self}.")
        if self.symmetric and (self.n != self.m or self.tile_rows != self.tile_cols):
            raise InputError(f"TileGrid: a symmetric grid is square with square tiles, got {self}.")

    def __iter__(self) -> Iterator[Tile]:
        for i, start in enumerate(range(0, self.n, self.tile_rows)):
            for j, col in enumerate(range(0, self.m, self.tile_cols)):
                if not self.symmetric or j <= i:
                    yield Tile(
                        (i, j), start, min(start + self.tile_rows, self.n), col, min(col + self.tile_cols, self.m)
                    )


def row_tiles(n: int, tile_rows: int) -> list[Tile]:
    """[0, n) in tiles of `tile_rows` rows."""
    return [Tile((i,), start, min(start + tile_rows, n)) for i, start in enumerate(range(0, n, tile_rows))]


def slab_rows(n: int, row_seconds: float = 0.0) -> int:
    """Rows of a slab for n rows: 2^i slabs of 4 096 to 8 192 rows; when n is small, at most 8 slabs of at least 512 rows.

    Where features take row_seconds a row, more slabs: as many as bring one to TILE_SECONDS, MOST_SLABS at most.
    """
    least = SLAB_ROWS if n >= 8 * SLAB_ROWS else max(512, -(-n // 8))
    count = 1
    while n // (2 * count) >= least:
        count *= 2
    while count < min(n, MOST_SLABS) and -(-n // count) * row_seconds > TILE_SECONDS:
        count *= 2
    return -(-n // count)


def largest_rows(budget: int, bytes_of: Callable[[int], int], limit: int, subject: str, advice: str = "") -> int:
    """The most rows <= limit with bytes_of(rows) <= budget, a multiple of 64 where over 64 (or the limit).

    Parameters
    ----------
    budget : int
        Bytes of a task.
    bytes_of : callable
        Bytes that a task needs for a number of rows; must not decrease.
    limit : int
        The most rows that are useful.
    subject : str
        What needs the bytes, as the subject of the message.
    advice : str
        What the message advises to do; by default to give the workers more memory.

    Returns
    -------
    int

    Raises
    ------
    MemoryBudgetError
        With the numbers, when not even one row fits.
    """
    if bytes_of(1) > budget:
        raise MemoryBudgetError(
            f"{subject} needs {format_bytes(bytes_of(1))} for one row, but a task has {format_bytes(budget)}. "
            + (advice or "Give the workers more memory.")
        )
    low, high = 1, max(1, limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(middle) <= budget else (low, middle - 1)
    return low if low <= 64 or low == limit else low // 64 * 64
