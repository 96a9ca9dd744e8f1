"""A dataset in Zarr, read by row ranges: its description, its checks, its lazy arrays.

The Zarr group at `url` holds `x` (n, *row_shape), `targets` ((n,) labels or numbers, or (n, k)) and `weights`, each in chunks
of whole rows, and under the attribute `ntkdask` the fields of `Dataset`. A dataset with parts is a group whose attribute names
them; each is a dataset at `url/<part>`. Nothing is written here: `writer` does that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.array_layout import require_layout
from ntkdask.errors import DamagedTileError, DataError, InputError, StoreError
from ntkdask.files import local_path, read_json
from ntkdask.registry import digest
from ntkdask.store import ATTRIBUTE, open_array, read_group_attributes

FORMAT = "dataset"
VERSION = 1
KINDS = ("classification", "regression", "unlabelled")
DIGESTED = ("n", "row_shape", "dtype", "kind", "target_shape", "class_names", "has_weights")
"""What the digest covers beside the bytes of the arrays."""

_ADVICE = "Import the dataset again with --overwrite; within the folder of a run use `ntkdask verify --repair RUN`."


@dataclass(frozen=True)
class Dataset:
    """The description of a stored dataset, without its rows; small enough to travel with every task. Made by `open_dataset`.

    Parameters
    ----------
    url : str
        Folder of the Zarr group.
    n : int
        Number of rows.
    row_shape : tuple of int
        Shape of one row of x.
    dtype : str
        Of x as it is stored: uint8, int64, float32 or float64.
    target_shape : tuple of int or None
        () for one label or number a row, (k,) for k numbers, None without targets.
    kind : str
        "classification", "regression" or "unlabelled".
    class_names : tuple of str or None
        Name of class c at place c; None where the targets are no classes.
    digest : str
        SHA-256 over the shapes, dtypes, class names and bytes of x, targets and weights: equal content has an equal digest.
    provenance : dict, optional
        Where the rows came from: source, source_digest, importer, imported_at, dtype, and counts per class or target_range.
    has_weights : bool, optional
        Whether rows have sample weights.
    arrays : dict, optional
        {array: {"chunks", "digest"}} as they were written; empty for a dataset of an earlier release.
    """

    url: str
    n: int
    row_shape: tuple[int, ...]
    dtype: str
    target_shape: tuple[int, ...] | None
    kind: str
    class_names: tuple[str, ...] | None
    digest: str
    provenance: dict[str, Any] = field(compare=False, repr=False, default_factory=dict)
    has_weights: bool = False
    arrays: dict[str, Any] = field(compare=False, repr=False, default_factory=dict)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of x, (stop - start, *row_shape), in the stored dtype.

        InputError for a range outside [0, n]; DamagedTileError where a chunk is gone or fails its checksum.
        """
        return self._read("x", start, stop)

    def targets(self, start: int, stop: int) -> np.ndarray:
        """Targets of rows [start, stop): int64 labels 0..C-1, or float64 numbers; InputError where there are none."""
        self._require_targets()
        return self._read("targets", start, stop)

    def weights(self, start: int, stop: int) -> np.ndarray | None:
        """Sample weights of rows [start, stop), float64; None when the dataset has none."""
        return self._read("weights", start, stop) if self.has_weights else None

    @property
    def x(self) -> Any:
        """x as a lazy dask array, a block for each stored chunk; checksums are checked as in `rows`."""
        return StoredRows(self, "x").to_dask()

    @property
    def y(self) -> Any:
        """Targets as a lazy dask array; InputError where there are none."""
        self._require_targets()
        return StoredRows(self, "targets").to_dask()

    def _require_targets(self) -> None:
        if self.target_shape is None:
            raise InputError(f"dataset {self.url} has no targets. Import it again with them.")

    def names(self) -> list[str]:
        """The arrays that are stored: x, targets and weights where rows have them."""
        has = {"x": True, "targets": self.target_shape is not None, "weights": self.has_weights}
        return [name for name, is_there in has.items() if is_there]

    def layout(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of an array."""
        if name == "x":
            return (self.n, *self.row_shape), np.dtype(self.dtype)
        is_labels = name == "targets" and self.kind == "classification"
        row = (self.target_shape or ()) if name == "targets" else ()
        return (self.n, *row), np.dtype("int64" if is_labels else "float64")

    def open_checked(self, name: str) -> Any:
        """The Zarr array of that name; StoreError where its own description says something else than this one."""
        path = local_path(self.url) / name
        array, (shape, dtype) = open_array(path), self.layout(name)
        kept = self.arrays.get(name)
        chunks = (*array.chunks[:1], *shape[1:]) if kept is None else kept["chunks"]
        require_layout(path, array, shape, chunks, dtype)
        return array

    def recomputed_digest(self) -> str:
        """The digest of what is stored now; reads every row once."""
        described = {key: getattr(self, key) for key in DIGESTED}
        digests = {}
        for name in self.names():
            hasher, step = hashlib.sha256(), self.open_checked(name).chunks[0]
            for start in range(0, self.n, step):
                hasher.update(np.ascontiguousarray(self._read(name, start, min(start + step, self.n))).tobytes())
            digests[name] = hasher.hexdigest()
        return digest_of(described, digests)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the array `name`."""
        if not 0 <= start <= stop <= self.n:
            raise InputError(
                f"rows {start} to {stop} of {self.url}: it has rows 0 to {self.n}. Ask for a range inside."
            )
        where = f"rows {start} to {stop} of {name} in dataset {self.url}"
        try:
            array = self.open_checked(name)
            _require_chunks(Path(local_path(self.url) / name), array, start, stop)
            return np.asarray(array[start:stop])
        except (ValueError, StoreError) as error:
            raise DamagedTileError(f"{where} are damaged: {error} {_ADVICE}") from error


@dataclass(frozen=True)
class StoredRows:
    """One array of a dataset with the shape, dtype and slices that dask asks for; pickled as an address, never as rows."""

    dataset: Dataset
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *row_shape) or (n, *target_shape)."""
        return self.dataset.layout(self.name)[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype."""
        return self.dataset.layout(self.name)[1]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.dataset.n)
            if step > 0:
                return self.dataset._read(self.name, start, max(start, stop))[(slice(None, None, step), *rest)]
        # a list, an integer or a reversed slice, which dask fuses into the read of one block
        wanted = np.arange(self.dataset.n)[rows]
        low, high = (int(wanted.min()), int(wanted.max()) + 1) if wanted.size else (0, 0)
        return self.dataset._read(self.name, low, high)[(wanted - low, *rest)]

    def __dask_tokenize__(self) -> tuple[str, str, str]:
        return (self.dataset.url, self.dataset.digest, self.name)

    def to_dask(self) -> Any:
        """The array, lazily. Not `da.from_zarr`: that reads a chunk that is gone as zeros."""
        import dask.array as da

        stored = self.dataset.open_checked(self.name)
        return da.from_array(self, chunks=stored.chunks, asarray=False, meta=np.empty((0,) * self.ndim, self.dtype))


