"""What an ensemble's predictions read kernels from: evaluated where they are used, or tiles of stored matrices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ntkdask.arrays import Array, as_array, namespace, to_host
from ntkdask.errors import InputError
from ntkdask.kernels import NNGP, both
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.networks import Network
from ntkdask.planning.tiles import Plan, Tile, TileGrid
from ntkdask.states import content_digest, load_state, save_state
from ntkdask.workflows.ensemble.plan import WIDTH, Training
from ntkdask.workflows.stream import FeatureStream


class Kernels(Protocol):
    """Kernels between training and test rows; Θ is the kernel that trains, K the prior where that is another one."""

    @property
    def n(self) -> int:
        """Training rows."""

    def training(self) -> tuple[Array, Array | None]:
        """(Θ_DD, K_DD or None), float64, free to be overwritten."""

    def blocks(self, tile: Tile) -> Iterator[tuple[int, Array, Array | None]]:
        """(first training row, Θ_TD, K_TD or None) of a tile of test rows, in blocks of training rows."""

    def diagonal(self, tile: Tile) -> Array:
        """The prior's variance K(t, t) of a tile of test rows."""

    def between(self, left: Tile, right: Tile) -> Array:
        """The prior's covariance K of two tiles of test rows; of training rows where there are no test rows."""


@dataclass(frozen=True, eq=False)
class ComputedKernels:
    """Kernels of a network, evaluated `width` columns at a time. test None: the training rows; last_layer: K trains itself."""

    network: Network
    last_layer: bool
    train: FeatureStream
    test: FeatureStream | None
    width: int

    @property
    def n(self) -> int:
        """Training rows."""
        return self.train.rows.n_total

    def training(self) -> tuple[Array, Array | None]:
        """One triangle of tiles, mirrored; see Kernels."""
        xp = np
        theta: Array = None
        prior: Array = None
        for tile in TileGrid(self.n, self.n, self.width, self.width, symmetric=True):
            x = self._rows(self.train, tile.start, tile.stop, "x_train")
            on_diagonal = tile.start == tile.col_start
            y = None if on_diagonal else self._rows(self.train, tile.col_start, tile.col_stop, "x_train")
            parts = self._parts(x, y)
            if theta is None:
                xp = namespace(x)
                theta = xp.empty((self.n, self.n))
                prior = None if self.last_layer else xp.empty((self.n, self.n))
            for whole, part in zip((theta, prior), parts, strict=True):
                if part is not None:
                    whole[tile.start : tile.stop, tile.col_start : tile.col_stop] = part
                    whole[tile.col_start : tile.col_stop, tile.start : tile.stop] = part.T
        return theta, prior

    def blocks(self, tile: Tile) -> Iterator[tuple[int, Array, Array | None]]:
        """See Kernels."""
        x = self._tested(tile)
        for start in range(0, self.n, self.width):
            y = self._rows(self.train, start, min(start + self.width, self.n), "x_train")
            yield start, *self._parts(x, y)

    def diagonal(self, tile: Tile) -> Array:
        """See Kernels."""
        return NNGP(self.network).diagonal(self._tested(tile)).astype(np.float64)

    def between(self, left: Tile, right: Tile) -> Array:
        """See Kernels."""
        x = self._tested(left)
        return NNGP(self.network)(x, None if left == right else self._tested(right)).astype(np.float64)

    def _parts(self, x: Array, y: Array | None) -> tuple[Array, Array | None]:
        """(Θ, K or None) of rows x with rows y."""
        if self.last_layer:
            return NNGP(self.network)(x, y), None
        k, theta = both(self.network, x, y)
        return theta, k

    def _tested(self, tile: Tile) -> Array:
        if self.test is None:
            return self._rows(self.train, tile.start, tile.stop, "x_train")
        return self._rows(self.test, tile.start, tile.stop, "x_test")

    @staticmethod
    def _rows(stream: FeatureStream, start: int, stop: int, name: str) -> Array:
        return stream.selected_rows(start, stop, name)


