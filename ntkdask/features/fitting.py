"""Maps that learn from training rows: what they gather in each pass over the rows, and the fitted map they become.

    learned ← {}
    for index in range(map.n_passes):
        for every slab of rows:
            sums ← map.begin(index, learned, training)                       # from zero
            for every batch of the slab:  map.accumulate(index, learned, batch, sums)
        sums    ← map.merge(index, left, right)                              # slabs, in a fixed binary tree
        learned ← learned + map.finish(index, learned, sums, training)
    FittedMap(map, learned)

`DataDependentMap.fit` is that loop over one array in memory; `workflows.ridge.fit_features` makes the same calls over a dataset, on
workers, resumably. A map is shown training rows only.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, is_device_array, require_float, to_device, to_host
from ntkdask.cache import shared
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMap, FeatureMapBase, row_blocks
from ntkdask.kernels.base import Kernel
from ntkdask.preprocessing.targets import encode_targets

FIT_ROWS = 4096
"""Rows of a batch of `fit` in memory; what streams chooses its own."""

COMPONENT_INDICES = "component_indices"
"""Name of a learned array that tells where landmarks come from; features do not depend on it, and neither do fingerprints."""

Sums = dict[str, Any]
"""Float64 arrays by name that a pass gathers, on the host or a device; their shapes depend on the pass, on what was learned before
and on `Training`, never on the rows."""


class Training(NamedTuple):
    """What a map is told about the training rows before it sees one.

    Parameters
    ----------
    row_shape : tuple of int
        Shape of a row.
    dtype : str
        Dtype of the rows.
    n_targets : int
        Columns of the targets; 0 when there are none.
    n_total : int
        How many row numbers there are: rows of the whole dataset, of which the training rows are a part.
    device : bool
        Whether rows and features lie on a GPU, where `finish` may compute too.
    """

    row_shape: tuple[int, ...]
    dtype: str
    n_targets: int
    n_total: int
    device: bool = False


class TrainingBatch(NamedTuple):
    """A batch of training rows.

    Parameters
    ----------
    x : array (b, *row_shape), float32 or float64
        The rows.
    y : array (b, n_targets), float64, or None
        Their targets.
    weights : array (b,), float64, or None
        Their weights; None: all 1.
    numbers : array (b,), on the host
        Their row numbers in the whole dataset.
    """

    x: Array
    y: Array | None
    weights: Array | None
    numbers: np.ndarray


@dataclass(frozen=True, eq=False)
class Learned:
    """Arrays by name that a map learned; they are shared and never written to."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __add__(self, more: Mapping[str, np.ndarray]) -> Learned:
        # one memory order: products of equal numbers in another may differ in the last bits
        return Learned({**self.arrays, **{name: np.ascontiguousarray(a) for name, a in more.items()}})

    def on(self, name: str, like: Array) -> Array:
        """The named array in like's dtype and on its device, kept by this process's cache."""
        array, device = self.arrays[name], is_device_array(like)
        if not device and array.dtype == like.dtype:
            return array
        key = ("learned", self.digest, name, like.dtype.name, device and like.device.id)
        return shared.get(key, lambda: to_device(array.astype(like.dtype), device))

    @property
    def nbytes(self) -> int:
        """Bytes of all the arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the names, shapes, dtypes and bytes."""
        hasher = hashlib.sha256()
        for name in sorted(self.arrays.keys() - {COMPONENT_INDICES}):
            a = np.ascontiguousarray(self.arrays[name])
            hasher.update(f"{name}{a.dtype.str}{a.shape}".encode())
            hasher.update(a.reshape(-1).view(np.uint8).data)
        return hasher.hexdigest()[:16]


