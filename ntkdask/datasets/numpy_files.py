"""NumPy files: `.npz` with named arrays, `.npy` with its targets in a file beside it. Nothing is unpickled.

In `.npz` the rows are called x, X, data or images, and the targets y, Y, labels or targets; names that begin with `train_` and
`test_`, or end in `_train` and `_test`, make parts. `data.npy` takes its targets from `data_targets.npy` where that is there. Arrays
keep their shape: greyscale images (n, h, w) get no channel axis.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ntkdask.datasets.bounds import require_memory, require_row
from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, read_blocks, reading
from ntkdask.errors import DataError, nearest

_X = ("x", "X", "data", "images")
_TARGETS = ("y", "Y", "labels", "targets")
_PART = re.compile(r"^(?:(?P<before>train|test)_)?(?P<name>\w+?)(?:_(?P<after>train|test))?$")
_HEADER_BYTES = 2**16
_BLOCK_BYTES = 4 * 2**20


def open_source(path: Path, request: Request) -> Source:
    """The rows of `path`, a .npz or a .npy file."""
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    return _open_npz(path, request) if is_zip else _open_npy(path)


def _open_npy(path: Path) -> Source:
    """The rows of a .npy file, with the targets in the file beside it."""
    x, beside = _mapped(path), path.with_name(f"{path.stem}_targets.npy")
    targets = _mapped(beside) if beside.exists() else None
    if targets is not None and targets.shape[:1] != x.shape[:1]:
        raise DataError(f"{path} has {len(x)} rows, {beside.name} has {targets.shape}. Give one target per row.")
    return Source(_mapped_batches(x, targets), file_digest(path), total=len(x))


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory and not read; DataError for objects and for a single number."""
    with reading(path):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # a damaged header raises anything from ValueError to TokenError
            raise DataError(
                f"{path} is truncated, damaged or holds Python objects ({error}). Save numbers: np.save."
            ) from error
    if array.ndim == 0:
        raise DataError(f"{path} holds a single number. Save an array of rows.")
    return array


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
                f"{path} is a zip archive without NumPy arrays. Archives of images are read as tar: pack it as .tar."
            )
        parts = _find_arrays(path, names, request)
        total = 0
        for x_name, _ in parts.values():
            with archive.open(f"{x_name}.npy") as stream:
                shape, _, _ = _read_header(path, x_name, stream)
            total += shape[0] if shape else 0
    return Source(_npz_batches(path, parts), file_digest(path), total=total)


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open; DataError for what goes wrong while it is read."""
    with reading(path), zipfile.ZipFile(path) as archive:
        try:
            yield archive
        except (NotImplementedError, RuntimeError) as error:  # a compression of the future, a password
            raise DataError(f"{path} is no archive of np.savez, or damaged ({error}). Save it again.") from error


def _find_arrays(path: Path, names: list[str], request: Request) -> dict[str, tuple[str, str | None]]:
    """{part: (name of its rows, name of its targets or None)}, train before test."""
    if isinstance(request.target, str) and request.target not in names:
        raise DataError(f"{path} has no array {request.target!r}{nearest(request.target, names)}")
    arrays: dict[str, dict[str, str]] = {}
    for name in names:
        match = _PART.match(name)
        if match is None:
            continue
        part = match["before"] or match["after"] or ALL
        role = (
            "targets" if name == request.target or match["name"] in _TARGETS else "x" if match["name"] in _X else None
        )
        if role == "targets" and part == ALL and isinstance(request.target, str) and name != request.target:
            continue
        if role and role in arrays.setdefault(part, {}):
            raise DataError(f"{path} has both {arrays[part][role]!r} and {name!r} for {role}. Save one of them.")
        if role:
            arrays[part][role] = name
    parts = {p: (arrays[p]["x"], arrays[p].get("targets")) for p in ("train", "test", ALL) if "x" in arrays.get(p, {})}
    if not parts or (len(parts) > 1 and ALL in parts):
        raise DataError(
            f"{path} has the arrays {', '.join(names)}. Name the rows x and the targets y, "
            "or x_train, y_train, x_test, y_test."
        )
    return parts


def _npz_batches(path: Path, parts: dict[str, tuple[str, str | None]]) -> Iterator[Batch]:
    """The rows of each part in batches; `parts` as `_find_arrays` gives them."""
    with _open_zip(path) as archive:
        for part, (x_name, targets_name) in parts.items():
            targets = None if targets_name is None else _whole(path, archive, targets_name)
            start = 0
            for x in _stream(path, archive, x_name):
                stop = start + len(x)
                yield Batch(part, x, None if targets is None else targets[start:stop])
                start = stop
            if targets is not None and len(targets) != start:
                raise DataError(
                    f"{path}: {x_name} has {start} rows, {targets_name} has {len(targets)}. Give one per row."
                )


def _whole(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of targets, which is read whole."""
    size = archive.getinfo(f"{name}.npy").file_size
    require_memory(f"{path}: the array {name!r} of targets", size, "Save targets as numbers (n,) or (n, k).")
    return np.concatenate(list(_stream(path, archive, name)))


def _stream(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """An array of the archive in blocks of rows; an array in Fortran order, whose rows lie scattered, as one block."""
    with archive.open(f"{name}.npy") as stream:
        shape, fortran, dtype = _read_header(path, name, stream)
        if not shape:
            raise DataError(f"{path}: {name} is a single number. Save an array of rows.")
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
