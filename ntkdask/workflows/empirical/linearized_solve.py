"""The linear system of a linearised prediction, β = (Θ(D, D) + αI)⁻¹ (Y − f₀(D)), on the stored tiles of Θ, by kernel ridge's solvers.

The plan chooses among the solvers that fit a task, and says why. Solutions are kept by what they solve. Called by `linearized.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.execution.progress import Record
from ntkdask.execution.site import Site
from ntkdask.files import exclusive
from ntkdask.matrices.stored import PANEL_BYTES, StoredMatrix
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.solvers.linearized import Linearized, is_full
from ntkdask.solvers.preconditioners import rank_for_bytes
from ntkdask.states import content_digest, load_state, save_state
from ntkdask.workflows.kernel_ridge.choose import Sizes, candidates, choose_solver
from ntkdask.workflows.kernel_ridge.gather import Gathered
from ntkdask.workflows.kernel_ridge.options import DENSE, KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.plan import MAX_RANK, RANK_BYTES, RANK_SHARE, SHARE_CACHED, KernelRidgePlan
from ntkdask.workflows.kernel_ridge.solve import solve_stored


def solve_linearized(
    matrix: StoredMatrix,
    residual: np.ndarray,
    alpha: float,
    solver: str,
    site: Site,
    plan: Plan,
    resources: Resources | None,
) -> tuple[Linearized, str, dict[str, Any]]:
    """Solve for a residual on stored tiles, or read the solution where it was found before.

    Parameters
    ----------
    matrix : StoredMatrix
        Θ̂ (n, n) or Θ (n·O, n·O) of the training rows.
    residual : array (n, O), float64
        Y − f₀(D).
    alpha : float
        The ridge.
    solver : str
        As of `KernelRidgeOptions`.
    site : Site
        Where the solve runs; its folder keeps solutions.
    plan : Plan
        memory_bytes of a task, where the caller states it.
    resources : Resources or None
        Memory and threads of a task. None: what the site has.

    Returns
    -------
    fit : Linearized
        The solution.
    solver : str
        That found it.
    facts : dict
        How; `solver_reason` says why this solver.

    Raises
    ------
    MemoryBudgetError
        Before anything runs, when no solver fits a task.
    """
    with exclusive(site.home):
        return _solved(matrix, residual, alpha, solver, site, plan, resources)


def _solved(
    matrix: StoredMatrix,
    residual: np.ndarray,
    alpha: float,
    solver: str,
    site: Site,
    plan: Plan,
    resources: Resources | None,
) -> tuple[Linearized, str, dict[str, Any]]:
    """`solve_linearized` in a folder of which this process is the only writer.

    Parameters
    ----------
    matrix, residual, alpha, solver, site, plan, resources
        As of `solve_linearized`.
    """
    full = is_full(matrix.shape, residual.shape, square=True)
    right = residual.reshape(-1, 1) if full else residual
    options = _options(alpha, solver)
    sizes = _plan(matrix, right.shape[1], options, plan, resources or site.resources())
    labels = save_state(site.states, {"targets": right}, {"bounds": [0, len(right)]})
    record = Record.open(site.home / "linearized", {"matrix": matrix.token}, site.home).begin()
    name = f"{registry.digest([content_digest(right), solver, alpha])} "
    part = replace(site, record=record, name=name, threads=sizes.threads)

    def solve() -> dict[str, Any]:
        fit = solve_stored(Path(matrix.url), Gathered("", labels), options, sizes, part)
        kept = save_state(site.states, {"coefficients": fit.solution.coefficients})
        return {"coefficients": kept, "solver": sizes.solver, "facts": {"solver_reason": sizes.reason, **fit.facts}}

    solution = part.once("solution", solve)
    coefficients = load_state(solution["coefficients"])[0]["coefficients"].reshape(residual.shape)
    return Linearized(coefficients, alpha, full), solution["solver"], solution["facts"]


def require_dense_fits(n: int, k: int, solver: str, limit: int | None) -> None:
    """MemoryBudgetError where `solver` holds the whole matrix, of n rows, and a task's limit does not; before it is computed."""
    if solver in DENSE:
        # their memory depends on n alone, not on tiles, threads or alpha
        able = candidates(_options(0.0, solver), Sizes(n, k, 8, 1, 1), Resources(limit), stored=True)
        choose_solver(able, limit, n)


def _options(alpha: float, solver: str) -> KernelRidgeOptions:
    """One alpha, and the prior mean f₀ in the place of an intercept."""
    return KernelRidgeOptions((alpha,), fit_intercept=False, solver=solver)


def _plan(
    matrix: StoredMatrix, k: int, options: KernelRidgeOptions, plan: Plan, resources: Resources
) -> KernelRidgePlan:
    """The solver that fits, as `plan_kernel_ridge` chooses it, for a matrix that is stored already, and k right-hand sides."""
    n, tile, itemsize = matrix.shape[0], matrix.tile_shape[0], matrix.dtype.itemsize
    limit = plan.memory_bytes or resources.memory_bytes
    resources = Resources(limit, 0, resources.threads, resources.solve_threads, resources.slots)
    able = candidates(options, Sizes(n, k, itemsize, tile, 1), resources, stored=matrix.is_symmetric)
    best, reason = choose_solver(able, limit, n)
    cache = 0
    if best.solver == "cg":
        whole = -(-n * n * itemsize // PANEL_BYTES) * PANEL_BYTES
        cache = whole if limit is None else min(whole, max(0, int(SHARE_CACHED * (limit - best.bytes))))
    return KernelRidgePlan(
        dtype=matrix.dtype.name,
        slab_rows=tile,
        batch_rows=tile,
        tile_rows=tile,
        threads=resources.threads,
        solve_threads=resources.solve_threads,
        device=False,
        matrix_tile=tile,
        solver=best.solver,
        reason=reason,
        rank=max(1, rank_for_bytes(n, RANK_BYTES, min(MAX_RANK, n // RANK_SHARE))),
        cache_bytes=cache,
        memory_bytes=limit,
    )
