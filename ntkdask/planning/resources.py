"""Resources of a cluster, sizes of a run, and costs of its tasks.

Pure numbers. Every workflow makes its plan from resources, and checks its costs before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from ntkdask.arrays import host_cores
from ntkdask.errors import MemoryBudgetError, StoreError
from ntkdask.planning.pace import Pace, RowPace
from ntkdask.planning.tiles import slab_rows
from ntkdask.wording import format_bytes

BASE_BYTES = 320 * 2**20
"""Memory of a worker before its first task: Python, NumPy, SciPy, Numba, Zarr, Dask and its buffers (220 to 300 MiB measured)."""


BATCH_ROWS = 4096
"""Rows of a batch, whose float32 products are added in float64: larger batches lose accuracy, smaller ones take longer."""


PREDICT_TILE = 8192
"""The most rows that one task predicts."""


@dataclass(frozen=True)
class Resources:
    """The resources that a plan may use.

    Parameters
    ----------
    memory_bytes : int or None
        Memory of one task on the smallest worker. None: unknown, not bounded.
    device_bytes : int
        Memory of the smallest worker's GPU. 0: no GPU.
    threads : int
        Threads of a task while the other slots of its host run one, too.
    solve_threads : int
        Threads of a task that runs alone on its host.
    slots : int
        How many tasks run at once.
    pace : Pace or None
        Measured pace of the kernel that is computed. None: not measured.
    row_pace : RowPace or None
        Measured pace of the feature map that is computed. None: not measured.
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
        """The resources of one process alone, with every core of the machine; its memory is not bounded."""
        return cls(None, 0, host_cores(), host_cores(), 1)


@dataclass(frozen=True)
class RidgePlan:
    """Sizes of a ridge run: chosen once, stored, and used again on resume, since they decide the bits.

    Parameters
    ----------
    dtype : str
        Of the numerics, "float32" or "float64".
    slab_rows : int
        Rows that one task of a reduction sums.
    batch_rows : int
        Rows that a task holds at a time.
    tile_rows : int
        Rows that one task predicts.
    threads : int
        BLAS, OpenMP and Numba threads of a task.
    solve_threads : int
        Threads of the tasks that factorise.
    device : bool
        Whether tasks compute on a GPU.
    """

    dtype: str
    slab_rows: int
    batch_rows: int
    tile_rows: int
    threads: int
    solve_threads: int
    device: bool

    @classmethod
    def unbounded(cls, n_total: int, dtype: str, resources: Resources, slab: int | None = None) -> RidgePlan:
        """The sizes for n_total rows where memory is not bounded. slab: the requested rows of a slab (None: chosen here)."""
        slab = slab or slab_rows(n_total, resources.row_pace.row_seconds if resources.row_pace else 0.0)
        return cls(
            dtype=dtype,
            slab_rows=slab,
            batch_rows=min(slab, BATCH_ROWS),
            tile_rows=min(slab, PREDICT_TILE),
            threads=resources.threads,
            solve_threads=resources.solve_threads,
            device=resources.device_bytes > 0,
        )

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Self:
        """The sizes from the table that a record holds; StoreError where they are none, as an edited one may."""
        sizes = {k: v for k, v in table.items() if k.endswith(("_rows", "_tile", "threads"))}
        wrong = [f"{k} is {v!r}" for k, v in sizes.items() if isinstance(v, bool) or not isinstance(v, int) or v < 1]
        try:
            plan = cls(**table)
        except TypeError as error:
            wrong.append(str(error).removeprefix(f"{cls.__name__}."))
        if wrong:
            raise StoreError(
                f"the plan in record.json is damaged: {', '.join(wrong)}. Start the run again with --overwrite (overwrite=True)."
            )
        return plan

    def to_json(self) -> dict[str, Any]:
        """The sizes as a table for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """The costs of a run.

    Parameters
    ----------
    memory : dict
        {name of a task: peak bytes of its worker, those of the process itself included}.
    device_memory : int
        Peak bytes on the GPU; 0 without one.
    flops : float
        Of the whole run.
    tasks : int
        Their number.
    disk_bytes : int
        What the run writes.
    """

    memory: dict[str, int]
    device_memory: int
    flops: float
    tasks: int
    disk_bytes: int

    @property
    def worker_bytes(self) -> int:
        """The peak bytes of the largest task."""
        return max(self.memory.values())


def require_memory(costs: Costs, resources: Resources) -> None:
    """MemoryBudgetError when a run's stored plan, which decides its bits, does not fit the present workers."""
    limit = resources.memory_bytes
    if limit is not None and costs.worker_bytes > limit:
        worst = max(costs.memory, key=lambda name: costs.memory[name])
        raise MemoryBudgetError(
            f"{worst} of the run's stored plan needs {format_bytes(costs.worker_bytes)} but a worker has {format_bytes(limit)}. "
            "Resume with workers as large as the first run's, or start again with --overwrite."
        )
