"""Rows and targets in named arrays that are read by ranges of rows: what HDF5, NetCDF and Zarr have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntkdask.datasets.bounds import require_row
from ntkdask.datasets.named_arrays import Parts, find_arrays, notes_of, require_rows
from ntkdask.datasets.source import Batch, Request, Source, file_digest, reading
from ntkdask.errors import DataError, UserError

_BLOCK_BYTES = 4 * 2**20
_MAX_BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Parameters
    ----------
    shape : tuple of int
        Its shape; rows lie on the first axis.
    itemsize : int
        Bytes of a number.
    chunk_rows : int
        Rows that the file stores, and decompresses, together.
    read : callable
        read(start, stop) gives these rows.
    """

    shape: tuple[int, ...]
    itemsize: int
    chunk_rows: int
    read: Callable[[int, int], np.ndarray]


Opened = Callable[[], AbstractContextManager[dict[str, StoredArray]]]


def open_arrays(path: Path, request: Request, opened: Opened) -> Source:
    """The rows in the arrays that `opened` gives, part by part."""
    with reading(path), opened() as arrays:
        if not arrays:
            raise DataError(f"{path} holds no arrays. Check the file.")
        parts, left_out = find_arrays(path, list(arrays), request)
        require_rows(path, parts, {name: array.shape for name, array in arrays.items()})
        total = sum(arrays[x].shape[0] for x, _ in parts.values())
    return Source(
        _batches(path, parts, opened),
        file_digest(path),
        kind=request.kind,
        total=total,
        notes=notes_of(parts, left_out),
    )


def _batches(path: Path, parts: Parts, opened: Opened) -> Iterator[Batch]:
    """The rows of each part in batches of whole chunks."""
    with reading(path), opened() as arrays:
        for part, (x, targets) in parts.items():
            step = rows_per_block(arrays[x])
            for start in range(0, arrays[x].shape[0], step):
                stop = min(start + step, arrays[x].shape[0])
                values = None if targets is None else _read(path, targets, arrays[targets], start, stop)
                yield Batch(part, _read(path, x, arrays[x], start, stop), values)


def rows_per_block(array: StoredArray) -> int:
    """Rows in about 4 MiB; a whole number of chunks, where these do not hold more than 256 MiB of rows."""
    row_bytes = max(1, array.itemsize * math.prod(array.shape[1:]))
    require_row(row_bytes)
    rows, most = max(1, _BLOCK_BYTES // row_bytes), max(1, _MAX_BLOCK_BYTES // row_bytes)
    chunk = min(max(1, array.chunk_rows), most)
    return max(1, rows // chunk) * chunk


def _read(path: Path, name: str, array: StoredArray, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of an array; DataError where they cannot be read."""
    try:
        return array.read(start, stop)
    except UserError:
        raise
    except Exception as error:  # readers and their decompressors raise anything from OSError to RuntimeError
        raise DataError(
            f"{path}: rows {start} to {stop - 1} of {name} cannot be read ({type(error).__name__}: {error}). "
            "The file is damaged, or of a compression that is not installed."
        ) from error
