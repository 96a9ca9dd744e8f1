"""The path over alphas without a spectrum: solves of (S K S + αI) X = S[Y, 1] for every alpha and held-out group, any solver.

holdout, k-fold:  solve without each group's rows, predict them by one product with K
GCV:              solve with random signs beside the targets, whose inner products estimate tr (S K S + αI)⁻¹
the best α, on all rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ntkdask.solvers.dual_problem import DualProblem, DualSolution
from ntkdask.solvers.traces import inverse_trace, sign_probes
from ntkdask.workflows.kernel_ridge.gather import Labels
from ntkdask.workflows.kernel_ridge.options import PROBES, KernelRidgeOptions
from ntkdask.workflows.selection import KeptScores, best_alpha, score_path

Facts = dict[str, Any]
SINGULAR = "At alpha=0 a singular K (duplicate rows) has no solution but for consistent targets: use alpha > 0."
"""Advice where conjugate gradients fail on K itself."""


class Systems(Protocol):
    """Solves with S K S + αI for one K and any α and S. Solutions are kept under a name, so that a resumed run reads them."""

    def solve(
        self, alphas: Sequence[float], scale: np.ndarray, rhs: np.ndarray, name: str, start: np.ndarray | None = None
    ) -> Iterator[tuple[float, np.ndarray, Facts]]:
        """(alpha, solution (n, c), facts of the solve) for every alpha; start: a solution of a near alpha, or None."""

    def product(self, vectors: np.ndarray) -> np.ndarray:
        """K @ vectors, (n, c) float64."""


@dataclass(frozen=True)
class DualFit:
    """The solution at the chosen alpha, the path of scores (empty for one alpha), and facts of the solves, ready for JSON."""

    solution: DualSolution
    path: list[dict[str, float]]
    facts: Facts
    kept: KeptScores | None = None


def convergence_note(facts: Facts) -> str:
    """One sentence on the solves that did not reach the tolerance, with the worst residual and what to do; "" for none."""
    solves = facts.get("solves", [])
    short = [s for s in solves if not s.get("converged", True)]
    if not short:
        return ""
    worst = max(short, key=lambda s: s["residual"])
    advice = SINGULAR if worst["alpha"] == 0 else "Use a larger alpha, more max_iterations, or a factorisation."
    return (
        f"conjugate gradients did not converge in {len(short)} of {len(solves)} solves: at alpha={worst['alpha']:g} the relative "
        f"residual is {worst['residual']:.2g} ({worst['reason']}). The best iterates are kept. {advice}"
    )


def solve_path(systems: Systems, labels: Labels, options: KernelRidgeOptions, solver: str) -> DualFit:
    """Fit without a spectrum, choosing alpha as the options say."""
    solves: list[Facts] = []
    if not options.chooses:
        return _final(systems, labels, options, options.alphas[0], None, [], solves)
    if options.selection_of(solver) == "gcv":
        return _by_trace(systems, labels, options, solves)
    errors: dict[float, list[float]] = {alpha: [] for alpha in options.alphas}
    without_last: dict[float, np.ndarray] = {}
    for group in labels.held_out(options.selection_of(solver)):
        problem = DualProblem.of(labels.targets, labels.without(group), options.fit_intercept)
        name = f"without group {group}"
        for alpha, solved, facts in systems.solve(options.alphas, problem.scale, problem.right_hand_sides(), name):
            solution, rows = problem.solution(solved, alpha), labels.rows(group)
            predicted = systems.product(solution.coefficients) + solution.intercept
            errors[alpha].append(labels.error(group, predicted[rows]))
            solves.append({"alpha": alpha, "held_out": group, **facts})
            without_last[alpha] = solved
    path = score_path(options.alphas, [float(np.mean(errors[a])) for a in options.alphas])
    best = best_alpha(path)
    return _final(systems, labels, options, best, without_last[best], path, solves)


def _by_trace(systems: Systems, labels: Labels, options: KernelRidgeOptions, solves: list[Facts]) -> DualFit:
    """GCV with a stochastic trace; the probes are the same for every alpha, so that the path is smooth."""
    problem = DualProblem.of(labels.targets, labels.weights, options.fit_intercept)
    right = problem.right_hand_sides()
    probes = sign_probes(labels.n, PROBES, 0, labels.weights)
    scores, solutions = {}, {}
    both = np.concatenate([right, probes], axis=1)
    for alpha, solved, facts in systems.solve(options.alphas, problem.scale, both, "with probes"):
        own, probed = solved[:, : right.shape[1]], solved[:, right.shape[1] :]
        trace, error = inverse_trace(probes, probed)
        scores[alpha] = problem.gcv(own, trace, alpha)
        solutions[alpha] = problem.solution(own, alpha)
        solves.append({"alpha": alpha, "held_out": None, "inverse_trace": trace, "trace_error": error, **facts})
    path = score_path(options.alphas, [scores[a] for a in options.alphas])
    return DualFit(solutions[best_alpha(path)], path, {"solves": solves})


def _final(
    systems: Systems,
    labels: Labels,
    options: KernelRidgeOptions,
    alpha: float,
    start: np.ndarray | None,
    path: list[dict[str, float]],
    solves: list[Facts],
) -> DualFit:
    """The fit to all rows at one alpha. start: the solution without the last group, whose coefficients are 0 there; or None."""
    problem = DualProblem.of(labels.targets, labels.weights, options.fit_intercept)
    ((_, solved, facts),) = systems.solve((alpha,), problem.scale, problem.right_hand_sides(), "all rows", start)
    solves.append({"alpha": alpha, "held_out": None, **facts})
    return DualFit(problem.solution(solved, alpha), path, {"solves": solves})
