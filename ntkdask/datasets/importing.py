"""Import a file, a folder or a bundled dataset into Zarr: find out its format, stream its rows into the writer.

Each format is read by the module that `FORMATS` names, which is imported when it is needed.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path, PurePosixPath

from ntkdask.datasets.dataset import KINDS, Dataset, open_parts
from ntkdask.datasets.source import ALL, Request, Source, open_binary, open_tar, reading, tar_files
from ntkdask.datasets.targets import LabelEncoder
from ntkdask.datasets.writer import DatasetWriter, replacing, write_parts
from ntkdask.errors import DataError, InputError, nearest

FORMATS = {
    "cifar10-binary": "cifar_binary",
    "cifar10-python": "cifar_python",
    "csv": "tables",
    "idx": "idx",
    "images": "images",
    "numpy": "numpy_files",
    "sklearn": "bundled",
    "svmlight": "svmlight",
}
"""Formats by name, and the module that reads each."""

_TAKES_TARGET = ("csv", "numpy")
_PART_ORDER = ("train", "validation", "val", "test")
_SUFFIX_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".svm": "svmlight",
    ".svmlight": "svmlight",
    ".libsvm": "svmlight",
    ".npy": "numpy",
    ".npz": "numpy",
    ".tar": "images",
    ".tgz": "images",
    ".txz": "images",
}
_SVMLIGHT_LINE = re.compile(rb"^\s*[-+.\deE]+(\s+qid:\d+)?(\s+\d+:[-+.\deE]+)+\s*(#.*)?$")
_TABLE_LINE = re.compile(rb"^[^\x00-\x08\x0e-\x1f,;\t]*[,;\t][^\x00-\x08\x0e-\x1f]*$")


def import_dataset(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    format: str | None = None,
    target: str | int | None = None,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Dataset]:
    """Import a file, a folder or a bundled dataset as a dataset in Zarr; it streams, a chunk or two of rows at a time.

    Parameters
    ----------
    source : path or str
        A file, a folder or an archive, or a dataset of scikit-learn such as `sklearn:digits`.
    url : path
        Folder of the new dataset.
    format : str, optional
        "cifar10-binary", "cifar10-python", "csv", "idx", "images", "numpy", "sklearn" or "svmlight"; None: told by content and name.
    target : str or int, optional
        Where the targets are: the column of a table by name or by number, from 0 or negative from the end, the last by default; or
        the array of an .npz file by name.
    kind : str, optional
        "classification", "regression" or "unlabelled", which leaves targets out; None: told by the targets.
    overwrite : bool, optional
        Replace a dataset that is at `url`.
    progress : callable, optional
        progress(rows so far, rows in all or None) is called after each batch.

    Returns
    -------
    dict of str to Dataset
        Parts by name ("train", "test"); {"all": dataset} where the source has no parts.

    Raises
    ------
    DataError
        For files that are missing, damaged, unsafe or of another format, and where something is at `url` and `overwrite` is False.
    InputError
        For NaN, and for rows that do not fit together. Whatever is raised, nothing half-written is left at `url`.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}{nearest(kind, KINDS)}")
    if format is not None and format not in FORMATS:
        raise DataError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    with replacing(url, overwrite) as partial:
        importer = format or detect_format(source)
        if target is not None and importer not in _TAKES_TARGET:
            raise DataError(f"target={target!r}: files of the format {importer} name their own target. Leave it out.")
        stream = _open_source(source, importer, Request(target, kind))
        provenance = {"source": os.fspath(source), "source_digest": stream.digest, "importer": importer}
        _write(stream, partial, kind, provenance, progress)
    return open_parts(url)


def detect_format(source: str | os.PathLike[str]) -> str:
    """The format of `source`, by its content first, then by its name; DataError, with a list of the formats, where neither tells."""
    text = os.fspath(source)
    if text.startswith("sklearn:"):
        return "sklearn"
    path = Path(text)
    if not os.path.exists(path):
        raise DataError(f"there is no file or folder {text}. Check the path, or use sklearn:digits.")
    _require_plain(path)
    with reading(path):
        name = _folder_format(path) if path.is_dir() else _file_format(path)
    if name is None:
        raise DataError(f"cannot tell the format of {text}. Name it with --format: {', '.join(sorted(FORMATS))}.")
    return name


