"""The rows that a workflow takes (arrays, dask arrays, datasets, urls), put where tasks can read them.

Arrays are used in place without a cluster. With one they are written once, beside the results and under the digest of their content.
Dask arrays are always written. Called by featurize, kernel_matrix and the estimators.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ntkdask.arrays import as_array, is_dask, to_host
from ntkdask.datasets import Dataset, open_dataset, write_dataset
from ntkdask.datasets.rows import DatasetRows, MemoryRows, Rows
from ntkdask.errors import DtypeError, InputError
from ntkdask.files import remove
from ntkdask.states import content_digest


def as_source(x: Any, name: str = "x") -> Any:
    """x as a Dataset (urls are opened), a dask array, or a NumPy or CuPy array (n, *s) with n >= 1.

    Raises InputError where it has no rows, DtypeError where it holds no real numbers; `name` stands for x in errors.
    """
    if isinstance(x, (str, os.PathLike)):
        x = open_dataset(x)
    if isinstance(x, Dataset):
        return x
    if not is_dask(x):
        x = as_array(x)
    if x.ndim < 2 or not x.shape[0]:
        raise InputError(f"{name} has shape {x.shape}; expected (n, ...) with at least one row.")
    if math.isnan(x.shape[0]):
        raise InputError(f"{name} has an unknown number of rows. Call {name}.compute_chunk_sizes() first.")
    if x.dtype.kind not in "buif":
        raise DtypeError(f"{name} has dtype {x.dtype}; rows are real numbers, integers or bool. Encode it as numbers.")
    return x


def row_shape_of(source: Any) -> tuple[int, ...]:
    """Shape of one row of a source."""
    return source.row_shape if isinstance(source, Dataset) else tuple(source.shape[1:])


def rows_of(x: Any, folder: Path, on_cluster: bool, name: str = "x") -> tuple[Rows, str]:
    """Put rows where tasks can read them.

    Parameters
    ----------
    x : array, dask array, Dataset or url, (n, *s)
        As `as_source` takes it.
    folder : Path
        Where arrays are written, when tasks do not run in this process; dask arrays always.
    on_cluster : bool
        Whether tasks run in other processes.
    name : str
        Stands for x in errors.

    Returns
    -------
    (Rows, str)
        The rows, and the digest of their content.
    """
    source = as_source(x, name)
    if isinstance(source, Dataset):
        return DatasetRows(source.url, digest=source.digest), source.digest
    if not is_dask(source):
        source = to_host(source)
        if not on_cluster:
            return MemoryRows(source), content_digest(source)
    try:
        dataset = store_input(folder, source)
    except InputError as error:
        if name == "x":
            raise
        raise InputError(f"{name} as a dataset of its own: {error}") from error
    return DatasetRows(dataset.url, digest=dataset.digest), dataset.digest


def store_input(folder: Path, x: Any, targets: Any = None, **keywords: Any) -> Dataset:
    """Write in-memory or dask arrays once, under the digest of their content; returns the dataset.

    The keywords are those of `write_dataset`, such as weights.
    """
    if isinstance(x, np.ndarray):
        final = folder / content_digest(x, targets, keywords.get("weights"))
        return open_dataset(final) if final.exists() else write_dataset(final, x, targets, overwrite=True, **keywords)
    # the digest of a dask array is known when it is written: it gets a temporary name first, so that a path never changes content
    arriving = folder / f"arriving-{uuid4().hex}"
    try:
        final = folder / write_dataset(arriving, x, targets, **keywords).digest[:16]
        if not final.exists():
            os.replace(arriving, final)
    finally:
        remove(arriving)
    return open_dataset(final)
