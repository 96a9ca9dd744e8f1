"""A dense kernel matrix in place: rows left out, scaled by √w, reflected, decomposed, without a second n² beside it.

What the dense solvers of the dual problem (`dual`, `dual_cholesky`) share. Symmetric matrices with both triangles, row-major on
the host; NumPy or CuPy.
"""

from __future__ import annotations

import numpy as np

from ntkdask import lapack
from ntkdask.arrays import Array, is_device_array, namespace, require_float, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.solvers.dual_problem import DualProblem

PANEL = 256
"""Rows that an update in place of an (n, n) matrix handles at a time."""

EVD_ROWS = 32766
"""Above it the workspace of LAPACK's divide and conquer, 1 + 6n + 2n² numbers, overflows its 32-bit count."""


def scaled_kernel(kernel: Array, problem: DualProblem, dtype: str, overwrite: bool) -> Array:
    """S K S of the rows with positive weight, (p, p) row-major of `dtype`; in K's own memory when `overwrite` is set and it fits.

    kernel: (n, n), float32 or float64. InputError for another shape, another dtype, and NaN in the rows with positive weight.
    """
    if dtype not in ("float32", "float64"):
        raise InputError(f"kernel ridge: dtype is {dtype!r}; matrices are decomposed in 'float64' or 'float32'.")
    kernel = require_float(kernel, "kernel")
    n = problem.scale.size
    if kernel.shape != (n, n):
        raise InputError(f"kernel ridge: the kernel matrix has shape {kernel.shape}; expected ({n}, {n}), symmetric.")
    if kernel.flags.f_contiguous:
        kernel = kernel.T  # symmetric: the same matrix, row-major
    if not overwrite or kernel.dtype != dtype or not kernel.flags.c_contiguous or not kernel.flags.writeable:
        kernel = namespace(kernel).array(kernel, dtype=dtype, order="C")
    kept = problem.kept
    matrix = kernel if kept.size == n else keep_rows(kernel, kept)
    scale = to_device(problem.scale[kept].astype(dtype), is_device_array(kernel))
    weighted = bool((problem.scale[kept] != 1).any())
    for start in range(0, kept.size, PANEL):
        panel = matrix[start : start + PANEL]
        if weighted:
            panel *= scale
            panel *= scale[start : start + PANEL, None]
        bad = np.flatnonzero(to_host(~namespace(panel).isfinite(panel).all(axis=1)))
        if bad.size:
            raise InputError(
                f"kernel ridge: row {kept[start + bad[0]]} of the kernel matrix has NaN or infinity. "
                "Check its inputs, or give the row weight 0."
            )
    return matrix


def keep_rows(matrix: Array, kept: np.ndarray) -> Array:
    """The (p, p) matrix of the rows and columns `kept` (ascending), contiguous; on the host in the memory of the (n, n) matrix."""
    p = kept.size
    if is_device_array(matrix):
        chosen = to_device(kept)
        return matrix[chosen[:, None], chosen]
    flat = matrix.reshape(-1)
    everything_left = p and kept[-1] == p - 1
    for i, row in enumerate(kept):
        # row i is written at or before where row kept[i] ≥ i was read, so nothing unread is lost
        flat[i * p : (i + 1) * p] = matrix[row, :p].copy() if everything_left else matrix[row, kept]
    return flat[: p * p].reshape(p, p)


def reflector(direction: np.ndarray) -> np.ndarray:
    """v (n,) with (I − 2vvᵀ/vᵀv)·direction = −‖direction‖·e_n; the last entry of `direction` must be positive."""
    out = direction.copy()
    out[-1] += np.linalg.norm(direction)
    return out


def reflect(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(I − 2vvᵀ/vᵀv)·x, x (n, k)."""
    return x - np.outer(v, (2.0 / (v @ v)) * (v @ x))


def reflect_both_sides(matrix: Array, v: np.ndarray) -> None:
    """H A H in place, H = I − 2vvᵀ/vᵀv: A − vwᵀ − wvᵀ, w = p − ½β(pᵀv)·v, p = βAv, β = 2/vᵀv. Golub & Van Loan §8.3.1."""
    beta = 2.0 / (v @ v)
    p = beta * times(matrix, v[:, None])[:, 0]
    w = p - 0.5 * beta * (p @ v) * v
    left = to_device(np.stack([v, w], axis=1).astype(matrix.dtype), is_device_array(matrix))
    right = left[:, ::-1]
    for start in range(0, len(v), PANEL):
        rows = slice(start, start + PANEL)
        matrix[rows] -= left[rows] @ right.T


def eigenpairs(matrix: Array) -> tuple[np.ndarray, Array]:
    """(values ascending (p,) float64 on the host, vectors (p, p)) of a symmetric matrix; on the host in the matrix's memory."""
    if matrix.shape[0] == 0:
        return np.empty(0), matrix
    if is_device_array(matrix):
        values, vectors = namespace(matrix).linalg.eigh(matrix)
        return to_host(values).astype(np.float64), vectors
    # evr is slower and a little less orthogonal, but works in 2 n² and has no such limit
    driver = "evd" if matrix.shape[0] <= EVD_ROWS else "evr"
    values, vectors = lapack.eigh(matrix.T, driver=driver)
    return values.astype(np.float64), vectors


def times(matrix: Array, x: np.ndarray) -> np.ndarray:
    """matrix·x as float64 on the host, multiplied in the matrix's own dtype: x (n, k) is cast, never the matrix."""
    return to_host(matrix @ to_device(x.astype(matrix.dtype), is_device_array(matrix))).astype(np.float64)


def take_rows(matrix: Array, rows: np.ndarray) -> np.ndarray:
    """(len(rows), m) float64 on the host: some rows of a matrix (n, m)."""
    return to_host(matrix[namespace(matrix).asarray(rows)]).astype(np.float64)


def not_definite(alpha: float, lowest: float, highest: float, eps: float) -> InputError:
    """The error for S K S + αI that is not positive definite: by how much, and which alpha would do.

    eps: rounding of the dtype in which K was given. Only an eigenvalue beyond that rounding is called a fault of the kernel.
    """
    if alpha < 0:
        return InputError(f"kernel ridge: alpha is {alpha:g}; it must be at least 0.")
    safe = max(-2.0 * lowest, 10.0 * eps * highest)
    kind = "float32" if eps > 1e-10 else "float64"
    cause = (
        f"{kind} kernels have such eigenvalues from rounding"
        if -lowest <= 1e3 * eps * highest
        else "far more than rounding: is it a kernel matrix (symmetric, positive semidefinite)?"
    )
    return InputError(
        f"kernel ridge: the kernel matrix plus alpha={alpha:g} is not positive definite: its smallest eigenvalue is {lowest:.3g} "
        f"(the largest {highest:.3g}; {cause}). alpha must exceed {max(-lowest, 0.0):.2g}; use alpha={safe:.1g} or more."
    )
