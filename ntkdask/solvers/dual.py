"""Kernel ridge regression on a dense K in one memory: every alpha from an eigendecomposition, or one from a Cholesky factor.

Both work in place on K where they may, in float64 unless asked otherwise. The problem, with weights and intercept, is that of
`dual_problem`. With an intercept `DualEigh` first turns the weights' vector u = S1 into a coordinate axis by a Householder
reflection and drops it, so that its spectrum is that of the centred problem, without a spurious zero. Generalised
cross-validation, leave-one-out and held-out errors then cost no factorisation. NumPy or CuPy. MATH.md §6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ntkdask import lapack
from ntkdask.arrays import Array, require_float, to_host
from ntkdask.errors import InputError
from ntkdask.solvers.dense import (
    PANEL,
    eigenpairs,
    keep_rows,
    not_definite,
    reflect,
    reflect_both_sides,
    reflector,
    scaled_kernel,
    take_rows,
    times,
)
from ntkdask.solvers.dual_cholesky import DualCholesky, cholesky_bytes, dual_cholesky
from ntkdask.solvers.dual_problem import DualProblem, DualSolution, generalised_score, held_out_error
from ntkdask.solvers.ridge import spectrum_floor

__all__ = [
    "DualCholesky",
    "DualEigh",
    "DualProblem",
    "DualSolution",
    "cholesky_bytes",
    "dual_cholesky",
    "eigh_bytes",
    "held_out_error",
]

INDEFINITE = 10.0
"""A negative eigenvalue beyond this many roundings is no rounding: K is not positive semidefinite."""


def eigh_bytes(n: int, dtype: str = "float64") -> int:
    """Peak bytes of `DualEigh.factorise`: K and 2 n² of LAPACK's workspace, in the dtype it works in, and n-vectors.

    That is with overwrite=True and K of that dtype; a copy (overwrite=False, or a cast) adds K's own bytes.
    """
    return np.dtype(dtype).itemsize * 3 * n * n + 8 * (3 * PANEL * n + 16 * n)


@dataclass(frozen=True)
class DualEigh:
    """VEVᵀ of S K S on the complement of u = S1 (of S K S itself without an intercept): every alpha in O(n²k), GCV in O(nk).

    Parameters
    ----------
    problem : DualProblem
        Weights, targets, and whether there is an intercept.
    eigenvalues : array (r,), float64
        Ascending; r is the number of rows with positive weight, less 1 for an intercept. Those that are rounding in float64 are
        0; those that are rounding of a float32 K may be negative.
    vectors : array (r, r)
        V.
    projected : array (r, k), float64
        VᵀHSY, H the reflection.
    pull, rest : array (r,) and (k,), float64
        The last rows of HSKSH and of HSY, from which the intercept follows.
    data_eps : float
        The rounding of K's own dtype.
    """

    problem: DualProblem
    eigenvalues: np.ndarray
    vectors: Array
    projected: np.ndarray
    pull: np.ndarray
    rest: np.ndarray
    data_eps: float

    @classmethod
    def factorise(
        cls,
        kernel: Array,
        targets: np.ndarray,
        weights: np.ndarray | None = None,
        fit_intercept: bool = True,
        *,
        dtype: str = "float64",
        overwrite: bool = False,
        data_dtype: Any = None,
    ) -> DualEigh:
        """Decompose K by LAPACK's divide and conquer, about 9 n³ flops; rows of weight 0 are left out first. Memory: `eigh_bytes`.

        Parameters
        ----------
        kernel : array (n, n), float32 or float64
            K, symmetric, both triangles.
        targets : array (n, k) or (n,)
            Y.
        weights : array (n,), optional
            At least 0; None: all 1.
        fit_intercept : bool
            Whether an intercept is fitted.
        dtype : {"float64", "float32"}
            The dtype of the decomposition. "float32" halves the memory; then eigenvalues, and with them alpha, mean something
            only above about 1e-6·λ_max.
        overwrite : bool
            Whether a kernel of `dtype` may be destroyed.
        data_dtype : dtype, optional
            The dtype in which K was computed, where that is coarser than its own; its rounding decides what is noise.

        Returns
        -------
        DualEigh
            The factorisation.

        Raises
        ------
        InputError
            For shapes that disagree, NaN and negative weights.
        """
        problem = DualProblem.of(targets, weights, fit_intercept, rows=len(kernel))
        data_eps = float(np.finfo(data_dtype or require_float(kernel, "kernel").dtype).eps)
        matrix = scaled_kernel(kernel, problem, dtype, overwrite)
        right = problem.right_hand_sides()[problem.kept, : problem.targets.shape[1]]
        pull, rest = np.empty(0), np.zeros(right.shape[1])
        if fit_intercept:
            mirror = reflector(problem.scale[problem.kept])
            reflect_both_sides(matrix, mirror)
            pull = to_host(matrix[-1, :-1]).astype(np.float64)
            right = reflect(right, mirror)
            right, rest = right[:-1], right[-1]
            matrix = keep_rows(matrix, np.arange(len(matrix) - 1))
        values, vectors = eigenpairs(matrix)
        values = np.where(np.abs(values) > spectrum_floor(values), values, 0.0)
        return cls(problem, values, vectors, times(vectors.T, right), pull, rest, data_eps)

    def solve(self, alpha: float) -> DualSolution:
        """The fit at one alpha; at alpha = 0 with a singular K the one of minimum norm, when the targets allow one.

        InputError when alpha does not exceed −λ_min, with how much it falls short and what to use. At alpha = 0 also when
        the targets differ on rows that K does not tell apart (duplicates), naming the rows.
        """
        return self._solution(self._checked_shrink(alpha), alpha)

    def effective_dimension(self, alpha: float) -> float:
        """tr SKS(SKS + α)⁻¹ of the centred problem, plus 1 for an intercept; negative eigenvalues count as 0."""
        e = np.maximum(self.eigenvalues, 0.0)
        kept = np.divide(e, e + alpha, out=np.zeros_like(e), where=e > (0.0 if alpha > 0 else self.noise))
        return float(kept.sum()) + self.problem.fit_intercept

    def gcv(self, alpha: float) -> float:
        """Generalised cross-validation n·RSS/(n − df)², per target and row, as `EighRidge.gcv`; n: rows of positive weight.

        Infinite where no degrees of freedom are left, and where alpha does not exceed −λ_min.
        """
        if not self._definite(alpha):
            return float("inf")
        left = self._left(alpha)
        residual = float(((left[:, None] * self.projected) ** 2).sum(axis=0).mean())
        return generalised_score(self.problem.kept.size, residual, float(left.sum()))

    def leave_one_out(self, alpha: float) -> float:
        """Mean squared leave-one-out error per target and unit of weight: every row under the fit without it, exactly.

        s_i e_i = β_i/(M⁻¹)_ii, M⁻¹ = Q(E + α)⁻¹Qᵀ the inverse of C on the complement of u. Infinite where alpha ≤ −λ_min.
        Source: Cawley & Talbot 2004 (weighted LS-SVM), eq. 5; MATH.md §6.
        """
        return float(self.leave_one_out_path([alpha])[0])

    def leave_one_out_path(self, alphas: Sequence[float]) -> np.ndarray:
        """`leave_one_out` of each alpha, (n_alphas,), from one pass over the vectors, 2·n²·(k + 1) flops each."""
        out = np.zeros(len(alphas))
        for _, turned in self._turned_panels():
            for i, alpha in enumerate(alphas):
                out[i] += float(np.sum(self._left_out_errors(turned, alpha) ** 2)) if self._definite(alpha) else np.inf
        return out / self._total_weight

    def gcv_by_target(self, alpha: float) -> np.ndarray:
        """`gcv` of every target alone, (k,)."""
        if not self._definite(alpha):
            return np.full(self.projected.shape[1], np.inf)
        left = self._left(alpha)
        residual = ((left[:, None] * self.projected) ** 2).sum(axis=0)
        return np.array([generalised_score(self.problem.kept.size, float(r), float(left.sum())) for r in residual])

    def leave_one_out_squares(self, alphas: Sequence[float]) -> np.ndarray:
        """(n, k, n_alphas) squared leave-one-out errors of the rows, times their weights; infinite where alpha ≤ −λ_min."""
        out = np.zeros((*self.problem.targets.shape, len(alphas)))
        for start, turned in self._turned_panels():
            rows = self.problem.kept[start : start + len(turned)]
            for i, alpha in enumerate(alphas):
                out[rows, :, i] = self._left_out_errors(turned, alpha) ** 2 if self._definite(alpha) else np.inf
        return out

    def held_out_errors(self, rows: np.ndarray, alpha: float) -> np.ndarray:
        """y − ŷ, (len(rows), k), of each of `rows` under the fit without all of them, exactly, without another factorisation.

        S_F e_F = ((M⁻¹)_FF)⁻¹ β_F: 2·f²·n + f³/3 flops for f rows, memory 2·f·n + f² float64. InputError when a row has
        weight 0 or appears twice, when no other row is left, or when alpha does not exceed −λ_min.
        """
        rows = np.asarray(rows)
        position = np.searchsorted(self.problem.kept, rows)
        are_distinct = np.isin(rows, self.problem.kept).all() and np.unique(rows).size == rows.size
        if not are_distinct or rows.size >= self.problem.kept.size:
            raise InputError(
                f"kernel ridge: {rows.size} rows are to be held out of the {self.problem.kept.size} of positive weight; "
                "give distinct ones among those, and leave at least one."
            )
        shrink = self._checked_shrink(alpha)
        turned = self._turned(position)
        inner = (turned * shrink) @ turned.T
        try:
            error = lapack.cholesky_solve(inner, turned @ (shrink[:, None] * self.projected))
        except np.linalg.LinAlgError as failure:
            raise InputError(
                f"kernel ridge: without these rows the fit at alpha={alpha:g} is not determined to rounding ({failure}). "
                "Use a larger alpha."
            ) from failure
        return error / self.problem.scale[rows][:, None]

    def held_out_error(self, groups: np.ndarray, alpha: float, held: Sequence[int] | None = None) -> float:
        """Mean squared error, per target and unit of weight, of rows held out group by group: k-fold, or a holdout.

        groups: (n,) integers, the fold of every row. held: the groups that are held out in turn; None: all of them.
        """
        groups = np.asarray(groups)
        total, weight = 0.0, 0.0
        for group in np.unique(groups[self.problem.kept]) if held is None else held:
            rows = self.problem.kept[groups[self.problem.kept] == group]
            w = self.problem.scale[rows] ** 2
            total += float(w @ (self.held_out_errors(rows, alpha) ** 2).mean(axis=1))
            weight += float(w.sum())
        return total / weight

    @cached_property
    def noise(self) -> float:
        """Eigenvalues up to here are 0 but for rounding: λ_max·n·ε of float64, and λ_max·ε of K's own dtype where that is coarser."""
        if not self.eigenvalues.size:
            return 0.0
        return max(spectrum_floor(self.eigenvalues), 4 * float(self.eigenvalues[-1]) * self.data_eps)

    @property
    def smallest_alpha(self) -> float:
        """An alpha that is safe: 0 where no eigenvalue is negative, else −2·λ_min, or the rounding of K where that is larger."""
        low = float(self.eigenvalues[0]) if self.eigenvalues.size else 0.0
        return 0.0 if low >= 0 else max(-2 * low, self.noise)

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, attributes) for the store."""
        arrays = {
            name: to_host(getattr(self, name)) for name in ("eigenvalues", "vectors", "projected", "pull", "rest")
        }
        arrays |= {"scale": self.problem.scale, "targets": self.problem.targets}
        return arrays, {"fit_intercept": self.problem.fit_intercept, "data_eps": self.data_eps}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> DualEigh:
        """The factorisation that `to_state` described."""
        a: dict[str, Any] = dict(arrays)
        problem = DualProblem(a.pop("scale"), a.pop("targets"), attributes["fit_intercept"])
        return cls(problem, **a, data_eps=attributes["data_eps"])

    def _solution(self, shrink: np.ndarray, alpha: float) -> DualSolution:
        inner = times(self.vectors, shrink[:, None] * self.projected)
        intercept = np.zeros(inner.shape[1])
        if self.problem.fit_intercept:
            intercept = (self.rest - self.pull @ inner) / -np.sqrt(np.sum(self.problem.scale**2)) + self.problem.level
            inner = reflect(np.concatenate([inner, np.zeros((1, inner.shape[1]))]), self._mirror)
        coefficients = np.zeros(self.problem.targets.shape)
        coefficients[self.problem.kept] = inner * self.problem.scale[self.problem.kept, None]
        return DualSolution(coefficients, intercept, alpha)

    @cached_property
    def _mirror(self) -> np.ndarray:
        return reflector(self.problem.scale[self.problem.kept])

    @property
    def _total_weight(self) -> float:
        return float(np.sum(self.problem.scale**2)) * self.problem.targets.shape[1]

    def _definite(self, alpha: float) -> bool:
        """Whether E + α > 0, or α = 0 and the negative eigenvalues are rounding."""
        low = float(self.eigenvalues[0]) if self.eigenvalues.size else 0.0
        if alpha == 0:
            return low >= -INDEFINITE * self.noise
        return alpha > 0 and alpha + min(low, 0.0) > (spectrum_floor(self.eigenvalues) if low < 0 else 0.0)

    def _shrink(self, alpha: float) -> np.ndarray:
        """1/(e + α); at α = 0 its limit in the range of K, and 0 outside."""
        if alpha > 0:
            return 1.0 / (self.eigenvalues + alpha)
        inside = self.eigenvalues > self.noise
        return np.divide(1.0, self.eigenvalues, out=np.zeros_like(self.eigenvalues), where=inside)

    def _left(self, alpha: float) -> np.ndarray:
        """α/(e + α), the share of a direction that the fit leaves; at α = 0 its limit."""
        return alpha * self._shrink(alpha) if alpha > 0 else (self.eigenvalues <= self.noise).astype(np.float64)

    def _checked_shrink(self, alpha: float) -> np.ndarray:
        if not self._definite(alpha):
            low, high = (float(self.eigenvalues[i]) for i in (0, -1)) if self.eigenvalues.size else (0.0, 0.0)
            raise not_definite(alpha, low, high, self.data_eps)
        if alpha == 0:
            self._require_consistent()
        return self._shrink(alpha)

    def _require_consistent(self) -> None:
        """InputError unless the targets lie in the range of K, up to the root of its rounding; asked for at α = 0."""
        outside = self._left(0.0)[:, None] * self.projected
        size = np.linalg.norm(self.projected, axis=0)
        share = np.linalg.norm(outside, axis=0) / np.where(size > 0, size, 1.0)
        if not (share > np.sqrt(self.data_eps)).any():
            return
        residual = times(self.vectors, outside[:, [int(share.argmax())]])
        if self.problem.fit_intercept:
            residual = reflect(np.concatenate([residual, np.zeros((1, 1))]), self._mirror)
        rows = np.sort(self.problem.kept[np.argsort(-np.abs(residual[:, 0]), kind="stable")[:2]])
        rank = int((self.eigenvalues > self.noise).sum())
        raise InputError(
            f"kernel ridge: at alpha=0 the kernel matrix is singular (rank {rank} of {self.eigenvalues.size}, largest eigenvalue "
            f"{self.eigenvalues[-1]:.3g}) and {share.max():.2g} of the targets lie outside its range, most in rows "
            f"{' and '.join(map(str, rows))}: duplicate rows with different targets? "
            f"Merge them, or use alpha > {self.noise:.1g}."
        )

    def _turned(self, position: np.ndarray) -> np.ndarray:
        """Rows of Q = H[V; 0], (len(position), r) float64: eigenvectors in the coordinates of the kept rows."""
        n = self.problem.kept.size
        if not self.problem.fit_intercept:
            return take_rows(self.vectors, position)
        out = np.zeros((len(position), n - 1))
        inside = position < n - 1
        out[inside] = take_rows(self.vectors, position[inside])
        return out - np.outer(self._mirror[position] * (2.0 / (self._mirror @ self._mirror)), self._mirror_product)

    @cached_property
    def _mirror_product(self) -> np.ndarray:
        return times(self.vectors.T, self._mirror[:-1, None])[:, 0]

    def _turned_panels(self) -> Iterator[tuple[int, np.ndarray]]:
        n = self.problem.kept.size
        for start in range(0, n, PANEL):
            yield start, self._turned(np.arange(start, min(start + PANEL, n)))

    def _left_out_errors(self, turned: np.ndarray, alpha: float) -> np.ndarray:
        """Weighted leave-one-out errors (b, k) of the rows whose rows of Q are `turned`."""
        shrink, squares = self._shrink(alpha), turned**2
        inverse = (squares @ shrink)[:, None]
        beta = turned @ (shrink[:, None] * self.projected)
        error = np.divide(beta, inverse, out=np.zeros_like(beta), where=inverse > 0)
        if alpha == 0:
            # the limit: where a row has a part outside the range of K, that part decides
            outside = self._left(0.0)
            free = (squares @ outside)[:, None]
            left = turned @ (outside[:, None] * self.projected)
            error = np.where(free > np.finfo(float).eps, left / np.maximum(free, np.finfo(float).tiny), error)
        return error
