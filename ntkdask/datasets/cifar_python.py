"""CIFAR-10 and CIFAR-100, Python version: pickled dictionaries, read without trusting them.

`cifar-10-python.tar.gz` or a folder with `data_batch_1` to `data_batch_5` and `test_batch`, `cifar-100-python.tar.gz` or a folder with
`train` and `test`; parts train and test, rows (32, 32, 3) uint8.
Reading a pickle calls any function that it names, so the unpickler here allows four names and no others.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Python version".
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.datasets.cifar_binary import CIFAR10, Cifar, batch_files, cifar_of, to_nhwc
from ntkdask.datasets.source import Batch, Request, Source, file_digest, reading
from ntkdask.errors import DataError

_MAX_BYTES = 2**28
_BATCH_ROWS = 2048
# the function that a pickled array names first; NumPy has no public name for it
_RECONSTRUCT = np.empty(0).__reduce__()[0]


def open_source(path: Path, request: Request) -> Source:
    """The images of `path`, an archive or a folder."""
    cifar = cifar_of(request)
    notes = {"target": cifar.key.decode()}
    return Source(
        _batches(path, cifar), file_digest(path), kind="classification", class_names=cifar.class_names, notes=notes
    )


class BatchUnpickler(pickle.Unpickler):
    """An unpickler that allows the names which rebuild a NumPy array; DataError for any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """The object called `module.name`, where that is one of the four names that CIFAR-10 needs."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _RECONSTRUCT
        if (module, name) == ("_codecs", "encode"):
            return _latin1_encoder()
        raise DataError(f"its pickle asks for {module}.{name}, which CIFAR-10 does not need. Do not trust this file.")


def _latin1_encoder() -> Callable[[str, str], bytes]:
    """A stand-in for `codecs.encode` that knows latin1 alone."""

    # a new function each time: a pickle can set attributes on what it gets
    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise DataError(f"its pickle asks for the codec {encoding!r}, which CIFAR-10 does not need.")
        return text.encode("latin1")

    return encode


def _batches(path: Path, cifar: Cifar) -> Iterator[Batch]:
    """The images and labels of the batch files."""
    with reading(path):
        for part, name, stream, size in batch_files(path, cifar, ""):
            if size > _MAX_BYTES:
                raise DataError(f"{path}: {name} has {size} bytes, more than {cifar.name} has. Check the file.")
            data, labels = _load(f"{path}: {name}", stream.read(), cifar)
            for start in range(0, len(data), _BATCH_ROWS):
                rows = slice(start, start + _BATCH_ROWS)
                yield Batch(part, to_nhwc(data[rows]), labels[rows])


def _load(where: str, content: bytes, cifar: Cifar = CIFAR10) -> tuple[np.ndarray, np.ndarray]:
    """(data (b, 3072) uint8, labels (b,) int64) of one batch file; `where` begins messages."""
    try:
        table = BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything from UnpicklingError to MemoryError
        raise DataError(
            f"{where} is truncated or damaged ({type(error).__name__}: {error}); download it again."
        ) from error
    table = table if isinstance(table, dict) else {}
    data, labels = table.get(b"data"), table.get(cifar.key)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        raise DataError(f"{where} has no `data` of shape (n, 3072) uint8. It is not {cifar.name}'s Python version.")
    last = len(cifar.class_names) - 1
    if not (
        isinstance(labels, list) and len(labels) == len(data) and all(type(v) is int and 0 <= v <= last for v in labels)
    ):
        raise DataError(
            f"{where} has no `{cifar.key.decode()}` from 0 to {last}, one per image. It is not {cifar.name}'s Python version."
        )
    return data, np.asarray(labels, np.int64)
