"""Which of many random features agree with the targets: alignment scores, and the distribution that maximises them.

    v_m = ‖Φ_mᵀ(Y − Ȳ)‖²                                   summed over training rows, candidate by candidate
    q   = argmax vᵀq  over the simplex,  N‖q − 1/N‖² ≤ ρ     (χ²-divergence from the uniform distribution)

q is sparse: with N = 20 000 candidates and ρ = 100 a few hundred are left. Weighting them by √q gives the kernel Σ q_m φ_m φ_mᵀ, which
depends on the targets and is not the kernel that the candidates approximate. Source: Das & Maity 2025; Sinha & Duchi 2016, §3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ntkdask import seeds, threads
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError, nearest
from ntkdask.features.base import require_components
from ntkdask.registry import register

WEIGHTINGS = ("sqrt", "sample", "uniform")
BLOCK_ROWS, BLOCK_COLUMNS = 512, 2048
"""One block of candidate features, made, summed and dropped while it is in cache (4 or 8 MiB)."""


@register("alignment")
@dataclass(frozen=True)
class Alignment:
    """How features are optimised: n_candidates N drawn by `sampling`, the radius rho, and what q is used for.

    weighting: "sqrt", every candidate with q > 0 times √q, the kernel of q itself; "sample", as many draws from q as the map has
    features of the kind; "uniform", the candidates with q > 0, all with the same weight, as the authors' released code does.
    sampling: the law of the ReLU candidates: "gaussian", "spherical" or "gibbs" (leverage scores); step candidates are the same
    under all.
    Raises InputError for unknown names, N < 1, rho < 0. Source: Das & Maity 2025, "Proposed Method" (N = 20 000).
    """

    n_candidates: int = 20_000
    rho: float = 100.0
    weighting: str = "sqrt"
    sampling: str = "spherical"

    def __post_init__(self) -> None:
        require_components(self.n_candidates, "n_candidates")
        _require_radius(self.rho)
        for name, allowed in (("weighting", WEIGHTINGS), ("sampling", ("gaussian", "spherical", "gibbs"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), allowed)}")

    def choose(self, scores: np.ndarray, most: int, seed: int, path: seeds.Path) -> Chosen:
        """At most `most` of the candidates with these scores (N,), and the factor of each feature; randomness by (seed, path).

        Σ factor² = 1: with factors 1/√N for all of them the features are the plain ones.
        """
        q = chi_square_weights(scores, self.rho, None if self.weighting == "sample" else most)
        if self.weighting == "sample":
            places = np.searchsorted(np.cumsum(q), seeds.uniforms(seed, path, most), side="right")
            last = np.flatnonzero(q)[-1]  # rounding: the cumulative sum may end below 1
            columns, counts = np.unique(np.minimum(places, last), return_counts=True)
            return Chosen(columns, np.sqrt(counts / most))
        columns = np.flatnonzero(q)
        share = q[columns] if self.weighting == "sqrt" else np.full(columns.size, 1 / columns.size)
        return Chosen(columns, np.sqrt(share))


class Chosen(NamedTuple):
    """columns (k,) int64, ascending: which candidates; factors (k,) float64 > 0: what their features are multiplied by."""

    columns: np.ndarray
    factors: np.ndarray


def chi_square_weights(v: np.ndarray, rho: float, most: int | None = None) -> np.ndarray:
    """argmax vᵀq over q >= 0, Σq = 1, N‖q − 1/N‖² <= ρ: (N,) scores → (N,) float64 weights, exactly, by one sort.

    v descending, m_k and s_k² the mean and Σ(v − m_k)² of the k largest: λ_k = s_k/√((1+ρ)/N − 1/k) for k > N/(1+ρ),
    q_i = 1/k + (v_i − m_k)/λ_k on those k, 0 elsewhere, for the k with q_(k) >= 0 >= q_(k+1). ρ = 0 gives 1/N; when at least N/(1+ρ)
    scores tie at the maximum the weight is spread over those alone.
    most: where more than so many weights are positive ρ is raised until so many are (of ties, the first are kept).
    Raises InputError for scores that are not (N,) and finite, ρ < 0, most < 1. Source: Sinha & Duchi 2016, eq. 7; MATH.md §4.

    >>> chi_square_weights(np.array([0.0, 3.0, 1.0]), rho=0.0).round(3)
    array([0.333, 0.333, 0.333])
    >>> chi_square_weights(np.array([0.0, 3.0, 1.0]), rho=2.0)
    array([0., 1., 0.])
    """
    v = _require_scores(v)
    _require_radius(rho)
    n = v.size
    if most is not None:
        require_components(most, "most")
    order = np.argsort(-v, kind="stable")
    # q does not depend on the origin or the unit of v
    fallen = v[order] - v[order[0]]
    fallen /= -fallen[-1] if fallen[-1] < 0 else 1.0
    least = n / (1.0 + rho)
    ties = int((fallen == 0).sum())
    if rho == 0:
        q = np.full(n, 1 / n)
    elif ties >= least:
        q = np.full(ties, 1 / ties)
    else:
        q = _water_filled(fallen, rho)
    if most is not None and np.count_nonzero(q) > most:
        q = _most_concentrated(fallen, most)
    out = np.zeros(n)
    out[order[: q.size]] = q / q.sum()
    return out


def _water_filled(fallen: np.ndarray, rho: float) -> np.ndarray:
    """The weights of the k largest scores, descending, at the k where they end: fewer than N/(1+ρ) tie at the top."""
    n = fallen.size
    k = np.arange(1, n + 1)
    means = np.cumsum(fallen) / k
    # Welford: s² from squares of differences, so that close scores keep their digits
    steps = np.zeros(n)
    steps[1:] = (k[1:] - 1) / k[1:] * (fallen[1:] - means[:-1]) ** 2
    spread = np.sqrt(np.cumsum(steps))
    room = (1.0 + rho) / n - 1.0 / k
    inside = (room > 0) & (spread > 0)
    # q_(k) >= 0, multiplied out by λ_k k; it holds up to the end of the support and nowhere after it
    fits = inside & (spread >= (means - fallen) * k * np.sqrt(np.maximum(room, 0)))
    last = int(np.flatnonzero(fits)[-1]) if fits.any() else int(np.flatnonzero(inside)[0])
    multiplier = spread[last] / math.sqrt(room[last])
    return np.maximum(1 / k[last] + (fallen[: last + 1] - means[last]) / multiplier, 0.0)


def _most_concentrated(fallen: np.ndarray, most: int) -> np.ndarray:
    """The weights at the smallest radius that leaves at most `most`: where the next one's weight is just 0."""
    top = fallen[:most]
    multiplier = most * (top.mean() - fallen[most])
    if multiplier <= 0:
        return np.full(most, 1 / most)
    return np.maximum(1 / most + (top - top.mean()) / multiplier, 0.0)


