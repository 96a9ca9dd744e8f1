"""Files of runs: the path of a url, small files written whole or not at all, locks of folders, free disk space.

Refusals of the operating system become errors that say what to do. Zarr is not used here: `store` keeps tiles.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ntkdask.errors import DiskSpaceError, StoreError
from ntkdask.wording import format_bytes

_MAX_NAME_BYTES = 255


def local_path(url: str | os.PathLike[str]) -> Path:
    """The file-system path of a store url, ~ as the home folder; StoreError for remote schemes and names that no file can have."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text[len("file://") :]
    elif "://" in text:
        raise StoreError(f"{text}: only local or shared file systems hold stores for now. Give a path.")
    if "\0" in text or max(map(len, os.fsencode(text).split(b"/"))) > _MAX_NAME_BYTES:
        raise StoreError(f"{text!r:.80} ... is no path: names have at most {_MAX_NAME_BYTES} bytes, without NUL.")
    return home_expanded(text).absolute()


def home_expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a user wrote it, with ~ or ~user at its start as that home folder; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals to write under `path` into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError(
                f"no space left to write {path}. Free some disk space and run the same command again: "
                "everything committed so far is kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(
                f"no permission to write {path}. Choose another folder or change its permissions."
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise StoreError(f"cannot write {path}: a file stands in the way. Choose another url.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole or not at all: a temporary file beside it, then a rename."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def read_json(path: Path, advice: str) -> Any:
    """The content of a JSON file; StoreError, which names it and ends in `advice`, where it cannot be read as UTF-8 and JSON."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}). {advice}") from error


def copy_file(source: Path | str, target: Path) -> None:
    """Copy a file, whole or not at all, unless `target` is there."""
    if target.exists():
        return
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def free_bytes(path: Path | str) -> int:
    """Free bytes on the file system that holds (or will hold) `path`."""
    path = local_path(path)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_disk(path: Path | str, needed_bytes: int, what: str, advice: str) -> None:
    """DiskSpaceError where fewer than `needed_bytes` are free at `path`.

    Parameters
    ----------
    path : path
        Where files will be written; it need not exist.
    needed_bytes : int
        Bytes that will be written at most.
    what : str
        What will be written: the subject of the message, "the kernel matrix".
    advice : str
        What helps besides free space: the end of the message.
    """
    free = free_bytes(path)
    if needed_bytes > free:
        raise DiskSpaceError(
            f"{what} takes up to {format_bytes(needed_bytes)} at {path}, where {format_bytes(free)} are free. "
            f"Free some space, {advice}."
        )


def remove(path: Path | str) -> None:
    """Delete the file, the link or the folder with everything in it at `path`, if there is one."""
    path = local_path(path)
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


@contextlib.contextmanager
def exclusive(place: Path | str, *, beside: bool = False) -> Iterator[None]:
    """Be the only writer of a folder or a store during the block; every workflow that writes asks here, and nowhere else.

    The operating system releases the lock when the process ends, however it ends.

    Parameters
    ----------
    place : path
        A run's folder, or the url of a store or a dataset; it need not exist.
    beside : bool, optional
        Keep the lock beside the place, as long as the block lasts: for stores and datasets, which are replaced as a whole. False: in
        the folder, which is made where there is none.

    Raises
    ------
    StoreError
        Where another driver is writing there, or nothing can be written.
    """
    place = local_path(place)
    path = place.with_name(f".{place.name}.lock") if beside else place / ".lock"
    with writing(place):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    if lock is None:
        raise StoreError(f"{place} is in use by another run. Wait for it, or choose another name.")
    try:
        yield
    finally:
        if beside:
            # before it is released: whoever opened it meanwhile sees that the file is gone and asks again
            path.unlink(missing_ok=True)
        lock.close()


def _locked(path: Path) -> IO[str] | None:
    """The file at `path`, open and locked; None where another one has the lock."""
    while True:
        lock = open(path, "a")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError as error:
            lock.close()
            raise StoreError(
                f"{path.parent} is on a file system that grants no locks ({error}). Use another one."
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def sweep(root: Path | str, older_than_seconds: float = 3600.0) -> int:
    """Delete temporary files, and half-written states and datasets, that killed writers left under `root`; returns how many.

    Younger ones than `older_than_seconds` stay: a writer may be at work on them.
    """
    count, now = 0, time.time()
    for folder, folders, files in os.walk(local_path(root)):
        for name in [name for name in folders if name.endswith(".partial")]:
            path = Path(folder) / name
            with contextlib.suppress(FileNotFoundError):
                if now - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > older_than_seconds:
                    remove(path)
                    count += 1
            folders.remove(name)
        for name in files:
            if ".partial" in name or name.endswith(".tmp"):
                path = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):
                    if now - path.stat().st_mtime > older_than_seconds:
                        path.unlink()
                        count += 1
    return count
