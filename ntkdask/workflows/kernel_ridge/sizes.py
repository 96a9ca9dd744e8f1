"""What a kernel ridge run is planned from, and the plan that its record keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask.planning.resources import RidgePlan
from ntkdask.workflows.kernel_matrix.plan import MatrixShape

PREDICT_ROWS = 2048
"""Training rows that a batch of predictions meets at a time, at most."""


@dataclass(frozen=True)
class KernelShape:
    """What the sizes of a run follow from.

    Parameters
    ----------
    n_total : int
        Rows of the data, those of other folds and for testing among them.
    n_train : int
        Rows of one fit.
    row_shape : tuple of int
        Shape of a row.
    row_bytes : int
        Bytes of a row as stored.
    k : int
        Targets.
    n_runs : int
        Fits, one for each outer fold.
    inner_folds : int
        Folds for choosing alpha.
    """

    n_total: int
    n_train: int
    row_shape: tuple[int, ...]
    row_bytes: int
    k: int
    n_runs: int = 1
    inner_folds: int = 5

    def matrix(self, dtype: str) -> MatrixShape:
        """The kernel matrix of the training rows, which are gathered in the matrix's dtype."""
        row_bytes = math.prod(self.row_shape) * np.dtype(dtype).itemsize
        return MatrixShape(n=self.n_train, m=None, row_shape=self.row_shape, row_bytes=row_bytes, dtype=dtype)


@dataclass(frozen=True)
class KernelRidgePlan(RidgePlan):
    """Sizes of a kernel ridge run, chosen once, stored, and used again on resume.

    Parameters
    ----------
    matrix_tile : int
        Rows and columns of a stored tile.
    solver : str
        One of `options.SOLVERS` but "auto".
    reason : str
        Why this solver.
    rank : int
        Of the preconditioner of conjugate gradients.
    cache_bytes : int
        What a worker keeps of the matrix between products.
    memory_bytes : int or None
        What a task was planned for, the process included; None: not bounded.
    device_bytes : int
        Memory of the GPU that tasks compute on; 0 without one.
    held_bytes : int
        Training rows that stay in a worker's cache during every task.
    build_bytes : int or None
        What a task that computes a tile may take. A smaller number than memory_bytes makes it read rows for every tile and keep none.
    block_rows : int
        Training rows that predictions hold at a time.
    """

    matrix_tile: int = 2048
    solver: str = "eigh"
    reason: str = ""
    rank: int = 0
    cache_bytes: int = 0
    memory_bytes: int | None = None
    device_bytes: int = 0
    held_bytes: int = 0
    build_bytes: int | None = None
    block_rows: int = PREDICT_ROWS

    @property
    def free_bytes(self) -> int | None:
        """What a task may take beside the rows that its process keeps; None: not bounded."""
        return None if self.memory_bytes is None else self.memory_bytes - self.held_bytes
