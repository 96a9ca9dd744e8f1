"""What a stored Cholesky factor gives: solutions, half solutions, log det, streamed from its tiles.

    forward:  x_j ← L_jj⁻¹ (b_j − Σ_{k<j} L_jk x_k),  j = 0, 1, ...          row by row of L
    backward: x_j ← L_jj⁻ᵀ (y_j − Σ_{i>j} L_ijᵀ x_i), j = last, ..., 0       column by column

Each reads L once per block of right-hand sides; several blocks are several tasks. `factorize` makes factors; nothing here writes
to one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.arrays import Array, namespace, to_device, to_host
from ntkdask.errors import InputError, StoreError
from ntkdask.execution.map_reduce import TASK_BYTES
from ntkdask.execution.site import Site
from ntkdask.files import exclusive, local_path, remove
from ntkdask.matrices.factorize_plan import SUBSTITUTE_COLUMNS
from ntkdask.matrices.read_ahead import ahead
from ntkdask.planning.tiles import Tile
from ntkdask.solvers.cholesky import solve_lower
from ntkdask.states import content_digest
from ntkdask.store import TileStore

SMALL_BYTES = TASK_BYTES - 2**16
"""Arrays up to this size travel with a task; larger ones lie in the store."""


@dataclass(frozen=True)
class Factor:
    """The factor L at `url`, LLᵀ = S K S + αI, in float32 or float64 tiles.

    Parameters
    ----------
    url : str
        Of the tiles that `factorize` wrote.
    client : distributed.Client or None
        Whose workers substitute; None: this process.
    threads : int or None
        Of each task; None: on workers what they have, here all of this process's.
    columns : int
        Right-hand sides of one task.
    device : bool
        Whether to compute on the workers' GPUs.
    """

    url: str
    client: Any = field(default=None, repr=False, compare=False)
    threads: int | None = None
    columns: int = SUBSTITUTE_COLUMNS
    device: bool = False

    def __post_init__(self) -> None:
        store = self._store()
        if store.triangle != "lower" or "alpha" not in store.fingerprint:
            raise InputError(
                f"{store.path} is a tile store, but not a Cholesky factor. Give the url that `factorize` filled."
            )
        pending = len(store.pending())
        if pending:
            raise StoreError(
                f"{pending} tiles of the factor {store.path} are not computed yet. Run `factorize` again: it resumes."
            )

    @property
    def n(self) -> int:
        """Rows of the factorised matrix."""
        return self._store().shape[0]

    @property
    def alpha(self) -> float:
        """α of the factorised matrix S K S + αI."""
        return float(self._store().fingerprint["alpha"])

    @property
    def dtype(self) -> np.dtype:
        """dtype of the factor's tiles."""
        return self._store().dtype

    def solve(self, rhs: Any) -> np.ndarray:
        """(S K S + αI)⁻¹ rhs for finite rhs (n,) or (n, k), in its shape and float64.

        Computed in the factor's dtype: from a float32 factor accurate to about κ·6e-8, which `solvers.refinement.refine` improves.
        """
        return self._substitute(rhs, backward=True)

    def half_solve(self, rhs: Any) -> np.ndarray:
        """L⁻¹ rhs; shapes as in `solve`. ‖L⁻¹ S k‖² is by how much the data lower a Gaussian process's variance k(x, x)."""
        return self._substitute(rhs, backward=False)

    def diagonal(self) -> np.ndarray:
        """L_ii, (n,) float64, all positive."""
        store = self._store()
        tiles = [(i, i) for i in range(store.grid[0])]
        return np.concatenate(self._site.map(_DiagonalTask(str(store.path)), tiles, "cholesky-pivots"))

    def log_determinant(self) -> float:
        """log det(S K S + αI) = 2 Σ log L_ii."""
        return 2.0 * float(np.log(self.diagonal()).sum())

    def _store(self) -> TileStore:
        return TileStore.open(self.url)

    @property
    def _site(self) -> Site:
        return Site.at(None, self.client, threads=self.threads)

    def _substitute(self, rhs: Any, backward: bool) -> np.ndarray:
        b = self._checked(rhs)
        n, k = b.shape
        tiles = [Tile((0, i), 0, n, c, min(c + self.columns, k)) for i, c in enumerate(range(0, k, self.columns))]
        if self.client is None or b.nbytes <= SMALL_BYTES:
            return self._in_tasks(b, tiles, backward).reshape(np.shape(rhs))
        return self._in_store(b, tiles, backward).reshape(np.shape(rhs))

    def _in_tasks(self, b: np.ndarray, tiles: list[Tile], backward: bool) -> np.ndarray:
        """Right-hand sides travel with the tasks, or stay in this process."""
        out = np.empty_like(b)

        def receive(tile: Tile, solution: np.ndarray) -> None:
            out[:, tile.col_start : tile.col_stop] = solution

        self._site.each(_SubstituteTask(self.url, b, None, backward, self.device), tiles, "substitute", receive)
        return out

    def _in_store(self, b: np.ndarray, tiles: list[Tile], backward: bool) -> np.ndarray:
        """Right-hand sides and solutions lie beside the factor while tasks work on them, under the digest of their content."""
        folder = local_path(self.url + ".solves") / f"{content_digest(b)}-{'full' if backward else 'half'}"
        with exclusive(folder, beside=True):
            return self._solved_in(folder, b, tiles, backward)

    def _solved_in(self, folder: Path, b: np.ndarray, tiles: list[Tile], backward: bool) -> np.ndarray:
        """`_in_store` in a folder of which this process is the only writer."""
        layout: dict[str, Any] = {"shape": b.shape, "tile_shape": (len(b), self.columns), "dtype": "float64"}
        source = TileStore.create(folder / "rhs", **layout, fingerprint={"factor": self._store().fingerprint})
        target = TileStore.create(folder / "solution", **layout, fingerprint=dict(source.fingerprint))
        for tile in tiles:
            if source.pending([tile.index]):
                source.record(source.commit(tile.index, np.ascontiguousarray(b[:, tile.col_start : tile.col_stop])))
        task = _SubstituteTask(self.url, str(source.path), str(target.path), backward, self.device)
        self._site.fill(target, task, tiles, "substitute")
        out = np.empty_like(b)
        for tile in tiles:
            out[:, tile.col_start : tile.col_stop] = target.read(tile.index)
        remove(folder)
        return out

    def _checked(self, rhs: Any) -> np.ndarray:
        """rhs as (n, k) float64; InputError when its rows are not the matrix's, or not finite."""
        b = np.asarray(to_host(rhs, "the right-hand side"), np.float64)
        if b.ndim not in (1, 2) or len(b) != self.n:
            raise InputError(f"the right-hand side has shape {b.shape}; expected ({self.n},) or ({self.n}, k).")
        b = b.reshape(len(b), -1) if b.size else b.reshape(len(b), 0)
        bad = ~np.isfinite(b).all(axis=1)
        if bad.any():
            raise InputError(f"the right-hand side has NaN or infinite values in row {int(np.argmax(bad))}.")
        return b


