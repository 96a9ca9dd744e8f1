"""Low-rank preconditioners K ≈ F Fᵀ, F (n, r): Nyström from landmarks or a sketch, and (randomly) pivoted partial Cholesky.

`LowRankPreconditioner` applies (F Fᵀ + αI)⁻¹ and its square roots for every α from one thin decomposition of F. Which factor:
landmarks read r columns once; the sketch takes one product with r vectors and is the most accurate for its rank; pivoted Cholesky
reads r columns in a few rounds and chooses them well (greedily, or at random with probability ∝ the residual's diagonal, which is
robust where greedy picks outliers).

An operator is symmetric positive semidefinite with `.shape`, `@`, and for all but the sketch `.columns(indices)` → (n, b) and
`.diagonal()` → (n,); a dense matrix will do. Rows scaled to zero are never chosen. Float32 noise below zero is dropped. All is
float64, on the operator's side for CuPy matrices. Seeds: `ntkdask.seeds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import lapack, seeds
from ntkdask.arrays import Array, namespace, to_host
from ntkdask.errors import InputError

BLOCK = 64
"""Columns that a pivoted Cholesky asks for at a time."""

PIVOT_SHARE = 0.1
"""Only pivots of a block above this part of its largest are taken: the others are nearly copies of those, and would waste rank."""


@dataclass(frozen=True)
class LowRankPreconditioner:
    """M(α) = F Fᵀ + αI = U Σ² Uᵀ + αI for every α: basis U (n, r) orthonormal, eigenvalues Σ² (r,) descending, on the host.

    At α = 0 the smallest kept eigenvalue takes the place of α, so that M stays definite. Each application costs 4·n·r·k flops.
    """

    basis: Array
    eigenvalues: np.ndarray

    @classmethod
    def of(cls, factor: Array) -> LowRankPreconditioner:
        """The preconditioner of F (n, r): QR and an SVD of the small factor; directions that are rounding are dropped.

        Memory: F, its copy in QR and U, `preconditioner_bytes`.
        """
        q, small = _orthonormal(factor)
        left, values, _ = np.linalg.svd(to_host(small))
        kept = values > max(factor.shape) * np.finfo(float).eps * (values[0] if values.size else 0.0)
        return cls(q @ namespace(q).asarray(np.ascontiguousarray(left[:, : values.size][:, kept])), values[kept] ** 2)

    def solve(self, x: Array, alpha: float) -> Array:
        """M⁻¹·x for x (n, k) or (n,)."""
        return self._power(x, alpha, -1.0)

    def root(self, x: Array, alpha: float) -> Array:
        """M^(½)·x."""
        return self._power(x, alpha, 0.5)

    def inverse_root(self, x: Array, alpha: float) -> Array:
        """M^(−½)·x."""
        return self._power(x, alpha, -0.5)

    def _power(self, x: Array, alpha: float, power: float) -> Array:
        if not self.eigenvalues.size:
            return x * alpha**power if alpha > 0 else x.copy()
        ridge = alpha if alpha > 0 else float(self.eigenvalues[-1])
        change = namespace(x).asarray((self.eigenvalues + ridge) ** power - ridge**power)
        inner = self.basis.T @ x
        return ridge**power * x + self.basis @ (change * inner.T).T


def _orthonormal(factor: Array) -> tuple[Array, Array]:
    """(Q (n, r), R (r, r)) of F, by Cholesky QR twice: three products in place of Householder's panels.

    Where F is too close to rank deficiency for it, by Householder QR. Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya 2015.
    """
    if namespace(factor) is not np or factor.shape[1] == 0:
        return namespace(factor).linalg.qr(factor)
    q, triangle = np.array(factor, order="C"), np.eye(factor.shape[1])
    for _ in range(2):
        gram = q.T @ q
        try:
            lower = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            return np.linalg.qr(factor)
        # in place, on the transposes: L⁻¹qᵀ
        lapack.trsm(lower, q.T)
        triangle = lower.T @ triangle
    # after one round ‖QᵀQ − I‖ is about κ(F)²ε: the second mends what is well below 1
    return (q, triangle) if np.linalg.norm(gram - np.eye(len(gram)), 2) < 0.1 else np.linalg.qr(factor)


def preconditioner_bytes(n: int, rank: int) -> int:
    """Peak bytes of building and decomposing a factor of this rank: F, a second (n, r) and U, and the (r, r) parts."""
    return 8 * (3 * n * rank + 4 * rank * rank)


def rank_for_bytes(n: int, n_bytes: int, most: int | None = None) -> int:
    """The largest rank ≤ min(n, most) whose `preconditioner_bytes` fit; 0 where rank 1 does not."""
    low, high = 0, n if most is None else min(n, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if preconditioner_bytes(n, middle) <= n_bytes else (low, middle - 1)
    return low


def landmark_factor(operator: Any, rank: int, seed: int = 0) -> Array:
    """Nyström from `rank` rows drawn uniformly among those with a positive diagonal: F = K_:J K_JJ^(−½).

    Returns (n, r), r ≤ rank where K_JJ is deficient (duplicates). Source: Williams & Seeger 2001.
    """
    n = _checked(operator, rank)
    order = seeds.permutation(seed, ("nystrom", "landmarks"), n)
    chosen = np.sort(order[_diagonal(operator)[order] > 0][:rank])
    columns = _columns(operator, chosen)
    return _nystrom(columns, columns[namespace(columns).asarray(chosen)])


def sketch_factor(operator: Any, rank: int, seed: int = 0) -> Array:
    """Randomised Nyström: F = Y (ΩᵀY)^(−½), Y = K Ω, Ω (n, rank) an orthonormal basis of a Gaussian matrix. One product.

    Source: Frangella, Tropp & Udell 2023, Algorithm 2.1 (their shift against rounding is here a cut of eigenvalues).
    """
    n = _checked(operator, rank)
    gaussian = seeds.normals(seed, ("nystrom", "sketch"), n, min(rank, n))
    omega = namespace(operator).linalg.qr(namespace(operator).asarray(gaussian))[0]
    image = operator @ omega
    return _nystrom(image, omega.T @ image)


def _nystrom(image: Array, core: Array) -> Array:
    """F = image·core^(−½) on the eigenvectors of the core (r, r) that are not rounding.

    The rounding is that of float32 where negative eigenvalues show it.
    """
    values, vectors = np.linalg.eigh((to_host(core) + to_host(core).T) / 2)
    floor = max(values.size * np.finfo(float).eps * values[-1], -2 * values[0]) if values.size else 0.0
    kept = values > floor
    return image @ namespace(image).asarray(np.ascontiguousarray(vectors[:, kept] / np.sqrt(values[kept])))


def pivoted_cholesky(
    operator: Any, rank: int, *, seed: int | None = None, block: int = BLOCK, tolerance: float = 1e-12
) -> Array:
    """Partial Cholesky K ≈ F Fᵀ with `block` pivots a round, chosen by the diagonal of the residual of K; 2·n·r² flops.

    Near copies within a round are dropped. It ends early when what is left of K is noise.

    Parameters
    ----------
    operator : object
        K, see the module.
    rank : int
        The largest rank.
    seed : int, optional
        None: greedy, the largest entries of the diagonal. A seed: at random, with probability ∝ the entry (RPCholesky).
    block : int
        Pivots of a round.
    tolerance : float
        It also ends when the trace that is left is below tolerance·tr K.

    Returns
    -------
    array (n, r), float64
        F, r <= rank.

    References
    ----------
    Harbrecht, Peters & Schneider 2012; Chen, Epperly, Tropp & Webber 2023, Algorithm 2; Dong, Chen,
    Martinsson & Pearce 2025 for dropping pivots within a block.
    """
    n = _checked(operator, rank)
    left = np.maximum(_diagonal(operator), 0.0)
    trace, done, turn = left.sum(), 0, 0
    xp = namespace(operator)
    factor = xp.empty((n, min(rank, n)))
    while done < factor.shape[1] and left.sum() > tolerance * trace:
        width = min(block, factor.shape[1] - done)
        pivots = _pick(left, width, seed, turn)
        turn += 1
        columns = _columns(operator, pivots)
        rows = xp.asarray(pivots)
        columns = columns - factor[:, :done] @ factor[rows, :done].T
        kept, triangle = _block_factor(to_host(columns[rows]), PIVOT_SHARE * left[pivots].max())
        # a block without a pivot is noise, of float32 columns say, and would come up again
        left[pivots[kept] if kept.size else pivots] = 0.0
        if not kept.size:
            continue
        part = columns[:, xp.asarray(kept)]
        part = part @ xp.asarray(np.ascontiguousarray(_inverse_of_lower(triangle).T))
        factor[:, done : done + kept.size] = part
        done += kept.size
        was_zero = left == 0.0
        left = np.where(was_zero, 0.0, np.maximum(left - to_host(xp.einsum("ij,ij->i", part, part)), 0.0))
    return factor[:, :done]


def _pick(left: np.ndarray, width: int, seed: int | None, turn: int) -> np.ndarray:
    """Up to `width` distinct indices with left > 0: the largest, or at random with probability ∝ left."""
    positive = np.flatnonzero(left > 0)
    if seed is None:
        return positive[np.argsort(-left[positive], kind="stable")[:width]]
    # the smallest of exponentials with rates `left`: sampling without replacement
    clocks = -np.log(seeds.uniforms(seed, ("pivots",), left.size, turn))[positive] / left[positive]
    return positive[np.argsort(clocks, kind="stable")[:width]]


def _block_factor(core: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """(kept indices, L): pivoted Cholesky of the block's own residual, as long as pivots exceed `least` and rounding."""
    floor = max(least, len(core) * np.finfo(float).eps * max(float(np.diagonal(core).max()), 0.0))
    if not np.diagonal(core).max() > floor:
        return np.empty(0, np.int64), np.empty((0, 0))
    triangle = np.array(core, order="F")
    order, rank = lapack.pstrf(triangle, floor)
    return order[:rank], np.tril(triangle[:rank, :rank])


def _inverse_of_lower(triangle: np.ndarray) -> np.ndarray:
    inverse = np.eye(len(triangle), order="F")
    lapack.trsm(triangle, inverse)
    return inverse


def _checked(operator: Any, rank: int) -> int:
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0 or rank < 1:
        raise InputError(
            f"preconditioner: rank {rank} of an operator of shape {shape}; give (n, n) with n > 0, and rank >= 1."
        )
    return int(shape[0])


def _diagonal(operator: Any) -> np.ndarray:
    return to_host(operator.diagonal()).astype(np.float64)


def _columns(operator: Any, indices: np.ndarray) -> Array:
    """(n, b) float64 columns of an operator that has `.columns`, or of a dense matrix."""
    if hasattr(operator, "columns"):
        return operator.columns(indices)
    return operator[:, namespace(operator).asarray(indices)].astype(np.float64)
