"""How an ensemble is trained, what is predicted of it, and how large the tasks of its prediction are.

Pure arithmetic. What does not fit is refused here, with the numbers, before anything runs.
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
    """How the ensemble is trained, and what of it is predicted.

    Parameters
    ----------
    kind : str
        "ntk": every parameter is trained; "nngp": the last layer alone, which converges to the NNGP posterior with noise variance r.
    times : tuple of float
        Training times; see `check_times`.
    output : str
        "mean", "variance" (of each row) or "covariance" (between rows).
    diag_reg : float
        The ridge r >= 0 that is added to the diagonal of the kernel that trains.
    absolute : bool
        Whether r is `diag_reg` itself, or `diag_reg` times the mean of the kernel's diagonal.
    learning_rate : float or None
        None: times are of gradient flow on the summed loss. A number: they are neural-tangents' times, of the mean loss with that
        rate (`mean_loss_time`).

    Raises
    ------
    InputError
        For other kinds, outputs and times, a negative ridge, and a rate that is not positive.
    """

    kind: str = "ntk"
    times: tuple[float, ...] = (math.inf,)
    output: str = "variance"
    diag_reg: float = 0.0
    absolute: bool = True
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("output", OUTPUTS)):
            if getattr(self, name) not in choices:
                raise InputError(f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), choices)}")
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
        """The times as those of gradient flow on the summed loss, for n training rows and k targets."""
        if self.learning_rate is None:
            return self.times
        return tuple(mean_loss_time(t, n, k, self.learning_rate) for t in self.times)


@dataclass(frozen=True)
class EnsemblePlan:
    """Sizes of the tasks of a prediction.

    Parameters
    ----------
    dtype : str
        Of the kernels; the decomposition is float64.
    tile_rows : int
        Rows that a task predicts.
    width : int
        Training rows that it meets at a time.
    threads : int or None
        Of a task. None: what its process has.
    solve_threads : int or None
        Of the decomposition, which runs alone.
    device : bool
        Whether tasks compute on their worker's GPU.
    memory : dict
        Peak bytes by kind of task, the process included.
    """

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
    """Tiles whose tasks fit a worker.

    Parameters
    ----------
    training : Training
        What is predicted.
    n, m, k : int
        Training rows, rows to predict, targets.
    dtype : str
        Of the kernels.
    kernel_bytes : function (rows, columns) -> int
        Bytes that evaluating, or reading, a block of kernels holds at its peak.
    plan : Plan
        tile_rows and tile_cols where the caller fixes them; memory_bytes of a task.
    resources : Resources or None
        Memory where the plan states none, threads and GPU of a task. None: unbounded memory, what a process has, and no GPU.

    Returns
    -------
    EnsemblePlan
        At most TILE_ROWS rows a tile and WIDTH training rows at a time.

    Raises
    ------
    MemoryBudgetError
        When the decomposition does not fit, or the prediction of a single row.
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
    # vectors of length n for a row: z, w, a, b; the factors of every time, stacked, and on their way to the store
    vectors = 4 + 8 * times * (training.output == "covariance")

    def predict_bytes(rows: int) -> int:
        block = kernel_bytes(rows, width) + 8 * rows * width
        return BASE_BYTES + state + block + 8 * rows * (n * (vectors + 2) + 3 * times * (k + 1))

    def covariance_bytes(rows: int) -> int:
        # what predictions keep of the flow is still there
        return BASE_BYTES + state + 8 * times * rows * (4 * n + 6 * rows)

    tasks = {"predict": predict_bytes} | ({"covariance": covariance_bytes} if training.output == "covariance" else {})
    tile_rows = plan.tile_rows or min(m, TILE_ROWS)
    if limit is not None:
        task = f"a prediction from {n} training rows"
        fitting = largest_rows(limit, lambda rows: max(need(rows) for need in tasks.values()), tile_rows, task)
        if plan.tile_rows is not None and fitting < tile_rows:
            needed = max(need(tile_rows) for need in tasks.values())
            raise MemoryBudgetError(
                f"{task} needs {format_bytes(needed)} for {tile_rows} rows but a task has {format_bytes(limit)}. "
                f"Use Plan.tile_rows <= {fitting}."
            )
        tile_rows = fitting
    memory = {"factorise": factorise} | {name: need(tile_rows) for name, need in tasks.items()}
    return EnsemblePlan(
        dtype,
        tile_rows,
        width,
        resources.threads if resources else None,
        resources.solve_threads if resources else None,
        bool(resources and max(memory.values()) - BASE_BYTES <= USABLE_DEVICE * resources.device_bytes),
        memory,
    )
