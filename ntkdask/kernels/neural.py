"""NTK and NNGP of networks, exactly. MATH.md §1.

Networks of images go through `convolutional`. For networks of vectors there are two ways to the same numbers. Networks of Dense and
activations with one kink at 0 (ReLU, ABReLU, leaky ReLU, abs, identity) take one compiled pass in the dtype of the inputs
(`rectified`), in which nothing cancels near c = ±1. All others go through their dual activations in float64 (`general`). The
diagonal of a symmetric call comes from the variances of the rows alone, in float64. Called by workflows on tiles, and by tests as
the target of feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array
from ntkdask.errors import InputError
from ntkdask.kernels import convolutional, general, rectified, scales
from ntkdask.kernels.base import KernelBase, flat_pair, flat_rows, set_diagonal
from ntkdask.kernels.correlations import row_squares
from ntkdask.kernels.image_rows import image_pair, image_rows
from ntkdask.networks import Network
from ntkdask.registry import register

PARTS = ("nngp", "ntk")


def _matrices(network: Network, x: Array, y: Array | None, parts: tuple[str, ...]) -> list[Array]:
    """The `parts` of rows (n, *s), (m, *s): (n, m) each, in the rows' common dtype; exact diagonals where y is None."""
    x, y = image_pair(x, y, network.layout) if network.takes_images else flat_pair(x, y)
    p = scales.power(network.layers)
    left = scales.balanced(x, p)
    right = left if y is None else scales.balanced(y, p)
    results = _balanced_matrices(network, left.rows, None if y is None else right.rows, parts)
    return [scales.restored(matrix, left, right) for matrix in results]


def _balanced_matrices(network: Network, x: Array, y: Array | None, parts: tuple[str, ...]) -> list[Array]:
    """`_matrices` of rows whose squares fit their dtype, where the network is homogeneous."""
    if network.takes_images:
        return convolutional.matrices(network, x, y, parts)
    results = _vector_matrices(network, x, y, parts)
    if y is None:
        for matrix, diagonal in zip(results, _diagonals(network, x, parts), strict=True):
            set_diagonal(matrix, diagonal)
    return results


def _vector_matrices(network: Network, x: Array, y: Array | None, parts: tuple[str, ...]) -> list[Array]:
    """The `parts` of vectors, whose diagonals are good to rounding only."""
    steps = rectified.steps(network)
    if steps is None:
        return general.matrices(network, x, y, parts)
    return rectified.matrices(steps, _divisor(network, x), x, y, parts)


def _divisor(network: Network, x: Array) -> float:
    """The number by which inner products of inputs are divided."""
    return float(x.shape[1]) if network.scale_inputs else 1.0


def _diagonals(network: Network, x: Array, parts: tuple[str, ...]) -> list[Array]:
    """The `parts` of every row with itself: (n,) each, in x's dtype."""
    x = image_rows(x, layout=network.layout) if network.takes_images else flat_rows(x)
    rows = scales.balanced(x, scales.power(network.layers))
    if network.takes_images:
        results = convolutional.diagonals(network, rows.rows, parts)
    else:
        pair = general.diagonals(network.layers, row_squares(rows.rows) / _divisor(network, x))
        with np.errstate(over="ignore"):  # where a value exceeds the dtype, inf is the answer
            results = [pair[PARTS.index(part)].astype(x.dtype) for part in parts]
    return [scales.restored_diagonal(diagonal, rows) for diagonal in results]


@dataclass(frozen=True)
class _NeuralKernel(KernelBase):
    """What the kernels of a `Network` share."""

    network: Network

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.network, Network):
            raise InputError(f"{name}: network is {self.network!r}; give a Network, for example fully_connected(1).")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the matrices that one call gives, in its order."""
        return PARTS

    @property
    def is_slow(self) -> bool:
        """Whether the network takes images."""
        return self.network.takes_images

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of results, copies of the rows, and each thread's block; InputError for rows that the network does not take."""
        if self.network.takes_images:
            return convolutional.workspace_bytes(
                self.network, n, m, itemsize, row_shape, len(self.parts), "ntk" in self.parts
            )
        steps = rectified.steps(self.network)
        if steps is None:
            return general.network_bytes(self.network, n, m, itemsize, row_shape, len(self.parts))
        return rectified.workspace_bytes(steps, n, m, itemsize, row_shape, len(self.parts))


