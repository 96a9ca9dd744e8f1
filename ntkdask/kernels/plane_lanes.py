"""Vectors of entries of flat arrays as Numba intrinsics, for rows of images: not knowing lengths, a compiler walks those one by one.

Arrays are C-ordered and 1-d, float32 or float64; nothing is checked. Called by compiled loops over slabs.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba import types

intrinsic: Any = numba.extending.intrinsic  # its type forgets that compiled code calls with other arguments than it

LANES = 16
"""Entries that are walked at once: a vector of float32, two of float64, more where vectors are shorter."""


def _pointer(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, lanes: int) -> Any:
    """Of `lanes` entries from `first` on."""
    data = context.make_array(array_type)(context, builder, array).data
    kind = ir.VectorType(context.get_value_type(array_type.dtype), lanes)
    return builder.bitcast(builder.gep(data, [first]), kind.as_pointer())


def _load(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, lanes: int) -> Any:
    pointer = _pointer(context, builder, array_type, array, first, lanes)
    return builder.load(pointer, align=array_type.dtype.bitwidth // 8)


def _add_to(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, value: Any) -> None:
    lanes = value.type.count
    pointer = _pointer(context, builder, array_type, array, first, lanes)
    align = array_type.dtype.bitwidth // 8
    builder.store(builder.fadd(builder.load(pointer, align=align), value), pointer, align=align)


@intrinsic
def add_lanes(typing_context: Any, out: Any, first: Any, a: Any, start: Any) -> Any:
    """out[first + i] += a[start + i], i < LANES."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _add_to(context, builder, out, args[0], args[1], _load(context, builder, a, args[2], args[3], LANES))
        return context.get_dummy_value()

    return types.void(out, first, a, start), generate


@intrinsic
def add_two_lanes(typing_context: Any, out: Any, first: Any, a: Any, start: Any, second: Any) -> Any:
    """out[first + i] += a[start + i] + a[second + i], i < LANES."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        one, two = (_load(context, builder, a, args[2], place, LANES) for place in args[3:])
        _add_to(context, builder, out, args[0], args[1], builder.fadd(one, two))
        return context.get_dummy_value()

    return types.void(out, first, a, start, second), generate


@intrinsic
def sum_two_lanes(typing_context: Any, out: Any, first: Any, a: Any, start: Any, second: Any) -> Any:
    """out[first + i] = a[start + i] + a[second + i], i < LANES."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        one, two = (_load(context, builder, a, args[2], place, LANES) for place in args[3:])
        pointer = _pointer(context, builder, out, args[0], args[1], LANES)
        builder.store(builder.fadd(one, two), pointer, align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(out, first, a, start, second), generate


@intrinsic
def add_every_second(typing_context: Any, out: Any, first: Any, a: Any, start: Any) -> Any:
    """even[i] = a[start + 2i], odd[i] = a[start + 2i + 1]; out[first + i] += even[i] + odd[i], i < LANES/2, as float64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        even, odd = _halves(context, builder, a, args[2], args[3], out)
        _add_to(context, builder, out, args[0], args[1], builder.fadd(even, odd))
        return context.get_dummy_value()

    return types.void(out, first, a, start), generate


@intrinsic
def add_apart(typing_context: Any, out: Any, first: Any, second: Any, a: Any, start: Any) -> Any:
    """out[first + i] += a[start + 2i], out[second + i] += a[start + 2i + 1], i < LANES/2, as float64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        even, odd = _halves(context, builder, a, args[3], args[4], out)
        _add_to(context, builder, out, args[0], args[1], even)
        _add_to(context, builder, out, args[0], args[2], odd)
        return context.get_dummy_value()

    return types.void(out, first, second, a, start), generate


def _halves(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, start: Any, out: Any) -> tuple[Any, Any]:
    """Every second of LANES entries from `start` on and those between, in the dtype of `out`."""
    value = _load(context, builder, array_type, array, start, LANES)
    wide = ir.VectorType(context.get_value_type(out.dtype), LANES // 2)
    found = []
    for parity in range(2):
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES // 2), list(range(parity, LANES, 2)))
        half = builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)
        if out.dtype.bitwidth != array_type.dtype.bitwidth:
            half = (builder.fpext if out.dtype.bitwidth > array_type.dtype.bitwidth else builder.fptrunc)(half, wide)
        found.append(half)
    return found[0], found[1]
