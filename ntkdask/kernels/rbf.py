"""The Gaussian kernel of distances, to compare neural kernels with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError
from ntkdask.kernels import general
from ntkdask.kernels.base import KernelBase, flat_pair, flat_rows
from ntkdask.kernels.blocks import Block
from ntkdask.registry import register

BLOCK_ARRAYS = 6
"""Float64 arrays of a block that are alive at once."""

NEAR = 1e-6
"""Squared distances below this part of ‖x‖² + ‖y‖² have lost digits in the product and are summed from differences."""

PRODUCT_ERROR = 8 * float(np.finfo(np.float64).eps)
"""Error of a squared distance from a float64 product, as a part of ‖x‖² + ‖y‖²."""

KERNEL_ERROR = {"float32": 1e-8, "float64": 1e-13}
"""Entries whose error from a product may be larger than this are summed from differences, too."""

PAIR_ELEMENTS = 2**12
"""Elements of the differences of rows that are held at a time."""


@register("kernel")
@dataclass(frozen=True)
class RBF(KernelBase):
    """The Gaussian kernel exp(−γ‖x − y‖²), exactly 1 on the diagonal and for duplicate rows.

    Parameters
    ----------
    gamma : float
        γ, positive and finite; 1/(2σ²) for a Gaussian of width σ.

    Raises
    ------
    InputError
        For another gamma.

    Notes
    -----
    ‖x − y‖² comes from a float64 product of rows less a common centre (distances do not change, but less cancels), and from the
    differences themselves where it is small beside ‖x‖² + ‖y‖². Returned in x's dtype.

    References
    ----------
    Rahimi & Recht 2007.

    Examples
    --------
    >>> import numpy as np
    >>> RBF(0.5)(np.array([[0.0], [1.0]])).round(4)
    array([[1.    , 0.6065],
           [0.6065, 1.    ]])
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, (int, float)) or not (0 < self.gamma < math.inf):
            raise InputError(
                f"RBF: gamma is {self.gamma!r}, expected a positive number; 1/features suits standardised rows."
            )

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of the rows' kind and common dtype."""
        x, y = flat_pair(x, y)
        other = x if y is None else y

        def entries(block: Block) -> list[Array]:
            return [self._entries(x[block.rows], other[block.columns], x.dtype)]

        return general.by_blocks(entries, x, other, y is None, x.dtype)[0]

    def _entries(self, x: Array, y: Array, dtype: np.dtype) -> Array:
        """One block (R, C) in float64."""
        xp = namespace(x)
        centre = y.mean(axis=0, dtype=xp.float64)
        left, right = x - centre, y - centre
        sizes = xp.einsum("ij,ij->i", left, left)[:, None] + xp.einsum("ij,ij->i", right, right)
        squares = left @ right.T
        squares *= -2
        squares += sizes
        close = squares <= NEAR * sizes
        error = PRODUCT_ERROR * sizes
        if float(self.gamma * error.max()) > KERNEL_ERROR[dtype.name]:
            # the product's error changes the entry by exp(−γs)·γ·error
            bound = xp.log(xp.maximum(self.gamma / KERNEL_ERROR[dtype.name] * error, np.finfo(np.float64).tiny))
            close |= self.gamma * (squares - error) < bound
        i, j = xp.nonzero(close)
        step = max(1, PAIR_ELEMENTS // x.shape[1])
        for first in range(0, len(i), step):
            rows, columns = i[first : first + step], j[first : first + step]
            difference = x[rows].astype(xp.float64, copy=False) - y[columns]
            squares[rows, columns] = xp.einsum("ij,ij->i", difference, difference)
        squares *= -self.gamma
        return xp.exp(squares, out=squares)

    def diagonal(self, x: Array) -> Array:
        """Ones, (n,)."""
        x = flat_rows(x)
        return namespace(x).ones(x.shape[0], x.dtype)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the result, each thread's float64 blocks and its blocks' rows in float64."""
        d = 0 if row_shape is None else math.prod(row_shape)
        rows = (
            general.workers_of(n, m)
            * 8
            * ((min(general.BLOCK_ROWS, n) + min(general.BLOCK_COLUMNS, m)) * d + 4 * max(PAIR_ELEMENTS, d))
        )
        return general.workspace_bytes(n, m, itemsize, None, 1, 0, BLOCK_ARRAYS) + rows
