"""How loops of this package are compiled for the CPU: Numba without the GIL, machine code kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def compiled(function: Callable) -> Any:
    """`function` compiled without the GIL, with fused multiply-adds and sums in any order; cached where a directory can be written.

    The order of a sum is fixed when the code is made, so equal inputs give equal bits in every thread and process, as long as the
    compiled functions that it calls are `inlined`. NaN and infinities keep their meaning.
    """
    return _compile(function, {})


def inlined(function: Callable) -> Any:
    """`compiled`, for functions that compiled loops call: always part of the caller's code.

    A call that is left to the linker finds another copy in the process that compiled it than in one that loads the caller from
    disk; the copies are vectorised and contracted apart, and their results differ in the last bits.
    """
    return _compile(function, {"forceinline": True})


def _compile(function: Callable, more: dict[str, Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, **more}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # a read-only installation and home: compile in each process
        return njit(**options)(function)


def polynomial(single: tuple[float, ...], double: tuple[float, ...]) -> Any:
    """A function f(u) for compiled loops: Σ_k coefficient_k·u^k by Horner's rule, in the type of u.

    single, double: coefficients for float32 and float64 from the constant term on. Written out as LLVM instructions with the
    coefficients in them, because a loop over a tuple inside a loop over an array keeps Numba from using vectors.
    """

    @intrinsic
    def horner(typing_context: Any, u: Any) -> Any:
        coefficients = single if u == types.float32 else double

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            kind = context.get_value_type(u)
            value = ir.Constant(kind, coefficients[-1])
            for coefficient in coefficients[-2::-1]:
                value = builder.fadd(builder.fmul(value, args[0]), ir.Constant(kind, coefficient))
            return value

        return u(u), generate

    return horner
