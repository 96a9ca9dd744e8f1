"""NumPy files: `.npz` with named arrays, `.npy` with its targets in a file beside it. Nothing is unpickled.

In `.npz` the arrays are found by their names, as `named_arrays` has them: x and y, or x_train, y_train, x_val, y_val, and so on.
`data.npy` takes its targets from `data_targets.npy` where that is there. Arrays keep their shape: greyscale images (n, h, w) get no
channel axis.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ntkdask.datasets.bounds import require_memory, require_row
from ntkdask.datasets.named_arrays import Parts, find_arrays, notes_of, require_rows
from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, read_blocks, reading
from ntkdask.errors import DataError

_HEADER_BYTES = 2**16
_BLOCK_BYTES = 4 * 2**20


def open_source(path: Path, request: Request) -> Source:
    """The rows of `path`, a .npz or a .npy file."""
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        return _open_npz(path, request)
    if request.target is not None or request.rows is not None:
        raise DataError(f"{path} holds one array, its rows. Its targets lie in {path.stem}_targets.npy beside it.")
    return _open_npy(path, request)


def _open_npy(path: Path, request: Request) -> Source:
    """The rows of a .npy file, with the targets in the file beside it."""
    x, beside = _mapped(path), path.with_name(f"{path.stem}_targets.npy")
    targets = _mapped(beside) if request.kind != "unlabelled" and beside.exists() else None
    if targets is not None and targets.shape[:1] != x.shape[:1]:
        raise DataError(f"{path} has {len(x)} rows, {beside.name} has {targets.shape}. Give one target per row.")
    notes = {} if targets is None else {"target": beside.name}
    return Source(_mapped_batches(x, targets), file_digest(path), total=len(x), notes=notes)


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory and not read; DataError for objects and for a single number."""
    with reading(path):
        try:
            with _written_by_python2():
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # a damaged header raises anything from ValueError to TokenError
            if "empty file" in str(error):
                raise DataError(f"{path} holds an array of 0 rows, or nothing. Save its rows.") from error
            raise DataError(
                f"{path} is truncated, damaged or holds Python objects ({error}). Save numbers: np.save."
            ) from error
    if array.ndim == 0:
        raise DataError(f"{path} holds a single number. Save an array of rows.")
    if not len(array):
        raise DataError(f"{path} holds an array of shape {array.shape}, with 0 rows. Save its rows.")
    return array


@contextlib.contextmanager
def _written_by_python2() -> Iterator[None]:
    """NumPy reads the headers that Python 2 wrote, with a warning that asks to write them anew; there is nothing wrong with them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Reading `.npy`", UserWarning)
        yield


def _mapped_batches(x: np.ndarray, targets: np.ndarray | None) -> Iterator[Batch]:
    """The rows of mapped arrays in batches."""
    step = _rows_per_block(x.shape, x.dtype)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield Batch(ALL, x[rows], None if targets is None else np.asarray(targets[rows]))


def _open_npz(path: Path, request: Request) -> Source:
    """The rows of an .npz archive, part by part."""
    with _open_zip(path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        if not names:
            raise DataError(
                f"{path} is a zip archive without NumPy arrays. Images in class folders are read with --format images."
            )
        parts, left_out = find_arrays(path, names, request)
        shapes = {}
        for name in {n for pair in parts.values() for n in pair if n is not None}:
            with archive.open(f"{name}.npy") as stream:
                shapes[name], _, _ = _read_header(path, name, stream)
        require_rows(path, parts, shapes)
        total = sum(shapes[x][0] for x, _ in parts.values())
    return Source(_npz_batches(path, parts), file_digest(path), total=total, notes=notes_of(parts, left_out))


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open; DataError for what goes wrong while it is read."""
    with reading(path), zipfile.ZipFile(path) as archive:
        try:
            yield archive
        except (NotImplementedError, RuntimeError) as error:  # a compression of the future, a password
            raise DataError(f"{path} is no archive of np.savez, or damaged ({error}). Save it again.") from error


def _npz_batches(path: Path, parts: Parts) -> Iterator[Batch]:
    """The rows of each part in batches; `parts` as `find_arrays` gives them."""
    with _open_zip(path) as archive:
        for part, (x_name, targets_name) in parts.items():
            targets = None if targets_name is None else _whole(path, archive, targets_name)
            start = 0
            for x in _stream(path, archive, x_name):
                stop = start + len(x)
                yield Batch(part, x, None if targets is None else targets[start:stop])
                start = stop


def _whole(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of targets, which is read whole."""
    size = archive.getinfo(f"{name}.npy").file_size
    require_memory(f"{path}: the array {name!r} of targets", size, "Save targets as numbers (n,) or (n, k).")
    return np.concatenate(list(_stream(path, archive, name)))


def _stream(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """An array of the archive in blocks of rows; an array in Fortran order, whose rows lie scattered, as one block."""
    with archive.open(f"{name}.npy") as stream:
        shape, fortran, dtype = _read_header(path, name, stream)
        if fortran and len(shape) > 1:
            advice = "An array in Fortran order is read whole: save np.ascontiguousarray(x)."
            require_memory(f"{path}: the array {name!r}", math.prod(shape) * dtype.itemsize, advice)
            content = b"".join(read_blocks(stream, math.prod(shape), dtype.itemsize))
            yield np.frombuffer(content, dtype).reshape(shape, order="F")
        else:
            for block in read_blocks(stream, shape[0], dtype.itemsize * math.prod(shape[1:]), _BLOCK_BYTES):
                yield np.frombuffer(block, dtype).reshape(-1, *shape[1:])
        if stream.read(1):  # reading to the end also checks the archive's CRC
            raise DataError(f"{path}: {name} holds more bytes than its header says. It is damaged; save it again.")


def _read_header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether it is in Fortran order, dtype) of the array that the stream begins with."""
    # no header is that long; one in a zip archive may claim 4 GiB
    head = io.BytesIO(stream.read(_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _written_by_python2():
            shape, fortran, dtype = reader(head)
    except EOFError:
        raise
    except Exception as error:  # a damaged header raises anything from ValueError to TokenError
        raise DataError(f"{path}: {name} is no NumPy array ({error}). Save it again with np.savez.") from error
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which are never unpickled. Save numbers or text.")
    if any(s < 0 for s in shape) or 0 in shape[1:] or dtype.itemsize == 0:
        raise DataError(
            f"{path}: {name} has the shape {shape} and the dtype {dtype}, which hold nothing. Save it again."
        )
    require_row(dtype.itemsize * math.prod(shape[1:]))
    stream.seek(head.tell())
    return shape, fortran, dtype


def _rows_per_block(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows in about 4 MiB, at least one."""
    return max(1, _BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))
