"""BLAS and LAPACK without the interpreter lock: the routines of SciPy's library, called through the pointers that it publishes.

SciPy's own functions hold the lock for the whole call. A worker whose task is in one answers no heartbeat and no question; past
Dask's `worker-ttl` it is restarted and its task begins again, for ever. ctypes lets go of the lock, and the pointers of
`scipy.linalg.cython_blas` and `cython_lapack` lead to the same routines: same bits, same memory. NumPy's functions let go of it,
too, but decompose copies.

Functions have LAPACK's names, without the letter of the dtype. Matrices are float32 or float64 on the host, in Fortran order: hand a
row-major matrix over as its transpose. What is written in place must be contiguous and writeable; what is only read is copied where it
is not. The only file that calls scipy.linalg (`tests/test_floors.py`), for `solvers/`, `matrices/`, `modules/` and `features/`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.linalg import LinAlgError
from scipy.linalg import cython_blas, cython_lapack

_LETTERS = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}
_REALS = {np.dtype(np.float32): ctypes.c_float, np.dtype(np.float64): ctypes.c_double}
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def gemm(alpha: float, a: np.ndarray, b: np.ndarray, c: np.ndarray, *, trans_a: bool = False) -> None:
    """C ← C + α·AB in place, AᵀB when `trans_a`: c (m, n)."""
    dtype, (m, n) = _in_place(c), c.shape
    a, b = _read(a, dtype), _read(b, dtype)
    _require(a.shape == ((b.shape[0], m) if trans_a else (m, b.shape[0])) and b.shape[1] == n, "gemm", a, b, c)
    sizes, operands = (m, n, b.shape[0]), (a, _leading(a), b, _leading(b))
    _blas("gemm", dtype, _flag(trans_a), "N", *sizes, float(alpha), *operands, 1.0, c, _leading(c))


def syrk(alpha: float, a: np.ndarray, beta: float, c: np.ndarray, *, lower: bool = True, trans: bool = False) -> None:
    """One triangle of C ← βC + α·AAᵀ in place; the other triangle is left alone.

    Parameters
    ----------
    alpha : float
        α.
    a : array (n, k), or (k, n) when `trans`
        A.
    beta : float
        β; 0: what C held does not matter.
    c : array (n, n)
        C.
    lower : bool
        Which triangle.
    trans : bool
        AᵀA in place of AAᵀ.
    """
    dtype, n = _in_place(c), c.shape[0]
    a = _read(a, dtype)
    _require(c.shape == (n, n) and a.shape[int(trans)] == n, "syrk", a, c)
    sizes = (n, a.shape[1 - int(trans)])
    _blas("syrk", dtype, _side(lower), _flag(trans), *sizes, float(alpha), a, _leading(a), float(beta), c, _leading(c))


def symv(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A·x (n,) for a symmetric matrix given by its lower triangle."""
    dtype, n = _square(a)
    x, out = np.array(x, dtype), np.zeros(n, dtype)
    _require(x.shape == (n,), "symv", a, x)
    _blas("symv", dtype, "L", n, 1.0, a, _leading(a), x, 1, 0.0, out, 1)
    return out


def trsm(a: np.ndarray, b: np.ndarray, *, right: bool = False, lower: bool = True, trans: bool = False) -> None:
    """B ← A⁻¹B in place, BA⁻¹ when `right`, with Aᵀ for A when `trans`; A is triangular and its other triangle is not read."""
    dtype, (m, n) = _in_place(b), b.shape
    a = _read(a, dtype)
    _require(a.shape == ((n, n) if right else (m, m)), "trsm", a, b)
    where = "R" if right else "L"
    _blas("trsm", dtype, where, _side(lower), _flag(trans), "N", m, n, 1.0, a, _leading(a), b, _leading(b))


def potrf(a: np.ndarray, *, lower: bool = True) -> int:
    """A ← its Cholesky factor, in one triangle and in place; the other one is left alone.

    Returns 0, or the number, from 1, of the first pivot that is not positive.
    """
    dtype, n = _square(a)
    return _lapack("potrf", dtype, _side(lower), n, a, _leading(a))


