"""The solvers of kernel ridge: in one task that holds the matrix, or on its stored tiles.

`solve_in_memory` works on a matrix in memory, `solve_stored` on tiles: the dense solvers as one task with a host's threads, tiled
Cholesky and conjugate gradients through `path`. The problem itself is in `solvers/dual_problem.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.arrays import Array, to_host
from ntkdask.cache import shared
from ntkdask.execution.site import Site
from ntkdask.matrices.operator import StoredKernel
from ntkdask.solvers.dual import DualEigh
from ntkdask.solvers.dual_cholesky import DualCholesky
from ntkdask.solvers.dual_problem import DualSolution
from ntkdask.states import load_state, save_state
from ntkdask.workflows.kernel_ridge.gather import Gathered, Labels
from ntkdask.workflows.kernel_ridge.options import DENSE, KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import DualFit, solve_path
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan
from ntkdask.workflows.kernel_ridge.systems import DenseGradients, Factors, Gradients
from ntkdask.workflows.selection import KeptScores, best_alpha, columns_at, score_path

SPECTRUM_POINTS = 200
"""Eigenvalues that a report draws, at most."""


def solve_in_memory(matrix: Array, labels: Labels, options: KernelRidgeOptions, plan: KernelRidgePlan) -> DualFit:
    """Fit on a symmetric matrix (n, n) that was computed in the plan's dtype; it is consumed."""
    if plan.solver == "cg":
        return solve_path(DenseGradients(matrix, options, plan.rank), labels, options, plan.solver)
    fit = _by_spectrum if plan.solver == "eigh" else _by_cholesky
    return fit(matrix, labels, options, plan.dtype)


def _by_spectrum(matrix: Array, labels: Labels, options: KernelRidgeOptions, dtype: str) -> DualFit:
    """Every alpha and every held-out group from one eigendecomposition."""
    eigh = DualEigh.factorise(
        matrix,
        labels.targets,
        labels.weights,
        options.fit_intercept,
        overwrite=matrix.dtype.name == "float64",
        data_dtype=dtype,
    )
    facts = {"spectrum": _drawn(eigh.eigenvalues), "smallest_alpha": eigh.smallest_alpha}
    if options.by_target or options.keep_errors:
        return _by_target(eigh, options, facts)
    if not options.chooses:
        return DualFit(eigh.solve(options.alphas[0]), [], facts)
    selection = options.selection_of("eigh")
    if selection == "gcv":
        scores = [eigh.gcv(a) for a in options.alphas]
    elif selection == "loo":
        scores = eigh.leave_one_out_path(options.alphas).tolist()
    else:
        groups, held = labels.groups(), labels.held_out(selection)
        scores = [float(np.mean([eigh.held_out_error(groups, a, [g]) for g in held])) for a in options.alphas]
    path = score_path(options.alphas, scores, [eigh.effective_dimension(a) for a in options.alphas])
    return DualFit(eigh.solve(best_alpha(path)), path, facts)


def _by_target(eigh: DualEigh, options: KernelRidgeOptions, facts: dict[str, Any]) -> DualFit:
    """Every target by its own scores, or all by their mean; the scores, and the errors of the rows, are kept."""
    if options.selection_of("eigh") == "loo":
        weight = float(np.sum(eigh.problem.scale**2))
        kept = KeptScores.of_squares(eigh.leave_one_out_squares(options.alphas), weight)
    else:
        kept = KeptScores(np.array([eigh.gcv_by_target(a) for a in options.alphas]))
    alphas = kept.best(options.alphas, options.by_target)
    dimensions = [eigh.effective_dimension(a) for a in options.alphas]
    path = score_path(options.alphas, kept.scores.mean(axis=1).tolist(), dimensions)
    return DualFit(columns_at(eigh.solve, alphas, "coefficients"), path, facts, kept)


