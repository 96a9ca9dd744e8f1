"""Preconditioned block conjugate gradients for (A + αI) X = B: all right-hand sides, and all alphas, from shared products.

Each process builds an orthonormal block Krylov basis V (block Lanczos, A V_j = V_{j−1}B_{j−1}ᵀ + V_jD_j + V_{j+1}B_j) and
factors T + σ = L Δ Lᵀ block by block as it grows, which is conjugate gradients: X moves by W_j Δ_j⁻¹ξ_j along the A-orthogonal
block W_j = V_j − W_{j−1}L_jᵀ, and the residual is −V_{j+1}·B_jΔ_j⁻¹ξ_j without another product. Blocks shrink where they lose
rank (dependent targets, such as one-hot columns with an intercept; columns that are done; an exhausted space), so nothing
breaks down there. Without a preconditioner T + σI serves every alpha: one process, one product an iteration, and each alpha
freezes when it is done. With one, (FFᵀ + α)^(−½) is applied on both sides: a process per alpha, their blocks multiplied in one
product, since reading A is what costs.

Why blocks and not separate columns that share products: for the same products every column gets the others' Krylov space too
(RBF, n = 600, 8 columns, no preconditioner: see tests/solvers/test_conjugate_gradients.py for the counts).

True residuals B − (A + αI)X are computed in the same product every `check_every` iterations, and whenever the recurrence says
that all is done; only they decide. Sources: O'Leary 1980; Dubrulle 2001; Frommer & Maass 1999 for shifts; Saad 2003, §6.7 for
D-Lanczos. Arrays in, arrays out, float64; NumPy or CuPy after B. Memory: `conjugate_gradients_bytes`. What a run carries from
product to product is in `conjugate_gradients_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array, namespace, require_float, to_host
from ntkdask.errors import InputError
from ntkdask.solvers.block_krylov import Preconditioner, Process, Step
from ntkdask.solvers.conjugate_gradients_state import RUNNING, Iterate, State


@dataclass(frozen=True)
class Stopping:
    """When to stop.

    Parameters
    ----------
    tolerance : float
        Between 0 and 1: converged is true ‖b − (A + α)x‖ <= tolerance·‖b‖ in every column.
    max_iterations : int
        The largest number of products.
    check_every : int
        Iterations between true residuals.
    patience : int
        Iterations in which the residual does not fall by a tenth before an alpha counts as stalled.
    """

    tolerance: float = 1e-8
    max_iterations: int = 1000
    check_every: int = 50
    patience: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(
                f"conjugate gradients: tolerance is {self.tolerance!r}; expected a number between 0 and 1."
            )
        for name in ("max_iterations", "check_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"conjugate gradients: {name} is {getattr(self, name)!r}; expected an integer >= 1.")


@dataclass(frozen=True)
class Solved:
    """What conjugate gradients reached. An alpha that did not converge keeps its best iterate and says why.

    Parameters
    ----------
    solution : array (n_alphas, n, k), float64
        Without the first axis for a single alpha, without the last for rhs (n,).
    alphas : array (n_alphas,)
        The alphas.
    residuals : array (n_alphas, k)
        True relative residuals ‖b − (A + αI)x‖/‖b‖, from A and x themselves. Where a product gave NaN they are those of the
        recurrence, since there is no true one.
    converged : array (n_alphas, k), bool
        Whether each residual is within the tolerance.
    history : array (iterations, n_alphas)
        The largest residual over columns by the recurrence; NaN before it exists.
    iterations : int
        Products with A, checks included.
    columns : int
        Vectors multiplied in all.
    reasons : tuple of str
        For each alpha "converged", or what happened.
    curvatures : array (n_alphas,)
        The smallest zᵀ(A + α)z/zᵀz met where that was negative, else NaN.
    """

    solution: Array
    alphas: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    history: np.ndarray
    iterations: int
    columns: int
    reasons: tuple[str, ...]
    curvatures: np.ndarray


def conjugate_gradients_bytes(n: int, k: int, n_alphas: int, preconditioned: bool) -> int:
    """Peak bytes of blocks (n, ·), without those of the preconditioner.

    Three iterates and the directions of every alpha, the basis of every process, and a product with its operand to which all
    iterates are added.
    """
    processes = n_alphas if preconditioned else 1
    return 8 * n * k * (5 * n_alphas + 6 * processes + 2 * (processes + n_alphas))


def conjugate_gradients(
    operator: Any,
    rhs: Array,
    alphas: float | Sequence[float],
    *,
    preconditioner: Preconditioner | None = None,
    stopping: Stopping | None = None,
    start: Array | None = None,
    state: State | None = None,
    callback: Callable[[int, State], None] | None = None,
) -> Solved:
    """Solve (A + αI) X = B for every alpha; the module's docstring describes the method.

    Parameters
    ----------
    operator : object
        A, symmetric, with `.shape` and `@` on (n, r) float64.
    rhs : array (n,) or (n, k), float32 or float64
        B; columns of zeros have the solution zero.
    alphas : float or sequence of float
        One or more α >= 0.
    preconditioner : Preconditioner, optional
        M(α), close to A + αI.
    stopping : Stopping, optional
        When to stop; None: its defaults.
    start : array (n, k) or (n_alphas, n, k), optional
        Where to start, such as the solution of a nearby alpha; every alpha then has a process of its own.
    state : State, optional
        Where to go on, with the same arguments, to the same bits.
    callback : callable, optional
        Called as callback(iteration, state) after every product, for checkpoints (`state.to_state()`); it must not change the
        state.

    Returns
    -------
    Solved
        Also when something did not converge.

    Raises
    ------
    InputError
        For shapes that disagree, NaN in rhs and alpha < 0.
    """
    stopping = stopping or Stopping()
    b = require_float(rhs, "rhs")
    b = (b[:, None] if b.ndim == 1 else b).astype(np.float64)
    grid = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    _check(operator, b, grid)
    solver = _Solver(operator, b, preconditioner, stopping)
    state = solver.begin(grid, start) if state is None else solver.resume(state, grid)
    while solver.iterate(state):
        if callback is not None:
            callback(state.iteration, state)
    solver.finish(state)
    return _result(state, np.ndim(alphas) == 0, rhs.ndim == 1, stopping.tolerance)


def _check(operator: Any, b: Array, alphas: np.ndarray) -> None:
    shape = tuple(operator.shape)
    if shape != (b.shape[0], b.shape[0]) or not b.size:
        raise InputError(
            f"conjugate gradients: operator {shape} and right-hand sides {b.shape} do not match; expected (n, n), (n, k)."
        )
    if not (alphas.size and (alphas >= 0).all() and np.isfinite(alphas).all()):
        raise InputError(
            f"conjugate gradients: alphas are {alphas.tolist()}; expected at least one, none negative, all finite."
        )
    bad = np.flatnonzero(~to_host(namespace(b).isfinite(b).all(axis=0)))
    if bad.size:
        raise InputError(f"conjugate gradients: column {bad[0]} of the right-hand sides has NaN or infinity.")


class _Solver:
    """The constants of a problem; everything that changes is in `State`."""

    def __init__(self, operator: Any, b: Array, preconditioner: Preconditioner | None, stopping: Stopping) -> None:
        self.operator, self.b, self.preconditioner, self.stopping = operator, b, preconditioner, stopping
        self.xp = namespace(b)
        size = to_host(self.xp.linalg.norm(b, axis=0))
        self.size = np.where(size > 0, size, 1.0)

    def begin(self, alphas: np.ndarray, start: Array | None) -> State:
        """X = 0 and, where they can share one, one process for all alphas; else X = start, which the first product checks."""
        shape = (int(alphas.size), *self.b.shape)
        if start is not None and tuple(start.shape) not in (shape, shape[1:]):
            raise InputError(
                f"conjugate gradients: start has shape {tuple(start.shape)}; expected {shape} or {shape[1:]}."
            )
        state = State([], [])
        for i, alpha in enumerate(alphas.tolist()):
            x = self.xp.zeros(shape[1:])
            if start is not None:
                x += self.xp.asarray(start[i] if start.ndim == 3 else start)
            state.iterates.append(Iterate(alpha, x, due=start is not None))
        if start is None:
            for one in state.iterates:
                one.best = one.sure = one.x.copy()
                one.residuals = one.sure_residuals = (to_host(abs(self.b).max(axis=0)) > 0).astype(float)
                one.norm = one.cycle = one.lowest = float(one.residuals.max())
                one.reason = RUNNING if one.norm > 0 else "converged"
            self._open(state, list(range(alphas.size)), self.b)
        return state

    def resume(self, state: State, alphas: np.ndarray) -> State:
        """The given state; InputError when it is not of this problem."""
        stored = [i.alpha for i in state.iterates]
        if stored != alphas.tolist() or any(i.x.shape != self.b.shape for i in state.iterates):
            raise InputError(
                f"conjugate gradients: the state is of alphas {stored} and shape {state.iterates[0].x.shape}, "
                f"not {alphas.tolist()} and {self.b.shape}. Start afresh, without state."
            )
        return state

    def _open(self, state: State, members: list[int], residual: Array) -> None:
        """Start processes for these alphas from one residual: a shared one, or with a preconditioner one for each."""
        alphas = [state.iterates[m].alpha for m in members]
        if self.preconditioner is None:
            state.processes.append(Process.start(residual, members, alphas, 0.0, None))
        else:
            for m, alpha in zip(members, alphas, strict=True):
                state.processes.append(Process.start(residual, [m], [0.0], alpha, self.preconditioner))

    def iterate(self, state: State) -> bool:
        """One product with the directions of every process and the iterates to be checked. False when all is done."""
        running = [i for i, one in enumerate(state.iterates) if one.reason == RUNNING]
        if not running:
            return False
        if state.iteration >= self.stopping.max_iterations:
            self._end(state, running, f"max_iterations={self.stopping.max_iterations} reached")
            return False
        state.processes = [p for p in state.processes if p.active]
        periodic = state.iteration > 0 and state.iteration % self.stopping.check_every == 0
        checked = [i for i in running if periodic or state.iterates[i].due]
        processes = list(state.processes)
        directions = [p.directions(self.preconditioner) for p in processes]
        products = self._multiply(state, [*directions, *(state.iterates[i].x for i in checked)])
        state.iteration += 1
        if products is None:
            self._end(state, running, "a product with the operator gave NaN or infinity", verify=False)
            return False
        for i, product in zip(checked, products[len(processes) :], strict=True):
            self._judge(state, i, product)
        for process, d, product in zip(processes, directions, products, strict=False):
            if process.active:
                for step in process.advance(d, product, self.preconditioner):
                    self._record(state, step)
        state.history.append([one.norm for one in state.iterates])
        return True

    def finish(self, state: State) -> None:
        """One more product for the true residuals of the alphas that were given up."""
        left = [one for one in state.iterates if one.due]
        products = self._multiply(state, [one.x for one in left]) if left else []
        for one, product in zip(left, products or [], strict=False):
            one.due = False
            self._measure(one, product)
            one.x, one.residuals = one.sure, one.sure_residuals
            if (one.residuals <= self.stopping.tolerance).all():
                one.reason = "converged"

    def _multiply(self, state: State, blocks: list[Array]) -> list[Array] | None:
        """A·block for each block, from one product; None when it is not finite."""
        together = self.xp.concatenate(blocks, axis=1)
        state.columns += together.shape[1]
        product = self.operator @ together
        if not bool(self.xp.isfinite(product).all()):
            return None
        return self.xp.split(product, np.cumsum([x.shape[1] for x in blocks])[:-1].tolist(), axis=1)

    def _measure(self, one: Iterate, product: Array) -> np.ndarray:
        """True relative residuals (k,) of x from product = A·x; x is kept where it is the best so far."""
        residual = to_host(self.xp.linalg.norm(self.b - product - one.alpha * one.x, axis=0)) / self.size
        if one.sure is None or residual.max() < one.sure_residuals.max():
            one.sure, one.sure_residuals = one.x.copy(), residual
        return residual

    def _judge(self, state: State, member: int, product: Array) -> None:
        """Decide by a true residual: converged, go on, start again from this residual, or give up."""
        one = state.iterates[member]
        residual = self._measure(one, product)
        largest, due = float(residual.max()), one.due
        one.due = False
        if (residual <= self.stopping.tolerance).all():
            one.reason, one.norm, one.residuals, one.best = "converged", largest, residual, one.x
            _halt(state, member)
        elif due or largest > 10 * one.norm:
            # the recurrence has drifted, or has not begun: start again from the true residual, as long as that helps
            _halt(state, member)
            if largest < 0.5 * one.cycle:
                one.cycle = one.norm = one.lowest = largest
                one.lowest_at, one.residuals, one.best = state.iteration, residual, one.x.copy()
                self._open(state, [member], self.b - product - one.alpha * one.x)
            else:
                one.norm = largest
                self._end(state, [member], _why_not(one, largest))

    def _record(self, state: State, step: Step) -> None:
        """Move one iterate; the next product checks it when the recurrence calls it done or cannot go on."""
        one = state.iterates[step.member]
        if step.move is None:
            one.due = True
            if step.curvature is not None and step.curvature < 0:
                one.curvature = float(np.fmin(one.curvature, step.curvature))
            _halt(state, step.member)
            return
        one.x += step.move
        one.norm = float((step.norms / self.size).max())
        if one.norm <= 0.5 * self.stopping.tolerance or not np.isfinite(one.norm):
            one.due = True
            _halt(state, step.member)
        elif one.norm < 0.9 * one.lowest:
            one.lowest, one.lowest_at = one.norm, state.iteration
            one.best, one.residuals = one.x.copy(), step.norms / self.size
        elif state.iteration - one.lowest_at >= self.stopping.patience:
            words = f"stalled: the residual stayed above {one.lowest:.2g} for {self.stopping.patience} iterations"
            self._end(state, [step.member], words)

    def _end(self, state: State, members: list[int], reason: str, verify: bool = True) -> None:
        """Give these alphas up, with the iterate of the lowest residual; with `verify` the last product computes its true one."""
        for member in members:
            one = state.iterates[member]
            if one.best is not None and not (verify and one.norm <= one.lowest):
                one.x = one.best
            one.reason, one.due = reason, verify
            _halt(state, member)


def _halt(state: State, member: int) -> None:
    """Stop moving the iterate of one alpha."""
    for process in state.processes:
        for shift in process.shifts:
            if shift.member == member:
                shift.moving, shift.directions = False, None


def _why_not(one: Iterate, largest: float) -> str:
    if one.curvature < 0:
        return (
            f"A + alpha I is not positive definite: a direction has curvature {one.curvature:.2g}; "
            f"alpha must exceed {one.alpha - one.curvature:.2g}"
        )
    return f"stalled: the true residual stays at {largest:.2g}, as far as products with A are exact, or A is singular"


def _result(state: State, single: bool, flat: bool, tolerance: float) -> Solved:
    xp = namespace(state.iterates[0].x)
    solution = xp.stack([one.x for one in state.iterates])
    k = solution.shape[2]
    # nothing was ever measured where the very first product failed
    residuals = np.stack([one.residuals if one.residuals.size else np.full(k, np.nan) for one in state.iterates])
    solution = solution[..., 0] if flat else solution
    return Solved(
        solution[0] if single else solution,
        np.array([one.alpha for one in state.iterates]),
        residuals,
        residuals <= tolerance,
        np.array(state.history).reshape(-1, len(state.iterates)),
        state.iteration,
        state.columns,
        tuple(one.reason for one in state.iterates),
        np.array([one.curvature for one in state.iterates]),
    )
