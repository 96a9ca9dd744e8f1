"""Fit preprocessing to training rows: one streamed reduction for each step, on the output of the earlier steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.execution.tree import Node
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.preprocessing import FittedPreprocessor, SecondMoments, Statistics, Step
from ntkdask.states import load_state, save_state
from ntkdask.workflows.stream import require_finite, store_preprocessor


@dataclass(frozen=True, eq=False)
class _StatisticsTask:
    """The statistics of one slab that the next step needs. A covariance is stored as a state and its url returned."""

    rows: Rows
    fitted: FittedPreprocessor | str
    step: Step
    batch_rows: int
    states: str | None

    def __call__(self, tile: Tile) -> Any:
        fitted = self.fitted
        if isinstance(fitted, str):
            fitted = FittedPreprocessor.from_state(*load_state(fitted))
        total: Statistics | None = None
        for batch in self.rows.batches(tile.start, tile.stop, self.batch_rows):
            require_finite(batch.x, batch.numbers)
            total = fitted.accumulate(self.step, batch.x, total)
        return _put(total, self.step, self.states)


@dataclass(frozen=True)
class _MergeTask:
    """Merge the statistics of two nodes."""

    step: Step
    states: str | None

    def __call__(self, node: Node, left: Any, right: Any) -> Any:
        a, b = _get(left), _get(right)
        return _put(b if a is None else a if b is None else a.merge(b), self.step, self.states)


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
        Where the slabs run. Its folder keeps covariances, which are too large to send; with a client it needs a folder.

    Raises
    ------
    InputError
        For rows with NaN or infinite values, naming them.
    """
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, plan.dtype)
    slabs = row_tiles(rows.n_total, plan.slab_rows)
    for step in steps:
        if step.needs == "nothing":
            fitted = fitted.extend(step)
            continue
        on_cluster = site.client is not None
        carried = store_preprocessor(site.states, fitted) if on_cluster else fitted
        states = str(site.states) if on_cluster else None
        task = _StatisticsTask(rows, carried, step, plan.batch_rows, states)
        statistics = site.reduce(task, _MergeTask(step, states), slabs, "preprocess-slab", sum_label="preprocess-sum")
        if isinstance(statistics, str):
            extend = _ExtendTask(store_preprocessor(site.states, fitted), step, str(site.states))
            url = site.alone(extend, "preprocess-fit", statistics, plan.solve_threads)
            fitted = FittedPreprocessor.from_state(*load_state(url))
        else:
            fitted = fitted.extend(step, statistics)
    return fitted


@dataclass(frozen=True)
class _ExtendTask:
    """Fit a step whose statistics are stored (ZCA: an eigendecomposition), alone on a worker with the threads of its host."""

    fitted: str
    step: Step
    states: str

    def __call__(self, statistics: str) -> str:
        chain = FittedPreprocessor.from_state(*load_state(self.fitted))
        return store_preprocessor(self.states, chain.extend(self.step, _get(statistics)))


def _put(total: Statistics | None, step: Step, states: str | None) -> Any:
    """Statistics as tasks return them: moments; a covariance (d² numbers) as the url of its state, where states are kept."""
    if total is None or step.needs != "covariance" or states is None:
        return total
    return save_state(states, {"xtx": total.to_host().xtx}, {"n": total.n})  # type: ignore[union-attr]


def _get(value: Any) -> Any:
    """The statistics that `_put` returned or stored."""
    if not isinstance(value, str):
        return value
    arrays, attributes = load_state(value, keep=False)
    return SecondMoments(attributes["n"], arrays["xtx"])
