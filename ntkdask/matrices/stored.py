"""A stored matrix as rows and columns: one triangle in the store, the whole to a reader. It travels as an address.

Panels are runs of neighbouring tiles of about 128 MiB: the pieces that one task of a product walks. How a matrix falls into
panels follows from its shape and tiles alone, so that sums over panels have equal bits on any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.cache import shared
from ntkdask.errors import StoreError
from ntkdask.store import Index, TileStore
from ntkdask.threads import on_threads

PANEL_BYTES = 2**27
"""Stored bytes of a panel: a few milliseconds of scheduling beside tens of work."""


@dataclass(frozen=True)
class StoredMatrix:
    """Address of a complete matrix (n, m) of float tiles.

    Parameters
    ----------
    url : str
        Of its store.
    shape : (int, int)
        Rows and columns.
    tile_shape : (int, int)
        Of a whole tile; the last ones of a side may be smaller.
    dtype : numpy.dtype
        float32 or float64.
    triangle : str or None
        "symmetric" or "lower" when only tiles (i, j), j <= i, are stored.
    token : str
        Digest of what made the matrix and of its bytes. Caches are keyed with it, so that another matrix at the same url is never
        taken for this one.
    """

    url: str
    shape: tuple[int, int]
    tile_shape: tuple[int, int]
    dtype: np.dtype
    triangle: str | None
    token: str

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> StoredMatrix:
        """The matrix at `url`; StoreError when there is none, or when tiles of it are still missing."""
        store = TileStore.open(url)
        if len(store.shape) != 2:
            raise StoreError(f"{store.path} has shape {store.shape}; a matrix has two axes.")
        missing, total = len(store.pending()), len(store.indices())
        if missing:
            raise StoreError(
                f"{store.path} has {total - missing} of its {total} tiles: the run that writes it is not through. "
                "Run it again, it goes on where it stopped."
            )
        checksums = [[*index, r.checksum] for index, r in sorted(store.receipts.items())]
        token = registry.digest([store.fingerprint, checksums])
        n, m = store.shape
        rows, columns = store.tile_shape
        return cls(
            url=str(store.path),
            shape=(n, m),
            tile_shape=(rows, columns),
            dtype=store.dtype,
            triangle=store.triangle,
            token=token,
        )

    @property
    def store(self) -> TileStore:
        """The tiles, opened once per process."""
        return shared.get(("matrix", self.url, self.token), lambda: TileStore.open(self.url))

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    @property
    def is_symmetric(self) -> bool:
        """Whether a tile stands for its mirror image, too."""
        return self.triangle == "symmetric"

    def panels(self) -> list[tuple[Index, ...]]:
        """Stored tiles in C order, cut into runs of at most PANEL_BYTES, at least one tile each."""
        panels: list[list[Index]] = []
        room = 0
        for index in self.store.indices():
            rows, columns = self.store.slices(index)
            nbytes = (rows.stop - rows.start) * (columns.stop - columns.start) * self.dtype.itemsize
            if not panels or nbytes > room:
                panels.append([])
                room = PANEL_BYTES
            panels[-1].append(index)
            room -= nbytes
        return [tuple(panel) for panel in panels]

    def read(self, dtype: Any = "float64", scale: np.ndarray | None = None) -> np.ndarray:
        """S·M·S whole, (n, m) of `dtype` in Fortran order, as LAPACK overwrites it; S = diag(scale), None: 1.

        For matrices that fit: holds n·m numbers, and one tile a thread.
        """
        out = np.empty(self.shape, dtype, order="F")

        def place(index: Index) -> None:
            rows, columns = self.store.slices(index)
            tile = self.store.read(index).astype(out.dtype, copy=False)
            if scale is not None:
                tile = tile * scale[rows, None].astype(out.dtype) * scale[columns].astype(out.dtype)
            out[rows, columns] = tile
            if self.is_symmetric and index[0] != index[1]:
                out[columns, rows] = tile.T

        if self.triangle == "lower":
            out[...] = 0
        on_threads(place, self.store.indices())
        return out

    def __getitem__(self, key: Any) -> np.ndarray:
        """Any rows and columns, as NumPy's basic indexing and dask's slicing ask for them; reads the tiles that hold them."""
        keys = (*(key if isinstance(key, tuple) else (key,)), slice(None))[:2]
        wanted = [np.atleast_1d(np.arange(size)[k]) for size, k in zip(self.shape, keys, strict=True)]
        out = np.empty([len(w) for w in wanted], self.dtype)
        for i, row_places, rows in _by_tile(wanted[0], self.tile_shape[0]):
            for j, column_places, columns in _by_tile(wanted[1], self.tile_shape[1]):
                out[_mesh(row_places, column_places)] = self.store.read((i, j))[_mesh(rows, columns)]
        # an integer takes its axis away
        return out[tuple(0 if np.ndim(k) == 0 and not isinstance(k, slice) else slice(None) for k in keys)]

    def __dask_tokenize__(self) -> tuple[str, str]:
        return (self.url, self.token)


def lazy_array(store: TileStore) -> Any:
    """A store with any number of axes as a lazy dask array, a block for each tile.

    Not `da.from_zarr`: that reads a tile that is gone as NaN. Here it is a DamagedTileError that names it, as a damaged one is.
    """
    import dask.array as da

    token = registry.digest([store.fingerprint, sorted([*i, r.checksum] for i, r in store.receipts.items())])
    return da.map_blocks(
        _read_tile,
        chunks=da.core.normalize_chunks(store.tile_shape, store.shape),
        dtype=store.dtype,
        meta=np.empty((0,) * len(store.shape), store.dtype),
        name=f"{store.path.name}-{token}",
        url=str(store.path),
        known=token,
    )


def _read_tile(url: str, known: str, block_id: Index) -> np.ndarray:
    store = shared.get(("tiles", url, known), lambda: TileStore.open(url))
    return store.read(tuple(map(int, block_id)))


Picks = slice | np.ndarray


def _by_tile(wanted: np.ndarray, size: int) -> Iterator[tuple[int, Picks, Picks]]:
    """(tile, places in `wanted`, offsets inside the tile) for each tile that holds some of the wanted indices."""
    tiles = wanted // size
    for tile in np.unique(tiles):
        places = np.flatnonzero(tiles == tile)
        yield int(tile), _span(places), _span(wanted[places] - tile * size)


def _span(indices: np.ndarray) -> Picks:
    """A slice where the indices follow each other, which copies several times faster; the indices otherwise."""
    first, last = int(indices[0]), int(indices[-1])
    follow = last - first == len(indices) - 1 and (np.diff(indices) == 1).all()
    return slice(first, last + 1) if follow else indices


def _mesh(rows: Picks, columns: Picks) -> Any:
    """An index that takes every pair of rows and columns."""
    if isinstance(rows, slice) or isinstance(columns, slice):
        return rows, columns
    return np.ix_(rows, columns)
