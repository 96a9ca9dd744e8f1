"""Ensembles at convergence without eigenvalues: mean and variance from a tiled Cholesky factor, for matrices that fit no memory.

    α ← (Θ_DD + rI)⁻¹ Y;  for every tile of test rows:  mean ← Θ_TD α
        posterior: variance ← K_tt − ‖L⁻¹ K_Dt‖²            ensemble: X ← (Θ_DD + rI)⁻¹ Θ_Dt, variance ← K_tt + Xᵀ(K_DD X − 2 K_Dt)

The formulas are those of `solvers/gradient_flow.py` at t = ∞. Substitutions and products run as tasks of `Factor` and
`StoredKernel`; the driver holds one tile of test rows against all training rows, a few times.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution.site import Site
from ntkdask.matrices.factor import Factor
from ntkdask.matrices.operator import StoredKernel
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.planning.tiles import Plan, Tile, largest_rows, row_tiles
from ntkdask.store import TileStore
from ntkdask.wording import format_bytes
from ntkdask.workflows.ensemble.kernels import EnsembleMatrices, StoredKernels, open_matrices
from ntkdask.workflows.ensemble.plan import Training
from ntkdask.workflows.ensemble.run import EnsemblePrediction
from ntkdask.workflows.sources import encoded_targets

DRIVER_ROWS = 1024
"""Test rows of a tile: (rows, n) float64 four times in the driver; each tile reads the factor once or twice."""


def predict_converged(
    factor: Factor,
    matrices: EnsembleMatrices,
    targets: Any,
    *,
    kind: str = "ntk",
    output: str = "variance",
    n_classes: int | None = None,
    client: Any = None,
    plan: Plan | None = None,
) -> EnsemblePrediction:
    """Predictions of `predict_stored_ensemble` at times=inf with diag_reg=factor.alpha, without an eigendecomposition.

    Parameters
    ----------
    factor : Factor
        Of ntk_dd + rI for kind "ntk", of nngp_dd + rI for kind "nngp" (`factorize`), without scale.
    matrices : EnsembleMatrices
        As of `predict_stored_ensemble`; matrices of the test rows are needed.
    targets : array (n,) or (n, k)
        Numbers, or labels 0..C−1 with `n_classes`.
    kind : str
        "ntk" or "nngp".
    output : str
        "mean" or "variance".
    n_classes : int or None
        C of the labels, which become zero-mean one-hot targets. None: targets are numbers.
    client : distributed.Client or None
        Whose workers multiply with K_DD; the factor has its own for substitutions.
    plan : Plan or None
        tile_rows of test rows; None takes at most 1024, as many as fit a task. memory_bytes of a task; None takes the smallest
        worker's where there are workers.

    Returns
    -------
    EnsemblePrediction
        mean (1, m, k), variance (1, m) or None: NumPy arrays, float64. unlearned is 0: a matrix that has a Cholesky factor leaves
        no direction unlearned.

    Raises
    ------
    InputError
        When the factor is of another matrix, for a covariance, and as `predict_stored_ensemble`.
    MemoryBudgetError
        Before anything runs, when a task does not fit with a single test row, or with those of plan.tile_rows.

    Notes
    -----
    This process holds about four float64 arrays of tile_rows × n.
    """
    training = Training(kind, (math.inf,), output, factor.alpha)
    plan = plan or Plan()
    if output == "covariance" or matrices.nngp_td is None:
        raise InputError(
            'predict_converged gives output "mean" or "variance" on test rows (nngp_td). For the covariance, or training rows, use '
            "predict_stored_ensemble."
        )
    kernels, _ = open_matrices(matrices, training, plan)
    _require_its_matrix(factor, kernels.theta_dd)
    y = encoded_targets(targets, n_classes, kernels.n)
    assert kernels.theta_td is not None
    m = kernels.theta_td.shape[0]
    factor = _fitting_factor(factor, kernels.n, plan)
    tile_rows = plan.tile_rows or min(m, DRIVER_ROWS)
    if output == "variance" and kernels.k_dd is not None:
        tile_rows = _fitting_rows(kernels.k_dd, tile_rows, plan, client)
    weights = factor.solve(y)
    mean = np.empty((1, m, y.shape[1]))
    variance = None if output == "mean" else np.empty((1, m))
    for tile in row_tiles(m, tile_rows):
        rows = slice(tile.start, tile.stop)
        theta = kernels.theta_td[rows, :].astype(np.float64)
        mean[0, rows] = theta @ weights
        if variance is not None:
            explained = _explained(factor, kernels, theta, tile, client)
            variance[0, rows] = np.maximum(kernels.diagonal(tile) - explained, 0.0)
    return EnsemblePrediction((math.inf,), mean, variance, None, factor.alpha, 0.0, None)


def _explained(factor: Factor, kernels: StoredKernels, theta: np.ndarray, tile: Tile, client: Any) -> np.ndarray:
    """The part of the prior's variance that training explains, (rows,), of a tile of test rows."""
    if kernels.k_dd is None or kernels.k_td is None:
        return (factor.half_solve(theta.T) ** 2).sum(axis=0)
    gain = factor.solve(theta.T)
    k_dt = kernels.k_td[tile.start : tile.stop, :].astype(np.float64).T
    product = StoredKernel(kernels.k_dd.url, client=client) @ gain
    return np.einsum("ij,ij->j", gain, 2.0 * k_dt - product)


