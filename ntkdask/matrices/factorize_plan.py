"""How a stored matrix is factorised: which tiles go into one task, in which order, and what that takes.

Pure arithmetic and integer planning. A task computes a block of b × b tiles of L: it reads 2b tiles for every b² products,
so larger blocks read less, but leave fewer tasks to share out. Every tile sees the same products in the same order whatever
the block, so blocks are chosen from memory and workers, and a resumed run may choose others: the bits stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.wording import format_bytes

Index = tuple[int, int]

BLOCK_ROWS = 8192
"""Rows of a block at most: reading is then a few per cent of multiplying, and larger ones only lose more to a kill."""
BLOCKS_PER_SLOT = 8
"""Block rows per slot where there are several: with fewer, workers wait for the diagonal (simulated: 4 each lose a fifth)."""
BLOCKS_ALONE = 4
"""Block rows for one slot: nobody waits, but a kill costs a block."""
SUBSTITUTE_COLUMNS = 256
"""Right-hand sides of one substitution task at most: as many as make multiplying a tile take as long as reading it."""


@dataclass(frozen=True)
class Block:
    """Tiles of L that one task computes: the pending ones among rows × columns of a square of the grid."""

    index: Index
    targets: tuple[Index, ...]

    def __str__(self) -> str:
        return f"block {self.index} of L (tiles {self.targets[0]} to {self.targets[-1]})"


@dataclass(frozen=True)
class FactorizePlan:
    """Sizes of a factorisation and what it costs.

    Parameters
    ----------
    n : int
        Rows of the matrix.
    tile_rows : int
        Rows and columns of a stored tile.
    dtype : str
        "float32" or "float64" of the factor.
    block_tiles : int
        Tiles along the side of a block, which is one task.
    columns : int
        Right-hand sides of one substitution.
    memory : dict
        Peak bytes by kind of task, the process's own included.
    device_memory : int
        Peak bytes on a GPU.
    flops : float
        n³/3.
    tasks : int
        Blocks.
    read_bytes, written_bytes : int
        Of all tasks together.
    """

    n: int
    tile_rows: int
    dtype: str
    block_tiles: int
    columns: int
    memory: dict[str, int]
    device_memory: int
    flops: float
    tasks: int
    read_bytes: int
    written_bytes: int

    @property
    def worker_bytes(self) -> int:
        """The largest task's peak."""
        return max(self.memory.values())


