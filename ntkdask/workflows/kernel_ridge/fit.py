"""Kernel ridge regression on stored tiles, alpha chosen on the training rows alone.

preprocessing ← fitted on the training rows
points        ← the training rows, preprocessed, group after group
K             ← kernel(points), one triangle, tile by tile
alpha, β      ← (K + αI)β = Y − 1b: one eigendecomposition or Cholesky factorisation where K fits a task,
                tiled Cholesky or preconditioned conjugate gradients where it does not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ntkdask.arrays import to_device, to_host
from ntkdask.datasets.rows import Rows, rows_of_groups
from ntkdask.execution.site import Site
from ntkdask.kernels import Kernel
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor, Step
from ntkdask.states import load_state
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.kernel_ridge.gather import Gathered, gather, gather_in_memory
from ntkdask.workflows.kernel_ridge.heat_map import heat_map
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import DualFit
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan
from ntkdask.workflows.kernel_ridge.solve import solve_in_memory, solve_stored
from ntkdask.workflows.model import KernelRidgeModel, RidgeFit, load_model
from ntkdask.workflows.preprocess import fit_preprocessing
from ntkdask.workflows.ship import shipped
from ntkdask.workflows.stream import ROWWISE, FeatureStream, store_preprocessor

SCORE_NAMES = {"gcv": "GCV", "loo": "leave-one-out MSE", "kfold": "k-fold MSE", "holdout": "holdout MSE"}


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
    """Fit on the selected rows, which are the union of `groups` (parts of the rows): the folds, or one group of all.

    With k-fold every group is held out in turn, with holdout the last one; the chosen alpha is then fitted on all. url: folder for
    points, tiles, states and the model, needed with a client; a run there is resumed through `record`, whose stage names begin
    with `name`. Raises InputError when K + αI is not positive definite, saying by how much.
    """
    site = site or Site(threads=plan.threads)
    url, client, listener, record, name = site.folder, site.client, site.listener, site.record, site.name
    everything = rows_of_groups(rows, groups)
    score_name = SCORE_NAMES[options.selection_of(plan.solver)]
    if url is None:
        fitted = fit_preprocessing(everything, steps, plan, site)
        stream = FeatureStream(everything, fitted, ROWWISE, n_classes, plan.batch_rows)
        points, labels = gather_in_memory(stream, groups)
        matrix = kernel(to_device(points, plan.device))
        fit = solve_in_memory(matrix, labels, options, plan)
        return RidgeFit(
            _model(fitted, kernel, points, fit, n_classes, plan), fit.path, score_name, None, _facts(fit, plan)
        )
    states = url / "state"
    kernel = shipped(kernel, states, client)
    preprocessor = record.once(
        f"{name}preprocess", lambda: store_preprocessor(states, fit_preprocessing(everything, steps, plan, site))
    )
    stream = FeatureStream(everything, preprocessor, ROWWISE, n_classes, plan.batch_rows)
    gathered = Gathered(**record.once(f"{name}gather", lambda: asdict(gather(stream, groups, url, client, listener))))
    kernel_matrix(
        kernel,
        gathered.points,
        url=url / "kernel",
        client=client,
        listener=listener,
        threads=plan.threads,
        plan=Plan(plan.matrix_tile, memory_bytes=plan.build_bytes, dtype=plan.dtype),
    )

    def solve() -> dict[str, Any]:
        fit = solve_stored(url / "kernel", gathered, options, plan, url, client, listener, record, name)
        fitted = FittedPreprocessor.from_state(*load_state(preprocessor))
        model = _model(fitted, kernel, gathered.dataset, fit, n_classes, plan)
        facts = _facts(fit, plan)
        facts["heat_map"] = heat_map(kernel, gathered.dataset, gathered.load(), n_classes)
        return {"model": model.save(states), "path": fit.path, "facts": facts}

    result = record.once(f"{name}solve", solve)
    return RidgeFit(load_model(result["model"]), result["path"], score_name, result["model"], result["facts"])


def _model(
    preprocessor: FittedPreprocessor,
    kernel: Kernel,
    points: Any,
    fit: DualFit,
    n_classes: int | None,
    plan: KernelRidgePlan,
) -> KernelRidgeModel:
    solution = fit.solution
    return KernelRidgeModel(
        preprocessor,
        kernel,
        points,
        np.ascontiguousarray(to_host(solution.coefficients)),
        to_host(solution.intercept),
        solution.alpha,
        n_classes,
        plan.block_rows,
    )


def _facts(fit: DualFit, plan: KernelRidgePlan) -> dict[str, Any]:
    return {"solver": plan.solver, "solver_reason": plan.reason, **fit.facts}
