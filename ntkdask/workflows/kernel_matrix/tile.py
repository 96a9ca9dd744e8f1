"""The values of one tile of a kernel matrix on the host, in halves where the memory of the device is too small for the whole."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from ntkdask.arrays import Array, release_device_memory, to_host
from ntkdask.kernels.base import Kernel

LEAST_ROWS = 8
"""Rows of the smallest piece: where that does not fit, smaller ones would not either."""


def compute_tile(kernel: Kernel, x: Array, y: Array | None = None) -> tuple[tuple[np.ndarray, ...], int]:
    """(matrices, halvings): kernel(x, y), y=None for x itself, one C-ordered host matrix for each part of the kernel.

    Entries that are k × k matrices, (n, m, k, k), become (n·k, m·k) in the order i·k + o. Where the device is out of memory the longer
    side is halved until the pieces fit; halvings is how often the smallest piece was. A piece of LEAST_ROWS rows that does not fit
    raises the device's error.
    """
    values = _attempt(lambda: kernel(x) if y is None else kernel(x, y))
    if values is not None:
        return tuple(_matrix(v) for v in (values if isinstance(values, tuple) else (values,))), 0
    n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
    if max(n, m) <= LEAST_ROWS:
        whole = kernel(x) if y is None else kernel(x, y)
        return tuple(_matrix(v) for v in (whole if isinstance(whole, tuple) else (whole,))), 0
    half = max(n, m) // 2
    if y is None:
        first, a = compute_tile(kernel, x[:half])
        lower, b = compute_tile(kernel, x[half:], x[:half])
        last, c = compute_tile(kernel, x[half:])
        pieces = zip(first, lower, last, strict=True)
        return tuple(np.block([[f, low.T], [low, g]]) for f, low, g in pieces), 1 + max(a, b, c)
    if n >= m:
        above, a = compute_tile(kernel, x[:half], y)
        below, b = compute_tile(kernel, x[half:], y)
        return tuple(np.concatenate(p) for p in zip(above, below, strict=True)), 1 + max(a, b)
    left, a = compute_tile(kernel, x, y[:half])
    right, b = compute_tile(kernel, x, y[half:])
    return tuple(np.concatenate(p, axis=1) for p in zip(left, right, strict=True)), 1 + max(a, b)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that the device's memory is too small.

    Those are CuPy's and torch's OutOfMemoryError, and cuBLAS's refusal to allocate.
    """
    if any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__):
        return True
    text = str(error)
    if isinstance(error, RuntimeError) and ("CUDA out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns; None when the device is out of memory, after the memory of the call is freed."""
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler: the error's frames held the arrays
    gc.collect()
    release_device_memory()
    return None


def entries_matrix(value: Array) -> Array:
    """(n, m, k, k) as the matrix (n·k, m·k) in the order i·k + o."""
    n, m, k, _ = value.shape
    return value.transpose(0, 2, 1, 3).reshape(n * k, m * k)


def _matrix(value: Array) -> np.ndarray:
    value = to_host(value)
    return np.ascontiguousarray(entries_matrix(value) if value.ndim == 4 else value)
