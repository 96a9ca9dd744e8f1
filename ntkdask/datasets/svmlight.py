"""svmlight files: a line `label index:value index:value ...` for each row, compressed or not; stored dense, in float32.

A first pass finds the number of features and whether indices start at 0 or 1. Both passes parse a MiB of text at a
time. Labels that are all integers are classes; others are regression.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.datasets import load_svmlight_file

from ntkdask.datasets.bounds import BLOCK_BYTES, BoundedStream
from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, open_binary, reading
from ntkdask.datasets.targets import EXACT
from ntkdask.errors import DataError
from ntkdask.wording import format_bytes

_TEXT_BYTES = 2**20
MAX_FEATURES = 2**24
_DENSE_BYTES = 4 * 2**20


@dataclass
class Layout:
    """What the first pass finds: number of rows, lowest and highest index, whether all labels are integers, the largest of them."""

    rows: int = 0
    lowest: int = 1
    highest: int = 0
    integers: bool = True
    largest: float = 0.0


def open_source(path: Path, request: Request) -> Source:
    """The rows of the svmlight file at `path`."""
    with reading(path):
        layout = _scan(path)
    if layout.rows == 0 or layout.highest < layout.lowest:
        raise DataError(f"{path} has no rows with features. Check the file.")
    if layout.highest >= MAX_FEATURES:
        raise DataError(
            f"{path} has the index {layout.highest}; rows are stored dense, with at most {MAX_FEATURES:,} features. "
            "Number the features without gaps, or hash them (scikit-learn's FeatureHasher)."
        )
    if layout.integers and layout.largest >= EXACT:
        if request.kind != "regression":
            raise DataError(
                f"{path} has the label {layout.largest:.0f}, which is read with other integers as one. Number the classes from 0, or "
                "pass --kind regression."
            )
        layout.integers = False
    return Source(_batches(path, layout), file_digest(path), kind=request.kind, total=layout.rows)


def _scan(path: Path) -> Layout:
    """The layout of a file, from a pass over all of it."""
    layout = Layout()
    for x, targets in _parsed(path, None):
        layout.rows += len(targets)
        layout.largest = max(layout.largest, float(np.abs(targets).max(initial=0)))
        layout.integers = layout.integers and bool((targets == np.rint(targets)).all())
        if x.indices.size:
            layout.lowest = min(layout.lowest, int(x.indices.min()))
            layout.highest = max(layout.highest, int(x.indices.max()))
    return layout


def _batches(path: Path, layout: Layout) -> Iterator[Batch]:
    """The rows in dense batches; columns begin with the lowest index of the file."""
    n_features = layout.highest + 1
    step = max(1, _DENSE_BYTES // (4 * n_features))
    with reading(path):
        for x, targets in _parsed(path, n_features):
            labels = targets.astype(np.int64) if layout.integers else targets
            for start in range(0, len(targets), step):
                dense = x[start : start + step, layout.lowest :].toarray().astype(np.float32)
                yield Batch(ALL, dense, labels[start : start + step])


def _parsed(path: Path, n_features: int | None) -> Iterator[tuple[csr_matrix, np.ndarray]]:
    """(sparse rows, targets) of about a MiB of lines at a time; column j holds the values of index j."""
    first = 1
    with open_binary(path) as file:
        bounded = BoundedStream(file, f"{path} has a line of more than {format_bytes(BLOCK_BYTES)}. Check the file.")
        stream = io.BufferedReader(bounded, _TEXT_BYTES)
        while lines := stream.readlines(_TEXT_BYTES):
            bounded.refill()
            try:
                x, targets = load_svmlight_file(io.BytesIO(b"".join(lines)), n_features=n_features, zero_based=True)
            except ValueError as error:
                where = f"lines {first} to {first + len(lines) - 1}"
                raise DataError(f"{path}, {where}: {error}. An svmlight line reads `label index:value ...`.") from error
            yield x, targets
            first += len(lines)
