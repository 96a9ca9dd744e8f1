"""The dual problem of kernel ridge regression, with weights and a free intercept, that all its solvers share.

For weights w ≥ 0 (0 leaves a row out), S = diag(√w), C = S K S + αI,

    β = C⁻¹ S (Y − 1b),   f(x) = Σ_i k(x, x_i) s_i β_i + b,   b = (1ᵀS C⁻¹ S Y)/(1ᵀS C⁻¹ S 1), so that 1ᵀSβ = 0.

It equals primal ridge with an unpenalised intercept on features with K = ΦΦᵀ (`ridge`), and its scores are defined as there. A
solver is given `DualProblem.right_hand_sides()`, and `DualProblem.solution` takes what it solved. Dense matrices: `dual`;
larger ones: `conjugate_gradients` and the tiled Cholesky factorisation. MATH.md §6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, namespace, to_host
from ntkdask.errors import InputError


@dataclass(frozen=True)
class DualSolution:
    """The fit at one alpha: ŷ = k(x, X)·coefficients + intercept.

    coefficients: (n, k), Sβ. intercept: (k,). Both are float64 on the host.
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    alpha: float

    def predict(self, kernel_rows: Array) -> Array:
        """Predictions (m, k) float64 from kernel_rows (m, n) = k(x, X)."""
        xp = namespace(kernel_rows)
        return kernel_rows @ xp.asarray(self.coefficients) + xp.asarray(self.intercept)


@dataclass(frozen=True)
class DualProblem:
    """Weights and targets of a kernel ridge problem, and whether it has an intercept.

    Parameters
    ----------
    scale : array (n,), float64, on the host
        √w.
    targets : array (n, k), float64, on the host
        Y.
    fit_intercept : bool
        Whether an intercept is fitted.
    """

    scale: np.ndarray
    targets: np.ndarray
    fit_intercept: bool = True

    @classmethod
    def of(
        cls, targets: np.ndarray, weights: np.ndarray | None = None, fit_intercept: bool = True, rows: int | None = None
    ) -> DualProblem:
        """The problem of targets (n, k) or (n,) and weights (n,), None: all 1. rows: how many the kernel matrix has.

        InputError for shapes that disagree, NaN, negative weights, and when no row has a positive weight.
        """
        y = np.asarray(to_host(targets, "targets"), dtype=np.float64)
        y = y[:, None] if y.ndim == 1 else y
        w = np.ones(len(y)) if weights is None else np.asarray(to_host(weights, "weights"), dtype=np.float64)
        if w.shape != (len(y),) or rows not in (None, len(y)):
            raise InputError(
                f"kernel ridge: {len(y)} rows of targets, weights of shape {w.shape} and a kernel matrix of "
                f"{len(y) if rows is None else rows} rows; all three must agree."
            )
        if not (np.isfinite(w).all() and (w >= 0).all() and (w > 0).any()):
            raise InputError("kernel ridge: weights must be finite, at least 0, and some above 0; 0 leaves a row out.")
        bad = np.flatnonzero(~np.isfinite(y).all(axis=1) & (w > 0))
        if bad.size:
            raise InputError(
                f"kernel ridge: {bad.size} rows of targets have NaN or infinity (first: row {bad[0]}). Drop them."
            )
        return cls(np.sqrt(w), np.where(w[:, None] > 0, y, 0.0), fit_intercept)

    @property
    def kept(self) -> np.ndarray:
        """Indices of the rows with positive weight."""
        return np.flatnonzero(self.scale > 0)

    @property
    def level(self) -> np.ndarray:
        """(k,) the weighted mean of the targets, which an intercept takes up; 0 without one.

        β does not depend on it. Left in, targets far from zero would cancel, and tolerances would be shares of it.
        """
        if not self.fit_intercept:
            return np.zeros(self.targets.shape[1])
        kept = self.kept
        first, weights = self.targets[kept[0]], self.scale[kept] ** 2
        return first + weights @ (self.targets[kept] - first) / weights.sum()

    def right_hand_sides(self) -> np.ndarray:
        """The right-hand sides B of C X = B: S·[Y − level, 1], (n, k + 1), or S·Y, (n, k), without an intercept."""
        columns = [(self.targets - self.level) * self.scale[:, None]]
        if self.fit_intercept:
            columns.append(self.scale[:, None])
        return np.concatenate(columns, axis=1)

    def beta(self, solved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(β (n, k), intercept (k,)) from solved = C⁻¹·right_hand_sides()."""
        k = self.targets.shape[1]
        if not self.fit_intercept:
            return solved, np.zeros(k)
        ones = solved[:, k]
        intercept = (self.scale @ solved[:, :k]) / (self.scale @ ones)
        return solved[:, :k] - ones[:, None] * intercept, intercept + self.level

    def solution(self, solved: np.ndarray, alpha: float) -> DualSolution:
        """The fit from solved (n, k + 1 or k) = C⁻¹·right_hand_sides()."""
        beta, intercept = self.beta(solved)
        return DualSolution(beta * self.scale[:, None], intercept, alpha)

    def gcv(self, solved: np.ndarray, inverse_trace: float, alpha: float) -> float:
        """GCV n·RSS/(n − df)² as in `EighRidge.gcv`, from `solved` and the trace of C⁻¹ over the n rows of positive weight.

        RSS = α²‖β‖² per target, n − df = α·(tr C⁻¹ − ‖C⁻¹S1‖²/(1ᵀSC⁻¹S1)): the intercept takes out one rank.
        """
        return generalised_score(
            self.kept.size, alpha**2 * self._beta_squares(solved), alpha * self.free(solved, inverse_trace)
        )

    def free(self, solved: np.ndarray, inverse_trace: float) -> float:
        """(n − df)/α: the trace of C⁻¹ over rows of positive weight, minus the intercept's part."""
        if not self.fit_intercept:
            return inverse_trace
        ones = solved[:, self.targets.shape[1]]
        return inverse_trace - float(np.sum((ones * (self.scale > 0)) ** 2) / (self.scale @ ones))

    def _beta_squares(self, solved: np.ndarray) -> float:
        return float((self.beta(solved)[0] ** 2).sum(axis=0).mean())


def generalised_score(rows: int, residual: float, free: float) -> float:
    """n·RSS/(n − df)²; infinite where the fit interpolates. Golub, Heath & Wahba 1979."""
    return rows * residual / free**2 if free > 0.0 else float("inf")


def held_out_error(
    solution: DualSolution, kernel_rows: Array, targets: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Mean squared error per target and unit of weight on rows that the fit did not see.

    kernel_rows: (m, n), their kernel with all n rows of the fit (rows of weight 0 there have coefficient 0). targets: (m, k).
    """
    error = np.reshape(targets, (len(targets), -1)) - to_host(solution.predict(kernel_rows))
    return float(np.average((error**2).mean(axis=1), weights=weights))
