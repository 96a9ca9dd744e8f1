"""Which solver kernel ridge uses: what each one needs in memory, how long it takes by an estimate, and the cheapest that fits.

Pure arithmetic. A solver is a candidate when it can score alphas as asked. Of those whose tasks fit a worker, the one that the
estimate below says is cheapest runs, and the plan and the report tell why.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.matrices.factorize_plan import plan_factorize
from ntkdask.planning.resources import BASE_BYTES, Resources
from ntkdask.solvers.dual import eigh_bytes
from ntkdask.solvers.dual_cholesky import cholesky_bytes
from ntkdask.wording import format_bytes
from ntkdask.workflows.kernel_ridge.options import DENSE, PROBES, SOLVERS, KernelRidgeOptions

TYPICAL_ITERATIONS = 150
"""Conjugate-gradient iterations that an alpha is assumed to take when solvers are compared; only that choice depends on it."""
FLOPS_PER_THREAD, BYTES_PER_SLOT = 4e10, 2e9
"""Rates for comparing solvers: float64 flops of one core; bytes of tiles that one worker reads, checks and multiplies in a second."""
ALLOCATOR_KEEPS = 256 * 2**20
"""Freed bytes that malloc keeps: `cluster.connect` sets it so for workers (MALLOC_TRIM_THRESHOLD_)."""
WORTH_A_SPECTRUM = 20.0
"""Seconds up to which an eigendecomposition is preferred to whatever is cheaper."""
EIGH_FLOPS, EIGH_SHARE, TILED_SHARE = 9.0, 0.2, 0.7
"""Flops of an eigendecomposition with vectors over n³ (LAPACK's evd); shares of the product's rate that it and tiled Cholesky
reach.
"""


@dataclass(frozen=True)
class Sizes:
    """What the needs of a solver follow from.

    Parameters
    ----------
    n : int
        Training rows.
    k : int
        Targets.
    itemsize : int
        Bytes of an entry of the matrix.
    tile_rows : int
        Rows of its tiles.
    inner_folds : int
        Folds for choosing alpha.
    held_bytes : int
        Of training rows that stay in a worker's cache.
    """

    n: int
    k: int
    itemsize: int
    tile_rows: int
    inner_folds: int
    held_bytes: int = 0


@dataclass(frozen=True)
class Candidate:
    """A solver: the label of its largest task, that task's peak bytes (the process included), and the estimated seconds of all."""

    solver: str
    label: str
    bytes: int
    seconds: float


def candidate(solver: str, options: KernelRidgeOptions, sizes: Sizes, resources: Resources) -> Candidate:
    """What a solver needs. Only tiled Cholesky raises MemoryBudgetError, when not even one tile fits; the caller compares."""
    n = sizes.n
    alone = FLOPS_PER_THREAD * resources.solve_threads
    together = FLOPS_PER_THREAD * resources.threads * resources.slots
    columns = sizes.k + 1 + (PROBES if options.chooses and options.selection_of(solver) == "gcv" else 0)
    fits = options.n_fits(solver, sizes.inner_folds)
    if solver == "eigh":
        return Candidate(solver, "solve", BASE_BYTES + eigh_bytes(n), fits * EIGH_FLOPS * n**3 / (EIGH_SHARE * alone))
    if solver == "cholesky":
        # a factorisation keeps the matrix for the next one
        copy_bytes = 8 * n * n if options.chooses else 0
        return Candidate(solver, "solve", BASE_BYTES + cholesky_bytes(n) + copy_bytes, fits * n**3 / 3 / alone)
    if solver == "tiled_cholesky":
        limit = resources.memory_bytes
        free = None if limit is None else max(0, limit - sizes.held_bytes)
        matrix_dtype = f"float{8 * sizes.itemsize}"
        plan = plan_factorize(n, sizes.tile_rows, slots=resources.slots, memory_bytes=free, matrix_dtype=matrix_dtype)
        return Candidate(
            solver, "cholesky-tile", plan.worker_bytes + sizes.held_bytes, fits * n**3 / 3 / (TILED_SHARE * together)
        )
    product = n * n * sizes.itemsize / 2 / (BYTES_PER_SLOT * resources.slots) + 2.0 * n * n * columns / together
    held = BASE_BYTES + sizes.held_bytes
    return Candidate(
        solver,
        "kernel-product",
        held + product_bytes(sizes, columns, resources.threads),
        fits * TYPICAL_ITERATIONS * product,
    )


def candidates(options: KernelRidgeOptions, sizes: Sizes, resources: Resources, *, stored: bool) -> list[Candidate]:
    """Every solver that can do what is asked; tiled Cholesky among them only where the matrix is stored in tiles."""
    able = []
    for solver in SOLVERS[1:] if options.solver == "auto" else (options.solver,):
        scores = not options.chooses or options.selection_of(solver) in options.scores_of(solver)
        if scores and (stored or solver != "tiled_cholesky"):
            try:
                able.append(candidate(solver, options, sizes, resources))
            except MemoryBudgetError:
                if options.solver == solver:
                    raise
    if not able:
        raise InputError(
            f"solver={options.solver!r} works on stored tiles: give a url (or a client), or use another solver."
        )
    return able


def choose_solver(able: list[Candidate], limit: int | None, n: int) -> tuple[Candidate, str]:
    """(the cheapest candidate within `limit` bytes, why); MemoryBudgetError with the numbers when none fits."""
    fitting = [c for c in able if limit is None or c.bytes <= limit]
    if not fitting:
        least = min(able, key=lambda c: c.bytes)
        assert limit is not None
        advice = "" if least.solver not in DENSE else ' Out of core: solver="auto" with selection="holdout" or "gcv".'
        raise MemoryBudgetError(
            f"{least.label} of solver {least.solver!r} needs {format_bytes(least.bytes)} for {n} training rows (the process itself "
            f"{format_bytes(BASE_BYTES)}) but a worker has {format_bytes(limit)}. Give each worker more memory.{advice}"
        )
    best = min(fitting, key=lambda c: c.seconds)
    if len(able) == 1:
        return best, "as asked"
    spectral = next((c for c in fitting if c.solver == "eigh"), best)
    # the spectrum, exact scores for any alpha and a path's effective dimensions are worth a few seconds
    best = spectral if spectral.seconds <= max(WORTH_A_SPECTRUM, best.seconds) else best
    others = [_why_not(c, limit) for c in able if c is not best]
    return best, f"about {best.seconds:.2g} s and {format_bytes(best.bytes)} a worker; {', '.join(others)}"


def _why_not(other: Candidate, limit: int | None) -> str:
    if limit is not None and other.bytes > limit:
        return f"{other.solver} needs {format_bytes(other.bytes)}"
    return f"{other.solver} about {other.seconds:.2g} s"


def product_bytes(sizes: Sizes, columns: int, threads: int) -> int:
    """Bytes of a product's task beside the process.

    The vectors in, a panel's pieces out, for each thread a tile, its checksummed file and float64 strips, and what the allocator keeps
    of tiles that were read and freed.
    """
    tile = sizes.tile_rows**2
    passing = min(ALLOCATOR_KEEPS, sizes.n * sizes.n * sizes.itemsize // 2)
    return 4 * 8 * sizes.n * columns + threads * (3 * sizes.itemsize + 2) * tile + passing
