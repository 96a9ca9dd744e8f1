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
    """How random features are chosen by their agreement with the targets.

    N candidates are drawn, each gets a score, and the distribution q that maximises the mean score within a χ²-ball of radius ρ
    around the uniform one weighs them (`chi_square_weights`).

    Parameters
    ----------
    n_candidates : int
        N >= 1, how many candidates are drawn; the paper takes 20 000.
    rho : float
        Radius ρ >= 0, finite. 0 keeps every candidate with the same weight; a larger radius leaves fewer candidates.
    weighting : {"sqrt", "sample", "uniform"}
        What q is used for. "sqrt": every candidate with q > 0 is multiplied by √q, which gives the kernel of q itself.
        "sample": as many draws from q as the map has features of the kind. "uniform": the candidates with q > 0, all with the
        same weight, as in the authors' released code. Where more candidates have a weight than the map has features, as many are
        drawn, evenly spread, from these weights, whatever the weighting: the kernel's mean is the same, and ρ keeps its meaning.
    sampling : {"gaussian", "spherical", "gibbs"}
        The law of the ReLU candidates; "spherical" and "gibbs" sample by leverage scores. It does not change the step candidates.

    Raises
    ------
    InputError
        For unknown names, N < 1 and ρ < 0.

    References
    ----------
    Das & Maity 2025, "Proposed Method".
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
        """Choose at most `most` of the candidates with these scores (N,), and the factor of each chosen feature.

        Random draws follow from (seed, path). Σ factor² = 1: with a factor of 1/√N for every candidate the features would be those
        of the plain map.
        """
        q = chi_square_weights(scores, self.rho)
        if self.weighting == "uniform":
            q = (q > 0) / np.count_nonzero(q)
        if self.weighting == "sample":
            places = np.searchsorted(np.cumsum(q), seeds.uniforms(seed, path, most), side="right")
            last = np.flatnonzero(q)[-1]  # rounding: the cumulative sum may end below 1
            columns, counts = np.unique(np.minimum(places, last), return_counts=True)
            return Chosen(columns, np.sqrt(counts / most))
        columns = np.flatnonzero(q)
        if columns.size <= most:
            return Chosen(columns, np.sqrt(q[columns]))
        # at even steps through the candidates in random order: each is drawn most·q_m times, rounded up or down
        order = columns[seeds.permutation(seed, (*path, "order"), columns.size)]
        steps = (np.arange(most) + seeds.uniforms(seed, (*path, "start"), 1)) / most
        places = np.minimum(np.searchsorted(np.cumsum(q[order]), steps, side="right"), columns.size - 1)
        columns, counts = np.unique(order[places], return_counts=True)
        return Chosen(columns, np.sqrt(counts / most))


class Chosen(NamedTuple):
    """The chosen candidates.

    Parameters
    ----------
    columns : array (k,), int64
        Which candidates, ascending.
    factors : array (k,), float64
        Positive numbers that their features are multiplied by.
    """

    columns: np.ndarray
    factors: np.ndarray


def chi_square_weights(v: np.ndarray, rho: float) -> np.ndarray:
    """The distribution that maximises the mean score: argmax vᵀq over q >= 0, Σq = 1, N‖q − 1/N‖² <= ρ, exactly, by one sort.

    With v descending, and m_k and s_k² the mean and Σ(v − m_k)² of the k largest scores: λ_k = s_k/√((1+ρ)/N − 1/k) for k >
    N/(1+ρ), and q_i = 1/k + (v_i − m_k)/λ_k on those k scores, 0 elsewhere, for the k with q_(k) >= 0 >= q_(k+1). ρ = 0 gives
    1/N. Where at least N/(1+ρ) scores tie at the maximum, they alone share the weight.

    Parameters
    ----------
    v : array (N,)
        Scores, finite.
    rho : float
        Radius ρ >= 0, finite.

    Returns
    -------
    array (N,), float64
        Weights that sum to 1.

    Raises
    ------
    InputError
        For scores that are not (N,) or not finite, and ρ < 0.

    References
    ----------
    Sinha & Duchi 2016, eq. 7; MATH.md §4.

    >>> chi_square_weights(np.array([0.0, 3.0, 1.0]), rho=0.0).round(3)
    array([0.333, 0.333, 0.333])
    >>> chi_square_weights(np.array([0.0, 3.0, 1.0]), rho=2.0)
    array([0., 1., 0.])
    """
    v = _require_scores(v)
    _require_radius(rho)
    n = v.size
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
    out = np.zeros(n)
    out[order[: q.size]] = q / q.sum()
    return out


def _water_filled(fallen: np.ndarray, rho: float) -> np.ndarray:
    """The weights of the k largest scores, descending, where k is how many are positive.

    Needs fewer than N/(1+ρ) ties at the maximum.
    """
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


def add_scores(x: Array, weights: Array, targets: Array, sums: Array, step: bool) -> None:
    """Add φ(x·weights)ᵀ·targets to `sums`, with φ = relu or, for `step`, the indicator of a positive number.

    Only one block of features exists at a time. The products of a block of 512 rows are summed in x's dtype, the blocks in
    float64.

    Parameters
    ----------
    x : array (b, d), float32 or float64
        Rows.
    weights : array (d, N)
        Directions of the candidates, of x's dtype.
    targets : array (b, k), float64
        Centred targets, multiplied by the rows' weights.
    sums : array (N, k), float64
        Receives the products.
    step : bool
        Whether the candidates are step features.
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
