"""The content of a file of weights, by digest: a path in a job file says where weights lie, the digest says which they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ntkdask.errors import DataError

_PIECE = 2**22


def file_digest(path: str | os.PathLike[str]) -> str:
    """16 hex digits of SHA-256 of a file's bytes; nothing of it is interpreted. DataError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            hasher = hashlib.sha256()
            while piece := file.read(_PIECE):
                hasher.update(piece)
    except OSError as error:
        raise DataError(
            f"the file of weights {Path(path)} cannot be read: {error.strerror}. Check the path."
        ) from error
    return hasher.hexdigest()[:16]


def require_digest(path: str | os.PathLike[str], digest: str) -> None:
    """DataError where the file at `path` is not the one whose digest is given: a model was made with other weights."""
    found = file_digest(path)
    if found != digest:
        raise DataError(
            f"the file of weights {Path(path)} has changed: its digest is {found}, {digest} was asked for. Put the old file back, or "
            "run what was computed with it again."
        )
