"""CIFAR-10, Python version: pickled dictionaries, read without trusting them.

`cifar-10-python.tar.gz` or a folder with `data_batch_1` to `data_batch_5` and `test_batch`; parts train and test, rows
(32, 32, 3) uint8. Reading a pickle calls any function that it names, so the unpickler here allows four names and no others.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Python version".
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.datasets.cifar_binary import CLASS_NAMES, batch_files, to_nhwc
from ntkdask.datasets.source import Batch, Request, Source, file_digest, reading
from ntkdask.errors import DataError

_MAX_BYTES = 2**28
# the function that a pickled array names first; NumPy has no public name for it
_RECONSTRUCT = np.empty(0).__reduce__()[0]


def open_source(path: Path, request: Request) -> Source:
    """CIFAR-10 batches of `path`, an archive or a folder."""
    return Source(_batches(path), file_digest(path), kind="classification", class_names=CLASS_NAMES)


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


def _batches(path: Path) -> Iterator[Batch]:
    """The images and labels of the batch files."""
    with reading(path):
        for part, name, stream, size in batch_files(path, ""):
            if size > _MAX_BYTES:
                raise DataError(f"{path}: {name} has {size} bytes, more than a CIFAR-10 batch. Check the file.")
            data, labels = _load(f"{path}: {name}", stream.read())
            yield Batch(part, to_nhwc(data), labels)


def _load(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
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
    data, labels = table.get(b"data"), table.get(b"labels")
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        raise DataError(f"{where} has no `data` of shape (n, 3072) uint8. It is not CIFAR-10's Python version.")
    if not (
        isinstance(labels, list) and len(labels) == len(data) and all(type(v) is int and 0 <= v <= 9 for v in labels)
    ):
        raise DataError(f"{where} has no `labels` from 0 to 9, one per image. It is not CIFAR-10's Python version.")
    return data, np.asarray(labels, np.int64)
