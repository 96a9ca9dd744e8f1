"""Traces of functions of an operator from random probes: statistical dimensions, traces of inverses, GCV without a spectrum.

For a symmetric A of which only products are known, and random signs z: E[zᵀ f(A) z] = tr f(A) (Hutchinson 1990). The quadratic
forms come from Lanczos quadrature (one run per probe serves every f), or from solves that a factorisation or conjugate gradients
make anyway. Every estimate comes with the standard error over its probes. Probes are seeded: equal seeds, equal numbers.

An operator is any object with `.shape` and `@` on (n, k) float64 arrays; a CuPy matrix is one, and then the probes are on its
device. Called by the spectrum, and by kernel ridge where no eigendecomposition fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ntkdask import lapack, seeds
from ntkdask.arrays import Array, is_device_array, namespace, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.solvers.dual_problem import DualProblem

Operator = Any
"""Any object with `.shape` (n, n) and `@` on (n,) and (n, k) float64 arrays, symmetric."""


@dataclass(frozen=True)
class Quadrature:
    """Gauss quadratures of the spectral measures of p probes, zᵀ f(A) z ≈ Σ_j weights_j f(nodes_j), and Gauss–Radau ones.

    A row of weights sums to ‖z‖². For 1/(e + α), e/(e + α) and log(e + α) the two rules lie on either side of the truth.

    Parameters
    ----------
    nodes, weights : array (p, n_steps), float64
        The Gauss rules.
    radau_nodes, radau_weights : array (p, n_steps + 1), float64
        The Gauss–Radau rules, with one node at the lower end of the spectrum (0, or below the eigenvalues that rounding made
        negative).

    References
    ----------
    Golub & Meurant 2010, §6.2; Ubaru, Chen & Saad 2017, Algorithm 1.
    """

    nodes: np.ndarray
    weights: np.ndarray
    radau_nodes: np.ndarray
    radau_weights: np.ndarray

    def trace(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """(estimate, error) of tr f(A), f elementwise on arrays of eigenvalues.

        The estimate is the mean of both rules; the error combines the standard error over probes and half the gap between the
        rules.
        """
        gauss = (self.weights * function(self.nodes)).sum(axis=1)
        radau = (self.radau_weights * function(self.radau_nodes)).sum(axis=1)
        value, error = mean_and_error((gauss + radau) / 2)
        return value, float(np.hypot(error, (gauss - radau).mean() / 2))


@dataclass(frozen=True)
class TraceScores:
    """GCV and effective dimension at one alpha from a stochastic trace, each with its standard error over the probes."""

    gcv: float
    gcv_error: float
    effective_dimension: float
    effective_dimension_error: float


def mean_and_error(samples: np.ndarray) -> tuple[float, float]:
    """(mean, standard error of the mean) of independent samples (p,), p ≥ 2."""
    return float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(samples.size))


def sign_probes(n: int, n_probes: int, seed: int = 0, weights: np.ndarray | None = None) -> np.ndarray:
    """Random signs (n, n_probes), float64; 0 in rows whose weight is 0, so that traces are over the other rows.

    Column j does not depend on how many are asked for. InputError for fewer than two probes: one has no standard error.
    """
    if n_probes < 2:
        raise InputError(
            f"traces: n_probes is {n_probes}; use at least 2, since the error is estimated from their spread."
        )
    probes = np.stack([seeds.signs(seed, ("trace", "probe", j), n) for j in range(n_probes)], axis=1)
    return probes if weights is None else probes * (np.asarray(weights) > 0)[:, None]


def quadrature_bytes(n: int, n_probes: int, n_steps: int) -> int:
    """Bytes that `lanczos_quadrature` holds: the whole basis of every probe, and three blocks of probes."""
    return 8 * n * n_probes * (min(n_steps, n) + 3)


def lanczos_quadrature(operator: Operator, n_probes: int = 16, n_steps: int = 50, seed: int = 0) -> Quadrature:
    """One Lanczos run for each random-sign probe, all at once: n_steps products of the operator with (n, n_probes).

    The basis is reorthogonalised (twice is enough), so n_steps ≥ the number of distinct eigenvalues gives exact quadratic
    forms; a run that exhausts its space stops early. Memory: `quadrature_bytes`.
    InputError when the operator is not square or gives NaN.
    """
    n = _square(operator)
    if n_steps < 1:
        raise InputError(f"traces: n_steps is {n_steps}; use at least 1.")
    steps = min(n_steps, n)
    vector = to_device(sign_probes(n, n_probes, seed) / np.sqrt(n), is_device_array(operator))
    xp = namespace(vector)
    basis = xp.empty((n_probes, steps, n))
    diagonal, off_diagonal = xp.zeros((n_probes, steps)), xp.zeros((n_probes, steps))
    scale = xp.zeros(n_probes)
    for j in range(steps):
        basis[:, j] = vector.T
        vector = operator @ vector
        diagonal[:, j] = xp.einsum("pn,np->p", basis[:, j], vector)
        scale = xp.maximum(scale, xp.sqrt(xp.einsum("np,np->p", vector, vector)))
        for _ in range(2):
            vector = vector - _project(basis[:, : j + 1], vector)
        size = xp.sqrt(xp.einsum("np,np->p", vector, vector))
        # an exhausted run goes on with zero vectors: their block of T is decoupled from the probe and weighs nothing
        size = xp.where(size > n * np.finfo(float).eps * scale, size, 0.0)
        off_diagonal[:, j] = size
        vector = vector * xp.where(size > 0, 1.0 / xp.where(size > 0, size, 1.0), 0.0)
    return _quadrature(to_host(diagonal), to_host(off_diagonal), n)


def _project(basis: Array, vector: Array) -> Array:
    """The component of each probe's vector (n, p) in the span of its basis (p, j, n): two batched products."""
    columns = vector.T[:, :, None]
    return (basis.transpose(0, 2, 1) @ (basis @ columns))[:, :, 0].T


