"""Rows → preprocessed rows → features, batch by batch: the inner loop of the tasks of every workflow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from ntkdask.arrays import Array, as_array, is_sparse, namespace, to_device, to_host
from ntkdask.cache import shared
from ntkdask.datasets.rows import Batch, Rows, selected_count, take_rows
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import from_state, to_state
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import name_rows
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.states import load_places, load_state, save_state
from ntkdask.workflows.weight_files import described_in, located


class Featured(NamedTuple):
    """A batch of features phi (b, m), float64 targets y (b, k) or None, weights (b,) or None, row numbers (b,) on the host."""

    phi: Array
    y: Array | None
    weights: Array | None
    numbers: np.ndarray


@dataclass(frozen=True, eq=False)
class FeatureStream:
    """The features of rows, computed batch by batch.

    Parameters
    ----------
    rows : Rows
        Rows, targets and weights.
    preprocessor : FittedPreprocessor or str
        The fitted preprocessing, or the url of its state.
    map : FeatureMap, str or None
        The feature map, or the url of its state. None: the preprocessed rows, flattened.
    n_classes : int or None
        Labels 0 … n_classes − 1 become zero-mean one-hot targets. None: targets are numbers.
    batch_rows : int
        Rows of a batch, at most.
    device : bool
        Compute on this process's GPU.
    """

    rows: Rows
    preprocessor: FittedPreprocessor | str
    map: FeatureMap | str | None
    n_classes: int | None
    batch_rows: int
    device: bool = False

    @property
    def n_components(self) -> int:
        """Number of features of a row."""
        feature_map = self.loaded_map
        return math.prod(self.rows.row_shape) if feature_map is None else feature_map.n_components

    @property
    def loaded_map(self) -> FeatureMap | None:
        """The map, loaded where it is given by its url."""
        return load_map(self.map) if isinstance(self.map, str) else self.map

    def select(self, *parts: int) -> FeatureStream:
        """The same stream with other parts of the rows selected."""
        return replace(self, rows=self.rows.select(*parts))

    def batches(self, start: int, stop: int, with_targets: bool = True) -> Iterator[Featured]:
        """Yield the features of the selected rows of [start, stop); InputError names rows with NaN or infinite values."""
        preprocess, feature_map = self._prepared(), self.loaded_map
        for batch in self.rows.batches(start, stop, self.batch_rows):
            yield self._featured(preprocess, feature_map, batch, with_targets)

    def finite_rows(self, numbers: Sequence[int]) -> Iterator[Featured]:
        """Yield the features of single rows, in batches; rows with NaN or infinite values are left out, not refused."""
        preprocess, feature_map = self._prepared(), self.loaded_map
        for start in range(0, len(numbers), self.batch_rows):
            read = [b for i in numbers[start : start + self.batch_rows] for b in self.rows.batches(i, i + 1, 1)]
            batch = Batch(*(None if p[0] is None else _joined(p) for p in zip(*read, strict=True)))  # type: ignore[arg-type]
            with np.errstate(over="ignore", invalid="ignore"):
                x = preprocess(self._raw(batch))
            keep = _finite_rows(x)
            if batch.targets is not None and self.n_classes is None:
                keep &= np.isfinite(np.asarray(batch.targets, np.float64).reshape(len(keep), -1)).all(axis=1)
            if keep.any():
                yield self._featured(preprocess, feature_map, take_rows(batch, np.flatnonzero(keep)), True)

    @property
    def n_selected(self) -> int:
        """How many rows are selected."""
        return selected_count(self.rows)

    def selected_rows(self, start: int, stop: int, name: str = "x") -> Array:
        """Preprocessed rows as a kernel takes them: numbers `start` to `stop` − 1 of the selected ones, (stop − start, *row_shape).

        The map is not applied. InputError names, as rows of `name`, those with NaN or infinite values.
        """
        preprocess, numbers = self._prepared(), self.rows.part_numbers()
        first, last = start, stop
        if numbers is not None:
            chosen = np.flatnonzero(np.isin(numbers, self.rows.parts))[start:stop]
            first, last = int(chosen[0]), int(chosen[-1]) + 1
        found = [self._preprocessed(preprocess, b, name) for b in self.rows.batches(first, last, self.batch_rows)]
        return found[0] if len(found) == 1 else namespace(found[0]).concatenate(found)

    def _raw(self, batch: Batch) -> Any:
        """The rows of a batch where they are computed; sparse ones as they are."""
        return batch.x if is_sparse(batch.x) else to_device(np.asarray(batch.x), self.device)

    def _preprocessed(self, preprocess: FittedPreprocessor, batch: Batch, name: str = "x") -> Array:
        x = preprocess(self._raw(batch))
        require_finite(x, batch.numbers, name)
        return x

    def _featured(
        self, preprocess: FittedPreprocessor, feature_map: FeatureMap | None, batch: Batch, with_targets: bool
    ) -> Featured:
        x = self._preprocessed(preprocess, batch)
        phi = x.reshape(x.shape[0], -1) if feature_map is None else as_array(feature_map(x), "the features")
        if isinstance(phi, np.ndarray) and not is_sparse(batch.x) and np.may_share_memory(phi, batch.x):
            phi = phi.copy()  # the accumulator scales by weights in place, which must not change the user's array
        y = None if not with_targets or batch.targets is None else to_device(self._encoded(batch), self.device)
        weights = None if batch.weights is None else to_device(np.asarray(batch.weights, np.float64), self.device)
        return Featured(phi, y, weights, batch.numbers)

    def _encoded(self, batch: Batch) -> np.ndarray:
        targets = np.asarray(batch.targets)
        if self.n_classes is not None:
            return to_host(encode_targets(targets, self.n_classes, "float64"))
        y = targets.astype(np.float64).reshape(len(targets), -1)
        require_finite(y, batch.numbers, "targets")
        return y

    def _prepared(self) -> FittedPreprocessor:
        if isinstance(self.preprocessor, str):
            url = self.preprocessor
            key = ("preprocessor", url, self.device)
            return shared.get(key, lambda: FittedPreprocessor.from_state(*load_state(url)).prepared(self.device))
        return self.preprocessor.prepared(self.device)


def store_preprocessor(root: Any, fitted: FittedPreprocessor) -> str:
    """Store fitted preprocessing as a state in the folder `root`; returns its url."""
    return save_state(root, *fitted.to_state())


def store_map(root: Any, feature_map: FeatureMap) -> str:
    """Store a map, fitted or not, as a state in the folder `root`; returns its url."""
    arrays, described = to_state(feature_map)
    config, places = described_in(described, root)
    return save_state(root, arrays, {"map": config}, places)


def load_map(url: str) -> FeatureMap:
    """The map stored at `url`, loaded once per process."""

    def load() -> FeatureMap:
        arrays, attributes = load_state(url)
        return from_state(arrays, located(attributes["map"], load_places(url)))

    return shared.get(("map", url), load)


def _joined(parts: Sequence[Any]) -> Any:
    """Rows, targets, weights or numbers of several batches in one."""
    return sparse.csr_array(sparse.vstack(parts)) if is_sparse(parts[0]) else np.concatenate(parts)


def _finite_rows(x: Array) -> np.ndarray:
    """(n,) bool on the host: which rows are finite."""
    if not is_sparse(x):
        return to_host(namespace(x).isfinite(x).reshape(x.shape[0], -1).all(axis=1))
    finite = np.ones(x.shape[0], bool)
    finite[np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))[~np.isfinite(x.data)]] = False
    return finite


def require_finite(x: Array, numbers: np.ndarray, name: str = "x") -> None:
    """InputError naming the first rows that are not finite by their numbers in the dataset."""
    finite = _finite_rows(x)
    if not finite.all():
        raise InputError(
            f"{name} has NaN or infinite values in {name_rows(numbers[~finite])}. Remove these rows or fill in the values."
        )


class Rowwise:
    """Stands for a feature map in a stream whose rows are not flattened: rows in their own shape, as kernels take them."""

    n_components = 0

    def __call__(self, x):
        """x itself."""
        return x


ROWWISE: FeatureMap = Rowwise()  # type: ignore[assignment]
