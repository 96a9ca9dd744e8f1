"""Features of a dataset as a dask array: computed lazily, or stored once in tiles, which a later call resumes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, is_sparse, to_host
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import Rows
from ntkdask.errors import MemoryBudgetError
from ntkdask.execution.progress import Listener
from ntkdask.execution.site import Site
from ntkdask.features.base import FeatureMap, require_map, takes_sparse
from ntkdask.features.fitting import require_fitted
from ntkdask.files import exclusive
from ntkdask.matrices.stored import lazy_array
from ntkdask.planning.pace import TILE_SECONDS
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.planning.tiles import Plan, Tile, largest_rows, row_tiles
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.store import Receipt, TileStore
from ntkdask.wording import format_bytes
from ntkdask.workflows.ridge.calibrate import calibrate_features
from ntkdask.workflows.ship import located_map
from ntkdask.workflows.sources import as_source, rows_of, working_dtype
from ntkdask.workflows.stream import FeatureStream, require_finite

TILE_BYTES = 64 * 2**20
"""Features of a tile, at most, where no number of rows is requested."""


@dataclass(frozen=True, eq=False)
class _FeaturizeTask:
    """Compute the features of a tile of rows and commit them."""

    stream: FeatureStream
    url: str

    def __call__(self, tile: Tile) -> Receipt:
        started = time.perf_counter()
        parts = [to_host(b.phi) for b in self.stream.batches(tile.start, tile.stop, with_targets=False)]
        return TileStore.open(self.url).commit((tile.index[0], 0), np.concatenate(parts), started)


def featurize(
    map: FeatureMap,
    x: Any,
    *,
    url: str | os.PathLike[str] | None = None,
    client: Any = None,
    plan: Plan | None = None,
    listener: Listener | None = None,
) -> Any:
    """Features of rows, map(x), as a dask array (n, n_components) in blocks of whole rows.

    Parameters
    ----------
    map : FeatureMap
        A map that depends on data must be fitted: by `map.fit`, or by `FeatureTransformer(map).fit` for stored rows.
    x : array, dask array, Dataset or url, (n, *s)
        Integers and bool are cast, uint8 images are divided by 255.
    url : str, Path or None
        Folder of the tiles: every tile is computed now, except those that an earlier call stored there. None: lazy, nothing is
        computed or stored.
    client : distributed.Client or None
        Whose workers compute the tiles. None: a loop in this process.
    plan : Plan or None
        `tile_rows` of a tile; `memory_bytes` of a task beside the process itself (None: the smallest worker's share); `dtype`
        "float32" or "float64" (None: float64 for float64 rows, else float32).
    listener : Listener or None
        Called when a tile is finished.

    Returns
    -------
    dask.array.Array, (n, n_components)
        Lazy, or reading the stored tiles.

    Raises
    ------
    InputError
        For a map that is not fitted, and for rows that are not finite, naming them.
    FingerprintError
        Where `url` holds features of another map, seed, dtype, data or tile size, with the keys that differ.
    MemoryBudgetError
        Where no tile fits a task, with the numbers, before anything runs.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdask import features, networks
    >>> featurize(features.NTKRandomFeatures(networks.fully_connected(1), n_components=64), np.eye(5, 3)).shape
    (5, 64)
    """
    plan = plan or Plan()
    require_fitted(require_map(map, "featurize: map"))
    if url is None:
        return _lazy(map, x, plan)
    site = Site.at(url, client, listener)
    with exclusive(site.home, beside=True):
        return lazy_array(_stored_features(map, x, plan, site))


def _stored_features(map: FeatureMap, x: Any, plan: Plan, site: Site) -> TileStore:
    """The complete store of map(x) in the site's folder, of which the caller holds the lock."""
    path, client = site.home, site.client
    rows, digest = rows_of(x, path.with_name(path.name + ".inputs"), client is not None, sparse=takes_sparse(map))
    dtype = working_dtype(plan, rows)
    is_new = plan.tile_rows is None and not (path / "zarr.json").exists()
    tile_rows = _stored_tile_rows(map, rows, dtype, plan, site)
    located = partial(located_map, map, f"{path}.state", client)
    if is_new:
        tile_rows = _timed_rows(located(), map.n_components, rows, dtype, tile_rows, site)
    store = TileStore.create(
        path,
        shape=(rows.n_total, map.n_components),
        tile_shape=(tile_rows, map.n_components),
        dtype=dtype,
        fingerprint={"map": registry.to_config(map), "data": digest},
        dimensions=("row", "component"),
    )
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    stream = FeatureStream(rows, fitted, located(), None, tile_rows)
    site.fill(store, _FeaturizeTask(stream, str(path)), row_tiles(rows.n_total, tile_rows), "featurize")
    return store


def _lazy(map: FeatureMap, x: Any, plan: Plan) -> Any:
    import dask.array as da

    x = as_source(x, sparse=takes_sparse(map), unknown=True)
    if isinstance(x, Dataset):
        x = x.x
    if is_sparse(x):
        return _lazy_of_sparse(map, x, plan)
    if not isinstance(x, da.Array):
        rows = plan.tile_rows or _tile_rows(map, x.shape[1:], len(x), 4, plan.memory_bytes)
        x = da.from_array(x, chunks=(rows, *x.shape[1:]))
    x = x.rechunk({axis: -1 for axis in range(1, x.ndim)})
    dtype = working_dtype(plan, x)

    def block(rows: Array) -> Array:
        return map(FittedPreprocessor.for_rows(rows.shape[1:], rows.dtype, dtype)(rows))

    return x.map_blocks(
        block,
        dtype=dtype,
        chunks=(x.chunks[0], (map.n_components,)),
        drop_axis=list(range(2, x.ndim)),
        name=None,
        meta=np.empty((0, map.n_components), dtype),
    )


def _lazy_of_sparse(map: FeatureMap, x: Any, plan: Plan) -> Any:
    """Blocks of the features of a CSR matrix, whose rows dask has no array of."""
    import dask.array as da
    from dask import delayed

    require_finite(x, np.arange(x.shape[0]))
    dtype = plan.dtype or ("float64" if x.dtype == np.float64 else "float32")
    size = plan.tile_rows or _tile_rows(map, x.shape[1:], x.shape[0], np.dtype(dtype).itemsize, plan.memory_bytes)
    cast = FittedPreprocessor.for_rows(x.shape[1:], x.dtype, dtype)
    compute = delayed(lambda rows: map(cast(rows)), pure=False)
    blocks = []
    for start in range(0, x.shape[0], size):
        rows = x[start : start + size]
        blocks.append(da.from_delayed(compute(rows), (rows.shape[0], map.n_components), dtype))
    return da.concatenate(blocks)


def _stored_tile_rows(map: FeatureMap, rows: Rows, dtype: str, plan: Plan, site: Site) -> int:
    """Rows of a tile: as requested, else as in the existing store, else as many as fit a task.

    MemoryBudgetError, with the numbers, where they do not fit the smallest worker.
    """
    itemsize, budget = np.dtype(dtype).itemsize, plan.memory_bytes
    if budget is None and site.client is not None and (share := site.resources().memory_bytes) is not None:
        budget = max(0, share - BASE_BYTES)
    asked = plan.tile_rows
    if asked is None and (site.home / "zarr.json").exists():
        # a resumed run keeps the tiles of the first one, whatever memory its workers have
        asked = TileStore.open(site.home).tile_shape[0]
    fitting = _tile_rows(map, rows.row_shape, asked or rows.n_total, itemsize, budget, whole=asked is not None)
    if asked is not None and fitting < min(asked, rows.n_total):
        raise MemoryBudgetError(
            f"featurize with {type(map).__name__}(n_components={map.n_components}, {dtype}) needs more than a task has for tiles "
            f"of {asked} rows: {format_bytes(budget or 0)} beside the process itself. Use tile_rows <= {fitting} and another url, "
            "or give each worker more memory."
        )
    return asked or fitting


def _timed_rows(feature_map: Any, m: int, rows: Rows, dtype: str, most: int, site: Site) -> int:
    """Rows of a tile, at most `most`: where m features of a row take long, as many as take TILE_SECONDS."""
    enough = TILE_SECONDS / most
    pace = calibrate_features(feature_map, rows.row_shape, dtype, most, m, site=site, slots=site.slots, enough=enough)
    return most if pace is None or pace.row_seconds <= enough else pace.tile_rows(rows.n_total, most)


def _tile_rows(
    map: FeatureMap, row_shape: tuple[int, ...], n: int, itemsize: int, budget: int | None, *, whole: bool = False
) -> int:
    """Rows whose features fill about 64 MiB (whole: n rows), fewer where the memory of a task is too small."""
    rows = n if whole else max(1, min(n, TILE_BYTES // (itemsize * map.n_components)))
    if budget is None:
        return rows
    return largest_rows(
        budget,
        lambda r: map.workspace_bytes(r, itemsize, row_shape) + 3 * r * itemsize * map.n_components,
        rows,
        f"{type(map).__name__}(n_components={map.n_components})",
    )
