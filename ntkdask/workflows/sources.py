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

from ntkdask.arrays import as_array, float_dtype, is_dask, is_sparse, to_host
from ntkdask.datasets import Dataset, open_dataset, write_dataset
from ntkdask.datasets.rows import DatasetRows, MemoryRows, Rows
from ntkdask.errors import DtypeError, InputError
from ntkdask.files import remove
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.solvers.linearized import one_hot
from ntkdask.states import content_digest
from ntkdask.workflows.sparse import SparseState, csr_rows, sparse_digest


def as_source(x: Any, name: str = "x", *, sparse: bool = False, unknown: bool = False) -> Any:
    """x as a Dataset (urls are opened), a dask array, or a NumPy or CuPy array (n, *s) with n >= 1; sparse: or a CSR matrix.

    unknown: dask arrays may have blocks of unknown numbers of rows.

    Raises InputError where it has no rows, DtypeError where it holds no real numbers; `name` stands for x in errors.
    """
    if isinstance(x, (str, os.PathLike)):
        x = open_dataset(x)
    if isinstance(x, Dataset):
        return x
    if sparse and is_sparse(x):
        return csr_rows(x, name)
    if not is_dask(x):
        x = as_array(x, name)
    if x.ndim < 2 or not x.shape[0]:
        raise InputError(f"{name} has shape {x.shape}; expected (n, ...) with at least one row.")
    if math.isnan(x.shape[0]) and not unknown:
        raise InputError(f"{name} has an unknown number of rows. Call {name}.compute_chunk_sizes() first.")
    if x.dtype.kind not in "buif":
        raise DtypeError(f"{name} has dtype {x.dtype}; rows are real numbers, integers or bool. Encode it as numbers.")
    return x


def row_shape_of(source: Any) -> tuple[int, ...]:
    """Shape of one row of a source."""
    return source.row_shape if isinstance(source, Dataset) else tuple(source.shape[1:])


def rows_of(x: Any, folder: Path, on_cluster: bool, name: str = "x", *, sparse: bool = False) -> tuple[Rows, str]:
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
    sparse : bool
        Whether SciPy sparse matrices are taken.

    Returns
    -------
    (Rows, str)
        The rows, and the digest of their content.
    """
    source = as_source(x, name, sparse=sparse)
    if isinstance(source, Dataset):
        return DatasetRows(source.url, digest=source.digest), source.digest
    if is_sparse(source):
        return SparseState.of(folder, source) if on_cluster else MemoryRows(source), sparse_digest(source)
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


def row_count_of(source: Any) -> int:
    """Rows of a source."""
    return source.n if isinstance(source, Dataset) else int(source.shape[0])


def require_alike(test: Any, train: Any) -> None:
    """InputError unless the rows of two sources have one shape; test None: there is nothing to compare."""
    if test is not None and row_shape_of(test) != row_shape_of(train):
        raise InputError(
            f"x_test has rows of shape {row_shape_of(test)} and x_train of {row_shape_of(train)}; they must agree."
        )


def working_dtype(plan: Plan, *sources: Any) -> str:
    """What is computed from the sources: float64 where one of them has float64 rows, else float32, unless the plan says."""
    return plan.dtype or ("float64" if "float64" in {float_dtype(source.dtype) for source in sources} else "float32")


def located_rows(source: Any, folder: Path | None, on_cluster: bool = False, name: str = "x") -> tuple[Rows, str]:
    """Rows of a source where tasks can read them, for workflows that may also run without any folder.

    Parameters
    ----------
    source : Dataset, dask array or array (n, *s)
        As `as_source` gives it. Without a folder a dask array is computed into this process's memory.
    folder : Path or None
        Where rows are written that tasks cannot read in place.
    on_cluster : bool
        Whether tasks run in other processes.
    name : str
        The caller's name of the argument, for errors.

    Returns
    -------
    rows : Rows
        What tasks read.
    digest : str
        Of the content of the rows.

    Raises
    ------
    InputError
        For NaN or infinite values in an array, naming the rows. Rows of datasets and dask arrays are looked at when they are read.
    """
    if is_dask(source) and folder is None:
        source = source.compute()
    if not is_dask(source) and not isinstance(source, Dataset):
        check_finite_rows(source, name=name)
    return rows_of(source, folder or Path(), on_cluster, name)


def encoded_targets(
    targets: Any, n_classes: int | None = None, n: int | None = None, *, zero_mean: bool = True
) -> np.ndarray:
    """Targets of training rows as a float64 matrix with a column for each output.

    Parameters
    ----------
    targets : array or dask array (n,) or (n, k)
        Numbers, or with `n_classes` labels (n,) in 0..C−1.
    n_classes : int or None
        C. None: the targets are numbers, integers among them.
    n : int or None
        The number of training rows. None: as many as there are targets.
    zero_mean : bool
        Whether labels become zero-mean one-hot targets (1 − 1/C and −1/C, as `encode_targets`), or ones and zeros (`one_hot`).

    Returns
    -------
    array (n, k), float64
        On the host, contiguous.

    Raises
    ------
    InputError
        For other shapes and lengths, what holds no numbers, labels out of range, and NaN or infinite values, naming the rows.
    """
    y = to_host(as_array(targets.compute() if is_dask(targets) else targets, "targets"))
    if n_classes is not None:
        y = encode_targets(y, n_classes, "float64") if zero_mean else one_hot(y, n_classes)
    n = y.shape[0] if n is None and y.ndim else n
    if y.ndim not in (1, 2) or not n or len(y) != n or y.dtype.kind not in "buif":
        rows = "" if n is None else f" for {n} training rows"
        raise InputError(
            f"targets have shape {y.shape} and dtype {y.dtype}{rows}; give numbers (n,) or (n, k), or labels with n_classes."
        )
    y = np.ascontiguousarray(y.reshape(n, -1), np.float64)
    check_finite_rows(y, name="targets")
    return y


def targets_of(source: Any, targets: Any, n_classes: int | None, *, zero_mean: bool = True) -> np.ndarray:
    """The targets of a training set, `encoded_targets` of what the caller gave or of what the dataset holds.

    Parameters
    ----------
    source : Dataset, dask array or array (n, *s)
        The training rows, as `as_source` gives them.
    targets : array (n,) or (n, k), dask array or None
        None takes the dataset's own, and the number of its classes.
    n_classes : int or None
        As of `encoded_targets`.
    zero_mean : bool
        As of `encoded_targets`.

    Returns
    -------
    array (n, k), float64
        On the host.

    Raises
    ------
    InputError
        Where there are no targets, and as `encoded_targets`.
    """
    n = row_count_of(source)
    if targets is None:
        if not isinstance(source, Dataset) or source.kind == "unlabelled":
            raise InputError("there are no targets: give them, or a dataset that holds some as x_train.")
        targets = source.targets(0, n)
        n_classes = n_classes or (len(source.class_names or ()) if source.kind == "classification" else None)
    return encoded_targets(targets, n_classes, n, zero_mean=zero_mean)


def labels_of(source: Any, labels: Any = None) -> np.ndarray | None:
    """Labels (m,) to score predictions with: those given, or a labelled dataset's own, or None."""
    if labels is None and isinstance(source, Dataset) and source.kind == "classification":
        labels = source.targets(0, source.n)
    return None if labels is None else np.asarray(to_host(as_array(labels, "labels")))
