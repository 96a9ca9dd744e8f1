"""Sums over slabs of rows kept in a tile store. A committed slab is a checkpoint: a killed run loses at most the slab each worker
was in.

for every slab (a task):  vector ← slab(rows);  commit
combine pairs by slab index until one is left (a fixed binary tree: equal plan, equal bits)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.execution.map_reduce import Done, reduce_tiles
from ntkdask.execution.progress import Listener
from ntkdask.execution.tree import Node, tree_children, tree_nodes
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
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
    """Add two nodes of the tree; commit the sum at the node's own place, so that a repeat finds the same operands."""

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
    n_total: int,
    length: int,
    plan: RidgePlan,
    *,
    url: Path,
    client: Any,
    listener: Listener,
    fingerprint: dict[str, Any],
    label: str,
) -> tuple[str, int]:
    """(url, index) of the tile that holds the sum, (1, length) float64, over all slabs of n_total rows.

    slab(tile) sums the selected rows of a slab into (length,) float64; combine(left, right) may reuse left. Both travel to the
    workers. What an earlier run committed under an equal fingerprint is not computed again. Stages are `label`-slab and `label`-sum.
    """
    tiles = row_tiles(n_total, plan.slab_rows)
    nodes = tree_nodes(len(tiles))
    slab_label = f"{label}-slab"
    places = {node: position for position, node in enumerate(nodes)}
    store = TileStore.create(
        url, shape=(len(nodes), length), tile_shape=(1, length), dtype="float64", fingerprint=fingerprint
    )
    known = {node: r for node in nodes if (r := _committed(store, places[node])) is not None}
    listener.stage(slab_label, len(nodes), len(known))
    children_of = {node: tree_children(len(tiles), node) for node in nodes if node[0] > 0}

    def receive(node: Node, done: Done[Receipt]) -> None:
        r = done.value
        store.record(Receipt(r.index, r.checksum, done.seconds, done.peak_bytes, done.worker))
        for child in children_of.get(node, ()):
            store.discard((places[child], 0))
        listener.task(slab_label, done)

    root = reduce_tiles(
        _SlabTask(slab, str(store.path)),
        _CombineTask(combine, str(store.path), places),
        tiles,
        client,
        label=slab_label,
        sum_label=f"{label}-sum",
        known=known,
        receive=receive,
        threads=plan.threads,
    )
    return str(store.path), root.index[0]


def _committed(store: TileStore, place: int) -> Receipt | None:
    receipt = store.receipts.get((place, 0))
    return receipt if receipt is not None and store.chunk_path((place, 0)).exists() else None
