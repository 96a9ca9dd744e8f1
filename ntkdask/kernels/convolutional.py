"""NNGP and NTK of networks of images: variance maps, pairs of images up to the readout, the layers of vectors after it.

Pairs take the fused passes of `planes.host` (CPU) or `planes.device` (GPU) where these can run the network, otherwise
`planes.reference`. S and T at the readout are float64 whatever the dtype of the images; results have that dtype. The diagonal of a
symmetric call comes from the images with themselves, where c = 1 is known. Called by `neural`. MATH.md §1, §3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ntkdask.arrays import Array, is_device_array
from ntkdask.kernels import general
from ntkdask.kernels.base import set_diagonal
from ntkdask.kernels.image_rows import image_pair, image_rows, image_shape
from ntkdask.kernels.planes import device, host, reference
from ntkdask.kernels.planes.program import program as image_program
from ntkdask.networks import Activation, Layer, LayerNorm, Network
from ntkdask.networks.network import every_layer

PARTS = ("nngp", "ntk")


def matrices(network: Network, x: Array, y: Array | None, parts: Sequence[str]) -> list[Array]:
    """The NNGP and NTK matrices of images.

    Parameters
    ----------
    network : Network
        One that takes images.
    x : array (n, H, W, C), float32 or float64
        Images on the left.
    y : array (m, H, W, C), float32 or float64, or None
        Images on the right; None for x with itself, with exact diagonals.
    parts : sequence of {"nngp", "ntk"}
        Which matrices.

    Returns
    -------
    list of arrays (n, m) of x's dtype
        One for each part.

    Raises
    ------
    InputError
        For rows that are not images of equal shapes, or that the network does not fit.
    DtypeError
        For other dtypes than float32 and float64.
    """
    x, y = image_pair(x, y, network.layout)
    tangent, tail = "ntk" in parts, _tail(network)
    maps_x = reference.variance_maps(network, x)
    maps_y = maps_x if y is None else reference.variance_maps(network, y)
    s, t = _readout(network, _wide(tail, x), None if y is None else _wide(tail, y), maps_x, maps_y, tangent)
    if y is None:
        own = _own(network, x, maps_x, tangent)
        nodes = [general.node_variances(tail, own[0])] * 2
    elif _sees_variances(tail):
        sides = ((x, maps_x), (y, maps_y))
        nodes = [general.node_variances(tail, _own(network, *side, False)[0]) for side in sides]
    else:
        nodes = [[], []]
    results = general.continued(tail, s, t, nodes, y is None, x.dtype, parts)
    if y is None:
        pair = general.diagonals(tail, *own)
        for matrix, part in zip(results, parts, strict=True):
            set_diagonal(matrix, pair[PARTS.index(part)])
    return results


def diagonals(network: Network, x: Array, parts: Sequence[str]) -> list[Array]:
    """The `parts` of every image (n, H, W, C) with itself: (n,) each, of x's dtype; errors as of `matrices`."""
    x = image_rows(x, layout=network.layout)
    own = _own(network, x, reference.variance_maps(network, x), "ntk" in parts)
    pair = general.diagonals(_tail(network), *own)
    with np.errstate(over="ignore"):  # where a value exceeds the dtype, inf is the answer
        return [pair[PARTS.index(part)].astype(x.dtype) for part in parts]


def _own(network: Network, x: Array, maps: list[Array], tangent: bool) -> tuple[Array, Array | None]:
    """(S, T) (n,) float64 of every image with itself at the readout, T None without `tangent`; compiled where all planes are read."""
    program = image_program(network, (x.shape[1], x.shape[2]))
    if program is None or not program.gap or is_device_array(x) or not host.takes(program):
        return reference.image_diagonals(network, x, maps, tangent)
    s, t = host.diagonal(program, x, maps, reference.divisor(network, x), tangent)
    return s, t if tangent else None


def _readout(
    network: Network, x: Array, y: Array | None, maps_x: list[Array], maps_y: list[Array], tangent: bool
) -> tuple[Array, Array | None]:
    """(S, T) (n, m) float64 at the readout, T None without `tangent`; the one place that chooses between the passes.

    The diagonal of a symmetric call may be anything finite.
    """
    program = image_program(network, (x.shape[1], x.shape[2]))
    divisor = reference.divisor(network, x)
    if program is not None and is_device_array(x) and device.supports(program, x.dtype.itemsize, tangent):
        return device.readout(program, x, y, maps_x, maps_y, divisor, tangent)
    if program is not None and not is_device_array(x) and host.takes(program):
        s, t = host.readout(program, x, y, maps_x, maps_y, divisor, tangent)
        return s, t if tangent else None
    return reference.readout_pairs(network, x, y, maps_x, maps_y, tangent)


def workspace_bytes(
    network: Network, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None, parts: int, tangent: bool
) -> int:
    """Bytes of results, variance maps, S and T, and each thread's pairs, on the CPU; see `Kernel.workspace_bytes`.

    Parameters
    ----------
    network : Network
        One that takes images.
    n, m : int
        Images on the left and on the right.
    itemsize : int
        4 for float32, 8 for float64.
    row_shape : tuple of 3 int or None
        (H, W, C); None counts results, S and T alone.
    parts : int
        Number of matrices.
    tangent : bool
        Whether T is computed.

    Returns
    -------
    int

    Raises
    ------
    InputError
        For rows that the network does not take.
    """
    results = n * m * parts * itemsize
    if row_shape is None:
        return results + 8 * (1 + tangent) * n * m
    h, w, channels = shape = image_shape(row_shape, layout=network.layout)
    maps = (n + m) * reference.map_bytes(network, (h, w))
    program = image_program(network, (h, w))
    if program is None or not host.takes(program):
        return results + maps + reference.workspace_bytes(network, n, m, shape, tangent)
    wide = _sees_variances(_tail(network)) and itemsize < 8
    passing = host.workspace_bytes(program, n, m, 8 if wide else itemsize, channels)
    passing += 8 * (n + m) * h * w * channels if wide else 0
    images = max(n, m)
    alone = reference.image_bytes(network, images, shape, tangent, read_out=not program.gap)
    if program.gap:
        alone = max(alone, host.diagonal_bytes(program, images, channels))
    return results + maps + max(passing, 8 * 2 * n * m + alone)


def _tail(network: Network) -> tuple[Layer, ...]:
    """The layers after the readout."""
    return network.layers[network.readout_position + 1 :]


def _wide(tail: tuple[Layer, ...], x: Array) -> Array:
    """Float64 images where the tail has correlations, otherwise x itself.

    The correlations of means are near ±1, so a layer that reads them turns an error of S into its square root.
    """
    return x.astype("float64", copy=False) if _sees_variances(tail) else x


def _sees_variances(layers: tuple[Layer, ...]) -> bool:
    """Whether there is an Activation or a LayerNorm, which divides by variances."""
    return any(isinstance(layer, (Activation, LayerNorm)) for layer in every_layer(layers))
