"""The Walsh–Hadamard transforms of `hadamard.py` on a GPU: which CUDA kernel is launched, with what memory.

A transform that fits one block's shared memory is one kernel; of a longer one the high bits of the index go through global
memory first. The kernels are in `hadamard.cu`.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np

from ntkdask.arrays import Array, block_shared_bytes, cuda_module, namespace
from ntkdask.features.sketching.operands import Factor

CUDA_THREADS = 512
CUDA_ROWS = 65535  # of a grid's second axis; the kernel loops beyond
CUDA_TEMPORARY_BYTES = 256 * 2**20
CUDA_SHARED_SAFE_BYTES = 48 * 1024  # more than this needs an opt-in per kernel


def cuda_source() -> str:
    """The CUDA C++ of this module; it includes nothing."""
    return resources.files("ntkdask.features.sketching").joinpath("hadamard.cu").read_text()


def _kernel(name: str, dtype: np.dtype, shared_bytes: int = 0) -> Any:
    kernel = cuda_module(cuda_source()).get_function(f"{name}_{dtype.name}")
    if shared_bytes > CUDA_SHARED_SAFE_BYTES:
        kernel.max_dynamic_shared_size_bytes = shared_bytes
    return kernel


def _skewed(size: int) -> int:
    """Elements of shared memory for `size` values: one in 33 is a gap against bank conflicts (`skew` in the source)."""
    return size + size // 32 + 1


def _row_stride(x: Array) -> np.int64:
    return np.int64(x.strides[0] // x.itemsize if x.shape[0] > 1 else x.shape[1])


def _device_size(size: int, itemsize: int) -> int:
    """The largest power of two up to `size` whose transform fits one block's shared memory."""
    while _skewed(size) * itemsize > block_shared_bytes():
        size //= 2
    return size


def transform_on_device(x: Array, signs: Array | None, size: int, out: Array) -> None:
    """out (n, size) = H D x on the GPU; index bits beyond those of shared memory go through global memory, 3 a pass."""
    n, dtype, null = x.shape[0], x.dtype, np.uintp(0)
    if not n:
        return
    chunk, high = _device_size(size, x.itemsize), size.bit_length() - 1
    while (1 << high) > chunk:
        bits = min(3, high - chunk.bit_length() + 1)
        arguments = (x, _row_stride(x), null if signs is None else signs, np.int32(x.shape[1]), out, _row_stride(out))
        blocks = (-(-(size >> bits) // CUDA_THREADS), min(n, CUDA_ROWS))
        last = (np.int64(n), np.int32(size), np.int32(high - bits), np.int32(bits))
        _kernel("hadamard_pass", dtype)(blocks, (CUDA_THREADS,), (*arguments, *last))
        x, signs, high = out, None, high - bits
    shared = _skewed(chunk) * x.itemsize
    arguments = (x, _row_stride(x), null if signs is None else signs, np.int32(x.shape[1]), out, _row_stride(out))
    blocks, chunks = n * (size // chunk), np.int32(size // chunk)
    _kernel("hadamard_rows", dtype, shared)(
        (blocks,), (CUDA_THREADS,), (*arguments, np.int32(chunk), chunks), shared_mem=shared
    )


def samples_on_device(factors: tuple[Factor, ...], scale: float, out: Array) -> Array:
    """`sampled_hadamard` on the GPU: one kernel where both transforms fit shared memory, else through global memory."""
    (n, m), dtype, null = out.shape, out.dtype, np.uintp(0)
    if not n or not m:
        return out
    tail = (np.int32(m), dtype.type(scale), out, _row_stride(out))
    shared = sum(_skewed(factor.size) for factor in factors) * out.itemsize
    if shared <= block_shared_bytes():
        arguments: list[Any] = []
        for f in factors:
            arguments += [f.x, _row_stride(f.x), f.signs, np.int32(f.x.shape[1]), np.int32(f.size), f.rows]
        arguments += [null, np.int64(0), null, np.int32(0), np.int32(0), null] * (2 - len(factors))
        _kernel("sampled_rows", dtype, shared)((n,), (CUDA_THREADS,), (*arguments, *tail), shared_mem=shared)
        return out
    step = max(1, CUDA_TEMPORARY_BYTES // (sum(factor.size for factor in factors) * out.itemsize))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        arguments = []
        for f in factors:
            transformed = namespace(out).empty((rows.stop - start, f.size), dtype)
            transform_on_device(f.x[rows], f.signs, f.size, transformed)
            arguments += [transformed, np.int32(f.size), f.rows]
        arguments += [null, np.int32(0), null] * (2 - len(factors))
        part = (*tail[:2], out[rows], _row_stride(out))
        _kernel("gather_samples", dtype)((rows.stop - start,), (CUDA_THREADS,), (*arguments, *part))
    return out
