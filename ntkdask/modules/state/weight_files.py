"""The digest of a file of weights: a path in a job file says where weights are, the digest says which they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ntkdask.errors import DataError
from ntkdask.files import home_expanded

_PIECE = 2**22


def file_digest(path: str | os.PathLike[str]) -> str:
    """16 hex digits of SHA-256 of a file's bytes; nothing of it is interpreted. DataError where it cannot be read."""
    try:
        with open(home_expanded(path), "rb") as file:
            hasher = hashlib.sha256()
            while piece := file.read(_PIECE):
                hasher.update(piece)
    except OSError as error:
        raise DataError(
            f"the file of weights {Path(path)} cannot be read: {error.strerror}. Check the path."
        ) from error
    return hasher.hexdigest()[:16]


def require_digest(path: str | os.PathLike[str], digest: str) -> None:
    """DataError where the file at `path` has another digest: it is not the one that a model was made with."""
    actual = file_digest(path)
    if actual != digest:
        raise DataError(
            f"the file of weights {Path(path)} has changed: its digest is {actual}, {digest} was asked for. Put the old file back, or "
            "run what was computed with it again."
        )
