"""Networks: what the kernels are kernels of. Written once, read as exact kernel, feature map or finite network.

A `Network` is a tuple of frozen layers; covariance S and tangent kernel T travel through them by the rules of MATH.md
§1. This module holds the description and checks that the infinite-width limit is Gaussian and centred; the numbers are
computed in `kernels/` and `features/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ntkdask import activations
from ntkdask.activations import ActivationFunction
from ntkdask.errors import InputError
from ntkdask.registry import register


@register("layer")
@dataclass(frozen=True)
class Dense:
    """A fully connected layer in NTK parameterisation: z = σ_w·W h/√width + σ_b·b, W and b standard normal.

    S' = Λ = σ_w²·S + σ_b², T' = σ_w²·T + (Λ if trainable else 0). Source: Jacot et al. 2018; MATH.md §1.
    """

    weight_variance: float = 1.0
    bias_variance: float = 0.0
    trainable: bool = True

    def __post_init__(self) -> None:
        if not (self.weight_variance > 0 and math.isfinite(self.weight_variance)):
            raise InputError(f"Dense: weight_variance is {self.weight_variance}, expected a positive number.")
        if not (self.bias_variance >= 0 and math.isfinite(self.bias_variance)):
            raise InputError(f"Dense: bias_variance is {self.bias_variance}, expected a number >= 0.")


@register("layer")
@dataclass(frozen=True)
class Activation:
    """An elementwise σ, given by name or object: S' = k_σ(Λ), T' = T·k_σ'(Λ).

    `normalize` multiplies σ by n_σ = (E σ(t)²)^(−1/2), t ~ N(0, 1): k and k' scale by n_σ² (`gain`).
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
        """n_σ² when normalised, else 1: the factor on k_σ and k_σ'."""
        return 1.0 / self.sigma.second_moment() if self.normalize else 1.0


Layer = Dense | Activation


@register("network")
@dataclass(frozen=True)
class Network:
    """A sequence of layers. Inputs enter as S = ⟨x, z⟩, or ⟨x, z⟩/d with `scale_inputs` (neural-tangents' convention).

    NNGP = final S, NTK = final T. Raises InputError, naming the layer, for sequences whose infinite-width limit is not
    a centred Gaussian: an Activation needs a Dense before it.
    """

    layers: tuple[Layer, ...] = field(default=())
    scale_inputs: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Iterable):
            raise InputError(f"Network: layers is {self.layers!r}, expected a sequence of layers.")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise InputError("Network: there are no layers. Give at least one Dense.")
        gaussian = False
        for position, layer in enumerate(self.layers):
            if not isinstance(layer, (Dense, Activation)):
                raise InputError(f"Network: layer {position} is {layer!r}, expected Dense or Activation.")
            if isinstance(layer, Activation) and not gaussian:
                raise InputError(
                    f"Network: layer {position} ({layer.sigma.name or layer.sigma}) is an Activation without a Dense before it; "
                    "its input is not Gaussian. Put a Dense in between."
                )
            gaussian = isinstance(layer, Dense)

    @property
    def depth(self) -> int:
        """Number of hidden activations."""
        return sum(isinstance(layer, Activation) for layer in self.layers)


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
    if not isinstance(depth, int) or depth < 0:
        raise InputError(f"fully_connected: depth is {depth!r}, expected an integer >= 0.")
    hidden = (Dense(weight_variance, bias_variance), Activation(activation, normalize))
    readout = weight_variance if readout_weight_variance is None else readout_weight_variance
    return Network((*(hidden * depth), Dense(readout, bias_variance)), scale_inputs)
