"""How long an entry of a kernel takes here, measured in about a second, where and with the threads that tiles will be computed.

Rows are seeded normal ones of the data's shape: at planning time preprocessing is not fitted, and what a kernel costs hardly depends
on the rows. With a client every slot measures at the same time, as they share caches and memory. The number chooses tiles
(`pace`) and predicts time; it enters no fingerprint, the tiles that it chose are stored with the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ntkdask import seeds, threads
from ntkdask.arrays import Array, to_device, to_host
from ntkdask.execution.map_reduce import map_tiles
from ntkdask.execution.window import Done
from ntkdask.kernels import Kernel
from ntkdask.planning.pace import Pace

T = TypeVar("T")

SECONDS = 1.0
"""Of measuring, compilation not counted."""
LEAST_SECONDS, SHARE = 0.05, 0.05
"""Measuring stops at this share of what the whole matrix will take, but not before these seconds."""
LEAST_SHARE = 0.02
"""Of a small tile's seconds that its entries take at least, where a kernel passes over the rows of both sides first."""
GROWTH = 2
MOST_SAMPLES = 16


@dataclass(frozen=True)
class _CalibrateTask:
    """Measure square tiles of growing size; what the largest took."""

    kernel: Kernel
    row_shape: tuple[int, ...]
    dtype: str
    most_rows: int
    entries: float
    device: bool

    def __call__(self, tile: int) -> Pace:
        # a few entries for every thread
        rows = min(self.most_rows, max(2, math.isqrt(4 * threads.current())))
        x, y = self._rows(rows)
        # what is compiled at the first call
        self._seconds(self.kernel, x, y)
        self._seconds(self.kernel, x)
        self._seconds(self.kernel.diagonal, x)
        spent, measured_before = 0.0, (0, 0.0)
        while True:
            seconds = self._seconds(self.kernel, x, y)
            spent += seconds
            budget = min(SECONDS, max(LEAST_SECONDS, SHARE * seconds / rows**2 * self.entries))
            if rows == self.most_rows or spent + GROWTH**2 * seconds > budget:
                break
            measured_before = (rows, seconds)
            rows = min(self.most_rows, GROWTH * rows)
            x, y = self._rows(rows)
        symmetric, diagonal = self._seconds(self.kernel, x), self._seconds(self.kernel.diagonal, x)
        share = max(0.5, (symmetric - diagonal) / seconds)
        row_seconds = max(0.0, symmetric - share * seconds) / rows
        if not getattr(self.kernel, "passes_over_rows", False):
            return Pace(seconds / rows**2, share, row_seconds, rows, threads.current())
        entry = _entry_seconds((rows, seconds), measured_before)
        side = max(0.0, seconds - entry * rows**2) / (2 * rows)
        return Pace(entry, 0.5, 0.0, rows, threads.current(), side)

    def _rows(self, count: int) -> tuple[Array, Array]:
        """(x, y) of `count` rows each."""
        drawn = seeds.normals(0, ("calibrate",), 2 * count, math.prod(self.row_shape), self.dtype)
        both = to_device(drawn.reshape(2 * count, *self.row_shape), self.device)
        return both[:count], both[count:]

    def _seconds(self, call: Callable[..., Any], *rows: Array) -> float:
        started = time.perf_counter()
        found = call(*rows)
        # waits for the device
        to_host((found[-1] if isinstance(found, tuple) else found)[:1])
        return time.perf_counter() - started


def _entry_seconds(last: tuple[int, float], before: tuple[int, float]) -> float:
    """e of t(r) = e·r² + 2f·r through the last two measured (rows, seconds); at least LEAST_SHARE of all where noise leaves less."""
    (r, t), (r0, t0) = last, before
    least = LEAST_SHARE * t / r**2
    return least if not r0 or r0 == r else max(least, (t / r - t0 / r0) / (r - r0))


def on_slots(task: Callable[[int], T], client: Any, slots: int, n_threads: int | None) -> list[T]:
    """What a measuring task gives: in this process, or (client) on each of its slots at the same time, MOST_SAMPLES at most."""
    found: list[T] = []

    def receive(tile: int, done: Done[T]) -> None:
        found.append(done.value)

    count = 1 if client is None else max(1, min(slots, MOST_SAMPLES))
    map_tiles(task, range(count), client, label="calibrate", receive=receive, threads=n_threads)
    return found


def calibrate(
    kernel: Kernel,
    row_shape: tuple[int, ...],
    dtype: str,
    most_rows: int,
    *,
    entries: float = math.inf,
    client: Any = None,
    slots: int = 1,
    n_threads: int | None = None,
    device: bool = False,
) -> Pace:
    """The kernel's `Pace` for rows of this shape and dtype: in this process, or (client) as the mean over its slots, at most 16.

    most_rows: of the square tile that is measured, within which a task's memory is planned. entries: of the matrix that is planned,
    which measuring should not rival. slots: of the client. n_threads: of each task (None leaves them). device: compute on the
    GPU. Errors are those of the kernel: InputError for rows that it does not take.
    """
    task = _CalibrateTask(kernel, tuple(row_shape), dtype, most_rows, entries, device)
    found = on_slots(task, client, slots, n_threads)
    count = len(found)
    return Pace(
        sum(p.entry_seconds for p in found) / count,
        sum(p.symmetric_share for p in found) / count,
        sum(p.row_seconds for p in found) / count,
        min(p.rows for p in found),
        min(p.threads for p in found),
        sum(p.side_seconds for p in found) / count,
    )
