"""The one pass of `rectified` on a GPU: a product into the result, then CUDA kernels with one thread for each entry (`rectified.cu`).

The result itself holds the correlations and then their half deficits, so the device holds nothing else of its size.
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
ROWS = 65535
"""Most blocks on a grid's second axis; the kernels loop over rows beyond."""
STRIP_ENTRIES = 2**20
"""Entries among which those below the threshold are recomputed at a time."""


def cuda_source() -> str:
    """The CUDA C++ of this module; it includes nothing."""
    return resources.files("ntkdask.kernels").joinpath("rectified.cu").read_text()


def fill(
    inputs: tuple[UnitRows, UnitRows],
    constants: tuple[Any, Any],
    tables: tuple[np.ndarray, np.ndarray],
    threshold: float,
    symmetric: bool,
    out: Mapping[str, Array],
) -> None:
    """Compute NNGP and NTK matrices.

    Parameters
    ----------
    inputs : tuple of two UnitRows
        Both sides.
    constants : tuple of two RowConstants
        Of both sides.
    tables : tuple of two arrays
        Kinds and constants of `rectified.table`.
    threshold : float
        Half deficits below it are computed again in float64.
    symmetric : bool
        Whether both sides are the same.
    out : mapping from "nngp" or "ntk" to CuPy array (n, m)
        The results, C-ordered, of the dtype of the unit rows.
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
    first(grid, (THREADS,), (v, *sizes, dtype.type(threshold), np.int32(symmetric), count))
    below = int(count[0])
    step = max(1, STRIP_ENTRIES // m)
    for top in range(0, n if below else 0, step):
        block = Block(top, min(top + step, n), 0, m, False)
        recompute(v[block.rows], left, right, block, threshold, below / v.size)
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
