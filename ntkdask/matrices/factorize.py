"""Tiled Cholesky factorisation LLᵀ = S K S + αI of a stored symmetric matrix that fits no memory.

    for every block of tiles (a task):  C_ij ← s_i K_ij s_j (+ α on the diagonal)
        for k = 0, 1, ...:  L_kk ← chol(C_kk), L_ik ← C_ik L_kk⁻ᵀ where they are its own;  C_ij −= L_ik L_jkᵀ for its j > k
        commit its L_ij

Left-looking: a tile of L is written once, and final; whoever needs it reads it. A task starts when what it reads is
committed, not when a column is complete, so the next diagonal block does not wait for the rest. A killed run goes on with the
tiles that are pending. In place of scheduling by Dask's own graph, as dask.array.linalg.cholesky does: that one keeps every
tile in memory. Solutions come from the `Factor` that is returned.
"""

from __future__ import annotations

import math
import numbers
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask import threads as thread_pools
from ntkdask.arrays import Array, namespace, to_device, to_host
from ntkdask.errors import InputError, StoreError
from ntkdask.execution.map_reduce import map_tiles
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.window import Done
from ntkdask.files import local_path
from ntkdask.matrices.factor import SMALL_BYTES, Factor
from ntkdask.matrices.factorize_plan import Block, Index, blocks_of, feeding, plan_factorize, reads_of
from ntkdask.matrices.read_ahead import ahead
from ntkdask.solvers.cholesky import (
    factor_lower,
    first_lost_pivot,
    pivot_floor,
    ridge_tile,
    smallest_eigenvalue,
    solve_right,
    subtract_product,
    subtract_square,
)
from ntkdask.states import content_digest, load_state, save_state
from ntkdask.store import Receipt, TileStore

LABEL = "cholesky-tile"