def potrs(factor: np.ndarray, b: np.ndarray, *, lower: bool = True) -> np.ndarray:
    """The solution (n, k) of A x = b from the triangle that `potrf` left; b is kept."""
    dtype, n = _square(factor)
    x = np.array(b, dtype, order="F")
    _require(x.ndim == 2 and len(x) == n, "potrs", factor, x)
    _lapack("potrs", dtype, _side(lower), n, x.shape[1], factor, _leading(factor), x, _leading(x))
    return x


def potri(factor: np.ndarray, *, lower: bool = True) -> None:
    """A triangle of A⁻¹ from the triangle that `potrf` left, in its place."""
    dtype, n = _square(factor)
    _lapack("potri", dtype, _side(lower), n, factor, _leading(factor))


def cholesky_solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The solution (n, k) of A x = b for a symmetric positive definite A, both kept; LinAlgError where it is not definite."""
    factor = np.array(a, order="F")
    failed = potrf(factor)
    if failed:
        raise LinAlgError(f"the leading minor of order {failed} is not positive definite")
    return potrs(factor, b)


def pstrf(a: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
    """(order, rank): the lower triangle of A ← L, A[order][:, order] ≈ LLᵀ, in place, until pivots are at most `tolerance`."""
    dtype, n = _square(a)
    order, rank = _integers(n), _integers(1)
    _lapack("pstrf", dtype, "L", n, a, _leading(a), order, rank, float(tolerance), np.empty(2 * n, dtype))
    return order.astype(np.int64) - 1, int(rank[0])


def eigh(a: np.ndarray, *, lower: bool = True, driver: str = "evd") -> tuple[np.ndarray, np.ndarray]:
    """(values ascending (n,), vectors (n, n) in columns) of a symmetric matrix given by one triangle; A is destroyed.

    "evd", divide and conquer, returns the vectors in A's memory, beside a workspace of 2 n²; "evr" in memory of their own.
    """
    dtype, n = _square(a)
    values = np.empty(n, dtype)
    if driver == "evd":
        _with_workspace("syevd", dtype, "V", _side(lower), n, a, _leading(a), values)
        return values, a
    vectors, found, support = np.empty((n, n), dtype, order="F"), _integers(1), _integers(2 * n)
    ranges = (0.0, 0.0, 0, 0, 0.0)  # of values, of indices, the tolerance: all values, to rounding
    target = (found, values, vectors, _leading(vectors), support)
    _with_workspace("syevr", dtype, "V", "A", _side(lower), n, a, _leading(a), *ranges, *target)
    return values, vectors


def eigvalsh(a: np.ndarray, b: np.ndarray | None = None, *, lower: bool = True) -> np.ndarray:
    """Eigenvalues, ascending (n,), of a symmetric matrix given by one triangle, or of A v = λB v; both are destroyed.

    LinAlgError where B is not positive definite.
    """
    dtype, n = _square(a)
    values = np.empty(n, dtype)
    if b is None:
        _with_workspace("syevd", dtype, "N", _side(lower), n, a, _leading(a), values)
        return values
    _require(_in_place(b) == dtype and b.shape == a.shape, "sygvd", a, b)
    _with_workspace("sygvd", dtype, 1, "N", _side(lower), n, a, _leading(a), b, _leading(b), values)
    return values


def sytrd(a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(diagonal (n,), off-diagonal (n − 1,), factors (n − 1,)) of A = Q T Qᵀ, from A's lower triangle, where Q's reflectors stay."""
    dtype, n = _square(a)
    diagonal, off_diagonal, tau = np.empty(n, dtype), np.empty(max(0, n - 1), dtype), np.empty(max(0, n - 1), dtype)
    arguments = ("L", n, a, _leading(a), diagonal, off_diagonal, tau)
    work, length = _workspace("sytrd", dtype, *arguments)
    _converged("sytrd", _lapack("sytrd", dtype, *arguments, work, length))
    return diagonal, off_diagonal, tau


