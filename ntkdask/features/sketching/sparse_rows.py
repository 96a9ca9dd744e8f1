"""Rows of SciPy's sparse matrices, for the sketches that take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import FLOAT_DTYPES, as_array
from ntkdask.errors import DtypeError, InputError


@dataclass(frozen=True)
class SparseRows:
    """A CSR matrix of n rows of d features: the non-zeros of row i are data[starts[i] : starts[i + 1]], in columns `columns[...]`.

    Parameters
    ----------
    data : array (nnz,), float32 or float64
        The non-zeros.
    columns : array (nnz,), int32 or int64
        Their columns, below d, ascending and without repetition in a row.
    starts : array (n + 1,)
        Where each row starts in `data`.
    shape : tuple of int
        (n, d).
    """

    data: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    shape: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.data.dtype

    def squares(self) -> np.ndarray:
        """Squared lengths of the rows, (n,) float64."""
        return np.bincount(self._row_of_each(), self.data.astype(np.float64) ** 2, self.shape[0])

    def scaled(self, factors: np.ndarray) -> SparseRows:
        """Every row times its entry of `factors`, (n,) float64, rounded to the dtype of the values."""
        values = (self.data * factors[self._row_of_each()]).astype(self.dtype)
        return SparseRows(values, self.columns, self.starts, self.shape)

    def dense(self) -> np.ndarray:
        """The dense matrix (n, d)."""
        out = np.zeros(self.shape, self.dtype)
        out[self._row_of_each(), self.columns] = self.data
        return out

    def _row_of_each(self) -> np.ndarray:
        return np.repeat(np.arange(self.shape[0]), np.diff(self.starts))

    def rows(self, start: int, stop: int) -> SparseRows:
        """Rows start … stop − 1, without a copy of the values."""
        part = slice(self.starts[start], self.starts[stop])
        starts = self.starts[start : stop + 1] - self.starts[start]
        return SparseRows(self.data[part], self.columns[part], starts, (stop - start, self.shape[1]))


def sparse_rows(x: Any, name: str = "x") -> SparseRows:
    """A SciPy sparse matrix (CSR without a copy, others converted) as `SparseRows`; repeated entries are summed.

    Raises DtypeError unless its values are float32 or float64, InputError for one dimension and for columns out of range.
    """
    if x.dtype.name not in FLOAT_DTYPES:
        raise DtypeError(
            f"{name} is sparse with dtype {x.dtype}, but feature maps take float32 or float64. Cast it first: "
            f"{name}.astype('float32')."
        )
    if x.ndim != 2:
        raise InputError(f"{name} has shape {x.shape}; expected (n, d) with one example per row.")
    x = x.tocsr()
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    if x.nnz and not (x.indices.min() >= 0 and x.indices.max() < x.shape[1]):
        raise InputError(
            f"{name} has column indices from {x.indices.min()} to {x.indices.max()}, but {x.shape[1]} columns."
        )
    # compiled loops read this machine's byte order alone
    return SparseRows(as_array(x.data, name), x.indices, x.indptr, (int(x.shape[0]), int(x.shape[1])))
