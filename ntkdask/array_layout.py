"""Whether the description of a Zarr array is the one that was written: a changed one reads other numbers from whole chunks.

`store` and datasets ask when they open an array; Zarr itself is imported by `store` alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.errors import StoreError
from ntkdask.registry import differences

REPAIR = "`ntkdask verify --repair FOLDER` mends it, or lets the next run compute it again."
"""The end of a message about a damaged file of a run."""


def require_layout(path: Path, array: Any, shape: Sequence[int], chunks: Sequence[int], dtype: Any) -> None:
    """StoreError, naming what differs, where the description of a Zarr array is not what `create_array` wrote.

    Zarr believes a description: one with another dtype or byte order gives other numbers from whole chunks.
    """
    asked = {
        "shape": list(shape),
        "chunks": [max(1, int(c)) for c in chunks],
        "dtype": np.dtype(dtype).name,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "chunk_key": "/".join(["c", *["0"] * len(shape)]),
    }
    if np.dtype(dtype).itemsize == 1:
        asked["codecs"][0] = {"name": "bytes"}
    metadata = array.metadata
    found = {"shape": list(array.shape), "chunks": list(array.chunks), "dtype": np.dtype(array.dtype).name}
    if metadata.zarr_format == 3:
        found["codecs"] = [codec.to_dict() for codec in metadata.codecs]
        found["chunk_key"] = metadata.encode_chunk_key((0,) * len(array.shape))
    lines = differences(asked, found)
    if lines:
        words = "; ".join(line.replace(": stored", ": written").replace(", asked", ", now") for line in lines)
        raise StoreError(f"{path / 'zarr.json'} is damaged: {words}. {REPAIR}")


def unreadable(path: Path, kind: str, error: Exception) -> StoreError:
    """The error for a folder without a Zarr array or group, or with a description of one that is damaged."""
    marker = path / "zarr.json"
    try:
        described = isinstance(json.loads(marker.read_bytes().decode("utf-8")), dict) and kind == "group"
    except FileNotFoundError:
        described = True
    except (OSError, ValueError, RecursionError):
        described = False
    if described:
        return StoreError(f"{path} holds no Zarr {kind} ({type(error).__name__}). Check the path.")
    return StoreError(f"{marker} is damaged ({error}). {REPAIR}")
