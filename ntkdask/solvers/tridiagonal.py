"""Ridge for every alpha from a tridiagonal reduction G = Q T Qᵀ: no eigenvectors are formed.

The reduction is 4/3 m³ flops where a full eigendecomposition takes about 9 m³ (Golub & Van Loan 2013, §8.3); after it every
alpha is a tridiagonal solve, O(mk), and one product with Q, O(m²k), for the chosen one. The spectrum, for GCV and the effective
dimension, is that of T. For sums of more rows than features, whose Gram has no negative eigenvalues beyond rounding: `serves` says
so, and `spectral` goes on to the whole eigendecomposition where not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkdask import lapack
from ntkdask.errors import InputError
from ntkdask.solvers.ridge import Centred, EighRidge, Solution, spectrum_floor

PANEL = 256
"""Columns that are rotated at a time."""


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
        Of T, ascending; those that are rounding, and those beyond the rank that the rows allow, are 0.
    least : float
        The smallest eigenvalue of T, which rounding may have made negative.
    """

    centred: Centred
    diagonal: np.ndarray
    off_diagonal: np.ndarray
    reflectors: np.ndarray
    tau: np.ndarray
    rotated: np.ndarray
    eigenvalues: np.ndarray
    least: float

    @classmethod
    def factorise(cls, centred: Centred) -> TridiagonalRidge:
        """Reduce by LAPACK's sytrd on the lower triangle, in place, with a copy of its reflectors: 2 m² float64, evd holds 3."""
        m = centred.gram.shape[0]
        if m == 1:
            value = centred.gram[0, :1].copy()
            empty = (np.empty(0), np.empty((0, 0)), np.empty(0))
            return cls(centred, value, *empty, centred.cross, centred.of_data(value), float(value[0]))
        diagonal, off_diagonal, tau = lapack.sytrd(centred.gram)
        # below the first row the reflectors of sytrd have the layout of a QR factorisation
        reflectors = np.asfortranarray(centred.gram[1:, :-1])
        values = lapack.sterf(diagonal, off_diagonal)
        facts = (centred.of_data(values), float(values[0]))
        unrotated = cls(centred, diagonal, off_diagonal, reflectors, tau, centred.cross, *facts)
        return cls(centred, diagonal, off_diagonal, reflectors, tau, unrotated._rotate(centred.cross, True), *facts)

    def serves(self, alpha: float) -> bool:
        """Whether solutions and GCV from this alpha on are those of `EighRidge`: there is data, and T is positive but for rounding."""
        return self.least >= -self._floor and alpha > self._floor > 0

    def spectral(self) -> EighRidge:
        """The whole eigendecomposition, Q times the vectors of T: about 2 m³ flops more, m² float64 beside the reflectors."""
        if self.diagonal.size == 1:
            vectors = np.ones((1, 1))
        else:
            _, vectors = lapack.stemr(self.diagonal, self.off_diagonal)
        for start in range(0, vectors.shape[1], PANEL):
            columns = slice(start, start + PANEL)
            vectors[:, columns] = self._rotate(vectors[:, columns], False)
        return EighRidge.of(self.centred, self.eigenvalues, vectors)

    def solve(self, alpha: float) -> Solution:
        """w = Q (T + α)⁻¹ QᵀB; InputError when T + αI is not positive definite to rounding."""
        try:
            return self.centred.solution(self._rotate(self._shifted_solve(alpha), False), alpha)
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"ridge: the Gram matrix plus alpha={alpha:g} is not positive definite to rounding ({error}). "
                'Use a larger alpha, or solver="eigh", which drops the directions without data.'
            ) from error

    def effective_dimension(self, alpha: float) -> float:
        """tr G(G + α)⁻¹, plus 1 for an intercept."""
        return float(np.sum(self.eigenvalues / (self.eigenvalues + alpha))) + self.centred.has_intercept

    def residual_squares(self, alpha: float) -> np.ndarray:
        """‖Y − Φw‖² per target (k,), as ‖Y_⊥‖² + α² z·T⁻¹z, z = (T + α)⁻¹q: no cancellation that depends on alpha."""
        z = self._shifted_solve(alpha)
        # directions without data, where q is rounding, must not be divided by the rounding of 0
        shift = 2 * self._floor
        outside = self.centred.squares - np.einsum("ij,ij->j", self.rotated, self._shifted_solve(shift))
        inside = alpha**2 * np.einsum("ij,ij->j", z, self._shifted_solve(shift, z))
        if np.count_nonzero(self.eigenvalues) + self.centred.has_intercept >= self.centred.rows:
            outside = np.zeros_like(outside)  # the features span every row: nothing is outside but rounding
        return np.maximum(outside, 0.0) + inside

    def gcv(self, alpha: float) -> float:
        """Generalised cross-validation n·RSS/(n − df)²; infinite where T + αI is not positive definite."""
        try:
            return self.centred.generalised_score(self.residual_squares(alpha), self.eigenvalues, alpha)
        except np.linalg.LinAlgError:
            return float("inf")

    @property
    def _floor(self) -> float:
        return spectrum_floor(self.eigenvalues)

    def _shifted_solve(self, alpha: float, right: np.ndarray | None = None) -> np.ndarray:
        """(T + α)⁻¹·right, of QᵀB where none is given."""
        right = self.rotated if right is None else right
        if self.diagonal.size == 1:
            shifted = self.diagonal + alpha
            return np.divide(right, shifted, out=np.zeros_like(right), where=shifted > 0)
        return lapack.ptsv(self.diagonal + alpha, self.off_diagonal, right)

    def _rotate(self, right: np.ndarray, trans: bool) -> np.ndarray:
        """Qᵀ·right when `trans`, else Q·right; no reflector changes the first row."""
        out = np.array(right, order="F")
        if self.tau.size:
            lower = np.asfortranarray(out[1:])
            lapack.ormqr(self.reflectors, self.tau, lower, trans=trans)
            out[1:] = lower
        return out
