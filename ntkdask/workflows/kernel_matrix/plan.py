"""How large the tiles of a kernel matrix are: memory of a task against the budget, seconds, tasks, flops, bytes on disk.

Pure arithmetic over the memory that a kernel declares and its measured pace. Refuses, with the numbers, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ntkdask.cache import DEFAULT_BYTES
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.kernels.base import Kernel, completed, parts_of
from ntkdask.planning.pace import Pace, elapsed_seconds
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.planning.tiles import largest_rows
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.wording import format_bytes

TILE_ROWS = 2048
"""Rows of a tile unless memory says less: 16 MiB in float32, which a disk reads at its full rate."""
LEAST_TILE_ROWS = 256
LEAST_BLOCKS = 4
"""Blocks of rows of a small matrix, so that a few workers find something to do."""
BATCH_BYTES = 64 * 2**20
"""Stored bytes of rows that are read and preprocessed at a time."""


@dataclass(frozen=True)
class MatrixShape:
    """What the sizes of a kernel matrix follow from.

    Parameters
    ----------
    n : int
        Rows of data.
    m : int or None
        Columns, counted in rows of data; None for a symmetric matrix, of which one triangle is computed.
    row_shape : tuple of int
        Shape of one row of data.
    row_bytes : int
        Bytes of one row as stored.
    dtype : str
        "float32" or "float64" of the matrix.
    """

    n: int
    m: int | None
    row_shape: tuple[int, ...]
    row_bytes: int
    dtype: str

    @property
    def columns(self) -> int:
        """Columns, counted in rows of data, of a symmetric matrix too."""
        return self.n if self.m is None else self.m

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the matrix."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class MatrixPlan:
    """Sizes of a kernel matrix and what it costs.

    Parameters
    ----------
    n : int
        Rows of data.
    m : int or None
        Columns, counted in rows of data; None for a symmetric matrix, of which one triangle is computed.
    tile_rows, tile_cols : int
        Rows of data of a tile, on either side.
    batch_rows : int
        Rows that are read and preprocessed at a time.
    dtype : str
        "float32" or "float64" of the matrix.
    keeps_rows : bool
        Whether preprocessed rows stay in each process's cache between tiles.
    memory_bytes : int
        Peak of a process in the task of one tile, the process's own included.
    device_bytes : int
        Peak on a GPU in that task; 0 without one.
    tasks : int
        Tiles that are computed.
    flops : float
        Of the products alone: 2·d for an entry of rows of d numbers.
    disk_bytes : int
        What all tiles take in the store.
    slots : int
        Tasks at once, which the seconds are for.
    pace : Pace or None
        The kernel's measured speed; None when it was not measured.
    entry : int
        Rows of the matrix for one row of data: k for a kernel whose entries are k × k matrices.
    parts : tuple of str
        Names of the matrices of a kernel that gives several; empty for one.
    """

    n: int
    m: int | None
    tile_rows: int
    tile_cols: int
    batch_rows: int
    dtype: str
    keeps_rows: bool
    memory_bytes: int
    device_bytes: int
    tasks: int
    flops: float
    disk_bytes: int
    slots: int = 1
    pace: Pace | None = None
    entry: int = 1
    parts: tuple[str, ...] = ()

    @property
    def tiles(self) -> int:
        """How many tiles are computed."""
        return self.tasks

    @property
    def peak_bytes(self) -> int:
        """Peak of a process in the task of one tile."""
        return self.memory_bytes

    @property
    def tile_seconds(self) -> float | None:
        """Predicted seconds of a whole tile of different rows; None without a pace."""
        return None if self.pace is None else self.pace.tile_seconds(self.tile_rows, self.tile_cols)

    @property
    def work_seconds(self) -> float | None:
        """Predicted seconds of all tiles in one slot: over 3 600, the GPU-hours where a slot is a GPU. None without a pace."""
        return None if self.pace is None else self.pace.work_seconds(self.n, self.m, self.tile_rows)

    @property
    def seconds(self) -> float | None:
        """Predicted seconds on `slots` slots; None without a pace."""
        work = self.work_seconds
        return None if work is None else elapsed_seconds(work, self.tasks, self.slots)

    def to_json(self) -> dict[str, Any]:
        """As a table."""
        return asdict(self)


@dataclass(frozen=True)
class _Costs:
    """What the tasks of a matrix hold, by the rows and columns of their tile."""

    kernel: Kernel
    shape: MatrixShape
    entry: int
    parts: tuple[str, ...]
    on_device: bool

    @property
    def n_parts(self) -> int:
        return len(self.parts) or 1

    def batch(self, rows: int) -> int:
        return max(1, min(rows, BATCH_BYTES // max(1, self.shape.row_bytes)))

    def rows_bytes(self, rows: int) -> int:
        return rows * math.prod(self.shape.row_shape) * self.shape.itemsize

    def cached(self, keeps_rows: bool) -> int:
        return min(DEFAULT_BYTES, self.rows_bytes(self.shape.n + (self.shape.m or 0))) if keeps_rows else 0

    def memory(self, rows: int, columns: int, keeps_rows: bool) -> int:
        """Peak bytes of the process: rows of both sides, and the larger of reading them, the kernel's work, writing the tile."""
        batch, shape = self.batch(max(rows, columns)), self.shape
        fitted = FittedPreprocessor(shape.row_shape, "float32" if shape.itemsize == 4 else "float64")
        # read twice: the chunks a range touches, and the range; then put together from its batches
        reading = 2 * batch * shape.row_bytes + fitted.workspace_bytes(batch, shape.row_shape, shape.itemsize)
        reading += self.rows_bytes(max(rows, columns))
        tile = rows * columns * shape.itemsize * self.entry**2
        # writing: Zarr's buffer, the checksummed copy and the bytes that go to the file; every part of the kernel waits
        writing = (self.n_parts + 3) * tile
        if self.on_device:
            return BASE_BYTES + max(reading, writing)
        here = self.cached(keeps_rows) + self.rows_bytes(rows + columns)
        return BASE_BYTES + here + max(reading, self.work(rows, columns), writing)

    def device(self, rows: int, columns: int, keeps_rows: bool) -> int:
        """Peak bytes on the GPU."""
        return self.cached(keeps_rows) + self.rows_bytes(rows + columns) + self.work(rows, columns)

    def work(self, rows: int, columns: int) -> int:
        return self.kernel.workspace_bytes(rows, columns, self.shape.itemsize, self.shape.row_shape)


