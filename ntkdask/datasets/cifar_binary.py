"""CIFAR-10, binary version: records of one label byte and 3 072 bytes of pixels (three 32×32 planes).

`cifar-10-binary.tar.gz` or a folder with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`; parts train and
test, rows (32, 32, 3) uint8, in the order of the batches' numbers whatever the order in the archive.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from ntkdask.datasets.source import (
    Batch,
    Request,
    Source,
    file_digest,
    files_under,
    open_tar,
    read_blocks,
    reading,
    tar_files,
)
from ntkdask.errors import DataError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
_RECORD = 1 + 3 * 32 * 32


def open_source(path: Path, request: Request) -> Source:
    """CIFAR-10 batches of `path`, an archive or a folder."""
    return Source(_batches(path), file_digest(path), kind="classification", class_names=CLASS_NAMES)


def to_nhwc(planes: np.ndarray) -> np.ndarray:
    """Images (b, 32, 32, 3) from rows (b, 3072) of three colour planes each."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def batch_files(path: Path, suffix: str) -> Iterator[tuple[str, str, IO[bytes], int]]:
    """(part, name, open stream, size in bytes) of the six batch files in order; DataError names those that are missing."""
    wanted = [("train", name + suffix) for name in TRAIN] + [("test", name + suffix) for name in TEST]
    with contextlib.ExitStack() as stack:
        entries: dict[str, Path | tarfile.TarInfo] = {}
        if path.is_dir():
            entries.update((file.name, file) for _, file in files_under(path, max_depth=1))
        else:
            archive = stack.enter_context(open_tar(path))
            entries.update((PurePosixPath(m.name).name, m) for m in tar_files(path, archive))
        missing = [name for _, name in wanted if name not in entries]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}. Download CIFAR-10 again, or unpack it completely.")
        for part, name in wanted:
            entry = entries[name]
            if isinstance(entry, Path):
                with open(entry, "rb") as file:
                    yield part, name, file, entry.stat().st_size
            else:
                member = archive.extractfile(entry)
                if member is not None:
                    yield part, name, member, entry.size


def _batches(path: Path) -> Iterator[Batch]:
    """The images and labels of the batch files; DataError where a file is no sequence of records, or a label is above 9."""
    with reading(path):
        for part, name, stream, size in batch_files(path, ".bin"):
            if size == 0 or size % _RECORD:
                raise DataError(
                    f"{path}: {name} has {size} bytes, not a multiple of {_RECORD}. It is truncated or another format; "
                    "download it again."
                )
            for block in read_blocks(stream, size // _RECORD, _RECORD):
                records = np.frombuffer(block, np.uint8).reshape(-1, _RECORD)
                if records[:, 0].max() > 9:
                    raise DataError(
                        f"{path}: {name} has a label {records[:, 0].max()}; CIFAR-10 has 0 to 9. It is damaged."
                    )
                yield Batch(part, to_nhwc(records[:, 1:]), records[:, 0])
