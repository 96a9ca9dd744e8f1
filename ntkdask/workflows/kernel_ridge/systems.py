"""Solves with S K S + αI for many α on one kernel matrix: by tiled Cholesky, or by preconditioned conjugate gradients.

Every solution is kept as a state as it comes, and conjugate gradients leave a checkpoint now and then, so that a killed run goes on
where it was. Facts of a solve hold its true residual. Gradients that did not converge keep their best iterates, and raise where
none is better than zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.arrays import Array, is_device_array, namespace, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.execution.peak import peak_bytes
from ntkdask.execution.progress import DRIVER
from ntkdask.execution.site import Site
from ntkdask.execution.window import Done
from ntkdask.files import remove
from ntkdask.matrices.factorize import factorize_at
from ntkdask.matrices.operator import StoredKernel
from ntkdask.solvers.conjugate_gradients import Solved, Stopping, conjugate_gradients, conjugate_gradients_bytes
from ntkdask.solvers.conjugate_gradients_state import State
from ntkdask.solvers.preconditioners import LowRankPreconditioner, pivoted_cholesky
from ntkdask.states import load_state, save_state
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import SINGULAR, Facts
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan

CHECKPOINT_SECONDS = 60.0
GRADIENT_BYTES = 2**30
"""Vectors of conjugate gradients that the driver holds; more alphas than fit are solved in several turns."""
PIVOTS = 256
"""Columns read at a time for the preconditioner: each round reads the whole matrix."""
SEED = 0
"""Of the preconditioner's pivots."""


@dataclass(frozen=True)
class _OnTiles:
    """A kernel matrix in tiles, the plan that its solves follow, and the site where they run and are kept."""

    matrix: Path
    plan: KernelRidgePlan
    site: Site

    def operator(self, scale: np.ndarray | None = None) -> StoredKernel:
        """S K S on the cluster."""
        plan = self.plan
        return StoredKernel.at(self.site, self.matrix, scale, cache_bytes=plan.cache_bytes, device=plan.device)

    def product(self, vectors: np.ndarray) -> np.ndarray:
        """K @ vectors."""
        return self.operator() @ vectors

    def keep(self, key: str, make: Callable[[], tuple[np.ndarray, list[Facts]]]) -> tuple[np.ndarray, list[Facts]]:
        """The solutions and facts that make() gives, stored, or those that an earlier run stored under that key."""

        def stored() -> dict[str, Any]:
            solved, facts = make()
            return {"solved": save_state(self.site.states, {"solved": solved}, {"key": key}), "facts": facts}

        kept = self.site.once(f"solve {key}", stored)
        return load_state(kept["solved"])[0]["solved"], kept["facts"]


@dataclass(frozen=True)
class Factors(_OnTiles):
    """A tiled factorisation per alpha, deleted once its solution is kept."""

    def solve(
        self, alphas: Sequence[float], scale: np.ndarray, rhs: np.ndarray, name: str, start: np.ndarray | None = None
    ) -> Iterator[tuple[float, np.ndarray, Facts]]:
        """See `path.Systems`; start is not needed."""
        for alpha in alphas:
            make = partial(self._factorised, alpha, scale, rhs, name)
            solved, facts = self.keep(f"{name}, alpha {alpha!r}", make)
            yield alpha, solved, facts[0]

    def _factorised(
        self, alpha: float, scale: np.ndarray, rhs: np.ndarray, name: str
    ) -> tuple[np.ndarray, list[Facts]]:
        started, plan = time.perf_counter(), self.plan
        place = self.site.within("factors").within(f"{name}-{alpha!r}".replace(" ", "-"))
        factor = factorize_at(
            place, self.matrix, alpha, scale=scale, memory_bytes=plan.free_bytes, device_bytes=plan.device_bytes
        )
        solved = factor.solve(rhs)
        residual = rhs - self.operator(scale) @ solved - alpha * solved
        remove(place.home)
        return solved, [{"residual": _relative(residual, rhs), "seconds": time.perf_counter() - started}]