def _quadrature(diagonal: np.ndarray, off_diagonal: np.ndarray, n: int) -> Quadrature:
    if not np.isfinite(diagonal).all():
        raise InputError(
            "traces: a product with the operator gave NaN or infinity. Check the stored matrix and its scale."
        )
    gauss = [lapack.stemr(d, e[:-1]) for d, e in zip(diagonal, off_diagonal, strict=True)]
    extended = [_radau(d, e, float(values[0])) for d, e, (values, _) in zip(diagonal, off_diagonal, gauss, strict=True)]
    radau = [lapack.stemr(d, e) for d, e in extended]
    parts = (np.stack([pair[0] for pair in pairs]) for pairs in (gauss, radau))
    sizes = (n * np.stack([pair[1][0] ** 2 for pair in pairs]) for pairs in (gauss, radau))
    (nodes, radau_nodes), (weights, radau_weights) = parts, sizes
    return Quadrature(nodes, weights, radau_nodes, radau_weights)


def _radau(diagonal: np.ndarray, off_diagonal: np.ndarray, lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """(diagonal, off-diagonal) of T with one more row that puts an eigenvalue at the lower end. Golub & Meurant 2010, §6.2.1."""
    end = 2.0 * min(lowest, 0.0)
    pivot = diagonal[0] - end
    for d, e in zip(diagonal[1:], off_diagonal[:-1], strict=True):
        pivot = d - end - (e**2 / pivot if e else 0.0)
    # an exhausted run (off-diagonal 0) is exact: the row added stays apart
    last = end + off_diagonal[-1] ** 2 / pivot if off_diagonal[-1] else end
    return np.append(diagonal, last), off_diagonal


def statistical_dimensions(
    operator: Operator, alphas: Sequence[float], n_probes: int = 16, n_steps: int = 50, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(values, standard errors), each (n_alphas,) float64, of s(α) = tr A(A + α)⁻¹ by stochastic Lanczos quadrature.

    One set of n_steps products with (n, n_probes) serves every alpha. Eigenvalues below 0, rounding of float32 matrices, count
    as 0. The errors include that of the quadrature (`Quadrature.trace`), which falls like exp(−4·n_steps·√(α/λ_max)): where
    they are large at alphas far below λ_max, raise n_steps. InputError for alpha ≤ 0, where s is the rank and rounding decides it.
    """
    values = np.asarray(alphas, dtype=np.float64)
    if not (values > 0).all():
        raise InputError(
            f"traces: the statistical dimension is asked for alpha={values.min():g}; it needs alpha > 0 "
            "(at 0 it is the rank, which random probes cannot tell from rounding)."
        )
    quadrature = lanczos_quadrature(operator, n_probes, n_steps, seed)
    pairs = [quadrature.trace(partial(_share, a)) for a in values.tolist()]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def _share(alpha: float, eigenvalues: np.ndarray) -> np.ndarray:
    e = np.maximum(eigenvalues, 0.0)
    return e / (e + alpha)


def inverse_trace(probes: np.ndarray, solved: np.ndarray) -> tuple[float, float]:
    """(estimate, standard error) of tr C⁻¹ from probes (n, p) and solved (n, p) = C⁻¹·probes: the mean of zᵀC⁻¹z.

    Probes that are 0 on some rows give the trace over the others, if C is block diagonal with respect to them. Hutchinson 1990.
    """
    return mean_and_error(np.einsum("np,np->p", probes, solved))


def stochastic_scores(
    problem: DualProblem, solved: np.ndarray, probes: np.ndarray, probes_solved: np.ndarray, alpha: float
) -> TraceScores:
    """GCV, defined as in `EighRidge.gcv` (intercept included), and effective dimension from solves alone.

    The intercept's part of the trace is exact. GCV's error is first order in the trace's.

    Parameters
    ----------
    problem : DualProblem
        The problem, with C = S K S + αI.
    solved : array (n, k + 1)
        C⁻¹·problem.right_hand_sides().
    probes : array (n, p)
        `sign_probes(n, p, seed, weights)`.
    probes_solved : array (n, p)
        C⁻¹·probes.
    alpha : float
        α.
    """
    trace, error = inverse_trace(probes, probes_solved)
    free = alpha * problem.free(solved, trace)
    gcv = problem.gcv(solved, trace, alpha)
    spread = 2 * gcv * alpha * error / free if free > 0 else float("inf")
    return TraceScores(gcv, spread, problem.kept.size - free, alpha * error)


def _square(operator: Operator) -> int:
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise InputError(f"traces: the operator has shape {shape}; give a symmetric one, (n, n) with n > 0.")
    return int(shape[0])
