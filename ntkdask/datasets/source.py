"""What an importer gives, a stream of batches with what is known about them beforehand; and how importers open files.

Every importer is a module with a function `open_source(path, request) -> Source`. Its generator holds a chunk or two of rows.
`reading` turns what decompressors and archive readers raise into errors that name the file and say what to do.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from ntkdask.datasets.bounds import BoundedStream, require_row
from ntkdask.errors import DataError, UserError
from ntkdask.wording import format_bytes

ALL = "all"
"""The part of a dataset without parts."""

PARTS = ("train", "validation", "test")
"""The parts of a dataset in their order."""

_PART_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_READ_BYTES = 2**20
_TAR_HEADER_BYTES = 2**22
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}
# tarfile reads headers of headers by recursion
_DAMAGED = (RecursionError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


class Batch(NamedTuple):
    """Some rows of one part: x (b, ...), and targets (b,) or (b, k), or None."""

    part: str
    x: np.ndarray
    targets: np.ndarray | None


@dataclass(frozen=True)
class Request:
    """What `import_dataset` was called with: target, kind, whether a table has a header, name of the array of rows; the format."""

    target: str | int | None = None
    kind: str | None = None
    header: bool | None = None
    rows: str | None = None
    format: str | None = None


@dataclass
class Source:
    """A stream of batches with its description.

    Parameters
    ----------
    batches : iterator of Batch
        The rows, part by part or mixed.
    digest : str
        SHA-256 of the file or folder.
    kind : str, optional
        "classification", "regression" or "unlabelled"; None: the dtype of the targets decides.
    class_names : tuple of str, optional
        None: those of the labels in the stream.
    total : int, optional
        Number of rows, where it is known beforehand.
    notes : dict, optional
        More for the provenance; complete once the stream has ended.
    """

    batches: Iterator[Batch]
    digest: str
    kind: str | None = None
    class_names: tuple[str, ...] | None = None
    total: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what goes wrong in the block, which reads `path`, into a DataError; errors of this package pass unchanged."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no file {error.filename or path}. Check the path.") from error
    except PermissionError as error:
        raise DataError(f"no permission to read {error.filename or path}. Change its permissions.") from error
    except (*_DAMAGED, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); download it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it, or name its format with --format.") from error
    except OSError as error:
        # "Invalid data stream" of bz2, a seek beyond the end in a damaged zip, or a failure of the disk
        raise DataError(f"{path} is truncated, damaged or cannot be read ({error}); download it again.") from error


def part_of(name: str) -> str | None:
    """The part that a folder or an array of this name stands for, in any case of letters; None where it is no name of a part.

    >>> part_of("Training"), part_of("val"), part_of("cat")
    ('train', 'validation', None)
    """
    return _PART_NAMES.get(name.lower())


def open_binary(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where it begins as gzip, xz or bzip2, or is a zip archive of one file, whatever its name."""
    opener = _opener(path)
    return open(path, "rb") if opener is None else opener(path, "rb")


def zip_names(path: Path) -> list[str] | None:
    """The names of the files in a zip archive, without those that a Mac adds; None where the file does not begin as one."""
    with open(path, "rb") as raw:
        if raw.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
            return None
    with zipfile.ZipFile(path) as archive:
        names = [i.filename for i in archive.infolist() if not i.is_dir()]
    return [n for n in names if not n.startswith("__MACOSX/")]


def zip_file_read(path: Path, archive: zipfile.ZipFile, name: str, max_bytes: int = 2**28) -> bytes:
    """The content of a file in a zip archive; DataError where its header claims more than `max_bytes`, or it is encrypted."""
    if archive.getinfo(name).file_size > max_bytes:
        raise DataError(f"{name} in the archive has {archive.getinfo(name).file_size} bytes, more than {max_bytes}.")
    with _unpacking(path):
        return archive.read(name)


