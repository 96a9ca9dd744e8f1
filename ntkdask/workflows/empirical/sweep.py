"""The experiments of Mohamadi & Sutherland: pseudo-NTK beside full eNTK over networks, widths, training epochs and seeds.

    for every network, width and seed:  train, weights kept at the protocol's epochs                (`train.py`)
        for every epoch (a cell):       kernels, linearised predictions → measures                  (`sweep_measures.py`)

A cell is one JSON file, written whole when it is done, beside what was asked for (`sweep_table.py`): a sweep goes on where it
stopped, and grows by more widths, seeds or networks. `report/figures_empirical.py` draws the table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution.peak import peak_bytes
from ntkdask.execution.progress import DRIVER, Listener, Silent
from ntkdask.execution.site import Site
from ntkdask.execution.window import Done
from ntkdask.files import exclusive, local_path
from ntkdask.modules.optional import require_torch
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.planning.tiles import Plan
from ntkdask.wording import format_bytes
from ntkdask.workflows.empirical.sweep_cells import Cell, PntkSweep, SweepData, cells_of
from ntkdask.workflows.empirical.sweep_measures import measure
from ntkdask.workflows.empirical.sweep_table import asked_of, is_done, write_cell, write_table
from ntkdask.workflows.empirical.train import train

LABEL = "sweep-cell"


def run_pntk_sweep(
    sweep: PntkSweep,
    data: SweepData,
    folder: str | os.PathLike[str],
    *,
    client: Any = None,
    plan: Plan | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Compute the cells of a sweep that are not there yet, and write the table of all.

    Parameters
    ----------
    sweep : PntkSweep
        Networks, epochs and seeds.
    data : SweepData
        Rows and labels.
    folder : str or path
        Gets cells/*.json, table.csv and training/*; with a client or plan.tile_rows, and kernels=("pntk",), also kernels/* in tiles.
        What is there is not computed again.
    client : distributed.Client or None
        Whose workers compute kernels and solves; for kernels=("pntk",).
    plan : Plan or None
        memory_bytes of this process (of a task, with a client), tile sizes.
    listener : Listener or None
        Hears of every cell.

    Returns
    -------
    list of dict
        All of the folder's cells as flat rows, as `sweep_rows` gives them.

    Raises
    ------
    MissingDependencyError
        Without torch.
    FingerprintError
        Naming the keys, where a cell of other data or options is there.
    MemoryBudgetError
        Before anything runs, when a full eNTK does not fit plan.memory_bytes.
    InputError
        For networks that do not fit the data, and full eNTKs with a client.
    """
    require_torch("run_pntk_sweep")
    plan, site = plan or Plan(), Site(local_path(folder), client, listener or Silent())
    if client is not None and "entk" in sweep.kernels:
        raise InputError('full eNTKs of a sweep are computed in this process. With a client use kernels=("pntk",).')
    _require_memory(sweep, data, plan.memory_bytes)
    with exclusive(site.home):
        return _swept(sweep, data, site, plan)


def _swept(sweep: PntkSweep, data: SweepData, site: Site, plan: Plan) -> list[dict[str, Any]]:
    """Compute the cells that are not there yet, and write the table of all; the caller holds the folder's lock."""
    digest = data.digest
    groups = [[(cell, asked_of(sweep, cell, digest)) for cell in cells] for cells in cells_of(sweep)]
    done = {cell.name for cells in groups for cell, asked in cells if is_done(site.home, cell, asked)}
    site.listener.stage(LABEL, sum(map(len, groups)), len(done))
    for cells in groups:
        _run_cells([(cell, asked) for cell, asked in cells if cell.name not in done], sweep, data, site, plan)
    return write_table(site.home)


def _run_cells(
    cells: Sequence[tuple[Cell, dict[str, Any]]], sweep: PntkSweep, data: SweepData, site: Site, plan: Plan
) -> None:
    """Compute and write cells of one training, each with what was asked of it."""
    in_tiles = site.client is not None or plan.tile_rows
    for cell, asked in cells:
        started = time.perf_counter()
        module, facts = _module_of(cell, sweep, data, site.home)
        # the listener counts cells, not their tiles
        quiet = replace(site.within("kernels").within(cell.name), listener=Silent()) if in_tiles else Site()
        measures = measure(module, sweep, data, quiet, plan)
        seconds = time.perf_counter() - started
        write_cell(site.home, cell, asked, facts | measures | {"seconds": seconds})
        site.listener.task(LABEL, Done(None, seconds, peak_bytes(), DRIVER))


def _module_of(cell: Cell, sweep: PntkSweep, data: SweepData, folder: Path) -> tuple[Any, dict[str, Any]]:
    """(a cell's module in eval mode, facts of its training), trained when it is first needed; training resumes."""
    module = cell.description.build()
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in module.parameters() if p.requires_grad)}
    if not cell.epoch:
        return module, facts
    from ntkdask.modules.outputs import on_gpu
    from ntkdask.modules.state.weights import load_weights

    start = cell.description.build().to("cuda" if on_gpu() else "cpu")
    own = folder / "training" / f"{cell.network}-w{cell.width:05d}-s{cell.seed}"
    trained = train(start, data.x.astype("float32"), data.labels, own, sweep.protocol, seed=cell.seed)
    load_weights(module, trained.checkpoint(cell.epoch))
    return module.eval(), facts | {"learning_rate": trained.learning_rate}


def _require_memory(sweep: PntkSweep, data: SweepData, limit: int | None) -> None:
    """MemoryBudgetError where a cell's matrices do not fit."""
    if limit is None or "entk" not in sweep.kernels:
        return
    rows, columns = len(data.x) * data.n_classes, len(data.x_test) * data.n_classes
    itemsize = np.dtype(sweep.dtype).itemsize
    # Θ, its copy in matrix order, and float64 to decompose; then Θ of the test rows
    needed = BASE_BYTES + (2 * itemsize + 8) * rows * rows + 2 * itemsize * rows * columns
    if needed > limit:
        raise MemoryBudgetError(
            f"a cell of the sweep needs {format_bytes(needed)} for full eNTKs of {len(data.x)} rows and {data.n_classes} outputs but "
            f'has {format_bytes(limit)}. Use fewer rows, or kernels=("pntk",).'
        )
