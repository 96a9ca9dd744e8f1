"""S and T of images at a network's readout, by planes of equal offset: any network, NumPy and CuPy, float64. MATH.md §1, §3.

Between poolings, entries of S and T with the offset δ = p' − p only meet entries with the same δ, so the layers run plane by plane
over a batch of pairs that stays in cache. Variances come first: once per image, from the few planes of the image with itself that
poolings mix. `plane_layers` has what a layer does to a plane; here are the chains of them and the sweeps over planes. The reference
for the fused passes, and the way of every network that those cannot take. Called by `convolutional`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ntkdask import threads
from ntkdask.activations.expansion import COEFFICIENT_ROWS
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.kernels import general
from ntkdask.kernels.blocks import Block, cut, over_blocks, put, workers
from ntkdask.kernels.planes.layers import (
    REMEMBERED,
    REMEMBERED_AROUND,
    Activated,
    Convolved,
    Inputs,
    Normalised,
    Plane,
    PlaneSource,
    Pooled,
    Remembered,
    Shape,
    Summed,
    around,
    pooled_from,
    sweep,
)
from ntkdask.networks import Activation, AvgPool, Conv, GlobalAvgPool, Layer, LayerNorm, Network, Residual
from ntkdask.networks.network import every_layer, output_shape

BATCH_ENTRIES, DEVICE_BATCH_ENTRIES = 2**16, 2**24
"""Entries of plane 0, over the batch of pairs; a plane has a quarter of it on average, and a dozen such float64 arrays fit a cache."""
HELD_ENTRIES, DEVICE_HELD_ENTRIES = 2**21, 2**28
"""Entries of pooled planes that a batch may hold."""

Wanted: TypeAlias = tuple[frozenset[int], frozenset[int]]
"""Offsets of rows and of columns; the planes are all their pairs."""

ALONE: Wanted = (frozenset([0]), frozenset([0]))
Node: TypeAlias = Callable[[PlaneSource], tuple[Array, Array]]
"""The variances of both sides, (*batch, H, W) each, of what a source gives."""


@dataclass(frozen=True)
class _Chains:
    """Sources for layers. node: asked before every Activation and LayerNorm, in order. own: of images with themselves. wraps: the
    network has circular convolutions.
    """

    node: Node
    own: bool
    tangent: bool
    wraps: bool

    def extend(self, source: PlaneSource, layers: tuple[Layer, ...], wanted: Wanted) -> PlaneSource:
        """The source after the layers, of which the planes `wanted` will be read."""
        for layer, after in zip(layers, _wanted_after(layers, source.shape, wanted), strict=True):
            source = self._after(layer, source, after)
        return source

    def _after(self, layer: Layer, source: PlaneSource, wanted: Wanted) -> PlaneSource:
        if isinstance(layer, Conv):
            return Convolved(source, layer, self.tangent)
        if isinstance(layer, Activation):
            return Activated(source, layer, *self.node(source), self.own, self.tangent)
        if isinstance(layer, LayerNorm):
            return Normalised(source, *self.node(source))
        if isinstance(layer, AvgPool):
            return Pooled(source, layer, *wanted, self.wraps)
        if isinstance(layer, Residual):
            source = Remembered(source, _remembered(self.wraps))
            branch = self.extend(source, layer.branch, wanted)
            return Summed(branch, self.extend(source, layer.shortcut, wanted))
        raise TypeError(f"{layer!r} does not act on images")


def variance_maps(network: Network, x: Array) -> list[Array]:
    """(n, H, W, C) → (n, H_k, W_k) float64 each: S(p, p) of every image with itself just before every Activation and LayerNorm of the
    image part, in order, branches before shortcuts. InputError, naming the layer, where the images do not fit.
    """
    return [s for s, _ in _node_maps(network, x, tangent=False)]


def tangent_maps(network: Network, x: Array) -> list[Plane]:
    """(S(p, p), T(p, p)) where `variance_maps` has S(p, p): (n, H_k, W_k) float64 each, T = 0 where nothing is trainable yet."""
    return _node_maps(network, x, tangent=True)


def _node_maps(network: Network, x: Array, tangent: bool) -> list[Plane]:
    layers, shape = _image_layers(network), (int(x.shape[1]), int(x.shape[2]))
    network.image_shapes(shape)
    xp = namespace(x)
    found = [
        (xp.empty((x.shape[0], *s)), xp.zeros((x.shape[0], *s)) if tangent else None)
        for s in _node_shapes(layers, shape)
    ]

    def fill(part: slice) -> None:
        waiting = iter(found)

        def node(source: PlaneSource) -> tuple[Array, Array]:
            # a pooled variance that cancels may end below 0
            variances, tangents = next(waiting)
            s, t = source.get((0, 0))
            v = variances[part]
            v[...] = xp.maximum(s, 0.0)
            if tangents is not None and t is not None:
                tangents[part] = t
            return v, v

        chains = _Chains(node, own=True, tangent=tangent, wraps=_wraps(layers))
        images = _channels_first(x[part])
        chains.extend(Inputs(images, images, divisor(network, x)), layers, ALONE)

    _over_images(fill, network, x, ALONE)
    return found


def image_diagonals(network: Network, x: Array, maps: list[Array], tangent: bool) -> Plane:
    """(S(x_i, x_i), T(x_i, x_i)) at the readout, (n,) float64 each; T is None without `tangent`. maps: of `variance_maps`."""
    xp, n = namespace(x), x.shape[0]
    s, t = xp.empty(n), xp.empty(n) if tangent else None

    def fill(part: slice) -> None:
        images, own = _channels_first(x[part]), [v[part] for v in maps]
        found = _read_out(network, images, images, own, own, divisor(network, x), own=True, tangent=tangent)
        for out, values in zip((s, t), found, strict=True):
            if out is not None:
                out[part] = values

    _over_images(fill, network, x, _read(network, (x.shape[1], x.shape[2])))
    return s, t


def readout_pairs(
    network: Network, x: Array, y: Array | None, maps_x: list[Array], maps_y: list[Array], tangent: bool
) -> Plane:
    """(S, T) of images (n, H, W, C), (m, H, W, C) at the readout: (n, m) float64 each; T is None without `tangent`.

    maps: of `variance_maps`. y None: of x with itself, symmetric to the last bit; the diagonal to rounding only.
    """
    xp, device = namespace(x), is_device_array(x)
    other = x if y is None else y
    out = [xp.empty((x.shape[0], other.shape[0])) for _ in range(2 if tangent else 1)]
    scale = divisor(network, x)

    def start() -> Callable[[Block], None]:
        def fill(block: Block) -> None:
            left = _channels_first(x[block.rows])[:, :, None]
            right = _channels_first(other[block.columns])[:, None]
            sides = [v[block.rows, None] for v in maps_x], [v[None, block.columns] for v in maps_y]
            found = _read_out(network, left, right, *sides, scale, own=False, tangent=tangent)
            for matrix, values in zip(out, found, strict=False):
                put(values, matrix, block)

        return fill

    rows, columns = block_shape(network, (x.shape[1], x.shape[2]), device)
    over_blocks(cut(x.shape[0], None if y is None else other.shape[0], rows, columns), start, device)
    return out[0], out[1] if tangent else None


def block_shape(network: Network, shape: Shape, device: bool = False) -> tuple[int, int]:
    """Rows and columns of the pairs that run together, the second twice the first."""
    pairs = _batch_size(network, shape, _read(network, shape), device)
    rows = 1
    while 2 * (2 * rows) ** 2 <= pairs:
        rows *= 2
    return rows, 2 * rows


def _batch_size(network: Network, shape: Shape, wanted: Wanted, device: bool = False) -> int:
    """Pairs, or images with themselves, that run together when planes `wanted` are read in the end."""
    entries, most = (DEVICE_BATCH_ENTRIES, DEVICE_HELD_ENTRIES) if device else (BATCH_ENTRIES, HELD_ENTRIES)
    held = _held(_image_layers(network), shape, wanted)
    return max(1, min(entries // (shape[0] * shape[1]), most // max(1, held)))


def map_bytes(network: Network, shape: Shape) -> int:
    """Bytes of the variance maps of one image of (H, W); errors as of `variance_maps`."""
    network.image_shapes(shape)
    return 8 * sum(h * w for h, w in _node_shapes(_image_layers(network), shape))


def image_bytes(network: Network, n: int, row_shape: tuple[int, int, int], tangent: bool, read_out: bool = True) -> int:
    """Bytes that every thread's batch takes when n images (H, W, C) meet themselves, in the variance maps and, when `read_out`, to
    the readout.
    """
    found = []
    for wanted in (ALONE, _read(network, row_shape[:2])) if read_out else (ALONE,):
        size = _batch_size(network, row_shape[:2], wanted)
        images = min(size, n)
        found.append(workers(-(-n // size)) * _batch_bytes(network, images, 2 * images, row_shape, tangent, wanted))
    return max(found)


def workspace_bytes(network: Network, n: int, m: int, row_shape: tuple[int, int, int], tangent: bool) -> int:
    """Bytes of S and T (n, m) and of every thread's batch in `readout_pairs`, or of a batch of images."""
    rows, columns = block_shape(network, row_shape[:2])
    slots = workers(len(cut(n, m, rows, columns)))
    rows, columns = min(rows, n), min(columns, m)
    pairs = slots * _batch_bytes(
        network, rows * columns, rows + columns, row_shape, tangent, _read(network, row_shape[:2])
    )
    return 8 * (1 + tangent) * n * m + max(pairs, image_bytes(network, max(n, m), row_shape, tangent))


