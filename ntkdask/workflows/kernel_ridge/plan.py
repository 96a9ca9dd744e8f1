"""How large the pieces of a kernel ridge run are: tiles of the matrix, the solver that fits, batches and caches.

Pure arithmetic over declared workspaces; refuses, with the numbers, before anything runs. What a plan costs is in `costs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution.site import Site
from ntkdask.kernels import Kernel
from ntkdask.kernels.base import completed
from ntkdask.matrices.stored import PANEL_BYTES
from ntkdask.planning.resources import BATCH_ROWS, Resources
from ntkdask.planning.tiles import Plan, largest_rows, slab_rows
from ntkdask.preprocessing import Step
from ntkdask.solvers.preconditioners import rank_for_bytes
from ntkdask.workflows.kernel_matrix.calibrate import calibrate
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan, plan_matrix
from ntkdask.workflows.kernel_ridge.choose import Candidate, Sizes, candidates, choose_solver
from ntkdask.workflows.kernel_ridge.memory import kept_rows_bytes, row_tasks
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.sizes import PREDICT_ROWS, KernelRidgePlan, KernelShape

BLOCK_BYTES = 64 * 2**20
"""Bytes of training rows that a batch of predictions meets at a time, at most."""
PREDICT_TILE = 8192
"""Rows that one task predicts, at most."""
SHARE_CACHED = 0.7
"""Share of a worker's free memory that keeps tiles between products."""
RANK_BYTES, MAX_RANK, RANK_SHARE = 2**30, 1500, 4
"""Of the preconditioner: its factor is (n, rank) float64 and lives with the driver. Beyond n / RANK_SHARE, decomposing it would take
longer than factorising the matrix."""


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
    """Tiles, solver and batches so that every task fits.

    Parameters
    ----------
    shape : KernelShape
        Of the run.
    kernel : Kernel
        Of one number for a pair of rows.
    options : KernelRidgeOptions
        What to solve for.
    steps : tuple of Step
        Preprocessing.
    plan : Plan
        What the caller asked for: dtype, tile_cols (the matrix's tiles), memory_bytes of a task.
    resources : Resources
        What tasks may count on, with the kernel's pace where it was measured.
    stored : bool
        Whether the matrix goes to tiles; without, it stays in this process.

    Returns
    -------
    KernelRidgePlan

    Raises
    ------
    MemoryBudgetError
        With the numbers, when no solver fits, or no batch of rows.
    InputError
        For a kernel whose entries are matrices.
    """
    entry = completed(kernel).entry_size(shape.row_shape)
    if entry != 1:
        raise InputError(
            f"kernel ridge needs one number a pair of rows; {type(kernel).__name__} gives {entry}×{entry}. Use output='trace' or the "
            "number of a logit, or kernel_matrix for the whole matrix."
        )
    dtype, limit = plan.dtype or "float32", plan.memory_bytes or resources.memory_bytes
    run = _Run(
        shape=shape,
        kernel=kernel,
        options=options,
        steps=steps,
        dtype=dtype,
        resources=replace(resources, memory_bytes=limit),
        stored=stored,
    )
    matrix = plan_matrix(
        kernel, shape.matrix(dtype), limit, tile_rows=plan.tile_cols, pace=resources.pace, slots=resources.slots
    )
    if not (stored and limit is not None and matrix.keeps_rows):
        return run.planned(matrix, limit)
    try:
        return run.planned(matrix, limit)
    except MemoryBudgetError:
        # rows that are not kept leave more to the solver, and are read again for every tile
        build_bytes = matrix.memory_bytes - 1
        matrix = plan_matrix(kernel, shape.matrix(dtype), build_bytes, tile_rows=matrix.tile_rows)
        return run.planned(matrix, build_bytes)


