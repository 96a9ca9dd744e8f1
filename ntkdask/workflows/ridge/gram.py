"""Gram sums of a dataset: slabs of rows accumulated where they are read, combined in a fixed binary tree.

    for every slab (a task):  G, B, s ← 0;  for every batch of its rows:  φ = map(x) − c;  G += φᵀφ, B += φᵀy, s += φᵀ1
                              commit (G, B, s)
    combine pairs by slab index until one is left

c is a point near the mean, the same for every slab (workflows/ridge/centre.py). Features are never stored. A committed slab is a
checkpoint (execution/slabs.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.execution.site import Site
from ntkdask.execution.slabs import reduce_slabs
from ntkdask.execution.tree import Node
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.solvers.gram import Centre, GramSums, packed_length
from ntkdask.store import TileStore
from ntkdask.workflows.ridge.centre import load_centre
from ntkdask.workflows.stream import FeatureStream


@dataclass(frozen=True)
class SumsAddress:
    """The address of stored Gram sums: tile `index` of the store at `url`, for m features and k targets about a centre."""

    url: str
    index: int
    m: int
    k: int
    centre: Centre | str | None = None

    def load(self) -> GramSums:
        """Read and unpack the sums."""
        packed = TileStore.open(self.url).read((self.index, 0))[0]
        return GramSums.unpack(packed, self.m, self.k, load_centre(self.centre))


@dataclass(frozen=True)
class _Slab:
    """The Gram sums of one slab, packed for the store or not."""

    stream: FeatureStream
    k: int
    packed: bool
    centre: Centre | str | None

    def __call__(self, tile: Tile) -> Any:
        sums = accumulate(self.stream, tile, self.k, load_centre(self.centre))
        return sums.pack() if self.packed else sums.to_host()


def _add(node: Node, left: GramSums, right: GramSums) -> GramSums:
    left += right
    return left


def accumulate(stream: FeatureStream, tile: Tile, k: int, centre: Centre | None = None) -> GramSums:
    """The Gram sums of the selected rows of one slab, about a centre."""
    sums: GramSums | None = None
    product = None
    for batch in stream.batches(tile.start, tile.stop):
        if sums is None:
            sums = GramSums.zeros(batch.phi.shape[1], k, batch.phi, centre)
            if batch.phi.dtype == np.float32 and isinstance(batch.phi, np.ndarray):
                product = np.zeros((batch.phi.shape[1],) * 2, np.float32, order="F")
        sums.add(batch.phi, batch.y, batch.weights, product)
    return GramSums.zeros(stream.n_components, k, centre=centre) if sums is None else sums


def gram(
    stream: FeatureStream,
    k: int,
    slab_rows: int,
    site: Site,
    *,
    centre: Centre | str | None = None,
    label: str = "gram",
    name: str | None = None,
) -> GramSums | SumsAddress:
    """Gram sums of every selected row of the stream.

    Parameters
    ----------
    stream : FeatureStream
        Rows, preprocessing and map.
    k : int
        Columns of the targets.
    slab_rows : int
        Rows that one task sums.
    site : Site
        Where the slabs run. With a folder, partial sums are kept there and resumed, and the result is an address. Without one,
        the sums themselves are returned and nothing is stored.
    centre : Centre, str or None
        The point that features and targets are counted from, or the url of its state. None: the origin.
    label : str
        The stages are `label`-slab and `label`-sum.
    name : str or None
        Name of the store of partial sums in the site's folder. None: the label.

    Returns
    -------
    GramSums or SumsAddress
        ΦᵀΦ (m, m), ΦᵀY (m, k), sums of features and targets, float64; or where they are stored.
    """
    slabs = row_tiles(stream.rows.n_total, slab_rows)
    if site.folder is None:
        task = _Slab(stream, k, packed=False, centre=centre)
        return site.reduce(task, _add, slabs, f"{label}-slab", sum_label=f"{label}-sum")
    store, index = reduce_slabs(
        _Slab(stream, k, packed=True, centre=centre),
        operator.iadd,
        slabs,
        packed_length(stream.n_components, k),
        site,
        label=label,
        store=site.folder / (name or label),
        # a state's name is the digest of its content
        fingerprint={**site.record.fingerprint, **({"centre": Path(centre).name} if isinstance(centre, str) else {})},
    )
    return SumsAddress(store, index, stream.n_components, k, centre)