class DataDependentMap(FeatureMapBase):
    """A map that learns from training rows before it can be called: `fit` returns the `FittedMap` to call.

    A subclass is a frozen, registered dataclass with `n_components` (the largest number of features), `target`,
    `workspace_bytes` (an upper bound for the fitted map) and the methods below. With some arguments its `n_passes` may be 0;
    then it is an ordinary map and overrides `__call__`.
    """

    needs_targets: ClassVar[bool] = False
    n_components: int

    @property
    def n_passes(self) -> int:
        """How many times the training rows are read."""
        raise NotImplementedError

    def begin(self, index: int, learned: Learned, training: Training, like: Array | None = None) -> Sums:
        """Empty sums of pass `index`, on the device of `like` (None: on the host)."""
        raise NotImplementedError

    def accumulate(self, index: int, learned: Learned, batch: TrainingBatch, sums: Sums) -> None:
        """Add a batch to the sums, in place."""
        raise NotImplementedError

    def merge(self, index: int, left: Sums, right: Sums) -> Sums:
        """The sums of two sets of rows, on the host; by default they are added.

        The rows of `left` come first; `left` may be overwritten.
        """
        for name in left:
            left[name] += right[name]
        return left

    def finish(self, index: int, learned: Learned, sums: Sums, training: Training) -> Mapping[str, np.ndarray]:
        """What pass `index` teaches: arrays on the host that are added to `learned`. The sums are on the host."""
        raise NotImplementedError

    def finish_bytes(self, itemsize: int, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Peak bytes of `finish` beyond the sums, in the pass that needs most; by default as many as the sums have."""
        return self.sums_bytes(row_shape, n_targets)

    def fit_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Peak bytes of `accumulate` on a batch of n rows, sums and weights included, in the pass that needs most."""
        raise NotImplementedError

    def sums_bytes(self, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Bytes of the sums of the pass that has most."""
        raise NotImplementedError

    def apply(self, x: Array, learned: Learned) -> Array:
        """The features that the fitted map gives: (n, *s) → (n, learned_components(learned))."""
        raise NotImplementedError

    def learned_components(self, learned: Learned) -> int:
        """The number of features of the fitted map; at most n_components, which is the default."""
        return self.n_components

    def learned_target(self, learned: Learned) -> Kernel:
        """The kernel that the fitted map approximates; by default the target of this map."""
        return self.target  # type: ignore[attr-defined]

    def learned_workspace_bytes(
        self, learned: Learned, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None
    ) -> int:
        """`workspace_bytes` of the fitted map; by default that of this map."""
        return self.workspace_bytes(n, itemsize, row_shape)  # type: ignore[attr-defined]

    def __call__(self, x: Array) -> Array:
        """Raise InputError: nothing has been learned yet."""
        require_fitted(self)  # type: ignore[arg-type]
        raise NotImplementedError

    def fit(self, x: Array, targets: Array | None = None, weights: Array | None = None) -> FittedMap:  # type: ignore[override]
        """Fit the map to training rows x (n, *s); a map that has nothing to learn returns itself.

        The rows are one slab in batches of 4 096: a stream of equal plan gives equal bits.

        Parameters
        ----------
        x : array (n, *s), float32 or float64, n >= 1
            Training rows.
        targets : array (n,) or (n, k), optional
            Numbers; integers, bools and strings are labels and become zero-mean one-hot columns.
        weights : array (n,), optional
            Weights of the rows, at least 0; None: all 1.

        Returns
        -------
        FittedMap
            The map to call.

        Raises
        ------
        InputError
            For no rows, and for targets or weights that are missing or have another number of rows.
        """
        if not self.n_passes:
            return self  # type: ignore[return-value]
        x = require_float(x)
        if not x.shape[0]:
            raise InputError(f"{type(self).__name__}: x has no rows to learn from.")
        y = None if targets is None else as_targets(targets)
        require_targets(self, y is not None)
        w = None if weights is None else np.asarray(to_host(weights, "weights"), np.float64)
        for name, given in (("targets", y), ("weights", w)):
            if given is not None and len(given) != x.shape[0]:
                raise InputError(f"x has {x.shape[0]} rows and {name} has {len(given)}; they must agree.")
        device, learned = is_device_array(x), Learned()
        training = Training(tuple(x.shape[1:]), x.dtype.name, 0 if y is None else y.shape[1], x.shape[0], device)
        for index in range(self.n_passes):
            sums = self.begin(index, learned, training, x)
            for rows in row_blocks(x.shape[0], FIT_ROWS):
                own = [None if a is None else to_device(a[rows], device) for a in (y, w)]
                batch = TrainingBatch(x[rows], own[0], own[1], np.arange(rows.start, rows.stop))
                self.accumulate(index, learned, batch, sums)
            learned += self.finish(index, learned, to_host_sums(sums), training)
        return FittedMap(self, learned)


@dataclass(frozen=True, eq=False)
class FittedMap(FeatureMapBase):
    """A data-dependent map together with what it learned: x ↦ map.apply(x, learned), (n, *s) → (n, n_components).

    Two fitted maps are equal when their maps and learned arrays are. The parameters are those of the map: `replace` returns a
    map that is not fitted. `fit` returns the fitted map unchanged.
    """

    map: DataDependentMap
    learned: Learned

    @property
    def n_components(self) -> int:
        """The number of features of a row; what was learned may need fewer than the map allows."""
        return self.map.learned_components(self.learned)

    @property
    def target(self) -> Kernel:
        """The kernel that the fitted map approximates."""
        return self.map.learned_target(self.learned)

    @property
    def component_indices_(self) -> np.ndarray:
        """Numbers of the training rows that became landmarks, (s,) int64; AttributeError for a map without landmarks."""
        if COMPONENT_INDICES not in self.learned:
            raise AttributeError(f"a fitted {type(self.map).__name__} has no component_indices_: it has no landmarks.")
        return self.learned[COMPONENT_INDICES]

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""
        return self.map.apply(x, self.learned)

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call on n rows, beyond its input and the learned arrays in float64."""
        return self.map.learned_workspace_bytes(self.learned, n, itemsize, row_shape)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The map's constructor arguments."""
        return self.map.get_params(deep)

    def replace(self, **changes: Any) -> Any:
        """The map with some arguments changed, which has to be fitted again."""
        return self.map.replace(**changes)

    def to_config(self) -> dict[str, Any]:
        """What a fingerprint records: the map and the digest of what it learned."""
        return {"type": "FittedMap", "map": registry.to_config(self.map), "learned": self.learned.digest}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FittedMap) and self.to_config() == other.to_config()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_config(), sort_keys=True))


