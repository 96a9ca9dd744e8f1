"""Which layers are captured, and how: layer type and parameter name → contribution. Anything not here goes to `fallback`.

A layer counts only where its forward is PyTorch's own: of exactly that type (a parametrised or subclassed layer is of another), with
no forward of its instance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ntkdask.modules.jacobian.contributions import Contribution, Lookups, Scales, Sums, Terms


def _linear(layer: Any, name: str) -> Contribution:
    units, inputs = layer.weight.shape
    return Terms(units * inputs, inputs, 1) if name == "weight" else Sums(units, units, True)


def _convolution(layer: Any, name: str) -> Contribution:
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
    units = layer.weight.numel()
    return Scales(units, units, False, layer) if name == "weight" else Sums(units, units, False)


def _of_last_axes(layer: Any, name: str) -> Contribution:
    units = layer.weight.numel()
    return Scales(units, units, True, layer) if name == "weight" else Sums(units, units, True)


def _embedding(layer: Any, name: str) -> Contribution | None:
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
    """What `layer` adds to the gradient of its own parameter `name`; None where this layer is not captured."""
    rule = _RULES.get(type(layer))
    if rule is None or name not in ("weight", "bias") or "forward" in vars(layer):
        return None
    return rule(layer, name)
