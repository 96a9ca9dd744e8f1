"""The one pass of `rectified` on a GPU: a product into the result, then CUDA kernels with one thread an entry (`rectified.cu`).

The result itself holds the correlations and their half deficits on the way, so nothing else of its size lives on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from ntkdask.arrays import Array, cuda_module, namespace, to_device
from ntkdask.kernels.blocks import Block
from ntkdask.kernels.correlations import UnitRows, recompute

THREADS = 128
ROWS = 65535  # of a grid's second axis; the kernels loop beyond
STRIP_ENTRIES = 2**20
"""Entries whose exact correlations are looked for at a time."""


def cuda_source() -> str:
    """The CUDA C++ of this module; it includes nothing."""
    return resources.files("ntkdask.kernels").joinpath("rectified.cu").read_text()


def fill(
    inputs: tuple[UnitRows, UnitRows],
    constants: tuple[Any, Any],
    tables: tuple[np.ndarray, np.ndarray],
    near: float,
    symmetric: bool,
    out: Mapping[str, Array],
) -> None:
    """Compute the matrices of `out`, {"nngp" or "ntk": (n, m)}, CuPy, C-ordered, of the dtype of the unit rows.

    constants: `rectified.RowConstants` of either side; tables: of `rectified.table`.
    """
    v = next(iter(out.values()))
    (n, m), xp, dtype = v.shape, namespace(v), v.dtype
    if not n or not m:
        return
    left, right = inputs
    xp.matmul(left.unit, right.unit.T, out=v)  # type: ignore[union-attr]
    module, count = cuda_module(cuda_source()), xp.zeros(1, xp.uint64)
    grid = (-(-m // THREADS), min(n, ROWS))
    sizes = np.int32(n), np.int32(m)
    first = module.get_function(f"half_deficits_{dtype.name}")
    first(grid, (THREADS,), (v, *sizes, dtype.type(near), np.int32(symmetric), count))
    found = int(count[0])
    step = max(1, STRIP_ENTRIES // m)
    for top in range(0, n if found else 0, step):
        block = Block(top, min(top + step, n), 0, m, False)
        recompute(v[block.rows], left, right, block, near, found / v.size)
    null, (kinds, values) = np.uintp(0), tables
    rows, columns = ((side.alpha, side.beta, side.deviations) for side in constants)
    arguments = (
        v,
        out.get("nngp", null),
        out.get("ntk", null),
        *sizes,
        np.int32(symmetric),
        np.int32(len(kinds)),
        to_device(kinds.astype(np.int32)),
        to_device(values),
        *rows,
        *columns,
    )
    module.get_function(f"recursion_{dtype.name}")(grid, (THREADS,), arguments)
