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

    Parameters
    ----------
    depth : int
        Hidden activations, >= 0.
    activation : str or ActivationFunction
        σ, by name or as an object.
    weight_variance : float
        σ_w² > 0 of every Dense.
    bias_variance : float
        σ_b² >= 0 of every Dense.
    normalize : bool
        Whether σ is scaled to E σ(t)² = 1 for t ~ N(0, 1), as in `Activation`.
    scale_inputs : bool
        Whether inner products of inputs are divided by their dimension, as in `Network`.
    readout_weight_variance : float, optional
        σ_w² of the last Dense, where it differs.

    Returns
    -------
    Network

    Raises
    ------
    InputError
        For values out of these ranges.

    References
    ----------
    Zandieh et al. 2021, Definition 1; MATH.md §1.

    Examples
    --------
    >>> [type(layer).__name__ for layer in fully_connected(1).layers]
    ['Dense', 'Activation', 'Dense']
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
    layout: str | None = None,
) -> Network:
    """[Conv, Activation]×depth, a readout that makes vectors of images, Dense.

    Parameters
    ----------
    depth : int
        Convolutions, >= 0.
    filter_size : int or tuple of 2 int
        Of every Conv: one number, or (rows, columns).
    padding : {"same", "valid", "circular"}
        Of every Conv.
    readout : {"gap", "flatten"}
        GlobalAvgPool or Flatten.
    activation : str or ActivationFunction
        σ, by name or as an object.
    weight_variance : float
        σ_w² > 0 of every Conv and of the Dense.
    bias_variance : float
        σ_b² >= 0 of every Conv and of the Dense.
    normalize : bool
        Whether σ is scaled to E σ(t)² = 1 for t ~ N(0, 1), as in `Activation`.
    scale_inputs : bool
        Whether inner products of pixels are divided by the number of channels, as in `Network`.
    readout_weight_variance : float, optional
        σ_w² of the Dense, where it differs.
    trainable_ends : bool
        False freezes the first Conv and the Dense, which is Arora et al.'s CNTK "depth depth+1, fix=yes".
    layout : {"nhwc"} or None
        "nhwc" takes images of 1, 3 or 4 rows as they are, as in `Network`.

    Returns
    -------
    Network

    Raises
    ------
    InputError
        For values out of these ranges.

    References
    ----------
    Arora et al. 2019; Zandieh et al. 2021, Definition 2; MATH.md §1.
    """
    _require_depth("convolutional", depth)
    conv = Conv(filter_size, padding, 1, weight_variance, bias_variance)
    hidden: tuple[Layer, ...] = (conv, Activation(activation, normalize)) * depth
    last = Dense(weight_variance if readout_weight_variance is None else readout_weight_variance, bias_variance)
    readouts: dict[str, Layer] = {"gap": GlobalAvgPool(), "flatten": Flatten()}
    if readout not in readouts:
        raise InputError(f"convolutional: readout is {readout!r}, expected 'gap' or 'flatten'.")
    return _network((*hidden, readouts[readout], last), scale_inputs, trainable_ends, layout)


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
    layout: str | None = None,
) -> Network:
    """Myrtle-5, -7 or -10: three blocks of [Conv, Activation] with AvgPool(2) between them, GlobalAvgPool, Dense.

    Parameters
    ----------
    depth : {5, 7, 10}
        Blocks of 2, 1, 1, of 2, 2, 2 or of 3, 3, 3 [Conv, Activation].
    filter_size : int or tuple of 2 int
        Of every Conv: one number, or (rows, columns).
    padding : {"same", "valid", "circular"}
        Of every Conv.
    activation : str or ActivationFunction
        σ, by name or as an object.
    weight_variance : float
        σ_w² > 0 of every Conv and of the Dense.
    bias_variance : float
        σ_b² >= 0 of every Conv and of the Dense.
    normalize : bool
        Whether σ is scaled to E σ(t)² = 1 for t ~ N(0, 1), as in `Activation`.
    scale_inputs : bool
        Whether inner products of pixels are divided by the number of channels, as in `Network`.
    readout_weight_variance : float, optional
        σ_w² of the Dense, where it differs.
    trainable_ends : bool
        False freezes the first Conv and the Dense.
    layout : {"nhwc"} or None
        "nhwc" takes images of 1, 3 or 4 rows as they are, as in `Network`.

    Returns
    -------
    Network

    Raises
    ------
    InputError
        For values out of these ranges.

    Notes
    -----
    The sides of images must divide by 4. Images of 32×32 pixels end at 8×8, where the global mean is the same as the original's three
    further poolings.

    References
    ----------
    Shankar et al. 2020, Figure 1.
    """
    if depth not in MYRTLE_BLOCKS:
        raise InputError(f"myrtle: depth is {depth!r}, expected 5, 7 or 10.")
    conv = (Conv(filter_size, padding, 1, weight_variance, bias_variance), Activation(activation, normalize))
    first, second, third = (conv * count for count in MYRTLE_BLOCKS[depth])
    last = Dense(weight_variance if readout_weight_variance is None else readout_weight_variance, bias_variance)
    layers: tuple[Layer, ...] = (*first, AvgPool(2), *second, AvgPool(2), *third, GlobalAvgPool(), last)
    return _network(layers, scale_inputs, trainable_ends, layout)


def _require_depth(name: str, depth: int) -> None:
    """InputError unless depth is an integer >= 0."""
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise InputError(f"{name}: depth is {depth!r}, expected an integer >= 0.")


def _network(layers: tuple[Layer, ...], scale_inputs: bool, trainable_ends: bool, layout: str | None) -> Network:
    """The network; its first and last layer frozen unless `trainable_ends`."""
    if not trainable_ends:
        ends = (0, len(layers) - 1)
        layers = tuple(
            replace(layer, trainable=False) if i in ends and isinstance(layer, (Conv, Dense)) else layer
            for i, layer in enumerate(layers)
        )
    return Network(layers, scale_inputs, layout)
