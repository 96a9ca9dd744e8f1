"""Kernel matrices that are given, not computed: what kernel="precomputed" means to the workflows.

A fit sees the numbers of the training rows as its rows, so it can be cut into folds as any fit; a fitted model sees the rows of
K(test, training) and takes the columns of its training rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import is_dask, is_device_array
from ntkdask.datasets import Dataset
from ntkdask.errors import InputError
from ntkdask.kernels.base import KernelBase

PRECOMPUTED = "precomputed"


@dataclass(frozen=True, eq=False)
class TrainingMatrix(KernelBase):
    """A given symmetric matrix (n, n) as a kernel of the row numbers (b, 1)."""

    matrix: np.ndarray

    def __call__(self, x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
        """(b, 1), (c, 1) → (b, c) in x's dtype."""
        rows, columns = _numbers(x), _numbers(x if y is None else y)
        return self.matrix[np.ix_(rows, columns)].astype(x.dtype, copy=False)

    def diagonal(self, x: np.ndarray) -> np.ndarray:
        """(b, 1) → (b,)."""
        rows = _numbers(x)
        return self.matrix[rows, rows].astype(x.dtype, copy=False)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the result and of the same entries in the matrix's dtype."""
        return n * m * (itemsize + self.matrix.itemsize)


@dataclass(frozen=True)
class GivenColumns(KernelBase):
    """The kernel of rows of K(test, training), (b, n), with the numbers of training rows, (c, 1): columns of what is given."""

    def __call__(self, x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
        """(b, n), (c, 1) → (b, c)."""
        if y is None:
            raise InputError("a precomputed kernel knows K(test, training) only, not the matrix of the test rows.")
        return x[:, _numbers(y)]

    def diagonal(self, x: np.ndarray) -> np.ndarray:
        """Not known: InputError."""
        raise InputError("a precomputed kernel knows K(test, training) only, not the diagonal of the test rows.")

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the result."""
        return n * m * itemsize


def is_precomputed(kernel: Any) -> bool:
    """Whether the kernel is the word "precomputed"."""
    return isinstance(kernel, str) and kernel == PRECOMPUTED


def check_matrix(estimator: Any, x: Any) -> np.ndarray:
    """x when it is a square matrix in this process's memory and the fit stays there; InputError otherwise."""
    name = f'{type(estimator).__name__}(kernel="precomputed")'
    if estimator.client is not None or estimator.url is not None:
        raise InputError(f"{name} fits a matrix in memory, in this process: leave client and url out.")
    if isinstance(x, Dataset) or is_dask(x) or is_device_array(x):
        raise InputError(f"{name} takes K(training, training) as a NumPy array, and X is a {type(x).__name__}.")
    if x.ndim != 2 or x.shape[0] != x.shape[1]:
        raise InputError(
            f"{name}: K has shape {x.shape}. Precomputed matrix must be a square matrix: K(training, training)."
        )
    return x


def _numbers(rows: np.ndarray) -> np.ndarray:
    return rows[:, 0].astype(np.intp)
