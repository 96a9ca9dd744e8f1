"""The inputs X, y and sample_weight of estimators: checked as scikit-learn checks them, then put where tasks can read them.

X is whatever scikit-learn takes (2-d arrays, data frames, lists), images (n, h, w, c), CuPy arrays, torch tensors, dask arrays, a
`Dataset` or its url. Rows keep their dtype: each batch is cast before its features are computed.
"""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import validate_data

from ntkdask.arrays import Array, as_array, is_dask, is_device_array, is_sparse, sparse_refused, to_host
from ntkdask.datasets import Dataset, open_dataset
from ntkdask.datasets.rows import DatasetRows, MemoryRows, Rows
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMap, FeatureMapBase
from ntkdask.features.fitting import DataDependentMap, learns
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.states import content_digest
from ntkdask.workflows.ridge.fit_features import fit_to_rows
from ntkdask.workflows.sources import row_shape_of, store_input
from ntkdask.workflows.sparse import SparseState, csr_rows, sparse_digest


def as_input(x: Any, name: str = "X") -> Any:
    """A url as its opened Dataset, a torch tensor or masked array as an array (errors call it `name`), everything else as it is."""
    if isinstance(x, (str, os.PathLike)):
        return open_dataset(x)
    if isinstance(x, np.ma.MaskedArray) or (hasattr(x, "__dlpack_device__") and not isinstance(x, np.ndarray)):
        return as_array(x, name)
    return x


def to_memory(x: Any, name: str = "X") -> Any:
    """The values of x in host memory: dask arrays are computed, lists and data frames stay as they are."""
    x = as_input(x.compute() if is_dask(x) else x, name)
    return to_host(x) if is_device_array(x) else x


def numerics_dtype(x: Any) -> str:
    """The dtype in which rows like x are computed: float32 for float32, float16 and uint8 images, else float64."""
    stored = np.dtype(x.dtype)
    images = stored == np.uint8 and len(row_shape_of(x)) > 1
    return "float32" if images or stored.name in ("float16", "float32") else "float64"


def check_x(estimator: Any, x: Any, *, reset: bool, allow_images: bool, allow_sparse: bool = False) -> Any:
    """Check rows for an estimator.

    Parameters
    ----------
    estimator : WithParts
        Its `n_features_in_` is set or compared; for images that is the product of a row's shape.
    x : array, dask array, data frame, list or Dataset
        From `as_input`.
    reset : bool
        True: the estimator is fitted to x. False: x must agree with the rows of the fit.
    allow_images : bool
        Whether rows may have more than one axis.
    allow_sparse : bool
        Whether x may be a SciPy sparse matrix.

    Returns
    -------
    Dataset, dask array, CuPy array, NumPy array or CSR matrix, (n, *s)

    Raises
    ------
    ValueError
        As scikit-learn does: for one axis or too many, NaN, no rows, other features than in the fit.
    """
    if isinstance(x, Dataset):
        return _agreeing(estimator, x, reset, allow_images)
    if is_sparse(x):
        if not allow_sparse:
            raise sparse_refused(x, "X")
        x = csr_rows(validate_data(estimator, x, reset=reset, dtype="numeric", accept_sparse="csr"), "X")
        if reset:
            estimator._row_shape = x.shape[1:]
        return x
    if not is_dask(x) and not is_device_array(x):
        if getattr(x, "ndim", 2) <= 2 or not allow_images:
            x = validate_data(estimator, x, reset=reset, dtype="numeric")
            if reset:
                estimator._row_shape = x.shape[1:]
            return x
        x = check_array(x, allow_nd=True, dtype="numeric", input_name="X")
    elif x.ndim < 2 or x.shape[0] == 0:
        raise InputError(f"X has shape {x.shape}; expected (n, ...) with at least one row. Reshape your data first.")
    elif is_device_array(x):
        check_finite_rows(x, name="X")
    x = _agreeing(estimator, x, reset, allow_images)
    # the store keeps bool as uint8, and uint8 images are divided by 255
    return x.astype("float32") if x.dtype == bool and x.ndim > 2 else x


def _agreeing(estimator: Any, x: Any, reset: bool, allow_images: bool) -> Any:
    """x, when its rows have the shape seen in the fit; reset: remember their shape."""
    shape = row_shape_of(x)
    if len(shape) > 1 and not allow_images:
        raise InputError(f"X has rows of shape {shape}, but expected 2-d X without features. Flatten the rows.")
    if reset:
        vars(estimator).pop("feature_names_in_", None)
        estimator._row_shape, estimator.n_features_in_ = shape, math.prod(shape)
    elif shape != estimator._row_shape:
        raise InputError(
            f"X has rows of shape {shape}, but {type(estimator).__name__} is expecting {estimator._row_shape} as in fit."
        )
    return x


def check_targets(estimator: Any, y: Any, *, classes: bool) -> np.ndarray:
    """The checked targets; ValueError as scikit-learn raises it.

    When `classes`, labels (n,), or int64 (n, k) of 0 and 1 for several labels a row; else float64 (n,) or (n, k).
    """
    if classes:
        y = to_memory(y, "y")
        shape = np.asarray(y).shape
        if len(shape) == 2 and shape[1] > 1 and type_of_target(y, input_name="y") == "multilabel-indicator":
            return _indicator(validate_data(estimator, y=y, multi_output=True))
        y = validate_data(estimator, y=y)
        check_classification_targets(y)
        return y
    y = validate_data(estimator, y=to_memory(y, "y"), multi_output=True, y_numeric=True)
    return np.asarray(y, np.float64)


