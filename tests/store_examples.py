"""A small store of tiles, and processes that write to it."""

import multiprocessing
from pathlib import Path

import numpy as np

from ntkdask.store import TileStore

SHAPE, TILE = (10, 7), (4, 3)  # 3 × 3 tiles, ragged on both axes
PARAMETERS = {"seed": 0, "map": {"type": "NTKSketch", "n_components": 7}}


def create(path: Path, **changes) -> TileStore:
    options = {"shape": SHAPE, "tile_shape": TILE, "dtype": "float64", "fingerprint": PARAMETERS}
    return TileStore.create(path, **{**options, **changes})


def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE)


def fill(tiles: TileStore, indices=None) -> np.ndarray:
    """Commit and record tiles of `values()`."""
    full = values()
    for index in tiles.indices() if indices is None else indices:
        tiles.record(tiles.commit(index, np.ascontiguousarray(full[tiles.slices(index)])))
    return full


def spawn(target, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "weights": rng.normal(size=(30, 4)),
        "fortran": np.asfortranarray(rng.normal(size=(6, 5)).astype(np.float32)),
        "scalar": np.array(2.5),
        "count": np.array(3, np.int64),
        "empty": np.empty((0, 3)),
        "0.mean": np.zeros(4),
    }
