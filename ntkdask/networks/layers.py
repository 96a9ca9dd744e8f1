"""The layers of networks, as descriptions: how S and T pass through each stands in MATH.md §1 and in its docstring.

Images are NHWC. A convolution moves both pixels of a pair together, so it keeps the offset δ = p' − p. The geometry of a layer for
images of a given size (`Conv.output_shape`, `Conv.before`) is here; the numbers are computed in `kernels/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ntkdask import activations
from ntkdask.activations import ActivationFunction
from ntkdask.errors import InputError
from ntkdask.networks.brief import Brief
from ntkdask.registry import register

PADDINGS = ("same", "valid", "circular")


def _require_variances(layer: Dense | Conv) -> None:
    """InputError unless σ_w² > 0 and σ_b² >= 0 are finite."""
    name = type(layer).__name__
    if not (layer.weight_variance > 0 and math.isfinite(layer.weight_variance)):
        raise InputError(f"{name}: weight_variance is {layer.weight_variance}, expected a positive number.")
    if not (layer.bias_variance >= 0 and math.isfinite(layer.bias_variance)):
        raise InputError(f"{name}: bias_variance is {layer.bias_variance}, expected a number >= 0.")


def _pair(name: str, key: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """A length, or one for rows and one for columns, as two integers >= 1; InputError, naming layer and field, otherwise."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in pair):
        raise InputError(f"{name}: {key} is {value!r}, expected an integer >= 1, or two of them for rows and columns.")
    return pair[0], pair[1]


@register("layer")
@dataclass(frozen=True, repr=False)
class Dense(Brief):
    """A fully connected layer in NTK parameterisation: z = σ_w·W h/√width + σ_b·b, W and b standard normal.

    S' = Λ = σ_w²·S + σ_b², T' = σ_w²·T + (Λ if trainable else 0).

    Parameters
    ----------
    weight_variance : float
        σ_w² > 0.
    bias_variance : float
        σ_b² >= 0.
    trainable : bool
        Whether its weights and biases add to the tangent kernel.

    References
    ----------
    Jacot et al. 2018; MATH.md §1.
    """

    weight_variance: float = 1.0
    bias_variance: float = 0.0
    trainable: bool = True

    def __post_init__(self) -> None:
        _require_variances(self)


@register("layer")
@dataclass(frozen=True, repr=False)
class Conv(Brief):
    """A convolution in NTK parameterisation, with weights σ_w·W/√(width·q²) for a filter of q×q pixels, W standard normal.

    S' = Λ = σ_w²·A[S] + σ_b², T' = σ_w²·A[T] + (Λ if trainable else 0), where A[S](p, p') = q⁻²·Σ_a S(sp + a − l, sp' + a − l) with a
    over the filter.

    Parameters
    ----------
    filter_size : int or tuple of 2 int
        q: one number, or (rows, columns).
    padding : {"same", "valid", "circular"}
        "same": zeros outside the image, output ⌈H/s⌉, l = ⌊max((⌈H/s⌉ − 1)s + q − H, 0)/2⌋, as JAX and TensorFlow (torch differs at
        stride 2). "valid": l = 0, output ⌊(H − q)/s⌋ + 1. "circular": indices modulo (H, W), l = ⌊(q − 1)/2⌋, output ⌈H/s⌉.
    stride : int or tuple of 2 int
        s: one number, or (rows, columns).
    weight_variance : float
        σ_w² > 0.
    bias_variance : float
        σ_b² >= 0.
    trainable : bool
        Whether its weights and biases add to the tangent kernel.

    Raises
    ------
    InputError
        For values out of these ranges.

    Notes
    -----
    Sums at the border are divided by q² like the rest.

    References
    ----------
    Arora et al. 2019; MATH.md §1.
    """

    filter_size: int | tuple[int, int] = 3
    padding: str = "same"
    stride: int | tuple[int, int] = 1
    weight_variance: float = 1.0
    bias_variance: float = 0.0
    trainable: bool = True

    def __post_init__(self) -> None:
        _require_variances(self)
        for key in ("filter_size", "stride"):
            value = getattr(self, key)
            _pair("Conv", key, value)
            if isinstance(value, list):
                object.__setattr__(self, key, tuple(value))
        if self.padding not in PADDINGS:
            raise InputError(f"Conv: padding is {self.padding!r}, expected one of {', '.join(map(repr, PADDINGS))}.")

    @property
    def filter(self) -> tuple[int, int]:
        """(rows, columns) of the filter."""
        return _pair("Conv", "filter_size", self.filter_size)

    @property
    def strides(self) -> tuple[int, int]:
        """(rows, columns) of the stride."""
        return _pair("Conv", "stride", self.stride)

    def output_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the output for images of (H, W); InputError where a "valid" filter is larger than the image."""
        sizes = []
        for length, q, s in zip(shape, self.filter, self.strides, strict=True):
            if self.padding == "valid" and length < q:
                raise InputError(
                    f"Conv: a filter of {self.filter[0]}×{self.filter[1]} with padding 'valid' does not fit an image of "
                    f"{shape[0]}×{shape[1]}. Use a smaller filter, larger images or padding='same'."
                )
            sizes.append((length - q) // s + 1 if self.padding == "valid" else -(-length // s))
        return sizes[0], sizes[1]

    def before(self, shape: tuple[int, int]) -> tuple[int, int]:
        """l for images of (H, W): the rows and columns of the filter above and before the pixel it stands on."""
        lengths = []
        for length, out, q, s in zip(shape, self.output_shape(shape), self.filter, self.strides, strict=True):
            same = max((out - 1) * s + q - length, 0) // 2
            lengths.append({"same": same, "valid": 0, "circular": (q - 1) // 2}[self.padding])
        return lengths[0], lengths[1]


@register("layer")
@dataclass(frozen=True, repr=False)
class Activation(Brief):
    """An elementwise σ: S' = k_σ(Λ), T' = T·k_σ'(Λ).

    Parameters
    ----------
    function : str or ActivationFunction
        σ, by name or as an object.
    normalize : bool
        Whether σ is multiplied by n_σ = (E σ(t)²)^(−1/2), t ~ N(0, 1), so that k and k' are multiplied by n_σ² (`gain`).

    Raises
    ------
    InputError
        With `normalize`, unless 0 < E σ(t)² < ∞.
    """

    function: str | ActivationFunction = "relu"
    normalize: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", activations.get(self.function))
        if not isinstance(self.normalize, bool):
            raise InputError(f"Activation: normalize is {self.normalize!r}, expected true or false.")
        moment = self.sigma.second_moment() if self.normalize else 1.0
        if not 0 < moment < math.inf:
            raise InputError(
                f"Activation: E σ² of {self.sigma} is {moment}, so it cannot be normalised. Use normalize=False or other "
                "parameters."
            )

    @property
    def sigma(self) -> ActivationFunction:
        """The activation as an object."""
        return activations.get(self.function)

    @property
    def gain(self) -> float:
        """The factor on k_σ and k_σ': n_σ² when normalised, else 1."""
        return 1.0 / self.sigma.second_moment() if self.normalize else 1.0