@contextlib.contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """DataError for a member of a zip archive that has a password, or a compression that Python does not know."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}). Pack it again without.") from error


def _open_only_file(path: Path, mode: str) -> IO[bytes]:
    """The one file of a zip archive; DataError where there are more, or it is encrypted."""
    names = zip_names(path) or []
    if len(names) != 1:
        raise DataError(f"{path} is a zip archive of {len(names)} files. Unpack it and import the one that you mean.")
    with _unpacking(path):
        # the open member keeps the archive's file open
        return zipfile.ZipFile(path).open(names[0])


def _opener(path: Path) -> Callable[..., Any] | None:
    """The function that opens a compressed file, chosen by its first bytes; None for a file that is not compressed."""
    with open(path, "rb") as raw:
        magic = raw.read(6)
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _open_only_file
    return next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the relative names and contents of its files in sorted order."""
    if path.is_dir():
        hasher = hashlib.sha256()
        for name, inside in files_under(path):
            hasher.update(f"{name}\0{file_digest(inside)}\n".encode())
        return hasher.hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(folder: Path, max_depth: int = 8) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file below `folder`, in sorted order; hidden ones are left out, links followed."""
    for root, folders, names in os.walk(folder, followlinks=True):
        relative = Path(root).relative_to(folder)
        if len(relative.parts) > max_depth:
            raise DataError(
                f"{folder} is nested more than {max_depth} folders deep (a link to itself?). Give a flatter folder."
            )
        # os.walk follows this list as it stands
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            path = Path(root) / name
            if path.exists() and not path.is_file():
                raise DataError(f"{path} is a device or another special file. Remove it: only plain files are read.")
            yield (relative / name).as_posix(), path


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, compressed or not, opened for reading in place; it is never unpacked."""
    message = f"{path} has headers of more than {format_bytes(_TAR_HEADER_BYTES)} between two files. It is damaged or malicious."
    with open_binary(path) as stream:
        bounded = BoundedStream(stream, message, _TAR_HEADER_BYTES)
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            yield archive


def tar_files(path: Path, archive: tarfile.TarFile) -> Generator[tarfile.TarInfo]:
    """The regular files of an archive in its own order, one in memory at a time.

    DataError for a member that could lead out of the archive (an absolute path, '..', a link, a device), and for an uncompressed
    archive that was cut between two members: tarfile would take the cut for its end.
    """
    while (member := _next_member(archive)) is not None:
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them in memory
        _require_safe(path, member)
        if member.isreg():
            yield member
    # of a compressed archive the decompressor notices the cut
    if _opener(path) is None:
        with open(path, "rb") as raw:
            raw.seek(archive.offset)
            if len(raw.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise DataError(f"{path} is truncated or damaged (it ends without an end mark); download it again.")


def _next_member(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member, whose headers, with the long names and attributes in them, are bounded."""
    stream: Any = archive.fileobj
    stream.refill()
    member = archive.next()
    stream.refill(unlimited=True)
    return member


def tar_read(archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int = 2**28) -> bytes:
    """The content of a member; DataError where its header claims more than `max_bytes`."""
    if member.size > max_bytes:
        raise DataError(f"{member.name} in the archive has {member.size} bytes, more than {max_bytes}.")
    file = archive.extractfile(member)
    return b"" if file is None else b"".join(read_blocks(file, member.size, 1))


def read_blocks(stream: IO[bytes], n: int, row_bytes: int, block_bytes: int = 4 * 2**20) -> Iterator[bytes]:
    """`n` rows of `row_bytes` bytes from a stream, about `block_bytes` at a time; EOFError where it ends early."""
    require_row(row_bytes)
    rows = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, n, rows):
        wanted = min(rows, n - start) * row_bytes
        pieces, have = [], 0
        # a decompressor may give fewer bytes than it was asked for
        while have < wanted:
            piece = stream.read(min(wanted - have, _READ_BYTES * 4))
            if not piece:
                raise EOFError(f"{start + have // max(1, row_bytes)} of {n} rows are there")
            pieces.append(piece)
            have += len(piece)
        yield b"".join(pieces)


def _require_safe(path: Path, member: tarfile.TarInfo) -> None:
    """DataError for a member that is neither a plain file nor a folder, or whose path leads out of the archive."""
    name = PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise DataError(
            f"{path} holds the path {member.name!r}, which leads out of the archive. Do not trust this file."
        )
    if member.size < 0 or member.issparse():
        raise DataError(f"{path} holds a sparse file or one of negative size, {member.name!r}. Pack it again without.")
    if not (member.isreg() or member.isdir()):
        kind = "a link" if member.islnk() or member.issym() else "a device or other special file"
        raise DataError(f"{path} holds {kind}, {member.name!r}. Only plain files are read: pack it again without.")
