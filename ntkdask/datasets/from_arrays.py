"""Write arrays in memory (NumPy, CuPy, torch, memory maps) or lazy ones (dask) as a dataset, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ntkdask.arrays import as_array, is_dask, to_host
from ntkdask.datasets.dataset import Dataset, open_dataset
from ntkdask.datasets.targets import LabelEncoder
from ntkdask.datasets.writer import CHUNK_BYTES, DatasetWriter, replacing, stored_dtype
from ntkdask.errors import InputError

Rows = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


def write_dataset(
    url: str | os.PathLike[str],
    x: Any,
    targets: Any = None,
    *,
    weights: Any = None,
    class_names: Sequence[str] | None = None,
    kind: str | None = None,
    overwrite: bool = False,
    source: str = "memory",
) -> Dataset:
    """Write rows and their targets as a dataset in Zarr.

    Parameters
    ----------
    url : path
        Folder of the new dataset.
    x : NumPy, CuPy or dask array, or tensor, (n, ...)
        Rows. uint8, float32 and float64 are stored as they are, float16 as float32, bool as uint8, other integers as int64. A dask
        array is computed one row block at a time.
    targets : array (n,) or (n, k), optional
        Integers, bool or text are classes: they are mapped to 0..C-1 in sorted order, and their names kept. Floats are regression.
    weights : array (n,), optional
        Sample weights, not negative.
    class_names : sequence of str, optional
        Names of the classes in order; integer targets must then be 0..C-1 already, text one of the names.
    kind : str, optional
        "classification", "regression" or "unlabelled", instead of what the dtype of the targets says.
    overwrite : bool, optional
        Replace a dataset that is at `url`.
    source : str, optional
        Where the arrays came from, for the provenance.

    Returns
    -------
    Dataset
        The stored dataset, opened.

    Raises
    ------
    InputError
        For NaN or infinite values (the message names rows), and for dtypes or shapes that do not fit.
    DataError
        Where something is at `url` and `overwrite` is False, or it is no dataset.
    """
    columns = {"x": _column(x, "x")}
    for name, values in (("targets", targets), ("weights", weights)):
        if values is not None:
            columns[name] = _column(values, name)
    _require_lengths(columns)
    labels = LabelEncoder(class_names, explicit=kind == "classification")
    with replacing(url, overwrite) as partial:
        writer = DatasetWriter(partial, kind=kind, labels=labels)
        for block in _row_blocks(columns):
            writer.append(*block)
        writer.finish({"source": source, "source_digest": "memory", "importer": "arrays"})
    return open_dataset(url)


def _column(values: Any, name: str) -> Any:
    """`values` as an object with shape, dtype and row slices, on the device where it lies; InputError for what has no rows."""
    if is_dask(values) or (hasattr(values, "chunks") and hasattr(values, "dtype")):
        column = values
    else:
        try:
            column = as_array(values, name)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{name} is no array: its rows disagree ({error}). Give rows of one shape.") from error
    if column.ndim == 0:
        raise InputError(f"{name} is a single {type(values).__name__}, not an array of rows. Give (n, ...) rows.")
    if name == "x":
        if column.ndim < 2:
            raise InputError(
                f"x has shape {column.shape}; expected (n, ...) with one example per row. Reshape it first."
            )
        stored_dtype(column.dtype)
    return column


def _require_lengths(columns: dict[str, Any]) -> None:
    """InputError where arrays have different lengths, or no rows; a length that dask does not know yet is left out."""
    lengths = {name: int(c.shape[0]) for name, c in columns.items() if not np.isnan(c.shape[0])}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the arrays have different lengths: {lengths}. Give one target and one weight per row of x.")
    if lengths.get("x") == 0:
        raise InputError("x has 0 rows. Give at least one.")


def _row_blocks(columns: dict[str, Any]) -> Iterator[Rows]:
    """(x, targets, weights) in blocks of rows: the row blocks of a dask x, else about one chunk."""
    start = 0
    for index, x in enumerate(_x_blocks(columns["x"])):
        stop = start + len(x)
        targets, weights = (_rows(columns.get(name), name, index, start, stop) for name in ("targets", "weights"))
        yield x, targets, weights
        start = stop
    # the length of a filtered dask array is known only now
    _require_lengths({**columns, "x": np.empty(start)})


def _x_blocks(x: Any) -> Iterator[np.ndarray]:
    """The rows of x in blocks, on the host."""
    if is_dask(x):
        for i in range(x.numblocks[0]):
            yield to_host(x.blocks[i].compute(), "x")
        return
    row_bytes = max(1, x.dtype.itemsize * int(np.prod(x.shape[1:], dtype=np.int64)))
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, x.shape[0], step):
        yield to_host(x[start : start + step], "x")


def _rows(values: Any, name: str, block: int, start: int, stop: int) -> np.ndarray | None:
    """Rows [start, stop) of targets or weights; block number `block` of a dask array whose length is not known."""
    if values is None:
        return None
    if not is_dask(values):
        return to_host(values[start:stop], name)
    lazy = values.blocks[block] if np.isnan(values.shape[0]) else values[start:stop]
    return to_host(lazy.compute(), name)
