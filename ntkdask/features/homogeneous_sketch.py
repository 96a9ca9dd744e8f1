"""Sketch of the NTK and NNGP of networks of homogeneous activations: one polynomial in the cosine. Han et al. 2022, Algorithm 1.

Such a kernel is K(x, y) = ‖x‖‖y‖·κ(cos) at any depth, with κ a power series of non-negative coefficients: a polynomial
Σ_j c_j·cos^j close to κ is sketched by ‖x‖·⊕_j √c_j·Q_j x̂ (`dot_product_sketch`). Works on row blocks; called by workflows on tiles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError, nearest
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.dot_product_sketch import DotProductSketch, scaled_rows
from ntkdask.features.sketching.poly_sketch import require_leaves, rows_for_leaves
from ntkdask.features.sketching.polynomial_fits import (
    KERNELS,
    fit_error,
    homogeneous_coefficients,
    require_coefficients,
    require_degree,
    require_homogeneous,
)
from ntkdask.features.sketching.sparse_rows import SparseRows
from ntkdask.kernels.correlations import row_squares
from ntkdask.kernels.neural import NNGP, NTK
from ntkdask.networks import Network
from ntkdask.registry import register

BLOCK_BYTES = 2**23
"""Bytes of one block's features."""
SMALLEST_SHARE = 1e-13
"""Fitted coefficients below this part of their sum are rounding."""


@register("feature map")
@dataclass(frozen=True)
class HomogeneousSketch(FeatureMapBase):
    """Features ‖x‖·⊕_j √c_j·Q_j x̂ of the NTK or NNGP of homogeneous activations, unbiased for ‖x‖‖y‖·Σ_{j<=degree} c_j·cos^j.

    Zero rows have zero features.

    Parameters
    ----------
    network : Network
        Fully connected, without biases, of ReLU, ABReLU, leaky ReLU, abs, identity or the normalised Gaussian, of any depth.
    n_components : int
        Number of features, at least as many as there are powers.
    seed : int
        Seed of the sketches.
    degree : int
        Degree >= 1 of the polynomial that is fitted to κ.
    kernel : {"ntk", "nngp"}
        The kernel that is sketched.
    coefficients : tuple of float, optional
        c_0, c_1, … >= 0 in place of a fit of `degree`. None: the non-negative least-squares fit to the whole κ with Σ_j c_j =
        κ(1). The paper composes a polynomial of one layer with itself instead, which has degree^L terms.
    leaves : {"srht", "count"}
        "srht" for dense rows; "count" for SciPy sparse rows in time proportional to their non-zeros, at a larger variance.

    Raises
    ------
    InputError
        For other networks, negative coefficients and fewer components than powers.

    Notes
    -----
    The bias is that of the polynomial: at most `truncation_error`·√(K_ii·K_jj), and 0 on the diagonal. The variance
    is O(1/n_components).

    References
    ----------
    Han et al. 2022, Algorithm 1, Theorem 4.
    """

    network: Network
    n_components: int
    seed: int = 0
    degree: int = 8
    kernel: str = "ntk"
    coefficients: tuple[float, ...] | None = None
    leaves: str = "srht"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_degree(self.degree)
        if self.kernel not in KERNELS:
            raise InputError(f"HomogeneousSketch: unknown kernel {self.kernel!r}{nearest(str(self.kernel), KERNELS)}")
        require_homogeneous(self.network, "HomogeneousSketch")
        require_leaves(self.leaves)
        if self.coefficients is not None:
            object.__setattr__(self, "coefficients", tuple(require_coefficients(self.coefficients).tolist()))
        _ = self._sketch

    @property
    def target(self) -> NTK | NNGP:
        """The NTK or NNGP of the network."""
        return NTK(self.network) if self.kernel == "ntk" else NNGP(self.network)

    @functools.cached_property
    def polynomial(self) -> np.ndarray:
        """The coefficients c_j, (degree + 1,) float64; with `scale_inputs` the kernel has a further factor 1/d."""
        if self.coefficients is not None:
            return np.array(self.coefficients)
        part: Any = self.kernel
        coefficients = homogeneous_coefficients(self.network, self.degree, part)
        # a tiny coefficient of a power that κ does not have would cost components and give nothing
        return np.where(coefficients > SMALLEST_SHARE * coefficients.sum(), coefficients, 0.0)

    @property
    def truncation_error(self) -> float:
        """The largest bias, in parts of √(K_ii·K_jj): max over cosines of |Σ_j c_j·cos^j − κ(cos)|/κ(1)."""
        part: Any = self.kernel
        return fit_error(self.network, self.polynomial, part)

    @functools.cached_property
    def _sketch(self) -> DotProductSketch:
        degrees = tuple(np.nonzero(self.polynomial)[0].tolist())
        shares = tuple(self.polynomial[list(degrees)].tolist())
        return DotProductSketch(degrees, shares, self.n_components, self.seed, ("homogeneous",), self.leaves)

    @property
    def takes_sparse(self) -> bool:
        """Whether rows may be a SciPy sparse matrix: with leaves="count"."""
        return self.leaves == "count"

    def __call__(self, x: Any) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype.

        With leaves="count" x may be a SciPy sparse matrix.
        """
        x = rows_for_leaves(x, self.leaves)
        xp, (n, d) = namespace(x), x.shape
        out = xp.empty((n, self.n_components), x.dtype)
        sketch = self._sketch
        factors = xp.asarray(np.sqrt(self.polynomial[list(sketch.degrees)]))[:, None]
        divisor = d if self.network.scale_inputs else 1
        for rows in row_blocks(n, self._block_rows(x.dtype.itemsize)):
            unit, lengths = _unit_rows(x.rows(rows.start, rows.stop) if isinstance(x, SparseRows) else x[rows])
            powers = sketch.powers(unit, out[rows])
            sketch.weigh(powers, factors * (lengths / math.sqrt(divisor)), d, powers)
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: result, one block's unit rows and, given the shape of a row, the sketches' random numbers."""
        d, rows = math.prod(row_shape or (1,)), min(n, self._block_rows(itemsize))
        block = rows * (d * itemsize + 8 * (len(self._sketch.degrees) + 6))
        return n * self.n_components * itemsize + block + self._sketch.workspace_bytes(rows, d, itemsize)

    def _block_rows(self, itemsize: int) -> int:
        return max(32, min(1024, BLOCK_BYTES // (itemsize * self.n_components)))


def _unit_rows(x: Any) -> tuple[Any, Array]:
    """(rows of length 1, or 0 where they were 0; their lengths (n,) in float64) of dense rows or `SparseRows`."""
    xp, is_sparse = namespace(x), isinstance(x, SparseRows)
    lengths = xp.sqrt(x.squares() if is_sparse else row_squares(x))
    inverse = xp.where(lengths > 0, 1.0 / xp.where(lengths > 0, lengths, 1.0), 0.0)
    return (x.scaled(inverse) if is_sparse else scaled_rows(x, inverse)), lengths