def _fitting_factor(factor: Factor, n: int, plan: Plan) -> Factor:
    """The factor with as many right-hand sides a substitution as fit a task; MemoryBudgetError where not one does."""
    limit = Site(client=factor.client).bounded(plan).memory_bytes
    if limit is None:
        return factor
    tile = TileStore.open(factor.url).tile_shape[0] ** 2 * factor.dtype.itemsize

    def substitution_bytes(columns: int) -> int:
        # as `plan_factorize` counts: tiles in use and on their way in; the right-hand sides and what is made of them
        return BASE_BYTES + 4 * tile + 4 * 8 * n * columns

    task = f"a substitution with the factor of {n} training rows"
    return replace(factor, columns=largest_rows(limit, substitution_bytes, factor.columns, task))


def _fitting_rows(k_dd: StoredMatrix, tile_rows: int, plan: Plan, client: Any) -> int:
    """At most tile_rows test rows, whose product with K_DD fits a task; MemoryBudgetError where not one, or not the plan's, fit."""
    offered = Site(client=client).resources()
    limit = plan.memory_bytes or offered.memory_bytes
    if limit is None:
        return tile_rows
    product = StoredKernel(k_dd.url, threads=offered.threads)
    task = f"a product with the prior's kernel of {k_dd.shape[0]} training rows"
    fitting = largest_rows(limit, lambda rows: BASE_BYTES + product.task_bytes(rows), tile_rows, task)
    if plan.tile_rows is not None and fitting < tile_rows:
        needed = BASE_BYTES + product.task_bytes(tile_rows)
        raise MemoryBudgetError(
            f"{task} and {tile_rows} test rows needs {format_bytes(needed)} but a task has {format_bytes(limit)}. "
            f"Use Plan.tile_rows <= {fitting}."
        )
    return fitting


def _require_its_matrix(factor: Factor, matrix: StoredMatrix) -> None:
    """InputError unless the factor is of this matrix, every row with weight 1."""
    fingerprint = TileStore.open(factor.url).fingerprint
    if fingerprint.get("matrix") != matrix.store.fingerprint or fingerprint.get("scale") is not None:
        raise InputError(
            f"the factor {factor.url} is not one of {Path(matrix.url).name} + rI alone. Factorise that matrix, without scale: "
            f"factorize({matrix.url!r}, r, url=...)."
        )