def _batch_bytes(
    network: Network, pairs: int, images: int, row_shape: tuple[int, int, int], tangent: bool, wanted: Wanted
) -> int:
    h, w, channels = row_shape
    shape, layers = (h, w), _image_layers(network)
    arrays, row_values = general.block_arrays(layers)
    arrays += 2 * _remembered(_wraps(layers)) * sum(isinstance(layer, Residual) for layer in every_layer(layers))
    held = (1 + tangent) * _held(layers, shape, wanted)
    # coefficients of series: of so many values of a and b at a time
    values = 2 * channels * images * h * w + row_values * min(images * h * w, COEFFICIENT_ROWS)
    return 8 * (pairs * (arrays * h * w + held) + values)


def _read_out(
    network: Network,
    x: Array,
    y: Array,
    maps_x: list[Array],
    maps_y: list[Array],
    divisor: float,
    own: bool,
    tangent: bool,
) -> Plane:
    """(S, T) at the readout, (*batch) each; x, y: (C, *batch, H, W), batches that broadcast, maps alike."""
    nodes: Iterator[tuple[Array, Array]] = iter(zip(maps_x, maps_y, strict=True))
    layers, shape = _image_layers(network), x.shape[-2:]
    chains = _Chains(lambda source: next(nodes), own, tangent, _wraps(layers))
    wanted = _read(network, shape)
    last = chains.extend(Inputs(x, y, divisor), layers, wanted)
    h, w = last.shape
    pixels = float(h * w) ** (2 if isinstance(network.layers[network.readout_position], GlobalAvgPool) else 1)
    totals: list[Array | None] = [None, None]
    for dy in sweep(wanted[0], h, chains.wraps):
        for dx in sweep(wanted[1], w, chains.wraps):
            for k, part in enumerate(last.get((dy, dx))):
                if part is not None:
                    total = part.reshape(*part.shape[:-2], -1).sum(axis=-1)
                    totals[k] = total if totals[k] is None else totals[k] + total
    s, t = (None if total is None else total / pixels for total in totals)
    return s, namespace(x).zeros_like(s) if t is None and tangent else t


