"""How long an entry of a kernel takes here, measured in about a second, where and with the threads that tiles will be computed.

Rows are seeded normal ones of the data's shape: at planning time preprocessing is not fitted, and the cost of a kernel hardly depends
on the rows. With a client every slot measures at the same time, as they share caches and memory. The number chooses tiles
(`planning.pace`) and predicts time. It enters no fingerprint; the tiles that it chose are stored with the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ntkdask import seeds, threads
from ntkdask.arrays import Array, to_device, to_host
from ntkdask.execution.site import Site
from ntkdask.kernels import Kernel
from ntkdask.kernels.base import completed
from ntkdask.planning.pace import Pace

SECONDS = 1.0
"""Of measuring, compilation not counted."""
LEAST_SECONDS, SHARE = 0.05, 0.05
"""Measuring stops at this share of what the whole matrix will take, but not before these seconds."""
LEAST_SHARE = 0.02
"""Of a small tile's seconds that its entries take at least, where a kernel passes over the rows of both sides first."""
GROWTH = 2
"""Of the measured tile's side, from one measurement to the next."""


@dataclass(frozen=True)
class _CalibrateTask:
    """Measure square tiles of growing size, and tell what the largest took."""

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
        # the first calls compile
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
        if not completed(self.kernel).passes_over_rows:
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
        values = call(*rows)
        # waits for the device
        to_host((values[-1] if isinstance(values, tuple) else values)[:1])
        return time.perf_counter() - started


def _entry_seconds(last: tuple[int, float], before: tuple[int, float]) -> float:
    """e of t(r) = e·r² + 2f·r through the last two measured (rows, seconds); at least LEAST_SHARE of all where noise leaves less."""
    (r, t), (r0, t0) = last, before
    least = LEAST_SHARE * t / r**2
    return least if not r0 or r0 == r else max(least, (t / r - t0 / r0) / (r - r0))


def calibrate(
    kernel: Kernel,
    row_shape: tuple[int, ...],
    dtype: str,
    most_rows: int,
    *,
    entries: float = math.inf,
    site: Site | None = None,
    slots: int = 1,
    device: bool = False,
) -> Pace:
    """The kernel's `Pace` for rows of this shape and dtype.

    Parameters
    ----------
    kernel : Kernel
        What is measured.
    row_shape : tuple of int
        Shape of a row of data.
    dtype : str
        "float32" or "float64" of the rows.
    most_rows : int
        Rows of the square tile that is measured, at most: within them a task's memory is planned.
    entries : float
        Entries of the matrix that is planned, which measuring should not rival.
    site : Site or None
        Where and with how many threads to measure; None is this process as it is. The listener hears nothing of it.
    slots : int
        Of the site's client; at most 16 of them measure.
    device : bool
        Whether to compute on the GPU.

    Returns
    -------
    Pace
        The mean over the slots that measured; least rows and threads of all.

    Raises
    ------
    InputError
        The kernel's own, for rows that it does not take.
    """
    task = _CalibrateTask(kernel, tuple(row_shape), dtype, most_rows, entries, device)
    paces = (site or Site()).on_slots(task, slots)
    count = len(paces)
    return Pace(
        entry_seconds=sum(p.entry_seconds for p in paces) / count,
        symmetric_share=sum(p.symmetric_share for p in paces) / count,
        row_seconds=sum(p.row_seconds for p in paces) / count,
        rows=min(p.rows for p in paces),
        threads=min(p.threads for p in paces),
        side_seconds=sum(p.side_seconds for p in paces) / count,
    )
