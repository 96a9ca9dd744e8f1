"""CIFAR-10 and CIFAR-100, Python version: pickled dictionaries, read without trusting them.

`cifar-10-python.tar.gz` or a folder with `data_batch_1` to `data_batch_5` and `test_batch`, `cifar-100-python.tar.gz` or a folder with
`train` and `test`; parts train and test, rows (32, 32, 3) uint8.
Reading a pickle calls any function that it names, so `inert_pickle` reads them, which calls none.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Python version".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ntkdask.datasets import inert_pickle
from ntkdask.datasets.cifar_binary import CIFAR10, Cifar, batch_files, cifar_of, to_nhwc
from ntkdask.datasets.source import Batch, Request, Source, file_digest, read_blocks, reading
from ntkdask.errors import DataError

_MAX_BYTES = 2**28
_BATCH_ROWS = 2048


def open_source(path: Path, request: Request) -> Source:
    """The images of `path`, an archive or a folder."""
    cifar = cifar_of(request)
    notes = {"target": cifar.key.decode()}
    return Source(
        _batches(path, cifar), file_digest(path), kind="classification", class_names=cifar.class_names, notes=notes
    )


def _batches(path: Path, cifar: Cifar) -> Iterator[Batch]:
    """The images and labels of the batch files."""
    with reading(path):
        for part, name, stream, size in batch_files(path, cifar, ""):
            if size > _MAX_BYTES:
                raise DataError(f"{path}: {name} has {size} bytes, more than {cifar.name} has. Check the file.")
            data, labels = _load(f"{path}: {name}", b"".join(read_blocks(stream, size, 1)), cifar)
            for start in range(0, len(data), _BATCH_ROWS):
                rows = slice(start, start + _BATCH_ROWS)
                yield Batch(part, to_nhwc(data[rows]), labels[rows])


def _load(where: str, content: bytes, cifar: Cifar = CIFAR10) -> tuple[np.ndarray, np.ndarray]:
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
    found, labels = table.get(b"data"), table.get(cifar.key)
    data = found.to_uint8() if isinstance(found, inert_pickle.PickledArray) else None
    if data is None or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{where} has no `data` of shape (n, 3072) uint8. It is not {cifar.name}'s Python version.")
    last = len(cifar.class_names) - 1
    if not (
        isinstance(labels, list) and len(labels) == len(data) and all(type(v) is int and 0 <= v <= last for v in labels)
    ):
        raise DataError(
            f"{where} has no `{cifar.key.decode()}` from 0 to {last}, one per image. It is not {cifar.name}'s Python version."
        )
    return data, np.asarray(labels, np.int64)