def _read(network: Network, shape: Shape) -> Wanted:
    """The planes that the readout reads, of images of (H, W): all, or for Flatten plane 0."""
    h, w = output_shape(_image_layers(network), shape)
    if not isinstance(network.layers[network.readout_position], GlobalAvgPool):
        return ALONE
    return frozenset(range(1 - h, h)), frozenset(range(1 - w, w))


def _wanted_after(layers: tuple[Layer, ...], shape: Shape, wanted: Wanted) -> list[Wanted]:
    """The planes that are read after each of the layers, when `wanted` are after the last."""
    found = [wanted]
    for position in range(len(layers) - 1, 0, -1):
        found.append(_wanted_before(layers[position], output_shape(layers[:position], shape), found[-1]))
    return found[: len(layers)][::-1]


def _wanted_before(layer: Layer, shape: Shape, wanted: Wanted) -> Wanted:
    """The planes of images of (H, W) that a layer reads."""
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
        paths = [_wanted_by(path, shape, wanted) for path in (layer.branch, layer.shortcut)]
        return paths[0][0] | paths[1][0], paths[0][1] | paths[1][1]
    return wanted


def _wanted_by(layers: tuple[Layer, ...], shape: Shape, wanted: Wanted) -> Wanted:
    """The planes of images of (H, W) that the layers read."""
    return _wanted_before(layers[0], shape, _wanted_after(layers, shape, wanted)[0]) if layers else wanted


