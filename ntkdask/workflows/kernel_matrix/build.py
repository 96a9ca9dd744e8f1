"""Kernel matrices out of core: tiles computed where the rows can be read, stored once, resumed; read as dask arrays.

    for every tile (i, j), j <= i when y is x (a task):  K_ij = kernel(x_i, y_j);  commit K_ij

Equal tiles are never computed twice; a symmetric matrix computes and stores one triangle and looks full. A kernel of several
parts (NNGP and NTK in one pass) fills one store per part. Called by kernel ridge, by ensembles, and as `nd.kernel_matrix`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import is_dask
from ntkdask.datasets import Dataset
from ntkdask.errors import InputError
from ntkdask.execution.progress import Listener
from ntkdask.execution.site import Site
from ntkdask.files import exclusive
from ntkdask.kernels.base import Kernel, completed, parts_of, require_kernel
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_matrix.fill import build_kernel_matrix
from ntkdask.workflows.kernel_matrix.lazy import lazy_kernel_matrix
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan
from ntkdask.workflows.kernel_matrix.sizes import shape_of, sized
from ntkdask.workflows.kernel_matrix.stores import require_free, with_stored_tiles
from ntkdask.workflows.ship import shipped
from ntkdask.workflows.sources import as_source, row_shape_of, rows_of, working_dtype
from ntkdask.workflows.stream import FeatureStream


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
    """kernel(x, y) as a dask array over its tiles, stored or lazy.

    Tiles are at most 2 048², smaller where memory says so, and for kernels of images where a tile would take longer than 90 s
    (`plan_kernel_matrix` says how long). They are computed on GPUs where every worker has one. A tile that does not fit a GPU after
    all is computed in halves, as its receipt says.

    Parameters
    ----------
    kernel : Kernel
        One of `ntkdask.kernels`, or a registered one of your own.
    x : array (n, *s), dask array, Dataset or url of one
        Rows: NumPy, CuPy or torch arrays. Integers, bool and float16 are cast, uint8 images divided by 255.
    y : as x, (m, *s), or None
        Columns; None is x, of which one triangle is computed.
    url : path or None
        Where tiles are stored; the parts of a kernel of several go to url/<part>. Every pending tile is computed now, equal tiles are
        not computed again. None: nothing is stored, and tiles are computed when the dask array is.
    client : distributed.Client or None
        Whose workers compute the tiles; None: a loop in this process.
    plan : Plan or None
        Tile sizes (tile_rows counts rows of x), memory_bytes of a task (None: the smallest worker's share) and dtype (None: float64
        when rows of x or y are, else float32).
    listener : Listener or None
        Hears of every finished tile.
    threads : int or None
        Of each task; None: what its process has.

    Returns
    -------
    dask array (n, m), float32 or float64, or a tuple of them
        A tuple, one matrix for each part, for a kernel of several parts. A kernel of k outputs a row (EmpiricalNTK with output="full")
        gives (n·k, m·k) in the order i·k + o.

    Raises
    ------
    InputError
        For rows of different shapes, without rows, or (naming them) with NaN.
    FingerprintError
        Naming the keys, when url holds a matrix of another kernel (or of other weights of a torch module), other data or another plan.
    MemoryBudgetError, DiskSpaceError
        With the numbers, before anything runs.

    Examples
    --------
    >>> from ntkdask.kernels import ArcCosine
    >>> kernel_matrix(ArcCosine(1), np.eye(3)).compute().round(2)
    array([[1.  , 0.32, 0.32],
           [0.32, 1.  , 0.32],
           [0.32, 0.32, 1.  ]])
    """
    plan = plan or Plan()
    if url is None:
        _described(kernel)
        return lazy_kernel_matrix(kernel, *_sources(x, y, plan), plan)
    stores = stored_kernel_matrix(kernel, x, y, plan, Site.at(url, client, listener, threads))
    views = tuple(open_matrix(store.path) for store in stores)
    return views if len(views) > 1 else views[0]


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

    Parameters
    ----------
    kernel : Kernel
        As in `kernel_matrix`.
    x, y : as in `kernel_matrix`
        Of a dataset only its shape is read, so that a matrix can be planned before its rows are copied anywhere.
    client : distributed.Client or None
        Whose workers are planned for, and measure; None: this process.
    plan : Plan or None
        As in `kernel_matrix`.
    workers : int or None
        Plan for so many workers like the client's, or like this process; None: for those there are.
    calibrate : bool
        Whether to measure the kernel for about a second; without it the seconds are None.
    threads : int or None
        Of each task; None: what its process has.

    Returns
    -------
    MatrixPlan
        `tiles` of `tile_rows` × `tile_cols`, `peak_bytes` of a process, `disk_bytes`, and from measuring `tile_seconds`,
        `work_seconds` in one slot and `seconds` until all is done.

    Raises
    ------
    InputError, MemoryBudgetError
        As of `kernel_matrix`.

    Examples
    --------
    >>> from ntkdask import kernels, networks
    >>> found = plan_kernel_matrix(kernels.NTK(networks.fully_connected(1)), np.zeros((5000, 20)), calibrate=False)
    >>> found.tiles, found.tile_rows, found.seconds
    (10, 1280, None)
    """
    plan = plan or Plan()
    _described(kernel)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InputError(f"plan_kernel_matrix: workers is {workers!r}, expected an integer >= 1.")
    shape, site = shape_of(*_sources(x, y, plan)), Site.at(None, client, threads=threads)
    return sized(kernel, shape, plan, site, measures=calibrate, workers=workers)


