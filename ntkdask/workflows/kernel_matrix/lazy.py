"""Kernel matrices that are never stored: a dask graph with one task a tile, one triangle of it when symmetric."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ntkdask.arrays import Array, as_array, is_dask
from ntkdask.datasets import Dataset
from ntkdask.kernels.base import Kernel, completed, parts_of
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.workflows.kernel_matrix.plan import MatrixShape, plan_matrix
from ntkdask.workflows.kernel_matrix.tile import entries_matrix
from ntkdask.workflows.sources import row_shape_of
from ntkdask.workflows.stream import require_finite


def lazy_kernel_matrix(kernel: Kernel, sources: Sequence[Any], dtype: str, plan: Plan) -> Any:
    """kernel(x, y), or kernel(x) for one source, as a dask array; a tuple of them for a kernel of several parts.

    sources: as `as_source` gives them. Blocks are the rows' own chunks for dask arrays and datasets, tiles of the plan for arrays.
    Every block of rows is preprocessed once; tiles above the diagonal of a symmetric matrix are transposed ones.
    """
    rows = [_blocks(kernel, source, name, dtype, plan, sources) for source, name in zip(sources, "xy", strict=False)]
    entry = completed(kernel).entry_size(row_shape_of(sources[0]))
    return _assembled(kernel, rows[0], rows[1] if len(rows) > 1 else None, dtype, entry)


def _blocks(kernel: Kernel, source: Any, name: str, dtype: str, plan: Plan, sources: Sequence[Any]) -> Any:
    """Preprocessed rows as a dask array in blocks of whole rows."""
    import dask.array as da

    x = source.x if isinstance(source, Dataset) else source
    if not is_dask(x):
        x = as_array(x)
        counts = [len(s) if not isinstance(s, Dataset) else s.n for s in sources]
        shape = MatrixShape(
            n=counts[0],
            m=counts[1] if len(counts) > 1 else None,
            row_shape=row_shape_of(x),
            row_bytes=int(np.prod(x.shape[1:])) * x.dtype.itemsize,
            dtype=dtype,
        )
        sizes = plan_matrix(kernel, shape, plan.memory_bytes, tile_rows=plan.tile_rows, tile_cols=plan.tile_cols)
        x = da.from_array(x, chunks=(sizes.tile_rows if name == "x" else sizes.tile_cols, *x.shape[1:]))
    x = x.rechunk({axis: -1 for axis in range(1, x.ndim)})
    fitted = FittedPreprocessor.for_rows(x.shape[1:], x.dtype, dtype)

    def prepared(block: Array, block_info: Any = None) -> Array:
        first, last = block_info[0]["array-location"][0]
        out = fitted(block)
        require_finite(out, np.arange(first, last), name)
        return out

    return x.map_blocks(prepared, dtype=dtype, meta=np.empty((0,) * x.ndim, dtype))


def _assembled(kernel: Kernel, x: Any, y: Any, dtype: str, entry: int) -> Any:
    """The tiles of kernel(x, y) put into one dask array per part; entry: rows of the matrix for one row of data."""
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    other = x if y is None else y
    token = tokenize(kernel, x.name, other.name, y is None)
    tile = f"kernel-tile-{token}"
    zeros = (0,) * (x.ndim - 1)
    raw: dict[Any, Any] = {}
    chunks = tuple(tuple(entry * size for size in a.chunks[0]) for a in (x, other))
    for i in range(x.numblocks[0]):
        for j in range(other.numblocks[0]):
            if y is None and i == j:
                raw[tile, i, i] = (kernel, (x.name, i, *zeros))
            elif y is not None or j < i:
                raw[tile, i, j] = (kernel, (x.name, i, *zeros), (other.name, j, *zeros))
    base = HighLevelGraph.from_collections(tile, raw, dependencies=[x, other])

    def array(name: str, take: Callable[[Any], Any]) -> Any:
        import dask.array as da

        layer: dict[Any, Any] = {
            (name, i, j): (take, (tile, i, j)) if (tile, i, j) in raw else (partial(_mirrored, take), (tile, j, i))
            for i in range(x.numblocks[0])
            for j in range(other.numblocks[0])
        }
        graph = HighLevelGraph({**base.layers, name: layer}, {**base.dependencies, name: {tile}})
        return da.Array(graph, name, chunks, meta=np.empty((0, 0), dtype))

    parts = parts_of(kernel)
    if not parts:
        return array(f"kernel-{token}", _itself if entry == 1 else entries_matrix)
    return tuple(array(f"kernel-{part}-{token}", operator.itemgetter(i)) for i, part in enumerate(parts))


def _itself(tile: Array) -> Array:
    return tile


def _mirrored(take: Callable[[Any], Any], tile: Any) -> Array:
    return take(tile).T
