"""Deal rows to training and test: an int16 part number for every row, by a seed, equal rows always in the same part.

Rows that repeat (UCI Protein has 1 758) would leak from test into training: rows are grouped by a hash of their bytes and whole groups
are dealt. Folds of `selection="kfold"` are dealt in the same way within the training rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import is_sparse
from ntkdask.datasets.rows import PART, Rows
from ntkdask.errors import InputError
from ntkdask.execution.map_reduce import map_tiles
from ntkdask.planning.tiles import Tile, row_tiles

HASH_ROWS = 16384
"""Rows that one task hashes."""
LEFT_OUT = -1
"""The part of rows that are in neither training nor test."""
INNER_FOLDS, HOLDOUT = 5, 0.2
"""Folds and held-out share of the training rows for choosing alpha, unless a job gives others."""


@dataclass(frozen=True, eq=False)
class _HashTask:
    """(rows,) uint64 hash of the bytes of every row of a tile."""

    rows: Rows

    def __call__(self, tile: Tile) -> np.ndarray:
        out = np.empty(tile.rows, np.uint64)
        for batch in self.rows.batches(tile.start, tile.stop, 1024):
            for number, row in zip(batch.numbers, _bytes_of_rows(batch.x), strict=True):
                out[number - tile.start] = int.from_bytes(hashlib.blake2b(row, digest_size=8).digest())
        return out


def _bytes_of_rows(x: Any) -> Iterator[bytes]:
    """The bytes of every row; of a sparse one those of its columns and values."""
    if not is_sparse(x):
        yield from (row.tobytes() for row in np.ascontiguousarray(x))
        return
    for start, stop in pairwise(x.indptr):
        yield x.indices[start:stop].astype(np.int64).tobytes() + x.data[start:stop].tobytes()


def group_rows(rows: Rows, client: Any = None) -> np.ndarray:
    """(n_total,) int64 group of every row, equal for equal bytes: the number of the first row of the group."""
    hashes = np.empty(rows.n_total, np.uint64)

    def place(tile: Tile, done: Any) -> None:
        hashes[tile.start : tile.stop] = done.value

    map_tiles(_HashTask(rows), row_tiles(rows.n_total, HASH_ROWS), client, label="group-rows", receive=place)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def deal(groups: np.ndarray, n_parts: int, *, shuffle: bool, seed: int, path: seeds.Path) -> np.ndarray:
    """Deal whole groups of rows to parts of equal size, to within a group.

    Parameters
    ----------
    groups : array (n,)
        Group of every row.
    n_parts : int
        Number of parts.
    shuffle : bool
        True: in a random order of the groups. False: in contiguous stretches of rows.
    seed : int
        Of the order.
    path : tuple
        Names the stream of random numbers; see `seeds`.

    Returns
    -------
    array (n,), int16
        Part of every row.

    Raises
    ------
    InputError
        For fewer groups than parts.
    """
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if names.size < n_parts:
        raise InputError(f"{n_parts} folds of {names.size} distinct rows: use at most {names.size} folds.")
    order = seeds.permutation(seed, path, names.size) if shuffle else np.arange(names.size)
    before = np.cumsum(counts[order]) - counts[order]
    part = np.empty(names.size, np.int16)
    part[order] = before * n_parts // len(groups)
    return part[inverse]


def hold_out(groups: np.ndarray, fraction: float, *, shuffle: bool, seed: int, path: seeds.Path) -> np.ndarray:
    """(n,) int16: 1 for about `fraction` of the rows, in whole groups, 0 for the others. Without shuffle, 1 for the last rows."""
    if not 0 < fraction < 1:
        raise InputError(f"a held-out fraction of {fraction!r}: expected a number between 0 and 1.")
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = seeds.permutation(seed, path, names.size) if shuffle else np.arange(names.size)
    after = len(groups) - (np.cumsum(counts[order]) - counts[order])
    part = np.zeros(names.size, np.int16)
    part[order] = after <= max(1.0, fraction * len(groups))
    if part.all() or not part.any():
        raise InputError(f"a held-out fraction of {fraction} leaves one side of {names.size} distinct rows empty.")
    return part[inverse]


def keep(parts: np.ndarray, part: int, count: int | None, seed: int) -> np.ndarray:
    """Keep `count` rows of `part`, at random; the other rows of it become `LEFT_OUT`. None keeps all.

    Fewer rows are among more of the same seed. InputError for more rows than the part has.
    """
    rows = np.flatnonzero(parts == part)
    if count is None:
        return parts
    if count > rows.size:
        raise InputError(f"{count} rows are to be kept of {rows.size}. Leave the number out to take them all.")
    out = parts.copy()
    out[rows[seeds.permutation(seed, ("split", "keep", part), rows.size)[count:]]] = LEFT_OUT
    return out


def deal_inner(
    groups: np.ndarray, selection: str, n_folds: int, fraction: float, seed: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Parts of training rows for choosing alpha.

    Parameters
    ----------
    groups : array (n,)
        Group of every row.
    selection : {"kfold", "holdout"}
        "kfold" deals `n_folds` folds, "holdout" part 1 to the held-out rows and 0 to the others.
    n_folds : int
        Number of folds.
    fraction : float
        Share of the rows that "holdout" holds out.
    seed : int
        Of the order.
    weights : array (n,) or None
        Rows of weight 0 are dealt last: all to part 0, where they change nothing. None: no weight is 0.

    Returns
    -------
    array (n,), int16
        Part of every row.

    Raises
    ------
    InputError
        For fewer groups (with positive weight) than parts.
    """
    if weights is not None and not np.all(weights > 0):
        parts, positive = np.zeros(len(groups), np.int16), np.asarray(weights) > 0
        try:
            parts[positive] = deal_inner(groups[positive], selection, n_folds, fraction, seed)
        except InputError as error:
            raise InputError(f"of the rows of positive weight, {error}") from error
        return parts
    path: seeds.Path = ("split", "inner")
    if selection == "kfold":
        return deal(groups, n_folds, shuffle=True, seed=seed, path=path)
    return hold_out(groups, fraction, shuffle=True, seed=seed, path=path)


