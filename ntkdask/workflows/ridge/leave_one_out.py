"""Leave-one-out scores of every alpha, by one more streamed pass over the rows of 2·n·m² flops.

The errors of a slab are kept where there is a folder, as Gram sums are (execution/slabs.py).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.cache import shared
from ntkdask.execution.site import Site
from ntkdask.execution.slabs import reduce_slabs
from ntkdask.execution.tree import Node
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.solvers.ridge import EighRidge
from ntkdask.states import load_state
from ntkdask.store import TileStore
from ntkdask.workflows.stream import FeatureStream


def load_spectrum(url: str) -> EighRidge:
    """The factorisation stored at `url`, loaded once per process."""
    return shared.get(("spectrum", url), lambda: EighRidge.from_state(*load_state(url)))


@dataclass(frozen=True, eq=False)
class _SlabTask:
    """(n_alphas + 1,): the squared errors of one slab for every alpha, then its weight times the number of targets."""

    stream: FeatureStream
    ridge: EighRidge | str
    alphas: tuple[float, ...]

    def __call__(self, tile: Tile) -> np.ndarray:
        ridge = load_spectrum(self.ridge) if isinstance(self.ridge, str) else self.ridge
        total = np.zeros(len(self.alphas) + 1)
        for batch in self.stream.batches(tile.start, tile.stop):
            y = to_host(batch.y)
            weights = None if batch.weights is None else to_host(batch.weights)
            total[:-1] += ridge.leave_one_out_squares(to_host(batch.phi), y, weights, self.alphas)
            total[-1] += (len(y) if weights is None else weights.sum()) * y.shape[1]
        return total


def _add(node: Node, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left + right


def leave_one_out(
    stream: FeatureStream, ridge: EighRidge | str, alphas: Sequence[float], slab_rows: int, site: Site
) -> list[float]:
    """Mean squared leave-one-out error per target and unit of weight, for every alpha.

    Parameters
    ----------
    stream : FeatureStream
        Features and targets of the training rows.
    ridge : EighRidge or str
        The factorisation, or the url of its state (required with a client).
    alphas : sequence of float
        The ridges.
    slab_rows : int
        Rows that one task sums.
    site : Site
        Where the tasks run. Its folder keeps the errors of every slab where the factorisation is given by its url.

    Returns
    -------
    list of float
        A score for each alpha.
    """
    tiles = row_tiles(stream.rows.n_total, slab_rows)
    task = _SlabTask(stream, ridge, tuple(alphas))
    if site.folder is None or not isinstance(ridge, str):
        total = site.reduce(task, _add, tiles, "loo-slab", sum_label="loo-sum")
    else:
        decides = {"spectrum": Path(ridge).name, "alphas": list(alphas)}
        url, place = reduce_slabs(
            task,
            operator.add,
            tiles,
            len(alphas) + 1,
            site,
            label="loo",
            store=site.folder / "loo",
            fingerprint={**site.record.fingerprint, **decides},
        )
        total = TileStore.open(url).read((place, 0))[0]
    return (total[:-1] / total[-1]).tolist()