@dataclass(frozen=True)
class _Limit:
    """Bytes that a task may hold somewhere, and how many a tile of so many rows and columns takes there."""

    bytes: int
    needed: Callable[[int, int, bool], int]
    holder: str
    note: str


def plan_matrix(
    kernel: Kernel,
    shape: MatrixShape,
    budget: int | None = None,
    *,
    device_budget: int = 0,
    tile_rows: int | None = None,
    tile_cols: int | None = None,
    pace: Pace | None = None,
    slots: int = 1,
) -> MatrixPlan:
    """Choose tiles of at most 2 048² whose tasks fit the budget.

    Parameters
    ----------
    kernel : Kernel
        Whose matrix is planned.
    shape : MatrixShape
        Rows, columns and dtype.
    budget : int or None
        Bytes of a process, its own included; None: not bounded.
    device_budget : int
        Bytes of the GPU that tasks compute on; 0 without one.
    tile_rows, tile_cols : int or None
        Sizes that were asked for; they are taken or refused.
    pace : Pace or None
        With it, tiles that were not asked for are no larger than `Pace.tile_rows` says for `slots` slots. Without it, sizes do not
        depend on how many slots there are.
    slots : int
        Tasks at once.

    Returns
    -------
    MatrixPlan

    Raises
    ------
    MemoryBudgetError
        With the numbers, when no tile fits, or not the one that was asked for.
    InputError
        For tiles of a symmetric matrix that are not square.
    """
    whole = completed(kernel)
    costs = _Costs(
        kernel=whole,
        shape=shape,
        entry=whole.entry_size(shape.row_shape),
        parts=parts_of(kernel),
        on_device=device_budget > 0,
    )
    rows, columns = _wanted_tile(costs, tile_rows, tile_cols, pace, slots)
    limits = []
    if budget is not None:
        limits.append(_Limit(budget, costs.memory, "a task", f"the process itself {format_bytes(BASE_BYTES)}"))
    if device_budget:
        limits.append(_Limit(device_budget, costs.device, "a GPU", "on the device"))
    # rows are kept where that costs no tile size: reading them again is cheap beside a kernel
    keeps = all(limit.needed(rows, columns, True) <= limit.bytes for limit in limits)
    task = f"kernel-tile of {type(kernel).__name__} (row_shape={shape.row_shape}, {shape.dtype})"
    is_asked = bool(tile_rows or tile_cols)
    size = min([max(rows, columns), *(_fitting(limit, rows, columns, keeps, task, is_asked) for limit in limits)])
    found = _with_totals(costs, min(rows, size), min(columns, size), keeps)
    return replace(found, slots=slots, pace=pace)


