"""Arc-cosine kernels, the covariances of one layer of rectified monomials."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ntkdask.activations.rectified import angular_moment
from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError
from ntkdask.kernels import general
from ntkdask.kernels.base import KernelBase, flat_pair, flat_rows, set_diagonal
from ntkdask.kernels.blocks import Block
from ntkdask.kernels.correlations import row_squares, unit_rows
from ntkdask.kernels.scales import balanced, restored, restored_diagonal
from ntkdask.registry import register

MAX_ORDER = 150
"""Largest order for which (2·order − 1)!! does not overflow float64."""

BLOCK_ARRAYS = 8
"""Float64 arrays of a block that `angular_moment` and its callers hold at once."""


@register("kernel")
@dataclass(frozen=True)
class ArcCosine(KernelBase):
    """The arc-cosine kernel of an order n: (‖x‖‖y‖)ⁿ κ_n(cos), κ_n(c) = J_n(c)/(π (2n−1)!!), so κ_n(1) = 1.

    It is κ₀(cos) for order 0 and ‖x‖‖y‖κ₁(cos) for order 1.

    Parameters
    ----------
    order : int
        n, from 0 to 150.

    Raises
    ------
    InputError
        For another order.

    Notes
    -----
    It is E[σ(⟨w, x⟩)σ(⟨w, y⟩)] for standard normal w and σ(t) = max(t, 0)ⁿ over the root of its second moment: the NNGP kernel of
    [Dense, normalised rectified monomial]. A zero row has cosine 0 with every row. Computed in float64 block by block, returned in x's
    dtype.

    References
    ----------
    Cho & Saul 2009, eqs. 4 to 8, normalised as Zandieh et al. 2021, eq. 2; J_n: `activations.rectified.angular_moment`.

    Examples
    --------
    >>> import numpy as np
    >>> ArcCosine(1)(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[25.,  0.],
           [ 0.,  0.]])
    """

    order: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or isinstance(self.order, bool) or not 0 <= self.order <= MAX_ORDER:
            raise InputError(f"ArcCosine: order is {self.order!r}, expected an integer from 0 to {MAX_ORDER}.")

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of the rows' kind and common dtype."""
        x, y = flat_pair(x, y)
        rows = balanced(x, self.order)
        columns = rows if y is None else balanced(y, self.order)
        return restored(self._balanced(rows.rows, None if y is None else columns.rows), rows, columns)

    def _balanced(self, x: Array, y: Array | None) -> Array:
        """The kernel of rows whose squares fit their dtype."""
        left = unit_rows(x, None)
        right = left if y is None else unit_rows(y, None)
        a, b = left.squares ** (self.order / 2), right.squares ** (self.order / 2)
        a /= math.pi * math.prod(range(1, 2 * self.order, 2))

        def entries(c: Array, block: Block) -> list[Array]:
            value = angular_moment(self.order, c)
            value *= a[block.rows, None]
            value *= b[block.columns]
            return [value]

        (k,) = general.over_correlations(entries, left, right, y is None, x.dtype)
        return k if y is not None else set_diagonal(k, self.diagonal(x))

    def diagonal(self, x: Array) -> Array:
        """‖x‖²ⁿ for order n > 0; for order 0 κ₀(1) = 1, and κ₀(0) = ½ for a zero row."""
        rows = balanced(flat_rows(x), self.order)
        x, squares = rows.rows, row_squares(rows.rows)
        if self.order == 0:
            return namespace(x).where(squares > 0, 1.0, 0.5).astype(x.dtype)
        return restored_diagonal((squares**self.order).astype(x.dtype), rows)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the result and of each thread's float64 blocks."""
        return general.workspace_bytes(n, m, itemsize, row_shape, 1, 3, BLOCK_ARRAYS)
