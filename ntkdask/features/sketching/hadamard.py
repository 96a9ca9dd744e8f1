"""Unnormalised fast Walsh–Hadamard transforms, and the sampled, signed transforms that sketches are made of.

H has entries (−1)^{popcount(i & j)}: H Hᵀ = p·I, no 1/√p anywhere here. On the CPU one row at a time is signed, padded
and transformed in cache by explicit vector butterflies; on a GPU one block of threads does the same in shared memory
(`hadamard_device`). Called by the sketches; draws no random numbers.

The CPU loops are Numba functions without the GIL, one per thread over its own rows. The butterflies are LLVM vector
instructions written out, because Numba's own vectoriser cannot use full registers at strides below one. The bits of the
index are always transformed from the highest to the lowest, so rounding does not depend on the vector width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from ntkdask.arrays import Array, is_device_array, require_float, require_rows
from ntkdask.compiled import compiled_as_written
from ntkdask.errors import InputError
from ntkdask.features.sketching.hadamard_device import samples_on_device, transform_on_device
from ntkdask.features.sketching.operands import (
    Factor,
    aligned,
    checked_out,
    over_rows,
    padded_size,
    row_memory,
    unit_stride,
)

LANE_BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
"""Bytes of one vector register of the host."""


def walsh_hadamard(x: Array, out: Array | None = None) -> Array:
    """Unnormalised Walsh–Hadamard transform of every row: out[i, j] = Σ_k (−1)^{popcount(j & k)} x[i, k].

    Parameters
    ----------
    x : array (n, p), float32 or float64, NumPy or CuPy
        Rows; p is a power of two.
    out : array (n, p), optional
        Receives the result; of x's dtype with unit stride along its rows. It may be `x` itself.

    Returns
    -------
    array (n, p)
        `out`, of x's dtype.

    Raises
    ------
    InputError
        For other shapes.

    >>> import numpy as np
    >>> walsh_hadamard(np.array([[1.0, 2.0, 3.0, 4.0]]))
    array([[10., -2., -4.,  0.]])
    """
    x = unit_stride(require_rows(require_float(x)))
    if x.ndim != 2 or x.shape[1] != padded_size(x.shape[1]):
        raise InputError(f"x has shape {x.shape}; walsh_hadamard takes (n, p) with p a power of two. Pad with zeros.")
    n, p = x.shape
    out = checked_out(out, x, (n, p))
    if is_device_array(x):
        transform_on_device(x, None, p, out)
        return out
    flat, stride = row_memory(x)
    flat_out, stride_out = row_memory(out)

    def work(start: int, stop: int) -> None:
        _transform_rows(flat, stride, flat_out, stride_out, start, stop, aligned(p, x.dtype))

    over_rows(work, n, n * p)
    return out


def sampled_hadamard(factors: tuple[Factor, ...], scale: float, out: Array) -> Array:
    """out = scale · ∏ over one or two factors of (H D x)[rows], elementwise; every x is read once and never copied.

    out: (n, m), unit stride along its rows. Each row depends on its own inputs alone, so the bits are the same for any
    batching of the rows; x may share memory with the same rows of `out`.
    """
    if is_device_array(out):
        return samples_on_device(factors, scale, out)
    n, m = out.shape
    memory, stride = row_memory(out)
    rows = [row_memory(factor.x) for factor in factors]

    def work(start: int, stop: int) -> None:
        # plain tuples: Numba recognises them at once, named ones only after 0.1 ms
        operands = [
            (*x, factor.signs, factor.rows, aligned(factor.size, out.dtype))
            for x, factor in zip(rows, factors, strict=True)
        ]
        loop = _sample_rows if len(operands) == 1 else _sample_product_rows
        loop(*operands, memory, stride, start, stop, out.dtype.type(scale))

    over_rows(work, n, n * (m + sum(factor.size for factor in factors)))
    return out


# --- CPU --------------------------------------------------


def _butterflies(bits: int, within: bool) -> Any:
    """Numba intrinsic: the transform over j of 2**bits vectors source[start + j·stride], and over lanes too if `within`.

    Called as f(source, start, out, out_start, stride) on contiguous 1-d arrays of one dtype; it may work in place.
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
    """scratch[:d] = signs · x[start : start + d], and zeros beyond d."""
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
def _sample_rows(operand, out, stride_out, first, last, scale):
    """Operand: (memory of x, elements between its rows, signs, sampled entries, scratch)."""
    x, stride, signs, rows, scratch = operand
    for r in range(first, last):
        load_signed(x, r * stride, signs, scratch)
        transform_row(scratch, scratch, 0)
        row = out[r * stride_out : r * stride_out + rows.size]
        for j in range(rows.size):
            row[j] = scale * scratch[rows[j]]


@compiled_as_written
def _sample_product_rows(left, right, out, stride_out, first, last, scale):
    """Left, right: operands as in `_sample_rows`."""
    x, stride_x, signs_x, rows_x, a = left
    y, stride_y, signs_y, rows_y, b = right
    for r in range(first, last):
        load_signed(x, r * stride_x, signs_x, a)
        load_signed(y, r * stride_y, signs_y, b)
        transform_row(a, a, 0)
        transform_row(b, b, 0)
        row = out[r * stride_out : r * stride_out + rows_x.size]
        for j in range(rows_x.size):
            row[j] = scale * (a[rows_x[j]] * b[rows_y[j]])
