"""What a plan may count on and what it chose: resources of a cluster, sizes of a run, peak bytes of its tasks.

Pure numbers; every workflow makes its plan of these, and asks the same questions of it before it starts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ntkdask.arrays import host_cores
from ntkdask.errors import MemoryBudgetError
from ntkdask.planning.pace import Pace, RowPace
from ntkdask.planning.tiles import slab_rows
from ntkdask.wording import format_bytes

BASE_BYTES = 320 * 2**20
"""A worker before its first task: Python, NumPy, SciPy, Numba, Zarr, Dask and its buffers (220 to 300 MiB measured)."""


BATCH_ROWS = 4096
"""Rows of a batch: more float32 products before they are added in float64 cost accuracy, fewer cost rate."""


PREDICT_TILE = 8192
"""Rows that one task predicts, at most."""


@dataclass(frozen=True)
class Resources:
    """What a plan may count on: the smallest worker's memory for one task (None: unknown), its device memory (0: no GPU),
    threads of a task among others and of one alone on its host, how many tasks run at once, and the measured pace of the kernel, or of
    the map, at hand (None: not measured).
    """

    memory_bytes: int | None = None
    device_bytes: int = 0
    threads: int = 1
    solve_threads: int = 1
    slots: int = 1
    pace: Pace | None = None
    row_pace: RowPace | None = None

    @classmethod
    def here(cls) -> Resources:
        """This process alone, with every core; its memory is not bounded."""
        return cls(None, 0, host_cores(), host_cores(), 1)


@dataclass(frozen=True)
class RidgePlan:
    """Sizes of a ridge run, chosen once, stored, and used again on resume: they and the threads decide the bits."""

    dtype: str
    slab_rows: int
    batch_rows: int
    tile_rows: int
    threads: int
    solve_threads: int
    device: bool

    @classmethod
    def unbounded(cls, n_total: int, dtype: str, resources: Resources, slab: int | None = None) -> RidgePlan:
        """Sizes for n_total rows where memory says nothing. slab: rows of a slab that was asked for."""
        slab = slab or slab_rows(n_total)
        return cls(
            dtype=dtype,
            slab_rows=slab,
            batch_rows=min(slab, BATCH_ROWS),
            tile_rows=min(slab, PREDICT_TILE),
            threads=resources.threads,
            solve_threads=resources.solve_threads,
            device=resources.device_bytes > 0,
        )

    def to_json(self) -> dict[str, Any]:
        """As a table."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """Peak bytes of a worker by kind of task, the process's own included; flops, tasks and disk bytes of the run."""

    memory: dict[str, int]
    device_memory: int
    flops: float
    tasks: int
    disk_bytes: int

    @property
    def worker_bytes(self) -> int:
        """The largest task's peak."""
        return max(self.memory.values())


def require_memory(costs: Costs, resources: Resources) -> None:
    """MemoryBudgetError when a stored plan, which decides the bits of a resumed run, does not fit the workers there are now."""
    limit = resources.memory_bytes
    if limit is not None and costs.worker_bytes > limit:
        worst = max(costs.memory, key=lambda name: costs.memory[name])
        raise MemoryBudgetError(
            f"{worst} of the run's stored plan needs {format_bytes(costs.worker_bytes)} but a worker has {format_bytes(limit)}. "
            "Go on with workers as large as the first run's, or plan anew with --overwrite."
        )