@dataclass(frozen=True)
class Gradients(_OnTiles):
    """Preconditioned block conjugate gradients, all alphas together, over stored tiles."""

    options: KernelRidgeOptions

    def solve(
        self, alphas: Sequence[float], scale: np.ndarray, rhs: np.ndarray, name: str, start: np.ndarray | None = None
    ) -> Iterator[tuple[float, np.ndarray, Facts]]:
        """See `path.Systems`."""
        for turn in _turns(sorted(alphas, reverse=True), *rhs.shape):
            key = f"{name}, alphas {turn!r}"
            solved, facts = self.keep(key, partial(self._iterated, turn, scale, rhs, key, start))
            yield from zip(turn, solved, facts, strict=True)

    def leading_eigenvalues(self) -> np.ndarray:
        """Descending eigenvalues of the preconditioner's F Fᵀ, none above K's own of the same rank."""
        return LowRankPreconditioner.of(self._factor()).eigenvalues

    def _iterated(
        self, alphas: list[float], scale: np.ndarray, rhs: np.ndarray, key: str, start: np.ndarray | None
    ) -> tuple[np.ndarray, list[Facts]]:
        site, operator = self.site, self.operator(scale)
        preconditioner = LowRankPreconditioner.of(self._factor() * scale[:, None])
        checkpoint = _Checkpoint(site, f"{site.name}checkpoint {key}")
        state = checkpoint.earlier()
        site.listener.stage("cg", self.options.max_iterations, 0 if state is None else state.iteration)
        result = conjugate_gradients(
            operator,
            rhs,
            alphas,
            preconditioner=preconditioner,
            stopping=_stopping(self.options),
            start=start,
            state=state,
            callback=checkpoint,
        )
        checkpoint.drop()
        return _checked(result, alphas, operator, operator.matrix.dtype)

    def _factor(self) -> np.ndarray:
        """The low-rank factor of K itself, made once and kept as a state."""
        site = self.site

        def make() -> str:
            site.listener.stage("preconditioner", 1)
            started = time.perf_counter()
            factor = pivoted_cholesky(self.operator(), self.plan.rank, seed=SEED, block=PIVOTS)
            site.listener.task("preconditioner", Done(None, time.perf_counter() - started, peak_bytes(), DRIVER))
            return save_state(site.states, {"factor": factor}, {"rank": factor.shape[1]})

        return load_state(site.once("preconditioner", make))[0]["factor"]


class _Checkpoint:
    """Tells the listener of every iteration, and stores the state once a minute; each one replaces the one before."""

    def __init__(self, site: Site, stage: str) -> None:
        self._site, self._stage = site, stage
        self._last = self._iterated = time.monotonic()

    def earlier(self) -> State | None:
        """The state that an earlier run left."""
        kept = self._site.record.stages.get(self._stage)
        return None if kept is None else State.from_state(*load_state(kept))

    def __call__(self, iteration: int, state: State) -> None:
        now = time.monotonic()
        self._site.listener.task("cg", Done(None, now - self._iterated, peak_bytes(), DRIVER))
        self._iterated = now
        if time.monotonic() - self._last < CHECKPOINT_SECONDS:
            return
        record = self._site.record
        before = record.stages.get(self._stage)
        record.put(self._stage, save_state(self._site.states, *state.to_state()))
        if before is not None and before != record.stages[self._stage]:
            remove(before)
        self._last = time.monotonic()

    def drop(self) -> None:
        """Forget the checkpoint, this run's or an earlier one's: its system is solved."""
        record = self._site.record
        if self._stage in record.stages:
            remove(record.stages[self._stage])
            record.forget(self._stage)


@dataclass(frozen=True)
class DenseGradients:
    """Preconditioned block conjugate gradients on a matrix in memory."""

    matrix: Array
    options: KernelRidgeOptions
    rank: int

    def solve(
        self, alphas: Sequence[float], scale: np.ndarray, rhs: np.ndarray, name: str, start: np.ndarray | None = None
    ) -> Iterator[tuple[float, np.ndarray, Facts]]:
        """See `path.Systems`."""
        device = is_device_array(self.matrix)
        operator = _Scaled(self.matrix, to_device(scale, device))
        preconditioner = LowRankPreconditioner.of(pivoted_cholesky(operator, self.rank, seed=SEED))
        ordered = sorted(alphas, reverse=True)
        result = conjugate_gradients(
            operator,
            to_device(rhs, device),
            ordered,
            preconditioner=preconditioner,
            stopping=_stopping(self.options),
            start=None if start is None else to_device(start, device),
        )
        solved, facts = _checked(result, ordered, operator, self.matrix.dtype)
        yield from zip(ordered, to_host(solved), facts, strict=True)

    def product(self, vectors: np.ndarray) -> np.ndarray:
        """K @ vectors."""
        return to_host(_product(self.matrix, to_device(vectors, is_device_array(self.matrix))))