@dataclass(frozen=True)
class _Run:
    """A run to be planned, and the resources of its tasks; their memory_bytes are the caller's bound where there is one."""

    shape: KernelShape
    kernel: Kernel
    options: KernelRidgeOptions
    steps: tuple[Step, ...]
    dtype: str
    resources: Resources
    stored: bool

    def planned(self, matrix: MatrixPlan, build_bytes: int | None) -> KernelRidgePlan:
        """The plan around a matrix in these tiles, whose tasks may take build_bytes."""
        shape, resources, dtype = self.shape, self.resources, self.dtype
        n, limit = shape.n_train, resources.memory_bytes
        held = kept_rows_bytes(shape, dtype) if self.stored and matrix.keeps_rows else 0
        sizes = Sizes(
            n=n,
            k=shape.k,
            itemsize=np.dtype(dtype).itemsize,
            tile_rows=matrix.tile_rows,
            inner_folds=shape.inner_folds,
            held_bytes=held,
        )
        best, reason = choose_solver(candidates(self.options, sizes, resources, stored=self.stored), limit, n)
        slab = slab_rows(shape.n_total)
        chosen = KernelRidgePlan(
            dtype=dtype,
            slab_rows=slab,
            batch_rows=min(slab, BATCH_ROWS),
            tile_rows=_predicted_rows(shape, slab, resources),
            threads=resources.threads,
            solve_threads=resources.solve_threads,
            device=resources.device_bytes > 0,
            matrix_tile=matrix.tile_rows,
            solver=best.solver,
            reason=reason,
            rank=max(1, rank_for_bytes(n, RANK_BYTES, min(MAX_RANK, n // RANK_SHARE))),
            memory_bytes=limit,
            device_bytes=resources.device_bytes,
            held_bytes=held,
            build_bytes=build_bytes,
            block_rows=predict_block(shape, dtype),
        )
        if best.solver == "cg":
            chosen = replace(chosen, cache_bytes=self._cached_tiles(chosen, best, matrix))
        if limit is None:
            return chosen
        rows = largest_rows(
            limit, lambda r: self._row_peak(chosen, r), chosen.batch_rows, "a batch of rows for kernel ridge"
        )
        return replace(chosen, batch_rows=rows)

    def _cached_tiles(self, plan: KernelRidgePlan, best: Candidate, matrix: MatrixPlan) -> int:
        """Bytes of the matrix that stay in a worker's cache: beside them every other task must fit."""
        n, limit = self.shape.n_train, self.resources.memory_bytes
        # kept panel by panel
        whole = -(-n * n * np.dtype(self.dtype).itemsize // PANEL_BYTES) * PANEL_BYTES
        if limit is None:
            return whole
        others = max(best.bytes, matrix.memory_bytes + plan.held_bytes, self._row_peak(plan, 1))
        return min(whole, max(0, int(SHARE_CACHED * (limit - others))))

    def _row_peak(self, plan: KernelRidgePlan, batch_rows: int) -> int:
        """Peak bytes of the tasks that walk rows, so many at a time."""
        return max(row_tasks(self.shape, self.kernel, self.steps, replace(plan, batch_rows=batch_rows)).values())


def _predicted_rows(shape: KernelShape, slab: int, resources: Resources) -> int:
    """Rows of a task of predictions."""
    rows, pace = min(slab, PREDICT_TILE), resources.pace
    return rows if pace is None else min(rows, pace.predict_rows(shape.n_train, shape.n_total, resources.slots))


def predict_block(shape: KernelShape, dtype: str) -> int:
    """Training rows that predictions hold at a time: fewer where rows are wide."""
    row_bytes = math.prod(shape.row_shape) * np.dtype(dtype).itemsize
    return max(1, min(PREDICT_ROWS, shape.n_train, BLOCK_BYTES // max(1, row_bytes)))


def measured(
    resources: Resources,
    kernel: Kernel,
    shape: KernelShape,
    options: KernelRidgeOptions,
    steps: tuple[Step, ...],
    *,
    plan: Plan,
    site: Site,
) -> Resources:
    """`resources` with the pace of the kernel of a run, measured within the tiles that memory allows.

    Parameters
    ----------
    resources : Resources
        Their threads and slots measure, on GPUs where they have them.
    kernel, shape, options, steps, plan
        As in `plan_kernel_ridge`, whose errors are raised.
    site : Site
        Whose client measures; without one, this process.
    """
    within = plan_kernel_ridge(shape, kernel, options, steps, plan=plan, resources=resources)
    pace = calibrate(
        kernel,
        shape.row_shape,
        within.dtype,
        min(within.matrix_tile, shape.n_train),
        entries=shape.n_train**2 / 2,
        site=replace(site, threads=resources.threads),
        slots=resources.slots,
        device=resources.device_bytes > 0,
    )
    return replace(resources, pace=pace)
