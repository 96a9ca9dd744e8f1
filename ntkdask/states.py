"""States: arrays that many tasks share (preprocessing, splits, spectra, models), stored under the digest of their content.

Equal content has an equal address and is written once; whoever reads it checks the digest, so that a damaged state is an
error and never a wrong number. Loaded through this process's byte-bounded cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.cache import shared
from ntkdask.errors import DamagedTileError, StoreError
from ntkdask.files import local_path, remove, writing
from ntkdask.store import ATTRIBUTE, create_array, open_array, read_group_attributes, write_group_attributes

_CHUNK_BYTES = 2**26
_STATE_ADVICE = "`ntkdask verify --repair RUN` removes it, the next run computes it again."


def save_state(root: Path | str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any] | None = None) -> str:
    """Store arrays that many tasks share under `root/<digest of their content>`; returns that url.

    Idempotent: equal content has an equal address and is written once.
    """
    final = local_path(root) / _state_digest(arrays, attributes or {})
    if not final.exists():
        partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
        with writing(partial):
            remove(partial)
            write_group_attributes(partial, {ATTRIBUTE: dict(attributes or {})})
            for name, a in arrays.items():
                a = np.asarray(a)
                # bounded chunks: a codec copies its chunk, twice; never larger than the array: a chunk is written whole
                pieces = -(-a.nbytes // _CHUNK_BYTES) or 1
                chunks = (-(-len(a) // pieces), *a.shape[1:]) if a.ndim else ()
                stored = create_array(partial / name, a.shape, chunks, a.dtype)
                stored[...] = a
            if not final.exists():
                os.replace(partial, final)
    return str(final)


def load_state(url: str, keep: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, attributes) of a state, through this process's byte-bounded cache: shared, never write to them.

    keep=False: read anew and not kept, for what a task needs once.
    """
    attributes = read_group_attributes(url).get(ATTRIBUTE, {})
    if not keep:
        return _read_state(local_path(url), attributes), attributes
    return shared.get(("state", url), lambda: _read_state(local_path(url), attributes)), attributes


def _read_state(path: Path, attributes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a state; DamagedTileError when they are not what its address says."""
    try:
        arrays = {p.name: np.asarray(open_array(p)[...]) for p in sorted(path.iterdir()) if p.is_dir()}
    except (ValueError, StoreError) as error:
        raise DamagedTileError(f"state {path} is damaged: {error}. {_STATE_ADVICE}") from error
    # Zarr reads a chunk that is gone as zeros, and an array that is gone is no error at all
    if _state_digest(arrays, attributes) != path.name:
        raise DamagedTileError(f"state {path} is damaged: something of it is gone. {_STATE_ADVICE}")
    return arrays


def _state_digest(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> str:
    """The address of a state: 16 hex digits of SHA-256 of everything in it."""
    hasher = hashlib.sha256(json.dumps(dict(attributes), sort_keys=True).encode())
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        hasher.update(f"{name}{a.dtype.str}{np.shape(arrays[name])}".encode())
        hasher.update(a.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()[:16]


def list_states(root: Path | str) -> list[Path]:
    """Every state (`save_state`) under `root`, by path."""
    return sorted(
        p for folder in local_path(root).rglob("state") for p in folder.iterdir() if p.is_dir() and not p.suffix
    )


def is_damaged(path: Path) -> bool:
    """Whether a state is not what its address says; bypasses the cache."""
    try:
        _read_state(path, read_group_attributes(path).get(ATTRIBUTE, {}))
    except StoreError:
        return True
    return False


def content_digest(*arrays: np.ndarray | None) -> str:
    """16 hex digits of SHA-256 over shapes, dtypes and bytes: the address of in-memory inputs."""
    hasher = hashlib.sha256()
    for i, a in enumerate(arrays):
        if a is not None:
            a = np.ascontiguousarray(a)
            # the place, from the third on: targets and weights may look alike
            hasher.update(f"{i if i > 1 else ''}{a.dtype.str}{a.shape}".encode())
            hasher.update(a.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()[:16]