def add_scores(x: Array, weights: Array, targets: Array, sums: Array, step: bool) -> None:
    """sums += φ(x·weights)ᵀ·targets, with φ = relu or, for `step`, 1 where positive.

    x (b, d), weights (d, N) of x's dtype, targets (b, k) float64 (centred, times the rows' weights), sums (N, k) float64.
    Features exist one block at a time; products of a block of 512 rows are summed in x's dtype, blocks in float64.
    """
    xp = namespace(x)
    small = targets.astype(x.dtype)

    def columns(start: int) -> None:
        stop = min(start + BLOCK_COLUMNS, weights.shape[1])
        out = xp.empty((min(BLOCK_ROWS, x.shape[0]), stop - start), x.dtype)
        for first in range(0, x.shape[0], BLOCK_ROWS):
            rows = slice(first, min(first + BLOCK_ROWS, x.shape[0]))
            phi = out[: rows.stop - rows.start]
            xp.matmul(x[rows], weights[:, start:stop], out=phi)
            if step:
                xp.greater(phi, 0, out=phi)
            else:
                xp.maximum(phi, 0, out=phi)
            sums[start:stop] += phi.T @ small[rows]

    starts = range(0, weights.shape[1], BLOCK_COLUMNS)
    if is_device_array(x):
        for start in starts:
            columns(start)
    else:
        threads.on_threads(columns, starts)


def scores_bytes(n: int, n_candidates: int, n_targets: int, itemsize: int) -> int:
    """Peak bytes of `add_scores` on n rows beyond its arguments."""
    rows, wide = min(n, BLOCK_ROWS), min(n_candidates, BLOCK_COLUMNS)
    held = min(threads.current(), -(-n_candidates // BLOCK_COLUMNS))
    return held * itemsize * wide * (rows + 2 * n_targets) + n * n_targets * itemsize


def _require_scores(v: np.ndarray) -> np.ndarray:
    v = np.asarray(v, np.float64)
    if v.ndim != 1 or not v.size:
        raise InputError(f"scores have shape {v.shape}; expected (N,) with at least one candidate.")
    if not np.isfinite(v).all():
        raise InputError(
            f"{np.count_nonzero(~np.isfinite(v))} of {v.size} alignment scores are not finite. Scale the rows and targets."
        )
    return v


def _require_radius(rho: float) -> None:
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho < math.inf:
        raise InputError(f"rho is {rho!r}; expected a finite radius >= 0 (0 keeps every candidate alike).")