@dataclass(frozen=True, eq=False)
class _SubstituteTask:
    """Substitute one block of right-hand sides, of the array or the store at `rhs`, and return or (target) commit the solution."""

    factor: str
    rhs: np.ndarray | str
    target: str | None
    backward: bool
    device: bool

    def __call__(self, tile: Tile) -> Any:
        started = time.perf_counter()
        x = self._substituted(TileStore.open(self.factor), self._right_sides(tile))
        return x if self.target is None else TileStore.open(self.target).commit(tile.index, x, started)

    def _right_sides(self, tile: Tile) -> np.ndarray:
        if isinstance(self.rhs, str):
            return TileStore.open(self.rhs).read(tile.index)
        return self.rhs[:, tile.col_start : tile.col_stop]

    def _substituted(self, store: TileStore, b: np.ndarray) -> np.ndarray:
        # unit columns: a float32 factor would lose those of 1e-40
        size = np.linalg.norm(b, axis=0)
        size[size == 0] = 1.0
        x = to_device(np.ascontiguousarray(b / size, dtype=store.dtype), self.device)
        self._forward(store, x)
        if self.backward:
            self._backward(store, x)
        return to_host(x).astype(np.float64) * size

    def _forward(self, store: TileStore, x: Array) -> None:
        """X ← L⁻¹X in place, reading L row by row."""
        order = [(j, k) for j in range(store.grid[0]) for k in range(j + 1)]
        for (j, k), tile in zip(order, ahead(store.read, order), strict=True):
            rows, columns = store.slices((j, k))
            tile = to_device(tile, self.device)
            if k == j:
                solve_lower(tile, x[rows])
            else:
                x[rows] -= tile @ x[columns]

    def _backward(self, store: TileStore, x: Array) -> None:
        """X ← L⁻ᵀX in place, reading L column by column from the last."""
        last = store.grid[0] - 1
        order = [(i, j) for j in range(last, -1, -1) for i in range(last, j - 1, -1)]
        for (i, j), tile in zip(order, ahead(store.read, order), strict=True):
            rows, columns = store.slices((i, j))
            tile = to_device(tile, self.device)
            if i == j:
                solve_lower(tile, x[columns], transposed=True)
            else:
                x[columns] -= tile.T @ x[rows]


@dataclass(frozen=True)
class _DiagonalTask:
    """The diagonal of one diagonal tile, float64."""

    factor: str

    def __call__(self, index: tuple[int, int]) -> np.ndarray:
        tile = TileStore.open(self.factor).read(index)
        return namespace(tile).diagonal(tile).astype(np.float64)


def open_factor(url: str | os.PathLike[str], client: Any = None, **options: Any) -> Factor:
    """The finished factor at `url`, to be used on `client`; other options as of `Factor`."""
    return Factor(os.fspath(url), client, **options)