def _held(layers: tuple[Layer, ...], shape: Shape, wanted: Wanted) -> int:
    total = 0
    for layer, (rows, columns) in zip(layers, _wanted_after(layers, shape, wanted), strict=True):
        if isinstance(layer, Residual):
            total += sum(_held(path, shape, (rows, columns)) for path in (layer.branch, layer.shortcut))
        shape = output_shape([layer], shape)
        if isinstance(layer, AvgPool):
            total += len(rows) * len(columns) * shape[0] * shape[1]
    return total


def _over_images(fill: Callable[[slice], None], network: Network, x: Array, wanted: Wanted) -> None:
    """fill(rows) for batches of images of which planes `wanted` are read, on as many threads as the task has; on a device in turn."""
    device = is_device_array(x)
    size = _batch_size(network, (x.shape[1], x.shape[2]), wanted, device)
    batches = [slice(first, min(first + size, x.shape[0])) for first in range(0, x.shape[0], size)]
    if device:
        for part in batches:
            fill(part)
    else:
        threads.on_threads(fill, batches)


def _node_shapes(layers: tuple[Layer, ...], shape: Shape) -> Iterator[Shape]:
    for layer in layers:
        if isinstance(layer, (Activation, LayerNorm)):
            yield shape
        elif isinstance(layer, Residual):
            yield from _node_shapes(layer.branch, shape)
            yield from _node_shapes(layer.shortcut, shape)
        shape = output_shape([layer], shape)


def _image_layers(network: Network) -> tuple[Layer, ...]:
    return network.layers[: network.readout_position]


def _remembered(wraps: bool) -> int:
    return REMEMBERED_AROUND if wraps else REMEMBERED


def _wraps(layers: tuple[Layer, ...]) -> bool:
    return any(isinstance(layer, Conv) and layer.padding == "circular" for layer in every_layer(layers))


def divisor(network: Network, x: Array) -> float:
    """What products of images (n, H, W, C) are divided by: the channels where the network scales its inputs, or 1."""
    return float(x.shape[3]) if network.scale_inputs else 1.0


def _channels_first(x: Array) -> Array:
    """(n, H, W, C) → (C, n, H, W) float64."""
    xp = namespace(x)
    return xp.ascontiguousarray(xp.moveaxis(x, 3, 0).astype(xp.float64))
