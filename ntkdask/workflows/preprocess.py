"""Fit preprocessing on training rows: one streamed reduction a step, each on the output of the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkdask.datasets.rows import Rows
from ntkdask.execution.map_reduce import map_tiles, reduce_tiles
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.tree import Node
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.preprocessing import FittedPreprocessor, SecondMoments, Statistics, Step
from ntkdask.states import load_state, save_state
from ntkdask.workflows.stream import require_finite, store_preprocessor


@dataclass(frozen=True, eq=False)
class _StatisticsTask:
    """What the next step needs to know of one slab. A covariance is stored as a state and its url returned."""

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
    step: Step
    states: str | None

    def __call__(self, node: Node, left: Any, right: Any) -> Any:
        a, b = _get(left), _get(right)
        return _put(b if a is None else a if b is None else a.merge(b), self.step, self.states)


def fit_preprocessing(
    rows: Rows,
    steps: tuple[Step, ...],
    plan: RidgePlan,
    *,
    states: Path | None = None,
    client: Any = None,
    listener: Listener | None = None,
) -> FittedPreprocessor:
    """The chain fitted to the selected rows; InputError naming rows with NaN or infinite values.

    states: folder for what is too large to travel (covariances), needed with a client.
    """
    listener = listener or Silent()
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, plan.dtype)
    tiles = row_tiles(rows.n_total, plan.slab_rows)
    root = None if states is None else str(states)
    for step in steps:
        statistics: Any = None
        if step.needs != "nothing":
            listener.stage("preprocess-slab", 2 * len(tiles) - 1)
            carried = fitted if client is None or states is None else store_preprocessor(states, fitted)
            task = _StatisticsTask(rows, carried, step, plan.batch_rows, root if client is not None else None)
            statistics = reduce_tiles(
                task,
                _MergeTask(step, task.states),
                tiles,
                client,
                label="preprocess-slab",
                sum_label="preprocess-sum",
                receive=lambda node, done: listener.task("preprocess-slab", done),
                threads=plan.threads,
            )
        if isinstance(statistics, str) and states is not None:
            fitted = _extend_on_cluster(store_preprocessor(states, fitted), step, statistics, plan, states, client)
        else:
            fitted = fitted.extend(step, statistics)
    return fitted


@dataclass(frozen=True)
class _ExtendTask:
    """Fit a step whose statistics are stored (ZCA: an eigendecomposition), where there are cores for it."""

    fitted: str
    step: Step
    states: str

    def __call__(self, statistics: str) -> str:
        chain = FittedPreprocessor.from_state(*load_state(self.fitted))
        return store_preprocessor(self.states, chain.extend(self.step, _get(statistics)))


def _extend_on_cluster(
    fitted: str, step: Step, statistics: str, plan: RidgePlan, states: Path, client: Any
) -> FittedPreprocessor:
    urls: list[str] = []
    map_tiles(
        _ExtendTask(fitted, step, str(states)),
        [statistics],
        client,
        label="preprocess-fit",
        receive=lambda tile, done: urls.append(done.value),
        threads=plan.solve_threads,
    )
    return FittedPreprocessor.from_state(*load_state(urls[0]))


def _put(total: Statistics | None, step: Step, states: str | None) -> Any:
    """Moments travel as they are; a covariance (d² numbers) goes to the store when there is one."""
    if total is None or step.needs != "covariance" or states is None:
        return total
    return save_state(states, {"xtx": total.to_host().xtx}, {"n": total.n})  # type: ignore[union-attr]


def _get(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    arrays, attributes = load_state(value, keep=False)
    return SecondMoments(attributes["n"], arrays["xtx"])
