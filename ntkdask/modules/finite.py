"""The finite network of a `Network`: a `torch.nn.Module` of a given width, in NTK parameterisation.

Its tangent kernel, over seeds, tends to `kernels.NTK` of the network as the width grows. Every Dense and Conv is a plain
`nn.Linear` or `nn.Conv2d` with standard normal weights between two constant factors, so that its gradients are captured layer by
layer. Sizes, factors and random streams are those of `networks.finite`: the function is that of `features.finite`, and weights are
equal bit by bit on every machine. Images are NCHW here, rows of arrays NHWC. torch's random state is not touched.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkdask import seeds
from ntkdask.activations import ActivationFunction
from ntkdask.arrays import FLOAT_DTYPES
from ntkdask.errors import DtypeError, InputError
from ntkdask.modules.elementwise import elementwise
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    LayerNorm,
    Network,
    Residual,
)
from ntkdask.networks.finite import FinitePlan, Weights, Where, finite_rows, parameter_stream


def finite_module(
    network: Network, width: int, row_shape: tuple[int, ...], n_outputs: int = 1, seed: int = 0, dtype: str = "float32"
) -> nn.Module:
    """The network with finitely many units, in NTK parameterisation: z = σ_w·W h/√(fan-in) + σ_b·b, W and b standard normal.

    Parameters
    ----------
    network : Network
        The architecture. Layers with trainable=False have requires_grad=False. A network that does not end in a Dense is read out by a
        frozen one, with the same expected kernels.
    width : int
        Units or channels of every hidden layer.
    row_shape : tuple of int
        Shape of a row of data: (d,) or (H, W, C).
    n_outputs : int, optional
        Number of outputs; output o does not depend on it.
    seed : int, optional
        Of the weights.
    dtype : str, optional
        "float32" or "float64", of the parameters.

    Returns
    -------
    torch.nn.Module
        In eval mode on the CPU; takes (n, d) or (n, C, H, W) to (n, n_outputs). Its parameters are W and b themselves. A network of
        vectors flattens images in the order H, W, C.

    Raises
    ------
    InputError
        For a width, a shape or a number of outputs that cannot be, an activation whose function is not known, and images that do not
        fit a layer.
    DtypeError
        For another dtype.

    References
    ----------
    Jacot et al. 2018; MATH.md §1, §5.

    >>> from ntkdask.networks import fully_connected
    >>> finite_module(fully_connected(1), width=64, row_shape=(5,), n_outputs=3)(torch.zeros(2, 5)).shape
    torch.Size([2, 3])
    """
    row_shape = finite_rows(network, width, row_shape, n_outputs)
    if dtype not in FLOAT_DTYPES:
        raise DtypeError(f"finite network: dtype is {dtype!r}, expected float32 or float64.")
    rows = row_shape if network.takes_images else (math.prod(row_shape),)
    maker = _Maker(FinitePlan(network, width, rows, n_outputs), seed, dtype)
    modules = maker.sequence(maker.plan.layers, ())
    return nn.Sequential(Rows(row_shape, network.takes_images), *modules).eval()


class Rows(nn.Module):
    """Checks the shape of rows, (n, d) or (n, C, H, W), and flattens them for networks of vectors, in the order of NHWC rows."""

    recorded_as = "ntkdask.modules.finite.Rows"

    def __init__(self, row_shape: tuple[int, ...], takes_images: bool) -> None:
        super().__init__()
        self.row_shape, self.takes_images = row_shape, takes_images
        self.expected = (row_shape[2], *row_shape[:2]) if len(row_shape) == 3 else row_shape

    def forward(self, x: Tensor) -> Tensor:
        """The rows as the first layer takes them; InputError for other shapes."""
        if tuple(x.shape[1:]) != self.expected:
            images = " (NCHW: of rows (H, W, C), with input_layout='nchw')" if len(self.expected) == 3 else ""
            raise InputError(
                f"a finite network for rows of shape {self.row_shape} got a tensor of shape {tuple(x.shape)}, expected "
                f"(n, {', '.join(map(str, self.expected))}){images}. Build it with the row_shape of these rows."
            )
        if self.takes_images:
            return x
        return pixels_last(x) if x.ndim == 4 else x.flatten(1)


class Weighted(nn.Module):
    """scale_out·core(scale_in·x): a Linear or Conv2d of standard normal parameters in NTK parameterisation.

    Without biases scale_in is 1 and scale_out is σ_w/√(fan-in); with them scale_out is σ_b, so that their gradient is σ_b too.
    """

    recorded_as = "ntkdask.modules.finite.Weighted"

    def __init__(self, core: nn.Module, pad: nn.Module | None, factor: float, deviation: float) -> None:
        super().__init__()
        self.pad, self.core = pad, core
        self.scale_in, self.scale_out = (factor / deviation, deviation) if deviation else (1.0, factor)

    def forward(self, x: Tensor) -> Tensor:
        """z, (n, units) or (n, units, H', W')."""
        if self.scale_in != 1:
            x = x * self.scale_in
        if self.pad is not None:
            x = self.pad(x)
        return self.core(x) * self.scale_out

    def extra_repr(self) -> str:
        """The factors, for `repr`."""
        return f"scale_in={self.scale_in:.6g}, scale_out={self.scale_out:.6g}"


class Wrap(nn.Module):
    """Continues images periodically: `before` and `after` are the (rows, columns) to add, which may exceed the image."""

    recorded_as = "ntkdask.modules.finite.Wrap"

    def __init__(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H + rows, W + columns)."""
        for dim, start, stop in zip((2, 3), self.before, self.after, strict=True):
            x = x.index_select(dim, torch.arange(-start, x.shape[dim] + stop, device=x.device) % x.shape[dim])
        return x


