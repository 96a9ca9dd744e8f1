"""What a kernel ridge run costs under its plan: memory of every task, flops, tasks, disk, and seconds at a measured pace."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ntkdask.kernels import Kernel
from ntkdask.planning.pace import elapsed_seconds
from ntkdask.planning.resources import Costs, Resources
from ntkdask.preprocessing import Step
from ntkdask.workflows.kernel_matrix.plan import plan_matrix
from ntkdask.workflows.kernel_ridge.choose import TYPICAL_ITERATIONS, Sizes, candidate
from ntkdask.workflows.kernel_ridge.memory import kept_rows_bytes, row_tasks
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.sizes import KernelRidgePlan, KernelShape


def kernel_costs(
    shape: KernelShape, kernel: Kernel, options: KernelRidgeOptions, steps: tuple[Step, ...], plan: KernelRidgePlan
) -> Costs:
    """Memory, flops, tasks and disk of a run under `plan`."""
    n, itemsize = shape.n_train, np.dtype(plan.dtype).itemsize
    matrix = plan_matrix(kernel, shape.matrix(plan.dtype), plan.build_bytes, tile_rows=plan.matrix_tile)
    sizes = Sizes(
        n=n,
        k=shape.k,
        itemsize=itemsize,
        tile_rows=plan.matrix_tile,
        inner_folds=shape.inner_folds,
        held_bytes=plan.held_bytes,
    )
    solve = candidate(plan.solver, options, sizes, Resources(plan.memory_bytes, threads=plan.threads))
    fits = options.n_fits(plan.solver, shape.inner_folds)
    # other folds' rows beside this one's, which the matrix plan counts
    others = plan.held_bytes and plan.held_bytes - kept_rows_bytes(replace(shape, n_runs=1), plan.dtype)
    memory = {
        **row_tasks(shape, kernel, steps, plan),
        "kernel-tile": matrix.memory_bytes + others + plan.cache_bytes,
        solve.label: solve.bytes + plan.cache_bytes,
    }
    cubic = {"eigh": 9.0, "cholesky": 1 / 3, "tiled_cholesky": 1 / 3, "cg": 0.0}[plan.solver]
    flops = matrix.flops + fits * (cubic * n**3 + (0.0 if cubic else 2.0 * TYPICAL_ITERATIONS * n * n * (shape.k + 1)))
    per_fit = {"tiled_cholesky": matrix.tasks, "cg": TYPICAL_ITERATIONS}.get(plan.solver, 1)
    tasks = 1 + matrix.tasks + fits * per_fit + -(-shape.n_total // plan.tile_rows)
    tasks += len(steps) * -(-shape.n_total // plan.slab_rows)
    d = math.prod(shape.row_shape)
    disk = matrix.disk_bytes + n * d * itemsize + 8 * shape.n_total * shape.k + 8 * fits * n * (shape.k + 1)
    disk += 8 * matrix.tasks * plan.matrix_tile**2 if plan.solver == "tiled_cholesky" else 0
    return Costs(
        memory=memory,
        device_memory=0,
        flops=shape.n_runs * flops,
        tasks=shape.n_runs * tasks,
        disk_bytes=shape.n_runs * disk,
    )


@dataclass(frozen=True)
class KernelTimes:
    """Predicted seconds of a run: of the matrices of all fits, and of all predictions.

    *_work: in one slot; *_seconds: until all is done on the slots there are. tile_seconds: of one tile.
    """

    tile_seconds: float
    matrix_work: float
    matrix_seconds: float
    predict_work: float
    predict_seconds: float


def kernel_times(
    shape: KernelShape, kernel: Kernel, plan: KernelRidgePlan, n_predicted: int, resources: Resources
) -> KernelTimes:
    """Seconds of a run under `plan`, with n_predicted rows predicted in all, at the pace of `resources`, which must have one."""
    pace, tile = resources.pace, plan.matrix_tile
    if pace is None:
        raise ValueError("kernel_times: the kernel was not measured")
    matrix = plan_matrix(kernel, shape.matrix(plan.dtype), plan.build_bytes, tile_rows=tile)
    work = shape.n_runs * pace.work_seconds(shape.n_train, None, tile)
    predict = pace.entry_seconds * n_predicted * shape.n_train
    return KernelTimes(
        tile_seconds=pace.tile_seconds(min(tile, shape.n_train), min(tile, shape.n_train)),
        matrix_work=work,
        matrix_seconds=shape.n_runs * elapsed_seconds(work / shape.n_runs, matrix.tasks, resources.slots),
        predict_work=predict,
        predict_seconds=elapsed_seconds(predict, -(-n_predicted // plan.tile_rows), resources.slots),
    )