def open_dataset(url: str | os.PathLike[str]) -> Dataset:
    """Open a stored dataset.

    Parameters
    ----------
    url : path
        A folder that `write_dataset` or `import_dataset` wrote; of a dataset with parts, the folder of one part ("data.zarr/train").

    Returns
    -------
    Dataset
        Its description, which reads rows.

    Raises
    ------
    DataError
        Where there is no dataset, or one with parts.
    """
    described = describe(url)
    if "parts" in described:
        first, *others = described["parts"]
        more = f" (or {', '.join(others)})" if others else ""
        raise DataError(f"{url} has parts {', '.join(described['parts'])}. Open one of them: {url}/{first}{more}.")
    try:
        dataset = _described(str(local_path(url)), described)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{local_path(url) / 'zarr.json'} is damaged: {error} does not fit. {_ADVICE}") from error
    for name in dataset.names():
        dataset.open_checked(name)
    return dataset


def _described(url: str, described: Mapping[str, Any]) -> Dataset:
    """The dataset of a description."""
    shape, names = described["target_shape"], described["class_names"]
    counts = described["provenance"].get("counts")
    if counts is not None and (sorted(counts) != sorted(names) or sum(counts.values()) != described["n"]):
        raise ValueError("the number of rows of each class")
    return Dataset(
        url=url,
        n=described["n"],
        row_shape=tuple(described["row_shape"]),
        dtype=described["dtype"],
        target_shape=None if shape is None else tuple(shape),
        kind=described["kind"],
        class_names=None if names is None else tuple(names),
        digest=described["digest"],
        provenance=described["provenance"],
        has_weights=described["has_weights"],
        arrays=described.get("arrays", {}),
    )


