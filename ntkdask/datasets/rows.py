"""Addresses of rows: which rows of which dataset a task reads. They are small enough to send; without a cluster they hold arrays.

A selection is an int16 part number per row, stored once as a state (`workflows/split.py` makes it); rows whose part is not selected
are skipped after reading. Row numbers are always those of the whole dataset, so errors name rows that the user can find.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self

import numpy as np

from ntkdask.cache import shared
from ntkdask.datasets import Dataset, open_dataset
from ntkdask.errors import InputError
from ntkdask.states import load_state

PART = "part"
"""Name of the array of part numbers in their state."""


class Batch(NamedTuple):
    """Selected rows of one range: x (b, *s) as stored, targets (b, ...) or None, weights (b,) or None, row numbers (b,)."""

    x: np.ndarray
    targets: np.ndarray | None
    weights: np.ndarray | None
    numbers: np.ndarray


class Rows(Protocol):
    """Rows that a task can read: a stored dataset, or arrays in this process."""

    @property
    def n_total(self) -> int:
        """Number of rows of the whole dataset, selected or not; tiles and slabs are ranges of these."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""

    @property
    def dtype(self) -> str:
        """Stored dtype."""

    @property
    def parts(self) -> tuple[int, ...]:
        """The parts that are selected, where rows have part numbers."""

    def part_numbers(self) -> np.ndarray | None:
        """(n_total,) int16 part of each row; None when all rows are selected."""

    def row_weights(self) -> np.ndarray | None:
        """(n_total,) float64 weight of each row; None when all weigh 1."""

    def select(self, *parts: int) -> Self:
        """The same rows with other parts selected."""

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        """Yield the selected rows of [start, stop) in batches of at most `size` rows; empty batches are left out."""


def rows_of_groups(rows: Rows, groups: Sequence[tuple[int, ...]]) -> Rows:
    """The rows with the parts of all groups selected; as they are where there are no groups."""
    return rows.select(*sorted({part for group in groups for part in group})) if groups else rows


def selected_count(rows: Rows) -> int:
    """How many rows are selected."""
    numbers = rows.part_numbers()
    return rows.n_total if numbers is None else int(np.isin(numbers, rows.parts).sum())


@dataclass(frozen=True)
class DatasetRows:
    """Selected rows of a stored dataset.

    Parameters
    ----------
    url : str
        Of the dataset.
    parts_url : str or None
        Of the state with the part number of every row. None: all rows are selected.
    parts : tuple of int
        The parts that are selected.
    digest : str
        Digest of the dataset: a process that has opened an older dataset at the same url opens the new one.
    class_weights : tuple of float
        For labels: a weight for each class, by which the weights of its rows are multiplied. Empty: none.
    """

    url: str
    parts_url: str | None = None
    parts: tuple[int, ...] = ()
    digest: str = ""
    class_weights: tuple[float, ...] = ()

    @property
    def dataset(self) -> Dataset:
        """The dataset, opened once per process."""
        return shared.get(("dataset", self.url, self.digest), lambda: open_dataset(self.url))

    @property
    def n_total(self) -> int:
        """Rows of the dataset."""
        return self.dataset.n

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.dataset.row_shape

    @property
    def dtype(self) -> str:
        """Stored dtype."""
        return self.dataset.dtype

    def part_numbers(self) -> np.ndarray | None:
        """(n,) int16 part of each row, from this process's cache."""
        return None if self.parts_url is None else load_state(self.parts_url)[0][PART]

    def row_weights(self) -> np.ndarray | None:
        """(n,) weight of each row."""
        return self._weights(0, self.n_total)

    def select(self, *parts: int) -> DatasetRows:
        """The same dataset with other parts selected."""
        return replace(self, parts=parts)

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        """See Rows."""
        dataset, numbers = self.dataset, self.part_numbers()
        for first in range(start, stop, size):
            last = min(first + size, stop)
            keep = None if numbers is None else np.flatnonzero(np.isin(numbers[first:last], self.parts))
            if keep is not None and keep.size == 0:
                continue
            targets = None if dataset.target_shape is None else dataset.targets(first, last)
            batch = Batch(dataset.rows(first, last), targets, self._weights(first, last), np.arange(first, last))
            yield batch if keep is None else take_rows(batch, keep)

    def _weights(self, start: int, stop: int) -> np.ndarray | None:
        """(stop - start,) weight of each row, times that of its class; None when all weigh 1."""
        weights = self.dataset.weights(start, stop)
        if not self.class_weights:
            return weights
        of_class = np.asarray(self.class_weights)[self.dataset.targets(start, stop)]
        return of_class if weights is None else weights * of_class


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Selected rows of arrays in this process's memory, used in place.

    Parameters
    ----------
    x : array (n, *s), or SciPy CSR matrix (n, d)
        Rows.
    targets : array (n,) or (n, k), or None
        Labels or targets.
    weights : array (n,) or None
        Weights of the rows.
    numbers : array (n,) of int16, or None
        Part of each row. None: all rows are selected.
    parts : tuple of int
        The parts that are selected.

    Raises
    ------
    InputError
        For other numbers of rows than those of x.
    """

    x: np.ndarray
    targets: np.ndarray | None = None
    weights: np.ndarray | None = None
    numbers: np.ndarray | None = None
    parts: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("targets", "weights", "numbers"):
            value = getattr(self, name)
            if value is not None and len(value) != self.n_total:
                raise InputError(f"x has {self.n_total} rows and {name} has {len(value)}; they must agree.")

    @property
    def n_total(self) -> int:
        """Rows of x."""
        return int(self.x.shape[0])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> str:
        """dtype of x."""
        return self.x.dtype.name

    def part_numbers(self) -> np.ndarray | None:
        """(n,) int16 part of each row."""
        return self.numbers

    def row_weights(self) -> np.ndarray | None:
        """(n,) weight of each row."""
        return self.weights

    def select(self, *parts: int) -> MemoryRows:
        """The same arrays with other parts selected."""
        return MemoryRows(self.x, self.targets, self.weights, self.numbers, parts)

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        """See Rows."""
        for first in range(start, stop, size):
            rows = slice(first, min(first + size, stop))
            targets = None if self.targets is None else self.targets[rows]
            weights = None if self.weights is None else self.weights[rows]
            batch = Batch(self.x[rows], targets, weights, np.arange(rows.start, rows.stop))
            if self.numbers is None:
                yield batch
                continue
            keep = np.flatnonzero(np.isin(self.numbers[rows], self.parts))
            if keep.size:
                yield take_rows(batch, keep)


def take_rows(batch: Batch, keep: np.ndarray) -> Batch:
    """Some rows of a batch, by their positions in it."""
    return Batch(*(None if a is None else a[keep] for a in batch))  # type: ignore[arg-type]