def _indicator(y: np.ndarray) -> np.ndarray:
    values = np.unique(y)
    if not np.isin(values, (0, 1)).all():
        raise InputError(f"y has {y.shape[1]} labels a row with the values {values.tolist()}; expected 0 and 1.")
    return y.astype(np.int64)


def check_weights(weights: Any, n: int) -> np.ndarray | None:
    """The checked sample weights (n,), float64 and not negative; a number stands for n equal ones, None stays None."""
    if weights is None:
        return None
    if isinstance(weights, numbers.Real):
        weights = np.full(n, weights, np.float64)
    w = check_array(to_memory(weights, "sample_weight"), ensure_2d=False, dtype=np.float64, input_name="sample_weight")
    if w.shape != (n,):
        raise InputError(f"sample_weight has shape {w.shape}; expected ({n},), one weight per row of X.")
    if (w < 0).any():
        raise InputError(f"sample_weight is negative in row {np.flatnonzero(w < 0)[0]}. Weights are at least 0.")
    if not w.any():
        raise InputError("Sample weights must contain at least one non-zero number.")
    return w


def locate(
    x: Any, targets: np.ndarray | None = None, weights: np.ndarray | None = None, *, folder: Path | None, client: Any
) -> tuple[Rows, str]:
    """Put checked data where tasks can read it.

    Arrays stay in place without a client. With one they are written once, to folder/inputs/<digest>. A dask array is written
    there, too, with or without a client, when there is a folder; without a folder it is computed into memory.

    Parameters
    ----------
    x : array, dask array or Dataset, (n, *s)
        Checked rows.
    targets : array or None
        int64 labels (n,), or float64 targets (n,) or (n, k).
    weights : array (n,) or None
        Sample weights, float64.
    folder : Path or None
        Folder of the fit.
    client : distributed.Client or None
        Whose workers read the rows.

    Returns
    -------
    (Rows, str)
        The rows, and the digest of their content, "" where nothing is stored.
    """
    if isinstance(x, Dataset):
        return DatasetRows(x.url, digest=x.digest), x.digest
    if is_sparse(x):
        check_consistent_length(x, targets)
        if client is None or folder is None:
            return MemoryRows(x, targets, weights), "" if folder is None else sparse_digest(x, targets, weights)
        return SparseState.of(folder / "inputs", x, targets, weights), sparse_digest(x, targets, weights)
    if is_dask(x) and folder is None:
        x = check_array(to_memory(x), allow_nd=True, dtype="numeric", input_name="X")
    if not is_dask(x):
        x = to_host(x)
        if targets is not None:
            check_consistent_length(x, targets)
        if client is None:
            digest = "" if folder is None else content_digest(x, targets, weights)
            return MemoryRows(x, targets, weights), digest
    assert folder is not None
    keywords: dict[str, Any] = {"kind": "unlabelled"}
    if targets is not None:
        keywords["kind"] = "classification" if targets.dtype.kind == "i" else "regression"
    if keywords["kind"] == "classification" and targets is not None:
        keywords["class_names"] = [str(label) for label in range(int(targets.max()) + 1)]
    dataset = store_input(folder / "inputs", x, targets, weights=weights, **keywords)
    return DatasetRows(dataset.url, digest=dataset.digest), dataset.digest if is_dask(x) else Path(dataset.url).name


def fitted_here(features: FeatureMap | None, x: Any, targets: Any, dtype: str) -> FeatureMap | None:
    """A map of the user's own class that has a `fit`, fitted to x where x is in memory; every other map as it is.

    Maps of the package that depend on data are not fitted here: `fit_ridge` streams the rows to them.
    """
    fit = getattr(features, "fit", None)
    if fit is None or isinstance(features, FeatureMapBase) or isinstance(x, Dataset) or is_dask(x):
        return features
    return fit(prepared(x, dtype), targets)


def fitted_map(features: FeatureMap | None, x: Any, targets: Any, dtype: str) -> FeatureMap | None:
    """Fit a feature map to x and targets, where it depends on data.

    A dataset is streamed and brings its own targets; a dask array is computed into memory. InputError for targets that are missing, or
    that are given beside a dataset.
    """
    if not learns(features):
        return fitted_here(features, x, targets, dtype)
    if not isinstance(x, Dataset):
        x = x.compute() if is_dask(x) else x
        return cast(DataDependentMap, features).fit(prepared(x, dtype), None if targets is None else to_memory(targets))
    if targets is not None:
        raise InputError(f"dataset {x.url} brings its own targets: leave y out, or give arrays (dataset.x, y).")
    n_classes = len(x.class_names or ()) if x.kind == "classification" else None
    k = 0 if x.target_shape is None else n_classes or math.prod(x.target_shape or (1,))
    return fit_to_rows(features, DatasetRows(x.url, digest=x.digest), dtype, k, n_classes)


def prepared(x: Array, dtype: str) -> Array:
    """The rows as feature maps take them: cast to dtype, uint8 images divided by 255."""
    return FittedPreprocessor.for_rows(x.shape[1:], x.dtype, dtype)(x)
