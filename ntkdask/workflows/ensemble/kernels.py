"""Where an ensemble's predictions read kernels: evaluated where they are used, or from the tiles of stored matrices.

Called by `tasks.py` on the workers; `predict.py` and `converged.py` make them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """Kernels of a network, evaluated where they are used.

    Parameters
    ----------
    network : Network
        Whose NTK is Θ and whose NNGP kernel is K.
    last_layer : bool
        Whether the last layer alone is trained: then K takes the place of Θ.
    train : FeatureStream
        Training rows.
    test : FeatureStream or None
        Rows to predict. None: the training rows.
    width : int
        Training rows that are met at a time.
    """

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
        """See Kernels; one triangle is evaluated in tiles and mirrored."""
        xp = np
        theta: Array = None
        prior: Array = None
        for tile in TileGrid(self.n, self.n, self.width, self.width, symmetric=True):
            x = self.train.selected_rows(tile.start, tile.stop, "x_train")
            on_diagonal = tile.start == tile.col_start
            y = None if on_diagonal else self.train.selected_rows(tile.col_start, tile.col_stop, "x_train")
            parts = self._parts(x, y)
            if theta is None:
                xp = namespace(x)
                theta = xp.empty((self.n, self.n))
                prior = None if self.last_layer else xp.empty((self.n, self.n))
            for matrix, part in zip((theta, prior), parts, strict=True):
                if part is not None:
                    matrix[tile.start : tile.stop, tile.col_start : tile.col_stop] = part
                    matrix[tile.col_start : tile.col_stop, tile.start : tile.stop] = part.T
        return theta, prior

    def blocks(self, tile: Tile) -> Iterator[tuple[int, Array, Array | None]]:
        """See Kernels."""
        x = self._predicted_rows(tile)
        for start in range(0, self.n, self.width):
            y = self.train.selected_rows(start, min(start + self.width, self.n), "x_train")
            yield start, *self._parts(x, y)

    def diagonal(self, tile: Tile) -> Array:
        """See Kernels."""
        return NNGP(self.network).diagonal(self._predicted_rows(tile)).astype(np.float64)

    def between(self, left: Tile, right: Tile) -> Array:
        """See Kernels."""
        x = self._predicted_rows(left)
        return NNGP(self.network)(x, None if left == right else self._predicted_rows(right)).astype(np.float64)

    def _parts(self, x: Array, y: Array | None) -> tuple[Array, Array | None]:
        """(Θ, K or None) of rows x with rows y."""
        if self.last_layer:
            return NNGP(self.network)(x, y), None
        k, theta = both(self.network, x, y)
        return theta, k

    def _predicted_rows(self, tile: Tile) -> Array:
        """Preprocessed rows of a tile of those to predict."""
        if self.test is None:
            return self.train.selected_rows(tile.start, tile.stop, "x_train")
        return self.test.selected_rows(tile.start, tile.stop, "x_test")


@dataclass(frozen=True, eq=False)
class StoredKernels:
    """Kernels in tile stores.

    Parameters
    ----------
    theta_dd : StoredMatrix
        Θ of the training rows, (n, n).
    k_dd : StoredMatrix or None
        K of the training rows. None: Θ is the prior, too.
    theta_td : StoredMatrix or None
        Θ of test with training rows, (m, n). None: the training rows are predicted.
    k_td : StoredMatrix or None
        K of test with training rows. None as for k_dd.
    nngp_tt : StoredMatrix, array (m,) float64, str or None
        K of the test rows: the matrix (m, m), its diagonal, the url of a state that holds the diagonal, or None for means alone.
    width : int
        Training rows that are read at a time.
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
            block = slice(tile.start, tile.stop), slice(start, min(start + self.width, self.n))
            yield start, self.theta_td[block], None if self.k_td is None else self.k_td[block]

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

    def for_tasks(self, states: Path) -> StoredKernels:
        """The same kernels as tasks carry them: an array of the diagonal goes to a state in the folder `states`."""
        if not isinstance(self.nngp_tt, np.ndarray):
            return self
        return replace(self, nngp_tt=save_state(states, {"diagonal": self.nngp_tt}))


