"""Ridge regression from Gram sums: (ΦᵀΦ + αI) w = ΦᵀY, for a whole grid of α from one factorisation.

α multiplies the identity beside the *unnormalised* Gram matrix, as in scikit-learn. With an intercept the sums are
centred first (weighted means), and the intercept itself is not penalised. Scores need no other pass over the rows,
except leave-one-out, whose leverages do: see `EighRidge.leave_one_out_squares`. MATH.md §6.

One alpha takes a Cholesky factorisation, a twentieth of an eigendecomposition, where that is safe. Where rows do not outnumber
features the Gram is singular: Cholesky then sees α on top of rounding, which float32 products make 1e-7 of the largest eigenvalue,
while `EighRidge` cuts the rank. A pivot that is rounding tells the other cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ntkdask import lapack
from ntkdask.errors import InputError
from ntkdask.solvers.gram import Centre, GramSums, triangle_panels, widened

PIVOT_ROUNDINGS = 1e3
"""A pivot below this many m·ε of its diagonal entry has lost its digits; so told, the features' scales do not matter."""
ALPHA_ROUNDINGS = 256.0
"""With fewer rows than features predictions are off by up to ε·λ_max/(4α) of the targets: 1e-3 at α = 256·ε·λ_max."""


@dataclass(frozen=True)
class Solution:
    """The fit at one alpha, ŷ = (φ − centre)·weights + offset; float64.

    Parameters
    ----------
    weights : array (m, k)
        Weights of the features.
    intercept : array (k,)
        ŷ at φ = 0; 0 where none was fitted.
    alpha : float
        The ridge.
    centre : array (m,) or None
        Near the rows' mean: about it float32 features keep their digits, which φ·weights + intercept cancels. None: the origin.
    offset : array (k,) or None
        ŷ at the centre. None: the intercept.
    """

    weights: np.ndarray
    intercept: np.ndarray
    alpha: float
    centre: np.ndarray | None = None
    offset: np.ndarray | None = None


@dataclass(frozen=True)
class Centred:
    """Centred sums.

    Parameters
    ----------
    gram : array (m, m)
        The lower triangle of the Gram matrix.
    cross : array (m, k)
        Features times targets.
    squares : array (k,)
        Squares of the targets.
    feature_mean : array (m,)
        The mean of the features less their centre; −centre without an intercept.
    target_mean : array (k,)
        The mean of the targets; 0 without an intercept.
    rows : int
        How many rows have a positive weight.
    weight : float
        The sum W of the weights.
    has_intercept : bool
        Whether there is an intercept.
    centre : array (m,)
        The point from which the sums count features.
    """

    gram: np.ndarray
    cross: np.ndarray
    squares: np.ndarray
    feature_mean: np.ndarray
    target_mean: np.ndarray
    rows: int
    weight: float
    has_intercept: bool
    centre: np.ndarray

    @classmethod
    def of(cls, sums: GramSums, fit_intercept: bool = True) -> Centred:
        """Centre in place, which destroys the Gram matrix of `sums`: G − ssᵀ/W, B − s tᵀ/W, ‖y‖² − t²/W; to the origin without."""
        if sums.rows == 0 or not sums.weight > 0:
            raise InputError("ridge: there are no rows with positive weight to fit.")
        about = sums.centre or Centre.zero(*sums.cross.shape)
        if not fit_intercept:
            sums.move(None)
            none = np.zeros_like(about.targets)
            facts = (sums.rows, sums.weight, False, about.features)
            return cls(sums.gram, sums.cross, sums.squares, -about.features, none, *facts)
        mean, target_mean = sums.features / sums.weight, sums.targets / sums.weight
        gram = sums.gram
        for j in range(0, mean.size, 256):
            gram[j:, j : j + 256] -= np.outer(sums.features[j:], mean[j : j + 256])
        return cls(
            gram,
            sums.cross - np.outer(sums.features, target_mean),
            np.maximum(sums.squares - sums.targets * target_mean, 0.0),
            mean,
            about.targets + target_mean,
            sums.rows,
            sums.weight,
            True,
            about.features,
        )

    def of_data(self, values: np.ndarray) -> np.ndarray:
        """Ascending eigenvalues of the Gram, 0 in the directions in which there is no data, only rounding.

        A Gram of n centred rows has rank n − 1 at most: what lies beyond is the rounding of float32 products, 1e-7 of the largest
        eigenvalue, and would count as data in GCV.
        """
        rank = min(values.size, self.rows - self.has_intercept)
        data = (np.arange(values.size) >= values.size - rank) & (values > spectrum_floor(values))
        return np.where(data, values, 0.0)

    def free(self, values: np.ndarray, alpha: float) -> float:
        """n − df without cancellation: directions without data count whole, the others α/(e+α); values are those of `of_data`."""
        data = values[values > 0]
        rest = max(0, self.rows - data.size - self.has_intercept)
        return rest + float(np.sum(alpha / (data + alpha)))

    def generalised_score(self, residual: np.ndarray, values: np.ndarray, alpha: float) -> float:
        """n·RSS/(n − df)², per target and row, of the residual squares (k,); infinite where no degree of freedom is left."""
        free = self.free(values, alpha)
        return self.rows * float(residual.mean()) / free**2 if free > 0.0 else float("inf")

    def solution(self, weights: np.ndarray, alpha: float) -> Solution:
        """The weights of the centred problem, with the intercept ȳ − φ̄·w."""
        offset = self.target_mean - self.feature_mean @ weights
        intercept = offset - self.centre @ weights if self.has_intercept else np.zeros_like(offset)
        return Solution(weights, intercept, alpha, self.centre, offset)


