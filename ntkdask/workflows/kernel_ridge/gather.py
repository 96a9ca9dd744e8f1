"""Training rows gathered for a kernel matrix: preprocessed once, in the order of their groups, side by side.

Row i of the matrix is row i of what is gathered here. A kernel is called on the same rows many times, so they are selected,
cast and preprocessed once; a group (an inner fold, the held-out rows) is a range of neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.datasets import Dataset, open_dataset
from ntkdask.datasets.writer import DatasetWriter, replacing
from ntkdask.errors import InputError
from ntkdask.execution.site import Site
from ntkdask.states import load_state, save_state
from ntkdask.workflows.stream import FeatureStream


@dataclass(frozen=True, eq=False)
class Labels:
    """Targets (n, k) float64 and weights (n,) or None of the gathered rows; bounds: where each group starts, and n at the end."""

    targets: np.ndarray
    weights: np.ndarray | None
    bounds: tuple[int, ...]

    @property
    def n(self) -> int:
        """Gathered rows."""
        return len(self.targets)

    def without(self, group: int | None) -> np.ndarray | None:
        """(n,) weights with a group's rows at 0; the weights themselves for None."""
        if group is None:
            return self.weights
        weights = np.ones(self.n) if self.weights is None else self.weights.copy()
        weights[self.rows(group)] = 0.0
        return weights

    def rows(self, group: int) -> slice:
        """The rows of a group."""
        return slice(self.bounds[group], self.bounds[group + 1])

    def held_out(self, selection: str) -> range:
        """The groups that are held out in turn: every one for "kfold", the last for "holdout"."""
        groups = range(len(self.bounds) - 1)
        return groups if selection == "kfold" else groups[-1:]

    def groups(self) -> np.ndarray:
        """(n,) group of every row."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def error(self, group: int, predicted: np.ndarray) -> float:
        """Mean squared error of predictions (rows of the group, k), per target and unit of weight."""
        rows = self.rows(group)
        weights = None if self.weights is None else self.weights[rows]
        return float(np.average(((predicted - self.targets[rows]) ** 2).mean(axis=1), weights=weights))


@dataclass(frozen=True)
class Gathered:
    """Addresses of gathered rows: a dataset of preprocessed x, and the state of their labels."""

    points: str
    labels: str

    @property
    def dataset(self) -> Dataset:
        """The gathered rows, opened anew each time: another fit may gather other rows at the same place."""
        return open_dataset(self.points)

    def load(self) -> Labels:
        """The labels, through this process's cache."""
        arrays, attributes = load_state(self.labels)
        return Labels(arrays["targets"], arrays.get("weights"), tuple(attributes["bounds"]))


@dataclass(frozen=True, eq=False)
class _GatherTask:
    """Gather the rows of the groups under `folder`."""

    stream: FeatureStream
    groups: tuple[tuple[int, ...], ...]
    folder: str

    def __call__(self, tile: int) -> Gathered:
        points = Path(self.folder) / "points"
        rows = _Blocks()
        with replacing(points, overwrite=True) as unfinished:
            writer = DatasetWriter(unfinished, kind="unlabelled")
            for x in rows.walk(self.stream, self.groups):
                writer.append(x)
            writer.finish({"source": "gathered rows", "importer": "gather"})
        labels = rows.labels()
        arrays = {"targets": labels.targets} | ({} if labels.weights is None else {"weights": labels.weights})
        url = save_state(Path(self.folder) / "state", arrays, {"bounds": list(labels.bounds)})
        return Gathered(str(points), url)


class _Blocks:
    """Walks the groups in order, yields blocks of x and keeps their targets and weights."""

    def __init__(self) -> None:
        self._targets: list[np.ndarray] = []
        self._weights: list[np.ndarray | None] = []
        self._bounds = [0]

    def walk(self, stream: FeatureStream, groups: Sequence[tuple[int, ...]]) -> Iterator[np.ndarray]:
        """Blocks of preprocessed rows on the host."""
        for group in groups or [()]:
            count = self._bounds[-1]
            part = stream.select(*group) if group else stream
            for batch in part.batches(0, stream.rows.n_total):
                count += len(batch.phi)
                if batch.y is None:
                    raise InputError("kernel ridge: the rows come without targets.")
                self._targets.append(to_host(batch.y))
                self._weights.append(None if batch.weights is None else to_host(batch.weights))
                yield to_host(batch.phi)
            self._bounds.append(count)

    def labels(self) -> Labels:
        """Targets, weights and bounds of the rows walked; InputError where a group has no rows."""
        if self._bounds[-1] == 0:
            raise InputError("kernel ridge: there are no rows to fit.")
        weights = [w for w in self._weights if w is not None]
        joined = np.concatenate(weights) if weights else None
        if joined is not None and not joined.any():
            raise InputError("kernel ridge: there are no rows with positive weight to fit.")
        for group, (start, stop) in enumerate(pairwise(self._bounds)):
            if start == stop or (joined is not None and not joined[start:stop].any()):
                raise InputError(f"fold {group} has no rows (of positive weight). Use fewer folds, or more rows.")
        return Labels(np.concatenate(self._targets), joined, tuple(self._bounds))


def gather(stream: FeatureStream, groups: Sequence[tuple[int, ...]], site: Site) -> Gathered:
    """Gather the stream's rows in the site's folder, group after group (one group of all without), as one task."""
    return site.alone(_GatherTask(stream, tuple(groups), str(site.home)), "gather-rows")


def gather_in_memory(stream: FeatureStream, groups: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, Labels]:
    """(points (n, *s), labels) in this process's memory."""
    blocks = _Blocks()
    # a batch may be a view of the caller's rows
    points = np.concatenate([np.array(x) for x in blocks.walk(stream, groups)] or [np.empty((0, 1))])
    return points, blocks.labels()
