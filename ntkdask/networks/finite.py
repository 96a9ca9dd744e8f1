"""The plan of a finite network: the sizes of its weights, their factors, and the random streams that they come from.

NTK parameterisation (MATH.md §1, §5): z = factor·Wᵀh + σ_b·b, W and b standard normal, factor = σ_w/√(fan-in). The first layer
divides by √d only with `scale_inputs`, a q×q convolution by q. Every hidden Dense and Conv has `width` units, the last Dense has
`n_outputs`. The finite networks of NumPy (`features/finite`) and of torch (`modules/finite`) are both built from this plan, so they
are the same function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ntkdask import seeds
from ntkdask.errors import InputError
from ntkdask.networks.layers import AvgPool, Conv, Dense, Flatten, GlobalAvgPool, Layer, Residual
from ntkdask.networks.network import Network

Where = tuple[str | int, ...]
"""The place of a layer: its position, and within residual paths (position, "branch" or "shortcut", position, …)."""


class Signal(NamedTuple):
    """What a layer receives: (H, W) of images or None, channels, and the factor with which S ≈ scale·⟨h, h'⟩."""

    image: tuple[int, int] | None
    channels: int
    scale: float

    @property
    def size(self) -> int:
        """Numbers that one row holds."""
        return self.channels * math.prod(self.image or (1,))


@dataclass(frozen=True)
class Weights:
    """A Dense or Conv of given sizes: z = factor·Wᵀh + σ_b·b.

    Parameters
    ----------
    layer : Dense or Conv
        The description.
    image : tuple of 2 int or None
        (H, W) of its input; None for vectors.
    inputs : int
        Rows of W; of a Conv they are (filter rows, filter columns, channels) in this order.
    units : int
        Columns of W.
    factor : float
        σ_w/√(fan-in).
    start : int or None
        The first of its columns in the gradient; None when it is frozen.
    """

    layer: Dense | Conv
    image: tuple[int, int] | None
    inputs: int
    units: int
    factor: float
    start: int | None

    @property
    def size(self) -> int:
        """Numbers in W and b."""
        return (self.inputs + self.has_bias) * self.units

    @property
    def has_bias(self) -> bool:
        """Whether there are biases."""
        return self.layer.bias_variance > 0


def parameter_stream(where: Where, name: str) -> seeds.Path:
    """The path of `seeds` for the "weights" or "biases" of the layer at `where`: column j is unit j, whatever the number of units."""
    return ("finite", *where, name)


class FinitePlan:
    """A `network` of `width` units a layer, for rows of `row_shape`: (d,), or (H, W, C) where it takes images.

    Attributes
    ----------
    layers : tuple of layers
        The network's, and a frozen Dense where it does not end in one, which has the same expected kernels.
    weights : dict
        The `Weights` of every Dense and Conv, by its place.
    joins : dict
        For each Residual None where its paths are added, or factors of (branch, shortcut) where they are put side by side.
    n_parameters : int
        Trainable weights and biases.
    row_elements : int
        About how many numbers a row holds at the peak of a gradient.

    Raises
    ------
    InputError
        From a layer, where an image does not fit it.
    """

    def __init__(self, network: Network, width: int, row_shape: tuple[int, ...], n_outputs: int = 1) -> None:
        layers = network.layers
        self.layers: tuple[Layer, ...] = layers if isinstance(layers[-1], Dense) else (*layers, Dense(trainable=False))
        self.weights: dict[Where, Weights] = {}
        self.joins: dict[Where, tuple[float, float] | None] = {}
        self.n_parameters = self.row_elements = 0
        self._width, self._n_outputs = width, n_outputs
        channels = row_shape[-1]
        image = (row_shape[0], row_shape[1]) if len(row_shape) == 3 else None
        self._follow(self.layers, Signal(image, channels, 1 / channels if network.scale_inputs else 1.0), ())

    def _follow(self, layers: tuple[Layer, ...], signal: Signal, where: Where) -> Signal:
        """The signal after the layers."""
        for position, layer in enumerate(layers):
            signal = self._layer(layer, signal, (*where, position))
        return signal

    def _layer(self, layer: Layer, signal: Signal, where: Where) -> Signal:
        """The signal after one layer."""
        image, channels, scale = signal
        if isinstance(layer, (Dense, Conv)):
            signal = self._linear(layer, signal, where)
        elif isinstance(layer, AvgPool) and image:
            signal = Signal(layer.output_shape(image), channels, scale)
        elif isinstance(layer, GlobalAvgPool):
            signal = Signal(None, channels, scale)
        elif isinstance(layer, Flatten):
            pixels = math.prod(image or (1,))
            signal = Signal(None, channels * pixels, scale / pixels)
        elif isinstance(layer, Residual):
            signal = self._residual(layer, signal, where)
        self.row_elements += 2 * signal.size
        return signal

    def _linear(self, layer: Dense | Conv, signal: Signal, where: Where) -> Signal:
        """Plan the weights of a Dense or Conv; its columns of the gradient follow those of the layers before."""
        image, inputs, scale = signal
        output = image
        if isinstance(layer, Conv) and image:
            inputs *= math.prod(layer.filter)
            scale /= math.prod(layer.filter)
            output = layer.output_shape(image)
            # patches, times the factor, and their gradient
            self.row_elements += 3 * inputs * math.prod(output)
        units = self._n_outputs if where == (len(self.layers) - 1,) else self._width
        start = self.n_parameters if layer.trainable else None
        weights = Weights(layer, image, inputs, units, math.sqrt(layer.weight_variance * scale), start)
        self.weights[where] = weights
        self.n_parameters += weights.size if layer.trainable else 0
        return Signal(output, units, 1 / units)

    def _residual(self, layer: Residual, signal: Signal, where: Where) -> Signal:
        """Add the signals of both paths, or put them side by side where they differ.

        They differ where one path is not a Gaussian of the network's width (Flatten, the input). Side by side has the same inner
        products.
        """
        left = self._follow(layer.branch, signal, (*where, "branch"))
        right = self._follow(layer.shortcut, signal, (*where, "shortcut"))
        if left == right:
            self.joins[where] = None
            return left
        self.joins[where] = (math.sqrt(left.scale), math.sqrt(right.scale))
        return Signal(left.image, left.channels + right.channels, 1.0)


def finite_rows(network: Network, width: int, row_shape: tuple[int, ...], n_outputs: int) -> tuple[int, ...]:
    """row_shape as a tuple; InputError for arguments that no finite network can have."""
    if not isinstance(network, Network):
        raise InputError(f"finite network: network is {network!r}; give a Network, for example fully_connected(3).")
    for name, value in (("width", width), ("n_outputs", n_outputs)):
        if not _is_size(value):
            raise InputError(f"finite network: {name} is {value!r}, expected an integer >= 1.")
    sides = tuple(row_shape) if isinstance(row_shape, (tuple, list)) else ()
    if not sides or not all(map(_is_size, sides)):
        raise InputError(f"finite network: row_shape is {row_shape!r}, expected integers >= 1: (d,), or (H, W, C).")
    if network.takes_images and len(sides) != 3:
        raise InputError(
            f"finite network: row_shape is {row_shape!r}, but the network takes images: give (H, W, C), as in (32, 32, 3)."
        )
    return sides


def _is_size(value: object) -> bool:
    """Whether a value is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
