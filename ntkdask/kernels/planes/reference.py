"""S and T of images at a network's readout, by planes of equal offset: any network, NumPy and CuPy, float64. MATH.md §1, §3.

Between poolings, entries of S and T with the offset δ = p' − p only meet entries with the same δ, so the layers run plane by plane
over a batch of pairs that stays in cache. Variances come first, once per image, from the few planes of the image with itself that
poolings mix. `planes.layers` says what a layer does to a plane; here are the chains of layers and the sweeps over planes. The fused
passes (`planes.host`, `planes.device`) are tested against this module, which also takes every network that they cannot run. Called
by `kernels.convolutional` and by features.
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
    sweep,
)
from ntkdask.kernels.planes.wanted import (
    ALONE,
    Wanted,
    has_circular,
    held_entries,
    image_layers,
    node_shapes,
    planes_of_readout,
    wanted_after,
)
from ntkdask.networks import Activation, AvgPool, Conv, GlobalAvgPool, Layer, LayerNorm, Network, Residual
from ntkdask.networks.network import every_layer

BATCH_ENTRIES, DEVICE_BATCH_ENTRIES = 2**16, 2**24
"""Entries of plane 0 over a batch of pairs. A plane has a quarter of them on average; a dozen such float64 arrays fit a cache."""
HELD_ENTRIES, DEVICE_HELD_ENTRIES = 2**21, 2**28
"""Entries of pooled planes that a batch may hold."""

Node: TypeAlias = Callable[[PlaneSource], tuple[Array, Array]]
"""A function from a source to the variances of its images on both sides, (*batch, H, W) each."""


@dataclass(frozen=True)
class _Chains:
    """Makes chains of sources out of layers.

    Parameters
    ----------
    node : Node
        Asked before every Activation and LayerNorm, in order.
    own : bool
        Whether images meet themselves.
    tangent : bool
        Whether T is wanted.
    wraps : bool
        Whether the network has circular convolutions.
    """

    node: Node
    own: bool
    tangent: bool
    wraps: bool

    def extend(self, source: PlaneSource, layers: tuple[Layer, ...], wanted: Wanted) -> PlaneSource:
        """The source after the layers, of which the planes `wanted` will be read."""
        for layer, after in zip(layers, wanted_after(layers, source.shape, wanted), strict=True):
            source = self._after(layer, source, after)
        return source

    def _after(self, layer: Layer, source: PlaneSource, wanted: Wanted) -> PlaneSource:
        """The source after one layer."""
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
    """S(p, p) of every image with itself just before every Activation and LayerNorm of the image part, in order.

    Parameters
    ----------
    network : Network
        One that takes images.
    x : array (n, H, W, C), float32 or float64
        The images.

    Returns
    -------
    list of arrays (n, H_k, W_k), float64
        Maps of a Residual's branch come before those of its shortcut.

    Raises
    ------
    InputError
        Naming the layer, where the images do not fit.
    """
    return [s for s, _ in _node_maps(network, x, tangent=False)]


def tangent_maps(network: Network, x: Array) -> list[Plane]:
    """(S(p, p), T(p, p)) where `variance_maps` has S(p, p): (n, H_k, W_k) float64 each; T = 0 where nothing is trainable yet."""
    return _node_maps(network, x, tangent=True)


def _node_maps(network: Network, x: Array, tangent: bool) -> list[Plane]:
    """The maps of `tangent_maps`, or with None in place of T."""
    layers, shape = image_layers(network), (int(x.shape[1]), int(x.shape[2]))
    network.image_shapes(shape)
    xp = namespace(x)
    maps = [
        (xp.empty((x.shape[0], *s)), xp.zeros((x.shape[0], *s)) if tangent else None)
        for s in node_shapes(layers, shape)
    ]

    def fill(part: slice) -> None:
        waiting = iter(maps)

        def node(source: PlaneSource) -> tuple[Array, Array]:
            # a pooled variance that cancels may end below 0
            variances, tangents = next(waiting)
            s, t = source.get((0, 0))
            v = variances[part]
            v[...] = xp.maximum(s, 0.0)
            if tangents is not None and t is not None:
                tangents[part] = t
            return v, v

        chains = _Chains(node, own=True, tangent=tangent, wraps=has_circular(layers))
        images = _channels_first(x[part])
        chains.extend(Inputs(images, images, divisor(network, x)), layers, ALONE)

    _over_images(fill, network, x, ALONE)
    return maps


def image_diagonals(network: Network, x: Array, maps: list[Array], tangent: bool) -> Plane:
    """(S(x_i, x_i), T(x_i, x_i)) at the readout, (n,) float64 each; T is None without `tangent`. maps: those of `variance_maps`."""
    xp, n = namespace(x), x.shape[0]
    s, t = xp.empty(n), xp.empty(n) if tangent else None

    def fill(part: slice) -> None:
        images, own = _channels_first(x[part]), [v[part] for v in maps]
        parts = _read_out(network, images, images, own, own, divisor(network, x), own=True, tangent=tangent)
        for out, values in zip((s, t), parts, strict=True):
            if out is not None:
                out[part] = values

    _over_images(fill, network, x, planes_of_readout(network, (x.shape[1], x.shape[2])))
    return s, t


def readout_pairs(
    network: Network, x: Array, y: Array | None, maps_x: list[Array], maps_y: list[Array], tangent: bool
) -> Plane:
    """S and T of all pairs of images at the readout.

    Parameters
    ----------
    network : Network
        One that takes images.
    x : array (n, H, W, C), float32 or float64
        Images on the left.
    y : array (m, H, W, C), float32 or float64, or None
        Images on the right; None for x with itself.
    maps_x, maps_y : list of arrays
        `variance_maps` of x and of y.
    tangent : bool
        Whether T is wanted.

    Returns
    -------
    tuple of two arrays (n, m), float64
        S, and T or None. With y None they are symmetric to the last bit, and their diagonal is good to rounding only.
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
            parts = _read_out(network, left, right, *sides, scale, own=False, tangent=tangent)
            for matrix, values in zip(out, parts, strict=False):
                put(values, matrix, block)

        return fill

    rows, columns = block_shape(network, (x.shape[1], x.shape[2]), device)
    over_blocks(cut(x.shape[0], None if y is None else other.shape[0], rows, columns), start, device)
    return out[0], out[1] if tangent else None


