"""Write a dataset in batches of any size, as whole chunks with checksums; one chunk is in memory at a time.

`replacing` gives a folder beside the dataset's url, which takes that name only when everything is written, so that an
interrupted import never looks complete. `DatasetWriter` fills it. Importers and `write_dataset` call both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.datasets.dataset import FORMAT, KINDS, VERSION, checked, describe, digest_of
from ntkdask.datasets.targets import LabelEncoder, convert_targets, kind_of
from ntkdask.errors import DataError, InputError, StoreError, nearest
from ntkdask.files import exclusive, local_path, remove, writing
from ntkdask.layout import consolidate, create_array
from ntkdask.store import ATTRIBUTE, open_array, write_group_attributes

CHUNK_BYTES = 4 * 2**20
_NAMED_ROWS = 5


@contextlib.contextmanager
def replacing(url: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A new folder `<url>.partial`, which becomes `url` when the block ends and is deleted when the block raises.

    DataError where something is at `url` already, unless it is a dataset and `overwrite` is true; StoreError where another import is
    writing it.
    """
    final = local_path(url)
    with exclusive(final, beside=True), _arriving(final, overwrite) as partial:
        yield partial


@contextlib.contextmanager
def _arriving(final: Path, overwrite: bool) -> Iterator[Path]:
    """`replacing`, whose lock the caller holds."""
    partial = final.with_name(final.name + ".partial")
    _require_free(final, overwrite)
    if partial.exists() and not (partial / "zarr.json").exists() and (partial.is_file() or any(partial.iterdir())):
        raise DataError(
            f"{partial} stands in the way and is not left over from an import. Move it, or choose another url."
        )
    try:
        remove(partial)
        write_group_attributes(partial, {})
        yield partial
        with writing(final):
            remove(final)
            os.replace(partial, final)
    finally:
        remove(partial)


def write_parts(path: Path, parts: list[str]) -> None:
    """Mark the group at `path` as a dataset with these parts."""
    write_group_attributes(path, {ATTRIBUTE: checked({"format": FORMAT, "version": VERSION, "parts": parts})})


