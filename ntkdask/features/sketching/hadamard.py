"""Unnormalised fast Walsh–Hadamard transforms, and the sampled, signed transforms that sketches are made of.

H has entries (−1)^{popcount(i & j)}: H Hᵀ = p·I, no 1/√p anywhere here. On the CPU one row at a time is signed, padded
and transformed in cache by explicit vector butterflies; on a GPU one block of threads does the same in shared memory
(`hadamard.cu`). Called by `sketches.py`; knows nothing of randomness.

The CPU loops are Numba functions without the GIL, one per thread over its own rows. The butterflies are LLVM vector
instructions written out, because Numba's own vectoriser cannot use full registers at strides below one. The bits of the
index are always transformed from the highest to the lowest, so rounding does not depend on the vector width.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from ntkdask import threads
from ntkdask.arrays import (
    Array,
    block_shared_bytes,
    cuda_module,
    is_device_array,
    namespace,
    require_float,
    require_rows,
)
from ntkdask.compiled import compiled_as_written
from ntkdask.errors import InputError

LANE_BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
"""Bytes of one vector register of the host."""

THREAD_ELEMENTS = 2**20
"""Elements of work below which another thread costs more than it saves (starting a pool takes about 0.1 ms)."""

CUDA_THREADS = 512
CUDA_ROWS = 65535  # of a grid's second axis; the kernel loops beyond
CUDA_TEMPORARY_BYTES = 256 * 2**20
CUDA_SHARED_SAFE_BYTES = 48 * 1024  # more than this needs an opt-in per kernel


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


def walsh_hadamard(x: Array, out: Array | None = None) -> Array:
    """Unnormalised Walsh–Hadamard transform of every row: out[i, j] = Σ_k (−1)^{popcount(j & k)} x[i, k].

    x: (n, p), p a power of two, float32 or float64, NumPy or CuPy. out: the same shape and dtype with unit stride along
    its rows; `x` itself is allowed. Returns `out`, of x's dtype. Raises InputError on other shapes.

    >>> walsh_hadamard(np.array([[1.0, 2.0, 3.0, 4.0]]))
    array([[10., -2., -4.,  0.]])
    """
    x = unit_stride(require_rows(require_float(x)))
    if x.ndim != 2 or x.shape[1] != padded_size(x.shape[1]):
        raise InputError(f"x has shape {x.shape}; walsh_hadamard takes (n, p) with p a power of two. Pad with zeros.")
    n, p = x.shape
    out = checked_out(out, x, (n, p))
    if is_device_array(x):
        _device_transform(x, None, p, out)
        return out
    flat, stride = row_memory(x)
    flat_out, stride_out = row_memory(out)

    def work(start: int, stop: int) -> None:
        _transform_rows(flat, stride, flat_out, stride_out, start, stop, aligned(p, x.dtype))

    over_rows(work, n, n * p)
    return out


def sampled_hadamard(factors: tuple[Factor, ...], scale: float, out: Array) -> Array:
    """out = scale · ∏ over one or two factors of (H D x)[rows], elementwise; x's are read once and never copied.

    out: (n, m), unit stride along its rows. Each row depends on its own inputs alone, so the bits are the same for any
    batching of the rows; x may share memory with the same rows of `out`.
    """
    if is_device_array(out):
        return _device_samples(factors, scale, out)
    left, right = factors[0], factors[-1]
    n, m = out.shape
    x, stride_x = row_memory(left.x)
    y, stride_y = row_memory(right.x)
    flat_out, stride_out = row_memory(out)

    def work(start: int, stop: int) -> None:
        a, b = aligned(left.size, out.dtype), aligned(right.size, out.dtype)
        if len(factors) == 1:
            _sample_rows(
                x, stride_x, left.signs, left.rows, flat_out, stride_out, start, stop, out.dtype.type(scale), a
            )
        else:
            _sample_product_rows(
                x,
                stride_x,
                left.signs,
                left.rows,
                y,
                stride_y,
                right.signs,
                right.rows,
                flat_out,
                stride_out,
                start,
                stop,
                out.dtype.type(scale),
                a,
                b,
            )

    over_rows(work, n, n * (m + sum(factor.size for factor in factors)))
    return out


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


# --- CPU --------------------------------------------------


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


def _butterflies(bits: int, within: bool) -> Any:
    """Numba intrinsic: the transform over j of 2**bits vectors source[start + j·stride], over lanes too if `within`.

    Called as f(source, start, out, out_start, stride) on contiguous 1-d arrays of one dtype; in place is allowed.
    """

    @intrinsic
    def transform(typing_context: Any, source: Any, start: Any, out: Any, out_start: Any, stride: Any) -> Any:
        item_bytes = source.dtype.bitwidth // 8

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            vector = ir.VectorType(context.get_value_type(source.dtype), LANE_BYTES // item_bytes)

            def pointers(array_type: Any, array: Any, first: Any) -> list[Any]:
                data = context.make_array(array_type)(context, builder, array).data
                steps = [builder.mul(args[4], ir.Constant(args[4].type, j)) for j in range(2**bits)]
                addresses = [builder.gep(data, [builder.add(first, step)]) for step in steps]
                return [builder.bitcast(address, vector.as_pointer()) for address in addresses]

            values = [builder.load(pointer, align=item_bytes) for pointer in pointers(source, args[0], args[1])]
            for h in [2**bit for bit in reversed(range(bits))]:
                for j in [j for j in range(2**bits) if not j & h]:
                    a, b = values[j], values[j | h]
                    values[j], values[j | h] = builder.fadd(a, b), builder.fsub(a, b)
            if within:
                values = [_within_lanes(builder, value) for value in values]
            for pointer, value in zip(pointers(out, args[2], args[3]), values, strict=True):
                builder.store(value, pointer, align=item_bytes)
            return context.get_dummy_value()

        return types.void(source, start, out, out_start, stride), generate

    return transform


def _within_lanes(builder: ir.IRBuilder, value: Any) -> Any:
    """The transform across the lanes of one vector: value ← swap(value) ± value; the product with ±1 is exact."""
    lanes = value.type.count
    for h in [lanes >> shift for shift in range(1, lanes.bit_length())]:
        order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [lane ^ h for lane in range(lanes)])
        sign = ir.Constant(value.type, [-1.0 if lane & h else 1.0 for lane in range(lanes)])
        swapped = builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)
        value = builder.fadd(builder.fmul(value, sign, flags=("contract",)), swapped, flags=("contract",))
    return value


_radix2, _radix4, _radix16 = (_butterflies(bits, within=False) for bits in (1, 2, 4))
_lanes, _radix16_lanes = (_butterflies(bits, within=True) for bits in (0, 4))


@compiled_as_written
def _across(scratch, high, bits):
    """Transform index bits high−bits … high−1 of `scratch` in place; bits is 1, 2 or 4."""
    stride = 1 << (high - bits)
    lanes = LANE_BYTES // scratch.itemsize
    for block in range(0, scratch.size, 1 << high):
        for i in range(block, block + stride, lanes):
            if bits == 4:
                _radix16(scratch, i, scratch, i, stride)
            elif bits == 2:
                _radix4(scratch, i, scratch, i, stride)
            else:
                _radix2(scratch, i, scratch, i, stride)


@compiled_as_written
def transform_row(scratch, out, start):
    """out[start : start + p] = H scratch, (p,); overwrites `scratch`, which may be `out`."""
    p = scratch.size
    lanes = LANE_BYTES // scratch.itemsize
    if p < lanes:
        h = p >> 1
        while h:
            for i in range(p):
                if not i & h:
                    a, b = scratch[i], scratch[i | h]
                    scratch[i], scratch[i | h] = a + b, a - b
            h >>= 1
        for i in range(p):
            out[start + i] = scratch[i]
        return
    high, rest = 0, 0  # bits of the index, and those above the lanes
    while (1 << high) < p:
        high += 1
    while (lanes << rest) < p:
        rest += 1
    while rest > 4 or rest & 3:  # small radices first: at long strides 16 rows fall into one set of the cache
        bits = 2 if rest & 2 else (1 if rest & 1 else 4)
        _across(scratch, high, bits)
        high -= bits
        rest -= bits
    if rest:
        for i in range(0, p, lanes << 4):
            _radix16_lanes(scratch, i, out, start + i, lanes)
    else:
        for i in range(0, p, lanes):
            _lanes(scratch, i, out, start + i, lanes)


@compiled_as_written
def load_signed(x, start, signs, scratch):
    """scratch[:d] = signs · x[start : start + d], zero beyond d."""
    d = signs.size
    row = x[start : start + d]
    for i in range(d):
        scratch[i] = signs[i] * row[i]
    for i in range(d, scratch.size):
        scratch[i] = 0


@compiled_as_written
def _transform_rows(x, stride, out, stride_out, first, last, scratch):
    for r in range(first, last):
        row = x[r * stride : r * stride + scratch.size]
        for i in range(scratch.size):
            scratch[i] = row[i]
        transform_row(scratch, out, r * stride_out)


@compiled_as_written
def _sample_rows(x, stride, signs, rows, out, stride_out, first, last, scale, scratch):
    for r in range(first, last):
        load_signed(x, r * stride, signs, scratch)
        transform_row(scratch, scratch, 0)
        row = out[r * stride_out : r * stride_out + rows.size]
        for j in range(rows.size):
            row[j] = scale * scratch[rows[j]]


@compiled_as_written
def _sample_product_rows(
    x, stride_x, signs_x, rows_x, y, stride_y, signs_y, rows_y, out, stride_out, first, last, scale, a, b
):
    for r in range(first, last):
        load_signed(x, r * stride_x, signs_x, a)
        load_signed(y, r * stride_y, signs_y, b)
        transform_row(a, a, 0)
        transform_row(b, b, 0)
        row = out[r * stride_out : r * stride_out + rows_x.size]
        for j in range(rows_x.size):
            row[j] = scale * (a[rows_x[j]] * b[rows_y[j]])


# --- GPU --------------------------------------------------


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


def _device_transform(x: Array, signs: Array | None, size: int, out: Array) -> None:
    """out (n, size) = H D x on the GPU; index bits beyond shared memory's go through global memory, 3 a pass."""
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


def _device_samples(factors: tuple[Factor, ...], scale: float, out: Array) -> Array:
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
            _device_transform(f.x[rows], f.signs, f.size, transformed)
            arguments += [transformed, np.int32(f.size), f.rows]
        arguments += [null, np.int32(0), null] * (2 - len(factors))
        part = (*tail[:2], out[rows], _row_stride(out))
        _kernel("gather_samples", dtype)((rows.stop - start,), (CUDA_THREADS,), (*arguments, *part))
    return out