def open_matrix(url: str | os.PathLike[str]) -> Any:
    """The complete matrix stored at `url` as a lazy dask array that looks full.

    Parameters
    ----------
    url : path
        Of a matrix that `kernel_matrix` stored, or of one part of it.

    Returns
    -------
    dask array (n, m), float32 or float64
        In the tiles of the store. Tiles check their checksums when they are read; a damaged one is a DamagedTileError that names it.

    Raises
    ------
    StoreError
        When there is none, or when tiles of it are missing.
    """
    import dask.array as da

    matrix = StoredMatrix.open(url)
    return da.from_array(matrix, chunks=matrix.tile_shape, asarray=False, meta=np.empty((0, 0), matrix.dtype))


def stored_kernel_matrix(kernel: Kernel, x: Any, y: Any, plan: Plan, site: Site) -> tuple[TileStore, ...]:
    """`kernel_matrix` at a site, whose folder is the url: the complete stores, one for each part of the kernel."""
    config = _described(kernel)
    sources, dtype = _sources(x, y, plan)
    with exclusive(site.home, beside=True):
        return _filled(kernel, config, sources, dtype, plan, site)


def _filled(
    kernel: Kernel, config: Any, sources: list[Any], dtype: str, plan: Plan, site: Site
) -> tuple[TileStore, ...]:
    """The complete stores of kernel(x, y); the caller holds their lock."""
    path, parts = site.home, parts_of(kernel)
    require_free(path, parts)
    for source, name in zip(sources, "xy", strict=False):
        if not is_dask(source) and not isinstance(source, Dataset):
            check_finite_rows(source, name=name)
    traits, shape = completed(kernel), shape_of(sources, dtype)
    asked = with_stored_tiles(plan, path, parts, traits.entry_size(shape.row_shape))
    measures = traits.is_slow and not (asked.tile_rows or asked.tile_cols)
    # before weights and rows are written: what does not fit leaves nothing behind
    sizes = sized(kernel, shape, asked, site, measures=measures)
    if site.client is not None:
        kernel = shipped(kernel, f"{path}.state", site.client)  # tasks carry no arrays
    inputs = path.with_name(path.name + ".inputs")
    located = [rows_of(s, inputs, site.client is not None, name) for s, name in zip(sources, "xy", strict=False)]
    streams = [
        FeatureStream(
            rows,
            FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype),
            None,
            None,
            batch_rows=sizes.batch_rows,
            device=sizes.device_bytes > 0,
        )
        for rows, _ in located
    ]
    y = None if len(sources) == 1 else streams[1]
    fingerprint = {"kernel": config, "x": located[0][1], "y": None if y is None else located[1][1]}
    return build_kernel_matrix(kernel, streams[0], y, sizes, site, fingerprint=fingerprint)


def _described(kernel: Any) -> Any:
    """The kernel as its fingerprint keeps it; InputError for what is no kernel."""
    require_kernel(kernel, "kernel_matrix")
    try:
        config = registry.to_config(kernel)
    except TypeError as error:
        raise InputError(f"kernel_matrix: kernel is {kernel!r}; give one of ntkdask.kernels ({error}).") from error
    if not isinstance(config, dict) or "type" not in config:
        raise InputError(f"kernel_matrix: kernel is {kernel!r}; give one of ntkdask.kernels, for example NTK(network).")
    return config


def _sources(x: Any, y: Any, plan: Plan) -> tuple[list[Any], str]:
    """(x, or x and y, as `as_source` gives them, dtype of the matrix); InputError where their rows differ in shape."""
    sources = [as_source(x)] if y is None else [as_source(x), as_source(y, "y")]
    shapes = [row_shape_of(s) for s in sources]
    if shapes[0] != shapes[-1]:
        raise InputError(f"x has rows of shape {shapes[0]} and y of {shapes[-1]}; they must agree.")
    return sources, working_dtype(plan, *sources)