class Nonlinearity(nn.Module):
    """n·σ(x), n = √gain the factor of a normalised activation."""

    recorded_as = "ntkdask.modules.finite.Nonlinearity"

    def __init__(self, sigma: ActivationFunction, gain: float) -> None:
        super().__init__()
        self.sigma, self.factor = sigma, math.sqrt(gain)

    def forward(self, x: Tensor) -> Tensor:
        """n·σ(x) in the shape of x."""
        value = elementwise(self.sigma, x)
        return value if self.factor == 1 else value * self.factor

    def extra_repr(self) -> str:
        """σ and its factor, for `repr`."""
        return f"{self.sigma}, factor={self.factor:.6g}"


class ChannelNorm(nn.Module):
    """(x − mean)/deviation over channels, without parameters; 0, with gradient 0, where the deviation is 0."""

    recorded_as = "ntkdask.modules.finite.ChannelNorm"

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, (n, C) or (n, C, H, W)."""
        centred = x - x.mean(1, keepdim=True)
        variance = (centred * centred).mean(1, keepdim=True)
        varies = variance > 0
        # the inner `where`: at 0 the gradient of rsqrt is infinite, and 0·inf is NaN
        return centred * torch.where(varies, torch.where(varies, variance, 1).rsqrt(), 0)


class PixelMean(nn.Module):
    """(n, C, H, W) → (n, C), the mean over pixels."""

    recorded_as = "ntkdask.modules.finite.PixelMean"

    def forward(self, x: Tensor) -> Tensor:
        """(n, C)."""
        return x.mean((2, 3))


class PixelsLast(nn.Module):
    """(n, C, H, W) → (n, H·W·C): flattened in the order of NHWC rows."""

    recorded_as = "ntkdask.modules.finite.PixelsLast"

    def forward(self, x: Tensor) -> Tensor:
        """(n, H·W·C)."""
        return pixels_last(x)


class Paths(nn.Module):
    """branch(x) + shortcut(x); with factors (a, b), a·branch(x) and b·shortcut(x) side by side, which has the same inner products."""

    recorded_as = "ntkdask.modules.finite.Paths"

    def __init__(self, branch: nn.Module, shortcut: nn.Module, factors: tuple[float, float] | None) -> None:
        super().__init__()
        self.branch, self.shortcut, self.factors = branch, shortcut, factors

    def forward(self, x: Tensor) -> Tensor:
        """The sum, or the channels of both."""
        left, right = self.branch(x), self.shortcut(x)
        if self.factors is None:
            return left + right
        return torch.cat([left * self.factors[0], right * self.factors[1]], dim=1)


def pixels_last(x: Tensor) -> Tensor:
    """(n, C, H, W) → (n, H·W·C)."""
    return x.permute(0, 2, 3, 1).flatten(1)


class _Maker:
    """Makes the modules of layers, with their weights."""

    def __init__(self, plan: FinitePlan, seed: int, dtype: str) -> None:
        self.plan, self.seed, self.dtype = plan, seed, dtype

    def sequence(self, layers: tuple[Layer, ...], where: Where) -> list[nn.Module]:
        """A module for each layer."""
        return [self.module(layer, (*where, position)) for position, layer in enumerate(layers)]

    def module(self, layer: Layer, where: Where) -> nn.Module:
        """The module of one layer."""
        if isinstance(layer, (Dense, Conv)):
            return self.weighted(self.plan.weights[where], where)
        if isinstance(layer, Activation):
            elementwise(layer.sigma, torch.zeros(1))  # raises where no function is known
            return Nonlinearity(layer.sigma, layer.gain)
        if isinstance(layer, AvgPool):
            return nn.AvgPool2d(layer.window)
        if isinstance(layer, Residual):
            branch = nn.Sequential(*self.sequence(layer.branch, (*where, "branch")))
            shortcut = nn.Sequential(*self.sequence(layer.shortcut, (*where, "shortcut")))
            return Paths(branch, shortcut, self.plan.joins[where])
        simple: dict[type, type[nn.Module]] = {LayerNorm: ChannelNorm, GlobalAvgPool: PixelMean, Flatten: PixelsLast}
        return simple[type(layer)]()

    def weighted(self, weights: Weights, where: Where) -> Weighted:
        """A Dense or Conv with its parameters."""
        layer, deviation = weights.layer, math.sqrt(weights.layer.bias_variance)
        drawn = self.draw(where, "weights", weights.inputs, weights.units)
        pad, core = None, _linear(weights)
        if isinstance(layer, Conv):
            pad, core = _convolution(layer, weights)
            # (q₁, q₂, C, units) → (units, C, q₁, q₂)
            drawn = drawn.reshape(*layer.filter, -1, weights.units).transpose(3, 2, 0, 1)
        else:
            drawn = drawn.T
        core.weight = self.parameter(drawn, layer.trainable)
        if weights.has_bias:
            core.bias = self.parameter(self.draw(where, "biases", 1, weights.units)[0], layer.trainable)
        return Weighted(core, pad, weights.factor, deviation)

    def draw(self, where: Where, name: str, rows: int, units: int) -> np.ndarray:
        """(rows, units) standard normals."""
        return seeds.normals(self.seed, parameter_stream(where, name), rows, units, self.dtype)

    def parameter(self, values: np.ndarray, trainable: bool) -> nn.Parameter:
        """A parameter with a copy of the values."""
        return nn.Parameter(torch.tensor(values), requires_grad=trainable)


def _linear(weights: Weights) -> nn.Module:
    """A Linear without its parameters."""
    # on "meta" nothing is allocated and no random number drawn
    return nn.Linear(weights.inputs, weights.units, bias=weights.has_bias, device="meta")


def _convolution(layer: Conv, weights: Weights) -> tuple[nn.Module | None, nn.Module]:
    """(module that pads or None, Conv2d without its parameters); Conv2d itself pads where both sides get the same."""
    shape = weights.image or (1, 1)
    needed = zip(layer.output_shape(shape), layer.strides, layer.filter, shape, layer.before(shape), strict=True)
    before = layer.before(shape)
    after = [max((out - 1) * s + q - side - left, 0) for out, s, q, side, left in needed]
    options: dict[str, Any] = {"stride": layer.strides, "bias": weights.has_bias, "device": "meta"}
    pad: nn.Module | None = None
    if layer.padding == "circular":
        # torch pads both sides alike, and at most by the image once: enough for odd filters that are not larger
        if all(q % 2 == 1 and q // 2 <= side for q, side in zip(layer.filter, shape, strict=True)):
            options |= {"padding": (layer.filter[0] // 2, layer.filter[1] // 2), "padding_mode": "circular"}
        else:
            pad = Wrap(before, (after[0], after[1]))
    elif before == tuple(after):
        options["padding"] = before
    else:
        pad = nn.ZeroPad2d((before[1], after[1], before[0], after[0]))
    channels = weights.inputs // math.prod(layer.filter)
    return pad, nn.Conv2d(channels, weights.units, layer.filter, **options)
