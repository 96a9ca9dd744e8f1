"""Fit a data-dependent feature map to a stream of training rows, out of core.

    for every pass:   for every slab (a task):  S ← 0;  for every batch of its rows:  S += what the map gathers;  commit S
                      combine pairs by slab index until one is left;  learned ← learned + map.finish(S)  (a task)

Every pass ends in a state, `state/<digest>`: a killed run goes on in the pass it was in. The protocol is that of features/fitting.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ntkdask import threads
from ntkdask.datasets.rows import Rows
from ntkdask.execution.map_reduce import map_tiles, reduce_tiles
from ntkdask.execution.progress import Listener, Record, Silent
from ntkdask.execution.slabs import reduce_slabs
from ntkdask.execution.tree import Node, tree_nodes
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import (
    DataDependentMap,
    FittedMap,
    Learned,
    Sums,
    Training,
    TrainingBatch,
    learns,
    pack_sums,
    require_targets,
    to_host_sums,
    unpack_sums,
)
from ntkdask.files import remove
from ntkdask.planning.resources import BATCH_ROWS, RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles, slab_rows
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.store import TileStore
from ntkdask.workflows.stream import ROWWISE, FeatureStream, load_map, store_map

LABEL = "features"


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass of a map over rows: what it learned before, as the map itself or the url of its state."""

    index: int
    so_far: FittedMap | str
    training: Training

    @property
    def fitted(self) -> FittedMap:
        return cast(FittedMap, load_map(self.so_far)) if isinstance(self.so_far, str) else self.so_far

    @property
    def map(self) -> DataDependentMap:
        return self.fitted.map

    @property
    def learned(self) -> Learned:
        return self.fitted.learned

    def empty(self) -> Sums:
        return self.map.begin(self.index, self.learned, self.training)

    def finish(self, sums: Sums) -> FittedMap:
        return FittedMap(self.map, self.learned + self.map.finish(self.index, self.learned, sums, self.training))


@dataclass(frozen=True, eq=False)
class _Slab:
    """What one slab's selected rows give, packed."""

    work: _Pass
    stream: FeatureStream

    def __call__(self, tile: Tile) -> np.ndarray:
        work, sums = self.work, None
        feature_map, learned = work.map, work.learned
        for batch in self.stream.batches(tile.start, tile.stop, with_targets=work.training.n_targets > 0):
            if sums is None:
                sums = feature_map.begin(work.index, learned, work.training, batch.phi)
            rows = TrainingBatch(batch.phi, batch.y, batch.weights, batch.numbers)
            feature_map.accumulate(work.index, learned, rows, sums)
        return pack_sums(work.empty() if sums is None else sums)


@dataclass(frozen=True, eq=False)
class _Merge:
    work: _Pass

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        work = self.work
        a, b = unpack_sums(left, work.empty()), unpack_sums(right, work.empty())
        return pack_sums(to_host_sums(work.map.merge(work.index, a, b)))


@dataclass(frozen=True, eq=False)
class _FinishTask:
    """End a pass where there are cores for it (landmarks: an eigendecomposition); store what is known now, return its url."""

    work: _Pass
    sums: tuple[str, int]
    states: str

    def __call__(self, tile: int) -> str:
        url, index = self.sums
        sums = unpack_sums(TileStore.open(url).read((index, 0))[0], self.work.empty())
        return store_map(self.states, self.work.finish(sums))


