"""Choosing alpha: the ways to do it, what their scores are called, and the best of a path of scores."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
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


def choose(ridge: Ridge, alphas: Sequence[float], scores: Sequence[float]) -> tuple[Solution, list[dict[str, float]]]:
    """(solution at the best alpha, path of scores) from one factorisation."""
    path = score_path(alphas, scores, [ridge.effective_dimension(a) for a in alphas])
    return ridge.solve(best_alpha(path)), path
