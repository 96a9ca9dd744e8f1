"""The stages of an ensemble's prediction over a client or a loop: decompose once, predict tile by tile, fill the covariance.

In a folder every stage is kept: record.json and state/ (the decomposition), predictions/<digest of what was asked>/ with values,
covariance, and factors while the covariance is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry, threads
from ntkdask.execution.map_reduce import map_tiles
from ntkdask.execution.progress import Listener, Record
from ntkdask.execution.window import Done
from ntkdask.files import exclusive, remove
from ntkdask.planning.tiles import TileGrid, row_tiles
from ntkdask.solvers.gradient_flow import GradientFlow
from ntkdask.states import content_digest, load_state, save_state
from ntkdask.store import Receipt, TileStore
from ntkdask.workflows.ensemble.kernels import Kernels
from ntkdask.workflows.ensemble.plan import EnsemblePlan, Training
from ntkdask.workflows.ensemble.tasks import CovarianceTask, FactoriseTask, Fitted, PredictTask


@dataclass(frozen=True, eq=False)
class EnsemblePrediction:
    """mean (T, m, k), variance (T, m), covariance (T, m, m), float64, one entry a time; None where not asked for.

    The targets share one covariance: outputs of a wide network are independent. NumPy arrays, or dask arrays over stored tiles where
    a url was given. diag_reg: r as it was added. unlearned: share of the targets' squares in directions that training never reaches:
    over 0 when duplicate rows have different targets, or the kernel is singular to rounding.
    """

    times: tuple[float, ...]
    mean: Any
    variance: Any
    covariance: Any
    diag_reg: float
    unlearned: float
    url: str | None


@dataclass(frozen=True, eq=False)
class EnsembleRun:
    """One prediction: what is asked, what kernels are read from, sizes, rows to predict (training_rows: those of the training set).

    build: gives what Θ_DD and K_DD are read from, when a decomposition is needed. times: of the flow on the summed loss. folder: None
    keeps everything in this process.
    """

    training: Training
    kernels: Kernels
    build: Callable[[], Kernels]
    sizes: EnsemblePlan
    times: tuple[float, ...]
    n_rows: int
    training_rows: bool
    folder: Path | None
    client: Any
    listener: Listener

    def predict(self, y: np.ndarray, identity: dict[str, Any], tested: Any) -> EnsemblePrediction:
        """Predictions from targets (n, k) float64. identity, tested: what decides the decomposition, and the test rows, in JSON."""
        identity = {**identity, "targets": content_digest(y)}
        if self.folder is None:
            fitted, unlearned = self._fit(y, Record())
            return EnsemblePrediction(self.training.times, *self._in_memory(fitted), fitted.reg, unlearned, None)
        with exclusive(self.folder):
            fitted, unlearned = self._fit(y, Record.open(self.folder, identity))
            asked = {**asdict(self.training), "times": [repr(t) for t in self.training.times], "tested": tested}
            home, outputs = self._in_folder(fitted, y.shape[1], {**identity, **asked})
            return EnsemblePrediction(self.training.times, *outputs, fitted.reg, unlearned, str(home))

    def _fit(self, y: np.ndarray, record: Record) -> tuple[Fitted, float]:
        """(what predictions start from, share of the targets' squares that is not learned)."""
        if self.folder is None:
            flow, coefficients = self._factorise(y, None)
            light, q = flow, coefficients
        else:
            root = self.folder / "state"
            flow, coefficients = record.once(
                "flow", lambda: list(self._factorise(save_state(root, {"targets": y}), str(root)))
            )
            arrays, attributes = load_state(coefficients)
            # without its modes, which the driver never reads
            light = GradientFlow(arrays["eigenvalues"], np.empty((0, 0)), None, float(attributes["noise"]))
            q = arrays["coefficients"]
        light = light.regularised(self.training.diag_reg, self.training.absolute)
        n = self.kernels.n
        nbytes = 8 * n * (n * (1 if self.training.last_layer else 2) + q.shape[1] + 2)
        return Fitted(flow, coefficients, light.reg, self.sizes.device, nbytes), light.unlearned(q)

    def _factorise(self, y: np.ndarray | str, root: str | None) -> tuple[Any, Any]:
        task = FactoriseTask(self.build(), y, root, self.sizes.device)
        self.listener.stage("factorise", 1)
        return self._map(task, [0], "factorise", self.sizes.solve_threads)[0]

    def _in_memory(self, fitted: Fitted) -> tuple[Any, Any, Any]:
        """(mean, variance, covariance) in this process's memory."""
        tiles = row_tiles(self.n_rows, self.sizes.tile_rows)
        self.listener.stage("predict", len(tiles))
        found = self._map(self._predict_task(fitted, None, None), tiles, "predict", self.sizes.threads)
        mean, variance = self._split(np.concatenate([f[0] for f in found], axis=1))
        if self.training.output != "covariance":
            return mean, variance, None
        factors = np.concatenate([f[1] for f in found], axis=1)
        grid = list(self._grid())
        self.listener.stage("covariance-tile", len(grid))
        task = CovarianceTask(self.kernels, factors, self.training_rows, None)
        covariance = np.empty((len(self.times), self.n_rows, self.n_rows))
        for tile, (block,) in zip(grid, self._map(task, grid, "covariance-tile", self.sizes.threads), strict=True):
            covariance[:, tile.start : tile.stop, tile.col_start : tile.col_stop] = block
            covariance[:, tile.col_start : tile.col_stop, tile.start : tile.stop] = block.transpose(0, 2, 1)
        return mean, variance, covariance

    def _in_folder(self, fitted: Fitted, k: int, fingerprint: dict[str, Any]) -> tuple[Path, tuple[Any, Any, Any]]:
        """(folder of these predictions, dask arrays over their tiles)."""
        assert self.folder is not None
        import dask.array as da

        home = self.folder / "predictions" / registry.digest(fingerprint)
        columns, rows = k + (self.training.output != "mean"), self.sizes.tile_rows
        values = self._store(home / "values", (self.n_rows, columns), (rows, columns), fingerprint)
        covariance = None
        if self.training.output == "covariance":
            covariance = self._store(home / "covariance", (self.n_rows, self.n_rows), (rows, rows), fingerprint)
            self._fill(fitted, values, covariance, home / "factors", fingerprint)
        else:
            self._predict_tiles(fitted, [values])
        mean, variance = self._split(da.from_zarr(values.zarr_array()))
        return home, (mean, variance, None if covariance is None else da.from_zarr(covariance.zarr_array()))

    def _fill(
        self, fitted: Fitted, values: TileStore, covariance: TileStore, path: Path, fingerprint: dict[str, Any]
    ) -> None:
        """Predictions with their factors, then the covariance from these, which are dropped when it is there."""
        waiting = set(covariance.pending())
        if not waiting and not values.pending():
            return
        width = 2 * self.kernels.n
        factors = self._store(path, (self.n_rows, width), (self.sizes.tile_rows, width), fingerprint)
        self._predict_tiles(fitted, [values, factors])
        task = CovarianceTask(self.kernels, str(factors.path), self.training_rows, str(covariance.path))
        grid = list(self._grid())
        tiles = [t for t in grid if waiting & {(0, *t.index), (0, *t.index[::-1])}]
        self.listener.stage("covariance-tile", len(grid), len(grid) - len(tiles))
        self._map(task, tiles, "covariance-tile", self.sizes.threads, [covariance, covariance])
        remove(factors.path)

    def _store(
        self, path: Path, shape: tuple[int, int], tile: tuple[int, int], fingerprint: dict[str, Any]
    ) -> TileStore:
        """A store (T, *shape) in tiles of every time at once."""
        count = len(self.times)
        tile_shape = (count, min(shape[0], tile[0]), min(shape[1], tile[1]))
        return TileStore.create(
            path, shape=(count, *shape), tile_shape=tile_shape, dtype="float64", fingerprint=fingerprint
        )

    def _predict_tiles(self, fitted: Fitted, stores: list[TileStore]) -> None:
        """The row tiles that are pending in any of the stores: values, and factors where they are wanted."""
        pending = {index[1] for store in stores for index in store.pending()}
        tiles = row_tiles(self.n_rows, self.sizes.tile_rows)
        wanted = [t for t in tiles if t.index[0] in pending]
        self.listener.stage("predict", len(tiles), len(tiles) - len(wanted))
        urls = [str(store.path) for store in stores]
        self._map(self._predict_task(fitted, *[*urls, None][:2]), wanted, "predict", self.sizes.threads, stores)

    def _predict_task(self, fitted: Fitted, url: str | None, factors_url: str | None) -> PredictTask:
        factors = factors_url is not None or (url is None and self.training.output == "covariance")
        return PredictTask(
            fitted,
            self.kernels,
            self.times,
            self.training_rows,
            self.training.output != "mean",
            factors,
            url,
            factors_url,
        )

    def _map(
        self, task: Any, tiles: list[Any], label: str, n_threads: int | None, stores: Sequence[TileStore] = ()
    ) -> list[Any]:
        """What the tasks return, in the order of the tiles; receipts are recorded in `stores`, one each."""
        found: dict[Any, Any] = {}

        def receive(tile: Any, done: Done) -> None:
            found[tile] = done.value
            # a tile on the diagonal has one receipt for two stores
            for store, r in zip(stores, done.value, strict=False):
                store.record(Receipt(r.index, r.checksum, done.seconds, done.peak_bytes, done.worker))
            self.listener.task(label, done)

        n_threads = n_threads or (threads.current() if self.client is None else None)
        map_tiles(task, tiles, self.client, label=label, receive=receive, threads=n_threads)
        return [found[tile] for tile in tiles]

    def _grid(self) -> TileGrid:
        rows = self.sizes.tile_rows
        return TileGrid(self.n_rows, self.n_rows, rows, rows, symmetric=True)

    def _split(self, values: Any) -> tuple[Any, Any]:
        """(mean, variance or None) of (T, m, k) or (T, m, k + 1)."""
        return (values, None) if self.training.output == "mean" else (values[:, :, :-1], values[:, :, -1])
