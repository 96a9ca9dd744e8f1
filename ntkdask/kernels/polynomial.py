"""The polynomial kernel of inner products, as scikit-learn has it: what `PolynomialSketch` approximates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError
from ntkdask.kernels import general
from ntkdask.kernels.base import KernelBase, flat_pair, flat_rows
from ntkdask.kernels.blocks import Block
from ntkdask.registry import register


@register("kernel")
@dataclass(frozen=True)
class PolynomialKernel(KernelBase):
    """The polynomial kernel (γ·⟨x, y⟩ + c₀)^p, from float64 products.

    Parameters
    ----------
    degree : int
        p >= 1.
    gamma : float
        γ, positive and finite.
    coef0 : float
        c₀, finite and at least 0; with a smaller one the kernel is not positive semi-definite.

    Raises
    ------
    InputError
        For values out of these ranges.

    References
    ----------
    scikit-learn's `polynomial_kernel`, whose default γ is 1/features.

    Examples
    --------
    >>> import numpy as np
    >>> PolynomialKernel(2, coef0=1.0)(np.array([[0.0], [1.0], [2.0]]))
    array([[ 1.,  1.,  1.],
           [ 1.,  4.,  9.],
           [ 1.,  9., 25.]])
    """

    degree: int = 3
    gamma: float = 1.0
    coef0: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.degree, int) or isinstance(self.degree, bool) or self.degree < 1:
            raise InputError(f"PolynomialKernel: degree is {self.degree!r}; give a whole number of at least 1.")
        if not 0 < self.gamma < math.inf:
            raise InputError(f"PolynomialKernel: gamma is {self.gamma!r}; give a positive number, such as 1/features.")
        if not 0 <= self.coef0 < math.inf:
            raise InputError(f"PolynomialKernel: coef0 is {self.coef0!r}; give a number of at least 0.")

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of the rows' kind and common dtype."""
        x, y = flat_pair(x, y)
        other = x if y is None else y

        def entries(block: Block) -> list[Array]:
            left, right = x[block.rows], other[block.columns]
            xp = namespace(left)
            return [self._power(xp.matmul(left.astype(xp.float64, copy=False), right.astype(xp.float64, copy=False).T))]

        return general.by_blocks(entries, x, other, y is None, x.dtype)[0]

    def diagonal(self, x: Array) -> Array:
        """(γ·‖x_i‖² + c₀)^p, (n,)."""
        x = flat_rows(x)
        xp = namespace(x)
        wide = x.astype(xp.float64, copy=False)
        return self._power(xp.einsum("ij,ij->i", wide, wide)).astype(x.dtype)

    def _power(self, products: Array) -> Array:
        """The kernel of float64 inner products, in place."""
        products *= self.gamma
        products += self.coef0
        return namespace(products).power(products, self.degree, out=products)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the result, each thread's float64 block and its block's rows in float64."""
        d = 0 if row_shape is None or itemsize == 8 else math.prod(row_shape)  # float64 rows are not copied
        rows, columns = min(general.BLOCK_ROWS, n), min(general.BLOCK_COLUMNS, m)
        return n * m * itemsize + general.workers_of(n, m) * 8 * (rows * columns + (rows + columns) * d)
