"""A small problem of kernel ridge, the ways to fit it, and its bordered system solved in float64."""

from dataclasses import replace

import numpy as np
from job_examples import ONE_THREAD, sited, stored

from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.kernels import RBF
from ntkdask.planning.tiles import Plan
from ntkdask.states import save_state
from ntkdask.workflows.kernel_ridge.fit import fit_kernel_ridge
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.plan import KernelShape, plan_kernel_ridge
from ntkdask.workflows.model import KernelRidgeModel
from ntkdask.workflows.split import state_of

N, ALPHAS = 83, (1e-3, 0.1, 10.0)
KERNEL = RBF(0.5)
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, 3))
Y = np.sin(X @ RNG.normal(size=(3, 2))) + 0.3 * RNG.normal(size=(N, 2)) + 2.0
WEIGHTS = RNG.uniform(0.2, 2.0, N)
WEIGHTS[[0, 17, N - 1]] = 0.0
GROUPS = RNG.integers(0, 3, N).astype(np.int16)
SOLVERS = ("eigh", "cholesky", "tiled_cholesky", "cg")


def options(solver, alphas=(0.1,), **keywords):
    return KernelRidgeOptions(alphas, solver=solver, **{"tolerance": 1e-12, "selection": "auto", **keywords})


def plan_of(choices, n=N, k=2, tile=45, rank=20, dtype="float64", batch_rows=30, **changes):
    """Ragged tiles, and a preconditioner of so low a rank that gradients iterate."""
    plan = plan_kernel_ridge(
        KernelShape(n, n, (3,), 24, k, 1, 3),
        KERNEL,
        choices,
        (),
        plan=Plan(tile_cols=tile, dtype=dtype),
        resources=ONE_THREAD,
    )
    return replace(plan, rank=rank, batch_rows=batch_rows, tile_rows=30, **{"cache_bytes": 2**30, **changes})


def fitted(
    choices, place, folder, client, *, x=X, y=Y, weights=None, groups=None, kernel=KERNEL, plan=None, **keywords
):
    """fit_kernel_ridge here in memory, here with tiles, or with tiles on a cluster; groups: part of every row, dealt to 0, 1, ..."""
    parts = () if groups is None else tuple((int(g),) for g in np.unique(groups))
    plan = plan or plan_of(choices, len(x), y.shape[1] if y.ndim == 2 else 1)
    if place == "memory":
        rows = MemoryRows(x, y, weights, groups)
        return fit_kernel_ridge(rows, parts, choices, plan, kernel=kernel, **sited(keywords))
    data = stored(folder, x, y, f"{len(list(folder.iterdir()))}.zarr", weights=weights)
    parts_url = None if groups is None else save_state(folder / "parts", state_of(groups))
    return fit_kernel_ridge(
        DatasetRows(data.url, parts_url, digest=data.digest),
        parts,
        choices,
        plan,
        kernel=kernel,
        **sited({"url": folder / "run", "client": client if place == "cluster" else None} | keywords),
    )


def naive(kernel, y, alpha, weights=None, intercept=True):
    """(coefficients (n, k), intercept (k,)): the weighted problem with a free intercept, as one bordered dense system."""
    y = y.reshape(len(y), -1)
    s = np.sqrt(np.ones(len(y)) if weights is None else weights)
    n = len(y)
    matrix = np.zeros((n + 1, n + 1))
    matrix[:n, :n] = s[:, None] * kernel * s + alpha * np.eye(n)
    matrix[:n, n] = matrix[n, :n] = s
    right = np.concatenate([s[:, None] * y, np.zeros((1, y.shape[1]))])
    if not intercept:
        matrix, right = matrix[:n, :n], right[:n]
    solved = np.linalg.solve(matrix, right)
    return s[:, None] * solved[:n], solved[n] if intercept else np.zeros(y.shape[1])


def assert_equals_naive(model: KernelRidgeModel, kernel, y, alpha, weights=None, intercept=True, rtol=1e-8):
    coefficients, b = naive(kernel, y, alpha, weights, intercept)
    np.testing.assert_allclose(model.coefficients, coefficients, atol=rtol * np.abs(coefficients).max() + 1e-14, rtol=0)
    np.testing.assert_allclose(model.intercept, b, rtol=rtol, atol=rtol)
