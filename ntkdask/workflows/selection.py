"""Choosing alpha: the ways to do it, what their scores are called, and the best of a path of scores."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ntkdask.errors import InputError
from ntkdask.solvers.ridge import Ridge, Solution

SELECTION_SCORES = {"gcv": "GCV", "loo": "leave-one-out MSE", "kfold": "k-fold MSE", "holdout": "holdout MSE"}
"""The ways to choose alpha, and what reports call the score that each makes least."""
SELECTIONS = tuple(SELECTION_SCORES)


def score_name(selection: str) -> str:
    """What the scores of a selection are called.

    >>> score_name("loo")
    'leave-one-out MSE'
    """
    return SELECTION_SCORES[selection]


def flat_alphas(given: Any) -> tuple[float, ...]:
    """A number, or a flat sequence or array of numbers, as floats; InputError for text, bool, nested sequences and anything else."""
    single = isinstance(given, numbers.Real) or getattr(given, "ndim", None) == 0
    values = [given] if single else list(given) if isinstance(given, Sequence) or hasattr(given, "ndim") else None
    if values is None or isinstance(given, (str, bytes)) or getattr(given, "ndim", 1) > 1:
        raise InputError(f"alphas is {given!r}; expected a number or a list of numbers.")
    values = [v.item() if getattr(v, "ndim", None) == 0 else v for v in values]
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, numbers.Real)]
    if wrong:
        raise InputError(f"alphas is {given!r}; expected a number or a list of numbers, and {wrong[0]!r} is none.")
    return tuple(float(v) for v in values)


def score_path(
    alphas: Sequence[float], scores: Sequence[float], dimensions: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """A row for each alpha, ready for JSON: "alpha", "score" (smaller is better) and, where known, "effective_dimension"."""
    rows = [{"alpha": float(a), "score": float(s)} for a, s in zip(alphas, scores, strict=True)]
    for row, dimension in zip(rows, dimensions or [], strict=False):
        row["effective_dimension"] = float(dimension)
    return rows


def best_alpha(path: Sequence[dict[str, float]]) -> float:
    """The alpha of the smallest score; of equal ones the largest alpha."""
    finite = [row for row in path if np.isfinite(row["score"])]
    if not finite:
        raise InputError("no alpha has a finite score: every fit interpolates its rows. Use larger alphas.")
    return min(finite, key=lambda row: (row["score"], -row["alpha"]))["alpha"]


@dataclass(frozen=True, eq=False)
class KeptScores:
    """What is kept of choosing alpha beside the path.

    Parameters
    ----------
    scores : array (n_alphas, k)
        The score of every alpha for every target; smaller is better.
    squares : array (n, k, n_alphas) or None
        Squared leave-one-out errors of the rows, times their weights. None: none were asked for.
    """

    scores: np.ndarray
    squares: np.ndarray | None = None

    @classmethod
    def of_squares(cls, squares: np.ndarray, weight: float) -> KeptScores:
        """The leave-one-out scores of squared errors (n, k, n_alphas) of rows that weigh `weight` together."""
        return cls(squares.sum(axis=0).T / weight, squares)

    def best(self, alphas: Sequence[float], by_target: bool) -> list[float]:
        """The alpha of every target: its own best by_target, else the best of the mean for all."""
        scores = self.scores if by_target else np.tile(self.scores.mean(axis=1)[:, None], self.scores.shape[1])
        return [best_alpha(score_path(alphas, column.tolist())) for column in scores.T]


def columns_at(solve: Callable[[float], Any], alphas: Sequence[float], weights: str) -> Any:
    """One solution with the column of each target from `solve(alpha)` at its own alpha; `weights` names the field (m, k)."""
    found = {alpha: solve(alpha) for alpha in set(alphas)}
    first = found[alphas[0]]
    if len(found) == 1:
        return first
    columns: dict[str, Any] = {"alpha": np.asarray(alphas)}
    for name in (weights, "intercept", "offset"):
        if getattr(first, name, None) is not None:
            columns[name] = np.stack([getattr(found[a], name)[..., j] for j, a in enumerate(alphas)], axis=-1)
    return replace(first, **columns)


def choose(ridge: Ridge, alphas: Sequence[float], scores: Sequence[float]) -> tuple[Solution, list[dict[str, float]]]:
    """(solution at the best alpha, path of scores) from one factorisation."""
    path = score_path(alphas, scores, [ridge.effective_dimension(a) for a in alphas])
    return ridge.solve(best_alpha(path)), path


def require_kept(by_target: bool, keep_errors: bool, selection: str) -> None:
    """InputError where scores of every target, or the errors of every row, are asked for and the selection has none."""
    if by_target and selection not in ("gcv", "loo", "auto"):
        raise InputError(f'an alpha for every target is chosen by "gcv" or "loo", not by selection={selection!r}.')
    if keep_errors and selection != "loo":
        raise InputError(f'leave-one-out errors are kept by selection="loo", and selection={selection!r} makes none.')


def stored_options(options: Any) -> dict[str, Any]:
    """The options as a fingerprint holds them, without those that only fits in memory have."""
    return {name: value for name, value in asdict(options).items() if name not in ("by_target", "keep_errors")}
