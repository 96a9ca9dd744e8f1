"""How loops of this package are compiled for the CPU: Numba without the GIL, machine code kept on disk.

Called by the loops of `kernels/` (`compiled`, `inlined`, `polynomial`) and of `features/` (`compiled_as_written`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def compiled(function: Callable) -> Any:
    """`function` compiled without the GIL; the compiler may fuse multiplications with additions and reorder sums.

    The order of a sum is fixed when the code is made, so equal inputs give equal bits in every thread and process, as long as the
    compiled functions that it calls are `inlined`. NaN and infinities keep their meaning. Machine code is kept on disk where a
    directory can be written.
    """
    return _compile(function, fastmath={"contract", "reassoc", "nsz"})


def inlined(function: Callable) -> Any:
    """`compiled`, for functions that compiled loops call: the function becomes part of its caller's code.

    Without that the linker would resolve the call: to one copy of the function in the process that compiled the caller, to another
    in a process that loads the caller from disk. The two copies are vectorised and contracted separately, and their results differ
    in the last bits.
    """
    return _compile(function, fastmath={"contract", "reassoc", "nsz"}, forceinline=True)


def compiled_on_views(function: Callable) -> Any:
    """`compiled`, without Numba's reference counts: for loops over many short views of arrays that the caller holds.

    Counting takes a locked instruction at the beginning and at the end of each view's life, about 10 ns. Without counts the
    function can allocate no arrays.
    """
    return _compile(function, fastmath={"contract", "reassoc", "nsz"}, _nrt=False)


def inlined_on_views(function: Callable) -> Any:
    """`inlined`, for functions that `compiled_on_views` loops call."""
    return _compile(function, fastmath={"contract", "reassoc", "nsz"}, forceinline=True, _nrt=False)


def compiled_as_written(function: Callable) -> Any:
    """`function` compiled without the GIL; every operation is rounded as it is written.

    For loops whose bits may not depend on the width of the vectors that the compiler chooses. Machine code is kept on disk where a
    directory can be written.
    """
    return _compile(function)


def _compile(function: Callable, **options: Any) -> Any:
    """`function` compiled by Numba with these options, its machine code kept on disk where that is possible."""
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # a read-only installation and home: compile in each process
        return njit(nogil=True, **options)(function)


def polynomial(single: tuple[float, ...], double: tuple[float, ...]) -> Any:
    """A function f(u) for compiled loops: Σ_k coefficient_k·u^k by Horner's rule, in the type of u.

    Written out as LLVM instructions with the coefficients in them, because a loop over a tuple inside a loop over an array keeps
    Numba from using vectors.

    Parameters
    ----------
    single : tuple of float
        Coefficients for a float32 u, from the constant term on.
    double : tuple of float
        Coefficients for a float64 u, from the constant term on.
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
