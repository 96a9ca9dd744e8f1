"""Whole copies of stored matrices for other programs: both triangles in plain Zarr, tile by tile, never a matrix in memory.

    for every stored tile (i, j) (a task):  read K_ij; write it at (i, j), and where the matrix is symmetric its transpose at (j, i)

The copy grows under another name, as a store that is resumed, and takes its own when it is complete.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ntkdask.cache import shared
from ntkdask.errors import StoreError
from ntkdask.execution.site import Site
from ntkdask.files import exclusive, local_path, remove, require_disk
from ntkdask.layout import consolidate
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.store import ATTRIBUTE, RECEIPTS, Index, Receipt, TileStore, open_array, write_group_attributes

NAME = "matrix"
"""The array of a matrix that is stored alone; parts keep their names."""


def export_matrix(url: str | os.PathLike[str], to: str | os.PathLike[str], *, client: Any = None) -> Path:
    """Copy a stored matrix whole, with both triangles, to a Zarr group that zarr, xarray and others read without this package.

    Parameters
    ----------
    url : path
        Of a complete matrix: one that `kernel_matrix` stored (also the folder of its parts), a factor, stored features.
    to : path
        A folder that does not exist. It becomes a Zarr v3 group with the array "matrix" (row, column), or an array for each part,
        in the tiles of the store; `xarray.open_zarr(to)` opens it. A copy that was cut off is continued.
    client : distributed.Client or None
        Whose workers copy; None: a loop in this process.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StoreError
        Where there is no complete matrix, or something is at `to` already.
    DamagedTileError
        Naming the tile, where one of the matrix is damaged.
    DiskSpaceError
        Where the copy does not fit, with the numbers.

    Examples
    --------
    >>> import tempfile, zarr
    >>> from ntkdask import kernel_matrix, kernels
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = kernel_matrix(kernels.ArcCosine(1), np.eye(2), url=f"{folder}/k")
    ...     zarr.open(export_matrix(f"{folder}/k", f"{folder}/copy"))["matrix"][:].round(2)
    array([[1.  , 0.32],
           [0.32, 1.  ]])
    """
    sources, final = _matrices(local_path(url)), local_path(to)
    partial = final.with_name(final.name + ".partial")
    with exclusive(final, beside=True):
        for place in (final, partial):
            if place.exists() and not (place is partial and (place / "zarr.json").exists()):
                raise StoreError(f"{place} exists already. Choose another folder to export to, or move it.")
        needed = sum(int(np.prod(m.shape)) * m.dtype.itemsize for m in sources.values())
        require_disk(partial, needed, "the whole matrix", "or export to another disk")
        write_group_attributes(partial, {})
        for name, matrix in sources.items():
            _copy(matrix, partial / name, Site.at(partial, client))
        for name, matrix in sources.items():
            _finish(matrix, partial / name)
        consolidate(partial)
        os.replace(partial, final)
    return final


def _matrices(path: Path) -> dict[str, StoredMatrix]:
    """{name of the array: matrix} of what is stored at `path`, one matrix or a folder of parts."""
    if (path / "zarr.json").exists() or not path.is_dir():
        return {NAME: StoredMatrix.open(path)}
    parts = sorted(part for part in path.iterdir() if (part / "zarr.json").exists())
    if not parts:
        raise StoreError(f"{path} holds no stored matrix. Give the url of `kernel_matrix`, or of one of its parts.")
    return {part.name: StoredMatrix.open(part) for part in parts}


@dataclass(frozen=True, eq=False)
class _CopyTask:
    """Copy one tile, and its mirror image. run: a key of this call's own, under which a process keeps the stores."""

    source: str
    target: str
    mirrored: bool
    run: str

    def __call__(self, index: Index) -> list[Receipt]:
        started = time.perf_counter()
        source, target = (self._store(url) for url in (self.source, self.target))
        tile = source.read(index)
        receipts = [target.commit(index, np.ascontiguousarray(tile), started)]
        if self.mirrored and index[0] != index[1]:
            receipts.append(target.commit(index[::-1], np.ascontiguousarray(tile.T), started))
        return receipts

    def _store(self, url: str) -> TileStore:
        # opened once: its receipts are as many as its tiles
        return shared.get(("export", self.run, url), lambda: TileStore.open(url))


def _copy(matrix: StoredMatrix, place: Path, site: Site) -> None:
    """Copy the tiles of `matrix` that are not at `place` yet."""
    target = TileStore.create(
        place,
        shape=matrix.shape,
        tile_shape=matrix.tile_shape,
        dtype=matrix.dtype,
        fingerprint={"export": matrix.token},
        overwrite=not _is_begun(place, matrix.token),
    )
    pending = set(target.pending())
    tiles = matrix.store.indices() if matrix.is_symmetric else target.indices()
    todo = [i for i in tiles if i in pending or (matrix.is_symmetric and i[::-1] in pending)]
    task = _CopyTask(matrix.url, str(place), matrix.is_symmetric, uuid4().hex)
    site.commit(lambda index: [target, target], task, todo, "export-tile", earlier=len(tiles) - len(todo))


def _is_begun(place: Path, token: str) -> bool:
    """Whether a copy of this very matrix was begun at `place`."""
    try:
        return TileStore.open(place).fingerprint.get("export") == token
    except StoreError:
        return False


def _finish(matrix: StoredMatrix, place: Path) -> None:
    """Make the complete copy a plain array: without receipts, with words instead of a store's description."""
    comment = f"A whole copy of {Path(matrix.url).name}: every tile, both triangles."
    described = {"format": "export", "of": matrix.store.fingerprint}
    open_array(place, "r+").attrs.put({"comment": comment, ATTRIBUTE: described})
    remove(place / RECEIPTS)
