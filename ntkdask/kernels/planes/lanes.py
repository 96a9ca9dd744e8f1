"""Sums, copies and exchanges of rows of flat arrays, as Numba intrinsics that work on vectors of entries.

A compiler that does not know the lengths of short rows would walk them entry by entry. Arrays are C-ordered and 1-d, float32 or
float64; nothing is checked. Called by compiled loops over slabs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir
from numba import types

intrinsic: Any = numba.extending.intrinsic  # its type does not know that compiled code leaves out the typing context

LANES = 16
"""Most entries that one step handles: a vector of float32, two of float64, more where the processor's vectors are shorter."""


def _pointer(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, lanes: int) -> Any:
    """A pointer to the vector of `lanes` entries from `first` on."""
    data = context.make_array(array_type)(context, builder, array).data
    kind = ir.VectorType(context.get_value_type(array_type.dtype), lanes)
    return builder.bitcast(builder.gep(data, [first]), kind.as_pointer())


def _load(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, lanes: int) -> Any:
    """The vector of `lanes` entries of an array from `first` on."""
    pointer = _pointer(context, builder, array_type, array, first, lanes)
    return builder.load(pointer, align=array_type.dtype.bitwidth // 8)


def _store(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, value: Any) -> None:
    """Write a vector to the entries of an array from `first` on."""
    pointer = _pointer(context, builder, array_type, array, first, value.type.count)
    builder.store(value, pointer, align=array_type.dtype.bitwidth // 8)


def _add_to(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, first: Any, value: Any) -> None:
    """Add a vector to the entries of an array from `first` on."""
    before = _load(context, builder, array_type, array, first, value.type.count)
    _store(context, builder, array_type, array, first, builder.fadd(before, value))


def _walk(builder: ir.IRBuilder, count: Any, entries: Callable[[Any, int], None]) -> None:
    """Generate entries(i, lanes) for all i < count: with LANES at once, then a quarter of that, then one by one.

    The compiler is told to leave the loops as they are. Unrolled or vectorised once more they gain nothing in rows as short as an
    image's, and a stage, into which they are inlined in many places, takes longer to compile.
    """
    i: Any = ir.Constant(count.type, 0)
    for lanes in (LANES, LANES // 4, 1):
        before, head = builder.block, builder.append_basic_block("lanes")
        body, after = builder.append_basic_block("lanes.body"), builder.append_basic_block("lanes.end")
        builder.branch(head)
        builder.position_at_end(head)
        at = builder.phi(count.type)
        at.add_incoming(i, before)
        following = builder.add(at, ir.Constant(count.type, lanes))
        builder.cbranch(builder.icmp_signed("<=", following, count), body, after)
        builder.position_at_end(body)
        entries(at, lanes)
        at.add_incoming(following, builder.block)
        builder.branch(head).set_metadata("llvm.loop", _left_alone(builder.module))
        builder.position_at_end(after)
        i = at


def _left_alone(module: ir.Module) -> Any:
    """The metadata of a loop that is neither unrolled nor vectorised. Its first operand is itself, by which LLVM knows it."""
    no = ir.Constant(ir.IntType(1), 0)
    unroll = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    vectorise = module.add_metadata([ir.MetaDataString(module, "llvm.loop.vectorize.enable"), no])
    loop = module.add_metadata([unroll, vectorise])
    loop.operands = (loop, unroll, vectorise)
    return loop


def _sums_of_rows(put: Callable[..., None]) -> Callable[..., Any]:
    """The code of (out, first, a, start, …, count): put(out[first + i], Σ a[start + i]) for i < count, the sum over all starts."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        out, first, a, (*starts, count) = args[0], args[1], args[2], args[3:]

        def entries(i: Any, lanes: int) -> None:
            rows = [_load(context, builder, signature.args[2], a, builder.add(start, i), lanes) for start in starts]
            put(context, builder, signature.args[0], out, builder.add(first, i), functools.reduce(builder.fadd, rows))

        _walk(builder, count, entries)
        return context.get_dummy_value()

    return generate


@intrinsic
def add_row(typing_context: Any, out: Any, first: Any, a: Any, start: Any, count: Any) -> Any:
    """out[first + i] += a[start + i] for i < count.

    Parameters
    ----------
    typing_context : object
        Numba's own.
    out, a : array
        Flat arrays.
    first, start : int
        Where the rows begin in `out` and in `a`.
    count : int
        Entries of a row.
    """
    return types.void(out, types.intp, a, types.intp, types.intp), _sums_of_rows(_add_to)


@intrinsic
def copy_row(typing_context: Any, out: Any, first: Any, a: Any, start: Any, count: Any) -> Any:
    """out[first + i] = a[start + i] for i < count.

    Parameters
    ----------
    typing_context : object
        Numba's own.
    out, a : array
        Flat arrays.
    first, start : int
        Where the rows begin in `out` and in `a`.
    count : int
        Entries of a row.
    """
    return types.void(out, types.intp, a, types.intp, types.intp), _sums_of_rows(_store)


@intrinsic
def add_two_rows(typing_context: Any, out: Any, first: Any, a: Any, start: Any, second: Any, count: Any) -> Any:
    """out[first + i] += a[start + i] + a[second + i] for i < count.

    Parameters
    ----------
    typing_context : object
        Numba's own.
    out, a : array
        Flat arrays.
    first, start, second : int
        Where the row begins in `out`, and where the two rows begin in `a`.
    count : int
        Entries of a row.
    """
    return types.void(out, types.intp, a, types.intp, types.intp, types.intp), _sums_of_rows(_add_to)


@intrinsic
def sum_two_rows(typing_context: Any, out: Any, first: Any, a: Any, start: Any, second: Any, count: Any) -> Any:
    """out[first + i] = a[start + i] + a[second + i] for i < count.

    Parameters
    ----------
    typing_context : object
        Numba's own.
    out, a : array
        Flat arrays.
    first, start, second : int
        Where the row begins in `out`, and where the two rows begin in `a`.
    count : int
        Entries of a row.
    """
    return types.void(out, types.intp, a, types.intp, types.intp, types.intp), _sums_of_rows(_store)


@intrinsic
def exchange_rows(typing_context: Any, a: Any, b: Any, count: Any) -> Any:
    """a[i], b[i] = b[i], a[i] for i < count."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        def entries(i: Any, lanes: int) -> None:
            one, two = (
                _load(context, builder, kind, array, i, lanes) for kind, array in zip((a, b), args, strict=False)
            )
            _store(context, builder, a, args[0], i, two)
            _store(context, builder, b, args[1], i, one)

        _walk(builder, args[2], entries)
        return context.get_dummy_value()

    return types.void(a, b, types.intp), generate


@intrinsic
def add_every_second(typing_context: Any, out: Any, first: Any, a: Any, start: Any) -> Any:
    """out[first + i] += a[start + 2i] + a[start + 2i + 1] for i < LANES/2, summed in the dtype of `out`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        even, odd = _halves(context, builder, a, args[2], args[3], out)
        _add_to(context, builder, out, args[0], args[1], builder.fadd(even, odd))
        return context.get_dummy_value()

    return types.void(out, first, a, start), generate


@intrinsic
def add_apart(typing_context: Any, out: Any, first: Any, second: Any, a: Any, start: Any) -> Any:
    """out[first + i] += a[start + 2i] and out[second + i] += a[start + 2i + 1] for i < LANES/2, summed in the dtype of `out`.

    Parameters
    ----------
    typing_context : object
        Numba's own.
    out, a : array
        Flat arrays.
    first, second : int
        Where the sums of the even and of the odd entries begin in `out`.
    start : int
        Where LANES entries begin in `a`.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        even, odd = _halves(context, builder, a, args[3], args[4], out)
        _add_to(context, builder, out, args[0], args[1], even)
        _add_to(context, builder, out, args[0], args[2], odd)
        return context.get_dummy_value()

    return types.void(out, first, second, a, start), generate


def _halves(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, start: Any, out: Any) -> tuple[Any, Any]:
    """The even and the odd ones of LANES entries from `start` on, in the dtype of `out`."""
    value = _load(context, builder, array_type, array, start, LANES)
    wide = ir.VectorType(context.get_value_type(out.dtype), LANES // 2)
    halves = []
    for parity in range(2):
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES // 2), list(range(parity, LANES, 2)))
        half = builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)
        if out.dtype.bitwidth != array_type.dtype.bitwidth:
            half = (builder.fpext if out.dtype.bitwidth > array_type.dtype.bitwidth else builder.fptrunc)(half, wide)
        halves.append(half)
    return halves[0], halves[1]
