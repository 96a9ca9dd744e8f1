"""How large the pieces of a kernel ridge run are: tiles of the matrix, the solver that fits, memory of every task, flops, disk.

Pure arithmetic over declared workspaces, like `budget`; refuses, with the numbers, before anything runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ntkdask.cache import DEFAULT_BYTES
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.kernels import Kernel
from ntkdask.kernels.base import entry_size
from ntkdask.matrices.stored import PANEL_BYTES
from ntkdask.planning.pace import elapsed_seconds
from ntkdask.planning.resources import BASE_BYTES, BATCH_ROWS, Costs, Resources, RidgePlan
from ntkdask.planning.tiles import Plan, largest_rows, slab_rows
from ntkdask.preprocessing import FittedPreprocessor, Step
from ntkdask.solvers.preconditioners import rank_for_bytes
from ntkdask.workflows.kernel_matrix.calibrate import calibrate
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan, plan_matrix
from ntkdask.workflows.kernel_ridge.choose import TYPICAL_ITERATIONS, Sizes, candidate, candidates, choose_solver
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.model import POINTS_BYTES

PREDICT_ROWS, BLOCK_BYTES = 2048, 64 * 2**20
"""Training rows that a batch of predictions meets at a time, at most, and their bytes."""
PREDICT_TILE = 8192
"""Rows that one task predicts, at most."""
SHARE_CACHED = 0.7
"""Share of a worker's free memory that keeps tiles between products."""
RANK_BYTES, MAX_RANK, RANK_SHARE = 2**30, 1500, 4
"""Of the preconditioner: its factor is (n, rank) float64 and lives with the driver. Beyond n / RANK_SHARE, decomposing it would take
longer than factorising the matrix."""


@dataclass(frozen=True)
class KernelShape:
    """What the sizes depend on: all rows, rows of a fit, a row's shape and stored bytes, targets, fits, inner folds."""

    n_total: int
    n_train: int
    row_shape: tuple[int, ...]
    row_bytes: int
    k: int
    n_runs: int = 1
    inner_folds: int = 5


@dataclass(frozen=True)
class KernelRidgePlan(RidgePlan):
    """Sizes of a kernel ridge run, chosen once, stored, and used again on resume.

    matrix_tile: rows and columns of a stored tile. solver and reason: see `kernel_options`. rank: of the preconditioner.
    cache_bytes: what a worker keeps of the matrix between products. held_bytes: of training rows in its cache, whatever it does.
    memory_bytes, device_bytes: what a task was planned for; build_bytes: what one that computes a tile may take, which decides whether
    it keeps rows. block_rows: training rows that predictions hold at a time.
    """

    matrix_tile: int = 2048
    solver: str = "eigh"
    reason: str = ""
    rank: int = 0
    cache_bytes: int = 0
    memory_bytes: int | None = None
    device_bytes: int = 0
    held_bytes: int = 0
    build_bytes: int | None = None
    block_rows: int = PREDICT_ROWS

    @property
    def free_bytes(self) -> int | None:
        """What a task may take beside the rows that its process keeps; None: not bounded."""
        return None if self.memory_bytes is None else self.memory_bytes - self.held_bytes


def plan_kernel_ridge(
    shape: KernelShape,
    kernel: Kernel,
    options: KernelRidgeOptions,
    steps: tuple[Step, ...],
    *,
    plan: Plan,
    resources: Resources,
    stored: bool = True,
) -> KernelRidgePlan:
    """Tiles, solver and batches so that every task fits; MemoryBudgetError with the numbers when none does.

    stored: whether the matrix goes to tiles; without, it stays in this process.
    """
    entry = entry_size(kernel, shape.row_shape)
    if entry != 1:
        raise InputError(
            f"kernel ridge needs one number a pair of rows; {type(kernel).__name__} gives {entry}×{entry}. Use output='trace' or the "
            "number of a logit, or kernel_matrix for the whole matrix."
        )
    dtype = plan.dtype or "float32"
    limit = plan.memory_bytes or resources.memory_bytes
    matrix = _matrix_plan(shape, kernel, dtype, limit, plan.tile_cols, resources)
    if stored and limit is not None and matrix.keeps_rows:
        try:
            return _planned(shape, kernel, options, steps, dtype, matrix, limit, resources, limit, stored)
        except MemoryBudgetError:
            # rows that are not kept leave more to the solver, and are read again for every tile
            bound = matrix.memory_bytes - 1
            matrix = _matrix_plan(shape, kernel, dtype, bound, matrix.tile_rows)
            return _planned(shape, kernel, options, steps, dtype, matrix, limit, resources, bound, stored)
    return _planned(shape, kernel, options, steps, dtype, matrix, limit, resources, limit, stored)