def plan_factorize(
    n: int,
    tile_rows: int,
    dtype: str = "float64",
    memory_bytes: int | None = None,
    *,
    slots: int = 1,
    matrix_dtype: str = "float32",
    device_bytes: int = 0,
) -> FactorizePlan:
    """The plan for an n × n matrix.

    Parameters
    ----------
    n : int
        Rows of the matrix.
    tile_rows : int
        Rows and columns of a stored tile.
    dtype : str
        "float32" or "float64" of the factor.
    memory_bytes : int or None
        What one task may take, the process included; None: not bounded.
    slots : int
        Tasks at a time.
    matrix_dtype : str
        Of the matrix's tiles.
    device_bytes : int
        Memory of the GPU that computes; 0 for none.

    Returns
    -------
    FactorizePlan

    Raises
    ------
    MemoryBudgetError
        With the numbers, when not even one tile a task fits.
    """
    if n < 1 or tile_rows < 1 or slots < 1:
        raise InputError(f"plan_factorize: n={n}, tile_rows={tile_rows}, slots={slots}; each must be at least 1.")
    tile_rows = min(tile_rows, n)
    n_tiles = -(-n // tile_rows)
    spread = n_tiles // (BLOCKS_ALONE if slots == 1 else BLOCKS_PER_SLOT * slots)
    most = max(1, min(spread, BLOCK_ROWS // tile_rows))

    def fits(block: int) -> bool:
        tiles = _tiles_held(block) * tile_rows**2 * np.dtype(dtype).itemsize
        on_device = not device_bytes or tiles <= 0.9 * device_bytes
        return on_device and (
            memory_bytes is None or _peaks(n, tile_rows, dtype, matrix_dtype, block)[0] <= memory_bytes
        )

    block = next((b for b in range(most, 0, -1) if fits(b)), 0)
    if not block:
        needed, has = _peaks(n, tile_rows, dtype, matrix_dtype, 1)[0], memory_bytes
        if memory_bytes is None or needed <= memory_bytes:
            needed, has = _tiles_held(1) * tile_rows**2 * np.dtype(dtype).itemsize, device_bytes
        raise MemoryBudgetError(
            f"cholesky-tile needs {format_bytes(needed)} (tiles of {tile_rows} x {tile_rows}, {dtype}) but a task has "
            f"{format_bytes(has or 0)}. Store the matrix in tiles of at most {_largest_tile(n, dtype, matrix_dtype, memory_bytes)} "
            "rows (Plan.tile_rows), or give each worker more memory."
        )
    cholesky, substitute = _peaks(n, tile_rows, dtype, matrix_dtype, block)
    columns = SUBSTITUTE_COLUMNS
    if memory_bytes is not None:
        columns = min(columns, max(1, (memory_bytes - substitute) // (4 * 8 * n)))
    tile, half = tile_rows**2, n_tiles * (n_tiles + 1) // 2
    itemsize, matrix_itemsize = np.dtype(dtype).itemsize, np.dtype(matrix_dtype).itemsize
    side = -(-n_tiles // block)
    return FactorizePlan(
        n=n,
        tile_rows=tile_rows,
        dtype=dtype,
        block_tiles=block,
        columns=columns,
        memory={"cholesky-tile": cholesky, "substitute": substitute + 4 * 8 * n * columns},
        device_memory=_tiles_held(block) * tile * itemsize,
        flops=n**3 / 3,
        tasks=side * (side + 1) // 2,
        read_bytes=(_tiles_read(n_tiles, block) * itemsize + half * matrix_itemsize) * tile,
        written_bytes=half * itemsize * tile,
    )


def blocks_of(n_tiles: int, block: int, pending: Iterable[tuple[int, ...]] | None = None) -> Iterator[Block]:
    """The blocks of the lower triangle with their pending tiles (None: all), in the order in which they should start.

    Diagonal blocks first, as soon as they can: everything below waits for them. Then column by column from the top, so that the
    next diagonal block's row comes first.
    """
    wanted = None if pending is None else set(pending)
    side = -(-n_tiles // block)
    for index in sorted(np.ndindex(side, side), key=lambda b: (b[0] != b[1], b[1], b[0])):
        rows, columns = (range(i * block, min((i + 1) * block, n_tiles)) for i in index)
        # column by column: a tile's panel is finished before the tiles right of it
        targets = tuple((i, j) for j in columns for i in rows if j <= i and (wanted is None or (i, j) in wanted))
        if targets:
            yield Block((int(index[0]), int(index[1])), targets)


def reads_of(block: Block, column: int) -> list[int]:
    """Rows r whose tile (r, column) a task for `block` reads.

    Those that its targets right of the column need, and the diagonal one for its targets in the column. Targets are not read.
    """
    needed = {r for i, j in block.targets if j > column for r in (j, i)}
    if any(j == column and i > column for i, j in block.targets):
        needed.add(column)
    return sorted(r for r in needed if (r, column) not in block.targets)


def feeding(blocks: Iterable[Block]) -> dict[Block, list[Block]]:
    """For every block those among `blocks` that must be committed before it.

    They are left of it in its row, and in the rows of its columns up to the diagonal.
    """
    by_index = {b.index: b for b in blocks}
    feeds = {}
    for b in by_index.values():
        i, j = b.index
        before = [(i, k) for k in range(j)] + [(j, k) for k in range(j + (i != j))]
        feeds[b] = [by_index[index] for index in dict.fromkeys(before) if index in by_index]
    return feeds


def _tiles_held(block: int) -> int:
    """Tiles of the factor that a task holds: the block, one column's panel beside it, and a product or one read ahead."""
    return block**2 + 2 * block + 1


def _tiles_read(n_tiles: int, block: int) -> int:
    """Tiles of the factor that all its tasks read: what `reads_of` lists, summed over the blocks of every block column."""
    total, side = 0, -(-n_tiles // block)
    for j in range(side):
        left, width = j * block, min(block, n_tiles - j * block)
        below, tasks = max(0, n_tiles - left - block), side - j - 1
        total += left * (width + below + tasks * width) + tasks * width * (width + 1) // 2
    return total


def _peaks(n: int, tile_rows: int, dtype: str, matrix_dtype: str, block: int) -> tuple[int, int]:
    """Peak bytes of a task of the factorisation, and of a substitution without its right-hand sides, the process included."""
    itemsize = np.dtype(dtype).itemsize
    tile = tile_rows**2 * itemsize
    # a tile on its way in: the file's bytes and the array; on its way out: Zarr's buffer, the checksummed copy, the file's bytes
    start = block**2 * tile + 2 * tile_rows**2 * np.dtype(matrix_dtype).itemsize
    loop = (_tiles_held(block) + 1) * tile
    commit = (block**2 + block + 3) * tile
    return BASE_BYTES + max(start, loop, commit) + 16 * n, BASE_BYTES + 4 * tile


def _largest_tile(n: int, dtype: str, matrix_dtype: str, memory_bytes: int | None) -> int:
    """The largest tile whose task fits, rounded down to 64 where it is larger."""
    rows = 1
    if memory_bytes is not None:
        left = max(0, memory_bytes - BASE_BYTES - 16 * n)
        one = _peaks(0, 1024, dtype, matrix_dtype, 1)[0] - BASE_BYTES
        rows = max(1, int(1024 * (left / one) ** 0.5))
    return rows if rows < 64 else rows // 64 * 64
