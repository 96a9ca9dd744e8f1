"""What ridge regression on features solves for: a grid of alphas, how to choose among them, with which factorisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkdask.errors import InputError, nearest

SELECTIONS = ("gcv", "loo", "kfold", "holdout")


SOLVERS = ("auto", "eigh", "tridiagonal", "cholesky")


@dataclass(frozen=True)
class RidgeOptions:
    """What to solve for: a grid of alphas > 0, how to choose among them, and with which factorisation."""

    alphas: tuple[float, ...] = (1.0,)
    fit_intercept: bool = True
    selection: str = "gcv"
    solver: str = "auto"

    def __post_init__(self) -> None:
        alphas = tuple(float(a) for a in np.atleast_1d(np.asarray(self.alphas, dtype=float)))
        object.__setattr__(self, "alphas", alphas)
        if not alphas or not all(a > 0 and np.isfinite(a) for a in alphas):
            raise InputError(f"alphas are {alphas}; expected at least one, all positive and finite.")
        for name, known in (("selection", SELECTIONS), ("solver", SOLVERS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}")
        if self.solver == "cholesky" and len(alphas) > 1 and self.selection in ("gcv", "loo"):
            raise InputError(
                f'solver="cholesky" has no spectrum, so it cannot choose among {len(alphas)} alphas by {self.selection}. '
                'Use solver="eigh" (or "auto"), selection="kfold" or "holdout", or one alpha.'
            )
        if self.solver == "tridiagonal" and self.leaves_one_out:
            raise InputError(
                'solver="tridiagonal" forms no eigenvectors, which leave-one-out needs. Use solver="eigh" or "auto".'
            )

    @property
    def uses_cholesky(self) -> bool:
        """One alpha needs no spectrum: Cholesky takes a twentieth of the time."""
        return self.solver == "cholesky" or (self.solver == "auto" and len(self.alphas) == 1)

    def n_groups(self, n_folds: int) -> int:
        """Into how many groups the rows are dealt for choosing alpha: 1 where there is nothing to choose or no need."""
        return 1 if len(self.alphas) == 1 else {"kfold": n_folds, "holdout": 2}.get(self.selection, 1)

    @property
    def score_name(self) -> str:
        """What the scores that choose alpha are called."""
        names = {"gcv": "GCV", "loo": "leave-one-out MSE", "kfold": "k-fold MSE", "holdout": "holdout MSE"}
        return names[self.selection]

    def held_out(self, n_groups: int) -> Sequence[int]:
        """Which of the groups are held out in turn: all of them, or (holdout) the last one."""
        return range(n_groups) if self.selection == "kfold" else [n_groups - 1]

    @property
    def cuts(self) -> bool:
        """Whether alpha is chosen by held-out rows."""
        return self.selection in ("kfold", "holdout") and len(self.alphas) > 1

    @property
    def leaves_one_out(self) -> bool:
        """Whether the streamed pass of leave-one-out is needed: there is something to choose."""
        return self.selection == "loo" and len(self.alphas) > 1
