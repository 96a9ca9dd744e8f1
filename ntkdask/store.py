"""Tiles in Zarr: written atomically, checksummed, resumable. Zarr is imported here and in `layout` alone.

A `TileStore` is one Zarr array in which one tile is one chunk. The fingerprint of what produced it is in its attributes. The
driver keeps receipts beside the chunks, in `receipts.jsonl`. A tile is committed when both its receipt and its chunk are there: the
worker writes the data (a temporary file, then a rename) and returns a receipt, which the driver appends. When one of them is killed
in between, the tile is computed again, with the same result.

Data chunks carry a CRC-32C, so a flipped bit is an error that names the tile, never a wrong number. Kernel and feature
data do not compress, so nothing is compressed. Only local and shared file systems: no fsync is issued, so a power
loss may lose what a kill cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from ntkdask.array_layout import REPAIR, require_layout, unreadable
from ntkdask.errors import DamagedTileError, FingerprintError, StoreError
from ntkdask.files import local_path, read_json, remove, write_text, writing
from ntkdask.layout import COMMENTS, create_array
from ntkdask.receipts import Index, Manifest, Receipt, checked_line, end_torn_line, read_manifest
from ntkdask.registry import differences, digest, identity

RECEIPTS = "receipts.jsonl"
ATTRIBUTE = "ntkdask"
_CRC_PIECE = 2**20


def checksum(array: np.ndarray) -> int:
    """CRC-32C of the array's bytes in C order."""
    a = np.ascontiguousarray(array)
    view, value = a.reshape(-1).view(np.uint8), 0
    for start in range(0, len(view), _CRC_PIECE):
        # the library takes read-only bytes alone: copy in pieces that stay in cache
        value = google_crc32c.extend(value, view[start : start + _CRC_PIECE].tobytes())
    return int(value)


def open_array(path: Path | str, mode: str = "r"):
    """The Zarr array at `path`; StoreError where there is none. Metadata are never consolidated: a live store changes."""
    path = local_path(path)
    try:
        # `open_array` has no config argument: it reads the ambient configuration
        with zarr.config.set({"array.write_empty_chunks": True}):
            return zarr.open_array(zarr.storage.LocalStore(path), mode=mode)
    except Exception as error:  # whatever Zarr makes of a description that is not one
        raise unreadable(path, "array", error) from error


def write_group_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Create the Zarr group at `path` if need be and set its attributes."""
    with writing(path):
        zarr.open_group(zarr.storage.LocalStore(path), mode="a").attrs.update(dict(attributes))


def read_group_attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Attributes of the Zarr group at `path`; StoreError when there is none."""
    try:
        return dict(zarr.open_group(zarr.storage.LocalStore(local_path(path)), mode="r").attrs)
    except Exception as error:  # whatever Zarr makes of a description that is not one
        raise unreadable(local_path(path), "group", error) from error


