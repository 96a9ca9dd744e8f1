"""Sizes of the matrix that a call asks for: what the cluster offers, asked once, and the kernel's pace where time may matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ntkdask.arrays import device_memory_bytes
from ntkdask.datasets import Dataset
from ntkdask.execution.site import Site
from ntkdask.kernels.base import Kernel
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.kernel_matrix.calibrate import calibrate
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan, MatrixShape, plan_matrix
from ntkdask.workflows.sources import row_shape_of

USABLE_DEVICE = 0.9
"""Share of a GPU's memory that a tile may plan with."""


def shape_of(sources: Sequence[Any], dtype: str) -> MatrixShape:
    """The shape of kernel(x, y), or of kernel(x) for one source; sources as `as_source` gives them."""
    counts = [s.n if isinstance(s, Dataset) else s.shape[0] for s in sources]
    row_shape = row_shape_of(sources[0])
    return MatrixShape(
        n=counts[0],
        m=counts[1] if len(counts) > 1 else None,
        row_shape=row_shape,
        row_bytes=max(math.prod(row_shape) * np.dtype(s.dtype).itemsize for s in sources),
        dtype=dtype,
    )


def sized(
    kernel: Kernel, shape: MatrixShape, plan: Plan, site: Site, *, measures: bool, workers: int | None = None
) -> MatrixPlan:
    """Tiles that fit; with `measures` also the kernel's pace and, of the tiles that memory allows, those that time allows.

    Parameters
    ----------
    kernel : Kernel
        Whose matrix is planned.
    shape : MatrixShape
        Of the matrix.
    plan : Plan
        Tiles and budget that the caller asked for; without a budget the smallest worker's share, and no bound in this process.
    site : Site
        Where tiles are computed: on GPUs where every worker, or this process, has one.
    measures : bool
        Whether to measure the kernel there.
    workers : int or None
        Plan for so many workers like the site's; None: for those there are.
    """
    offered = site.resources()
    device_bytes = _device_bytes(offered, site)
    plan_for = partial(
        plan_matrix,
        kernel,
        shape,
        plan.memory_bytes or offered.memory_bytes,
        device_budget=device_bytes,
        tile_rows=plan.tile_rows,
        tile_cols=plan.tile_cols,
        slots=offered.slots if workers is None else workers * max(1, offered.slots // site.n_workers),
    )
    sizes = plan_for()
    if not measures:
        return sizes
    pace = calibrate(
        kernel,
        shape.row_shape,
        shape.dtype,
        min(sizes.tile_rows, sizes.tile_cols),
        entries=shape.n**2 / 2 if shape.m is None else shape.n * shape.m,
        site=site,
        slots=offered.slots,
        device=device_bytes > 0,
    )
    return plan_for(pace=pace)


def _device_bytes(offered: Resources, site: Site) -> int:
    """Bytes of a GPU that tiles may plan with; 0 where a worker has none."""
    return int(USABLE_DEVICE * (device_memory_bytes() if site.client is None else offered.device_bytes))
