"""Sums over slabs of rows kept in a tile store.

    for every slab (a task):  vector ← slab(rows);  commit
    combine pairs by slab index until one is left (a fixed binary tree: equal plan, equal bits)

A committed slab is a checkpoint: a killed run loses at most the slab that each worker was computing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.execution.map_reduce import reduce_tiles
from ntkdask.execution.site import Site
from ntkdask.execution.tree import Node, tree_children, tree_nodes
from ntkdask.execution.window import Done
from ntkdask.planning.tiles import Tile
from ntkdask.store import Receipt, TileStore


@dataclass(frozen=True)
class _SlabTask:
    """Sum one slab into a vector; commit it."""

    slab: Callable[[Tile], np.ndarray]
    url: str

    def __call__(self, tile: Tile) -> Receipt:
        started = time.perf_counter()
        return TileStore.open(self.url).commit((tile.index[0], 0), self.slab(tile)[None, :], started)


@dataclass(frozen=True)
class _CombineTask:
    """Add two nodes of the tree; commit the sum in a tile of its own, so that a repeated task reads the same operands."""

    combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
    url: str
    places: dict[Node, int]

    def __call__(self, node: Node, left: Receipt, right: Receipt) -> Receipt:
        started = time.perf_counter()
        store = TileStore.open(self.url)
        total = self.combine(store.read(left.index)[0], store.read(right.index)[0])
        return store.commit((self.places[node], 0), total[None, :], started)


def reduce_slabs(
    slab: Callable[[Tile], np.ndarray],
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
    slabs: Sequence[Tile],
    length: int,
    site: Site,
    *,
    label: str,
    store: Path,
    fingerprint: Mapping[str, Any],
) -> tuple[str, int]:
    """Sum all slabs through a store of partial sums; slabs that an earlier run committed are not computed again.

    Parameters
    ----------
    slab : function of a tile
        Sums the selected rows of a slab into (length,) float64. Sent to the workers.
    combine : function of two vectors
        Adds two sums; may reuse the left one. Sent to the workers.
    slabs : sequence of Tile
        Ranges of rows, in their order.
    length : int
        Numbers of one sum.
    site : Site
        Where the tasks run.
    label : str
        The stages are `label`-slab and `label`-sum.
    store : Path
        Where partial sums are kept.
    fingerprint : mapping
        Everything that decides the sums; a store with another fingerprint is refused.

    Returns
    -------
    (str, int)
        Url and index of the tile that holds the total, (1, length) float64.
    """
    nodes = tree_nodes(len(slabs))
    slab_label = f"{label}-slab"
    places = {node: position for position, node in enumerate(nodes)}
    sums = TileStore.create(
        store,
        shape=(len(nodes), length),
        tile_shape=(1, length),
        dtype="float64",
        fingerprint=fingerprint,
        dimensions=("node", "entry"),
    )
    known = {node: r for node in nodes if (r := _committed(sums, places[node])) is not None}
    site.listener.stage(slab_label, len(nodes), len(known))
    children_of = {node: tree_children(len(slabs), node) for node in nodes if node[0] > 0}

    def receive(node: Node, done: Done[Receipt]) -> None:
        sums.record(replace(done.value, seconds=done.seconds, peak_bytes=done.peak_bytes, worker=done.worker))
        for child in children_of.get(node, ()):
            sums.discard((places[child], 0))
        site.listener.task(slab_label, done)

    root = reduce_tiles(
        _SlabTask(slab, str(sums.path)),
        _CombineTask(combine, str(sums.path), places),
        slabs,
        site.client,
        label=slab_label,
        sum_label=f"{label}-sum",
        known=known,
        receive=receive,
        threads=site.threads,
    )
    return str(sums.path), root.index[0]


def _committed(store: TileStore, place: int) -> Receipt | None:
    receipt = store.receipts.get((place, 0))
    return receipt if receipt is not None and store.chunk_path((place, 0)).exists() else None