def rows_per_chunk(row_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows in about 4 MiB, at least one."""
    return max(1, CHUNK_BYTES // max(1, dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))))


def stored_dtype(dtype: np.dtype, name: str = "x") -> np.dtype:
    """The dtype in which rows of `dtype` are stored; InputError where there is none. Messages call the rows `name`.

    uint8, float32 and float64 stay as they are; float16 becomes float32, bool becomes uint8, other integers become int64.
    """
    if dtype.name in ("uint8", "float32", "float64"):
        return np.dtype(dtype.name)
    if dtype.name == "float16":
        return np.dtype("float32")
    if dtype.kind == "b":
        return np.dtype("uint8")
    if dtype.kind in "iu" and dtype.name != "uint64":
        return np.dtype("int64")
    raise InputError(
        f"{name} has dtype {dtype}, which a dataset cannot hold. Give numbers, e.g. {name}.astype('float64')."
    )


class DatasetWriter:
    """Appends batches to the arrays of a dataset; holds one chunk of rows, whatever the size of the batches.

    Parameters
    ----------
    path : Path
        Folder of the dataset, as `replacing` gives it, or of one part.
    kind : str, optional
        "classification", "regression" or "unlabelled"; None: classification for targets of integers, text or bool, regression for
        floats.
    labels : LabelEncoder, optional
        The encoder that the parts of one dataset share; None: a new one.
    """

    def __init__(self, path: Path, *, kind: str | None = None, labels: LabelEncoder | None = None) -> None:
        if kind is not None and kind not in KINDS:
            raise InputError(f"unknown kind {kind!r}{nearest(kind, KINDS)}")
        self.path = path
        self.kind = kind
        self.n = 0
        self._labels = labels or LabelEncoder(explicit=kind == "classification")
        self._buffers: dict[str, np.ndarray] = {}
        self._source_dtype: np.dtype | None = None
        self._filled = 0
        self._chunk_rows = 0
        self._hash = hashlib.sha256()

    def append(self, x: np.ndarray, targets: np.ndarray | None = None, weights: np.ndarray | None = None) -> None:
        """Add rows; InputError where rows, dtypes or targets do not fit together, or do not fit the rows so far."""
        if len(x) == 0:
            return
        columns = self._columns(x, targets, weights)
        if not self._buffers:
            self._allocate(columns)
        self._require_same(columns)
        start = 0
        while start < len(x):
            take = min(self._chunk_rows - self._filled, len(x) - start)
            for name, column in columns.items():
                self._buffers[name][self._filled : self._filled + take] = column[start : start + take]
            self._filled += take
            start += take
            if self._filled == self._chunk_rows:
                self._flush()

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write the last rows, the final labels and the description; without it the dataset cannot be opened."""
        if self._filled:
            self._flush()
        if self.n == 0:
            raise InputError("the dataset has 0 rows. Give at least one.")
        x, targets = self._buffers["x"], self._buffers.get("targets")
        described: dict[str, Any] = {
            "n": self.n,
            "row_shape": list(x.shape[1:]),
            "dtype": x.dtype.name,
            "kind": self.kind,
            "target_shape": None if targets is None else list(targets.shape[1:]),
            "class_names": None,
            "has_weights": "weights" in self._buffers,
        }
        summary, digests = self._finish_targets(described)
        described["digest"] = digest_of(described, digests)
        described["arrays"] = {
            name: {"chunks": list(open_array(self.path / name).chunks), "digest": digests[name]}
            for name in self._buffers
        }
        described["provenance"] = {
            **provenance,
            **summary,
            "dtype": str(self._source_dtype),
            "imported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_group_attributes(self.path, {ATTRIBUTE: checked({"format": FORMAT, "version": VERSION, **described})})
        consolidate(self.path)

    def _columns(self, x: np.ndarray, targets: np.ndarray | None, weights: np.ndarray | None) -> dict[str, np.ndarray]:
        """{array: its rows in a batch}, of one length, targets as codes or float64; InputError for what does not fit."""
        if x.ndim < 2:
            raise InputError(
                f"x has rows of shape {x.shape[1:]}; expected (n, ...) with one example per row. Reshape it."
            )
        stored_dtype(x.dtype)
        self.kind = self.kind or kind_of(targets)
        if (targets is None) != (self.kind == "unlabelled"):
            raise InputError(
                f"kind={self.kind!r}, but the rows come {'without' if targets is None else 'with'} targets."
            )
        columns = {"x": to_host(x, "x")}
        if targets is not None:
            columns["targets"] = convert_targets(
                to_host(targets, "targets"), self.kind, self._labels, self.n + self._filled
            )
        if weights is not None:
            weights = to_host(weights, "weights")
            if weights.dtype.kind not in "biuf" or weights.ndim != 1:
                raise InputError(f"weights are {weights.dtype} of shape {weights.shape}. Give one number per row.")
            columns["weights"] = weights.astype(np.float64)
        for name, column in columns.items():
            if len(column) != len(x):
                raise InputError(f"x has {len(x)} rows, {name} has {len(column)}. Give one per row.")
        return columns

    def _allocate(self, columns: dict[str, np.ndarray]) -> None:
        """Memory for one chunk of each array, in the dtype of the first batch."""
        x = columns["x"]
        self._source_dtype = x.dtype
        self._chunk_rows = rows_per_chunk(x.shape[1:], stored_dtype(x.dtype))
        for name, column in columns.items():
            dtype = stored_dtype(x.dtype) if name == "x" else column.dtype
            self._buffers[name] = np.empty((self._chunk_rows, *column.shape[1:]), dtype)

    def _require_same(self, columns: dict[str, np.ndarray]) -> None:
        """InputError where a batch has other arrays, shapes or dtypes than those before it."""
        where = f"rows {self.n + self._filled} and after"
        if set(columns) != set(self._buffers):
            raise InputError(f"{where} come with {', '.join(columns)}, those before with {', '.join(self._buffers)}.")
        for name, column in columns.items():
            buffer = self._buffers[name]
            if column.shape[1:] != buffer.shape[1:]:
                raise InputError(
                    f"{where} of {name} have shape {column.shape[1:]}, those before {buffer.shape[1:]}. "
                    "Give rows of one shape."
                )
            if name == "x" and not np.can_cast(stored_dtype(column.dtype), buffer.dtype):
                raise InputError(f"{where} of x have dtype {column.dtype}, those before {buffer.dtype}. Cast them.")

    def _flush(self) -> None:
        """Check the rows of the chunk in memory and write them."""
        stop = self.n + self._filled
        for name, buffer in self._buffers.items():
            rows = buffer[: self._filled]
            _require_finite(rows, name, self.n)
            if name == "weights" and (rows < 0).any():
                raise InputError(f"weights are negative in row {self.n + int(np.flatnonzero(rows < 0)[0])}.")
            if self.n == 0:
                chunks = (self._filled, *rows.shape[1:])
                create_array(self.path / name, rows.shape, chunks, rows.dtype, dimensions=_dimensions(name, rows.ndim))
            stored = open_array(self.path / name, "r+")
            with writing(self.path):
                if self.n:
                    stored.resize((stop, *rows.shape[1:]))
                stored[self.n : stop] = rows
        self._hash.update(self._buffers["x"][: self._filled].data.cast("B"))
        self.n = stop
        self._filled = 0

    def _finish_targets(self, described: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """(what the provenance tells of the targets, {array: digest}); sets the class names in `described`."""
        summary: dict[str, Any] = {}
        digests = {"x": self._hash.hexdigest()}
        if self.kind == "classification":
            names, table = self._labels.finish()
            described["class_names"] = list(names)
            counts, digests["targets"] = self._finish_labels(table, len(names))
            summary["counts"] = dict(zip(names, counts.tolist(), strict=True))
        elif self.kind == "regression":
            summary["target_range"], digests["targets"] = self._finish_numbers("targets")
        if "weights" in self._buffers:
            _, digests["weights"] = self._finish_numbers("weights")
        return summary, digests

    def _finish_labels(self, table: np.ndarray, classes: int) -> tuple[np.ndarray, str]:
        """Replace provisional codes by labels, by `table`; returns (rows of each class, digest)."""
        stored = open_array(self.path / "targets", "r+")
        counts, digest = np.zeros(classes, np.int64), hashlib.sha256()
        for start in range(0, self.n, stored.chunks[0]):
            stop = min(start + stored.chunks[0], self.n)
            codes = np.asarray(stored[start:stop])
            labels = table[codes]
            if (labels != codes).any():
                with writing(self.path):
                    stored[start:stop] = labels
            counts += np.bincount(labels, minlength=classes)
            digest.update(labels.tobytes())
        return counts, digest.hexdigest()

    def _finish_numbers(self, name: str) -> tuple[list[float], str]:
        """([smallest number, largest number], digest) of an array of float64."""
        stored = open_array(self.path / name)
        low, high, digest = np.inf, -np.inf, hashlib.sha256()
        for start in range(0, self.n, stored.chunks[0]):
            values = np.asarray(stored[start : min(start + stored.chunks[0], self.n)])
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            digest.update(values.tobytes())
        return [low, high], digest.hexdigest()


def _dimensions(name: str, ndim: int) -> tuple[str, ...]:
    """Names of the axes of an array of a dataset: arrays share their rows, and nothing else."""
    if name != "x":
        return ("row", "output")[:ndim]
    return (
        "row",
        *{2: ("feature",), 4: ("height", "width", "channel")}.get(ndim, tuple(f"x_{i}" for i in range(1, ndim))),
    )


def _require_free(final: Path, overwrite: bool) -> None:
    """DataError where something is at `final` that may not be replaced."""
    if not final.exists():
        return
    if not overwrite:
        raise DataError(f"{final} exists already. Choose another url, or --overwrite (overwrite=True) to replace it.")
    if final.is_dir() and not any(final.iterdir()):
        return
    try:
        describe(final)
    except (DataError, StoreError) as error:
        if isinstance(error, StoreError) and any(final.rglob("x/zarr.json")):
            return  # a dataset with a damaged description, which the error advises to import again
        raise DataError(
            f"{final} is not a dataset, so --overwrite leaves it alone. Move it, or choose another url."
        ) from error


def _require_finite(rows: np.ndarray, name: str, first: int) -> None:
    """InputError, with the numbers of the rows, for NaN and infinities; the first row has the number `first`."""
    if rows.dtype.kind != "f":
        return
    bad = first + np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
    if bad.size:
        named = ", ".join(map(str, bad[:_NAMED_ROWS])) + (" and more" if bad.size > _NAMED_ROWS else "")
        raise InputError(
            f"row{'s' if bad.size > 1 else ''} {named} of {name} hold{'' if bad.size > 1 else 's'} NaN or "
            "infinite values; remove or impute them."
        )
