"""What a convolution does to features of pixels: the direct sum of the pixels under the filter, kept at one width.

μ_p = Σ_a roll(φ_{p+a}, −o_a), where the coordinates of φ carry independent random signs and the shifts o_a differ. Then
E⟨μ_p, μ'_p'⟩ = Σ_a⟨φ_{p+a}, φ'_{p'+a}⟩: products of different a meet different signs. A shift reads contiguous memory and mixes
coordinates as a random sample would, so nothing is transformed here: φ comes from, or goes into, a Hadamard transform elsewhere.
On the CPU three pixels are added at a time by a compiled loop; on a GPU one thread makes one entry (`sums.cu`). Called by
`pixels.filters`; knows the geometry of `Conv` and nothing of kernels. MATH.md §4.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, cuda_module, is_device_array, namespace, to_device
from ntkdask.cache import shared
from ntkdask.compiled import compiled_as_written
from ntkdask.networks import Conv

CUDA_THREADS = 256
SHIFT_UNITS = 64
"""Shifts are multiples of width/SHIFT_UNITS, so that rows of features stay aligned in memory."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The pixels under a filter at every output pixel.

    Parameters
    ----------
    pixels : array (H'·W', q²), int32
        Numbers of the input pixels; the first counts[p] entries of row p are used.
    filter : array (H'·W', q²), int32
        The filter's entry that belongs to each of them.
    counts : array (H'·W',), int32
        How many pixels of the image are under the filter.
    rows_in, rows_out : int
        H·W and H'·W'.
    """

    pixels: Array
    filter: Array
    counts: Array
    rows_in: int
    rows_out: int


@functools.lru_cache(maxsize=64)
def neighbours(conv: Conv, shape: tuple[int, int]) -> Neighbours:
    """The input pixels of every output pixel of a convolution of images (H, W); those outside the image are left out."""
    seen, inside = [], []
    for length, count, q, stride, before in zip(
        shape, conv.output_shape(shape), conv.filter, conv.strides, conv.before(shape), strict=True
    ):
        position = stride * np.arange(count)[:, None] + np.arange(q) - before
        position = position % length if conv.padding == "circular" else position
        seen.append(position)
        inside.append((position >= 0) & (position < length))
    size = conv.filter[0] * conv.filter[1]
    pixels = (seen[0][:, None, :, None] * shape[1] + seen[1][None, :, None, :]).reshape(-1, size)
    within = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).reshape(-1, size)
    order = np.argsort(~within, axis=1, kind="stable").astype(np.int32)
    counts = within.sum(axis=1).astype(np.int32)
    chosen = np.where(np.arange(size) < counts[:, None], np.take_along_axis(pixels, order, axis=1), 0)
    return Neighbours(chosen.astype(np.int32), order, counts, shape[0] * shape[1], len(pixels))


def shift_units(n_offsets: int) -> int:
    """The least width that has a shift for each of the filter's entries, with room that keeps them apart."""
    units = SHIFT_UNITS
    while units < 4 * n_offsets:
        units *= 2
    return units


