"""Kernel ridge regression on a dense K for one alpha, by LAPACK's Cholesky factorisation in K's own memory.

n³/3 flops where an eigendecomposition takes about 9 n³: cheaper for up to some ten alphas even with the scores, whose inverse
takes another 2/3 n³. The problem, with weights and intercept, is that of `dual_problem`. NumPy or CuPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import lapack
from ntkdask.arrays import Array, is_device_array, namespace, require_float, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.solvers.cholesky import pivot_floor, solve_lower
from ntkdask.solvers.dense import PANEL, not_definite, scaled_kernel
from ntkdask.solvers.dual_problem import DualProblem, DualSolution


def cholesky_bytes(n: int, dtype: str = "float64") -> int:
    """Peak bytes of `dual_cholesky`: one n² of the dtype in which it works.

    A copy (overwrite=False, or a cast) adds K's own bytes.
    """
    return np.dtype(dtype).itemsize * n * n + 8 * (3 * PANEL * n + 16 * n)


def dual_cholesky(
    kernel: Array,
    targets: np.ndarray,
    alpha: float,
    weights: np.ndarray | None = None,
    fit_intercept: bool = True,
    *,
    dtype: str = "float64",
    overwrite: bool = False,
) -> DualSolution:
    """The fit at one alpha; raises what `DualCholesky.factorise` raises.

    Parameters
    ----------
    kernel : array (n, n), float32 or float64
        K, symmetric, both triangles.
    targets : array (n, k) or (n,)
        Y.
    alpha : float
        α >= 0, added to the diagonal of S K S.
    weights : array (n,), optional
        At least 0; None: all 1.
    fit_intercept : bool
        Whether an intercept is fitted.
    dtype : {"float64", "float32"}
        The dtype of the factorisation.
    overwrite : bool
        Whether a kernel of `dtype` may be destroyed.

    Returns
    -------
    DualSolution
        Coefficients and intercept.
    """
    return DualCholesky.factorise(
        kernel, targets, alpha, weights, fit_intercept, dtype=dtype, overwrite=overwrite
    ).solution()


@dataclass(frozen=True)
class DualCholesky:
    """LLᵀ = S K S + αI over the p rows of positive weight.

    factor: (p, p), lower, row-major. solved: (p, k + 1), C⁻¹S[Y, 1], without the last column when there is no intercept.
    """

    problem: DualProblem
    alpha: float
    factor: Array
    solved: np.ndarray

    @classmethod
    def factorise(
        cls,
        kernel: Array,
        targets: np.ndarray,
        alpha: float,
        weights: np.ndarray | None = None,
        fit_intercept: bool = True,
        *,
        dtype: str = "float64",
        overwrite: bool = False,
        data_dtype: Any = None,
    ) -> DualCholesky:
        """Factorise in place: n³/3 flops, memory `cholesky_bytes`; rows of weight 0 are left out first.

        Parameters
        ----------
        kernel : array (n, n), float32 or float64
            K, symmetric, both triangles.
        targets : array (n, k) or (n,)
            Y.
        alpha : float
            α >= 0, added to the diagonal of S K S.
        weights : array (n,), optional
            At least 0; None: all 1.
        fit_intercept : bool
            Whether an intercept is fitted.
        dtype : {"float64", "float32"}
            The dtype of the factorisation. "float32" halves memory and time; its solutions are right to about 1e-7·λ_max/α.
        overwrite : bool
            Whether a kernel of `dtype` may be destroyed.
        data_dtype : dtype, optional
            The dtype in which K was computed, where that is coarser than its own; its rounding decides what is noise.

        Returns
        -------
        DualCholesky
            The factor and the solved right-hand sides.

        Raises
        ------
        InputError
            When S K S + αI is not positive definite to rounding: by how much, and which alpha to use.
        """
        problem = DualProblem.of(targets, weights, fit_intercept, rows=len(kernel))
        given = np.dtype(data_dtype or require_float(kernel, "kernel").dtype)
        if not alpha >= 0:
            raise not_definite(alpha, 0.0, 0.0, float(np.finfo(given).eps))
        matrix = scaled_kernel(kernel, problem, dtype, overwrite)
        _factor_in_place(matrix, alpha, given)
        right = to_device(
            np.array(problem.right_hand_sides()[problem.kept], dtype=dtype, order="C"), is_device_array(matrix)
        )
        solve_lower(matrix, right)
        solve_lower(matrix, right, transposed=True)
        return cls(problem, alpha, matrix, to_host(right).astype(np.float64))

    def solution(self) -> DualSolution:
        """The fit."""
        solved = np.zeros((self.problem.scale.size, self.solved.shape[1]))
        solved[self.problem.kept] = self.solved
        return self.problem.solution(solved, self.alpha)

    def scores(self) -> tuple[float, float]:
        """(GCV, mean squared leave-one-out error), as `DualEigh.gcv` and `.leave_one_out`; the factor is destroyed.

        Both need diag(C⁻¹): 2/3 n³ flops in place. (M⁻¹)_ii = (C⁻¹)_ii − (C⁻¹S1)_i²/(1ᵀSC⁻¹S1).
        """
        problem = self.problem
        inverse = _inverse_diagonal(self.factor)
        kept = DualProblem(problem.scale[problem.kept], problem.targets[problem.kept], problem.fit_intercept)
        gcv = kept.gcv(self.solved, float(inverse.sum()), self.alpha)
        beta, _ = kept.beta(self.solved)
        if problem.fit_intercept:
            ones = self.solved[:, -1]
            inverse = inverse - ones**2 / (kept.scale @ ones)
        error = beta / np.maximum(inverse, np.finfo(float).tiny)[:, None]
        return gcv, float((error**2).sum() / (beta.shape[1] * np.sum(kept.scale**2)))


def _factor_in_place(matrix: Array, alpha: float, given: np.dtype) -> None:
    """C = matrix + αI ← L in its lower triangle; the upper triangle keeps C, so that a failure can say by how much."""
    floor = pivot_floor(matrix.shape[0], matrix.dtype, given)
    before = to_host(namespace(matrix).diagonal(matrix)).copy()
    _set_diagonal(matrix, before + alpha)
    if is_device_array(matrix):
        factor = namespace(matrix).linalg.cholesky(matrix)
        pivots = to_host(namespace(matrix).diagonal(factor))
        lost = not (pivots**2 > floor * (before + alpha)).all()
    else:
        # its transpose's upper triangle is the row-major lower one; the other is left alone
        failed = lapack.potrf(matrix.T, lower=False)
        lost = failed > 0 or not (np.diagonal(matrix) ** 2 > floor * (before + alpha)).all()
    if lost:
        _set_diagonal(matrix, before)
        raise _failure(matrix, alpha, max(float(np.finfo(d).eps) for d in (matrix.dtype, given)))
    if is_device_array(matrix):
        matrix[...] = factor


def _failure(matrix: Array, alpha: float, eps: float) -> InputError:
    on_device = is_device_array(matrix)
    values = to_host(namespace(matrix).linalg.eigvalsh(matrix, UPLO="U")) if on_device else lapack.eigvalsh(matrix.T)
    lowest, highest = float(values[0]), float(values[-1])
    if alpha + lowest > -matrix.shape[0] * float(np.finfo(float).eps) * highest:
        return InputError(
            f"kernel ridge: the kernel matrix plus alpha={alpha:g} is singular to rounding: its eigenvalues reach from "
            f"{lowest:.3g} to {highest:.3g} (duplicate rows do that). Use alpha={10 * eps * highest:.1g} or more, "
            'or solver="eigh", which takes the solution of minimum norm where there is one.'
        )
    return not_definite(alpha, lowest, highest, eps)


def _set_diagonal(matrix: Array, values: np.ndarray) -> None:
    namespace(matrix).einsum("ii->i", matrix)[...] = to_device(values.astype(matrix.dtype), is_device_array(matrix))


def _inverse_diagonal(factor: Array) -> np.ndarray:
    """diag((LLᵀ)⁻¹) (n,) float64; the factor is destroyed."""
    if is_device_array(factor):
        xp = namespace(factor)
        inverse = xp.eye(factor.shape[0], dtype=factor.dtype)
        solve_lower(factor, inverse)
        return to_host(xp.einsum("ij,ij->j", inverse, inverse)).astype(np.float64)
    lapack.potri(factor.T, lower=False)
    return np.diagonal(factor).astype(np.float64)