def _require_plain(path: Path) -> None:
    """DataError for a device, a pipe or another special file, which may never end."""
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is a device or another special file. Give a plain file or a folder.")


def _folder_format(path: Path) -> str | None:
    """The format of a folder, by the names in it and in the folders below; None where they do not tell."""
    entries = list(path.iterdir())
    below = [e for folder in entries if folder.is_dir() for e in folder.iterdir() if e.is_file()]
    cifar = _cifar_format({e.name for e in [*entries, *below]})
    if cifar:
        return cifar
    if any("idx3-ubyte" in e.name for e in entries):
        return "idx"
    return "images" if any(e.is_dir() for e in entries) else None


def _cifar_format(names: set[str]) -> str | None:
    """Which version of CIFAR-10 has files of these names; None where neither has."""
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        if f"{name}.bin" in names:
            return "cifar10-binary"
        if name in names:
            return "cifar10-python"
    return None


def _file_format(path: Path) -> str | None:
    """The format of a file, by its first bytes, then by its name, then by its first line; None where they do not tell."""
    with open_binary(path) as stream:
        head = stream.read(2**16)
    named = _named_format(path)
    if head.startswith((b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")):
        return "numpy"
    if head[:3] == b"\x00\x00\x08":
        return "idx"
    if head[257:262] == b"ustar":
        return _tar_format(path)
    if named in ("images", "numpy"):
        raise DataError(f"{path} is not what its name says: it begins with {head[:16]!r}. Download it again.")
    if named:
        return named
    line = next((one for one in head.splitlines() if one.strip()), b"")
    if _SVMLIGHT_LINE.match(line):
        return "svmlight"
    return "csv" if _TABLE_LINE.match(line) else None


def _named_format(path: Path) -> str | None:
    """The format that the ending of a file's name stands for, without those of compression."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".xz", ".bz2")]
    return _SUFFIX_FORMATS.get(suffixes[-1]) if suffixes else None


def _tar_format(path: Path) -> str:
    """The format of a tar archive: CIFAR-10 where one of its first files has such a name, else images."""
    names: set[str] = set()
    with open_tar(path) as archive, closing(tar_files(path, archive)) as members:
        for member in members:
            names.add(PurePosixPath(member.name).name)
            if len(names) == 4:
                break
    return _cifar_format(names) or "images"


def _open_source(source: str | os.PathLike[str], name: str, request: Request) -> Source:
    """The source as the importer of the format `name` reads it."""
    module = importlib.import_module(f"ntkdask.datasets.{FORMATS[name]}")
    if name == "sklearn":
        return module.open_source(os.fspath(source), request)
    path = Path(source)
    _require_plain(path)
    with reading(path):
        return module.open_source(path, request)


def _write(
    stream: Source,
    partial: Path,
    kind: str | None,
    provenance: dict,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Stream batches into a writer for each part, then finish them together: all classes are known at the end only."""
    kind = kind or stream.kind
    labels = LabelEncoder(stream.class_names, explicit=kind == "classification")
    writers: dict[str, DatasetWriter] = {}
    done = 0
    for part, x, targets in stream.batches:
        if part not in writers:
            path = partial if part == ALL else partial / part
            writers[part] = DatasetWriter(path, kind=kind, labels=labels)
        writers[part].append(x, None if kind == "unlabelled" else targets)
        done += len(x)
        if progress is not None:
            progress(done, stream.total)
    if not writers:
        raise DataError(f"{provenance['source']} has no rows. Check the file.")
    for writer in writers.values():
        writer.finish({**provenance, **stream.notes})
    if ALL not in writers:
        write_parts(partial, sorted(writers, key=_PART_ORDER.index))