def fit_features(
    stream: FeatureStream,
    feature_map: FeatureMap | None,
    plan: RidgePlan,
    k: int,
    *,
    url: Path | None = None,
    client: Any = None,
    listener: Listener | None = None,
    record: Record | None = None,
    name: str = "",
) -> FeatureMap | str | None:
    """`feature_map` fitted to the selected rows of the stream, whose own map is ignored; itself when there is nothing to learn.

    k: columns of the targets, 0 without any. url: the folder of partial sums and states, needed with a client; the result is then
    the url of the fitted map's state, and what an earlier run finished is found through `record` under names that begin with `name`.
    Weighted rows count by their weights. InputError for targets that a map needs and the rows do not have.
    """
    if not learns(feature_map):
        if url is not None and isinstance(feature_map, FittedMap):
            return store_map(url / "state", feature_map)  # tasks carry no arrays
        return feature_map
    listener, record = listener or Silent(), record or Record()
    asked = cast(DataDependentMap, feature_map)
    require_targets(asked, k > 0)
    rows = replace(stream, map=ROWWISE)
    training = Training(rows.rows.row_shape, plan.dtype, k, rows.rows.n_total, plan.device)
    if url is None:
        fitted = FittedMap(asked, Learned())
        for index in range(asked.n_passes):
            fitted = _pass_here(_Pass(index, fitted, training), rows, plan, listener)
        return fitted
    address = store_map(url / "state", FittedMap(asked, Learned()))
    for index in range(asked.n_passes):
        work, folder = _Pass(index, address, training), url / f"{name.rpartition('/')[2]}{LABEL}-{index}"

        def run(work: _Pass = work, folder: Path = folder) -> str:
            return _stored_pass(work, rows, plan, folder, url / "state", client, listener, record.fingerprint)

        address = record.once(f"{name}{LABEL}-{index}", run)
        remove(folder)  # the state says it all
    return address


def fit_to_rows(
    feature_map: FeatureMap | None, rows: Rows, dtype: str, k: int, n_classes: int | None = None
) -> FeatureMap | None:
    """`feature_map` fitted to all the selected rows, cast to dtype, in this process; k columns of targets, n_classes for labels."""
    slab, n_threads = slab_rows(rows.n_total), threads.ambient()
    plan = RidgePlan(dtype, slab, min(slab, BATCH_ROWS), slab, n_threads, n_threads, device=False)
    preprocessor = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    stream = FeatureStream(rows, preprocessor, None, n_classes, plan.batch_rows)
    return cast("FeatureMap | None", fit_features(stream, feature_map, plan, k))


def _pass_here(work: _Pass, rows: FeatureStream, plan: RidgePlan, listener: Listener) -> FittedMap:
    """One pass in this process."""
    merge, tiles = _Merge(work), row_tiles(rows.rows.n_total, plan.slab_rows)

    def combine(node: Node, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return merge(left, right)

    listener.stage(f"{LABEL}-slab", len(tree_nodes(len(tiles))))
    total = reduce_tiles(
        _Slab(work, rows),
        combine,
        tiles,
        None,
        label=f"{LABEL}-slab",
        sum_label=f"{LABEL}-sum",
        receive=lambda node, done: listener.task(f"{LABEL}-slab", done),
        threads=plan.threads,
    )
    return work.finish(unpack_sums(total, work.empty()))


def _stored_pass(
    work: _Pass,
    rows: FeatureStream,
    plan: RidgePlan,
    folder: Path,
    states: Path,
    client: Any,
    listener: Listener,
    fingerprint: Any,
) -> str:
    """One pass through a store of partial sums; the url of what is known after it."""
    length = sum(a.size for a in work.empty().values())
    sums = reduce_slabs(
        _Slab(work, rows),
        _Merge(work),
        rows.rows.n_total,
        length,
        plan,
        url=folder,
        client=client,
        listener=listener,
        fingerprint={**fingerprint, "pass": work.index, "learned": Path(str(work.so_far)).name},
        label=LABEL,
    )
    urls: list[str] = []
    listener.stage(f"{LABEL}-fit", 1)

    def receive(tile: Any, done: Any) -> None:
        urls.append(done.value)
        listener.task(f"{LABEL}-fit", done)

    task = _FinishTask(work, sums, str(states))
    map_tiles(task, [0], client, label=f"{LABEL}-fit", receive=receive, threads=plan.solve_threads)
    return urls[0]
