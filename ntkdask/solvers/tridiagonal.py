"""Ridge for every alpha from a tridiagonal reduction G = Q T Qᵀ: no eigenvectors are formed.

The reduction is 4/3 m³ flops where a full eigendecomposition takes about 9 m³ (Golub & Van Loan 2013, §8.3); after it every
alpha is a tridiagonal solve, O(mk), and one product with Q, O(m²k), for the chosen one. The spectrum, for GCV and the effective
dimension, is that of T. For sums of more rows than features; with fewer, residuals are differences of nearly equal numbers and
`EighRidge` is the solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal, lapack, solveh_banded

from ntkdask.errors import InputError
from ntkdask.solvers.ridge import Centred, Solution, spectrum_floor


@dataclass(frozen=True)
class TridiagonalRidge:
    """G = Q T Qᵀ of the centred Gram matrix.

    Parameters
    ----------
    centred : Centred
        The centred sums, whose Gram matrix was destroyed.
    diagonal, off_diagonal : array (m,) and (m − 1,)
        Of T.
    reflectors, tau : array (m − 1, m − 1) and (m − 1,)
        The Householder reflectors of Q and their factors, as LAPACK stores them.
    rotated : array (m, k)
        QᵀB.
    eigenvalues : array (m,)
        Of T, ascending; those that are rounding are 0.
    """

    centred: Centred
    diagonal: np.ndarray
    off_diagonal: np.ndarray
    reflectors: np.ndarray
    tau: np.ndarray
    rotated: np.ndarray
    eigenvalues: np.ndarray

    @classmethod
    def factorise(cls, centred: Centred) -> TridiagonalRidge:
        """Reduce by LAPACK's sytrd on the lower triangle, in place, with a copy of its reflectors: 2 m² float64, evd holds 3."""
        m = centred.gram.shape[0]
        if m == 1:
            value = centred.gram[0, :1].copy()
            return cls(
                centred, value, np.empty(0), np.empty((0, 0)), np.empty(0), centred.cross, np.maximum(value, 0.0)
            )
        work, info = lapack.dsytrd_lwork(m, lower=1)
        reduced, diagonal, off_diagonal, tau, info = lapack.dsytrd(
            centred.gram, lower=1, lwork=int(work), overwrite_a=1
        )
        if info:
            raise InputError(
                f"ridge: the reduction of the Gram matrix failed (LAPACK info {info}); it holds no finite numbers."
            )
        # below the first row the reflectors of sytrd have the layout of a QR factorisation
        reflectors = np.asfortranarray(reduced[1:, :-1])
        values = eigvalsh_tridiagonal(diagonal, off_diagonal, check_finite=False, lapack_driver="sterf")
        values = np.where(values > spectrum_floor(values), values, 0.0)
        unrotated = cls(centred, diagonal, off_diagonal, reflectors, tau, centred.cross, values)
        return cls(centred, diagonal, off_diagonal, reflectors, tau, unrotated._rotate(centred.cross, "T"), values)

    def solve(self, alpha: float) -> Solution:
        """w = Q (T + α)⁻¹ QᵀB; InputError when T + αI is not positive definite to rounding."""
        try:
            return self.centred.solution(self._rotate(self._shifted_solve(alpha), "N"), alpha)
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"ridge: the Gram matrix plus alpha={alpha:g} is not positive definite to rounding ({error}). "
                'Use a larger alpha, or solver="eigh", which drops the directions without data.'
            ) from error

    def effective_dimension(self, alpha: float) -> float:
        """tr G(G + α)⁻¹, plus 1 for an intercept."""
        return float(np.sum(self.eigenvalues / (self.eigenvalues + alpha))) + self.centred.has_intercept

    def residual_squares(self, alpha: float) -> np.ndarray:
        """‖Y − Φw‖² per target (k,) = ‖Y‖² − q·z − α‖z‖², z = (T + α)⁻¹q; to about 1e-15·‖Y‖²."""
        z = self._shifted_solve(alpha)
        fitted = np.einsum("ij,ij->j", self.rotated, z) + alpha * np.einsum("ij,ij->j", z, z)
        return np.maximum(self.centred.squares - fitted, 0.0)

    def gcv(self, alpha: float) -> float:
        """Generalised cross-validation n·RSS/(n − df)²; infinite where T + αI is not positive definite."""
        n = self.centred.rows
        free = n - self.effective_dimension(alpha)
        if free <= 0.0:
            return float("inf")
        try:
            return n * float(self.residual_squares(alpha).mean()) / free**2
        except np.linalg.LinAlgError:
            return float("inf")

    def _shifted_solve(self, alpha: float) -> np.ndarray:
        if self.diagonal.size == 1:
            return self.rotated / (self.diagonal + alpha)
        banded = np.zeros((2, self.diagonal.size))
        banded[0] = self.diagonal + alpha
        banded[1, :-1] = self.off_diagonal
        return solveh_banded(banded, self.rotated, lower=True, check_finite=False)

    def _rotate(self, right: np.ndarray, trans: str) -> np.ndarray:
        """Qᵀ·right ("T") or Q·right ("N"); no reflector changes the first row."""
        out = np.array(right, order="F")
        if self.tau.size:
            lower = np.asfortranarray(out[1:])
            _, work, _ = lapack.dormqr("L", trans, self.reflectors, self.tau, lower, -1)
            out[1:] = lapack.dormqr("L", trans, self.reflectors, self.tau, lower, int(work[0]))[0]
        return out
