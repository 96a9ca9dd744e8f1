"""Gram sums of a dataset: slabs of rows accumulated where they are read, combined in a fixed binary tree.

    for every slab (a task):  G, B, s ← 0;  for every batch of its rows:  φ = map(x);  G += φᵀφ, B += φᵀy, s += φᵀ1
                              commit (G, B, s)
    combine pairs by slab index until one is left

Features are never stored. A committed slab is a checkpoint: a killed run loses at most the slab each worker was in.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.execution import Done, Node, reduce_tiles, tree_children, tree_nodes
from ntkdask.solvers.gram import GramSums, packed_length
from ntkdask.store import Receipt, TileStore
from ntkdask.tiles import Tile, row_tiles
from ntkdask.workflows.budget import RidgePlan
from ntkdask.workflows.progress import Listener, Silent
from ntkdask.workflows.stream import FeatureStream


@dataclass(frozen=True)
class SumsAddress:
    """Where the sums of a set of rows are stored: tile `index` of the store at `url`, for m features and k targets."""

    url: str
    index: int
    m: int
    k: int

    def load(self) -> GramSums:
        """The sums, unpacked."""
        return GramSums.unpack(TileStore.open(self.url).read((self.index, 0))[0], self.m, self.k)


@dataclass(frozen=True)
class _SlabTask:
    """Sum one slab; commit the packed sums to `url`, or (None) return them."""

    stream: FeatureStream
    k: int
    url: str | None

    def __call__(self, tile: Tile) -> Any:
        started = time.perf_counter()
        sums = accumulate(self.stream, tile, self.k)
        if self.url is None:
            return sums.to_host()
        packed = sums.pack()[None, :]
        del sums
        return TileStore.open(self.url).commit((tile.index[0], 0), packed, started)


@dataclass(frozen=True)
class _CombineTask:
    """Add two nodes of the tree; commit the sum at the node's own place, so that a repeat finds the same operands."""

    url: str | None
    places: dict[Node, int] | None

    def __call__(self, node: Node, left: Any, right: Any) -> Any:
        if self.url is None or self.places is None:
            left += right
            return left
        started = time.perf_counter()
        store = TileStore.open(self.url)
        total = store.read(left.index)
        total += store.read(right.index)
        return store.commit((self.places[node], 0), total, started)


def accumulate(stream: FeatureStream, tile: Tile, k: int) -> GramSums:
    """The Gram sums of one slab's selected rows, in place from zero."""
    sums: GramSums | None = None
    product = None
    for batch in stream.batches(tile.start, tile.stop):
        if sums is None:
            sums = GramSums.zeros(batch.phi.shape[1], k, batch.phi)
            if batch.phi.dtype == np.float32 and isinstance(batch.phi, np.ndarray):
                product = np.zeros((batch.phi.shape[1],) * 2, np.float32, order="F")
        sums.add(batch.phi, batch.y, batch.weights, product)
    return GramSums.zeros(stream.n_components, k) if sums is None else sums


def gram(
    stream: FeatureStream, k: int, plan: RidgePlan, *, url: Path | None = None, client: Any = None,
    listener: Listener | None = None, fingerprint: dict[str, Any] | None = None, label: str = "gram",
) -> GramSums | SumsAddress:  # fmt: skip
    """Gram sums of every selected row of the stream.

    url: the store of partial sums; they are resumed from it and the result is its address. None: sums are returned, and
    nothing survives this process. k: number of targets.
    """
    listener = listener or Silent()
    tiles = row_tiles(stream.rows.n_total, plan.slab_rows)
    nodes = tree_nodes(len(tiles))
    slab_label, sum_label = f"{label}-slab", f"{label}-sum"
    if url is None:
        listener.stage(slab_label, len(nodes))
        return reduce_tiles(
            _SlabTask(stream, k, None), _CombineTask(None, None), tiles, client, label=slab_label, sum_label=sum_label,
            receive=lambda node, done: listener.task(slab_label, done), threads=plan.threads,
        )  # fmt: skip
    places = {node: position for position, node in enumerate(nodes)}
    length = packed_length(stream.n_components, k)
    store = TileStore.create(
        url, shape=(len(nodes), length), tile_shape=(1, length), dtype="float64", fingerprint=fingerprint or {}
    )
    known = {node: r for node in nodes if (r := _committed(store, places[node])) is not None}
    listener.stage(slab_label, len(nodes), len(known))

    def receive(node: Node, done: Done[Receipt]) -> None:
        store.record(_with_facts(done))
        for child in children_of.get(node, ()):
            store.discard((places[child], 0))
        listener.task(slab_label, done)

    children_of = _children(nodes)
    root = reduce_tiles(
        _SlabTask(stream, k, str(store.path)), _CombineTask(str(store.path), places), tiles, client, label=slab_label,
        sum_label=sum_label, known=known, receive=receive, threads=plan.threads,
    )  # fmt: skip
    return SumsAddress(str(store.path), root.index[0], stream.n_components, k)


def _committed(store: TileStore, place: int) -> Receipt | None:
    receipt = store.receipts.get((place, 0))
    return receipt if receipt is not None and store.chunk_path((place, 0)).exists() else None


def _with_facts(done: Done[Receipt]) -> Receipt:
    r = done.value
    return Receipt(r.index, r.checksum, done.seconds, done.peak_bytes, done.worker)


def _children(nodes: list[Node]) -> dict[Node, tuple[Node, Node]]:
    """The two operands of every inner node."""
    n_leaves = sum(level == 0 for level, _ in nodes)
    return {node: tree_children(n_leaves, node) for node in nodes if node[0] > 0}