@dataclass
class TileStore:
    """One Zarr array of tiles with a fingerprint and receipts; made by `create` or `open`.

    Parameters
    ----------
    path : Path
        The folder of the array.
    fingerprint : dict
        What produced the tiles: every parameter, and the layout.
    shape : tuple of int
        Of the whole array.
    tile_shape : tuple of int
        Of a tile; the last tile of an axis may be ragged.
    dtype : numpy.dtype
        Of the whole array.
    triangle : str, optional
        "symmetric" or "lower": a square matrix of which only tiles (i, j) with j <= i are stored. None: every tile is.
    """

    path: Path
    fingerprint: dict[str, Any]
    shape: tuple[int, ...]
    tile_shape: tuple[int, ...]
    dtype: np.dtype
    triangle: str | None = None
    _array: Any = field(default=None, repr=False, compare=False)
    """The read-only Zarr array, opened once: opening it takes as long as reading a tile of 512 × 512."""
    _receipts: dict[Index, Receipt] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        *,
        shape: Sequence[int],
        tile_shape: Sequence[int],
        dtype: Any,
        fingerprint: Mapping[str, Any],
        overwrite: bool = False,
        triangle: str | None = None,
        dimensions: Sequence[str] = ("row", "column"),
    ) -> TileStore:
        """The store at `url`: the one that is there, if it has this very fingerprint, else a new one.

        Parameters
        ----------
        url : path
            A folder.
        shape : sequence of int
            Of the whole array.
        tile_shape : sequence of int
            Of a tile.
        dtype : dtype
            Of the whole array.
        fingerprint : mapping
            What produces the tiles, as tables that JSON can write.
        overwrite : bool, optional
            Delete what is at `url` and begin again.
        triangle : str, optional
            "symmetric" or "lower": store only tiles (i, j) with j <= i, of a square matrix with square tiles.
        dimensions : sequence of str, optional
            Names of the axes, for readers like xarray; a store that is there keeps its own.

        Raises
        ------
        FingerprintError
            Where the store there has another fingerprint or layout; the message names the keys that differ.
        StoreError
            Where a triangle is asked for that is not square, or `url` cannot be written.
        """
        path = local_path(url)
        if triangle is not None and (len(set(shape)) != 1 or len(set(tile_shape)) != 1 or len(shape) != 2):
            raise StoreError(f"{path}: a {triangle} matrix is square with square tiles, got {shape} in {tile_shape}.")
        layout = {"shape": list(shape), "tile_shape": list(tile_shape), "dtype": np.dtype(dtype).name}
        if triangle is not None:
            layout["triangle"] = triangle
        asked = identity(json.loads(json.dumps({**fingerprint, **layout})))
        if (path / "zarr.json").exists() and not overwrite:
            store = cls.open(path)
            lines = differences(identity(store.fingerprint), asked)
            if lines:
                raise FingerprintError(
                    f"{path} holds results of other parameters:\n  "
                    + "\n  ".join(lines)
                    + "\nUse another url, or --overwrite (overwrite=True) to start again."
                )
            end_torn_line(path / RECEIPTS)
            return store
        remove(path)
        attributes = {ATTRIBUTE: _described(asked), "comment": COMMENTS[triangle]}
        create_array(path, shape, tile_shape, dtype, attributes, dimensions)
        return cls.open(path)

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> TileStore:
        """The store at `url` with its receipts; StoreError where there is none. Nothing is written."""
        path = local_path(url)
        array = open_array(path)
        kept = array.attrs.get(ATTRIBUTE)
        fingerprint = _fingerprint_of(path, kept)
        layout = _layout_of(path, fingerprint)
        require_layout(path, array, *layout)
        shape, tile_shape, dtype = layout
        store = cls(path, fingerprint, shape, tile_shape, dtype, fingerprint.get("triangle"), array)
        store._receipts = store.manifest().receipts
        return store

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        return tuple(-(-s // t) for s, t in zip(self.shape, self.tile_shape, strict=True))

    def indices(self) -> list[Index]:
        """The indices of all tiles that are stored, in C order; of a triangle those with j <= i."""
        every = [tuple(int(i) for i in index) for index in np.ndindex(*self.grid)]
        return every if self.triangle is None else [i for i in every if i[1] <= i[0]]

    def slices(self, index: Index) -> tuple[slice, ...]:
        """The ranges of the array that tile `index` covers; the last tile of an axis may be ragged."""
        return tuple(
            slice(i * t, min((i + 1) * t, s)) for i, t, s in zip(index, self.tile_shape, self.shape, strict=True)
        )

    def chunk_path(self, index: Index) -> Path:
        """The file that holds tile `index`."""
        return self.path.joinpath("c", *map(str, index))

    @property
    def receipts(self) -> dict[Index, Receipt]:
        """The receipts that the driver recorded, by tile."""
        return dict(self._receipts)

    def pending(self, indices: Sequence[Index] | None = None) -> list[Index]:
        """The tiles (of `indices`, or of the whole grid) that lack a receipt or a chunk."""
        wanted = self.indices() if indices is None else indices
        return [i for i in wanted if i not in self._receipts or not self.chunk_path(i).exists()]

    def commit(self, index: Index, array: np.ndarray, started: float | None = None) -> Receipt:
        """Write one whole tile atomically and return its receipt: a worker's part. The driver then calls `record`.

        `started` is the `time.perf_counter()` at which its computation began. StoreError for another shape or dtype.
        """
        where = self.slices(index)
        expected = tuple(s.stop - s.start for s in where)
        if array.shape != expected or array.dtype != self.dtype:
            raise StoreError(
                f"tile {index} of {self.path.name}: got {array.shape} {array.dtype}, expected {expected} {self.dtype}"
            )
        with writing(self.path):
            open_array(self.path, "r+")[where] = array
        seconds = 0.0 if started is None else time.perf_counter() - started
        return Receipt(index, checksum(array), seconds)

    def record(self, receipt: Receipt) -> None:
        """Append a receipt to the manifest, which makes the tile committed; only the driver calls this."""
        with writing(self.path), open(self.path / RECEIPTS, "a", encoding="utf-8") as manifest:
            manifest.write(receipt.to_line())
        self._receipts[receipt.index] = receipt

    def read(self, index: Index) -> np.ndarray:
        """One tile as an array; DamagedTileError where it is gone or its checksum does not match.

        Above the diagonal of a triangle this is the transposed tile of a symmetric matrix, or zeros of a lower one.
        """
        if self.triangle is not None and index[0] < index[1]:
            if self.triangle == "symmetric":
                return self.read(index[::-1]).T
            return np.zeros([s.stop - s.start for s in self.slices(index)], self.dtype)
        if not self.chunk_path(index).exists():
            raise DamagedTileError(f"tile {index} of {self.path} is not there. Run the job again to compute it.")
        try:
            return np.asarray(self._array[self.slices(index)])
        except ValueError as error:
            raise DamagedTileError(
                f"tile {index} of {self.path} is damaged: {error}. "
                "`ntkdask verify --repair RUN` marks it, the next run computes it again."
            ) from error

    def discard(self, index: Index) -> None:
        """Delete a tile that is no longer needed, a partial sum whose parent is committed, and its receipt.

        Only the driver calls this.
        """
        if self._receipts.pop(index, None) is not None:
            with writing(self.path), open(self.path / RECEIPTS, "a", encoding="utf-8") as manifest:
                manifest.write(checked_line({"discarded": index}))
        with contextlib.suppress(FileNotFoundError):
            self.chunk_path(index).unlink()

    def damaged(self) -> list[Index]:
        """The tiles with a receipt whose chunk is gone, or has another checksum; reads every chunk once."""
        bad = []
        for index, receipt in sorted(self._receipts.items()):
            try:
                if checksum(self.read(index)) != receipt.checksum:
                    bad.append(index)
            except DamagedTileError:
                bad.append(index)
        # a run that goes on meanwhile discards the sums that it has combined, and whole stores of them
        now = self.manifest().receipts if bad else {}
        return [index for index in bad if now.get(index) == self._receipts[index]]

    def forget(self, indices: Sequence[Index]) -> None:
        """Make tiles pending again: delete their receipts and chunks."""
        gone = set(indices)
        self._receipts = {i: r for i, r in self._receipts.items() if i not in gone}
        write_text(self.path / RECEIPTS, "".join(r.to_line() for r in self._receipts.values()))
        for index in gone:
            with contextlib.suppress(FileNotFoundError):
                self.chunk_path(index).unlink()

    def zarr_array(self):
        """The read-only Zarr array, in which tiles that are not stored read as NaN."""
        return self._array

    def manifest(self) -> Manifest:
        """The lines of the manifest as they are now: receipts, and which lines are damaged or have no checksum."""
        return read_manifest(self.path / RECEIPTS)

    @property
    def has_checksum(self) -> bool:
        """Whether a checksum of the fingerprint was written; earlier releases wrote none."""
        return "checksum" in self._array.attrs[ATTRIBUTE]


def _described(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What the attributes of a store say of it."""
    return {"fingerprint": dict(fingerprint), "checksum": digest(fingerprint)}


def _fingerprint_of(path: Path, kept: Any) -> dict[str, Any]:
    """The fingerprint in the attributes of a store; StoreError where there is none, or where it does not match its checksum."""
    fingerprint = kept.get("fingerprint") if isinstance(kept, Mapping) else None
    if not isinstance(fingerprint, Mapping):
        raise StoreError(f"{path} is a Zarr array, but not one of ntkdask's tile stores (it has no fingerprint).")
    if "checksum" in kept and kept["checksum"] != digest(fingerprint):
        raise StoreError(f"{path / 'zarr.json'} is damaged: its fingerprint does not match its checksum. {REPAIR}")
    return dict(fingerprint)


def _layout_of(path: Path, fingerprint: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
    """(shape, tile shape, dtype) that a fingerprint states."""
    try:
        shape, tile_shape = (tuple(int(s) for s in fingerprint[key]) for key in ("shape", "tile_shape"))
        return shape, tuple(max(1, t) for t in tile_shape), np.dtype(fingerprint["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path / 'zarr.json'} is damaged: its fingerprint states no layout. {REPAIR}") from error


def tile_stores(root: Path | str, damaged: bool = True) -> list[TileStore]:
    """All tile stores under `root`, in the order of their paths; StoreError, or without `damaged` none, for a damaged one."""
    stores = []
    # not rglob: it stumbles over folders that a run deletes meanwhile
    for folder in sorted(Path(name) for name, _, files in os.walk(local_path(root)) if "zarr.json" in files):
        try:
            table = read_json(folder / "zarr.json", REPAIR)
            attributes = table.get("attributes", {}) if isinstance(table, dict) else {}
            if "fingerprint" in (attributes.get(ATTRIBUTE) or {}):
                stores.append(TileStore.open(folder))
        except StoreError:
            if damaged and folder.exists():
                raise
    return stores


def mend_description(path: Path) -> None:
    """Write the description of a store again from its fingerprint; delete the store where that is damaged, too."""
    try:
        table = read_json(path / "zarr.json", REPAIR)
        shape, tile_shape, dtype = _layout_of(path, _fingerprint_of(path, table["attributes"][ATTRIBUTE]))
    except (StoreError, KeyError, TypeError):
        remove(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        place, names = Path(folder) / path.name, table.get("dimension_names")
        create_array(place, shape, tile_shape, dtype, table["attributes"], names and [str(name) for name in names])
        write_text(path / "zarr.json", (place / "zarr.json").read_text(encoding="utf-8"))