def open_parts(url: str | os.PathLike[str]) -> dict[str, Dataset]:
    """Open all parts of a stored dataset.

    Parameters
    ----------
    url : path
        A folder that `write_dataset` or `import_dataset` wrote.

    Returns
    -------
    dict of str to Dataset
        Parts by name ("train", "test"); {"all": dataset} for a dataset without parts.

    Raises
    ------
    DataError
        Where there is no dataset.
    """
    described = describe(url)
    if "parts" not in described:
        return {"all": open_dataset(url)}
    return {part: open_dataset(local_path(url) / part) for part in described["parts"]}


def describe(url: str | os.PathLike[str]) -> dict[str, Any]:
    """The attributes of the dataset at `url`; DataError where there is none."""
    path = local_path(url)
    if not path.exists():
        raise DataError(
            f"there is no dataset at {url}. Make one: `ntkdask data import SOURCE {url}`, or write_dataset."
        )
    marker = path / "zarr.json"
    attributes = read_group_attributes(path).get(ATTRIBUTE) if _is_group(marker) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise DataError(
            f"{url} is not a dataset of ntkdask. Import the file or folder first: "
            f"`ntkdask data import {url} DATASET.zarr`."
        )
    version, checksum = attributes.get("version"), attributes.pop("checksum", None)
    if isinstance(version, int) and version > VERSION:
        raise DataError(f"{url} was written by a newer ntkdask (format {version}). Update ntkdask.")
    if checksum is not None and checksum != digest(attributes):
        raise StoreError(f"{marker} is damaged: the description does not match its checksum. {_ADVICE}")
    return attributes


def checked(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description as it is written: with its own checksum."""
    return {**described, "checksum": digest(described)}


def has_checksum(url: str | os.PathLike[str]) -> bool:
    """Whether a checksum was written with the description, or cannot be asked for; earlier releases wrote none."""
    try:
        return "checksum" in read_group_attributes(url).get(ATTRIBUTE, {})
    except StoreError:
        return True


def digest_of(described: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """The digest of a dataset: SHA-256 over what `DIGESTED` names of its description, and the digests of its arrays."""
    canonical = json.dumps({**described, **digests}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _is_group(marker: Path) -> bool:
    """Whether `marker` describes a Zarr group; StoreError where it is there and damaged."""
    if not marker.is_file():
        return False
    table = read_json(marker, _ADVICE)
    if not isinstance(table, dict):
        raise StoreError(f"{marker} is damaged (it holds no table). {_ADVICE}")
    return table.get("node_type") == "group"


def _require_chunks(path: Path, array: Any, start: int, stop: int) -> None:
    """StoreError where a chunk of rows [start, stop) is missing: Zarr would read zeros."""
    rows, zeros = array.chunks[0], ["0"] * (array.ndim - 1)
    for i in range(start // rows, -(-stop // rows)):
        if not path.joinpath("c", str(i), *zeros).exists():
            raise StoreError(f"chunk {i} is not there.")


def require_labels(data: Dataset) -> Dataset:
    """`data` itself; InputError where it has no targets, or is a classification with one class."""
    if data.kind == "unlabelled":
        raise InputError(f"dataset {data.url} has no targets. Import it again with them (--target).")
    counts = [c for c in dict(data.provenance.get("counts") or {}).values() if c]
    if data.kind == "classification" and counts and len(counts) < 2:
        raise InputError(f"dataset {data.url} has one class only; a classifier needs at least two. Check --target.")
    return data
