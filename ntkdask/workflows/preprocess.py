"""Fit preprocessing to training rows: one streamed reduction for each step, on the output of the earlier steps.

With a folder the sums of a slab are kept as those of Gram slabs are (execution/slabs.py), and the chain is a state after every step: a
killed run goes on in the step and with the slabs that it had.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.execution.slabs import reduce_slabs
from ntkdask.execution.tree import Node
from ntkdask.files import remove
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.preprocessing import FittedPreprocessor, Moments, SecondMoments, Statistics, Step
from ntkdask.states import load_state
from ntkdask.store import TileStore
from ntkdask.workflows.stream import require_finite, store_preprocessor


@dataclass(frozen=True, eq=False)
class _StatisticsTask:
    """The statistics of one slab that the next step needs, None without rows."""

    rows: Rows
    fitted: FittedPreprocessor | str
    step: Step
    batch_rows: int

    def __call__(self, tile: Tile) -> Statistics | None:
        fitted = self.fitted
        if isinstance(fitted, str):
            fitted = FittedPreprocessor.from_state(*load_state(fitted))
        total: Statistics | None = None
        for batch in self.rows.batches(tile.start, tile.stop, self.batch_rows):
            require_finite(batch.x, batch.numbers)
            total = fitted.accumulate(self.step, batch.x, total)
        return total


def _merge(node: Node, left: Statistics | None, right: Statistics | None) -> Statistics | None:
    return right if left is None else left if right is None else left.merge(right)  # type: ignore[arg-type]


def fit_preprocessing(rows: Rows, steps: tuple[Step, ...], plan: RidgePlan, site: Site) -> FittedPreprocessor:
    """Fit the chain to the selected rows.

    Parameters
    ----------
    rows : Rows
        The training rows.
    steps : tuple of Step
        In the order in which they are applied; each is fitted to the output of the earlier steps.
    plan : RidgePlan
        dtype, rows of a slab and of a batch, threads of the step that decomposes a covariance.
    site : Site
        Where the slabs run. Its folder keeps their sums and the chain so far, and a fit there is resumed; with a client it needs one.

    Raises
    ------
    InputError
        For rows with NaN or infinite values, naming them.
    """
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, plan.dtype)
    slabs = row_tiles(rows.n_total, plan.slab_rows)
    for index, step in enumerate(steps):
        if step.needs == "nothing":
            fitted = fitted.extend(step)
        elif site.folder is None:
            task = _StatisticsTask(rows, fitted, step, plan.batch_rows)
            fitted = fitted.extend(
                step, site.reduce(task, _merge, slabs, "preprocess-slab", sum_label="preprocess-sum")
            )
        else:
            sums = site.folder / f"preprocess-{index}"
            url = site.once(sums.name, partial(_stored_step, rows, fitted, step, plan, slabs, sums, site))
            remove(sums)  # the state holds all that the next step reads
            fitted = FittedPreprocessor.from_state(*load_state(url))
    return fitted


def _stored_step(
    rows: Rows, fitted: FittedPreprocessor, step: Step, plan: RidgePlan, slabs: list[Tile], sums: Path, site: Site
) -> str:
    """Fit one step through a store of partial sums.

    Parameters
    ----------
    rows : Rows
        The training rows.
    fitted : FittedPreprocessor
        The chain before the step.
    step : Step
        The step, which needs moments or a covariance.
    plan : RidgePlan
        As of `fit_preprocessing`.
    slabs : list of Tile
        Ranges of rows.
    sums : Path
        Of the store.
    site : Site
        Where the slabs run.

    Returns
    -------
    str
        The url of the state of the chain with the step.
    """
    carried, width = store_preprocessor(site.states, fitted), math.prod(rows.row_shape)
    packs = _Packing(step.needs == "moments", width)
    stored = reduce_slabs(
        _PackedTask(_StatisticsTask(rows, carried, step, plan.batch_rows), packs),
        packs.combine,
        slabs,
        packs.length,
        site,
        label="preprocess",
        store=sums,
        fingerprint={**site.record.fingerprint, "before": Path(carried).name, "step": registry.to_config(step)},
    )
    extend = _ExtendTask(carried, step, packs, str(site.states))
    # a covariance is decomposed, with all threads of a host; moments take no time
    return extend(stored) if packs.moments else site.alone(extend, "preprocess-fit", stored, plan.solve_threads)


@dataclass(frozen=True)
class _Packing:
    """Statistics as vectors: rows, then means and squared deviations, or the second moments; no rows are zeros."""

    moments: bool
    width: int

    @property
    def length(self) -> int:
        return 1 + (2 * self.width if self.moments else self.width**2)

    @property
    def combine(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        return self._merged if self.moments else operator.iadd

    def pack(self, found: Any) -> np.ndarray:
        vector = np.zeros(self.length)
        if found is not None:
            vector[0] = found.n
            parts = (found.mean, found.m2) if self.moments else (found.to_host().xtx,)
            for part, place in zip(parts, np.split(vector[1:], len(parts)), strict=True):
                place[...] = part.reshape(-1)
        return vector

    def unpack(self, vector: np.ndarray) -> Statistics | None:
        n = int(vector[0])
        if not n:
            return None
        if self.moments:
            return Moments(n, *np.split(vector[1:], 2))
        return SecondMoments(n, vector[1:].reshape(self.width, self.width))

    def _merged(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return self.pack(_merge((0, 0), self.unpack(left), self.unpack(right)))


@dataclass(frozen=True, eq=False)
class _PackedTask:
    """The statistics of one slab as a vector."""

    task: _StatisticsTask
    packs: _Packing

    def __call__(self, tile: Tile) -> np.ndarray:
        return self.packs.pack(self.task(tile))


@dataclass(frozen=True)
class _ExtendTask:
    """Fit a step whose statistics are stored (ZCA: an eigendecomposition); the url of the longer chain."""

    fitted: str
    step: Step
    packs: _Packing
    states: str

    def __call__(self, stored: tuple[str, int]) -> str:
        chain = FittedPreprocessor.from_state(*load_state(self.fitted))
        url, place = stored
        statistics = self.packs.unpack(TileStore.open(url).read((place, 0))[0])
        return store_preprocessor(self.states, chain.extend(self.step, statistics))
