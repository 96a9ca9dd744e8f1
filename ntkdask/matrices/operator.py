"""Stored matrices as operators: `A @ v` by one task per panel, never more of the matrix in a process than a few tiles.

    for every panel (a task):  for its tiles (i, j):  y_i += T v_j, and where the matrix is symmetric  y_j += Tᵀ v_i
    here:                      y = Σ panels, in their order

Panels and the order of all sums follow from the matrix alone: equal bits on any number of workers, and without any. Workers keep
the tiles of as many panels as their cache_bytes hold, always the same ones; the others are read for every product. Called
by conjugate gradients, by preconditioners (columns, diagonal) and by the spectrum; solvers see an object with `@`.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from ntkdask.arrays import Array, to_device, to_host
from ntkdask.cache import DEFAULT_BYTES, shared
from ntkdask.errors import InputError
from ntkdask.execution.map_reduce import TASK_BYTES
from ntkdask.execution.site import Site
from ntkdask.files import remove
from ntkdask.matrices.stored import PANEL_BYTES, StoredMatrix
from ntkdask.solvers.products import products_bytes, tile_product, tile_products
from ntkdask.states import load_state, save_state
from ntkdask.store import Index
from ntkdask.threads import current, on_threads

Piece = tuple[int, Any, np.ndarray]
"""(block of rows, where in it the values belong as the action says, values)"""


class Action(Protocol):
    """The computation of one pass over the tiles; small, since it travels with every task."""

    def wants(self, matrix: StoredMatrix, index: Index) -> bool:
        """Whether tile `index` contributes."""

    def begin(self, device: bool) -> Action:
        """The action with its arrays loaded, once per task."""

    def pieces(self, matrix: StoredMatrix, index: Index, tile: Array) -> list[Piece]:
        """The contributions of one tile."""


@dataclass(frozen=True, eq=False)
class _Product:
    """Rows of M·V: V (m, k) itself, or the url of the state that holds it."""

    v: Any

    def wants(self, matrix: StoredMatrix, index: Index) -> bool:
        return True

    def begin(self, device: bool) -> _Product:
        # not kept: vectors of past products would push tiles out of the cache
        v = load_state(self.v, keep=False)[0]["v"] if isinstance(self.v, str) else self.v
        return replace(self, v=to_device(v, device))

    def pieces(self, matrix: StoredMatrix, index: Index, tile: Array) -> list[Piece]:
        rows, columns = matrix.store.slices(index)
        if not matrix.is_symmetric or index[0] == index[1]:
            return [(index[0], None, to_host(tile_product(tile, self.v[columns])))]
        down, across = tile_products(tile, self.v[columns], self.v[rows])
        return [(index[0], None, to_host(down)), (index[1], None, to_host(across))]


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns of M by number; a piece carries the places of its columns in `numbers`."""

    numbers: np.ndarray

    def wants(self, matrix: StoredMatrix, index: Index) -> bool:
        blocks = np.unique(self.numbers // matrix.tile_shape[1])
        return index[1] in blocks or (matrix.is_symmetric and index[0] in blocks)

    def begin(self, device: bool) -> _Columns:
        return self

    def pieces(self, matrix: StoredMatrix, index: Index, tile: Array) -> list[Piece]:
        rows, columns = matrix.store.slices(index)
        pieces: list[Piece] = []
        here = np.flatnonzero((self.numbers >= columns.start) & (self.numbers < columns.stop))
        if here.size:
            pieces.append((index[0], here, to_host(tile[:, self.numbers[here] - columns.start])))
        if matrix.is_symmetric and index[0] != index[1]:
            mirrored = np.flatnonzero((self.numbers >= rows.start) & (self.numbers < rows.stop))
            if mirrored.size:
                pieces.append((index[1], mirrored, to_host(tile[self.numbers[mirrored] - rows.start].T)))
        return pieces


@dataclass(frozen=True)
class _Diagonal:
    """The diagonal of M."""

    def wants(self, matrix: StoredMatrix, index: Index) -> bool:
        return index[0] == index[1]

    def begin(self, device: bool) -> _Diagonal:
        return self

    def pieces(self, matrix: StoredMatrix, index: Index, tile: Array) -> list[Piece]:
        return [(index[0], None, to_host(tile.diagonal()))]


@dataclass(frozen=True)
class _Walk:
    """One panel's part of a pass: its number, the tiles that contribute, and whether they stay in the worker's cache."""

    number: int
    tiles: tuple[Index, ...]
    keep: bool


@dataclass(frozen=True, eq=False)
class _PanelTask:
    """Walk a panel and return its pieces, those of one block of rows added in the order of its tiles."""

    matrix: StoredMatrix
    action: Action
    cache_bytes: int
    device: bool

    def __call__(self, walk: _Walk) -> list[Piece]:
        if walk.keep:
            shared.reserve(DEFAULT_BYTES + self.cache_bytes)
            # an earlier fold's matrix: the plan counts one matrix in the cache, not two
            shared.discard(lambda key: isinstance(key, tuple) and key[0] == "tile" and key[1] != self.matrix.token)
        action = self.action.begin(self.device)

        def contribution(index: Index) -> list[Piece]:
            return action.pieces(self.matrix, index, self._tile(index, walk.keep))

        by_tile = [contribution(i) for i in walk.tiles] if self.device else on_threads(contribution, walk.tiles)
        pieces = [piece for contributed in by_tile for piece in contributed]
        return _summed(pieces) if isinstance(action, _Product) else pieces

    def _tile(self, index: Index, keep: bool) -> Array:
        def read() -> Array:
            return to_device(self.matrix.store.read(index), self.device)

        return shared.get(("tile", self.matrix.token, index, self.device), read) if keep else read()


def _summed(pieces: list[Piece]) -> list[Piece]:
    """One piece for each block of rows, the sum of its pieces in their order."""
    sums: dict[int, np.ndarray] = {}
    for block, _, values in pieces:
        sums[block] = sums[block] + values if block in sums else values
    return [(block, None, values) for block, values in sums.items()]


class StoredKernel:
    """S·K·S of the complete matrix K stored at `url`, S = diag(scale): an operator on float64 vectors.

    `A @ v` takes v (m,) or (m, k) to (n,) or (n, k) float64, accumulated in float64 whatever the tiles' dtype.

    Parameters
    ----------
    url : path
        Of the matrix (n, m).
    client : distributed.Client or None
        Whose workers multiply; None: a loop in this process.
    scale : array (n,) or None
        Diagonal of S, >= 0: square roots of sample weights, 0 leaves a row out. None: K itself, which may then be rectangular.
    threads : int or None
        Of each task; None leaves them. On the host they share a panel's tiles, and bits do not depend on their number.
    cache_bytes : int
        What a worker process may keep of the matrix beside its other cache, on the GPU when `device`. Panels that do not fit are read
        for every product.
    device : bool
        Whether to compute on the workers' GPUs.

    Raises
    ------
    StoreError
        For an incomplete matrix.
    InputError
        For shapes that do not fit.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        client: Any = None,
        scale: np.ndarray | None = None,
        threads: int | None = None,
        cache_bytes: int = 0,
        device: bool = False,
    ) -> None:
        self.matrix = StoredMatrix.open(url)
        self.shape, self.dtype = self.matrix.shape, np.dtype(np.float64)
        # silent: a product is no stage of a workflow
        self._site = Site(client=client, threads=threads)
        self._cache_bytes, self._device = cache_bytes, device
        self.threads = threads
        self.scale = None if scale is None else self._require_scale(scale)
        self._panels = self.matrix.panels()

    @classmethod
    def at(
        cls,
        site: Site,
        url: str | os.PathLike[str],
        scale: np.ndarray | None = None,
        cache_bytes: int = 0,
        device: bool = False,
    ) -> StoredKernel:
        """The operator whose products run at a site, with its client and threads; nobody hears of them."""
        return cls(url, site.client, scale, site.threads, cache_bytes, device)

    def __matmul__(self, v: Any) -> np.ndarray:
        v = np.asarray(to_host(v, "v"), np.float64)
        n, m = self.shape
        if v.ndim not in (1, 2) or v.shape[0] != m:
            raise InputError(
                f"{self.matrix.url} is ({n}, {m}) and was multiplied with {v.shape}; give ({m},) or ({m}, k)."
            )
        columns = v.reshape(m, -1)
        if self.scale is not None:
            columns = columns * self.scale[:, None]
        out = np.zeros((n, columns.shape[1]))
        if columns.shape[1]:
            with self._carried(np.ascontiguousarray(columns)) as carried:

                def add(block: int, places: Any, values: np.ndarray) -> None:
                    out[self._rows(block)] += values

                self._walk(_Product(carried), add)
        if self.scale is not None:
            out *= self.scale[:, None]
        return out.reshape(n, *v.shape[1:])

    def columns(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, r) float64: the columns of these numbers, in this order; InputError for numbers outside the matrix."""
        numbers = np.asarray(indices, np.int64).reshape(-1)
        n, m = self.shape
        if ((numbers < 0) | (numbers >= m)).any():
            raise InputError(
                f"{self.matrix.url} has columns 0 to {m - 1}; {numbers[(numbers < 0) | (numbers >= m)][0]} was asked for."
            )
        out = np.zeros((n, numbers.size))
        if numbers.size:

            def place(block: int, places: Any, values: np.ndarray) -> None:
                out[self._rows(block), places] = values

            self._walk(_Columns(numbers), place)
        if self.scale is not None:
            out *= self.scale[:, None] * self.scale[numbers]
        return out

    def diagonal(self) -> np.ndarray:
        """(n,) float64; InputError when the matrix is not square."""
        self._require_square("diagonal")
        out = np.empty(self.shape[0])

        def place(block: int, places: Any, values: np.ndarray) -> None:
            out[self._rows(block)] = values

        self._walk(_Diagonal(), place)
        return out if self.scale is None else out * self.scale**2

    def trace(self) -> float:
        """Sum of the diagonal."""
        return float(self.diagonal().sum())

    def read_dense(self, dtype: Any = "float64") -> np.ndarray:
        """The whole operator, (n, m) in Fortran order, read in this process: for solvers whose matrix fits."""
        return self.matrix.read(dtype, self.scale)

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator`; InputError when the matrix is not symmetric."""
        from scipy.sparse.linalg import LinearOperator

        self._require_square("to_scipy")
        if not self.matrix.is_symmetric:
            raise InputError(
                f"{self.matrix.url} is not stored as symmetric; SciPy's solvers need products with the transpose."
            )
        product = self.__matmul__
        return LinearOperator(
            self.shape, dtype=self.dtype, matvec=product, matmat=product, rmatvec=product, rmatmat=product
        )

    def task_bytes(self, k: int, threads: int | None = None) -> int:
        """Peak bytes of a product's task with k right-hand sides beside the cache.

        Vectors, pieces, and for each thread (None: those of the operator) a tile, its checksummed file and the strips.
        """
        rows, columns = self.matrix.tile_shape
        threads = threads or self.threads or current()
        tile = rows * columns * self.matrix.dtype.itemsize
        pieces = max(len(panel) for panel in self._panels) * 8 * k * (rows + columns)
        return 2 * 8 * self.shape[1] * k + pieces + threads * (3 * tile + products_bytes(rows, columns, k))

    def _walk(self, action: Action, take: Callable[[int, Any, np.ndarray], None]) -> None:
        """Hand every piece to `take`, panel by panel in their order, whichever finishes first."""
        walks, n_workers = [], self._site.n_workers
        for number, panel in enumerate(self._panels):
            tiles = tuple(index for index in panel if action.wants(self.matrix, index))
            if tiles:
                walks.append(_Walk(number, tiles, self._is_kept(number, n_workers)))
        order, waiting = deque(walk.number for walk in walks), dict[int, list[Piece]]()

        def receive(walk: _Walk, pieces: list[Piece]) -> None:
            waiting[walk.number] = pieces
            while order and order[0] in waiting:
                for piece in waiting.pop(order.popleft()):
                    take(*piece)

        task = _PanelTask(self.matrix, action, self._cache_bytes, self._device)
        self._site.each(task, walks, "kernel-product", receive, near=lambda walk: walk.number)

    def _is_kept(self, number: int, n_workers: int) -> bool:
        """Whether a panel stays in its worker's cache: the first ones of every worker do, as many as fit, for every product.

        Panels go round the workers. A cache that took every panel in turn, too small for all, would have dropped each one before it is
        needed again.
        """
        return (number // n_workers + 1) * PANEL_BYTES <= self._cache_bytes

    @contextlib.contextmanager
    def _carried(self, v: np.ndarray) -> Iterator[Any]:
        """v as tasks take it: itself when they run here or it is small, else the url of a state that lives for one product."""
        if self._site.client is None or v.nbytes <= TASK_BYTES // 2:
            yield v
            return
        path = Path(self.matrix.url)
        folder = path.with_name(f"{path.name}.vectors") / uuid4().hex
        try:
            yield save_state(folder, {"v": v})
        finally:
            remove(folder)
            with contextlib.suppress(OSError):  # another product's vectors are there
                folder.parent.rmdir()

    def _rows(self, block: int) -> slice:
        size = self.matrix.tile_shape[0]
        return slice(block * size, min((block + 1) * size, self.shape[0]))

    def _require_square(self, name: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise InputError(f"{self.matrix.url} is {self.shape}: {name} is for square matrices.")

    def _require_scale(self, scale: np.ndarray) -> np.ndarray:
        self._require_square("scale")
        scale = np.asarray(to_host(scale, "scale"), np.float64)
        if scale.shape != self.shape[:1] or not np.isfinite(scale).all() or (scale < 0).any():
            raise InputError(
                f"scale has shape {scale.shape} and least value {scale.min(initial=np.inf):g}; "
                f"expected ({self.shape[0]},) finite numbers >= 0."
            )
        return scale
