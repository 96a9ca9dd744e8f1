"""Filling a stored kernel matrix: a task a tile, committed to the store of every part that wants it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from ntkdask.arrays import Array
from ntkdask.cache import shared
from ntkdask.errors import InputError
from ntkdask.execution.site import Site
from ntkdask.files import require_disk
from ntkdask.kernels.base import Kernel
from ntkdask.planning.tiles import Tile, TileGrid
from ntkdask.store import Receipt, TileStore
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan
from ntkdask.workflows.kernel_matrix.stores import create_stores
from ntkdask.workflows.kernel_matrix.tile import compute_tile
from ntkdask.workflows.stream import FeatureStream


@dataclass(frozen=True)
class _Wanted:
    """A tile, and the parts of the kernel that want it: a run cut off between two parts has one of them already."""

    tile: Tile
    parts: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.tile)


@dataclass(frozen=True, eq=False)
class _KernelTileTask:
    """Compute one tile of every part and commit those that are wanted.

    run: a key of this call's own, under which a process keeps stores and rows: rows of equal place in other data are never taken
    for these.
    """

    kernel: Kernel
    x: FeatureStream
    y: FeatureStream | None
    urls: tuple[str, ...]
    run: str
    keeps_rows: bool

    def __call__(self, wanted: _Wanted) -> list[Receipt]:
        started, tile = time.perf_counter(), wanted.tile
        rows, columns = self._rows("x", tile.start, tile.stop), None
        if self.y is not None or tile.start != tile.col_start:
            columns = self._rows("x" if self.y is None else "y", tile.col_start, tile.col_stop)
        values, halvings = compute_tile(self.kernel, rows, columns)
        receipts = [self._store(self.urls[part]).commit(tile.index, values[part], started) for part in wanted.parts]
        return [replace(receipt, halvings=halvings) for receipt in receipts]

    def _store(self, url: str) -> TileStore:
        # opened once: reading thousands of receipts for every tile would be quadratic
        return shared.get(("kernel-store", self.run, url), lambda: TileStore.open(url))

    def _rows(self, name: str, start: int, stop: int) -> Array:
        stream = self.y if name == "y" and self.y is not None else self.x
        if not self.keeps_rows:
            return stream.selected_rows(start, stop, name)
        key = ("kernel-rows", self.run, name, start, stop)
        return shared.get(key, lambda: stream.selected_rows(start, stop, name))


def build_kernel_matrix(
    kernel: Kernel,
    x: FeatureStream,
    y: FeatureStream | None,
    plan: MatrixPlan,
    site: Site,
    *,
    fingerprint: Mapping[str, Any],
) -> tuple[TileStore, ...]:
    """Compute the pending tiles of kernel(x, y) between selected rows of the streams.

    Parameters
    ----------
    kernel : Kernel
        Of one matrix or of several parts.
    x : FeatureStream
        Rows, preprocessed as the stream says; its map and targets are unused.
    y : FeatureStream or None
        Columns, likewise; None is x, of which one triangle is computed.
    plan : MatrixPlan
        Of as many rows as are selected.
    site : Site
        Its folder is the store's place, or the folder of the stores of a kernel of several parts.
    fingerprint : mapping
        Everything that decides the values (kernel, data, preprocessing, split); sizes and dtype are added.

    Returns
    -------
    tuple of TileStore
        The complete stores, one for each part.

    Raises
    ------
    InputError
        When other numbers of rows are selected than the plan is for.
    FingerprintError, StoreError
        When something else is at the place.
    DiskSpaceError
        When the pending tiles do not fit there.
    """
    selected = x.n_selected, None if y is None else y.n_selected
    if selected != (plan.n, plan.m):
        raise InputError(f"build_kernel_matrix: the plan is for ({plan.n}, {plan.m}) rows, {selected} are selected.")
    stores = create_stores(site.home, plan, fingerprint)
    n, m = plan.n, plan.n if plan.m is None else plan.m
    grid = TileGrid(n, m, plan.tile_rows, plan.tile_cols, symmetric=plan.m is None)
    pending = [set(store.pending()) for store in stores]
    wanted = [_Wanted(tile, tuple(i for i, some in enumerate(pending) if tile.index in some)) for tile in grid]
    todo = [w for w in wanted if w.parts]
    missing = plan.disk_bytes * len(todo) // len(wanted)
    require_disk(
        stores[0].path, missing, "the rest of the matrix", "or choose another url: everything committed so far is kept"
    )
    site.commit(
        lambda w: [stores[part] for part in w.parts],
        _KernelTileTask(kernel, x, y, tuple(str(s.path) for s in stores), uuid4().hex, plan.keeps_rows),
        todo,
        "kernel-tile",
        earlier=len(wanted) - len(todo),
    )
    return stores
