"""The numerics of one tile of a blocked Cholesky factorisation A = LLᵀ, and of the substitutions with L.

A tile (i, j) of the lower triangle starts as A_ij, loses L_ik·L_jkᵀ for every k < j and ends as L_ij: the factor of what is
left on the diagonal, a triangular solve with L_jj below it. All in place, at the rate of GEMM: row-major tiles are handed
to BLAS and LAPACK as their transposes, so nothing is copied. Golub & Van Loan, Matrix Computations, 4th ed., §4.2.9.

Arrays in, arrays out, NumPy or CuPy. Which tiles are computed when is decided in `matrices.factorize`; substitution is in
`matrices.factor`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ntkdask import lapack
from ntkdask.arrays import Array, is_device_array, namespace, to_host

PIVOT_ROUNDINGS = 8.0
"""Pivots below this many roundings, times √n, of their diagonal entry are noise: a duplicate row leaves such a one."""


def ridge_tile(
    tile: Array, rows: Array | None, columns: Array | None, dtype: Any, alpha: float, on_diagonal: bool
) -> Array:
    """One tile of S K S + αI: s_i·K_ij·s_j, with α added on the diagonal of a diagonal tile.

    Parameters
    ----------
    tile : array (p, q), float32 or float64
        The tile of K.
    rows, columns : array (p,) and (q,), optional
        The scales s of its rows and columns; None for 1.
    dtype : dtype
        Dtype of the result.
    alpha : float
        α.
    on_diagonal : bool
        Whether the tile is a diagonal tile of K.

    Returns
    -------
    array (p, q)
        A new row-major array.
    """
    xp = namespace(tile)
    out = xp.array(tile, dtype=dtype, order="C", copy=True)
    if rows is not None and columns is not None:
        out *= xp.asarray(rows, dtype=out.dtype)[:, None]
        out *= xp.asarray(columns, dtype=out.dtype)[None, :]
    if on_diagonal:
        out.reshape(-1)[:: out.shape[1] + 1] += out.dtype.type(alpha)
    return out


def subtract_product(c: Array, a: Array, b: Array) -> None:
    """C ← C − A·Bᵀ in place: one GEMM. c (p, q), a (p, r), b (q, r), row-major and of one dtype."""
    if is_device_array(c):
        c -= a @ b.T
        return
    lapack.gemm(-1.0, b.T, a.T, c.T, trans_a=True)


def subtract_square(c: Array, a: Array) -> None:
    """The lower triangle of C ← C − A·Aᵀ in place: one SYRK, half a GEMM. c (p, p), a (p, r).

    What lies above the diagonal is undefined afterwards.
    """
    if is_device_array(c):
        c -= a @ a.T
        return
    lapack.syrk(-1.0, a.T, 1.0, c.T, lower=False, trans=True)


def factor_lower(c: Array) -> int:
    """C ← L with LLᵀ = C in place, from its lower triangle; zeros above. c (p, p), row-major.

    Returns how many leading pivots were positive: p when all were. With less C is not positive definite, and what c then holds is
    of no use.
    """
    if is_device_array(c):
        xp = namespace(c)
        c[...] = xp.linalg.cholesky(c)
        # cuSOLVER stops at the pivot that failed and leaves it there, as it is
        good = to_host(xp.diagonal(c)) > 0
        return len(good) if good.all() else int(np.argmin(good))
    failed = lapack.potrf(c.T, lower=False)
    for i, row in enumerate(c):
        row[i + 1 :] = 0
    return failed - 1 if failed else len(c)


def solve_right(c: Array, factor: Array) -> None:
    """C ← C·L⁻ᵀ in place: the tile below a diagonal one. c (p, q), factor (q, q) lower triangular, row-major."""
    if is_device_array(c):
        c[...] = _device_solve(factor, c.T, False).T
        return
    lapack.trsm(factor.T, c.T, lower=False, trans=True)


def solve_lower(factor: Array, b: Array, transposed: bool = False) -> None:
    """B ← L⁻¹B, or L⁻ᵀB when `transposed`, in place. factor (p, p) lower triangular, b (p, k), row-major, of one dtype."""
    if is_device_array(b):
        b[...] = _device_solve(factor, b, transposed)
        return
    lapack.trsm(factor.T, b.T, right=True, lower=False, trans=transposed)


def pivot_floor(n: int, dtype: Any, matrix_dtype: Any) -> float:
    """What rounding leaves of a zero pivot, relative to its diagonal entry: 8·√n·ε of the factor's dtype, at least the matrix's ε.

    A pivot is the diagonal entry minus a sum of up to n squares. The worst case is n·ε (Higham 2002, Theorem 10.3); errors
    of both signs add up to about √n·ε. A diagonal entry itself is known to the ε of the dtype that it was stored in.
    """
    summed = PIVOT_ROUNDINGS * math.sqrt(n) * float(np.finfo(dtype).eps)
    return max(summed, float(np.finfo(matrix_dtype).eps))


def first_lost_pivot(factor: Array, diagonal: Array, floor: float) -> int | None:
    """The first row whose pivot L_ii² is not above floor·A_ii, so that rounding alone decided its sign; None when there is none.

    factor (p, p) from `factor_lower`; diagonal (p,): A_ii before anything was subtracted.
    """
    xp = namespace(factor)
    lost = to_host(~(xp.diagonal(factor) ** 2 > floor * diagonal))
    return int(np.argmax(lost)) if lost.any() else None


def smallest_eigenvalue(c: Array) -> float:
    """λ_min of a symmetric matrix given by its lower triangle, in float64; about 4/3·p³ flops, on the host.

    For a Schur complement: adding more than −λ_min to the diagonal of A makes that complement positive definite, since
    the complement of A + δI is at least that of A plus δI.
    """
    return float(lapack.eigvalsh(to_host(c).astype(np.float64, order="C").T, lower=False)[0])


def _device_solve(factor: Array, b: Array, transposed: bool) -> Array:
    from cupyx.scipy.linalg import solve_triangular

    return solve_triangular(factor, b, trans=int(transposed), lower=True, check_finite=False)
