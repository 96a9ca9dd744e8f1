"""Measure the time of a row of a feature map and of its products in the Gram sums, in about a second, as tasks compute them.

The rows are seeded normal numbers in the shape of the data, as in `workflows.kernel_matrix.calibrate`. Times serve for predictions,
and where features are slow they cut slabs and tiles, which the first run stores. A map whose rows take less than `enough` seconds
decides nothing, and a call or two tell that.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ntkdask import seeds, threads
from ntkdask.arrays import Array, to_device, to_host
from ntkdask.execution.site import Site
from ntkdask.features import Nystrom
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import learns
from ntkdask.kernels.base import completed
from ntkdask.planning.pace import RowPace
from ntkdask.solvers.gram import GramSums
from ntkdask.workflows.kernel_matrix.calibrate import calibrate
from ntkdask.workflows.stream import load_map

SECONDS = 1.0
"""Seconds of measuring the map; the first call, which compiles and draws weights, is not counted."""
MOST_COLUMNS = 1024
"""The most features of the product that is measured: with more of them its rate changes little."""


@dataclass(frozen=True)
class _CalibrateTask:
    """Measure batches of growing size; the pace of the largest, or of the first whose rows take at most `enough` seconds.

    features: a map, the url of its state, or None for the rows themselves.
    """

    features: FeatureMap | str | None
    row_shape: tuple[int, ...]
    dtype: str
    batch_rows: int
    n_components: int
    device: bool
    enough: float = 0.0

    def __call__(self, tile: int) -> RowPace:
        rows, row_seconds = min(self.batch_rows, max(2, threads.current())), 0.0
        if self.features is not None:
            # not counted: the first call compiles and draws weights
            self._seconds(self._normals(rows, self.row_shape))
            spent = 0.0
            while True:
                seconds = self._seconds(self._normals(rows, self.row_shape))
                spent, row_seconds = spent + seconds, seconds / rows
                if rows == self.batch_rows or spent + 2 * seconds > SECONDS or row_seconds <= self.enough:
                    break
                rows = min(self.batch_rows, 2 * rows)
        return RowPace(row_seconds, math.inf if self.enough else self._product_rate(), rows, threads.current())

    def _product_rate(self) -> float:
        m = min(self.n_components, MOST_COLUMNS)
        phi, y = (self._normals(self.batch_rows, (columns,)) for columns in (m, 1))
        sums, y = GramSums.zeros(m, 1, phi), y.astype("float64")
        taken = []
        for _ in range(2):
            started = time.perf_counter()
            sums.add(phi, y)
            # to_host waits for the device
            to_host(sums.features[:1])
            taken.append(time.perf_counter() - started)
        return self.batch_rows * float(m) ** 2 / min(taken)

    def _normals(self, rows: int, shape: tuple[int, ...]) -> Array:
        drawn = seeds.normals(0, ("calibrate",), rows, math.prod(shape), self.dtype)
        return to_device(drawn.reshape(rows, *shape), self.device)

    def _seconds(self, x: Array) -> float:
        features = load_map(self.features) if isinstance(self.features, str) else self.features
        assert features is not None
        started = time.perf_counter()
        # to_host waits for the device
        to_host(features(x)[:1])
        return time.perf_counter() - started


def calibrate_features(
    features: FeatureMap | str | None,
    row_shape: tuple[int, ...],
    dtype: str,
    batch_rows: int,
    n_components: int,
    *,
    site: Site,
    slots: int = 1,
    device: bool = False,
    enough: float = 0.0,
) -> RowPace | None:
    """Measure a map's `RowPace` for a second: in this process, or as the mean over the slots of the site's cluster, at most 16.

    Parameters
    ----------
    features : FeatureMap, str or None
        The map, or the url of its state. None: the rows themselves.
    row_shape : tuple of int
        Shape of a row.
    dtype : str
        Of the rows, "float32" or "float64".
    batch_rows : int
        Rows of the largest batch that is measured, which fits the memory of a task.
    n_components : int
        Features of a row.
    site : Site
        Where tasks run, and their threads.
    slots : int
        How many tasks the cluster runs at once.
    device : bool
        Compute on the GPU.
    enough : float
        Seconds of a row below which its exact pace is of no interest. Above 0, products are not measured.

    Returns
    -------
    RowPace or None
        None for a map that must first be fitted to rows, but for Nystrom features of a slow kernel, whose pace is the kernel's.

    Raises
    ------
    InputError
        For a shape of rows that the map does not take.
    """
    row_shape, of_kernel = tuple(row_shape), 0.0
    if isinstance(features, Nystrom) and completed(features.kernel).is_slow:
        most = min(batch_rows, features.n_components)
        pace = calibrate(features.kernel, row_shape, dtype, most, site=site, slots=slots, device=device)
        of_kernel = pace.tile_seconds(batch_rows, features.n_components) / batch_rows
        features = None
    elif not isinstance(features, str) and learns(features):
        return None
    found = site.on_slots(_CalibrateTask(features, row_shape, dtype, batch_rows, n_components, device, enough), slots)
    count = len(found)
    return RowPace(
        row_seconds=of_kernel + sum(p.row_seconds for p in found) / count,
        product_rate=sum(p.product_rate for p in found) / count,
        rows=min(p.rows for p in found),
        threads=min(p.threads for p in found),
    )
