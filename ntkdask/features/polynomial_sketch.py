"""Sketch of the polynomial kernel, of one degree: a `PolySketch` of rows that carry the constant as one more feature.

Scikit-learn's PolynomialCountSketch is its peer, by Fourier transforms of CountSketches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array, namespace
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.dot_product_sketch import scaled_rows
from ntkdask.features.sketching.poly_sketch import PolySketch, require_leaves, rows_for_leaves
from ntkdask.features.sketching.sparse_rows import SparseRows
from ntkdask.kernels.polynomial import PolynomialKernel
from ntkdask.registry import register

BLOCK_ROWS = 1024
"""Rows whose copies with the constant are held at a time."""


@register("feature map")
@dataclass(frozen=True)
class PolynomialSketch(FeatureMapBase):
    """Sketch of (γ·⟨x, y⟩ + c₀)^p: the degree-p sketch of the rows (√γ·x, √c₀). Unbiased, with variance O(1/n_components).

    Parameters
    ----------
    n_components : int
        Number of features m >= 1.
    degree : int
        p >= 1.
    gamma : float
        γ, positive and finite.
    coef0 : float
        c₀, finite and at least 0.
    seed : int
        Seed of all random numbers.
    leaves : {"srht", "count"}
        "srht" for dense rows; "count" for SciPy sparse rows in time proportional to their non-zeros, at a larger variance.

    Raises
    ------
    InputError
        For values out of these ranges, and for sparse rows with leaves="srht".

    References
    ----------
    Ahle et al. 2020; Zandieh et al. 2021, Lemma 1; Pham & Pagh 2013 (with leaves="count").

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[3.0, 4.0]])
    >>> phi = PolynomialSketch(4096, degree=2, coef0=1.0)(x)
    >>> bool(abs(phi @ phi.T / PolynomialKernel(2, coef0=1.0)(x) - 1) < 0.1)
    True
    """

    n_components: int
    degree: int = 2
    gamma: float = 1.0
    coef0: float = 0.0
    seed: int = 0
    leaves: str = "srht"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_leaves(self.leaves)
        _ = self.target  # names parameters out of range

    @property
    def target(self) -> PolynomialKernel:
        """The polynomial kernel with these parameters."""
        return PolynomialKernel(self.degree, self.gamma, self.coef0)

    @property
    def takes_sparse(self) -> bool:
        """Whether rows may be a SciPy sparse matrix: with leaves="count"."""
        return self.leaves == "count"

    def __call__(self, x: Any) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype.

        With leaves="count" x may be a SciPy sparse matrix.
        """
        rows = rows_for_leaves(x, self.leaves)
        out = namespace(rows).empty((rows.shape[0], self.n_components), rows.dtype)
        sketch = self._sketch
        for part in row_blocks(rows.shape[0], BLOCK_ROWS):
            block = rows.rows(part.start, part.stop) if isinstance(rows, SparseRows) else rows[part]
            sketch(self._with_constant(block), degrees=(self.degree,), out=out[part][None])
        return out

    @property
    def _sketch(self) -> PolySketch:
        return PolySketch(self.degree, self.n_components, self.seed, ("polynomial",), self.leaves)

    def _with_constant(self, x: Any) -> Any:
        """Rows (√γ·x, √c₀); without the constant where it is 0."""
        xp, n = namespace(x), x.shape[0]
        scales, constants = xp.full(n, math.sqrt(self.gamma)), xp.full(n, math.sqrt(self.coef0))
        if isinstance(x, SparseRows):
            return _appended(x.scaled(scales), constants) if self.coef0 else x.scaled(scales)
        return scaled_rows(x, scales, constants if self.coef0 else None)

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: result, one block's rows and, given the shape of a row, the sketch's random numbers."""
        d, rows = math.prod(row_shape or (1,)) + 1, min(n, BLOCK_ROWS)
        held = n * self.n_components * itemsize + rows * (2 * d * itemsize + 16)
        return held + self._sketch.workspace_bytes(0, d, itemsize, (self.degree,))


def _appended(x: SparseRows, constants: np.ndarray) -> SparseRows:
    """Sparse rows with one more column, which holds `constants`, (n,)."""
    n, d = x.shape
    ends = x.starts[1:]
    data = np.insert(x.data, ends, constants.astype(x.dtype))
    columns = np.insert(x.columns, ends, d)
    return SparseRows(data, columns, x.starts + np.arange(n + 1, dtype=x.starts.dtype), (n, d + 1))