class _Scaled:
    """S K S of a matrix in memory, with the products, columns and diagonal that conjugate gradients and preconditioners take."""

    def __init__(self, matrix: Array, scale: Array) -> None:
        self._matrix, self._scale, self.shape = matrix, scale, tuple(matrix.shape)

    def __matmul__(self, v: Array) -> Array:
        scale = self._scale.reshape(-1, *[1] * (v.ndim - 1))
        return scale * _product(self._matrix, scale * v)

    def columns(self, indices: np.ndarray) -> Array:
        """(n, r) float64 columns."""
        numbers = to_device(np.asarray(indices), is_device_array(self._matrix))
        return self._scale[:, None] * self._matrix[:, numbers].astype("float64") * self._scale[numbers]

    def diagonal(self) -> Array:
        """(n,) float64."""
        return namespace(self._matrix).diagonal(self._matrix).astype("float64") * self._scale**2


def _product(matrix: Array, v: Array) -> Array:
    """matrix @ v in float64, a float32 matrix cast strip by strip."""
    if matrix.dtype == v.dtype:
        return matrix @ v
    out = namespace(matrix).empty((matrix.shape[0], *v.shape[1:]), v.dtype)
    for start in range(0, matrix.shape[0], 1024):
        out[start : start + 1024] = matrix[start : start + 1024].astype(v.dtype) @ v
    return out


def _stopping(options: KernelRidgeOptions) -> Stopping:
    return Stopping(tolerance=options.tolerance, max_iterations=options.max_iterations)


def _turns(alphas: list[float], n: int, columns: int) -> Iterator[list[float]]:
    """The alphas in groups whose vectors fit the driver."""
    count = len(alphas)
    while count > 1 and conjugate_gradients_bytes(n, columns, count, preconditioned=True) > GRADIENT_BYTES:
        count -= 1
    for first in range(0, len(alphas), count):
        yield alphas[first : first + count]


def _checked(result: Solved, alphas: list[float], matrix: Any, dtype: Any) -> tuple[np.ndarray, list[Facts]]:
    """(solutions, facts) per alpha; matrix: S K S, dtype: K's.

    InputError where S K S + αI turned out not to be positive definite, or no iterate is better than zero.
    """
    facts: list[Facts] = []
    for i, alpha in enumerate(alphas):
        if np.isfinite(result.curvatures[i]):
            raise _not_positive(alpha, float(result.curvatures[i]), matrix, np.dtype(dtype))
        residual = float(result.residuals[i].max())
        if not residual < 1:
            raise InputError(
                f"kernel ridge: conjugate gradients got nowhere at alpha={alpha:g}: {result.reasons[i]}. "
                + (SINGULAR if alpha == 0 else "Use a larger alpha, more max_iterations, or a factorisation.")
            )
        facts.append(
            {
                "iterations": result.iterations,
                "residual": residual,
                "converged": bool(result.converged[i].all()),
                "reason": result.reasons[i],
            }
        )
    return to_host(result.solution), facts


def _not_positive(alpha: float, curvature: float, matrix: Any, dtype: np.dtype) -> InputError:
    trace = float(matrix.diagonal().sum())
    noise = trace * float(np.finfo(dtype).eps)
    return InputError(
        f"kernel ridge: K + αI is not positive definite at alpha={alpha:g}: a direction has curvature {curvature:.3g}, beside a "
        f"trace of {trace:.4g}, so that {dtype} entries carry errors up to about {noise:.1g}. "
        f"Use alpha={max(alpha - 2 * curvature, 2 * noise):.1g} or more."
    )


def _relative(residual: np.ndarray, rhs: np.ndarray) -> float:
    """The largest ‖residual‖/‖rhs‖ of the columns."""
    size = np.linalg.norm(rhs, axis=0)
    return float(np.max(np.linalg.norm(residual, axis=0) / np.where(size > 0, size, 1.0)))
