"""Ensembles at convergence without eigenvalues: mean and variance from a tiled Cholesky factor, for matrices that fit no memory.

    α ← (Θ_DD + rI)⁻¹ Y;  for every tile of test rows:  mean ← Θ_TD α
        posterior: variance ← K_tt − ‖L⁻¹ K_Dt‖²            ensemble: X ← (Θ_DD + rI)⁻¹ Θ_Dt, variance ← K_tt + Xᵀ(K_DD X − 2 K_Dt)

The formulas are those of `solvers/gradient_flow.py` at t = ∞. Substitutions and products run as tasks of `Factor` and
`StoredKernel`; the driver holds one tile of test rows against all training rows, a few times.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.errors import InputError
from ntkdask.matrices.factor import Factor
from ntkdask.matrices.operator import StoredKernel
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.tiles import Plan, Tile, row_tiles
from ntkdask.store import TileStore
from ntkdask.workflows.ensemble.kernels import EnsembleMatrices, StoredKernels, open_matrices
from ntkdask.workflows.ensemble.plan import Training
from ntkdask.workflows.ensemble.predict import encoded_targets
from ntkdask.workflows.ensemble.run import EnsemblePrediction

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
    """What `predict_stored_ensemble` gives at times=inf with diag_reg=factor.alpha, without an eigendecomposition.

    factor: of ntk_dd + rI for kind "ntk", of nngp_dd + rI for kind "nngp" (`factorize`), without scale. matrices, targets, kind,
    n_classes: as there; test matrices are needed. output: "mean" or "variance". client: where products with K_DD run; the factor
    knows its own. plan: tile_rows of test rows. InputError when the factor is of another matrix.
    """
    training = Training(kind, (math.inf,), output, factor.alpha)
    plan = plan or Plan()
    if output == "covariance" or matrices.nngp_td is None:
        raise InputError(
            'predict_converged gives output "mean" or "variance" on test rows (nngp_td). For the covariance, or training rows, use '
            "predict_stored_ensemble."
        )
    kernels, _ = open_matrices(matrices, training, None, plan)
    _require_its_matrix(factor, kernels.theta_dd)
    y = encoded_targets(targets, n_classes, kernels.n)
    assert kernels.theta_td is not None
    weights = factor.solve(y)
    m = kernels.theta_td.shape[0]
    mean = np.empty((1, m, y.shape[1]))
    variance = None if output == "mean" else np.empty((1, m))
    for tile in row_tiles(m, plan.tile_rows or min(m, DRIVER_ROWS)):
        rows = slice(tile.start, tile.stop)
        theta = kernels.theta_td[rows, :].astype(np.float64)
        mean[0, rows] = theta @ weights
        if variance is not None:
            taken = _explained(factor, kernels, theta, tile, client)
            variance[0, rows] = np.maximum(kernels.diagonal(tile) - taken, 0.0)
    return EnsemblePrediction((math.inf,), mean, variance, None, factor.alpha, 0.0, None)


def _explained(factor: Factor, kernels: StoredKernels, theta: np.ndarray, tile: Tile, client: Any) -> np.ndarray:
    """What training takes from the prior's variance of a tile of test rows: (rows,)."""
    if kernels.k_dd is None or kernels.k_td is None:
        return (factor.half_solve(theta.T) ** 2).sum(axis=0)
    gain = factor.solve(theta.T)
    k_dt = kernels.k_td[tile.start : tile.stop, :].astype(np.float64).T
    product = StoredKernel(kernels.k_dd.url, client=client) @ gain
    return np.einsum("ij,ij->j", gain, 2.0 * k_dt - product)


def _require_its_matrix(factor: Factor, matrix: StoredMatrix) -> None:
    """InputError unless the factor is of this matrix, every row with weight 1."""
    made_of = TileStore.open(factor.url).fingerprint
    if made_of.get("matrix") != matrix.store.fingerprint or made_of.get("scale") is not None:
        raise InputError(
            f"the factor {factor.url} is not one of {Path(matrix.url).name} + rI alone. Factorise that matrix, without scale: "
            f"factorize({matrix.url!r}, r, url=...)."
        )
