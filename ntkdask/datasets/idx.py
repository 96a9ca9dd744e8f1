"""MNIST and its relatives: IDX files of bytes, integers or floats, gzipped or not.

A folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-` files gives parts train and test;
a single images file needs its labels file beside it. Rows (28, 28, 1) uint8 of MNIST; vectors (d,) of a file with two axes.
Labels of several columns, as QMNIST has them, need `target`, the number of the column.
Format: two zero bytes, the type (8 for unsigned bytes), the number of axes, their lengths and the numbers, all big-endian.
Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ntkdask.datasets.bounds import require_memory
from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, open_binary, part_of, read_blocks, reading
from ntkdask.errors import DataError

_PARTS = {"train": "train", "t10k": "test", "test": "test", "validation": "validation"}
_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_ROW_AXES = (2, 3, 4)
_KIND = re.compile(r"idx\d[-_.]?\w*$")


def open_source(path: Path, request: Request) -> Source:
    """The images and labels at `path`, a folder or a file of images."""
    pairs = find_pairs(path) if path.is_dir() else [(ALL, path, labels_beside(path))]
    source = Source(iter(()), file_digest(path), kind=request.kind)
    with reading(path):
        source.total = sum(_length(images) for _, images, _ in pairs)
    source.notes["target"] = ", ".join(labels.name for *_, labels in pairs)
    source.batches = _batches(pairs, request)
    return source


def find_pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """(part, file of images, file of labels) of each part in a folder, train first; DataError where two could be one part."""
    found: dict[str, dict[str, Path]] = {}
    for images in sorted(folder.glob("*images*idx*")):
        # both the packed and the unpacked file may be there
        stem = images.name.removesuffix(".gz")
        before = re.split(r"[-_.]", stem.partition("images")[0].strip("-_."))[-1].lower()
        part = _PARTS.get(part_of(before) or before)
        if part:
            found.setdefault(part, {}).setdefault(stem, images)
    if not found:
        raise DataError(f"{folder} has no train-images-idx3-ubyte or t10k-images-idx3-ubyte. Check the folder.")
    for part, files in found.items():
        if len(files) > 1:
            raise DataError(f"{folder} has {', '.join(files)} for the part {part}. Put one dataset in a folder.")
    return [(p, i, labels_beside(i)) for p in dict.fromkeys(_PARTS.values()) for i in found.get(p, {}).values()]


def labels_beside(images: Path) -> Path:
    """The file of labels beside a file of images: `images` becomes `labels`, `idx3-ubyte` what its numbers are, gzipped or not."""
    stem = images.name.removesuffix(".gz")
    if "images" not in stem:
        raise DataError(
            f"{images}: an IDX images file has `images` in its name and a labels file beside it. Rename it."
        )
    name = stem.replace("images", "labels").replace("idx3", "idx1")
    beginning = _KIND.sub("", name)
    if beginning == name:
        beside = [images.with_name(name), images.with_name(name + ".gz")]
    else:
        beside = sorted(f for f in images.parent.iterdir() if f.name.startswith(f"{beginning}idx"))
    found: dict[str, Path] = {}
    for file in beside:
        if file.exists():
            found.setdefault(file.name.removesuffix(".gz"), file)
    if name in found or len(found) == 1:
        return found.get(name) or next(iter(found.values()))
    if found:
        raise DataError(f"{images} has the labels files {', '.join(found)} beside it. Leave one of them there.")
    raise DataError(f"{images} has no labels file {name} (or {name}.gz) beside it. Put it there.")


def _batches(pairs: list[tuple[str, Path, Path]], request: Request) -> Iterator[Batch]:
    """The rows of each (part, file of images, file of labels)."""
    for part, images, labels in pairs:
        with reading(images), open_binary(images) as pixels:
            shape, dtype = _read_header(images, pixels, _ROW_AXES)
            targets = _read_labels(labels, request.target)
            if len(targets) != shape[0]:
                raise DataError(
                    f"{images} has {shape[0]} images, but {labels.name} has {len(targets)} labels. Download both again."
                )
            row = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
            start = 0
            for block in read_blocks(pixels, shape[0], dtype.itemsize * math.prod(row)):
                x = np.frombuffer(block, dtype).reshape(-1, *row)
                yield Batch(part, x, targets[start : start + len(x)])
                start += len(x)
            _require_end(images, pixels)


def _read_labels(path: Path, column: str | int | None) -> np.ndarray:
    """The labels (n,) of a file, of which `column` names a column where there are several."""
    with reading(path), open_binary(path) as codes:
        shape, dtype = _read_header(path, codes, (1, 2))
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        require_memory(f"{path}", shape[0] * row_bytes, "Check the file.")
        content = b"".join(read_blocks(codes, shape[0], row_bytes))
        _require_end(path, codes)
    values = np.frombuffer(content, dtype).reshape(shape)
    if values.ndim == 1:
        return values
    last = values.shape[1] - 1
    if not re.fullmatch(r"\d+", str(column)) or int(str(column)) > last:
        raise DataError(f"{path} has {last + 1} numbers a row. Say which is the target: --target 0 to {last}.")
    return values[:, int(str(column))]


def _read_header(path: Path, stream: IO[bytes], axes: tuple[int, ...]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) that an IDX file begins with; DataError where it has another number of axes than one of `axes`."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] not in axes:
        wanted = " or ".join(f"000008{a:02x}" for a in axes)
        raise DataError(
            f"{path} begins with {magic.hex() or 'nothing'}; an IDX file of bytes begins with {wanted}, of integers and floats with "
            "09, 0b, 0c, 0d or 0e for 08. Check the file."
        )
    lengths = stream.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise EOFError("its header is cut")
    shape = struct.unpack(f">{magic[3]}I", lengths)
    if 0 in shape:
        raise DataError(f"{path} says that its shape is {shape}. Check the file.")
    return shape, np.dtype(_DTYPES[magic[2]])


def _length(path: Path) -> int:
    """Number of images in a file."""
    with open_binary(path) as stream:
        return _read_header(path, stream, _ROW_AXES)[0][0]


def _require_end(path: Path, stream: IO[bytes]) -> None:
    """DataError where the stream holds more bytes."""
    if stream.read(1):
        raise DataError(
            f"{path} holds more bytes than its header says. It is damaged or of another format; download it again."
        )
