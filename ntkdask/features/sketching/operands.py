"""Rows as the sketches read and write them: operands of a transform, strides, scratch memory, and the threads that share rows.

What the loops of this folder ask of an array before they touch it. Called by the sketches; computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ntkdask import threads
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError

THREAD_ELEMENTS = 2**20
"""Elements of work below which another thread costs more than it saves (starting a pool takes about 0.1 ms)."""


@dataclass(frozen=True)
class Factor:
    """One operand of a sampled transform: (H D x)[rows].

    x: (n, d), unit stride along d. signs: (d,) ±1 of x's dtype, the diagonal of D. rows: (m,) uint32 below `size`.
    size: power of two >= d; x is padded with zeros to it.
    """

    x: Array
    signs: Array
    rows: Array
    size: int


def padded_size(d: int) -> int:
    """The smallest power of two that is at least `d`."""
    return 1 << max(0, d - 1).bit_length()


def unit_stride(x: Array) -> Array:
    """`x` itself when its rows are contiguous (column slices of C-ordered arrays are), else a C-ordered copy."""
    flat = x.shape[-1] <= 1 or x.strides[-1] == x.itemsize
    whole = x.shape[0] <= 1 or (x.strides[0] % x.itemsize == 0 and x.strides[0] >= 0)
    return x if flat and whole else namespace(x).ascontiguousarray(x)


def checked_out(out: Array | None, x: Array, shape: tuple[int, int]) -> Array:
    """`out`, or a new array like `x` of `shape`; InputError when `out` cannot take the result in place."""
    if out is None:
        return namespace(x).empty(shape, dtype=x.dtype)
    if out.shape != shape or out.dtype != x.dtype or is_device_array(out) != is_device_array(x):
        raise InputError(f"out is {out.dtype} {out.shape}, but the result is {x.dtype} {shape}, on the device of x.")
    if unit_stride(out) is not out:
        raise InputError(
            f"out has strides {out.strides}; its rows must be contiguous, as columns of a C-ordered array are."
        )
    return out


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """(size,) of `dtype`, aligned to cache lines: an unaligned 64-byte load touches two of them."""
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)


def row_memory(x: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory of `x` from its first to its last element, (span,), and the elements between rows.

    One compiled specialisation then serves whole arrays and column slices, input or output.
    """
    n, d = x.shape
    stride = x.strides[0] // x.itemsize if n > 1 else d
    span = (n - 1) * stride + d if n and d else 0
    return np.lib.stride_tricks.as_strided(x, (span,), (x.itemsize,)), stride


def over_rows(work: Callable[[int, int], None], n: int, elements: int) -> None:
    """work(start, stop) over contiguous row ranges, one per thread that the task may use and the work deserves."""
    parts = max(1, min(threads.current(), n, elements // THREAD_ELEMENTS))
    if parts == 1:
        work(0, n)
        return
    bounds = [n * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))
