"""CIFAR-10, Python version: pickled dictionaries, read without trusting them.

`cifar-10-python.tar.gz` or a folder with `data_batch_1` to `data_batch_5` and `test_batch`; parts train and test, rows
(32, 32, 3) uint8. Reading a pickle calls any function that it names, so `inert_pickle` reads them, which calls none.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Python version".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ntkdask.datasets import inert_pickle
from ntkdask.datasets.cifar_binary import CLASS_NAMES, batch_files, to_nhwc
from ntkdask.datasets.source import Batch, Request, Source, file_digest, read_blocks, reading
from ntkdask.errors import DataError

_MAX_BYTES = 2**28


def open_source(path: Path, request: Request) -> Source:
    """CIFAR-10 batches of `path`, an archive or a folder."""
    return Source(_batches(path), file_digest(path), kind="classification", class_names=CLASS_NAMES)


def _batches(path: Path) -> Iterator[Batch]:
    """The images and labels of the batch files."""
    with reading(path):
        for part, name, stream, size in batch_files(path, ""):
            if size > _MAX_BYTES:
                raise DataError(f"{path}: {name} has {size} bytes, more than a CIFAR-10 batch. Check the file.")
            data, labels = _load(f"{path}: {name}", b"".join(read_blocks(stream, size, 1)))
            yield Batch(part, to_nhwc(data), labels)


def _load(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(data (b, 3072) uint8, labels (b,) int64) of one batch file; `where` begins messages."""
    try:
        table = inert_pickle.loads(content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything from EOFError to UnicodeDecodeError
        raise DataError(
            f"{where} is truncated or damaged ({type(error).__name__}: {error!s:.200}); download it again."
        ) from error
    # keys are text where Python 3 wrote the file anew
    table = (
        {k.encode("utf-8", "replace") if isinstance(k, str) else k: v for k, v in table.items()}
        if isinstance(table, dict)
        else {}
    )
    found, labels = table.get(b"data"), table.get(b"labels")
    data = found.to_uint8() if isinstance(found, inert_pickle.PickledArray) else None
    if data is None or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{where} has no `data` of shape (n, 3072) uint8. It is not CIFAR-10's Python version.")
    if not (
        isinstance(labels, list) and len(labels) == len(data) and all(type(v) is int and 0 <= v <= 9 for v in labels)
    ):
        raise DataError(f"{where} has no `labels` from 0 to 9, one per image. It is not CIFAR-10's Python version.")
    return data, np.asarray(labels, np.int64)
