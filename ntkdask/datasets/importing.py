"""Import a file, a folder or a bundled dataset into Zarr: find out its format, stream its rows into the writer.

Each format is read by the module that `FORMATS` names, which is imported when it is needed.
"""

from __future__ import annotations

import importlib
import os
import re
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path, PurePosixPath

from ntkdask.datasets.dataset import KINDS, Dataset, open_parts
from ntkdask.datasets.source import ALL, PARTS, Request, Source, open_binary, open_tar, reading, tar_files, zip_names
from ntkdask.datasets.targets import LabelEncoder, kind_of
from ntkdask.datasets.writer import DatasetWriter, replacing, write_parts
from ntkdask.errors import DataError, InputError, nearest
from ntkdask.files import home_expanded

FORMATS = {
    "cifar10-binary": "cifar_binary",
    "cifar10-python": "cifar_python",
    "cifar100-binary": "cifar_binary",
    "cifar100-python": "cifar_python",
    "csv": "tables",
    "hdf5": "containers.hdf5",
    "idx": "idx",
    "images": "images",
    "netcdf": "containers.netcdf",
    "numpy": "numpy_files",
    "parquet": "containers.parquet",
    "sklearn": "bundled",
    "svmlight": "svmlight",
    "zarr": "containers.zarr_arrays",
}
"""Formats by name, and the module that reads each."""

_ARRAYS = ("hdf5", "netcdf", "numpy", "zarr")
_TAKES = {
    "target": (*_ARRAYS, "csv", "parquet", "idx", "cifar100-binary", "cifar100-python"),
    "rows": (*_ARRAYS, "parquet"),
    "header": ("csv",),
}
_HEADER = {"yes": True, "no": False, True: True, False: False, None: None}
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
    ".parquet": "parquet",
    ".pq": "parquet",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".nc": "netcdf",
    ".nc4": "netcdf",
}
_NETCDF3 = (b"CDF\x01", b"CDF\x02", b"CDF\x05")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_SVMLIGHT_LINE = re.compile(rb"^\s*[-+.\deE]+(\s+qid:\d+)?(\s+\d+:[-+.\deE]+)+\s*(#.*)?$")
_TABLE_LINE = re.compile(rb"^[^\x00-\x08\x0e-\x1f,;\t]*[,;\t][^\x00-\x08\x0e-\x1f]*$")


