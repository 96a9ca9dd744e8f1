"""A kernel matrix in a store, with its factor and solutions by LAPACK."""

import sys

import cloudpickle
import numpy as np

from ntkdask.matrices import factorize as factorize_module
from ntkdask.matrices.factorize_plan import blocks_of, plan_factorize
from ntkdask.store import TileStore

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


N = 90
SIDE = 6  # tiles of 16 rows, the last one ragged


def kernel(n=N, d=4, seed=0, repeat=()):
    """A Gaussian kernel matrix of n rows; repeat: pairs (i, j), row j is row i again."""
    x = np.random.default_rng(seed).standard_normal((n, d))
    for i, j in repeat:
        x[j] = x[i]
    square = (x**2).sum(1)
    return np.exp(-np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / d)


def store_matrix(folder, matrix, tile=16, dtype="float64", name="matrix"):
    store = TileStore.create(
        folder / name,
        shape=matrix.shape,
        tile_shape=(tile, tile),
        dtype=dtype,
        fingerprint={"seed": 0},
        triangle="symmetric",
    )
    for index in store.indices():
        store.record(store.commit(index, np.ascontiguousarray(matrix[store.slices(index)], dtype=dtype)))
    return store.path


def lower(url):
    # what lies above the stored triangle reads as NaN
    return np.tril(TileStore.open(url).zarr_array()[:])


def blocked(monkeypatch, tiles):
    """Let tasks compute blocks of `tiles` × `tiles` tiles, whatever the planner would choose."""
    monkeypatch.setattr(factorize_module, "plan_factorize", lambda *a, **k: _with_block(plan_factorize(*a, **k), tiles))


def _with_block(plan, tiles):
    count = sum(1 for _ in blocks_of(-(-plan.n // plan.tile_rows), tiles))
    return type(plan)(**{**vars(plan), "block_tiles": tiles, "tasks": count})
