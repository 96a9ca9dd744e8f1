"""Kernel matrices out of core: tiles computed where the rows can be read, stored once, resumed; read as dask arrays.

    for every tile (i, j), j <= i when y is x (a task):  K_ij = kernel(x_i, y_j);  commit K_ij

Equal tiles are never computed twice; a symmetric matrix computes and stores one triangle and looks full. A kernel of several
parts (NNGP and NTK in one pass) fills one store per part. Called by kernel ridge, by ensembles, and as `nd.kernel_matrix`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, device_memory_bytes, is_dask
from ntkdask.cache import shared
from ntkdask.datasets import Dataset
from ntkdask.errors import FingerprintError, InputError, StoreError
from ntkdask.execution.map_reduce import map_tiles
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.window import Done
from ntkdask.files import local_path, require_disk
from ntkdask.kernels.base import Kernel, entry_size, is_slow, parts_of
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.tiles import Plan, Tile, TileGrid
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.store import Receipt, TileStore
from ntkdask.threads import current
from ntkdask.workflows.kernel_matrix.calibrate import calibrate as measured_pace
from ntkdask.workflows.kernel_matrix.lazy import lazy_kernel_matrix
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan, plan_matrix
from ntkdask.workflows.kernel_matrix.tile import compute_tile
from ntkdask.workflows.ship import shipped
from ntkdask.workflows.sources import as_source, row_shape_of, rows_of
from ntkdask.workflows.stream import FeatureStream

USABLE = 0.9
"""Share of a worker's memory limit, and of a GPU's, that a tile may plan with (as in workers.py)."""


def kernel_matrix(
    kernel: Kernel,
    x: Any,
    y: Any = None,
    *,
    url: str | os.PathLike[str] | None = None,
    client: Any = None,
    plan: Plan | None = None,
    listener: Listener | None = None,
    threads: int | None = None,
) -> Any:
    """kernel(x, y) as a dask array (n, m) over its tiles, float32 or float64; a tuple of them for a kernel of several parts.

    x, y: arrays (NumPy, CuPy, torch), dask arrays, Datasets or their urls; y=None is x, of which one triangle is computed. Integers,
    bool and float16 are cast, uint8 images divided by 255; dtype is float64 when rows of x or y are, or as `plan` says.
    url=None: lazy, nothing is computed or stored. url: every pending tile is computed now and stored there (parts: url/<part>);
    equal tiles are not computed again. client: a Dask client, or None for a loop here. Tiles are at most 2 048²,
    smaller where plan.memory_bytes (None: the smallest worker's share) says so, and for kernels of images where a tile would take
    longer than 90 s (`plan_kernel_matrix` says how long); on GPUs where every worker has one; what does not fit one is computed in
    halves, as its receipt says. threads: of each task (None: what its process has). A kernel of k outputs a row (EmpiricalNTK with
    output="full") gives (n·k, m·k) in the order i·k + o; tile_rows counts rows of x.

    Raises InputError for rows of different shapes, without rows, or (naming them) with NaN; FingerprintError, naming the
    keys, when url holds a matrix of another kernel (or of other weights of a torch module), other data or another plan;
    MemoryBudgetError and DiskSpaceError with the numbers before anything runs.
    """
    plan, listener = plan or Plan(), listener or Silent()
    config = _described(kernel)
    sources, dtype = _sources(x, y, plan)
    if url is None:
        return lazy_kernel_matrix(kernel, sources, dtype, plan)
    path = local_path(url)
    _require_free(path, kernel)
    for source, name in zip(sources, "xy", strict=False):
        if not is_dask(source) and not isinstance(source, Dataset):
            check_finite_rows(source, name=name)
    if client is not None:
        kernel = shipped(kernel, f"{path}.state", client)  # tasks carry no arrays
    inputs = path.with_name(path.name + ".inputs")
    located = [rows_of(s, inputs, client is not None, name) for s, name in zip(sources, "xy", strict=False)]
    asked = _stored_tiles(path, kernel, plan, row_shape_of(sources[0]))
    threads = threads or (current() if client is None else None)
    measures = is_slow(kernel) and not (asked.tile_rows or asked.tile_cols)
    sizes = _sizes(kernel, sources, dtype, asked, client, measures=measures, threads=threads)
    on_device = sizes.device_bytes > 0
    streams = [
        FeatureStream(
            rows,
            FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype),
            None,
            None,
            sizes.batch_rows,
            on_device,
        )
        for rows, _ in located
    ]
    fingerprint = {"kernel": config, "x": located[0][1], "y": None if y is None else located[1][1]}
    stores = build_kernel_matrix(
        kernel,
        streams[0],
        streams[1] if y is not None else None,
        path,
        sizes,
        fingerprint=fingerprint,
        client=client,
        listener=listener,
        threads=threads,
    )
    views = tuple(open_matrix(store.path) for store in stores)
    return views if parts_of(kernel) else views[0]


def plan_kernel_matrix(
    kernel: Kernel,
    x: Any,
    y: Any = None,
    *,
    client: Any = None,
    plan: Plan | None = None,
    workers: int | None = None,
    calibrate: bool = True,
    threads: int | None = None,
) -> MatrixPlan:
    """What `kernel_matrix` with these arguments would take; computes and stores nothing of it.

    `tiles` of `tile_rows` × `tile_cols`, `peak_bytes` of a process, `disk_bytes`, and from a second of measuring on the workers (in
    this process without a client) `tile_seconds`, `work_seconds` in one slot and `seconds` until all is done.
    workers: plan for so many workers like the client's (None: those there are), or like this process. calibrate=False: the seconds
    are None. x, y: of a dataset only its shape is read, so that a matrix can be planned before its rows are copied anywhere.
    Errors as of `kernel_matrix`.

    >>> from ntkdask import kernels, networks
    >>> found = plan_kernel_matrix(kernels.NTK(networks.fully_connected(1)), np.zeros((5000, 20)), calibrate=False)
    >>> found.tiles, found.tile_rows, found.seconds
    (10, 1280, None)
    """
    plan = plan or Plan()
    _described(kernel)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InputError(f"plan_kernel_matrix: workers is {workers!r}, expected an integer >= 1.")
    sources, dtype = _sources(x, y, plan)
    threads = threads or (current() if client is None else None)
    return _sizes(kernel, sources, dtype, plan, client, measures=calibrate, threads=threads, workers=workers)


def open_matrix(url: str | os.PathLike[str]) -> Any:
    """The complete matrix stored at `url` as a lazy dask array that looks full; StoreError when tiles are missing.

    Tiles check their checksums when they are read; a damaged one is a DamagedTileError that names it.
    """
    import dask.array as da

    matrix = StoredMatrix.open(url)
    return da.from_array(matrix, chunks=matrix.tile_shape, asarray=False, meta=np.empty((0, 0), matrix.dtype))


@dataclass(frozen=True)
class _Wanted:
    """A tile, and the parts of the kernel that want it: a run cut off between two parts has one of them already."""

    tile: Tile
    parts: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.tile)


@dataclass(frozen=True, eq=False)
class _KernelTileTask:
    """Compute one tile of every part and commit those that are wanted. run: a key of this call's own, under which a process
    keeps stores and rows: rows of equal place in other data are never taken for these.
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
    url: Path,
    plan: MatrixPlan,
    *,
    fingerprint: Mapping[str, Any],
    client: Any = None,
    listener: Listener | None = None,
    threads: int | None = None,
) -> tuple[TileStore, ...]:
    """Compute the pending tiles of kernel(x, y) between selected rows of the streams; the complete stores, one per part.

    x, y: preprocessed as the streams say, maps and targets unused; y=None is x. plan: `plan_matrix` of as many rows as are
    selected. fingerprint: everything that decides the values (kernel, data, preprocessing, split); sizes and dtype are
    added. url: of the one store, or of the folder of a kernel of several parts. threads: of each task (None leaves them).
    """
    listener = listener or Silent()
    n, m = x.n_selected, None if y is None else y.n_selected
    if (n, m) != (plan.n, plan.m):
        raise InputError(f"build_kernel_matrix: the plan is for ({plan.n}, {plan.m}) rows, {(n, m)} are selected.")
    stores = _create_stores(kernel, url, plan, fingerprint)
    grid = TileGrid(n, m or n, plan.tile_rows, plan.tile_cols, symmetric=m is None)
    pending = [set(store.pending()) for store in stores]
    wanted = [_Wanted(tile, tuple(i for i, some in enumerate(pending) if tile.index in some)) for tile in grid]
    todo = [w for w in wanted if w.parts]
    missing = plan.disk_bytes * len(todo) // len(wanted)
    require_disk(
        stores[0].path, missing, "the rest of the matrix", "or choose another url: everything committed so far is kept"
    )
    listener.stage("kernel-tile", len(wanted), len(wanted) - len(todo))

    def receive(w: _Wanted, done: Done[list[Receipt]]) -> None:
        for part, r in zip(w.parts, done.value, strict=True):
            stores[part].record(replace(r, seconds=done.seconds, peak_bytes=done.peak_bytes, worker=done.worker))
        listener.task("kernel-tile", done)

    task = _KernelTileTask(kernel, x, y, tuple(str(s.path) for s in stores), uuid4().hex, plan.keeps_rows)
    map_tiles(task, todo, client, label="kernel-tile", receive=receive, threads=threads)
    return stores


