"""Which layers are captured, and how: from the type of a layer and the name of its parameter to a contribution.

Parameters of other layers go to `fallback`, and so do layers whose forward is not PyTorch's own: subclasses, parametrised layers, and
instances with an attribute `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ntkdask.modules.jacobian.contributions import Contribution, Lookups, Scales, Sums, Terms


def _linear(layer: Any, name: str) -> Contribution:
    """Weights (units, inputs) and biases (units,) of Linear."""
    units, inputs = layer.weight.shape
    return Terms(units * inputs, inputs, 1) if name == "weight" else Sums(units, units, True)


def _convolution(layer: Any, name: str) -> Contribution:
    """Weights (units, channels of a group, *filter) and biases (units,) of a convolution."""
    units = layer.weight.shape[0]
    if name == "bias":
        return Sums(units, units, False)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(0, 0)] * len(layer.kernel_size) if layer.padding == "valid" else [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return Terms(
        layer.weight.numel(),
        math.prod(layer.weight.shape[1:]),
        layer.groups,
        tuple(layer.kernel_size),
        tuple(layer.stride),
        tuple(p for side in reversed(sides) for p in side),
        tuple(layer.dilation),
        mode,
    )


def _of_channels(layer: Any, name: str) -> Contribution:
    """A scale and a bias for each channel, the first axis of a row."""
    units = layer.weight.numel()
    return Scales(units, units, False, layer) if name == "weight" else Sums(units, units, False)


def _of_last_axes(layer: Any, name: str) -> Contribution:
    """Scales and biases of the shape of a row's last axes."""
    units = layer.weight.numel()
    return Scales(units, units, True, layer) if name == "weight" else Sums(units, units, True)


def _embedding(layer: Any, name: str) -> Contribution | None:
    """The table of an embedding; None where it renormalises its rows or scales gradients by frequency."""
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        return None
    return Lookups(layer.weight.numel(), layer.embedding_dim, layer.padding_idx)


_RULES: dict[type, Callable[[Any, str], Contribution | None]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.PReLU), _of_channels),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _of_channels),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _of_last_axes),
    nn.Embedding: _embedding,
}


def contribution(layer: nn.Module, name: str) -> Contribution | None:
    """How `layer` contributes to the gradient of its parameter `name`; None where it is not captured."""
    rule = _RULES.get(type(layer))
    if rule is None or name not in ("weight", "bias") or "forward" in vars(layer):
        return None
    return rule(layer, name)
