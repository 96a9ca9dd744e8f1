"""The tasks of an ensemble's prediction: decompose, predict a tile of test rows, fill a tile of their covariance.

They read kernels from a `ComputedKernels`, which evaluates a network where the entries are used and stores nothing, or from a
`StoredKernels`, which reads matrices. Called by `run.py`, which schedules them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array, to_device, to_host
from ntkdask.cache import shared
from ntkdask.planning.tiles import Tile
from ntkdask.solvers.gradient_flow import GradientFlow, covariance_block
from ntkdask.states import load_state, save_state
from ntkdask.store import Receipt, TileStore
from ntkdask.workflows.ensemble.kernels import Kernels


@dataclass(frozen=True, eq=False)
class Fitted:
    """What predictions start from: the decomposition, in this process or as the urls of its states, and the ridge.

    Parameters
    ----------
    flow : GradientFlow or str
        The eigendecomposition of Θ_DD.
    coefficients : array (n, k), float64, or str
        UᵀY.
    reg : float
        The ridge r, absolute.
    device : bool
        Whether tasks compute on their worker's GPU.
    nbytes : int
        Bytes of the stored flow, which a process keeps between tiles.
    """

    flow: Any
    coefficients: Any
    reg: float = 0.0
    device: bool = False
    nbytes: int = 0

    def load(self) -> tuple[GradientFlow, Array]:
        """(flow, UᵀY) on the device of the task; read once per process."""
        if isinstance(self.coefficients, str):
            flow, coefficients = self._read(str(self.flow)), load_state(self.coefficients)[0]["coefficients"]
        else:
            flow, coefficients = self.flow, self.coefficients
        return flow.regularised(self.reg), to_device(coefficients, self.device)

    def _read(self, url: str) -> GradientFlow:
        shared.reserve(self.nbytes)
        if not self.device:
            return GradientFlow.from_state(*load_state(url))
        return shared.get(("flow", url), lambda: GradientFlow.from_state(*load_state(url, keep=False), device=True))


@dataclass(frozen=True, eq=False)
class FactoriseTask:
    """Eigendecomposition of Θ_DD, and UᵀY: stored in the folder `states`, and their two urls returned, or (None) returned whole."""

    kernels: Kernels
    targets: np.ndarray | str
    states: str | None
    device: bool

    def __call__(self, _: Any) -> Any:
        """(flow or its url, coefficients or their url)."""
        theta, prior = self.kernels.training()
        theta = to_device(theta, self.device)
        flow = GradientFlow.factorise(theta, None if prior is None else to_device(prior, self.device), overwrite=True)
        del theta, prior
        targets = load_state(self.targets)[0]["targets"] if isinstance(self.targets, str) else self.targets
        coefficients = to_host(flow.coefficients(to_device(targets, self.device)))
        if self.states is None:
            return flow, coefficients
        url = save_state(self.states, *flow.to_state())
        # the spectrum again, without the modes: the driver needs it for the ridge and for the share that is not learned
        small = {"coefficients": coefficients, "eigenvalues": to_host(flow.eigenvalues)}
        return url, save_state(self.states, small, {"noise": flow.noise})


@dataclass(frozen=True, eq=False)
class PredictTask:
    """Predictions of one tile of rows at every time: (T, rows, k), or with the variance as last column (T, rows, k + 1).

    Parameters
    ----------
    fitted : Fitted
        The decomposition.
    kernels : Kernels
        Kernels of the rows with the training rows.
    times : tuple of float
        Of the flow on the summed loss.
    training_rows : bool
        Whether the rows are of the training set.
    with_variance : bool
        Whether the variance is computed.
    with_factors : bool
        Whether a and b, the factors of the covariance, are given as well, side by side: (T, rows, 2n).
    url : str or None
        The store of predictions. None: arrays are returned instead of receipts.
    factors_url : str or None
        The store of factors.
    """

    fitted: Fitted
    kernels: Kernels
    times: tuple[float, ...]
    training_rows: bool
    with_variance: bool
    with_factors: bool
    url: str | None
    factors_url: str | None

    def __call__(self, tile: Tile) -> tuple[Any, ...]:
        """Receipts or arrays: of the predictions, and of the factors where they are asked for."""
        started = time.perf_counter()
        flow, q = self.fitted.load()
        flow.require_consistent(q, self.times)
        rows = slice(tile.start, tile.stop)
        if self.training_rows:
            mean = to_host(flow.training_mean(rows, q, self.times))
            pairs = (flow.training_factors(rows, t) for t in self.times)
        else:
            z, w = self._project(flow, tile)
            mean = to_host(flow.mean_of(z, q, self.times))
            pairs = (flow.factors(z, w, t) for t in self.times)
        results = [mean]
        if self.with_variance:
            base = 0.0 if self.training_rows else to_device(self.kernels.diagonal(tile), self.fitted.device)
            variance, factors = self._second_moments(flow, pairs, base)
            results = [np.concatenate([mean, variance], axis=2), *factors]
        if self.url is None:
            return tuple(results)
        urls, index = (self.url, self.factors_url), (0, tile.index[0], 0)
        return tuple(TileStore.open(str(u)).commit(index, r, started) for u, r in zip(urls, results, strict=False))

    def _project(self, flow: GradientFlow, tile: Tile) -> tuple[Array, Array]:
        """(Θ_TD·U, K_TD·U); the former twice where K is Θ, and where no variance is computed."""
        z: Array = None
        w: Array = None
        for start, theta, k in self.kernels.blocks(tile):
            part = flow.project(to_device(theta, self.fitted.device), start)
            z = part if z is None else _added(z, part)
            if k is not None and self.with_variance:
                part = flow.project(to_device(k, self.fitted.device), start)
                w = part if w is None else _added(w, part)
        return z, z if w is None else w

    def _second_moments(
        self, flow: GradientFlow, pairs: Iterable[tuple[Array, Array]], base: Array
    ) -> tuple[Array, list]:
        """(variance (T, rows, 1), [factors (T, rows, 2n)] or []) from the pairs (a, b) of one time after the other."""
        variance, factors = [], []
        for a, b in pairs:
            variance.append(to_host(flow.variance_of([(a, b)], base))[0])
            if self.with_factors:
                factors.append(np.concatenate([to_host(a), to_host(b)], axis=1))
        return np.stack(variance)[:, :, None], [np.stack(factors)] if factors else []


@dataclass(frozen=True, eq=False)
class CovarianceTask:
    """The covariance of two tiles of rows (i, j), j <= i, at every time, (T, rows_i, rows_j), from the factors.

    They are an array (T, m, 2n) or the url of their store. url: the store of the covariance; None returns the block.
    """

    kernels: Kernels
    factors: np.ndarray | str
    training_rows: bool
    url: str | None

    def __call__(self, tile: Tile) -> tuple[Any, ...]:
        """The block alone, or receipts of it and, off the diagonal, of its mirror image."""
        started = time.perf_counter()
        i, j = tile.index
        left, right = Tile((i,), tile.start, tile.stop), Tile((j,), tile.col_start, tile.col_stop)
        base = 0.0 if self.training_rows else to_host(self.kernels.between(left, right))
        first = self._read(left)
        second = first if i == j else self._read(right)
        n = first.shape[2] // 2
        pairs = [[(f[:, :n], f[:, n:]) for f in part] for part in ((first,) if i == j else (first, second))]
        block = np.stack([covariance_block(base, a, b) for a, b in zip(pairs[0], pairs[-1], strict=True)])
        if self.url is None:
            return (block,)
        store = TileStore.open(self.url)
        receipts: list[Receipt] = [store.commit((0, i, j), block, started)]
        if i != j:
            receipts.append(store.commit((0, j, i), np.ascontiguousarray(block.transpose(0, 2, 1)), started))
        return tuple(receipts)

    def _read(self, rows: Tile) -> np.ndarray:
        """Factors of a tile of rows, (T, rows, 2n)."""
        if isinstance(self.factors, str):
            return TileStore.open(self.factors).read((0, rows.index[0], 0))
        return self.factors[:, rows.start : rows.stop]


def _added(total: Array, part: Array) -> Array:
    """`total` after `part` was added in place."""
    total += part
    return total
