"""States: arrays that many tasks share (preprocessing, splits, spectra, models), stored under the digest of their content.

Equal content has an equal address and is written once. Every reading checks the digest, so that a damaged state is an
error and never a wrong number. Loaded states are kept in the byte-bounded cache of the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ntkdask.cache import shared
from ntkdask.errors import DamagedTileError, StoreError
from ntkdask.files import local_path, remove, writing
from ntkdask.layout import create_array
from ntkdask.store import ATTRIBUTE, open_array, read_group_attributes, write_group_attributes

_CHUNK_BYTES = 2**26
_PLACES = "places"
_STATE_ADVICE = "`ntkdask verify --repair RUN` removes it, the next run computes it again."


def save_state(
    root: Path | str,
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any] | None = None,
    places: Mapping[str, str] | None = None,
) -> str:
    """Store arrays that many tasks share, and return their url: `root/<digest of their content>`.

    Idempotent: equal content has an equal address and is written once.

    Parameters
    ----------
    root : path
        The folder of the states.
    arrays : mapping
        Arrays by name.
    attributes : mapping, optional
        Tables that JSON can write.
    places : mapping, optional
        {digest: path, relative to `root`} of files that the attributes name by their digests. No part of the content.
    """
    final = local_path(root) / _state_digest(arrays, attributes or {})
    if not final.exists():
        # a name of its own: hosts that share the folder have equal process numbers
        partial = final.with_name(f"{final.name}.{uuid4().hex}.partial")
        with writing(partial):
            remove(partial)
            write_group_attributes(
                partial, {ATTRIBUTE: dict(attributes or {}), **({_PLACES: places} if places else {})}
            )
            for name, a in arrays.items():
                a = np.asarray(a)
                # a chunk is bounded, because a codec copies it twice; it is no larger than its array, because it is written whole
                pieces = -(-a.nbytes // _CHUNK_BYTES) or 1
                chunks = (-(-len(a) // pieces), *a.shape[1:]) if a.ndim else ()
                stored = create_array(partial / name, a.shape, chunks, a.dtype)
                stored[...] = a
            try:
                os.replace(partial, final)
            except OSError:
                # another writer of the same content was first
                if not final.exists():
                    raise
                remove(partial)
    elif places and read_group_attributes(final).get(_PLACES) != dict(places):
        write_group_attributes(final, {_PLACES: dict(places)})
    return str(final)


def load_places(url: str) -> dict[str, str]:
    """{digest: absolute path} of the files that a state names by their digests, where `save_state` was told of them."""
    root = Path(url).parent
    return {k: os.path.normpath(root / path) for k, path in read_group_attributes(url).get(_PLACES, {}).items()}


def load_state(url: str, keep: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the attributes of a state.

    Parameters
    ----------
    url : str
        Where `save_state` put it.
    keep : bool, optional
        Take the arrays from the cache of the process, or keep them there. False, for what is needed once: read them anew.

    Returns
    -------
    tuple of two dicts
        Arrays and attributes by name. The arrays are shared: never write to them.

    Raises
    ------
    DamagedTileError
        Where the content does not have the digest that the url ends in.
    """
    path = local_path(url)
    if not keep:
        return _read_state(path)
    return shared.get(("state", url), lambda: _read_state(path))


def _read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the attributes of a state; DamagedTileError where their digest is not the last part of its path."""
    try:
        attributes = read_group_attributes(path).get(ATTRIBUTE, {})
        arrays = {p.name: np.asarray(open_array(p)[...]) for p in sorted(path.iterdir()) if p.is_dir()}
    except (ValueError, StoreError) as error:
        raise DamagedTileError(f"state {path} is damaged: {error}. {_STATE_ADVICE}") from error
    # Zarr reads a chunk that is gone as zeros, and an array that is gone is no error at all
    if _state_digest(arrays, attributes) != path.name:
        raise DamagedTileError(f"state {path} is damaged: a part of it is gone or was changed. {_STATE_ADVICE}")
    return arrays, attributes


def _state_digest(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> str:
    """The address of a state: 16 hex digits of SHA-256 over names, dtypes, shapes and bytes of arrays, and attributes."""
    hasher = hashlib.sha256(json.dumps(dict(attributes), sort_keys=True).encode())
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        hasher.update(f"{name}{a.dtype.str}{np.shape(arrays[name])}".encode())
        hasher.update(a.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()[:16]


def list_states(root: Path | str) -> list[Path]:
    """The paths of all states under `root`, sorted."""
    return sorted(
        p for folder in local_path(root).rglob("state") for p in folder.iterdir() if p.is_dir() and not p.suffix
    )


def list_weights(root: Path | str) -> list[Path]:
    """The files of weights beside the states under `root`, named by the digests of their content, sorted."""
    return sorted(
        p
        for folder in local_path(root).rglob("state")
        for p in folder.iterdir()
        if p.is_file() and p.suffix in (".safetensors", ".pt", ".pth") and not p.name.startswith(".")
    )


def is_damaged(path: Path) -> bool:
    """Whether a state cannot be read, or has another digest than its path says; reads it anew."""
    try:
        _read_state(path)
    except StoreError:
        return True
    return False


def content_digest(*arrays: np.ndarray | None) -> str:
    """The address of inputs in memory: 16 hex digits of SHA-256 over their shapes, dtypes and bytes. None is left out."""
    hasher = hashlib.sha256()
    for i, a in enumerate(arrays):
        if a is not None:
            a = np.ascontiguousarray(a)
            # with its position from the third array on: targets and weights may have equal bytes
            hasher.update(f"{i if i > 1 else ''}{a.dtype.str}{a.shape}".encode())
            hasher.update(a.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()[:16]