def _by_cholesky(matrix: Array, labels: Labels, options: KernelRidgeOptions, dtype: str) -> DualFit:
    """A factorisation per alpha; GCV and leave-one-out from its inverse, folds by factorisations without them."""

    def factorised(alpha: float, weights: np.ndarray | None, last: bool = False) -> DualCholesky:
        return DualCholesky.factorise(
            matrix,
            labels.targets,
            alpha,
            weights,
            options.fit_intercept,
            overwrite=last and matrix.dtype.name == "float64",
            data_dtype=dtype,
        )

    if not options.chooses:
        return DualFit(factorised(options.alphas[0], labels.weights, last=True).solution(), [], {})
    selection = options.selection_of("cholesky")
    if selection in ("gcv", "loo"):
        scores = [factorised(a, labels.weights).scores()[selection == "loo"] for a in options.alphas]
    else:
        held = labels.held_out(selection)
        scores = [
            float(np.mean([_held_out(matrix, labels, g, factorised(a, labels.without(g)).solution()) for g in held]))
            for a in options.alphas
        ]
    path = score_path(options.alphas, scores)
    return DualFit(factorised(best_alpha(path), labels.weights, last=True).solution(), path, {})


def _held_out(matrix: Array, labels: Labels, group: int, solution: DualSolution) -> float:
    """Mean squared error on a group of a solution without it."""
    rows = labels.rows(group)
    return labels.error(group, to_host(solution.predict(matrix[rows].astype("float64"))))


def _drawn(values: np.ndarray) -> list[list[float]]:
    """[rank, eigenvalue] pairs, descending, thinned geometrically."""
    descending = to_host(values)[::-1]
    places = np.unique(np.geomspace(1, max(1, descending.size), SPECTRUM_POINTS).astype(int)) - 1
    return [[int(p) + 1, float(descending[p])] for p in places if p < descending.size]


@dataclass(frozen=True, eq=False)
class _DenseTask:
    """Read the whole matrix and fit, alone on its worker; store the solution and return its address."""

    url: str
    gathered: Gathered
    options: KernelRidgeOptions
    plan: KernelRidgePlan
    states: str

    def __call__(self, tile: int) -> dict[str, Any]:
        # alone on its worker: it may need the memory of the rows and tiles that are cached there
        shared.clear()
        matrix = StoredKernel(self.url).read_dense("float64")
        fit = solve_in_memory(matrix, self.gathered.load(), self.options, self.plan)
        arrays = {"coefficients": fit.solution.coefficients, "intercept": fit.solution.intercept}
        url = save_state(self.states, {n: to_host(a) for n, a in arrays.items()}, {"alpha": fit.solution.alpha})
        return {"solution": url, "path": fit.path, "facts": fit.facts}


def solve_stored(
    matrix: Path, gathered: Gathered, options: KernelRidgeOptions, plan: KernelRidgePlan, site: Site
) -> DualFit:
    """Fit on the tiles at `matrix`; solutions on the way are kept in the site's folder and record."""
    if plan.solver in DENSE:
        task = _DenseTask(str(matrix), gathered, options, plan, str(site.states))
        solved = site.alone(task, "solve", threads=plan.solve_threads)
        arrays, attributes = load_state(solved["solution"])
        solution = DualSolution(arrays["coefficients"], arrays["intercept"], attributes["alpha"])
        return DualFit(solution, solved["path"], solved["facts"])
    if plan.solver == "tiled_cholesky":
        return solve_path(Factors(matrix, plan, site), gathered.load(), options, plan.solver)
    gradients = Gradients(matrix, plan, site, options)
    fit = solve_path(gradients, gathered.load(), options, plan.solver)
    leading = gradients.leading_eigenvalues()
    fit.facts["spectrum"] = _drawn(leading[::-1])
    fit.facts["spectrum_note"] = (
        f"The leading {leading.size} eigenvalues are approximate: those of the preconditioner, lower bounds."
    )
    return fit
