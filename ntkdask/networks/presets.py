"""Networks by name: fully connected, convolutional as of Arora et al., Myrtle as of Shankar et al."""

from __future__ import annotations

from dataclasses import replace

from ntkdask.activations import ActivationFunction
from ntkdask.errors import InputError
from ntkdask.networks.layers import Activation, AvgPool, Conv, Dense, Flatten, GlobalAvgPool, Layer
from ntkdask.networks.network import Network

MYRTLE_BLOCKS = {5: (2, 1, 1), 7: (2, 2, 2), 10: (3, 3, 3)}
"""Convolutions before each pooling."""


def fully_connected(
    depth: int,
    activation: str | ActivationFunction = "relu",
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    normalize: bool = True,
    scale_inputs: bool = False,
    readout_weight_variance: float | None = None,
) -> Network:
    """[Dense, Activation]×depth + Dense. With the defaults its NTK is the papers' recursion, Θ(x, x) = (depth+1)‖x‖².

    depth: hidden activations, >= 0. `readout_weight_variance` overrides `weight_variance` in the last Dense.
    Source: Zandieh et al. 2021, Definition 1; MATH.md §1.
    """
    _require_depth("fully_connected", depth)
    hidden = (Dense(weight_variance, bias_variance), Activation(activation, normalize))
    readout = weight_variance if readout_weight_variance is None else readout_weight_variance
    return Network((*(hidden * depth), Dense(readout, bias_variance)), scale_inputs)


def convolutional(
    depth: int,
    filter_size: int | tuple[int, int] = 3,
    padding: str = "same",
    readout: str = "gap",
    activation: str | ActivationFunction = "relu",
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    normalize: bool = True,
    scale_inputs: bool = False,
    readout_weight_variance: float | None = None,
    trainable_ends: bool = True,
) -> Network:
    """[Conv, Activation]×depth, GlobalAvgPool ("gap") or Flatten ("flatten"), Dense.

    depth: convolutions, >= 0. trainable_ends=False freezes the first Conv and the Dense: Arora et al.'s CNTK "depth depth+1, fix=yes".
    Source: Arora et al. 2019; Zandieh et al. 2021, Definition 2; MATH.md §1.
    """
    _require_depth("convolutional", depth)
    conv = Conv(filter_size, padding, 1, weight_variance, bias_variance)
    hidden: tuple[Layer, ...] = (conv, Activation(activation, normalize)) * depth
    last = Dense(weight_variance if readout_weight_variance is None else readout_weight_variance, bias_variance)
    readouts: dict[str, Layer] = {"gap": GlobalAvgPool(), "flatten": Flatten()}
    if readout not in readouts:
        raise InputError(f"convolutional: readout is {readout!r}, expected 'gap' or 'flatten'.")
    return _network((*hidden, readouts[readout], last), scale_inputs, trainable_ends)


def myrtle(
    depth: int,
    filter_size: int | tuple[int, int] = 3,
    padding: str = "same",
    activation: str | ActivationFunction = "relu",
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    normalize: bool = True,
    scale_inputs: bool = False,
    readout_weight_variance: float | None = None,
    trainable_ends: bool = True,
) -> Network:
    """Myrtle-5, -7 or -10: blocks of 2, 1, 1 (2, 2, 2; 3, 3, 3) [Conv, Activation] with AvgPool(2) between them, the mean over what is
    left of the image, Dense. 32×32 images end at 8×8, where that mean is the original's three further poolings.

    Sides must divide by 4. Keywords as of `convolutional`. Source: Shankar et al. 2020, Figure 1.
    """
    if depth not in MYRTLE_BLOCKS:
        raise InputError(f"myrtle: depth is {depth!r}, expected 5, 7 or 10.")
    conv = (Conv(filter_size, padding, 1, weight_variance, bias_variance), Activation(activation, normalize))
    first, second, third = (conv * count for count in MYRTLE_BLOCKS[depth])
    last = Dense(weight_variance if readout_weight_variance is None else readout_weight_variance, bias_variance)
    layers: tuple[Layer, ...] = (*first, AvgPool(2), *second, AvgPool(2), *third, GlobalAvgPool(), last)
    return _network(layers, scale_inputs, trainable_ends)


def _require_depth(name: str, depth: int) -> None:
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise InputError(f"{name}: depth is {depth!r}, expected an integer >= 0.")


def _network(layers: tuple[Layer, ...], scale_inputs: bool, trainable_ends: bool) -> Network:
    if not trainable_ends:
        ends = (0, len(layers) - 1)
        layers = tuple(
            replace(layer, trainable=False) if i in ends and isinstance(layer, (Conv, Dense)) else layer
            for i, layer in enumerate(layers)
        )
    return Network(layers, scale_inputs)