def state_of(parts: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the state in which `datasets.rows.DatasetRows` reads part numbers."""
    return {PART: parts.astype(np.int16)}


def parts_of_splits(splits: Sequence[tuple[np.ndarray, np.ndarray]], n: int) -> tuple[str, np.ndarray]:
    """The selection and the part numbers that are the same as (train, test) row numbers.

    Parameters
    ----------
    splits : sequence of (array, array)
        Row numbers of the training rows and of the held-out rows of every fold.
    n : int
        Rows in all.

    Returns
    -------
    (str, array (n,) of int16)
        "kfold" where every row is held out once, "holdout" for a single split, with the held-out rows in part 1.

    Raises
    ------
    InputError
        Where folds overlap or leave rows out, or a fold is not trained on all the others: sums of parts cannot score those.
    """
    if not splits or len(splits) > np.iinfo(np.int16).max:
        raise InputError(f"cv gives {len(splits)} folds; expected between 1 and {np.iinfo(np.int16).max}.")
    parts = np.full(n, LEFT_OUT, np.int16)
    held_once = True
    for fold, (train, test) in enumerate(splits):
        out = np.zeros(n, bool)
        out[test] = True
        complement = np.array_equal(np.sort(np.asarray(train)), np.flatnonzero(~out)) if len(train) else False
        held_once = held_once and complement and bool(out.any() and (parts[out] == LEFT_OUT).all())
        parts[out] = fold
    if held_once and len(splits) == 1:
        return "holdout", (parts == 0).astype(np.int16)
    if held_once and (parts != LEFT_OUT).all():
        return "kfold", parts
    raise InputError(
        f"the {len(splits)} folds of cv do not hold every row out once and train on all the others, as sums of folds need. Use such "
        'folds, or scoring="neg_mean_squared_error", which takes a fit for each fold and alpha.'
    )