def _create_stores(
    kernel: Kernel, url: Path, plan: MatrixPlan, fingerprint: Mapping[str, Any]
) -> tuple[TileStore, ...]:
    """The store of every part, opened or made."""
    _require_free(url, kernel)
    return tuple(
        TileStore.create(
            path,
            shape=(plan.n * plan.entry, (plan.m or plan.n) * plan.entry),
            tile_shape=(plan.tile_rows * plan.entry, plan.tile_cols * plan.entry),
            dtype=plan.dtype,
            # parts differ, and a factor of one is not a factor of the other
            fingerprint=dict(fingerprint) | ({"part": path.name} if parts_of(kernel) else {}),
            triangle="symmetric" if plan.m is None else None,
        )
        for path in _store_paths(url, kernel)
    )


def _store_paths(url: Path, kernel: Kernel) -> list[Path]:
    return [url / part for part in parts_of(kernel)] or [url]


def _require_free(path: Path, kernel: Kernel) -> None:
    """StoreError or FingerprintError when something else stands at `path`: making a store there would delete it."""
    parts = parts_of(kernel)
    if (path / "zarr.json").exists():
        if parts:
            raise FingerprintError(f"{path} holds one matrix, {' and '.join(parts)} were asked for. Use another url.")
        return
    if path.exists():
        found = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
        others = [name for name in found if not (path / name / "zarr.json").exists()]
        if others or (found and not parts):
            what = (
                f"holds the matrices {', '.join(found)}" if not others else f"is no kernel matrix (found {others[0]})"
            )
            raise StoreError(f"{path} {what}. Choose another url.")


