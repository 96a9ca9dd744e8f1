"""NTK and NNGP of networks, exactly. MATH.md §1.

Networks of images go through `convolutional`. For networks of vectors there are two ways to the same numbers: networks of Dense and
activations that all have one kink at 0 (ReLU, ABReLU, leaky ReLU, abs, identity) take one compiled pass in the input's dtype
(`rectified`), in which nothing cancels near c = ±1; all others go through their dual activations in float64 (`general`). The diagonal
of a symmetric call comes from the rows' variances alone, in float64. Called by workflows on tiles and by tests as the target of the
feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ntkdask.arrays import Array
from ntkdask.errors import InputError
from ntkdask.kernels import convolutional, general, rectified
from ntkdask.kernels.base import KernelBase, flat_pair, flat_rows, set_diagonal
from ntkdask.kernels.correlations import row_squares
from ntkdask.networks import Network
from ntkdask.registry import register

PARTS = ("nngp", "ntk")


def _matrices(network: Network, x: Array, y: Array | None, parts: tuple[str, ...]) -> list[Array]:
    """The `parts` of (n, *s), (m, *s) → (n, m) each, in x's dtype; exact diagonals where y is None."""
    if network.takes_images:
        return convolutional.matrices(network, x, y, parts)
    x, y = flat_pair(x, y)
    found = _found(network, x, y, parts)
    if y is None:
        for matrix, diagonal in zip(found, _diagonals(network, x, parts), strict=True):
            set_diagonal(matrix, diagonal)
    return found


def _found(network: Network, x: Array, y: Array | None, parts: tuple[str, ...]) -> list[Array]:
    steps = rectified.steps(network)
    if steps is None:
        return general.matrices(network, x, y, parts)
    return rectified.matrices(steps, _divisor(network, x), x, y, parts)


def _divisor(network: Network, x: Array) -> float:
    return float(x.shape[1]) if network.scale_inputs else 1.0


def _diagonals(network: Network, x: Array, parts: tuple[str, ...]) -> list[Array]:
    if network.takes_images:
        return convolutional.diagonals(network, x, parts)
    x = flat_rows(x)
    pair = general.diagonals(network.layers, row_squares(x) / _divisor(network, x))
    return [pair[PARTS.index(part)].astype(x.dtype) for part in parts]


@dataclass(frozen=True)
class _NeuralKernel(KernelBase):
    network: Network
    parts: ClassVar[tuple[str, ...]] = PARTS

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.network, Network):
            raise InputError(f"{name}: network is {self.network!r}; give a Network, for example fully_connected(1).")

    @property
    def is_slow(self) -> bool:
        """Whether the network takes images."""
        return self.network.takes_images

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Results, copies of the rows, and each thread's block; bytes. InputError for rows that the network does not take."""
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
    """The neural tangent kernel Θ of a `Network` at infinite width. Source: Jacot et al. 2018; MATH.md §1."""

    parts: ClassVar[tuple[str, ...]] = ("ntk",)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of x's kind and dtype, float32 or float64; images are (n, H, W, C).

        Raises InputError for rows of different widths and for rows that are not images where the network takes images, DtypeError
        for other dtypes. No rows give an empty matrix.
        """
        return _matrices(self.network, x, y, self.parts)[0]

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): Θ(x_i, x_i); (depth+1)‖x_i‖² for normalised ReLU."""
        return _diagonals(self.network, x, self.parts)[0]


@register("kernel")
@dataclass(frozen=True)
class NNGP(_NeuralKernel):
    """The covariance of a random `Network` at infinite width (its Gaussian process at initialisation). Source: MATH.md §1."""

    parts: ClassVar[tuple[str, ...]] = ("nngp",)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of x's kind and dtype; errors as of `NTK`."""
        return _matrices(self.network, x, y, self.parts)[0]

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): S(x_i, x_i); ‖x_i‖² for normalised ReLU."""
        return _diagonals(self.network, x, self.parts)[0]


@register("kernel pair")
@dataclass(frozen=True)
class NNGPAndNTK(_NeuralKernel):
    """Both kernels of a `Network` from one product and one pass. `parts` names what a call gives, in its order."""

    def __call__(self, x: Array, y: Array | None = None) -> tuple[Array, Array]:
        """(n, *s), (m, *s) → (NNGP, NTK), (n, m) each, of x's kind and dtype; errors as of `NTK`."""
        nngp, ntk = _matrices(self.network, x, y, self.parts)
        return nngp, ntk

    def diagonal(self, x: Array) -> tuple[Array, Array]:
        """(n, *s) → (S(x_i, x_i), Θ(x_i, x_i)), (n,) each."""
        nngp, ntk = _diagonals(self.network, x, self.parts)
        return nngp, ntk


def both(network: Network, x: Array | None = None, y: Array | None = None) -> Any:
    """(NNGP, NTK) in one pass: two (n, m) matrices of x's dtype. Without x, the `NNGPAndNTK` that gives them."""
    pair = NNGPAndNTK(network)
    return pair if x is None else pair(x, y)
