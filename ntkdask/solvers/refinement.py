"""A float32 factor's solutions brought to a requested residual: conjugate gradients on A + αI, the factor as preconditioner.

A float32 Cholesky factor costs half the time and space of a float64 one, and its solution is right to about κ·6e-8. Products
with A in float64 give its true residual, and a few steps, one product each, reduce it, also where plain
iterative refinement would diverge (κ·6e-8 > 1). Higham 2002, §12; Notay 2000 for a preconditioner that rounds.

Arrays in, arrays out; `operator` is a dense array or anything else with `@`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.errors import InputError


@dataclass(frozen=True)
class Refinement:
    """What refinement reached.

    Parameters
    ----------
    solution : array (n,) or (n, k), float64
        x.
    residuals : array (k,)
        The true ‖b − (A + αI)x‖/‖b‖ of each column, from A and x themselves.
    iterations : int
        Steps beyond the factor's own solution.
    converged : bool
        Whether every residual is within the tolerance.
    """

    solution: np.ndarray
    residuals: np.ndarray
    iterations: int
    converged: bool


def refine(
    operator: Any,
    solve: Callable[[np.ndarray], np.ndarray],
    rhs: np.ndarray,
    *,
    alpha: float = 0.0,
    tolerance: float = 1e-10,
    max_iterations: int = 50,
) -> Refinement:
    """Solve (A + αI) x = rhs to `tolerance`, from an approximate solve; the columns share products, each has its own steps.

    Flexible conjugate gradients, with β = zᵀ(r − r_old)/(z_oldᵀr_old). The residual of the recurrence drifts, so the true one
    is computed when the recurrence says that all columns are done, or halfway through a stall, and decides.

    Parameters
    ----------
    operator : object
        A, with `@` on (n, k) float64.
    solve : callable
        An approximate (A + αI)⁻¹ on (n, k), such as a float32 `Factor.solve`.
    rhs : array (n,) or (n, k)
        Right-hand sides.
    alpha : float
        α.
    tolerance : float
        Between 0 and 1, of the residual relative to ‖b‖.
    max_iterations : int
        The largest number of steps.

    Returns
    -------
    Refinement
        Also without convergence: after max_iterations, or when the true residual has stopped falling. Then the tolerance is
        below what float64 products with A can show.

    References
    ----------
    Notay 2000, eq. 2.
    """
    if not (0 < tolerance < 1):
        raise InputError(f"refine: tolerance is {tolerance!r}; expected a number between 0 and 1.")
    b = np.asarray(to_host(rhs, "rhs"), np.float64).reshape(len(rhs), -1)
    size = np.linalg.norm(b, axis=0)
    size[size == 0] = 1.0

    def residual_of(x: np.ndarray) -> np.ndarray:
        return b - operator @ x - alpha * x

    x = np.asarray(solve(b), np.float64).reshape(b.shape)
    r = residual_of(x)
    true, iterations = _norms(r) / size, 0
    while iterations < max_iterations and not (true <= tolerance).all():
        step, steps = _descend(operator, solve, r, size, alpha, tolerance, max_iterations - iterations)
        iterations += steps
        r = residual_of(x + step)
        after = _norms(r) / size
        if not np.isfinite(after).all() or after.max() >= true.max():
            break
        fallen = after.max() < 0.5 * true.max()
        x, true = x + step, after
        if not fallen:
            break
    return Refinement(x.reshape(np.shape(rhs)), true, iterations, bool((true <= tolerance).all()))


def _descend(
    operator: Any,
    solve: Callable[[np.ndarray], np.ndarray],
    residual: np.ndarray,
    size: np.ndarray,
    alpha: float,
    tolerance: float,
    max_steps: int,
) -> tuple[np.ndarray, int]:
    """(correction, steps): flexible conjugate gradients from `residual` until the recurrence says that every column is done."""
    r, x = residual.copy(), np.zeros_like(residual)
    p, z_dot_r, before = np.zeros_like(r), np.ones(r.shape[1]), r
    for step in range(max_steps):
        active = _norms(r) > 0.5 * tolerance * size
        if not active.any():
            return x, step
        # unit columns: float32 has no exponents for residuals of 1e-40
        scale = np.where(active, _norms(r), 1.0)
        z = np.where(active, np.asarray(solve(r / scale), np.float64) * scale, 0.0)
        beta = np.zeros(r.shape[1]) if step == 0 else _dots(z, r - before) / z_dot_r
        p = z + np.where(active, beta, 0.0) * p
        q = operator @ p + alpha * p
        curvature = _dots(p, q)
        moving = active & (curvature > 0) & np.isfinite(curvature)
        if not moving.any():
            return x, step
        length = np.divide(_dots(p, r), curvature, out=np.zeros_like(curvature), where=moving)
        before, z_dot_r = r, np.where(moving, _dots(z, r), 1.0)
        x, r = x + length * p, r - length * q
    return x, max_steps


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->j", a, b)


def _norms(a: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a, axis=0)