def _stored_tiles(path: Path, kernel: Kernel, plan: Plan, row_shape: tuple[int, ...]) -> Plan:
    """`plan` with the tile sizes of the matrix that is already there, unless it states its own: a resumed run keeps the first
    one's tiles, whatever memory its workers have.
    """
    first = _store_paths(path, kernel)[0]
    if plan.tile_rows or plan.tile_cols or not (first / "zarr.json").exists():
        return plan
    rows, columns = TileStore.open(first).tile_shape
    entry = entry_size(kernel, row_shape)
    return Plan(max(1, rows // entry), max(1, columns // entry), plan.memory_bytes, plan.dtype)


def _described(kernel: Any) -> Any:
    """The kernel as its fingerprint keeps it; InputError for what is no kernel."""
    needed = ("__call__", "workspace_bytes")
    try:
        config = registry.to_config(kernel)
    except TypeError as error:
        raise InputError(f"kernel_matrix: kernel is {kernel!r}; give one of ntkdask.kernels ({error}).") from error
    if not isinstance(config, dict) or "type" not in config or not all(hasattr(kernel, name) for name in needed):
        raise InputError(f"kernel_matrix: kernel is {kernel!r}; give one of ntkdask.kernels, for example NTK(network).")
    return config


def _sources(x: Any, y: Any, plan: Plan) -> tuple[list[Any], str]:
    """(x, or x and y, as `as_source` gives them, dtype of the matrix); InputError where their rows differ in shape."""
    sources = [as_source(x)] if y is None else [as_source(x), as_source(y, "y")]
    shapes = [row_shape_of(s) for s in sources]
    if shapes[0] != shapes[-1]:
        raise InputError(f"x has rows of shape {shapes[0]} and y of {shapes[-1]}; they must agree.")
    return sources, plan.dtype or ("float64" if any(s.dtype == np.float64 for s in sources) else "float32")


def _sizes(
    kernel: Kernel,
    sources: list[Any],
    dtype: str,
    plan: Plan,
    client: Any,
    *,
    measures: bool,
    threads: int | None,
    workers: int | None = None,
) -> MatrixPlan:
    """Tiles that fit, and (measures) the kernel's pace: of the tiles that memory allows, those that time allows."""
    memory, device_memory = _budgets(client, plan)
    counts = [s.n if isinstance(s, Dataset) else s.shape[0] for s in sources]
    n, m = counts[0], counts[1] if len(counts) > 1 else None
    row_shape, slots = row_shape_of(sources[0]), _slots(client)
    row_bytes = max(math.prod(row_shape) * np.dtype(s.dtype).itemsize for s in sources)
    sized = partial(
        plan_matrix,
        kernel,
        n,
        m,
        row_shape,
        row_bytes,
        dtype,
        memory,
        device_budget=device_memory,
        tile_rows=plan.tile_rows,
        tile_cols=plan.tile_cols,
    )
    wanted = slots if workers is None else workers * (1 if client is None else max(1, slots // len(client.nthreads())))
    sizes = sized(slots=wanted)
    if not measures:
        return sizes
    pace = measured_pace(
        kernel,
        row_shape,
        dtype,
        min(sizes.tile_rows, sizes.tile_cols),
        entries=n * n / 2 if m is None else n * m,
        client=client,
        slots=slots,
        n_threads=threads,
        device=device_memory > 0,
    )
    return sized(slots=wanted, pace=pace)


def _slots(client: Any) -> int:
    return 1 if client is None else sum(client.nthreads().values())


def _budgets(client: Any, plan: Plan) -> tuple[int | None, int]:
    """(bytes of a task, bytes on its GPU or 0) that every worker has, or this process."""
    if client is None:
        return plan.memory_bytes, int(USABLE * device_memory_bytes())
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [int(USABLE * w["memory_limit"] / w["nthreads"]) for w in workers if w["memory_limit"]]
    device = min(client.run(device_memory_bytes).values(), default=0)
    return plan.memory_bytes or min(limits, default=None), int(USABLE * device)