def _wanted_tile(
    costs: _Costs, tile_rows: int | None, tile_cols: int | None, pace: Pace | None, slots: int
) -> tuple[int, int]:
    """(rows, columns) of a tile as asked for, or as time and TILE_ROWS allow, whatever memory there is."""
    shape = costs.shape
    if shape.m is None:
        if None not in (tile_rows, tile_cols) and tile_rows != tile_cols:
            raise InputError(
                f"kernel_matrix: tile_rows={tile_rows} and tile_cols={tile_cols}; a symmetric matrix has square tiles."
            )
        tile_rows = tile_cols = tile_rows or tile_cols
    most = max(1, TILE_ROWS // costs.entry)
    if pace is not None:
        most = min(most, pace.tile_rows(shape.n, shape.m, slots))
    rows = min(shape.n, tile_rows or min(most, _default_rows(shape.n)))
    return rows, min(shape.columns, tile_cols or min(most, _default_rows(shape.columns)))


def _fitting(limit: _Limit, rows: int, columns: int, keeps_rows: bool, task: str, is_asked: bool) -> int:
    """The most rows and columns of a tile within rows × columns that fit; MemoryBudgetError when none do, or not those asked for."""

    def needed(size: int) -> int:
        return limit.needed(min(rows, size), min(columns, size), keeps_rows)

    most = max(rows, columns)
    fitting = largest_rows(limit.bytes, needed, most, f"{task}, {limit.note},", f"Give {limit.holder} more memory.")
    if fitting < most and is_asked:
        raise MemoryBudgetError(
            f"{task} needs {format_bytes(needed(most))} for tiles of {rows} x {columns} ({limit.note}) but {limit.holder} has "
            f"{format_bytes(limit.bytes)}. Use tile_rows <= {fitting}, or give {limit.holder} more memory."
        )
    return fitting


def _default_rows(n: int) -> int:
    """Rows of a tile for n rows: even blocks of at most 2 048, a few of them also when n is small, multiples of 64."""
    blocks = max(min(LEAST_BLOCKS, -(-n // LEAST_TILE_ROWS)), -(-n // TILE_ROWS))
    return min(TILE_ROWS, -(-n // (64 * blocks)) * 64)


def _with_totals(costs: _Costs, rows: int, columns: int, keeps_rows: bool) -> MatrixPlan:
    """The plan of a matrix in tiles of rows × columns."""
    shape = costs.shape
    n, m = shape.n, shape.m
    blocks = -(-n // rows)
    if m is None:
        tasks = blocks * (blocks + 1) // 2
        last = n - (blocks - 1) * rows
        # whole diagonal tiles are stored
        entries = (n * n + (blocks - 1) * rows * rows + last * last) // 2
    else:
        tasks, entries = blocks * -(-m // columns), n * m
    return MatrixPlan(
        n=n,
        m=m,
        tile_rows=rows,
        tile_cols=columns,
        batch_rows=costs.batch(max(rows, columns)),
        dtype=shape.dtype,
        keeps_rows=keeps_rows,
        memory_bytes=costs.memory(rows, columns, keeps_rows),
        device_bytes=costs.device(rows, columns, keeps_rows) if costs.on_device else 0,
        tasks=tasks,
        flops=2.0 * math.prod(shape.row_shape) * entries,
        # a chunk is written whole, also at a ragged edge
        disk_bytes=tasks * rows * columns * shape.itemsize * costs.n_parts * costs.entry**2,
        entry=costs.entry,
        parts=costs.parts,
    )
