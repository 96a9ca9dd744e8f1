"""How large the tiles of a kernel matrix are: memory of a task against the budget, seconds, tasks, flops, bytes on disk.

Pure arithmetic over the kernel's declared workspace and its measured pace. Refuses, with the numbers, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ntkdask.cache import DEFAULT_BYTES
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.kernels.base import Kernel, entry_size, parts_of
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
class MatrixPlan:
    """Sizes of a kernel matrix and what it costs.

    m: columns; None for a symmetric matrix, of which one triangle is computed. memory_bytes: peak of a process in the task of one
    tile, its own included; device_bytes: on a GPU. keeps_rows: preprocessed rows stay in each process's cache between tiles.
    flops: of the products alone, 2·d an entry. slots: tasks at once, which the seconds are for. pace: None when the kernel was not
    measured. entry: rows of the matrix for one row of data; n, m and the tiles count rows of data.
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
    n: int
    m: int | None
    row_shape: tuple[int, ...]
    row_bytes: int
    itemsize: int
    states_bytes: int
    on_device: bool
    entry: int

    @property
    def n_parts(self) -> int:
        return len(parts_of(self.kernel)) or 1

    def batch(self, rows: int) -> int:
        return max(1, min(rows, BATCH_BYTES // max(1, self.row_bytes)))

    def rows_bytes(self, rows: int) -> int:
        return rows * math.prod(self.row_shape) * self.itemsize

    def cached(self, keeps_rows: bool) -> int:
        return min(DEFAULT_BYTES, self.rows_bytes(self.n + (self.m or 0))) if keeps_rows else 0

    def memory(self, rows: int, columns: int, keeps_rows: bool) -> int:
        """Peak bytes of the process: rows of both sides, and the larger of reading them, the kernel's work, writing the tile."""
        batch = self.batch(max(rows, columns))
        fitted = FittedPreprocessor(self.row_shape, "float32" if self.itemsize == 4 else "float64")
        # read twice: the chunks a range touches, and the range; then put together from its batches
        reading = 2 * batch * self.row_bytes + fitted.workspace_bytes(batch, self.row_shape, self.itemsize)
        reading += self.rows_bytes(max(rows, columns))
        tile = rows * columns * self.itemsize * self.entry**2
        # writing: Zarr's buffer, the checksummed copy and the bytes that go to the file; every part of the kernel waits
        writing = (self.n_parts + 3) * tile
        base = BASE_BYTES + self.states_bytes
        if self.on_device:
            return base + max(reading, writing)
        here = self.cached(keeps_rows) + self.rows_bytes(rows + columns)
        return base + here + max(reading, self.work(rows, columns), writing)

    def device(self, rows: int, columns: int, keeps_rows: bool) -> int:
        """Peak bytes on the GPU."""
        return self.states_bytes + self.cached(keeps_rows) + self.rows_bytes(rows + columns) + self.work(rows, columns)

    def work(self, rows: int, columns: int) -> int:
        return self.kernel.workspace_bytes(rows, columns, self.itemsize, self.row_shape)


def plan_matrix(
    kernel: Kernel,
    n: int,
    m: int | None,
    row_shape: tuple[int, ...],
    row_bytes: int,
    dtype: str,
    budget: int | None = None,
    *,
    device_budget: int = 0,
    states_bytes: int = 0,
    tile_rows: int | None = None,
    tile_cols: int | None = None,
    pace: Pace | None = None,
    slots: int = 1,
) -> MatrixPlan:
    """Choose tiles of at most 2 048² whose tasks fit the budget; MemoryBudgetError with the numbers when none does.

    m: columns, None for a symmetric matrix. row_bytes: of one row as stored. budget: bytes of a process, its own included; None:
    not bounded. device_budget: bytes of the GPU that tasks compute on, 0 without. states_bytes: what the preprocessing's
    fitted states hold. tile_rows, tile_cols: sizes that were asked for; they are taken or refused. pace: with it, tiles that
    were not asked for are no larger than `Pace.tile_rows` on so many slots says; without, sizes do not depend on how many there are.
    """
    entry = entry_size(kernel, row_shape)
    costs = _Costs(kernel, n, m, row_shape, row_bytes, np.dtype(dtype).itemsize, states_bytes, device_budget > 0, entry)
    columns_total = n if m is None else m
    if m is None and None not in (tile_rows, tile_cols) and tile_rows != tile_cols:
        raise InputError(
            f"kernel_matrix: tile_rows={tile_rows} and tile_cols={tile_cols}; a symmetric matrix has square tiles."
        )
    if m is None:
        tile_rows = tile_cols = tile_rows or tile_cols
    most_default = max(1, TILE_ROWS // entry)
    default = most_default if pace is None else min(most_default, pace.tile_rows(n, m, slots))
    rows = min(n, tile_rows or min(default, _default_rows(n)))
    columns = min(columns_total, tile_cols or min(default, _default_rows(columns_total)))

    limits = []
    if budget is not None:
        limits.append((budget, costs.memory, "a task", f"the process itself {format_bytes(BASE_BYTES)}"))
    if device_budget:
        limits.append((device_budget, costs.device, "a GPU", "on the device"))
    most = max(rows, columns)

    def held(measure: Callable[[int, int, bool], int], keeps_rows: bool, size: int) -> int:
        return measure(min(rows, size), min(columns, size), keeps_rows)

    # rows are kept where that costs no tile size: reading them again is cheap beside a kernel
    keeps = all(held(measure, True, most) <= bound for bound, measure, _, _ in limits)
    what = f"kernel-tile of {type(kernel).__name__} (row_shape={row_shape}, {dtype})"
    size = most
    for bound, measure, where, own in limits:
        fitting = largest_rows(
            bound, partial(held, measure, keeps), most, f"{what}, {own},", f"Give {where} more memory."
        )
        if fitting < most and (tile_rows or tile_cols):
            raise MemoryBudgetError(
                f"{what} needs {format_bytes(held(measure, keeps, most))} for tiles of {rows} x {columns} ({own}) but {where} has "
                f"{format_bytes(bound)}. Use tile_rows <= {fitting}, or give {where} more memory."
            )
        size = min(size, fitting)
    rows, columns = min(rows, size), min(columns, size)
    return replace(_with_totals(costs, rows, columns, dtype, keeps), slots=slots, pace=pace)


def _default_rows(n: int) -> int:
    """Rows of a tile for n rows: even blocks of at most 2 048, a few of them also when n is small, multiples of 64."""
    blocks = max(min(LEAST_BLOCKS, -(-n // LEAST_TILE_ROWS)), -(-n // TILE_ROWS))
    return min(TILE_ROWS, -(-n // (64 * blocks)) * 64)


def _with_totals(costs: _Costs, rows: int, columns: int, dtype: str, keeps_rows: bool) -> MatrixPlan:
    n, m = costs.n, costs.m
    blocks = -(-n // rows)
    if m is None:
        tasks = blocks * (blocks + 1) // 2
        last = n - (blocks - 1) * rows
        # whole diagonal tiles are stored
        entries = (n * n + (blocks - 1) * rows * rows + last * last) // 2
    else:
        tasks, entries = blocks * -(-m // columns), n * m
    # a chunk is written whole, also at a ragged edge
    disk = tasks * rows * columns * costs.itemsize * costs.n_parts * costs.entry**2
    return MatrixPlan(
        n,
        m,
        rows,
        columns,
        costs.batch(max(rows, columns)),
        dtype,
        keeps_rows,
        costs.memory(rows, columns, keeps_rows),
        costs.device(rows, columns, keeps_rows) if costs.on_device else 0,
        tasks,
        2.0 * math.prod(costs.row_shape) * entries,
        disk,
        entry=costs.entry,
    )
