"""Fit a data-dependent feature map to a stream of training rows, out of core.

    for every pass:   for every slab (a task):  S ← 0;  for every batch of its rows:  S += the map's sums;  commit S
                      combine pairs by slab index until one is left;  learned ← learned + map.finish(S)  (a task)

Every pass ends with a stored state, `state/<digest>`: a killed run resumes in the pass it was in. The protocol is that of
features/fitting.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from ntkdask import threads
from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.execution.slabs import reduce_slabs
from ntkdask.execution.tree import Node
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
from ntkdask.planning.resources import Resources, RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.store import TileStore
from ntkdask.workflows.stream import ROWWISE, FeatureStream, load_map, store_map

LABEL = "features"


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass of a map over rows. so_far: the map with what it learned in earlier passes, or the url of its state."""

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
    """The packed sums of the selected rows of one slab."""

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
    """Merge the packed sums of two slabs."""

    work: _Pass

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        work = self.work
        a, b = unpack_sums(left, work.empty()), unpack_sums(right, work.empty())
        return pack_sums(to_host_sums(work.map.merge(work.index, a, b)))


@dataclass(frozen=True, eq=False)
class _FinishTask:
    """End a pass (landmarks: an eigendecomposition), alone on a worker; store the map with what it learned, return its url."""

    work: _Pass
    sums: tuple[str, int]
    states: str

    def __call__(self, tile: int) -> str:
        url, index = self.sums
        sums = unpack_sums(TileStore.open(url).read((index, 0))[0], self.work.empty())
        return store_map(self.states, self.work.finish(sums))


def fit_features(
    stream: FeatureStream, feature_map: FeatureMap | None, plan: RidgePlan, k: int, site: Site, *, label: str = ""
) -> FeatureMap | str | None:
    """Fit `feature_map` to the selected rows of the stream, whose own map is ignored.

    Parameters
    ----------
    stream : FeatureStream
        The training rows, preprocessed. Weighted rows count by their weights.
    feature_map : FeatureMap or None
        A map that does not depend on data, or is fitted, is returned as it is.
    plan : RidgePlan
        Rows of a slab and of a batch, threads.
    k : int
        Columns of the targets, 0 without any.
    site : Site
        Where the passes run. With a folder every pass is kept as a state and resumed; a client needs one.
    label : str
        Prefix of the names of the passes in the record and in the folder.

    Returns
    -------
    FeatureMap, str or None
        The fitted map; with a folder the url of its state.

    Raises
    ------
    InputError
        Where the map needs targets and the rows have none.
    """
    if not learns(feature_map):
        if site.folder is not None and isinstance(feature_map, FittedMap):
            return store_map(site.states, feature_map)  # tasks carry no arrays
        return feature_map
    asked = cast(DataDependentMap, feature_map)
    require_targets(asked, k > 0)
    rows = replace(stream, map=ROWWISE)
    training = Training(rows.rows.row_shape, plan.dtype, k, rows.rows.n_total, plan.device)
    slabs = row_tiles(rows.rows.n_total, plan.slab_rows)
    if site.folder is None:
        fitted = FittedMap(asked, Learned())
        for index in range(asked.n_passes):
            fitted = _pass_here(_Pass(index, fitted, training), rows, slabs, site)
        return fitted
    address = store_map(site.states, FittedMap(asked, Learned()))
    for index in range(asked.n_passes):
        stage = f"{label}{LABEL}-{index}"
        work, sums = _Pass(index, address, training), site.folder / stage
        run = partial(_stored_pass, work, rows, slabs, sums, site, plan.solve_threads)
        address = site.once(stage, run)
        remove(sums)  # the state holds all that the next pass reads
    return address


def fit_to_rows(
    feature_map: FeatureMap | None, rows: Rows, dtype: str, k: int, n_classes: int | None = None
) -> FeatureMap | None:
    """Fit a map to the selected rows in this process.

    Parameters
    ----------
    feature_map : FeatureMap or None
        Returned as it is when there is nothing to learn.
    rows : Rows
        Rows, and targets where the map needs them.
    dtype : str
        To which rows are cast, "float32" or "float64".
    k : int
        Columns of the targets, 0 without any.
    n_classes : int or None
        Of labels. None: targets are numbers.
    """
    n_threads = threads.ambient()
    plan = RidgePlan.unbounded(rows.n_total, dtype, Resources(threads=n_threads, solve_threads=n_threads))
    preprocessor = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    stream = FeatureStream(rows, preprocessor, None, n_classes, plan.batch_rows)
    return cast("FeatureMap | None", fit_features(stream, feature_map, plan, k, Site(threads=n_threads)))


def _pass_here(work: _Pass, rows: FeatureStream, slabs: list[Tile], site: Site) -> FittedMap:
    """One pass in this process."""
    merge = _Merge(work)

    def combine(node: Node, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return merge(left, right)

    total = site.reduce(_Slab(work, rows), combine, slabs, f"{LABEL}-slab", sum_label=f"{LABEL}-sum")
    return work.finish(unpack_sums(total, work.empty()))


def _stored_pass(
    work: _Pass, rows: FeatureStream, slabs: list[Tile], store: Path, site: Site, solve_threads: int
) -> str:
    """One pass through a store of partial sums; the url of the map with what it has learned."""
    length = sum(a.size for a in work.empty().values())
    before = {"pass": work.index, "learned": Path(str(work.so_far)).name}
    sums = reduce_slabs(
        _Slab(work, rows),
        _Merge(work),
        slabs,
        length,
        site,
        label=LABEL,
        store=store,
        fingerprint={**site.record.fingerprint, **before},
    )
    return site.alone(_FinishTask(work, sums, str(site.states)), f"{LABEL}-fit", threads=solve_threads)