def import_dataset(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    format: str | None = None,
    target: str | int | None = None,
    kind: str | None = None,
    header: bool | str | None = None,
    rows: str | None = None,
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
        "cifar10-binary", "cifar10-python", "cifar100-binary", "cifar100-python", "csv", "hdf5", "idx", "images", "netcdf", "numpy",
        "parquet", "sklearn", "svmlight" or "zarr"; None: told by content and name.
    target : str or int, optional
        Where the targets are: the column of a table by name or by number, from 0 or negative from the end, the last by default; the
        array of an .npz, HDF5, NetCDF or Zarr file by name; the column of IDX labels that have more than one; "fine" or "coarse" of
        CIFAR-100. What became the target stands in the dataset's provenance.
    kind : str, optional
        "classification", "regression" or "unlabelled", which leaves targets out; None: told by the targets.
    header : bool or str, optional
        Whether the first line of a text table holds the names of its columns: True or "yes", False or "no"; None: told by the first
        lines, and an error where they do not tell.
    rows : str, optional
        The array that holds the rows, by name, where it is not called x, X, data or images; of a Parquet file a column of lists.
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
    if header not in _HEADER:
        raise InputError(f"header={header!r}; give True or 'yes', False or 'no', or leave it out.")
    with replacing(url, overwrite) as partial:
        importer = format or detect_format(source)
        for name, value in {"target": target, "rows": rows, "header": header}.items():
            if value is not None and importer not in _TAKES[name]:
                raise DataError(f"{name}={value!r}: files of the format {importer} take no {name}. Leave it out.")
        stream = _open_source(source, importer, Request(target, kind, _HEADER[header], rows, importer))
        provenance = {"source": os.fspath(source), "source_digest": stream.digest, "importer": importer}
        _write(stream, partial, kind, provenance, progress)
    return open_parts(url)


def detect_format(source: str | os.PathLike[str]) -> str:
    """The format of `source`, by its content first, then by its name; DataError, with a list of the formats, where neither tells."""
    text = os.fspath(source)
    if text.startswith("sklearn:"):
        return "sklearn"
    path = home_expanded(text)
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
    names = {e.name for e in entries if e.is_file()}
    if names & {"zarr.json", ".zarray", ".zgroup"}:
        return "zarr"
    below = [e for folder in entries if folder.is_dir() for e in folder.iterdir() if e.is_file()]
    cifar = _cifar_format(names | {e.name for e in below})
    if cifar:
        return cifar
    if any("idx" in name and "images" in name for name in names):
        return "idx"
    if any(e.suffix == ".parquet" for e in [*entries, *below]):
        return "parquet"
    if any(e.is_dir() for e in entries):
        return "images"
    found = sorted(name for name in names if _named_format(path / name))
    if found:
        raise DataError(f"{path} is a folder with {found[0]}. Give the file itself: {path / found[0]}.")
    return None


def _cifar_format(names: set[str]) -> str | None:
    """Which version of CIFAR has files of these names; None where none has."""
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        if f"{name}.bin" in names:
            return "cifar10-binary"
        if name in names:
            return "cifar10-python"
    # an archive's first files are known alone
    if names & {"train.bin", "test.bin"}:
        return "cifar100-binary"
    return "cifar100-python" if len(names & {"train", "test", "meta"}) > 1 else None


def _file_format(path: Path) -> str | None:
    """The format of a file, by its first bytes, then by its name, then by its first line; None where they do not tell."""
    named = _named_format(path)
    if (inside := zip_names(path)) is not None:
        found = _zip_format(path, inside)
        if found:
            return found
    with open_binary(path) as stream:
        head = stream.read(2**16)
    found = _magic_format(path, head)
    if found:
        return found
    if named in ("images", "numpy", "parquet", "hdf5", "netcdf"):
        raise DataError(f"{path} is not what its name says: it begins with {head[:16]!r}. Download it again.")
    if named:
        return named
    line = next((one for one in head.splitlines() if one.strip()), b"")
    if _SVMLIGHT_LINE.match(line):
        return "svmlight"
    return "csv" if _TABLE_LINE.match(line) else None


def _magic_format(path: Path, head: bytes) -> str | None:
    """The format of a file that begins with these bytes; None where they are no format's mark."""
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    if len(head) > 3 and head[:2] == b"\0\0" and head[2:3] in b"\x08\x09\x0b\x0c\x0d\x0e" and head[3:4] in b"\1\2\3\4":
        return "idx"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "netcdf" if path.suffix.lower() in (".nc", ".nc4", ".netcdf", ".cdf") else "hdf5"
    if head.startswith(_NETCDF3):
        return "netcdf"
    return _tar_format(path) if _is_tar(head) else None


def _is_tar(head: bytes) -> bool:
    """Whether a file begins as a tar archive of any version: with a header whose checksum is right."""
    if head[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _zip_format(path: Path, names: list[str]) -> str | None:
    """The format of a zip archive, by the names in it; None for one file, whose content tells."""
    if any(name.endswith(".npy") for name in names):
        return "numpy"
    if "[Content_Types].xml" in names:
        raise DataError(f"{path} is an Office document. Save its table as CSV and import that.")
    if any(name.lower().endswith(_IMAGE_SUFFIXES) for name in names):
        return "images"
    if len(names) == 1:
        return None
    listed = ", ".join(names[:5]) or "nothing"
    raise DataError(f"{path} is a zip archive of {listed}. Unpack it and import the file or folder that you mean.")


def _named_format(path: Path) -> str | None:
    """The format that the ending of a file's name stands for, without those of compression."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".xz", ".bz2", ".zip")]
    return _SUFFIX_FORMATS.get(suffixes[-1]) if suffixes else None


def _tar_format(path: Path) -> str:
    """The format of a tar archive: CIFAR where its first files have such names, else images."""
    names: set[str] = set()
    with open_tar(path) as archive, closing(tar_files(path, archive)) as members:
        for member in members:
            names.add(PurePosixPath(member.name).name)
            if len(names) == 4:
                break
    return _cifar_format(names) or "images"


def _open_source(source: str | os.PathLike[str], name: str, request: Request) -> Source:
    """The source as the importer of the format `name` reads it."""
    try:
        module = importlib.import_module(f"ntkdask.datasets.{FORMATS[name]}")
    except ModuleNotFoundError as error:
        raise DataError(
            f"{source}: files of the format {name} are read by {error.name}, which is not installed. "
            "Install it: pip install 'ntkdask[formats]'."
        ) from error
    if name == "sklearn":
        return module.open_source(os.fspath(source), request)
    path = home_expanded(source)
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
    asked = found = kind or stream.kind
    labels = LabelEncoder(stream.class_names, explicit=asked == "classification")
    writers: dict[str, DatasetWriter] = {}
    done = 0
    for part, x, targets in stream.batches:
        if found is None and targets is not None:
            # one kind for all parts
            found = kind_of(targets)
        if part not in writers:
            path = partial if part == ALL else partial / part
            writers[part] = DatasetWriter(
                path, kind=asked or (found if targets is not None else "unlabelled"), labels=labels
            )
        writers[part].append(x, None if asked == "unlabelled" else targets)
        done += len(x)
        if progress is not None:
            progress(done, stream.total)
    if not done:
        raise DataError(f"{provenance['source']} has no rows. Check the file.")
    for writer in writers.values():
        writer.finish({**provenance, **stream.notes})
    if ALL not in writers:
        write_parts(partial, sorted(writers, key=PARTS.index))