class Ridge(Protocol):
    """A factorised ridge: every alpha from one factorisation."""

    def solve(self, alpha: float) -> Solution:
        """The solution at one alpha."""

    def effective_dimension(self, alpha: float) -> float:
        """tr G(G + α)⁻¹, plus 1 for an intercept."""

    def gcv(self, alpha: float) -> float:
        """Generalised cross-validation score."""


def spectrum_floor(values: np.ndarray) -> float:
    """What rounding leaves of a zero eigenvalue among ascending ones: λ_max·m·ε."""
    return float(values[-1] * values.size * np.finfo(float).eps) if values.size else 0.0


@dataclass(frozen=True)
class EighRidge:
    """One eigendecomposition UEUᵀ of the centred Gram: every alpha in O(m²k), GCV in O(mk)."""

    centred: Centred
    eigenvalues: np.ndarray
    vectors: np.ndarray
    projected: np.ndarray
    turned_mean: np.ndarray

    @classmethod
    def of(cls, centred: Centred, eigenvalues: np.ndarray, vectors: np.ndarray) -> EighRidge:
        """The ridge of a decomposed Gram; eigenvalues are those of `Centred.of_data`."""
        return cls(centred, eigenvalues, vectors, vectors.T @ centred.cross, centred.feature_mean @ vectors)

    @classmethod
    def factorise(cls, centred: Centred) -> EighRidge:
        """LAPACK's divide and conquer on the lower triangle, in place: about 9 m³ flops, 3 m² float64 of workspace."""
        values, vectors = lapack.eigh(centred.gram)
        return cls.of(centred, centred.of_data(values), vectors)

    def solve(self, alpha: float) -> Solution:
        """w = U (E + α)⁻¹ UᵀB; at alpha → 0 the minimum-norm solution."""
        return self.centred.solution(self.vectors @ (self._shrink(alpha)[:, None] * self.projected), alpha)

    def effective_dimension(self, alpha: float) -> float:
        """tr G(G + α)⁻¹, plus 1 for an intercept."""
        return float(np.sum(self.eigenvalues * self._shrink(alpha))) + self.centred.has_intercept

    def residual_squares(self, alpha: float) -> np.ndarray:
        """‖Y − Φw‖² per target (k,), as ‖Y_⊥‖² + Σ (α/(e+α))²·q²/e, without cancellation at small alpha."""
        e = self.eigenvalues
        positive = e > 0
        energy = self.projected[positive] ** 2 / e[positive, None]
        outside = np.maximum(self.centred.squares - energy.sum(axis=0), 0.0)
        if positive.sum() + self.centred.has_intercept >= self.centred.rows:
            outside = np.zeros_like(outside)  # the features span every row: nothing is outside but rounding
        return outside + ((alpha / (e[positive, None] + alpha)) ** 2 * energy).sum(axis=0)

    def gcv(self, alpha: float) -> float:
        """Generalised cross-validation n·RSS/(n − df)², per target and row. Golub, Heath & Wahba 1979."""
        return self.centred.generalised_score(self.residual_squares(alpha), self.eigenvalues, alpha)

    def leave_one_out_squares(
        self, phi: np.ndarray, y: np.ndarray, weights: np.ndarray | None, alphas: Sequence[float]
    ) -> np.ndarray:
        """Σ over rows and targets of w·e², (n_alphas,), e the exact error of each row under the fit without it.

        e_i = (y_i − ŷ_i)/(1 − w_i h_i), h_i(α) = 1/W + Σ_j (φ̃_i·u_j)²/(e_j + α): 2·b·m² flops serve every alpha. The caller sums
        over batches and divides by W·k.

        Parameters
        ----------
        phi : array (b, m)
            Features of a batch, not centred.
        y : array (b, k), float64
            Targets.
        weights : array (b,), optional
            Weights; None: all 1.
        alphas : sequence of float
            The alphas.
        """
        w = np.ones(len(y)) if weights is None else weights
        errors = self.leave_one_out_errors(phi, y, weights, alphas)
        return np.array([float(np.sum(w[:, None] * error**2)) for error in errors])

    def leave_one_out_errors(
        self, phi: np.ndarray, y: np.ndarray, weights: np.ndarray | None, alphas: Sequence[float]
    ) -> Iterator[np.ndarray]:
        """Yield the exact errors (b, k) of each row under the fit without it, for every alpha; see `leave_one_out_squares`."""
        centred = self.centred
        phi = widened(phi)
        # in phi's dtype from the centre, which it holds exactly; what is left of the mean in float64
        turned = (phi - centred.centre.astype(phi.dtype)) @ self.vectors.astype(phi.dtype, copy=False)
        turned = turned.astype(np.float64) - self.turned_mean
        y = y - centred.target_mean
        w = np.ones(len(y)) if weights is None else weights
        mean_leverage = 1.0 / centred.weight if centred.has_intercept else 0.0
        squared = turned**2
        for alpha in alphas:
            shrink = self._shrink(alpha)
            error = y - turned @ (shrink[:, None] * self.projected)
            # a row that alone spans a direction has leverage 1 at alpha → 0: nothing is known of it without itself
            error /= np.maximum(1.0 - w * (mean_leverage + squared @ shrink), np.finfo(float).eps)[:, None]
            yield error

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, attributes) for the store; the Gram matrix, which the factorisation destroyed, is left out."""
        c = self.centred
        arrays = {
            "vectors": self.vectors,
            "eigenvalues": self.eigenvalues,
            "projected": self.projected,
            "turned_mean": self.turned_mean,
            "squares": c.squares,
            "feature_mean": c.feature_mean,
            "target_mean": c.target_mean,
            "centre": c.centre,
        }
        return arrays, {"rows": c.rows, "weight": c.weight, "has_intercept": c.has_intercept}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> EighRidge:
        """The factorisation that `to_state` described."""
        a: dict[str, Any] = dict(arrays)
        own = {name: a.pop(name) for name in ("vectors", "eigenvalues", "projected", "turned_mean")}
        return cls(Centred(gram=np.empty((0, 0)), cross=np.empty((0, 0)), **a, **attributes), **own)

    def _shrink(self, alpha: float) -> np.ndarray:
        """1/(e + α), and 0 in directions without data, whose components are rounding."""
        return np.divide(1.0, self.eigenvalues + alpha, out=np.zeros_like(self.eigenvalues), where=self.eigenvalues > 0)


def solve_cholesky(centred: Centred, alpha: float, rounding: float = float(np.finfo(float).eps)) -> Solution:
    """One alpha by a Cholesky factorisation, m³/3 flops, in place.

    Parameters
    ----------
    centred : Centred
        The centred sums, whose Gram matrix is destroyed.
    alpha : float
        The ridge.
    rounding : float
        ε of the products in the Gram matrix.

    Raises
    ------
    InputError
        When G + αI is not positive definite to rounding, and when rows do not outnumber features and α is near the rounding of G.
    """
    if not _outnumber(centred):
        least = ALPHA_ROUNDINGS * rounding * _largest_eigenvalue(centred.gram)
        if alpha < least:
            raise _advice(
                alpha,
                f"is too near the rounding of the Gram matrix of {centred.rows} rows and {centred.gram.shape[0]} features; "
                f"Cholesky would be right from alpha={least:.1g} on",
            )
    try:
        return _factorised(centred, alpha)
    except np.linalg.LinAlgError as error:
        raise _advice(alpha, f"is not positive definite to rounding ({error})") from error


def solve_one(centred: Centred, alpha: float) -> Solution:
    """One alpha by Cholesky where rows outnumber features and no pivot is rounding, else by the whole spectrum; in place."""
    if not _outnumber(centred):
        return EighRidge.factorise(centred).solve(alpha)
    gram, diagonal = centred.gram, np.diag(centred.gram).copy()
    # the upper triangle, which nobody reads, keeps the matrix that the factorisation destroys
    for rows, columns in triangle_panels(diagonal.size):
        gram[columns, rows] = _both_triangles(gram, rows, columns)
    try:
        return _factorised(centred, alpha, PIVOT_ROUNDINGS * diagonal.size * np.finfo(float).eps)
    except np.linalg.LinAlgError:
        for rows, columns in triangle_panels(diagonal.size):
            gram[rows, columns] = gram[columns, rows].T
        gram[np.diag_indices(diagonal.size)] = diagonal
        return EighRidge.factorise(centred).solve(alpha)


def _factorised(centred: Centred, alpha: float, least_pivot: float = 0.0) -> Solution:
    """The solution; LinAlgError when a pivot is not above least_pivot of its diagonal entry, or far below α, the least possible."""
    gram = centred.gram
    diagonal = np.arange(gram.shape[0])
    gram[diagonal, diagonal] += alpha
    entries = gram[diagonal, diagonal]
    failed = lapack.potrf(gram)
    if failed:
        raise np.linalg.LinAlgError(f"the leading minor of order {failed} is not positive definite")
    pivots = gram[diagonal, diagonal] ** 2
    if least_pivot and not (pivots > np.maximum(least_pivot * entries, alpha / 2)).all():
        raise np.linalg.LinAlgError("a pivot is rounding")
    return centred.solution(lapack.potrs(gram, centred.cross), alpha)


def _outnumber(centred: Centred) -> bool:
    return centred.rows - centred.has_intercept > centred.gram.shape[0]


def _both_triangles(gram: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """The transpose of a panel of the lower triangle, its square on the diagonal made symmetric."""
    panel = gram[rows, columns].T.copy()
    size = panel.shape[0]
    square = panel[:, :size]
    panel[:, :size] = np.triu(square) + np.triu(square, 1).T
    return panel


def _largest_eigenvalue(gram: np.ndarray) -> float:
    """λ_max from the lower triangle by a few power iterations; at most the trace."""
    vector = np.sqrt(np.maximum(np.diag(gram), 0.0)) + np.finfo(float).tiny
    value = 0.0
    for _ in range(8):
        vector = vector / max(np.linalg.norm(vector), np.finfo(float).tiny)
        product = lapack.symv(gram, vector)
        value, vector = float(vector @ product), product
    return value


def _advice(alpha: float, found: str) -> InputError:
    return InputError(
        f"ridge: the Gram matrix plus alpha={alpha:g} {found}. "
        'Use a larger alpha, or solver="eigh" (or "auto"), which drops the directions without data.'
    )


def held_out_squares(solution: Solution, held_out: GramSums, rounding: float = 0.0) -> float:
    """Mean squared error per target and unit of weight, on rows of which only the sums are given.

    Σ w(y − φw − b)² = Σwy² − 2(wᵀB + bᵀt) + wᵀGw + 2bᵀ(wᵀs) + W b²: no pass over the rows.

    Parameters
    ----------
    solution : Solution
        The fit.
    held_out : GramSums
        The sums of the rows.
    rounding : float
        ε of the products in G. An error below what it leaves of wᵀGw is that rounding, never 0.
    """
    w = solution.weights
    about = held_out.centre or Centre.zero(*held_out.cross.shape)
    same = solution.centre is not None and np.array_equal(solution.centre, about.features)
    b = (solution.offset if same else solution.intercept + about.features @ w) - about.targets
    gram, diagonal = np.tril(held_out.gram), np.diag(held_out.gram)
    own = np.einsum("ij,i,ij->j", w, diagonal, w)
    quadratic = 2 * np.einsum("ij,ij->j", w, gram @ w) - own
    shift = held_out.features @ w
    squares = held_out.squares - 2 * np.einsum("ij,ij->j", w, held_out.cross) + quadratic
    squares += b * (2 * shift - 2 * held_out.targets + held_out.weight * b)
    return float(np.maximum(squares, rounding * own).mean() / held_out.weight)
