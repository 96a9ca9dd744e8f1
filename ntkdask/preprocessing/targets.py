"""Class labels as regression targets and back: one-hot vectors with zero mean, and the largest score."""

from __future__ import annotations

from ntkdask.arrays import FLOAT_DTYPES, Array, as_array, namespace
from ntkdask.errors import DtypeError, InputError
from ntkdask.preprocessing.rows import name_rows


def encode_targets(labels: Array, n_classes: int, dtype: str = "float32") -> Array:
    """Zero-mean one-hot targets: 1 − 1/C in the column of the label, −1/C elsewhere, C = n_classes.

    Parameters
    ----------
    labels : array (n,) of integers, NumPy or CuPy
        Labels 0 … C−1.
    n_classes : int
        C >= 2.
    dtype : {"float32", "float64"}
        Dtype of the result.

    Returns
    -------
    array (n, C)
        Every row sums to zero.

    Raises
    ------
    InputError
        For labels that are no integers or out of range, naming the first rows.

    References
    ----------
    Zandieh et al. 2021, §5.1 ("one-hot vectors with zero-mean").

    >>> import numpy as np
    >>> encode_targets(np.array([1, 0]), 2)
    array([[-0.5,  0.5],
           [ 0.5, -0.5]], dtype=float32)
    """
    labels = as_array(labels)
    if dtype not in FLOAT_DTYPES:
        raise DtypeError(f"targets of dtype {dtype!r}: use 'float32' or 'float64'")
    if n_classes < 2:
        raise InputError(f"n_classes={n_classes}: a classification has at least 2")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected (n,) integers 0..{n_classes - 1}. "
            "np.unique(labels, return_inverse=True) numbers any labels."
        )
    xp = namespace(labels)
    labels = labels.astype("int64")
    wrong = xp.flatnonzero((labels < 0) | (labels >= n_classes))
    if wrong.size:
        raise InputError(
            f"labels outside 0..{n_classes - 1} in {name_rows(wrong)}: found {int(labels[wrong[0]])}. "
            f"Check n_classes={n_classes}, or number the labels from 0."
        )
    targets = xp.full((labels.size, n_classes), -1.0 / n_classes, dtype=dtype)
    targets[xp.arange(labels.size), labels] += 1.0
    return targets


def decode(scores: Array) -> Array:
    """The label with the largest score, (n, C) → (n,) int64; among equal scores the lowest label.

    >>> import numpy as np
    >>> decode(np.array([[0.1, 0.7], [0.5, 0.5]]))
    array([1, 0])
    """
    scores = as_array(scores)
    if scores.ndim != 2:
        raise InputError(f"scores have shape {scores.shape}; expected (n, n_classes)")
    return namespace(scores).argmax(scores, axis=1).astype("int64")
