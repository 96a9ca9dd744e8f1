"""Kernel ridge regression on stored tiles, alpha chosen on the training rows alone.

preprocessing ← fitted on the training rows
points        ← the training rows, preprocessed, group after group
K             ← kernel(points), one triangle, tile by tile
alpha, β      ← (K + αI)β = Y − 1b: one eigendecomposition or Cholesky factorisation where K fits a task,
                tiled Cholesky or preconditioned conjugate gradients where it does not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ntkdask.arrays import to_device, to_host
from ntkdask.datasets.rows import Rows, rows_of_groups
from ntkdask.execution.site import Site
from ntkdask.kernels import Kernel
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor, Step
from ntkdask.states import load_state
from ntkdask.workflows.kernel_matrix.build import stored_kernel_matrix
from ntkdask.workflows.kernel_ridge.gather import Gathered, gather, gather_in_memory
from ntkdask.workflows.kernel_ridge.heat_map import heat_map
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import DualFit
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan
from ntkdask.workflows.kernel_ridge.solve import solve_in_memory, solve_stored
from ntkdask.workflows.model import KernelRidgeModel, RidgeFit, load_model
from ntkdask.workflows.preprocess import fit_preprocessing
from ntkdask.workflows.selection import score_name
from ntkdask.workflows.ship import shipped
from ntkdask.workflows.stream import ROWWISE, FeatureStream, store_preprocessor


def fit_kernel_ridge(
    rows: Rows,
    groups: Sequence[tuple[int, ...]],
    options: KernelRidgeOptions,
    plan: KernelRidgePlan,
    *,
    kernel: Kernel,
    steps: tuple[Step, ...] = (),
    n_classes: int | None = None,
    site: Site | None = None,
) -> RidgeFit:
    """Fit on the selected rows, which are the union of `groups`: the folds, or one group of all.

    Parameters
    ----------
    rows : Rows
        With their targets.
    groups : sequence of tuples of int
        Parts of the rows. With k-fold every group is held out in turn, with holdout the last one; the chosen alpha is then fitted on
        all.
    options : KernelRidgeOptions
        What to solve for.
    plan : KernelRidgePlan
        Sizes, solver and threads.
    kernel : Kernel
        Of one number for a pair of rows.
    steps : tuple of Step
        Preprocessing, fitted to the selected rows.
    n_classes : int or None
        Classes of labels; None for regression.
    site : Site or None
        Its folder keeps points, tiles, states and the model, and a run there is resumed through its record. None, or a site without a
        folder: the matrix stays in this process.

    Returns
    -------
    RidgeFit
        Stored where there is a folder.

    Raises
    ------
    InputError
        When K + αI is not positive definite, saying by how much; for rows that are not finite, and groups without rows.
    """
    site = replace(site or Site(), threads=plan.threads)
    everything = rows_of_groups(rows, groups)
    scores = score_name(options.selection_of(plan.solver))
    if site.folder is None:
        fitted = fit_preprocessing(everything, steps, plan, site)
        stream = FeatureStream(everything, fitted, ROWWISE, n_classes, plan.batch_rows)
        points, labels = gather_in_memory(stream, groups)
        fit = solve_in_memory(kernel(to_device(points, plan.device)), labels, options, plan)
        model = _model(fitted, kernel, points, fit, n_classes, plan)
        return RidgeFit(model, fit.path, scores, None, _facts(fit, plan), fit.kept)
    kernel = shipped(kernel, site.states, site.client)
    preprocessor = site.once(
        "preprocess", lambda: store_preprocessor(site.states, fit_preprocessing(everything, steps, plan, site))
    )
    stream = FeatureStream(everything, preprocessor, ROWWISE, n_classes, plan.batch_rows)
    gathered = Gathered(**site.once("gather", lambda: asdict(gather(stream, groups, site))))
    matrix = site.within("kernel")
    sizes = Plan(plan.matrix_tile, memory_bytes=plan.build_bytes, dtype=plan.dtype)
    stored_kernel_matrix(kernel, gathered.points, None, sizes, matrix)

    def solve() -> dict[str, Any]:
        fit = solve_stored(matrix.home, gathered, options, plan, site)
        fitted = FittedPreprocessor.from_state(*load_state(preprocessor))
        model = _model(fitted, kernel, gathered.dataset, fit, n_classes, plan)
        facts = _facts(fit, plan)
        facts["heat_map"] = heat_map(kernel, gathered.dataset, gathered.load(), n_classes)
        return {"model": model.save(site.states), "path": fit.path, "facts": facts}

    result = site.once("solve", solve)
    return RidgeFit(load_model(result["model"]), result["path"], scores, result["model"], result["facts"])


def _model(
    preprocessor: FittedPreprocessor,
    kernel: Kernel,
    points: Any,
    fit: DualFit,
    n_classes: int | None,
    plan: KernelRidgePlan,
) -> KernelRidgeModel:
    """The model of a fit, its coefficients on the host; points: the gathered rows, or the dataset that holds them."""
    solution = fit.solution
    return KernelRidgeModel(
        preprocessor=preprocessor,
        kernel=kernel,
        points=points,
        coefficients=np.ascontiguousarray(to_host(solution.coefficients)),
        intercept=to_host(solution.intercept),
        alpha=solution.alpha,
        n_classes=n_classes,
        block_rows=plan.block_rows,
    )


def _facts(fit: DualFit, plan: KernelRidgePlan) -> dict[str, Any]:
    """The solver, why it was chosen, and the facts of its solves, for a fold's metrics."""
    return {"solver": plan.solver, "solver_reason": plan.reason, **fit.facts}
