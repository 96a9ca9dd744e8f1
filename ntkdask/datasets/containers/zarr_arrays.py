"""Zarr, versions 2 and 3: an array of rows, with its targets in `<name>_targets.zarr` beside it, or a group of named arrays."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ntkdask.datasets.containers.arrays import StoredArray, open_arrays
from ntkdask.datasets.dataset import describe
from ntkdask.datasets.source import Request, Source, files_under
from ntkdask.errors import DataError, StoreError
from ntkdask.store import ATTRIBUTE, open_array

_MAX_DEPTH = 3


def open_source(path: Path, request: Request) -> Source:
    """The rows of the Zarr array or group at `path`."""
    if _is_dataset(path):
        raise DataError(f"{path} is a dataset of ntkdask already. Use it as it is, or copy its folder.")
    return open_arrays(path, request, lambda: _opened(path))


def _is_dataset(path: Path) -> bool:
    """Whether ntkdask itself wrote what is there."""
    try:
        describe(path)
    except DataError:
        return False
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, StoredArray]]:
    """The arrays by their names; of a single array, "x" and, where they are there, "targets"."""
    if not _is_array(path):
        yield {name: _array(inside) for name, inside in _arrays_below(path, "")}
        return
    beside = path.with_name(f"{path.stem}_targets{path.suffix}")
    yield {"x": _array(path)} | ({"targets": _array(beside)} if _is_array(beside) else {})


def _arrays_below(folder: Path, above: str) -> Iterator[tuple[str, Path]]:
    """(name, folder) of the arrays in a group and below it."""
    for inside in sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
        if _is_array(inside):
            yield f"{above}{inside.name}", inside
        elif above.count("/") < _MAX_DEPTH:
            yield from _arrays_below(inside, f"{above}{inside.name}/")


def _is_array(folder: Path) -> bool:
    """Whether a folder is a Zarr array of one of the versions."""
    if (folder / ".zarray").exists():
        return True
    if not (folder / "zarr.json").exists():
        return False
    try:
        return json.loads((folder / "zarr.json").read_text(encoding="utf-8")).get("node_type") == "array"
    except (ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'zarr.json'} is damaged ({error}).") from error


def _array(folder: Path) -> StoredArray:
    """One array; DataError for a matrix or features that ntkdask stored, whose missing tiles would read as numbers."""
    try:
        stored = open_array(folder)
    except StoreError as error:
        raise DataError(f"{folder} is damaged, or no Zarr array that is read here ({error}).") from error
    if ATTRIBUTE in stored.attrs:
        raise DataError(
            f"{folder} is a matrix or features that ntkdask stored, no dataset. Read it with nd.open_matrix, and write its rows "
            "with nd.write_dataset."
        )
    if stored.compressors and "blosc" in type(stored.compressors[-1]).__name__.lower() and not stored.shards:
        _require_whole_chunks(folder)
    return StoredArray(
        shape=stored.shape,
        itemsize=stored.dtype.itemsize,
        chunk_rows=(stored.shards or stored.chunks)[0] if stored.shape else 1,
        read=lambda start, stop: np.asarray(stored[start:stop]),
    )


def _require_whole_chunks(folder: Path) -> None:
    """DataError for a chunk that is not as long as its Blosc header says: Blosc reads on behind the end, and gives any numbers."""
    for _, file in files_under(folder):
        if file.suffix == ".json":
            continue
        with open(file, "rb") as chunk:
            header = chunk.read(16)
        if len(header) < 16 or int.from_bytes(header[12:], "little") != file.stat().st_size:
            raise DataError(f"{file} is truncated or damaged: it is not as long as its header says. Copy it again.")