def _planned(
    shape: KernelShape,
    kernel: Kernel,
    options: KernelRidgeOptions,
    steps: tuple[Step, ...],
    dtype: str,
    matrix: MatrixPlan,
    limit: int | None,
    resources: Resources,
    build_bytes: int | None,
    stored: bool,
) -> KernelRidgePlan:
    """The plan around a matrix in these tiles."""
    n = shape.n_train
    rank = max(1, rank_for_bytes(n, RANK_BYTES, min(MAX_RANK, n // RANK_SHARE)))
    held = _held_bytes(shape, dtype) if stored and matrix.keeps_rows else 0
    sizes = Sizes(n, shape.k, np.dtype(dtype).itemsize, matrix.tile_rows, shape.inner_folds, held)
    found = candidates(options, sizes, replace(resources, memory_bytes=limit), stored=stored)
    best, reason = choose_solver(found, limit, n)
    slab, whole = slab_rows(shape.n_total), n * n * sizes.itemsize
    chosen = KernelRidgePlan(
        dtype,
        slab,
        min(slab, BATCH_ROWS),
        _predicted_rows(shape, slab, resources),
        resources.threads,
        resources.solve_threads,
        resources.device_bytes > 0,
        matrix.tile_rows,
        best.solver,
        reason,
        rank,
        0,
        limit,
        resources.device_bytes,
        held,
        build_bytes,
        predict_block(shape, dtype),
    )
    if best.solver == "cg":
        # tiles stay in a worker's cache while it does anything else
        least = _row_tasks(shape, kernel, steps, _batched(chosen, 1)).values()
        others = max(best.bytes, matrix.memory_bytes + held, *least)
        whole = -(-whole // PANEL_BYTES) * PANEL_BYTES  # kept panel by panel
        cache = whole if limit is None else min(whole, max(0, int(SHARE_CACHED * (limit - others))))
        chosen = replace(chosen, cache_bytes=cache)
    if limit is None:
        return chosen
    rows = largest_rows(
        limit,
        lambda r: max(_row_tasks(shape, kernel, steps, _batched(chosen, r)).values()),
        chosen.batch_rows,
        "a batch of rows for kernel ridge",
    )
    return _batched(chosen, rows)


def _predicted_rows(shape: KernelShape, slab: int, resources: Resources) -> int:
    """Rows of a task of predictions."""
    rows, pace = min(slab, PREDICT_TILE), resources.pace
    return rows if pace is None else min(rows, pace.predict_rows(shape.n_train, shape.n_total, resources.slots))


def predict_block(shape: KernelShape, dtype: str) -> int:
    """Training rows that predictions hold at a time: fewer where rows are wide."""
    row_bytes = math.prod(shape.row_shape) * np.dtype(dtype).itemsize
    return max(1, min(PREDICT_ROWS, shape.n_train, BLOCK_BYTES // max(1, row_bytes)))


def kernel_costs(
    shape: KernelShape, kernel: Kernel, options: KernelRidgeOptions, steps: tuple[Step, ...], plan: KernelRidgePlan
) -> Costs:
    """Memory, flops, tasks and disk of a run under `plan`."""
    n, matrix = shape.n_train, _matrix_plan(shape, kernel, plan.dtype, plan.build_bytes, plan.matrix_tile)
    sizes = Sizes(n, shape.k, np.dtype(plan.dtype).itemsize, plan.matrix_tile, shape.inner_folds, plan.held_bytes)
    solve = candidate(plan.solver, options, sizes, Resources(plan.memory_bytes, threads=plan.threads))
    fits = options.n_fits(plan.solver, shape.inner_folds)
    # other folds' rows beside this one's, which the matrix plan counts
    others = plan.held_bytes and plan.held_bytes - _held_bytes(replace(shape, n_runs=1), plan.dtype)
    tile = matrix.memory_bytes + others + plan.cache_bytes
    memory = {
        **_row_tasks(shape, kernel, steps, plan),
        "kernel-tile": tile,
        solve.label: solve.bytes + plan.cache_bytes,
    }
    cubic = {"eigh": 9.0, "cholesky": 1 / 3, "tiled_cholesky": 1 / 3, "cg": 0.0}[plan.solver]
    flops = matrix.flops + fits * (cubic * n**3 + (0.0 if cubic else 2.0 * TYPICAL_ITERATIONS * n * n * (shape.k + 1)))
    per_fit = {"tiled_cholesky": matrix.tasks, "cg": TYPICAL_ITERATIONS}.get(plan.solver, 1)
    tasks = 1 + matrix.tasks + fits * per_fit + -(-shape.n_total // plan.tile_rows)
    tasks += len(steps) * -(-shape.n_total // plan.slab_rows)
    d = math.prod(shape.row_shape)
    disk = matrix.disk_bytes + n * d * sizes.itemsize + 8 * shape.n_total * shape.k + 8 * fits * n * (shape.k + 1)
    disk += 8 * matrix.tasks * plan.matrix_tile**2 if plan.solver == "tiled_cholesky" else 0
    return Costs(memory, 0, shape.n_runs * flops, shape.n_runs * tasks, shape.n_runs * disk)


@dataclass(frozen=True)
class KernelTimes:
    """What is predicted of a run on so many slots: the matrices of all fits, and predictions of n_predicted rows in all.

    *_work: seconds in one slot; *_seconds: until all is done. tile_seconds: of one tile.
    """

    tile_seconds: float
    matrix_work: float
    matrix_seconds: float
    predict_work: float
    predict_seconds: float


def kernel_times(
    shape: KernelShape, kernel: Kernel, plan: KernelRidgePlan, n_predicted: int, resources: Resources
) -> KernelTimes:
    """Seconds of a run under `plan` at the pace of `resources`, which must have one."""
    pace, tile = resources.pace, plan.matrix_tile
    if pace is None:
        raise ValueError("kernel_times: the kernel was not measured")
    matrix = _matrix_plan(shape, kernel, plan.dtype, plan.build_bytes, tile, resources)
    work = shape.n_runs * pace.work_seconds(shape.n_train, None, tile)
    predict = pace.entry_seconds * n_predicted * shape.n_train
    return KernelTimes(
        pace.tile_seconds(min(tile, shape.n_train), min(tile, shape.n_train)),
        work,
        shape.n_runs * elapsed_seconds(work / shape.n_runs, matrix.tasks, resources.slots),
        predict,
        elapsed_seconds(predict, -(-n_predicted // plan.tile_rows), resources.slots),
    )


def _row_tasks(shape: KernelShape, kernel: Kernel, steps: tuple[Step, ...], plan: KernelRidgePlan) -> dict[str, int]:
    """Peak bytes of the tasks that walk rows: preprocessing, gathering, predicting."""
    itemsize, rows, d = np.dtype(plan.dtype).itemsize, plan.batch_rows, math.prod(shape.row_shape)
    fitted = FittedPreprocessor(shape.row_shape, plan.dtype)
    work = fitted.workspace_bytes(rows, shape.row_shape, itemsize)
    work += max((step.workspace_bytes(rows, shape.row_shape, itemsize) for step in steps), default=0)
    states = 2 * sum(8 * d * (d if step.needs == "covariance" else 2) for step in steps)
    batch = 2 * rows * shape.row_bytes + work + states + rows * d * itemsize
    labels = 8 * shape.n_train * (shape.k + 1)
    block = plan.block_rows
    predict = kernel.workspace_bytes(rows, block, itemsize, shape.row_shape) + 8 * rows * block
    # a block of points is read twice over, and small ones stay
    predict += 3 * block * d * itemsize + min(POINTS_BYTES, shape.n_train * d * itemsize)
    memory = {"gather-rows": batch + 3 * labels + 8 * 2**20, "predict": batch + 2 * labels + predict}
    if any(step.needs == "covariance" for step in steps):
        memory["preprocess-fit"] = 9 * 8 * d * d
    held = BASE_BYTES + plan.held_bytes + plan.cache_bytes
    return {name: held + size for name, size in memory.items()}


def _batched(plan: KernelRidgePlan, rows: int) -> KernelRidgePlan:
    return replace(plan, batch_rows=rows)


def _held_bytes(shape: KernelShape, dtype: str) -> int:
    """Preprocessed training rows that building the matrices leaves in a worker's cache, fold by fold."""
    return min(DEFAULT_BYTES, shape.n_runs * shape.n_train * math.prod(shape.row_shape) * np.dtype(dtype).itemsize)


def _matrix_plan(
    shape: KernelShape,
    kernel: Kernel,
    dtype: str,
    limit: int | None,
    tile: int | None,
    resources: Resources | None = None,
) -> MatrixPlan:
    row_bytes = math.prod(shape.row_shape) * np.dtype(dtype).itemsize
    pace, slots = (None, 1) if resources is None else (resources.pace, resources.slots)
    return plan_matrix(
        kernel, shape.n_train, None, shape.row_shape, row_bytes, dtype, limit, tile_rows=tile, pace=pace, slots=slots
    )


def measured(
    resources: Resources,
    kernel: Kernel,
    shape: KernelShape,
    options: KernelRidgeOptions,
    steps: tuple[Step, ...],
    *,
    plan: Plan,
    client: Any = None,
) -> Resources:
    """`resources` with the pace of the kernel of a kernel ridge run, measured with their threads, on their slots, within the tiles
    that memory allows. Errors as of `plan_kernel_ridge`.
    """
    within = plan_kernel_ridge(shape, kernel, options, steps, plan=plan, resources=resources)
    pace = calibrate(
        kernel,
        shape.row_shape,
        within.dtype,
        min(within.matrix_tile, shape.n_train),
        entries=shape.n_train**2 / 2,
        client=client,
        slots=resources.slots,
        n_threads=resources.threads,
        device=resources.device_bytes > 0,
    )
    return replace(resources, pace=pace)
