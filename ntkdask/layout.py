"""How arrays lie on disk: Zarr v3 with a checksum a chunk, NaN where nothing is written, names of axes, words for other readers.

docs/layout.md describes it for people. `store` keeps tiles in such arrays, `states` and datasets their content.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ntkdask.files import writing

COMMENTS = {
    None: "Tiles that are not computed yet read as NaN.",
    "symmetric": "A symmetric matrix of which the tiles on and below the diagonal are stored; what lies above, and tiles that are not "
    "computed yet, read as NaN. ntkdask.open_matrix reads the whole matrix, ntkdask.export_matrix writes it.",
    "lower": "A lower triangular matrix: tiles above the diagonal are not stored and stand for zeros; they, and tiles that are not "
    "computed yet, read as NaN. ntkdask.export_matrix writes the whole.",
}
"""Words for readers of the Zarr array who know nothing of ntkdask, by the kind of triangle."""


def create_array(
    path: Path,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: Any,
    attributes: Mapping | None = None,
    dimensions: Sequence[str] | None = None,
):
    """A new Zarr array at `path`, uncompressed, with a checksum for each chunk; chunks full of one value are written too.

    It replaces an array that is there. What is not written reads as NaN, of integers as 0.

    Parameters
    ----------
    path : Path
        Its folder.
    shape, chunks : sequence of int
        Of the array, and of a chunk.
    dtype : dtype
        Of the numbers.
    attributes : mapping, optional
        Tables that JSON can write.
    dimensions : sequence of str, optional
        Names of the axes, which xarray asks for; None: names that no other array of its group has.
    """
    chunks = tuple(max(1, int(c)) for c in chunks)
    dimensions = [f"{path.name}_{axis}" for axis in range(len(chunks))] if dimensions is None else dimensions
    with writing(path):
        return zarr.create_array(
            zarr.storage.LocalStore(path),
            shape=tuple(shape),
            chunks=chunks,
            dtype=dtype,
            compressors=[Crc32cCodec()],
            filters=None,
            # zeros would be taken for numbers by a reader that knows nothing of receipts
            fill_value=np.nan if np.dtype(dtype).kind == "f" else 0,
            dimension_names=tuple(dimensions),
            attributes=dict(attributes or {}),
            # the default drops chunks equal to the fill value, so that presence would say nothing
            config={"write_empty_chunks": True},
            overwrite=True,
        )


def consolidate(path: Path) -> None:
    """Copy the metadata of the arrays of a group into the group's own, as xarray asks for, once nothing in it changes any more."""
    with writing(path), warnings.catch_warnings():
        # the Zarr specification has no word of it yet, zarr-python and xarray read it
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(zarr.storage.LocalStore(path))
