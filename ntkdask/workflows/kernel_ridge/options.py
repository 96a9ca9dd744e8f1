"""What kernel ridge solves for: a grid of alphas, how to choose among them, and how to solve."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np

from ntkdask.errors import InputError, nearest
from ntkdask.workflows.selection import SELECTIONS, flat_alphas, require_kept

SOLVERS = ("auto", "eigh", "cholesky", "tiled_cholesky", "cg")
DENSE = ("eigh", "cholesky")
"""Solvers that hold the matrix in one task."""
PROBES = 8
"""Random right-hand sides of the stochastic trace in GCV."""


@dataclass(frozen=True)
class KernelRidgeOptions:
    """A grid of alphas >= 0, how to choose among them, and how to solve.

    Parameters
    ----------
    alphas : number or sequence of numbers
        Ridges on the unnormalised matrix, none negative.
    fit_intercept : bool
        Whether an intercept is fitted, not penalised.
    selection : str
        "gcv", "loo", "kfold" or "holdout"; "auto" is GCV where the matrix is in one memory, else a holdout.
    solver : str
        "eigh" and "cholesky" hold the matrix in one task, "tiled_cholesky" and "cg" (preconditioned conjugate gradients) work on its
        stored tiles; "auto" takes the cheapest that fits.
    tolerance : float
        Relative residual at which conjugate gradients stop.
    max_iterations : int
        Of conjugate gradients.
    by_target : bool
        Whether every target has an alpha of its own, by "gcv" or "loo"; in memory.
    keep_errors : bool
        Whether the squared leave-one-out errors of the rows are kept; in memory.

    Raises
    ------
    InputError
        For values out of range, and for a selection that the solver cannot score.
    """

    alphas: tuple[float, ...] = (1.0,)
    fit_intercept: bool = True
    selection: str = "auto"
    solver: str = "auto"
    tolerance: float = 1e-6
    max_iterations: int = 1000
    by_target: bool = False
    keep_errors: bool = False

    def __post_init__(self) -> None:
        alphas = flat_alphas(self.alphas)
        object.__setattr__(self, "alphas", alphas)
        if not alphas or not all(a >= 0 and np.isfinite(a) for a in alphas):
            raise InputError(f"alphas are {self.alphas}; expected at least one, none negative, all finite.")
        for name, value, names in (
            ("selection", self.selection, ("auto", *SELECTIONS)),
            ("solver", self.solver, SOLVERS),
        ):
            if value not in names:
                raise InputError(f"unknown {name} {value!r}{nearest(str(value), names)}")
        if not isinstance(self.tolerance, numbers.Real) or not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance!r}, expected a number between 0 and 1, such as 1e-6.")
        whole = isinstance(self.max_iterations, numbers.Integral) and not isinstance(self.max_iterations, bool)
        if not whole or self.max_iterations < 1:
            raise InputError(f"max_iterations is {self.max_iterations!r}, expected an integer >= 1.")
        require_kept(self.by_target, self.keep_errors, self.selection)
        if (self.by_target or self.keep_errors) and self.solver not in ("auto", "eigh"):
            raise InputError(
                f'scores of every target come from the spectrum, not from solver={self.solver!r}: use solver="eigh".'
            )
        if self.chooses and self.solver != "auto" and self.selection not in (*self.scores_of(self.solver), "auto"):
            raise InputError(
                f"solver={self.solver!r} cannot choose among {len(alphas)} alphas by {self.selection!r}: no task holds its matrix. "
                f'Use selection {" or ".join(map(repr, self.scores_of(self.solver)))}, solver="eigh", or one alpha.'
            )

    @property
    def chooses(self) -> bool:
        """Whether there are several alphas."""
        return len(self.alphas) > 1

    @staticmethod
    def scores_of(solver: str) -> tuple[str, ...]:
        """Selections that a solver can score: leave-one-out needs the matrix in one memory, GCV that or a stochastic trace."""
        return SELECTIONS if solver in DENSE else ("gcv", "kfold", "holdout")

    def selection_of(self, solver: str) -> str:
        """How alpha is chosen with that solver."""
        if self.selection != "auto":
            return self.selection
        return "gcv" if solver in DENSE else "holdout"

    def n_groups(self, solver: str, n_folds: int) -> int:
        """Into how many groups the rows are dealt: 1 where nothing is chosen, or nothing held out."""
        return {"kfold": n_folds, "holdout": 2}.get(self.selection_of(solver), 1) if self.chooses else 1

    def n_fits(self, solver: str, n_folds: int) -> int:
        """Factorisations, or solves, over the whole path of alphas; one eigendecomposition serves all."""
        selection = self.selection_of(solver)
        if solver == "eigh":
            return 1
        if solver == "cholesky" and self.chooses and selection in ("gcv", "loo"):
            return 3 * len(self.alphas) + 1  # the inverse takes twice the factorisation's flops
        held = {"kfold": n_folds, "holdout": 1}.get(selection, 0)
        return (len(self.alphas) * max(held, 1) + (held > 0)) if self.chooses else 1