@register("layer")
@dataclass(frozen=True, repr=False)
class LayerNorm(Brief):
    """Normalisation over channels, right after Dense or Conv: S' = S/√(S_xx(p, p)·S_yy(p', p')), 0 where a variance is 0; T' alike."""


@register("layer")
@dataclass(frozen=True, repr=False)
class AvgPool(Brief):
    """Mean over windows of size×size pixels that do not overlap: S and T are averaged over both windows of a pair.

    Parameters
    ----------
    size : int or tuple of 2 int
        The side of a window: one number, or (rows, columns). Images whose height or width it does not divide raise InputError.
    """

    size: int | tuple[int, int] = 2

    def __post_init__(self) -> None:
        _pair("AvgPool", "size", self.size)
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))

    @property
    def window(self) -> tuple[int, int]:
        """(rows, columns) of the window."""
        return _pair("AvgPool", "size", self.size)

    def output_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the output for images of (H, W); InputError where the window does not divide it."""
        (h, w), (a, b) = shape, self.window
        if h % a or w % b:
            raise InputError(
                f"AvgPool: windows of {a}×{b} do not divide images of {h}×{w}. Use another size, or GlobalAvgPool()."
            )
        return h // a, w // b


@register("layer")
@dataclass(frozen=True, repr=False)
class GlobalAvgPool(Brief):
    """Mean over all pixels, which makes vectors of images: S and T are averaged over all pixel pairs (p, p')."""


@register("layer")
@dataclass(frozen=True, repr=False)
class Flatten(Brief):
    """Makes features of pixels, and so vectors of images: S and T are averaged over the pairs p = p'."""


@register("layer")
@dataclass(frozen=True, repr=False)
class Residual(Brief):
    """branch(x) + shortcut(x): S and T of the two are added.

    Parameters
    ----------
    branch : sequence of layers
        At least one.
    shortcut : sequence of layers
        Empty for the identity.
    """

    branch: tuple[Layer, ...] = field(default=())
    shortcut: tuple[Layer, ...] = field(default=())

    if TYPE_CHECKING:  # any iterable of layers is taken, and a tuple is kept

        def __init__(self, branch: Iterable[Layer] = (), shortcut: Iterable[Layer] = ()) -> None: ...

    def __post_init__(self) -> None:
        for key in ("branch", "shortcut"):
            layers = getattr(self, key)
            if isinstance(layers, str) or not isinstance(layers, Iterable):
                raise InputError(f"Residual: {key} is {layers!r}, expected a sequence of layers.")
            object.__setattr__(self, key, tuple(layers))
        if not self.branch:
            raise InputError("Residual: the branch has no layers. Give at least one, such as Conv() or Dense().")


Layer: TypeAlias = Dense | Conv | Activation | LayerNorm | AvgPool | GlobalAvgPool | Flatten | Residual
