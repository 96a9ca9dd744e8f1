"""Gradient features (GradRF): the gradients of a finite random network, whose inner products are its empirical tangent kernel.

The comparator of Zandieh et al. 2021: as the network grows wider they approach the exact NTK. The network is in
`finite.network`, the limit in `kernels.neural`. Empirical kernels of trained torch modules are in `kernels.empirical`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ntkdask.activations.derivatives import derivative
from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.cache import shared
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.finite.network import FiniteNetwork
from ntkdask.kernels.image_rows import image_rows, image_shape
from ntkdask.kernels.neural import NTK
from ntkdask.networks import Activation, Conv, Dense, Network
from ntkdask.networks.network import every_layer
from ntkdask.registry import register

BLOCK_BYTES = 2**25
"""Bytes that a block of rows holds between its forward and its backward pass."""


@register("feature map")
@dataclass(frozen=True)
class GradientFeatures(FeatureMapBase):
    """φ(x) = ∇_θ f(x; θ), θ standard normal: the gradient of a finite network in NTK parameterisation for each row.

    E⟨φ(x), φ(y)⟩ → Θ(x, y) as the width of the network grows. It is exact with one hidden layer and has a bias O(1/width) from
    two on.

    Parameters
    ----------
    network : Network
        Any network whose activations are functions and that has a trainable layer.
    n_components : int
        Number of features. The width is the largest whose trainable weights and biases are at most so many for the rows at hand
        (`width`); columns left over are 0. `n_parameters` gives the number that a width needs.
    seed : int
        Seed of the weights and biases θ.

    Raises
    ------
    InputError
        For a network without trainable layers, for activations without a derivative that is a function, and, when called, for
        rows for which a network of width 1 has more than n_components parameters.

    Notes
    -----
    The width decides the error, not n_components: at depth 1 n_components ≈ width·(d + 1) and the variance is
    O(1/n_components); deeper, n_components ≈ width²·(depth − 1) and it is O(1/√n_components).

    References
    ----------
    Arora et al. 2019; MATH.md §4, §5.

    >>> from ntkdask.networks import fully_connected
    >>> GradientFeatures(fully_connected(1), GradientFeatures.n_parameters(fully_connected(1), 100, (5,))).width((5,))
    100
    """

    network: Network
    n_components: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_components(self.n_components)
        _require_network(self.network)

    @property
    def target(self) -> NTK:
        """The NTK of the network at infinite width."""
        return NTK(self.network)

    @staticmethod
    def n_parameters(network: Network, width: int, row_shape: tuple[int, ...]) -> int:
        """The n_components that gives this width: the number of trainable weights and biases for rows of `row_shape`."""
        _require_network(network)
        return _finite(network, require_components(width, "width"), _network_shape(network, row_shape)).n_parameters

    def width(self, row_shape: tuple[int, ...]) -> int:
        """Units of a hidden layer for rows of this shape; InputError where n_components is too small for one unit."""
        return _widest(self.network, self.n_components, _network_shape(self.network, row_shape))

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""
        x = image_rows(x, layout=self.network.layout) if self.network.takes_images else flatten_rows(require_float(x))
        finite = _finite(self.network, self.width(x.shape[1:]), tuple(x.shape[1:]))
        shared.reserve(2 * finite.parameters_bytes(x.dtype.itemsize))
        parameters = finite.draw(self.seed, x)
        out = namespace(x).empty((x.shape[0], self.n_components), x.dtype)
        out[:, finite.n_parameters :] = 0
        for rows in row_blocks(x.shape[0], _block_rows(finite, x.dtype.itemsize)):
            finite.gradients(x[rows], parameters, out[rows])
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: the result and, when the shape of a row is given, the network's parameters and a block of rows."""
        if row_shape is None:
            return n * self.n_components * itemsize
        finite = _finite(self.network, self.width(row_shape), _network_shape(self.network, row_shape))
        block = min(n, _block_rows(finite, itemsize)) * finite.row_elements * itemsize
        # NumPy's own buffers for broadcast products of narrow layers
        return n * self.n_components * itemsize + finite.parameters_bytes(itemsize) + block + 2**17


_finite = functools.lru_cache(maxsize=64)(FiniteNetwork)


@functools.lru_cache(maxsize=64)
def _widest(network: Network, n_components: int, row_shape: tuple[int, ...]) -> int:
    """The largest width with at most n_components parameters, by bisection: their number grows with the width."""

    def needed(width: int) -> int:
        return FiniteNetwork(network, width, row_shape).n_parameters

    if needed(1) > n_components:
        raise InputError(
            f"GradientFeatures: n_components={n_components}, but for rows of shape {row_shape} a network of width 1 has {needed(1)} "
            f"parameters. Use n_components >= {needed(1)}; GradientFeatures.n_parameters gives the number for a width."
        )
    if needed(2) == needed(1):  # there are no hidden layers
        return 1
    low, high = 1, 2
    while needed(high) <= n_components:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= n_components else (low, middle)
    return low


def _block_rows(finite: FiniteNetwork, itemsize: int) -> int:
    return max(1, min(1024, BLOCK_BYTES // (itemsize * max(1, finite.row_elements))))


def _network_shape(network: Network, row_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a row as the network takes it: an image keeps its shape, any other row is flattened."""
    if network.takes_images:
        return image_shape(tuple(row_shape), layout=network.layout)
    count = 1
    for side in row_shape:
        count *= int(side)
    if count < 1:
        raise InputError(f"rows have shape {tuple(row_shape)}: no features. Give at least one feature a row.")
    return (count,)


def _require_network(network: Network) -> None:
    """InputError unless the network has trainable parameters and every activation a derivative."""
    if not isinstance(network, Network):
        raise InputError(f"GradientFeatures: network is {network!r}; give a Network, for example fully_connected(1).")
    layers = list(every_layer(network.layers))
    if not any(layer.trainable for layer in layers if isinstance(layer, (Dense, Conv))):
        raise InputError("GradientFeatures: no layer of the network is trainable, so its gradient is empty.")
    for layer in layers:
        if isinstance(layer, Activation):
            derivative(layer.sigma, np.zeros(1))  # raises where there is none
