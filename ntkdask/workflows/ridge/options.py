"""Options of ridge regression on features: a grid of alphas, how to choose among them, with which factorisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkdask.errors import InputError, nearest
from ntkdask.workflows.selection import SELECTIONS, flat_alphas, require_kept, score_name

SOLVERS = ("auto", "eigh", "tridiagonal", "cholesky")


@dataclass(frozen=True)
class RidgeOptions:
    """Options of the solver of ridge regression on features.

    Parameters
    ----------
    alphas : tuple of float
        At least one, all positive and finite.
    fit_intercept : bool
        Whether to fit an intercept, which is not penalised.
    selection : {"gcv", "loo", "kfold", "holdout"}
        How one of several alphas is chosen.
    solver : {"auto", "eigh", "tridiagonal", "cholesky"}
        The factorisation. "tridiagonal" has no eigenvectors, so it cannot serve "loo"; "cholesky" has no spectrum, so it serves
        one alpha, or folds. Where rows do not outnumber features, "auto" and "tridiagonal" take the whole spectrum, as "eigh" does.
    by_target : bool
        Whether every target has an alpha of its own, by "gcv" or "loo"; in memory.
    keep_errors : bool
        Whether the squared leave-one-out errors of the rows are kept; in memory.

    Raises
    ------
    InputError
        For values that are unknown or do not go together.
    """

    alphas: tuple[float, ...] = (1.0,)
    fit_intercept: bool = True
    selection: str = "gcv"
    solver: str = "auto"
    by_target: bool = False
    keep_errors: bool = False

    def __post_init__(self) -> None:
        alphas = flat_alphas(self.alphas)
        object.__setattr__(self, "alphas", alphas)
        if not alphas or not all(a > 0 and np.isfinite(a) for a in alphas):
            raise InputError(f"alphas are {alphas}; expected at least one, all positive and finite.")
        for name, known in (("selection", SELECTIONS), ("solver", SOLVERS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}")
        require_kept(self.by_target, self.keep_errors, self.selection)
        if (self.by_target or self.keep_errors) and self.solver == "cholesky":
            raise InputError(
                'scores of every target come from the spectrum, not from solver="cholesky": use solver="eigh".'
            )
        if self.solver == "cholesky" and len(alphas) > 1 and self.selection in ("gcv", "loo"):
            raise InputError(
                f'solver="cholesky" has no spectrum, so it cannot choose among {len(alphas)} alphas by {self.selection}. '
                'Use solver="eigh" (or "auto"), selection="kfold" or "holdout", or one alpha.'
            )
        if self.solver == "tridiagonal" and self.leaves_one_out:
            raise InputError(
                'solver="tridiagonal" forms no eigenvectors, which leave-one-out needs. Use solver="eigh" or "auto".'
            )

    def n_groups(self, n_folds: int) -> int:
        """The number of groups into which rows are dealt for choosing alpha; 1 where none are held out."""
        return 1 if len(self.alphas) == 1 else {"kfold": n_folds, "holdout": 2}.get(self.selection, 1)

    @property
    def score_name(self) -> str:
        """Name of the scores that choose alpha."""
        return score_name(self.selection)

    def held_out(self, n_groups: int) -> Sequence[int]:
        """The groups that are held out in turn: all of them for "kfold", the last one for "holdout"."""
        return range(n_groups) if self.selection == "kfold" else [n_groups - 1]

    @property
    def cuts(self) -> bool:
        """Whether alpha is chosen by held-out groups of rows."""
        return self.selection in ("kfold", "holdout") and len(self.alphas) > 1

    @property
    def leaves_one_out(self) -> bool:
        """Whether alpha is chosen by leave-one-out, which takes one more pass over the rows."""
        return self.selection == "loo" and len(self.alphas) > 1