@dataclass(frozen=True, eq=False)
class StoredKernels:
    """Kernels in tile stores, read `width` columns at a time: Θ_DD, K_DD or None, Θ_TD, K_TD or None, K_TT or its diagonal.

    nngp_tt: a symmetric matrix; its diagonal, or the url of a state that holds it; or None for means alone.
    """

    theta_dd: StoredMatrix
    k_dd: StoredMatrix | None
    theta_td: StoredMatrix | None
    k_td: StoredMatrix | None
    nngp_tt: StoredMatrix | np.ndarray | str | None
    width: int

    @property
    def n(self) -> int:
        """Training rows."""
        return self.theta_dd.shape[0]

    def training(self) -> tuple[Array, Array | None]:
        """See Kernels."""
        return self.theta_dd.read(), None if self.k_dd is None else self.k_dd.read()

    def blocks(self, tile: Tile) -> Iterator[tuple[int, Array, Array | None]]:
        """See Kernels."""
        assert self.theta_td is not None
        for start in range(0, self.n, self.width):
            where = slice(tile.start, tile.stop), slice(start, min(start + self.width, self.n))
            yield start, self.theta_td[where], None if self.k_td is None else self.k_td[where]

    def diagonal(self, tile: Tile) -> Array:
        """See Kernels."""
        if isinstance(self.nngp_tt, str):
            return load_state(self.nngp_tt)[0]["diagonal"][tile.start : tile.stop]
        if isinstance(self.nngp_tt, np.ndarray):
            return self.nngp_tt[tile.start : tile.stop]
        return np.diagonal(self.between(tile, tile))

    def between(self, left: Tile, right: Tile) -> Array:
        """See Kernels."""
        matrix = self.nngp_tt if self.theta_td is not None else (self.k_dd or self.theta_dd)
        if not isinstance(matrix, StoredMatrix):
            raise InputError("the covariance of test rows needs their NNGP matrix: give nngp_tt, or ask for less.")
        return matrix[left.start : left.stop, right.start : right.stop].astype(np.float64)


@dataclass(frozen=True)
class EnsembleMatrices:
    """Urls of stored matrices (`kernel_matrix`): the NNGP and NTK of training rows (n, n), of test with training rows (m, n), and the
    NNGP of the test rows (m, m), or its diagonal as an array (m,).

    The NTK is needed for kind "ntk" alone. Without test matrices the predictions are of the training rows.
    """

    nngp_dd: str | os.PathLike[str]
    ntk_dd: str | os.PathLike[str] | None = None
    nngp_td: str | os.PathLike[str] | None = None
    ntk_td: str | os.PathLike[str] | None = None
    nngp_tt: str | os.PathLike[str] | np.ndarray | None = None


def open_matrices(
    matrices: EnsembleMatrices, training: Training, folder: Path | None, plan: Plan
) -> tuple[StoredKernels, list[str]]:
    """(kernels, digests of the matrices: training's two, test's three) with shapes that agree."""
    wanted = ["nngp_dd", "nngp_td"] + ([] if training.last_layer else ["ntk_dd", "ntk_td"])
    urls = {name: getattr(matrices, name) for name in wanted}
    if not training.last_layer and (urls["ntk_dd"] is None or (urls["ntk_td"] is None) != (urls["nngp_td"] is None)):
        raise InputError(
            'kind "ntk" takes ntk_dd beside nngp_dd, and ntk_td beside nngp_td. For the posterior give kind="nngp".'
        )
    found = {name: None if url is None else StoredMatrix.open(url) for name, url in urls.items()}
    k_dd, k_td = found["nngp_dd"], found["nngp_td"]
    assert k_dd is not None
    for name, matrix in found.items():
        expected = k_dd.shape[:1] * 2 if name.endswith("dd") else (k_td.shape[0] if k_td else 0, k_dd.shape[0])
        if matrix is not None and matrix.shape != expected:
            raise InputError(f"{name} has shape {matrix.shape}; beside the other matrices it must be {expected}.")
    nngp_tt, digest = _test_prior(matrices.nngp_tt, k_td, training, folder)
    last = training.last_layer
    kernels = StoredKernels(
        k_dd if last else found["ntk_dd"],  # type: ignore[arg-type]
        None if last else k_dd,
        k_td if last else found["ntk_td"],
        None if last else k_td,
        nngp_tt,
        plan.tile_cols or min(k_dd.shape[0], WIDTH),
    )
    tokens = [
        "" if matrix is None else matrix.token
        for matrix in (kernels.theta_dd, kernels.k_dd, kernels.theta_td, kernels.k_td)
    ]
    return kernels, [*tokens, digest]


def _test_prior(given: Any, k_td: StoredMatrix | None, training: Training, folder: Path | None) -> tuple[Any, str]:
    """(nngp_tt as `StoredKernels` takes it, its digest)."""
    if k_td is None or training.output == "mean":
        return None, ""
    m = k_td.shape[0]
    if isinstance(given, (str, os.PathLike)):
        matrix = StoredMatrix.open(given)
        if matrix.shape != (m, m):
            raise InputError(f"nngp_tt has shape {matrix.shape} for {m} test rows; expected {(m, m)}.")
        return matrix, matrix.token
    diagonal = None if given is None else np.asarray(to_host(as_array(given)), np.float64)
    if training.output == "covariance" or diagonal is None or diagonal.shape != (m,):
        found = "nothing" if diagonal is None else f"an array of shape {diagonal.shape}"
        raise InputError(
            f'output="{training.output}" takes nngp_tt, the url of the NNGP of the {m} test rows (for variances alone, its '
            f"diagonal ({m},) will do), but got {found}."
        )
    digest = content_digest(diagonal)
    return diagonal if folder is None else save_state(folder / "state", {"diagonal": diagonal}), digest
