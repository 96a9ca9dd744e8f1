"""Which offset planes each layer of a network has to read, and the shapes that they have: pure planning, no arrays.

Called by `planes.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from ntkdask.kernels.planes.layers import Shape, around, pooled_from
from ntkdask.networks import Activation, AvgPool, Conv, GlobalAvgPool, Layer, LayerNorm, Network, Residual
from ntkdask.networks.network import every_layer, output_shape

Wanted: TypeAlias = tuple[frozenset[int], frozenset[int]]
"""Offsets of rows and offsets of columns: all planes (dy, dx) made of them."""

ALONE: Wanted = (frozenset([0]), frozenset([0]))
"""Plane (0, 0)."""


def planes_of_readout(network: Network, shape: Shape) -> Wanted:
    """The planes that the readout reads, of images of (H, W): all, or plane 0 for Flatten."""
    h, w = output_shape(image_layers(network), shape)
    if not isinstance(network.layers[network.readout_position], GlobalAvgPool):
        return ALONE
    return frozenset(range(1 - h, h)), frozenset(range(1 - w, w))


def wanted_after(layers: tuple[Layer, ...], shape: Shape, wanted: Wanted) -> list[Wanted]:
    """The planes that are read after each of the layers, when `wanted` are read after the last."""
    planes = [wanted]
    for position in range(len(layers) - 1, 0, -1):
        planes.append(wanted_before(layers[position], output_shape(layers[:position], shape), planes[-1]))
    return planes[: len(layers)][::-1]


def wanted_before(layer: Layer, shape: Shape, wanted: Wanted) -> Wanted:
    """The planes of images of (H, W) that a layer reads to give the planes `wanted`."""
    if isinstance(layer, Conv):
        sides = [
            frozenset(e for d in side for e in (around(s * d, n) if layer.padding == "circular" else [s * d]))
            for side, s, n in zip(wanted, layer.strides, shape, strict=True)
        ]
        return sides[0], sides[1]
    if isinstance(layer, AvgPool):
        sides = [pooled_from(d, s, n) for d, s, n in zip(wanted, layer.window, shape, strict=True)]
        return sides[0], sides[1]
    if isinstance(layer, Residual):
        paths = [wanted_by(path, shape, wanted) for path in (layer.branch, layer.shortcut)]
        return paths[0][0] | paths[1][0], paths[0][1] | paths[1][1]
    return wanted


def wanted_by(layers: tuple[Layer, ...], shape: Shape, wanted: Wanted) -> Wanted:
    """The planes of images of (H, W) that the layers read to give the planes `wanted`."""
    return wanted_before(layers[0], shape, wanted_after(layers, shape, wanted)[0]) if layers else wanted


def held_entries(layers: tuple[Layer, ...], shape: Shape, wanted: Wanted) -> int:
    """Entries of pooled planes that one pair holds."""
    total = 0
    for layer, (rows, columns) in zip(layers, wanted_after(layers, shape, wanted), strict=True):
        if isinstance(layer, Residual):
            total += sum(held_entries(path, shape, (rows, columns)) for path in (layer.branch, layer.shortcut))
        shape = output_shape([layer], shape)
        if isinstance(layer, AvgPool):
            total += len(rows) * len(columns) * shape[0] * shape[1]
    return total


def node_shapes(layers: tuple[Layer, ...], shape: Shape) -> Iterator[Shape]:
    """(H_k, W_k) of the images before every Activation and LayerNorm, in order."""
    for layer in layers:
        if isinstance(layer, (Activation, LayerNorm)):
            yield shape
        elif isinstance(layer, Residual):
            yield from node_shapes(layer.branch, shape)
            yield from node_shapes(layer.shortcut, shape)
        shape = output_shape([layer], shape)


def image_layers(network: Network) -> tuple[Layer, ...]:
    """The layers before the readout."""
    return network.layers[: network.readout_position]


def has_circular(layers: tuple[Layer, ...]) -> bool:
    """Whether there is a circular convolution."""
    return any(isinstance(layer, Conv) and layer.padding == "circular" for layer in every_layer(layers))
