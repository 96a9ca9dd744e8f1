"""Predictions of a fitted model, tile by tile, and their metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.datasets.rows import DatasetRows, Rows
from ntkdask.execution.site import Site
from ntkdask.planning.resources import RidgePlan
from ntkdask.planning.tiles import Tile, row_tiles
from ntkdask.preprocessing.targets import decode, encode_targets
from ntkdask.store import TileStore
from ntkdask.workflows.model import Model, load_model

SCATTER_ROWS = 1000
"""Rows of a regression's scatter plot, at most."""


@dataclass(frozen=True, eq=False)
class _PredictTask:
    """Scores of one tile of rows; rows that are not selected stay NaN, so that one array serves every fold."""

    rows: Rows
    model: Model | str
    batch_rows: int
    device: bool
    url: str | None

    def __call__(self, tile: Tile) -> Any:
        started = time.perf_counter()
        model = load_model(self.model) if isinstance(self.model, str) else self.model
        out = np.full((tile.rows, model.intercept.size), np.nan)
        for batch in model.stream(self.rows, self.batch_rows, self.device).batches(
            tile.start, tile.stop, with_targets=False
        ):
            out[batch.numbers - tile.start] = to_host(model.scores(batch.phi))
        return out if self.url is None else TileStore.open(self.url).commit((tile.index[0], 0), out, started)


def predict(
    model: Model | str,
    rows: Rows,
    plan: RidgePlan,
    k: int,
    site: Site,
    *,
    store: Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> np.ndarray | TileStore:
    """Scores of the selected rows, tile by tile; NaN for rows that are not selected.

    Parameters
    ----------
    model : Model or str
        The model, or the url where it is stored (required with a client).
    rows : Rows
        The rows to predict.
    plan : RidgePlan
        Rows of a tile and of a batch, threads, device.
    k : int
        Outputs of the model.
    site : Site
        Where the tiles are computed.
    store : Path or None
        The store of the scores, which is resumed. None: they are returned and not stored.
    fingerprint : mapping or None
        Everything that decides the stored scores.

    Returns
    -------
    array (n_total, k) float64, or TileStore
        The scores, or the complete store of them.
    """
    tiles = row_tiles(rows.n_total, plan.tile_rows)
    task = _PredictTask(rows, model, plan.batch_rows, plan.device, None if store is None else str(store))
    if store is None:
        found = site.map(task, tiles, "predict")
        return np.concatenate(found) if found else np.empty((0, k))
    scores = TileStore.create(
        store,
        shape=(rows.n_total, k),
        tile_shape=(plan.tile_rows, k),
        dtype="float64",
        fingerprint=fingerprint or {},
        dimensions=("row", "output"),
    )
    site.fill(scores, task, tiles, "predict")
    return scores


def evaluate(scores: TileStore, rows: DatasetRows, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Metrics of stored scores on the selected rows, read tile by tile.

    Parameters
    ----------
    scores : TileStore
        (n, k) outputs of a model, from `predict`.
    rows : DatasetRows
        The rows, with their labels or targets.
    class_names : sequence of str or None
        Of a classification. None: a regression.

    Returns
    -------
    dict
        See `classification_metrics` and `regression_metrics`; {"rows": 0} where no rows are selected.
    """
    dataset, truths, predictions = rows.dataset, [], []
    for start in range(0, dataset.n, scores.tile_shape[0]):
        stop = min(start + scores.tile_shape[0], dataset.n)
        found = scores.read((start // scores.tile_shape[0], 0))
        for batch in rows.batches(start, stop, stop - start):
            truths.append(np.asarray(batch.targets))
            predictions.append(found[batch.numbers - start])
    if not truths:
        return {"rows": 0}
    truth, predicted = np.concatenate(truths), np.concatenate(predictions)
    if class_names is None:
        return regression_metrics(truth.reshape(len(truth), -1), predicted)
    return classification_metrics(truth, predicted, len(class_names))


def classification_metrics(labels: np.ndarray, scores: np.ndarray, n_classes: int) -> dict[str, Any]:
    """Accuracy, mse against zero-mean one-hot targets, and confusion[true][predicted], of labels (n,) and outputs (n, C)."""
    found = decode(scores)
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, found), 1)
    mse = float(np.mean((scores - encode_targets(labels, n_classes, "float64")) ** 2))
    return {
        "rows": len(labels),
        "accuracy": float(np.mean(found == labels)),
        "mse": mse,
        "confusion": confusion.tolist(),
    }


def regression_metrics(targets: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Metrics of targets and predictions (n, k): mse, rmse, R² against the mean of these targets, a sample for a scatter plot."""
    mse = float(np.mean((targets - predicted) ** 2))
    variance = float(np.mean((targets - targets.mean(axis=0)) ** 2))
    step = max(1, -(-len(targets) // SCATTER_ROWS))
    scatter = {"target": targets[::step, 0].tolist(), "predicted": predicted[::step, 0].tolist()}
    r2 = 1.0 - mse / variance if variance > 0 else float("nan")
    return {"rows": len(targets), "mse": mse, "rmse": mse**0.5, "r2": r2, "scatter": scatter}