@dataclass(frozen=True)
class EnsembleMatrices:
    """Urls of the stored matrices (`kernel_matrix`) that an ensemble is predicted from.

    Parameters
    ----------
    nngp_dd : str or path
        NNGP kernel of the training rows, (n, n).
    ntk_dd : str, path or None
        NTK of the training rows, (n, n). Needed for kind "ntk" alone.
    nngp_td : str, path or None
        NNGP kernel of test with training rows, (m, n). None: the training rows are predicted.
    ntk_td : str, path or None
        NTK of test with training rows, (m, n). Needed for kind "ntk", where nngp_td is given.
    nngp_tt : str, path, array (m,) or None
        NNGP kernel of the test rows, (m, m); for variances its diagonal as an array will do, for means nothing.
    """

    nngp_dd: str | os.PathLike[str]
    ntk_dd: str | os.PathLike[str] | None = None
    nngp_td: str | os.PathLike[str] | None = None
    ntk_td: str | os.PathLike[str] | None = None
    nngp_tt: str | os.PathLike[str] | np.ndarray | None = None


def open_matrices(matrices: EnsembleMatrices, training: Training, plan: Plan) -> tuple[StoredKernels, list[str]]:
    """(kernels, digests of the matrices: two of the training rows, three of the test rows); InputError where shapes disagree."""
    names = ["nngp_dd", "nngp_td"] + ([] if training.last_layer else ["ntk_dd", "ntk_td"])
    urls = {name: getattr(matrices, name) for name in names}
    if not training.last_layer and (urls["ntk_dd"] is None or (urls["ntk_td"] is None) != (urls["nngp_td"] is None)):
        raise InputError(
            'kind "ntk" takes ntk_dd beside nngp_dd, and ntk_td beside nngp_td. For the posterior give kind="nngp".'
        )
    opened = {name: None if url is None else StoredMatrix.open(url) for name, url in urls.items()}
    k_dd, k_td = opened["nngp_dd"], opened["nngp_td"]
    assert k_dd is not None
    for name, matrix in opened.items():
        expected = k_dd.shape[:1] * 2 if name.endswith("dd") else (k_td.shape[0] if k_td else 0, k_dd.shape[0])
        if matrix is not None and matrix.shape != expected:
            raise InputError(f"{name} has shape {matrix.shape}; beside the other matrices it must be {expected}.")
    nngp_tt, digest = _test_prior(matrices.nngp_tt, k_td, training)
    last_layer = training.last_layer
    kernels = StoredKernels(
        k_dd if last_layer else opened["ntk_dd"],  # type: ignore[arg-type]
        None if last_layer else k_dd,
        k_td if last_layer else opened["ntk_td"],
        None if last_layer else k_td,
        nngp_tt,
        plan.tile_cols or min(k_dd.shape[0], WIDTH),
    )
    tokens = [
        "" if matrix is None else matrix.token
        for matrix in (kernels.theta_dd, kernels.k_dd, kernels.theta_td, kernels.k_td)
    ]
    return kernels, [*tokens, digest]


def _test_prior(nngp_tt: Any, k_td: StoredMatrix | None, training: Training) -> tuple[Any, str]:
    """(nngp_tt as a StoredMatrix, an array of its diagonal or None, its digest)."""
    if k_td is None or training.output == "mean":
        return None, ""
    m = k_td.shape[0]
    if isinstance(nngp_tt, (str, os.PathLike)):
        matrix = StoredMatrix.open(nngp_tt)
        if matrix.shape != (m, m):
            raise InputError(f"nngp_tt has shape {matrix.shape} for {m} test rows; expected {(m, m)}.")
        return matrix, matrix.token
    diagonal = None if nngp_tt is None else np.asarray(to_host(as_array(nngp_tt)), np.float64)
    if training.output == "covariance" or diagonal is None or diagonal.shape != (m,):
        given = "nothing" if diagonal is None else f"an array of shape {diagonal.shape}"
        raise InputError(
            f'output="{training.output}" takes nngp_tt, the url of the NNGP of the {m} test rows (for variances alone, its '
            f"diagonal ({m},) will do), but got {given}."
        )
    return diagonal, content_digest(diagonal)
