"""How an ensemble is trained, what of it is asked, and how large the pieces of its prediction are.

Pure arithmetic; refuses, with the numbers, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ntkdask.errors import InputError, MemoryBudgetError, nearest
from ntkdask.planning.resources import BASE_BYTES, Resources
from ntkdask.planning.tiles import Plan, largest_rows
from ntkdask.solvers.gradient_flow import check_times, factorise_bytes, mean_loss_time
from ntkdask.wording import format_bytes

KINDS = ("ntk", "nngp")
OUTPUTS = ("mean", "variance", "covariance")
TILE_ROWS = 1024
WIDTH = 2048
"""Training rows that a tile of test rows meets at a time: a kernel's temporaries are then tens of MiB."""
USABLE_DEVICE = 0.9
"""Share of a GPU that a task may plan with; what does not fit there is computed on the host."""
COMMIT_BYTES = 3 * 2**26
"""A state on its way to the store: a chunk of 64 MiB, its checksummed copy and the bytes that go to the file."""


@dataclass(frozen=True)
class Training:
    """How the ensemble is trained, and what of it is asked.

    kind "ntk": every parameter is trained; "nngp": the last layer alone, whose convergence is the NNGP posterior with noise variance
    r. times: see `check_times`. diag_reg: r >= 0, times the mean of the kernel's diagonal unless absolute. learning_rate None: flow
    on the summed loss; a number: neural-tangents' time, on the mean loss with that rate (`mean_loss_time`).
    """

    kind: str = "ntk"
    times: tuple[float, ...] = (math.inf,)
    output: str = "variance"
    diag_reg: float = 0.0
    absolute: bool = True
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("output", OUTPUTS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}")
        object.__setattr__(self, "times", check_times(self.times))
        if not (math.isfinite(self.diag_reg) and self.diag_reg >= 0):
            raise InputError(f"diag_reg is {self.diag_reg!r}; give a number >= 0.")
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(
                f"learning_rate is {self.learning_rate!r}; give a number > 0, or None for the summed loss."
            )

    @property
    def last_layer(self) -> bool:
        """Whether the prior's own kernel trains."""
        return self.kind == "nngp"

    def flow_times(self, n: int, k: int) -> tuple[float, ...]:
        """Times of the flow on the summed loss."""
        if self.learning_rate is None:
            return self.times
        return tuple(mean_loss_time(t, n, k, self.learning_rate) for t in self.times)


@dataclass(frozen=True)
class EnsemblePlan:
    """Rows of a tile, training rows it meets at a time, threads of its task and of the decomposition, device; peak bytes by task."""

    dtype: str
    tile_rows: int
    width: int
    threads: int | None
    solve_threads: int | None
    device: bool
    memory: dict[str, int]


def plan_ensemble(
    training: Training,
    n: int,
    m: int,
    k: int,
    *,
    dtype: str,
    kernel_bytes: Callable[[int, int], int],
    plan: Plan,
    resources: Resources | None,
) -> EnsemblePlan:
    """Tiles that fit, for n training and m test rows; MemoryBudgetError with the numbers when the decomposition or a row does not.

    kernel_bytes(rows, columns): what evaluating, or reading, a block of kernels holds at its peak.
    """
    limit = plan.memory_bytes or (resources.memory_bytes if resources else None)
    width = plan.tile_cols or min(n, WIDTH)
    beside = BASE_BYTES + max(COMMIT_BYTES, kernel_bytes(width, width))
    factorise = beside + factorise_bytes(n, not training.last_layer)
    state = 8 * n * n * (1 if training.last_layer else 2)
    if limit is not None and factorise > limit:
        matrices = 3 if training.last_layer else 4
        fitting = int(math.sqrt(max(0, limit - beside) / (8 * matrices)))
        raise MemoryBudgetError(
            f"the eigendecomposition of {n} training rows needs {format_bytes(factorise)} ({matrices} matrices of {n} x {n} float64, "
            f"{format_bytes(beside)} beside them) but a task has {format_bytes(limit)}. Give one worker more memory, or use at most "
            f"{fitting} training rows. Convergence needs no eigenvalues: `predict_converged` gives mean and variance there from a "
            "tiled Cholesky factor, out of core."
        )
    times = len(training.times)
    # z, w, a, b; the factors of every time, stacked, and on their way to the store
    kept = 4 + 8 * times * (training.output == "covariance")

    def predict_bytes(rows: int) -> int:
        block = kernel_bytes(rows, width) + 8 * rows * width
        return BASE_BYTES + state + block + 8 * rows * (n * (kept + 2) + 3 * times * (k + 1))

    tile_rows = plan.tile_rows or min(m, TILE_ROWS)
    if plan.tile_rows is None and limit is not None:
        tile_rows = largest_rows(limit, predict_bytes, tile_rows, f"a prediction from {n} training rows")
    memory = {"factorise": factorise, "predict": predict_bytes(tile_rows)}
    if training.output == "covariance":
        # what predictions keep of the flow is still there
        memory["covariance"] = BASE_BYTES + state + 8 * times * tile_rows * (4 * n + 6 * tile_rows)
    solve = resources.solve_threads if resources else None
    return EnsemblePlan(
        dtype,
        tile_rows,
        width,
        resources.threads if resources else None,
        solve,
        bool(resources and max(memory.values()) - BASE_BYTES <= USABLE_DEVICE * resources.device_bytes),
        memory,
    )
