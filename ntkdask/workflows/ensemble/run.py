"""The stages of an ensemble's prediction: decompose once, predict tile by tile, fill the covariance.

In a folder every stage is kept: record.json and state/ (the decomposition), predictions/<digest of what was asked>/ with values,
covariance, and factors while the covariance is filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.execution.progress import Record
from ntkdask.execution.site import Site
from ntkdask.files import exclusive, remove
from ntkdask.matrices.stored import lazy_array
from ntkdask.planning.tiles import TileGrid, row_tiles
from ntkdask.solvers.gradient_flow import GradientFlow
from ntkdask.states import content_digest, load_state, save_state
from ntkdask.store import TileStore
from ntkdask.workflows.ensemble.kernels import Kernels
from ntkdask.workflows.ensemble.plan import EnsemblePlan, Training
from ntkdask.workflows.ensemble.tasks import CovarianceTask, FactoriseTask, Fitted, PredictTask


@dataclass(frozen=True, eq=False)
class EnsemblePrediction:
    """Mean and uncertainty of an ensemble, one entry for each time; None for what was not asked for.

    Parameters
    ----------
    times : tuple of float
        The T training times, as they were given.
    mean : array (T, m, k), float64
        NumPy, or a dask array over stored tiles where a url was given, as the two that follow.
    variance : array (T, m), float64, or None
        Of each row. The targets share it: outputs of a wide network are independent.
    covariance : array (T, m, m), float64, or None
        Between the rows, shared by the targets, too.
    diag_reg : float
        The ridge r as it was added to the diagonal.
    unlearned : float
        Share of the targets' squares in directions that training never reaches: above 0 when duplicate rows have different targets,
        or the kernel is singular to rounding.
    url : str or None
        The folder of these predictions.
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
    """One prediction of an ensemble, to be run by `predict`.

    Parameters
    ----------
    training : Training
        What is asked.
    kernels : Kernels
        What the tasks that predict read kernels from.
    build : function without arguments
        Gives what Θ_DD and K_DD are read from. Called when a decomposition is needed.
    sizes : EnsemblePlan
        Sizes of the tasks, their threads and device.
    times : tuple of float
        Of the flow on the summed loss.
    n_rows : int
        Rows to predict.
    training_rows : bool
        Whether they are the training rows.
    site : Site
        Where stages run. Without a folder everything stays in this process.
    """

    training: Training
    kernels: Kernels
    build: Callable[[], Kernels]
    sizes: EnsemblePlan
    times: tuple[float, ...]
    n_rows: int
    training_rows: bool
    site: Site

    def predict(self, y: np.ndarray, identity: dict[str, Any], test_identity: Any) -> EnsemblePrediction:
        """Predictions from targets y (n, k) float64.

        What decides the decomposition (identity) and the test rows (test_identity) is given as JSON.
        """
        identity = {**identity, "targets": content_digest(y)}
        if self.site.folder is None:
            fitted, unlearned = self._fit(y)
            return EnsemblePrediction(self.training.times, *self._in_memory(fitted), fitted.reg, unlearned, None)
        with exclusive(self.site.folder):
            run = replace(self, site=replace(self.site, record=Record.open(self.site.folder, identity).begin()))
            fitted, unlearned = run._fit(y)
            times = [repr(t) for t in self.training.times]
            asked = {**asdict(self.training), "times": times, "tested": test_identity}
            home, outputs = run._in_folder(fitted, y.shape[1], {**identity, **asked})
            return EnsemblePrediction(self.training.times, *outputs, fitted.reg, unlearned, str(home))

    def _fit(self, y: np.ndarray) -> tuple[Fitted, float]:
        """(what predictions start from, share of the targets' squares that is not learned)."""
        if self.site.folder is None:
            flow, coefficients = self._factorise(y, None)
            light, q = flow, coefficients
        else:
            states = self.site.states
            flow, coefficients = self.site.once(
                "flow", lambda: list(self._factorise(save_state(states, {"targets": y}), str(states)))
            )
            arrays, attributes = load_state(coefficients)
            # without its modes, which the driver never reads
            light = GradientFlow(arrays["eigenvalues"], np.empty((0, 0)), None, float(attributes["noise"]))
            q = arrays["coefficients"]
        light = light.regularised(self.training.diag_reg, self.training.absolute)
        n = self.kernels.n
        nbytes = 8 * n * (n * (1 if self.training.last_layer else 2) + q.shape[1] + 2)
        return Fitted(flow, coefficients, light.reg, self.sizes.device, nbytes), light.unlearned(q)

    def _factorise(self, y: np.ndarray | str, states: str | None) -> tuple[Any, Any]:
        """(flow, coefficients) or, with a folder for states, their urls; one task with all threads of its host."""
        task = FactoriseTask(self.build(), y, states, self.sizes.device)
        return self.site.alone(task, "factorise", threads=self.sizes.solve_threads)

    def _in_memory(self, fitted: Fitted) -> tuple[Any, Any, Any]:
        """(mean, variance, covariance) in this process's memory."""
        tiles = row_tiles(self.n_rows, self.sizes.tile_rows)
        results = self.site.map(self._predict_task(fitted, None, None), tiles, "predict")
        mean, variance = self._split(np.concatenate([r[0] for r in results], axis=1))
        if self.training.output != "covariance":
            return mean, variance, None
        factors = np.concatenate([r[1] for r in results], axis=1)
        grid = list(self._grid())
        task = CovarianceTask(self.kernels, factors, self.training_rows, None)
        covariance = np.empty((len(self.times), self.n_rows, self.n_rows))
        for tile, (block,) in zip(grid, self.site.map(task, grid, "covariance-tile"), strict=True):
            covariance[:, tile.start : tile.stop, tile.col_start : tile.col_stop] = block
            covariance[:, tile.col_start : tile.col_stop, tile.start : tile.stop] = block.transpose(0, 2, 1)
        return mean, variance, covariance

    def _in_folder(self, fitted: Fitted, k: int, fingerprint: dict[str, Any]) -> tuple[Path, tuple[Any, Any, Any]]:
        """(folder of these predictions, dask arrays over their tiles)."""
        home = self.site.home / "predictions" / registry.digest(fingerprint)
        kept = _stored_rows(home / "values")
        if kept is not None and kept < self.sizes.tile_rows:
            # predictions that go on keep the first run's tiles, whatever memory there is now
            return replace(self, sizes=replace(self.sizes, tile_rows=kept))._in_folder(fitted, k, fingerprint)
        columns, rows = k + (self.training.output != "mean"), self.sizes.tile_rows
        values = self._store(home / "values", (self.n_rows, columns), (rows, columns), fingerprint)
        covariance = None
        if self.training.output == "covariance":
            covariance = self._store(home / "covariance", (self.n_rows, self.n_rows), (rows, rows), fingerprint)
            self._fill_covariance(fitted, values, covariance, home / "factors", fingerprint)
        else:
            self._predict_tiles(fitted, [values])
        mean, variance = self._split(lazy_array(values))
        return home, (mean, variance, None if covariance is None else lazy_array(covariance))

    def _fill_covariance(
        self, fitted: Fitted, values: TileStore, covariance: TileStore, path: Path, fingerprint: dict[str, Any]
    ) -> None:
        """Predictions with their factors, then the covariance from the factors, which are dropped when it is complete."""
        pending = set(covariance.pending())
        if not pending and not values.pending():
            return
        width = 2 * self.kernels.n
        factors = self._store(path, (self.n_rows, width), (self.sizes.tile_rows, width), fingerprint)
        self._predict_tiles(fitted, [values, factors])
        task = CovarianceTask(self.kernels, str(factors.path), self.training_rows, str(covariance.path))
        grid = list(self._grid())
        tiles = [t for t in grid if pending & {(0, *t.index), (0, *t.index[::-1])}]
        # a tile on the diagonal has one receipt, others a second one for their mirror image
        self.site.commit(
            lambda tile: [covariance, covariance], task, tiles, "covariance-tile", earlier=len(grid) - len(tiles)
        )
        remove(factors.path)

    def _store(
        self, path: Path, shape: tuple[int, int], tile: tuple[int, int], fingerprint: dict[str, Any]
    ) -> TileStore:
        """A store (T, *shape) in tiles of every time at once."""
        count = len(self.times)
        tile_shape = (count, min(shape[0], tile[0]), min(shape[1], tile[1]))
        return TileStore.create(
            path,
            shape=(count, *shape),
            tile_shape=tile_shape,
            dtype="float64",
            fingerprint=fingerprint,
            dimensions=("time", "row", "column"),
        )

    def _predict_tiles(self, fitted: Fitted, stores: list[TileStore]) -> None:
        """Fill the row tiles that are pending in any of the stores: of the values, and of the factors where they are needed."""
        pending = {index[1] for store in stores for index in store.pending()}
        tiles = row_tiles(self.n_rows, self.sizes.tile_rows)
        todo = [t for t in tiles if t.index[0] in pending]
        values_url, factors_url, *_ = [*(str(store.path) for store in stores), None]
        task = self._predict_task(fitted, values_url, factors_url)
        self.site.commit(lambda tile: stores, task, todo, "predict", earlier=len(tiles) - len(todo))

    def _predict_task(self, fitted: Fitted, url: str | None, factors_url: str | None) -> PredictTask:
        """The task of a row tile; without urls it returns arrays."""
        with_factors = factors_url is not None or (url is None and self.training.output == "covariance")
        return PredictTask(
            fitted,
            self.kernels,
            self.times,
            self.training_rows,
            self.training.output != "mean",
            with_factors,
            url,
            factors_url,
        )

    def _grid(self) -> TileGrid:
        """Pairs of row tiles, one triangle."""
        rows = self.sizes.tile_rows
        return TileGrid(self.n_rows, self.n_rows, rows, rows, symmetric=True)

    def _split(self, values: Any) -> tuple[Any, Any]:
        """(mean, variance or None) of values (T, m, k) or (T, m, k + 1)."""
        return (values, None) if self.training.output == "mean" else (values[:, :, :-1], values[:, :, -1])


def _stored_rows(values: Path) -> int | None:
    """Rows of a tile of the predictions that are stored there; None where there are none."""
    return TileStore.open(values).tile_shape[1] if (values / "zarr.json").exists() else None