def block_shape(network: Network, shape: Shape, device: bool = False) -> tuple[int, int]:
    """Rows and columns of the pairs that run together; there are twice as many columns as rows."""
    pairs = _batch_size(network, shape, planes_of_readout(network, shape), device)
    rows = 1
    while 2 * (2 * rows) ** 2 <= pairs:
        rows *= 2
    return rows, 2 * rows


def _batch_size(network: Network, shape: Shape, wanted: Wanted, device: bool = False) -> int:
    """Number of pairs, or of images with themselves, that run together when planes `wanted` are read in the end."""
    entries, most = (DEVICE_BATCH_ENTRIES, DEVICE_HELD_ENTRIES) if device else (BATCH_ENTRIES, HELD_ENTRIES)
    held = held_entries(image_layers(network), shape, wanted)
    return max(1, min(entries // (shape[0] * shape[1]), most // max(1, held)))


def map_bytes(network: Network, shape: Shape) -> int:
    """Bytes of the variance maps of one image of (H, W); errors as of `variance_maps`."""
    network.image_shapes(shape)
    return 8 * sum(h * w for h, w in node_shapes(image_layers(network), shape))


def image_bytes(network: Network, n: int, row_shape: tuple[int, int, int], tangent: bool, read_out: bool = True) -> int:
    """Bytes of all threads' batches when n images (H, W, C) meet themselves: for variance maps and, with `read_out`, the readout."""
    sizes = []
    for wanted in (ALONE, planes_of_readout(network, row_shape[:2])) if read_out else (ALONE,):
        size = _batch_size(network, row_shape[:2], wanted)
        images = min(size, n)
        sizes.append(workers(-(-n // size)) * _batch_bytes(network, images, 2 * images, row_shape, tangent, wanted))
    return max(sizes)


def workspace_bytes(network: Network, n: int, m: int, row_shape: tuple[int, int, int], tangent: bool) -> int:
    """Bytes of S and T (n, m), and of all threads' batches of pairs in `readout_pairs` or of images, whichever is more."""
    rows, columns = block_shape(network, row_shape[:2])
    slots = workers(len(cut(n, m, rows, columns)))
    rows, columns = min(rows, n), min(columns, m)
    pairs = slots * _batch_bytes(
        network, rows * columns, rows + columns, row_shape, tangent, planes_of_readout(network, row_shape[:2])
    )
    return 8 * (1 + tangent) * n * m + max(pairs, image_bytes(network, max(n, m), row_shape, tangent))


def _batch_bytes(
    network: Network, pairs: int, images: int, row_shape: tuple[int, int, int], tangent: bool, wanted: Wanted
) -> int:
    """Bytes of one batch of so many pairs of so many images."""
    h, w, channels = row_shape
    shape, layers = (h, w), image_layers(network)
    arrays, row_values = general.block_arrays(layers)
    arrays += 2 * _remembered(has_circular(layers)) * sum(isinstance(layer, Residual) for layer in every_layer(layers))
    held = (1 + tangent) * held_entries(layers, shape, wanted)
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
    """(S, T) at the readout, (*batch) each. x, y: (C, *batch, H, W), batches that broadcast; maps alike."""
    nodes: Iterator[tuple[Array, Array]] = iter(zip(maps_x, maps_y, strict=True))
    layers, shape = image_layers(network), x.shape[-2:]
    chains = _Chains(lambda source: next(nodes), own, tangent, has_circular(layers))
    wanted = planes_of_readout(network, shape)
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


def _over_images(fill: Callable[[slice], None], network: Network, x: Array, wanted: Wanted) -> None:
    """Call fill(rows) for batches of images of which planes `wanted` are read: on the task's threads, on a device in turn."""
    device = is_device_array(x)
    size = _batch_size(network, (x.shape[1], x.shape[2]), wanted, device)
    batches = [slice(first, min(first + size, x.shape[0])) for first in range(0, x.shape[0], size)]
    if device:
        for part in batches:
            fill(part)
    else:
        threads.on_threads(fill, batches)


def _remembered(wraps: bool) -> int:
    """How many planes a Residual keeps for its second path."""
    return REMEMBERED_AROUND if wraps else REMEMBERED


def divisor(network: Network, x: Array) -> float:
    """The number by which products of images (n, H, W, C) are divided: C where the network scales its inputs, else 1."""
    return float(x.shape[3]) if network.scale_inputs else 1.0


def _channels_first(x: Array) -> Array:
    """(n, H, W, C) → (C, n, H, W) float64."""
    xp = namespace(x)
    return xp.ascontiguousarray(xp.moveaxis(x, 3, 0).astype(xp.float64))