def learns(feature_map: FeatureMap | None) -> bool:
    """Whether a map has to be fitted to training rows before it can be called."""
    return getattr(feature_map, "n_passes", 0) > 0


def require_fitted(feature_map: FeatureMap) -> None:
    """InputError when a map has to be fitted before it can be called and is not."""
    if learns(feature_map):
        raise InputError(
            f"{type(feature_map).__name__} learns from training rows and is not fitted: call the map that "
            f"fit(x{', targets' if uses_targets(feature_map) else ''}) returns, or give it to an estimator, which fits it."
        )


def uses_targets(feature_map: FeatureMap | None) -> bool:
    """Whether a map has to be fitted to targets; then its features must not be judged on the rows it was fitted to."""
    return learns(feature_map) and feature_map.needs_targets  # type: ignore[union-attr]


def require_targets(feature_map: DataDependentMap, has_targets: bool) -> None:
    """InputError when a map needs targets and there are none."""
    if feature_map.needs_targets and not has_targets:
        raise InputError(
            f"{type(feature_map).__name__}: targets are missing; it aligns its features with them. "
            "Use fit(x, targets), or a dataset that has targets."
        )


def as_targets(targets: Any) -> np.ndarray:
    """Targets as (n, k) float64: numbers as columns, labels as zero-mean one-hot columns of their sorted classes.

    Integers, bools and strings are labels. Raises InputError for targets of other shapes, for labels of one class, and for
    numbers that are not finite.
    """
    y = to_host(targets, "targets")
    if y.ndim not in (1, 2) or (y.dtype.kind != "f" and y.ndim == 2 and y.dtype.kind not in "biu"):
        raise InputError(f"targets have shape {y.shape} and dtype {y.dtype}; expected (n,) labels, or (n, k) numbers.")
    if y.ndim == 1 and y.dtype.kind != "f":
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"targets are labels of {len(classes)} class; at least two are needed.")
        return encode_targets(labels, len(classes), "float64")
    y = y.astype(np.float64).reshape(len(y), -1)
    if not np.isfinite(y).all():
        raise InputError("targets have NaN or infinite values. Remove these rows or fill in the values.")
    return y


def to_host_sums(sums: Sums) -> Sums:
    """The same sums in NumPy arrays."""
    return {name: to_host(a) for name, a in sums.items()}


def pack_sums(sums: Sums) -> np.ndarray:
    """All the sums as one float64 vector on the host, in the order of their names."""
    return np.concatenate([to_host(sums[name]).ravel() for name in sorted(sums)])


def unpack_sums(vector: np.ndarray, empty: Sums) -> Sums:
    """The sums that `pack_sums` packed; `empty`, from `begin`, gives their names and shapes."""
    out, position = {}, 0
    for name in sorted(empty):
        size = empty[name].size
        out[name] = vector[position : position + size].reshape(empty[name].shape)
        position += size
    return out


def to_state(feature_map: FeatureMap | None) -> tuple[dict[str, np.ndarray], Any]:
    """What models and states keep of a map, fitted or not: (arrays, tables that JSON can hold)."""
    if isinstance(feature_map, FittedMap):
        return dict(feature_map.learned.arrays), {"fitted": registry.to_config(feature_map.map)}
    return {}, registry.to_config(feature_map)


def from_state(arrays: Mapping[str, np.ndarray], described: Any) -> Any:
    """The map that `to_state` described; None for None."""
    if described is None:
        return None
    if "fitted" in described:
        return FittedMap(registry.from_config(described["fitted"], "feature map"), Learned(dict(arrays)))
    return registry.from_config(described, "feature map")
