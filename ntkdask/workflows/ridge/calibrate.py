"""How long a row of a feature map takes here, and its share of the Gram sums: measured in about a second, as tasks will compute it.

Rows are seeded normal ones of the data's shape, as in `calibrate`. The numbers predict time and decide nothing: slabs and batches are
bounded by memory alone, and enter the bits of a run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from ntkdask import seeds, threads
from ntkdask.arrays import Array, to_device, to_host
from ntkdask.execution.site import Site
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import learns
from ntkdask.planning.pace import RowPace
from ntkdask.solvers.gram import GramSums

SECONDS = 1.0
"""Of measuring the map, what the first call compiles and draws not counted."""
MOST_COLUMNS = 1024
"""Features of the product that is measured: from about there on its rate depends little on them."""


@dataclass(frozen=True)
class _CalibrateTask:
    """Measure batches of growing size; what a row of the largest took."""

    features: FeatureMap | None
    row_shape: tuple[int, ...]
    dtype: str
    batch_rows: int
    n_components: int
    device: bool

    def __call__(self, tile: int) -> RowPace:
        rows, row_seconds = min(self.batch_rows, max(2, threads.current())), 0.0
        if self.features is not None:
            # what the first call compiles, and the weights
            self._seconds(self._normals(rows, self.row_shape))
            spent = 0.0
            while True:
                seconds = self._seconds(self._normals(rows, self.row_shape))
                spent, row_seconds = spent + seconds, seconds / rows
                if rows == self.batch_rows or spent + 2 * seconds > SECONDS:
                    break
                rows = min(self.batch_rows, 2 * rows)
        return RowPace(row_seconds, self._product_rate(), rows, threads.current())

    def _product_rate(self) -> float:
        m = min(self.n_components, MOST_COLUMNS)
        phi, y = (self._normals(self.batch_rows, (columns,)) for columns in (m, 1))
        sums, y = GramSums.zeros(m, 1, phi), y.astype("float64")
        taken = []
        for _ in range(2):
            started = time.perf_counter()
            sums.add(phi, y)
            # waits for the device
            to_host(sums.features[:1])
            taken.append(time.perf_counter() - started)
        return self.batch_rows * float(m) ** 2 / min(taken)

    def _normals(self, rows: int, shape: tuple[int, ...]) -> Array:
        drawn = seeds.normals(0, ("calibrate",), rows, math.prod(shape), self.dtype)
        return to_device(drawn.reshape(rows, *shape), self.device)

    def _seconds(self, x: Array) -> float:
        assert self.features is not None
        started = time.perf_counter()
        # waits for the device
        to_host(self.features(x)[:1])
        return time.perf_counter() - started


def calibrate_features(
    features: FeatureMap | None,
    row_shape: tuple[int, ...],
    dtype: str,
    batch_rows: int,
    n_components: int,
    *,
    client: Any = None,
    slots: int = 1,
    n_threads: int | None = None,
    device: bool = False,
) -> RowPace | None:
    """The map's `RowPace` for rows of this shape and dtype: in this process, or (client) as the mean over its slots, at most 16.

    features: None is the rows themselves. batch_rows: the most that are measured, within which a task's memory is planned.
    n_threads: of each task (None leaves them). device: compute on the GPU. None for a map that has yet to learn from rows. Errors are
    those of the map: InputError for rows that it does not take.
    """
    if learns(features):
        return None
    task = _CalibrateTask(features, tuple(row_shape), dtype, batch_rows, n_components, device)
    found = Site(client=client, threads=n_threads).on_slots(task, slots)
    count = len(found)
    return RowPace(
        sum(p.row_seconds for p in found) / count,
        sum(p.product_rate for p in found) / count,
        min(p.rows for p in found),
        min(p.threads for p in found),
    )