def ormqr(reflectors: np.ndarray, tau: np.ndarray, c: np.ndarray, *, trans: bool) -> None:
    """C ← QᵀC or QC in place, Q of the reflectors in the columns of a (m, k) matrix as `geqrf` leaves them. c (m, n)."""
    dtype, (m, n) = _in_place(c), c.shape
    reflectors, tau = _read(reflectors, dtype), np.ascontiguousarray(tau, dtype)
    _require(reflectors.shape == (m, len(tau)), "ormqr", reflectors, tau, c)
    arguments = ("L", _flag(trans), m, n, len(tau), reflectors, _leading(reflectors), tau, c, _leading(c))
    work, length = _workspace("ormqr", dtype, *arguments)
    _lapack("ormqr", dtype, *arguments, work, length)


def sterf(diagonal: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    """Eigenvalues, ascending (n,), of a symmetric tridiagonal matrix; both arrays are kept."""
    values, rest = _tridiagonal(diagonal, off_diagonal)
    _converged("sterf", _lapack("sterf", values.dtype, len(values), values, rest))
    return values


def stemr(diagonal: np.ndarray, off_diagonal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values ascending (n,), vectors (n, n) in columns) of a symmetric tridiagonal matrix; both arrays are kept.

    By relatively robust representations: without a second n² beside the vectors.
    """
    pivots, rest = _tridiagonal(diagonal, off_diagonal)
    n, dtype = len(pivots), pivots.dtype
    rest = np.append(rest, dtype.type(0))  # the last entry is workspace
    values, vectors = np.empty(n, dtype), np.empty((n, n), dtype, order="F")
    found, support, high_accuracy = _integers(1), _integers(2 * n), 1
    ranges = (0.0, 0.0, 0, 0)  # of values and of indices, which "all" does not read
    target = (found, values, vectors, _leading(vectors), n, support, high_accuracy)
    _with_workspace("stemr", dtype, "V", "A", n, pivots, rest, *ranges, *target)
    return values, vectors


def ptsv(diagonal: np.ndarray, off_diagonal: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The solution (n, k) of T x = b, T symmetric tridiagonal, all kept; LinAlgError where T is not positive definite."""
    pivots, rest = _tridiagonal(diagonal, off_diagonal)
    x = np.array(b, pivots.dtype, order="F")
    _require(x.ndim == 2 and len(x) == len(pivots), "ptsv", pivots, x)
    failed = _lapack("ptsv", x.dtype, len(pivots), x.shape[1], pivots, rest, x, _leading(x))
    if failed:
        raise LinAlgError(f"the leading minor of order {failed} is not positive definite")
    return x


# --- arguments ------------------------------------------------------------------------------------------------------


def _in_place(a: np.ndarray) -> np.dtype:
    """The dtype of a matrix that a routine writes; ValueError where its memory is not what the routine expects."""
    if a.dtype not in _LETTERS or a.ndim != 2 or not a.flags.f_contiguous or not a.flags.writeable:
        raise ValueError(f"expected a writeable float32 or float64 matrix in Fortran order, found {_told(a)}")
    return a.dtype


def _square(a: np.ndarray) -> tuple[np.dtype, int]:
    dtype = _in_place(a)
    _require(a.shape[0] == a.shape[1], "a square matrix", a)
    return dtype, len(a)


def _read(a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A matrix that a routine reads: itself where its memory is right, else a copy."""
    out = np.asfortranarray(a, dtype)
    _require(out.ndim == 2, "a matrix", a)
    return out


def _tridiagonal(diagonal: np.ndarray, off_diagonal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies of both, of one dtype, which a routine may destroy."""
    dtype = np.result_type(diagonal, off_diagonal)
    _require(dtype in _LETTERS and diagonal.shape == (len(off_diagonal) + 1,), "a tridiagonal matrix", diagonal)
    return np.array(diagonal, dtype), np.array(off_diagonal, dtype)


def _require(right: bool, what: str, *arrays: np.ndarray) -> None:
    # a routine with a wrong shape would write beyond the memory of its arrays
    if not right:
        raise ValueError(f"{what}: these do not fit: {', '.join(map(_told, arrays))}")


def _told(a: np.ndarray) -> str:
    return f"{a.dtype} {a.shape} with strides {a.strides}"


def _leading(a: np.ndarray) -> int:
    return max(1, a.shape[0])


def _side(lower: bool) -> str:
    return "L" if lower else "U"


def _flag(trans: bool) -> str:
    return "T" if trans else "N"


def _integers(n: int) -> np.ndarray:
    return np.zeros(max(1, n), np.dtype(_integer()))


# --- calls ----------------------------------------------------------------------------------------------------------


def _with_workspace(name: str, dtype: np.dtype, *arguments: Any) -> None:
    """A LAPACK routine whose last arguments are a real and an integer workspace; LinAlgError where it fails."""
    work, sizes = np.empty(1, dtype), _integers(1)
    _lapack(name, dtype, *arguments, work, -1, sizes, -1)
    work, length = _allocated(name, work)
    _converged(name, _lapack(name, dtype, *arguments, work, length, _integers(int(sizes[0])), int(sizes[0])))


def _workspace(name: str, dtype: np.dtype, *arguments: Any) -> tuple[np.ndarray, int]:
    """(the workspace that a LAPACK routine works best in, its length)."""
    work = np.empty(1, dtype)
    _lapack(name, dtype, *arguments, work, -1)
    return _allocated(name, work)


def _allocated(name: str, answer: np.ndarray) -> tuple[np.ndarray, int]:
    """(array, length) of the length that a routine answered: a float32 one is the next number, since it may be rounded down."""
    length = int(answer[0] if answer.dtype == np.float64 else np.nextafter(answer[0], np.float32(np.inf)))
    most = int(np.iinfo(np.dtype(_integer())).max)
    if length > most:
        raise LinAlgError(f"{name} needs a workspace of {length} numbers, but this LAPACK counts to {most}")
    return np.empty(max(1, length), answer.dtype), max(1, length)


def _converged(name: str, info: int) -> None:
    if info:
        raise LinAlgError(f"{name} failed (LAPACK info {info}): the matrix is not definite, or holds no finite numbers")


def _lapack(name: str, dtype: np.dtype, *arguments: Any) -> int:
    """Call a LAPACK routine, whose last argument `info` is added here and returned; ValueError where it refuses an argument."""
    info = _integer()(0)
    _call(cython_lapack, name, dtype, *arguments, info)
    if info.value < 0:
        raise ValueError(f"LAPACK's {name} refuses its argument {-info.value}")
    return int(info.value)


def _blas(name: str, dtype: np.dtype, *arguments: Any) -> None:
    _call(cython_blas, name, dtype, *arguments)


def _call(library: Any, name: str, dtype: np.dtype, *arguments: Any) -> None:
    """Call a routine with Fortran's convention: every argument by its address."""
    integer, real = _integer(), _REALS[dtype]
    pointers: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            pointers.append(argument.ctypes.data)
        elif isinstance(argument, str):
            pointers.append(ctypes.byref(ctypes.c_char(argument.encode())))
        elif isinstance(argument, int):
            pointers.append(ctypes.byref(integer(argument)))
        elif isinstance(argument, float):
            pointers.append(ctypes.byref(real(argument)))
        else:
            pointers.append(ctypes.byref(argument))
    _routine(library, _LETTERS[dtype] + name, len(pointers))(*pointers)


@cache
def _routine(library: Any, name: str, count: int) -> Any:
    """The routine as a function of `count` addresses, which lets go of the interpreter lock while it runs."""
    capsule = library.__pyx_capi__[name]
    pointer = _capsule_pointer(capsule, _capsule_name(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(pointer)


@cache
def _integer() -> Any:
    """The C type of the library's integers: 32 bits, or 64 in a build with large indices."""
    numbers = [ctypes.c_int64(-1) for _ in range(3)]
    _routine(cython_lapack, "ilaver", 3)(*map(ctypes.byref, numbers))
    # a routine of 32-bit integers leaves the other half of −1 as it was
    return ctypes.c_int64 if 0 <= numbers[0].value < 2**31 else ctypes.c_int32
