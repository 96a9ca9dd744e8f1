"""Rows of a SciPy sparse matrix: their content as arrays, kept as a state where tasks of other processes read them.

In this process `MemoryRows` hold the matrix itself. Estimators and `featurize` call this for the maps that take sparse rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from ntkdask.datasets.rows import PART, Batch, MemoryRows
from ntkdask.errors import DtypeError, InputError
from ntkdask.states import content_digest, load_state, save_state


def csr_rows(x: Any, name: str = "x") -> sparse.csr_array:
    """A sparse matrix as CSR with sorted columns that do not repeat; InputError for other shapes, DtypeError for what is no number."""
    if x.ndim != 2 or not x.shape[0]:
        raise InputError(f"{name} has shape {x.shape}; expected (n, d) with at least one row.")
    if x.dtype.kind not in "buif":
        raise DtypeError(f"{name} has dtype {x.dtype}; rows are real numbers, integers or bool. Encode it as numbers.")
    rows = sparse.csr_array(x)
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def parts_of_csr(x: sparse.csr_array) -> dict[str, np.ndarray]:
    """The arrays of the matrix: equal for equal matrices in canonical format."""
    return {
        "data": x.data,
        "columns": x.indices.astype(np.int64),
        "starts": x.indptr.astype(np.int64),
        "shape": np.array(x.shape),
    }


def sparse_digest(x: sparse.csr_array, targets: np.ndarray | None = None, weights: np.ndarray | None = None) -> str:
    """The address of sparse rows with their targets and weights."""
    return content_digest(*parts_of_csr(x).values(), targets, weights)


@dataclass(frozen=True)
class SparseState:
    """Selected rows of a sparse matrix that is kept as a state, with targets and weights; a process reads it once.

    Parameters
    ----------
    url : str
        Of the state.
    parts_url : str or None
        Of the state with the part number of every row. None: all rows are selected.
    parts : tuple of int
        The parts that are selected.
    """

    url: str
    parts_url: str | None = None
    parts: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, folder: Path, x: sparse.csr_array, targets: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> SparseState:
        """Keep the rows in `folder`, once for equal content."""
        arrays = parts_of_csr(x)
        arrays |= {name: a for name, a in (("targets", targets), ("weights", weights)) if a is not None}
        return cls(save_state(folder, arrays))

    @property
    def memory(self) -> MemoryRows:
        """The rows in this process's memory."""
        arrays, _ = load_state(self.url)
        content = (arrays["data"], arrays["columns"], arrays["starts"])
        x: Any = sparse.csr_array(content, shape=tuple(int(side) for side in arrays["shape"]))
        rows = MemoryRows(x, arrays.get("targets"), arrays.get("weights"), parts=self.parts)
        return rows if self.parts_url is None else replace(rows, numbers=load_state(self.parts_url)[0][PART])

    @property
    def n_total(self) -> int:
        """Rows of the matrix."""
        return self.memory.n_total

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row, (d,)."""
        return self.memory.row_shape

    @property
    def dtype(self) -> str:
        """dtype of the values."""
        return self.memory.dtype

    def part_numbers(self) -> np.ndarray | None:
        """(n,) int16 part of each row."""
        return self.memory.part_numbers()

    def row_weights(self) -> np.ndarray | None:
        """(n,) weight of each row."""
        return self.memory.row_weights()

    def select(self, *parts: int) -> SparseState:
        """The same rows with other parts selected."""
        return replace(self, parts=parts)

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        """See Rows."""
        return self.memory.batches(start, stop, size)