def factorize(
    matrix_url: str | os.PathLike[str],
    alpha: float,
    *,
    url: str | os.PathLike[str],
    scale: Any = None,
    dtype: str = "float64",
    client: Any = None,
    listener: Listener | None = None,
    threads: int | None = None,
    memory_bytes: int | None = None,
    device_bytes: int = 0,
    fingerprint: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Factor:
    """Factorise S K S + αI, K the symmetric matrix stored at matrix_url; the factor's tiles, lower triangle, go to `url`.

    alpha: finite, not negative, on the unnormalised matrix. scale (n,): the diagonal of S, square roots of weights, 0 leaves a
    row out; None for 1. dtype: of the factor; float32 takes half the time and space, and its solutions can be refined
    (`solvers.refinement.refine`). threads: of each task. memory_bytes: what one task may take; device_bytes: compute on the
    worker's GPU, which has that much. fingerprint: what else the factor depends on. Tiles that are committed are not
    computed again; a store of another alpha, scale, dtype or matrix is refused unless `overwrite`.

    Raises InputError when the matrix is not positive definite, with the rows, by how much, and an alpha that would do.
    """
    listener = listener or Silent()
    matrix = TileStore.open(matrix_url)
    alpha, weights = _check_arguments(matrix, alpha, scale, dtype)
    slots = 1 if client is None else max(1, sum(client.nthreads().values()))
    plan = plan_factorize(
        matrix.shape[0],
        matrix.tile_shape[0],
        dtype,
        memory_bytes,
        slots=slots,
        matrix_dtype=matrix.dtype.name,
        device_bytes=device_bytes,
    )
    store = TileStore.create(
        url,
        shape=matrix.shape,
        tile_shape=matrix.tile_shape,
        dtype=dtype,
        triangle="lower",
        overwrite=overwrite,
        fingerprint={
            **(fingerprint or {}),
            "matrix": matrix.fingerprint,
            "alpha": alpha,
            "scale": None if weights is None else content_digest(weights),
        },
    )
    side, width = matrix.grid[0], plan.block_tiles
    blocks = list(blocks_of(side, width, store.pending()))
    listener.stage(LABEL, plan.tasks, plan.tasks - len(blocks))

    def receive(block: Block, done: Done[list[Receipt]]) -> None:
        for r in done.value:
            store.record(Receipt(r.index, r.checksum, done.seconds / len(done.value), done.peak_bytes, done.worker))
        listener.task(LABEL, done)

    task = _BlockTask(str(matrix.path), str(store.path), alpha, _address(weights, store, client), device_bytes > 0)
    if threads is None and client is None:
        threads = thread_pools.current()
    map_tiles(task, blocks, client, label=LABEL, receive=receive, threads=threads, needs=feeding(blocks).__getitem__)
    return Factor(str(store.path), client, threads, plan.columns, device_bytes > 0)


@dataclass(frozen=True, eq=False)
class _BlockTask:
    """Compute and commit the pending tiles of one block of L. scale: the array, its state's url, or None."""

    matrix: str
    factor: str
    alpha: float
    scale: np.ndarray | str | None
    device: bool

    def __call__(self, block: Block) -> list[Receipt]:
        started = time.perf_counter()
        matrix, store = TileStore.open(self.matrix), TileStore.open(self.factor)
        scale = load_state(self.scale)[0]["scale"] if isinstance(self.scale, str) else self.scale
        own = {t: self._start(matrix, store, scale, t) for t in block.targets}
        # of A, before anything is subtracted: what a pivot is measured against
        diagonals = {i: namespace(c).diagonal(c).copy() for (i, j), c in own.items() if i == j}
        columns = range(max(j for _, j in block.targets) + 1)
        wanted = [(r, k) for k in columns for r in reads_of(block, k)]
        arriving = ahead(store.read, wanted)
        receipts: list[Receipt] = []
        for k in columns:
            panel = {r: to_device(next(arriving), self.device) for r in reads_of(block, k)}
            panel |= {i: own[i, j] for i, j in block.targets if j == k and i != k}
            for i in sorted(i for i, j in block.targets if j == k):
                if i == k:
                    self._factor_diagonal(matrix, scale, own[k, k], diagonals[k], k)
                else:
                    solve_right(own[i, k], own[k, k] if (k, k) in own else panel[k])
                receipts.append(store.commit((i, k), to_host(own[i, k]), started))
            for (i, j), c in own.items():
                if j <= k:
                    continue
                if i == j:
                    subtract_square(c, panel[i])
                else:
                    subtract_product(c, panel[i], panel[j])
            # before the next column is read
            panel.clear()
        return receipts

    def _start(self, matrix: TileStore, store: TileStore, scale: np.ndarray | None, index: Index) -> Array:
        """S K S + αI of one tile, where it is computed."""
        rows, columns = matrix.slices(index)
        s: tuple[Any, Any] = (None, None) if scale is None else (scale[rows], scale[columns])
        tile = to_device(matrix.read(index), self.device)
        return ridge_tile(tile, *s, store.dtype, self.alpha, index[0] == index[1])

    def _factor_diagonal(self, matrix: TileStore, scale: np.ndarray | None, c: Array, diagonal: Array, k: int) -> None:
        """C_kk ← L_kk in place; InputError when it is not positive definite, or only by rounding."""
        before = c.copy()
        positive = factor_lower(c)
        floor = pivot_floor(matrix.shape[0], c.dtype, matrix.dtype)
        lost = positive if positive < len(c) else first_lost_pivot(c, diagonal, floor)
        if lost is not None:
            raise InputError(_not_positive(matrix, scale, self.alpha, before, k, lost))


def _not_positive(
    matrix: TileStore, scale: np.ndarray | None, alpha: float, complement: Array, k: int, lost: int
) -> str:
    """What to say when diagonal tile k, `complement` before it was factorised, has no Cholesky factor from its row `lost` on."""
    rows = matrix.slices((k, k))[0]
    where = f"rows {rows.start}:{rows.stop} (first at row {rows.start + lost})"
    if not np.isfinite(to_host(complement)[np.tril_indices(len(complement))]).all():
        return f"factorize: {matrix.path} has NaN or infinite values in {where}. Mend the data and compute it again."
    smallest = smallest_eigenvalue(complement)
    diagonal = np.concatenate([np.diagonal(matrix.read((i, i))).astype(float) for i in range(matrix.grid[0])])
    diagonal = diagonal if scale is None else diagonal * scale**2
    trace, kinds = float(diagonal.sum()), (matrix.dtype.name, complement.dtype.name)
    noise = trace * float(max(np.finfo(kind).eps for kind in kinds))
    floor = pivot_floor(matrix.shape[0], *kinds[::-1]) * (float(diagonal.max()) + alpha)
    advice = _round_up(alpha + max(-2.0 * smallest, noise, 2.0 * floor))
    closer = "" if set(kinds) == {"float64"} else ", or a matrix and a factor in float64"
    return (
        f"factorize: the matrix plus alpha={alpha:g} is not positive definite to rounding in {where}: what is left there has the "
        f"smallest eigenvalue {smallest:.3g}, beside a trace of {trace:.4g}, so that {kinds[0]} entries and a {kinds[1]} factor "
        f"carry errors up to about {noise:.1g}. Repeated rows do this at alpha=0. "
        f"Use alpha >= {advice:g} (another url, or overwrite=True){closer}."
    )


def _round_up(x: float) -> float:
    """x to one digit, upwards."""
    unit = 10.0 ** math.floor(math.log10(x)) if x > 0 else 1.0
    return float(f"{math.ceil(x / unit - 1e-9) * unit:.1g}")


def _check_arguments(matrix: TileStore, alpha: float, scale: Any, dtype: str) -> tuple[float, np.ndarray | None]:
    """(alpha, scale as float64 or None); InputError, StoreError with what is wrong with the arguments or the stored matrix."""
    name = matrix.path.name
    if matrix.triangle != "symmetric":
        raise InputError(
            f"factorize: {name} {matrix.shape} is not stored as a symmetric matrix; only such have a Cholesky factor."
        )
    pending = len(matrix.pending())
    if pending:
        raise StoreError(f"factorize: {pending} tiles of {matrix.path} are not computed yet. Finish the matrix first.")
    if matrix.dtype.name not in ("float32", "float64") or dtype not in ("float32", "float64"):
        raise InputError(f"factorize: {matrix.dtype} tiles, a factor in {dtype!r}; both must be float32 or float64.")
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0 <= alpha < math.inf:
        raise InputError(f"factorize: alpha is {alpha!r}; expected a finite number >= 0.")
    alpha = float(alpha)
    if scale is None:
        return alpha, None
    scale = np.asarray(scale, np.float64)
    if scale.shape != (matrix.shape[0],) or not np.isfinite(scale).all() or (scale < 0).any():
        raise InputError(
            f"factorize: scale has shape {scale.shape}; expected ({matrix.shape[0]},), one finite number >= 0 per row."
        )
    left_out = np.flatnonzero(scale == 0)
    if len(left_out) and alpha == 0:
        raise InputError(
            f"factorize: scale is 0 in {len(left_out)} rows (first {left_out[0]}) and alpha is 0, so nothing is on their diagonal. "
            "Use alpha > 0, or leave the rows out of the matrix."
        )
    return alpha, scale


def _address(scale: np.ndarray | None, store: TileStore, client: Any) -> np.ndarray | str | None:
    """The scale as tasks carry it: itself, or, where it is too large to travel, the url of a state beside the store."""
    if scale is None or client is None or scale.nbytes <= SMALL_BYTES:
        return scale
    return save_state(local_path(str(store.path) + ".inputs") / "state", {"scale": scale})
