"""Features of a dataset as a dask array: lazily, or stored once, tile by tile, resumably."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import registry, threads
from ntkdask.arrays import Array, to_host
from ntkdask.datasets import Dataset
from ntkdask.execution.map_reduce import Done, map_tiles
from ntkdask.execution.progress import Listener, Silent
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import FittedMap, require_fitted
from ntkdask.files import local_path
from ntkdask.planning.tiles import Plan, Tile, largest_rows, row_tiles
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.store import Receipt, TileStore
from ntkdask.workflows.ship import shipped
from ntkdask.workflows.sources import as_source, rows_of
from ntkdask.workflows.stream import FeatureStream, store_map

TILE_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class _FeaturizeTask:
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
    """map(x) as a dask array (n, n_components), in blocks of whole rows.

    x: an array, a dask array, a Dataset or its url; integers and uint8 images are cast (uint8 divided by 255). url=None:
    lazy, nothing is computed or stored. url: every tile is computed now, stored there and resumed; equal tiles are not
    computed again, and a store of another map, seed, dtype or data is refused. client: a Dask client, or None for a loop here.
    A map that depends on data is fitted first (InputError otherwise): map.fit, or FeatureTransformer(map).fit for what is stored.
    """
    plan, listener = plan or Plan(), listener or Silent()
    require_fitted(map)
    if url is None:
        return _lazy(map, x, plan)
    path = local_path(url)
    rows, digest = rows_of(x, path.with_name(path.name + ".inputs"), client is not None)
    dtype = plan.dtype or ("float64" if rows.dtype == "float64" else "float32")
    itemsize = np.dtype(dtype).itemsize
    tile_rows = plan.tile_rows or _tile_rows(map, rows.row_shape, rows.n_total, itemsize, plan.memory_bytes)
    # tasks carry no arrays: what a map learned, and the weights of a torch module in it, lie beside the store
    addressed: Any = map if client is None else shipped(map, f"{path}.state", client)
    if isinstance(addressed, FittedMap) and client is not None:
        addressed = store_map(f"{path}.state", addressed)
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    stream = FeatureStream(rows, fitted, addressed, None, tile_rows)
    store = TileStore.create(
        path,
        shape=(rows.n_total, map.n_components),
        tile_shape=(tile_rows, map.n_components),
        dtype=dtype,
        fingerprint={"map": registry.to_config(map), "data": digest},
    )
    pending = set(store.pending())
    tiles = [t for t in row_tiles(rows.n_total, tile_rows) if (t.index[0], 0) in pending]
    listener.stage("featurize", len(store.indices()), len(store.indices()) - len(tiles))

    def receive(tile: Tile, done: Done[Receipt]) -> None:
        r = done.value
        store.record(Receipt(r.index, r.checksum, done.seconds, done.peak_bytes, done.worker))
        listener.task("featurize", done)

    n_threads = threads.current() if client is None else None
    map_tiles(_FeaturizeTask(stream, str(path)), tiles, client, label="featurize", receive=receive, threads=n_threads)
    import dask.array as da

    return da.from_zarr(store.zarr_array())


def _lazy(map: FeatureMap, x: Any, plan: Plan) -> Any:
    import dask.array as da

    x = as_source(x)
    if isinstance(x, Dataset):
        x = x.x
    if not isinstance(x, da.Array):
        rows = plan.tile_rows or _tile_rows(map, x.shape[1:], len(x), 4, plan.memory_bytes)
        x = da.from_array(x, chunks=(rows, *x.shape[1:]))
    x = x.rechunk({axis: -1 for axis in range(1, x.ndim)})
    dtype = plan.dtype or ("float64" if x.dtype == np.float64 else "float32")

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


def _tile_rows(map: FeatureMap, row_shape: tuple[int, ...], n: int, itemsize: int, budget: int | None) -> int:
    """Rows whose features fill about 64 MiB, fewer where the memory of a task says so."""
    rows = max(1, min(n, TILE_BYTES // (itemsize * map.n_components)))
    if budget is None:
        return rows
    return largest_rows(
        budget,
        lambda r: map.workspace_bytes(r, itemsize, row_shape) + 3 * r * itemsize * map.n_components,
        rows,
        f"{type(map).__name__}(n_components={map.n_components})",
    )