@register("kernel")
@dataclass(frozen=True)
class NTK(_NeuralKernel):
    """The neural tangent kernel Θ of a network at infinite width.

    Parameters
    ----------
    network : Network
        The network; its NTK is T of MATH.md §1 after the last layer.

    Notes
    -----
    Θ is in NTK parameterisation: normalised ReLU of depth L gives Θ(x, x) = (L+1)‖x‖².

    Rows may have any size where the network is homogeneous or normalises them (`scales.power`), and float32 rows everywhere. Float64
    rows beyond about 1e±77 give NaN where there is a bias before the first LayerNorm, or an activation such as tanh.

    References
    ----------
    Jacot et al. 2018; MATH.md §1.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdask.networks import fully_connected
    >>> NTK(fully_connected(1))(np.array([[1.0, 0.0], [0.0, 2.0]])).round(4)
    array([[2.    , 0.6366],
           [0.6366, 8.    ]])
    """

    @property
    def parts(self) -> tuple[str, ...]:
        """The name of the one matrix that a call gives."""
        return ("ntk",)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """The matrix Θ(x_i, y_j).

        Parameters
        ----------
        x : array (n, *s), float32 or float64
            Rows; images are (n, H, W, C).
        y : array (m, *s), float32 or float64, optional
            Rows; None for x, with a symmetric result.

        Returns
        -------
        array (n, m) of the rows' kind and common dtype
            Without rows it is empty.

        Raises
        ------
        InputError
            For rows of different widths, and for rows that are not images where the network takes images.
        DtypeError
            For other dtypes.
        """
        return _matrices(self.network, x, y, self.parts)[0]

    def diagonal(self, x: Array) -> Array:
        """Θ(x_i, x_i) of rows (n, *s): (n,); (depth+1)‖x_i‖² for normalised ReLU."""
        return _diagonals(self.network, x, self.parts)[0]


@register("kernel")
@dataclass(frozen=True)
class NNGP(_NeuralKernel):
    """The covariance of a random network at infinite width, which is the kernel of its Gaussian process at initialisation.

    Parameters
    ----------
    network : Network
        The network; its NNGP kernel is S of MATH.md §1 after the last layer.

    References
    ----------
    MATH.md §1.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        """The name of the one matrix that a call gives."""
        return ("nngp",)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """The matrix S(x_i, y_j): (n, *s), (m, *s) → (n, m) of the rows' kind and common dtype; arguments and errors as of `NTK`."""
        return _matrices(self.network, x, y, self.parts)[0]

    def diagonal(self, x: Array) -> Array:
        """S(x_i, x_i) of rows (n, *s): (n,); ‖x_i‖² for normalised ReLU."""
        return _diagonals(self.network, x, self.parts)[0]


@register("kernel pair")
@dataclass(frozen=True)
class NNGPAndNTK(_NeuralKernel):
    """Both kernels of a network from one product and one pass.

    Parameters
    ----------
    network : Network
        The network.
    """

    def __call__(self, x: Array, y: Array | None = None) -> tuple[Array, Array]:
        """(NNGP, NTK), (n, m) each, of the rows' kind and common dtype; arguments and errors as of `NTK`."""
        nngp, ntk = _matrices(self.network, x, y, self.parts)
        return nngp, ntk

    def diagonal(self, x: Array) -> tuple[Array, Array]:
        """(S(x_i, x_i), Θ(x_i, x_i)) of rows (n, *s): (n,) each."""
        nngp, ntk = _diagonals(self.network, x, self.parts)
        return nngp, ntk


def both(network: Network, x: Array | None = None, y: Array | None = None) -> Any:
    """NNGP and NTK of a network in one pass.

    Parameters
    ----------
    network : Network
        The network.
    x : array (n, *s), float32 or float64, optional
        Rows; images are (n, H, W, C). None for the kernel pair itself.
    y : array (m, *s), float32 or float64, optional
        Rows; None for x, with symmetric results.

    Returns
    -------
    tuple of two arrays (n, m) of the rows' kind and common dtype, or NNGPAndNTK
        (NNGP, NTK); without x the `NNGPAndNTK` that gives them.

    Raises
    ------
    InputError, DtypeError
        As `NTK` does.
    """
    pair = NNGPAndNTK(network)
    return pair if x is None else pair(x, y)
