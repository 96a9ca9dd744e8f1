"""HDF5 files: arrays by their names, also in groups (`train/x`), read by blocks of rows. No link out of the file is followed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkdask.datasets.containers.arrays import StoredArray, open_arrays
from ntkdask.datasets.source import Request, Source
from ntkdask.errors import DataError

_PACKED = ("scale_factor", "add_offset")
_MAX_DEPTH = 8


def open_source(path: Path, request: Request) -> Source:
    """The rows of the HDF5 file at `path`."""
    return open_arrays(path, request, lambda: _opened(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, StoredArray]]:
    """The arrays of the file by their names."""
    with h5py.File(path, "r") as file:
        yield dict(_arrays(path, file, ""))


def _arrays(path: Path, group: Any, above: str) -> Iterator[tuple[str, StoredArray]]:
    """(name, array) of all that lies in a group and below it."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise DataError(
                f"{path} holds a link, {above}{name}. Only what lies in the file itself is read: copy it there."
            )
        entry = group[name]
        if isinstance(entry, h5py.Group):
            if above.count("/") == _MAX_DEPTH:
                raise DataError(
                    f"{path} has groups in more than {_MAX_DEPTH} groups (one in itself?). Give a flatter file."
                )
            yield from _arrays(path, entry, f"{above}{name}/")
        elif isinstance(entry, h5py.Dataset) and entry.shape is not None:
            yield f"{above}{name}", _array(path, f"{above}{name}", entry)


def _array(path: Path, name: str, entry: Any) -> StoredArray:
    """One array; DataError where its numbers lie in other files, or are packed."""
    if entry.is_virtual or entry.external:
        raise DataError(
            f"{path}: {name} lies in other files. Only what lies in the file itself is read: copy it there."
        )
    if any(key in entry.attrs for key in _PACKED):
        raise DataError(
            f"{path}: {name} is packed (scale_factor, add_offset), as NetCDF does it. Pass --format netcdf."
        )
    text = h5py.check_string_dtype(entry.dtype) is not None
    rows = entry.asstr() if text else entry
    return StoredArray(
        shape=entry.shape,
        itemsize=entry.dtype.itemsize,
        chunk_rows=entry.chunks[0] if entry.chunks else 1,
        read=lambda start, stop: np.asarray(rows[start:stop]),
    )