def draw_shifts(seed: int, path: seeds.Path, n_offsets: int, width: int) -> np.ndarray:
    """Shifts (n_offsets,) int32, different and ascending, below `width`, a power of two >= `shift_units`.

    It does not matter which entry of the filter gets which shift: the features that are shifted have no order.
    """
    units = shift_units(n_offsets)
    chosen = seeds.permutation(seed, path, units)[:n_offsets]
    return (np.sort(chosen) * (width // units)).astype(np.int32)


def shifted_sums(
    source: Array,
    neighbourhood: Neighbours,
    shifts: np.ndarray,
    weights: Array,
    first: int,
    out: Array,
    addend: Array | None = None,
    addend_weights: Array | None = None,
) -> Array:
    """out[r] = weights·Σ_a roll(source[p(r, a)], −shifts[a]) + addend_weights·addend[r], for output pixels first + r of all images.

    All arrays have one dtype and device and are C-ordered. Bits do not depend on how the rows are cut.

    Parameters
    ----------
    source : array (images·rows_in, width)
        Features of the input pixels.
    neighbourhood : Neighbours
        The pixels under the filter.
    shifts : array (q²,), int32
        The shift of each entry of the filter, ascending.
    weights : array (width,)
        Factors of the sum's coordinates.
    first : int
        Number of the output pixel of the first row of `out`.
    out : array (rows, width)
        Receives the sums.
    addend : array (rows, width), optional
        Rows that are added.
    addend_weights : array (width,), optional
        Factors of their coordinates.

    Returns
    -------
    array (rows, width)
        `out`.
    """
    if is_device_array(source):
        return _on_device(source, neighbourhood, shifts, weights, first, out, addend, addend_weights)
    n = neighbourhood
    tables = n.pixels, n.filter, n.counts, n.rows_in, n.rows_out
    extra = (out, weights) if addend is None else (addend, addend_weights)
    _sum_rows(source, tables, shifts, weights, addend is not None, extra, first, out)
    return out


@compiled_as_written
def _sum_rows(source, tables, shifts, weights, has_addend, extra, first, out):
    """Tables: the fields of `Neighbours`. extra: (addend, its weights), which are read where there is one."""
    pixels, numbers, counts, rows_in, rows_out = tables
    addend, addend_weights = extra
    width = out.shape[1]
    for r in range(out.shape[0]):
        image = (first + r) // rows_out
        pixel = first + r - image * rows_out
        base, count = image * rows_in, counts[pixel]
        row = out[r]
        for j in range(width):
            row[j] = 0
        triples = count - count % 3
        for a in range(0, triples, 3):
            x, y, z = (
                source[base + pixels[pixel, a]],
                source[base + pixels[pixel, a + 1]],
                source[base + pixels[pixel, a + 2]],
            )
            o, p, q = shifts[numbers[pixel, a]], shifts[numbers[pixel, a + 1]], shifts[numbers[pixel, a + 2]]
            # o < p < q: z runs over its end first
            for part in range(4):
                start = (0, width - q, width - p, width - o)[part]
                stop = (width - q, width - p, width - o, width)[part]
                i, k, m = o - (part > 2) * width, p - (part > 1) * width, q - (part > 0) * width
                u, v, w, t = x[start + i : stop + i], y[start + k : stop + k], z[start + m : stop + m], row[start:stop]
                for j in range(t.size):
                    t[j] += (u[j] + v[j]) + w[j]
        for a in range(triples, count):
            x, o = source[base + pixels[pixel, a]], shifts[numbers[pixel, a]]
            u, t = x[o:], row[: width - o]
            for j in range(t.size):
                t[j] += u[j]
            u, t = x[:o], row[width - o :]
            for j in range(t.size):
                t[j] += u[j]
        if has_addend:
            other = addend[r]
            for j in range(width):
                row[j] = weights[j] * row[j] + addend_weights[j] * other[j]
        else:
            for j in range(width):
                row[j] *= weights[j]


# --- GPU --------------------------------------------------


def cuda_source() -> str:
    """The CUDA C++ of this module; it includes nothing."""
    return resources.files("ntkdask.features.pixels").joinpath("sums.cu").read_text()


def _on_device(
    source: Array,
    neighbourhood: Neighbours,
    shifts: np.ndarray,
    weights: Array,
    first: int,
    out: Array,
    addend: Any,
    addend_weights: Any,
) -> Array:
    rows, width = out.shape
    if not rows:
        return out
    kernel = cuda_module(cuda_source()).get_function(f"shifted_sums_{out.dtype.name}")
    null = np.uintp(0)
    tables = _device_tables(neighbourhood, source)
    moved = namespace(source).asarray(shifts)
    arguments = (
        source,
        np.int64(neighbourhood.rows_in),
        np.int64(neighbourhood.rows_out),
        *tables,
        np.int32(neighbourhood.pixels.shape[1]),
        moved,
        weights,
        null if addend is None else addend,
        null if addend is None else addend_weights,
        out,
        np.int32(width),
        np.int64(first),
        np.int64(rows),
    )
    kernel((-(-rows * width // CUDA_THREADS),), (CUDA_THREADS,), arguments)
    return out


def _device_tables(neighbourhood: Neighbours, like: Array) -> tuple[Array, Array, Array]:
    """`pixels`, `filter` and `counts` on like's device, once per process."""
    key = ("neighbours", neighbourhood, like.device.id)
    return shared.get(
        key, lambda: tuple(to_device(a) for a in (neighbourhood.pixels, neighbourhood.filter, neighbourhood.counts))
    )
