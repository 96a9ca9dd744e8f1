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

    Parameters
    ----------
    x : array (n, d)
        The rows, of unit stride along d; they are padded with zeros to `size`.
    signs : array (d,)
        ±1 of x's dtype, the diagonal of D.
    rows : array (m,), uint32
        Sampled entries, below `size`.
    size : int
        A power of two >= d.
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
    """`out`, or a new array like `x` of this shape; InputError when the result cannot be written to `out` in place."""
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
    """Scratch (size,) of `dtype`, aligned to cache lines: an unaligned 64-byte load touches two of them."""
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)


def row_memory(x: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory of `x` from its first to its last element, (span,), and the number of elements from row to row.

    With it one compiled specialisation serves whole arrays and slices of columns, as input or output.
    """
    n, d = x.shape
    stride = x.strides[0] // x.itemsize if n > 1 else d
    span = (n - 1) * stride + d if n and d else 0
    return np.lib.stride_tricks.as_strided(x, (span,), (x.itemsize,)), stride


def over_rows(work: Callable[[int, int], None], n: int, elements: int) -> None:
    """Call work(start, stop) for contiguous ranges of rows, one for each thread that the task may use and the work deserves."""
    parts = max(1, min(threads.current(), n, elements // THREAD_ELEMENTS))
    if parts == 1:
        work(0, n)
        return
    bounds = [n * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))
