"""Gram sums of a dataset: slabs of rows accumulated where they are read, combined in a fixed binary tree.

    for every slab (a task):  G, B, s ← 0;  for every batch of its rows:  φ = map(x);  G += φᵀφ, B += φᵀy, s += φᵀ1
                              commit (G, B, s)
    combine pairs by slab index until one is left

Features are never stored. A committed slab is a checkpoint (slabs.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.execution.map_reduce import reduce_tiles
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.slabs import reduce_slabs
from ntkdask.execution.tree import Node, tree_nodes
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.solvers.gram import GramSums, packed_length
from ntkdask.store import TileStore
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
class _Slab:
    """The sums of one slab: themselves, or packed for the store."""

    stream: FeatureStream
    k: int
    packed: bool

    def __call__(self, tile: Tile) -> Any:
        sums = accumulate(self.stream, tile, self.k)
        return sums.pack() if self.packed else sums.to_host()


def _add(node: Node, left: GramSums, right: GramSums) -> GramSums:
    left += right
    return left


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
    stream: FeatureStream,
    k: int,
    plan: RidgePlan,
    *,
    url: Path | None = None,
    client: Any = None,
    listener: Listener | None = None,
    fingerprint: dict[str, Any] | None = None,
    label: str = "gram",
) -> GramSums | SumsAddress:
    """Gram sums of every selected row of the stream.

    url: the store of partial sums; they are resumed from it and the result is its address. None: sums are returned, and
    nothing survives this process. k: number of targets.
    """
    listener = listener or Silent()
    if url is None:
        tiles, slab_label = row_tiles(stream.rows.n_total, plan.slab_rows), f"{label}-slab"
        listener.stage(slab_label, len(tree_nodes(len(tiles))))
        return reduce_tiles(
            _Slab(stream, k, packed=False),
            _add,
            tiles,
            client,
            label=slab_label,
            sum_label=f"{label}-sum",
            receive=lambda node, done: listener.task(slab_label, done),
            threads=plan.threads,
        )
    store, index = reduce_slabs(
        _Slab(stream, k, packed=True),
        operator.iadd,
        stream.rows.n_total,
        packed_length(stream.n_components, k),
        plan,
        url=url,
        client=client,
        listener=listener,
        fingerprint=fingerprint or {},
        label=label,
    )
    return SumsAddress(store, index, stream.n_components, k)
