"""MNIST and its relatives: IDX files, gzipped or not.

A folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-` files gives parts train and test;
a single images file needs its labels file beside it. Rows (28, 28, 1) uint8.
Format: two zero bytes, the type 8 (unsigned byte), the number of axes, their lengths as big-endian int32, the bytes.
Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ntkdask.datasets.bounds import require_memory
from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, open_binary, read_blocks, reading
from ntkdask.errors import DataError

_PREFIXES = {"train": "train", "t10k": "test", "test": "test"}


def open_source(path: Path, request: Request) -> Source:
    """The images and labels at `path`, a folder or a file of images."""
    pairs = find_pairs(path) if path.is_dir() else [(ALL, path, labels_beside(path))]
    source = Source(iter(()), file_digest(path), kind="classification")
    with reading(path):
        source.total = sum(_length(images) for _, images, _ in pairs)
    source.batches = _batches(pairs)
    return source


def find_pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """(part, file of images, file of labels) of each part in a folder, train first."""
    pairs = []
    for prefix, part in _PREFIXES.items():
        images = sorted(folder.glob(f"{prefix}-images*idx3-ubyte*"))
        if images:
            # both the packed and the unpacked file may be there
            pairs.append((part, images[0], labels_beside(images[0])))
    if not pairs:
        raise DataError(f"{folder} has no train-images-idx3-ubyte or t10k-images-idx3-ubyte. Check the folder.")
    return pairs


def labels_beside(images: Path) -> Path:
    """The file of labels beside a file of images: `images` becomes `labels`, `idx3` becomes `idx1`, gzipped or not."""
    name = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    if name == images.name.removesuffix(".gz"):
        raise DataError(
            f"{images}: an IDX images file has `images` in its name and a labels file beside it. Rename it."
        )
    for candidate in (images.with_name(name), images.with_name(name + ".gz")):
        if candidate.exists():
            return candidate
    raise DataError(f"{images} has no labels file {name} (or {name}.gz) beside it. Put it there.")


def _batches(pairs: list[tuple[str, Path, Path]]) -> Iterator[Batch]:
    """The rows of each (part, file of images, file of labels)."""
    for part, images, labels in pairs:
        with reading(images), open_binary(images) as pixels:
            shape = _read_header(images, pixels, axes=(3, 4))
            with reading(labels), open_binary(labels) as codes:
                (count,) = _read_header(labels, codes, axes=(1,))
                if count != shape[0]:
                    raise DataError(
                        f"{images} has {shape[0]} images, but {labels.name} has {count} labels. Download both again."
                    )
                require_memory(f"{labels}", count, "Check the file.")
                targets = np.frombuffer(b"".join(read_blocks(codes, count, 1)), np.uint8)
                _require_end(labels, codes)
            row = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
            start = 0
            for block in read_blocks(pixels, shape[0], math.prod(row)):
                x = np.frombuffer(block, np.uint8).reshape(-1, *row)
                yield Batch(part, x, targets[start : start + len(x)])
                start += len(x)
            _require_end(images, pixels)


def _read_header(path: Path, stream: IO[bytes], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an IDX file of bytes begins with; DataError where it has another number of axes than one of `axes`."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or magic[3] not in axes:
        wanted = " or ".join(f"000008{a:02x}" for a in axes)
        raise DataError(
            f"{path} begins with {magic.hex() or 'nothing'}; an IDX file of bytes begins with {wanted}. Check the file."
        )
    lengths = stream.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise EOFError("its header is cut")
    shape = struct.unpack(f">{magic[3]}I", lengths)
    if 0 in shape:
        raise DataError(f"{path} says that its shape is {shape}. Check the file.")
    return shape


def _length(path: Path) -> int:
    """Number of images in a file."""
    with open_binary(path) as stream:
        return _read_header(path, stream, axes=(3, 4))[0]


def _require_end(path: Path, stream: IO[bytes]) -> None:
    """DataError where the stream holds more bytes."""
    if stream.read(1):
        raise DataError(
            f"{path} holds more bytes than its header says. It is damaged or of another format; download it again."
        )
