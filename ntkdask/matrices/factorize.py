"""Tiled Cholesky factorisation LLᵀ = S K S + αI of a stored symmetric matrix that fits no memory.

    for every block of tiles (a task):  C_ij ← s_i K_ij s_j (+ α on the diagonal)
        for k = 0, 1, ...:  L_kk ← chol(C_kk), L_ik ← C_ik L_kk⁻ᵀ where they are its own;  C_ij −= L_ik L_jkᵀ for its j > k
        commit its L_ij

Left-looking: a tile of L is written once and is then final; tasks that need it read it. A task starts when what it reads is
committed, not when a column is complete, so the next diagonal block does not wait for the rest. A killed run goes on with the
tiles that are pending. Dask's own graph (dask.array.linalg.cholesky) would keep every tile in memory. Solutions come from the
`Factor` that is returned.
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

from ntkdask.arrays import Array, namespace, to_device, to_host
from ntkdask.errors import InputError, StoreError
from ntkdask.execution.progress import Listener
from ntkdask.execution.site import Site
from ntkdask.files import exclusive, local_path
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
    """Factorise S K S + αI for a stored symmetric matrix K.

    Parameters
    ----------
    matrix_url : path
        Of the complete matrix K (n, n), in float32 or float64 tiles.
    alpha : float
        Finite and not negative, on the unnormalised matrix.
    url : path
        Where the factor's tiles go, a lower triangle. Tiles that are committed there are not computed again.
    scale : array (n,) or None
        Diagonal of S, square roots of weights; 0 leaves a row out. None for 1.
    dtype : str
        "float64" or "float32" of the factor. float32 takes half the time and space, and its solutions can be refined
        (`solvers.refinement.refine`).
    client : distributed.Client or None
        Whose workers factorise; None: a loop in this process.
    listener : Listener or None
        Hears of every finished task.
    threads : int or None
        Of each task; None: on workers what they have, here all of this process's.
    memory_bytes : int or None
        What one task may take, the process included. None: the smallest worker's share, and no bound in this process.
    device_bytes : int
        Memory of the GPU that each worker computes on; 0 computes on the CPU.
    fingerprint : mapping or None
        What else the factor depends on.
    overwrite : bool
        Whether a store of another alpha, scale, dtype or matrix at `url` is replaced; else it is refused.

    Returns
    -------
    Factor
        Solves on the same client.

    Raises
    ------
    InputError
        When the matrix is not positive definite, with the rows, by how much, and an alpha that would do; for arguments out of range.
    MemoryBudgetError
        With the numbers, before anything runs, when not even one tile fits a task.
    StoreError, FingerprintError
        For an incomplete matrix, and for something else at `url`.
    """
    site = Site.at(url, client, listener, threads)
    if memory_bytes is None:
        memory_bytes = site.resources().memory_bytes
    with exclusive(site.home, beside=True):
        return factorize_at(
            site,
            matrix_url,
            alpha,
            scale=scale,
            dtype=dtype,
            memory_bytes=memory_bytes,
            device_bytes=device_bytes,
            fingerprint=fingerprint,
            overwrite=overwrite,
        )


def factorize_at(
    site: Site,
    matrix_url: str | os.PathLike[str],
    alpha: float,
    *,
    scale: Any = None,
    dtype: str = "float64",
    memory_bytes: int | None = None,
    device_bytes: int = 0,
    fingerprint: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Factor:
    """`factorize` at a site, within the bytes that are stated; the caller is the only writer there.

    Parameters
    ----------
    site : Site
        Its folder is the factor's place.
    matrix_url, alpha, scale, dtype, device_bytes, fingerprint, overwrite
        As in `factorize`.
    memory_bytes : int or None
        What one task may take, the process included; None: not bounded.
    """
    matrix = TileStore.open(matrix_url)
    alpha, weights = _check_arguments(matrix, alpha, scale, dtype)
    plan = plan_factorize(
        matrix.shape[0],
        matrix.tile_shape[0],
        dtype,
        memory_bytes,
        slots=site.slots,
        matrix_dtype=matrix.dtype.name,
        device_bytes=device_bytes,
    )
    store = TileStore.create(
        site.home,
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
    blocks = list(blocks_of(matrix.grid[0], plan.block_tiles, store.pending()))
    on_device = device_bytes > 0
    site.commit(
        lambda block: [store] * len(block.targets),
        _BlockTask(str(matrix.path), str(store.path), alpha, _address(weights, store, site), on_device),
        blocks,
        LABEL,
        earlier=plan.tasks - len(blocks),
        needs=feeding(blocks).__getitem__,
    )
    return Factor(str(store.path), site.client, threads=site.threads, columns=plan.columns, device=on_device)


@dataclass(frozen=True, eq=False)
class _BlockTask:
    """Compute and commit the pending tiles of one block of L; scale is the array, its state's url, or None."""

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
        """One tile of S K S + αI, on the device that computes."""
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
    """The message for diagonal tile k, `complement` before factorising, that has no Cholesky factor from its row `lost` on."""
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
    """(alpha, scale as float64 or None); InputError or StoreError saying what is wrong with arguments or stored matrix."""
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
    scale = np.asarray(to_host(scale, "scale"), np.float64)
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


def _address(scale: np.ndarray | None, store: TileStore, site: Site) -> np.ndarray | str | None:
    """The scale as tasks carry it: itself, or, where it is too large to travel, the url of a state beside the store."""
    if scale is None or site.client is None or scale.nbytes <= SMALL_BYTES:
        return scale
    return save_state(local_path(str(store.path) + ".inputs") / "state", {"scale": scale})
