"""Fitted models: preprocessing and ridge on features, or on a kernel; stored as plain arrays and tables, never as pickles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, is_device_array, namespace, to_device
from ntkdask.cache import shared
from ntkdask.datasets import Dataset, open_dataset
from ntkdask.datasets.rows import Rows
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import from_state, to_state
from ntkdask.kernels import Kernel
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.states import load_state, save_state
from ntkdask.workflows.ship import know_states, module_states, shipped
from ntkdask.workflows.stream import ROWWISE, FeatureStream

POINTS_BYTES = 64 * 2**20
"""Training rows of a kernel model that a process keeps between batches; more are read for every batch."""


@dataclass(frozen=True, eq=False)
class RidgeModel:
    """ŷ = φ(x)·weights + intercept. weights (m, k), intercept (k,), float64; n_classes for classifiers, else None."""

    preprocessor: FittedPreprocessor
    map: FeatureMap | None
    weights: np.ndarray
    intercept: np.ndarray
    alpha: float
    n_classes: int | None = None

    def scores(self, phi: Array) -> Array:
        """(b, m) features → (b, k) float64 scores."""
        xp = namespace(phi)
        weights = xp.asarray(self.weights, dtype=phi.dtype)
        return (phi @ weights).astype("float64") + xp.asarray(self.intercept)

    def stream(self, rows: Rows, batch_rows: int, device: bool = False) -> FeatureStream:
        """The features of rows, as this model wants them."""
        return FeatureStream(rows, self.preprocessor, self.map, self.n_classes, batch_rows, device)

    def save(self, root: Path | str, client: Any = None) -> str:
        """Store the model as a state under `root`; returns its url. client: whose workers will load it."""
        feature_map = shipped(self.map, root, client)
        learned, described = to_state(feature_map)
        arrays = {"weights": self.weights, "intercept": self.intercept, **{f"map.{k}": v for k, v in learned.items()}}
        attributes = {"map": described, "alpha": self.alpha, "n_classes": self.n_classes}
        return _save(root, self.preprocessor, arrays, attributes, feature_map)

    @classmethod
    def load(cls, url: str) -> RidgeModel:
        """The model stored at `url`, once per process."""
        model = load_model(url)
        assert isinstance(model, cls)
        return model


@dataclass(frozen=True, eq=False)
class KernelRidgeModel:
    """ŷ(x) = Σ_i k(x, x_i)·coefficients_i + intercept. coefficients (n, k), intercept (k,), float64.

    points: the preprocessed training rows x_i, an array (n, *s) or the dataset that holds them. block_rows: how many of them are
    in memory at a time.
    """

    preprocessor: FittedPreprocessor
    kernel: Kernel
    points: np.ndarray | Dataset
    coefficients: np.ndarray
    intercept: np.ndarray
    alpha: float
    n_classes: int | None = None
    block_rows: int = 4096

    def scores(self, x: Array) -> Array:
        """(b, *s) preprocessed rows → (b, k) float64 scores, block by block of the training rows."""
        xp = namespace(x)
        out = xp.zeros((x.shape[0], self.intercept.size)) + xp.asarray(self.intercept)
        on_device = is_device_array(x)
        for start in range(0, len(self.coefficients), self.block_rows):
            stop = min(start + self.block_rows, len(self.coefficients))
            k = self.kernel(x, to_device(self._points(start, stop), on_device))
            # float64: coefficients of a small alpha are large and of both signs, their sum is not
            out += k.astype("float64", copy=False) @ xp.asarray(self.coefficients[start:stop])
        return out

    def stream(self, rows: Rows, batch_rows: int, device: bool = False) -> FeatureStream:
        """Preprocessed rows, in their own shape."""
        return FeatureStream(rows, self.preprocessor, ROWWISE, self.n_classes, batch_rows, device)

    def save(self, root: Path | str, client: Any = None) -> str:
        """Store the model as a state under `root`; returns its url. Points in a dataset stay where they are.

        client: whose workers will load it; they are told of a torch module in the kernel.
        """
        kernel = shipped(self.kernel, root, client)
        arrays = {"coefficients": self.coefficients, "intercept": self.intercept}
        attributes = {"kernel": registry.to_config(kernel), "alpha": self.alpha, "n_classes": self.n_classes}
        attributes["block_rows"] = self.block_rows
        if isinstance(self.points, Dataset):
            attributes["points"] = self.points.url
        else:
            arrays["points"] = self.points
        return _save(root, self.preprocessor, arrays, attributes, kernel)

    def _points(self, start: int, stop: int) -> np.ndarray:
        points = self.points
        if isinstance(points, Dataset):
            if math.prod((points.n, *points.row_shape)) * np.dtype(points.dtype).itemsize > POINTS_BYTES:
                return points.rows(start, stop)  # a batch of predictions takes longer than reading them
            return shared.get(("points", points.digest, start, stop), lambda: points.rows(start, stop))
        return points[start:stop]


Model = RidgeModel | KernelRidgeModel


def load_model(url: str) -> Model:
    """The model stored at `url`, once per process."""

    def load() -> Model:
        arrays, a = load_state(url)
        know_states(a.get("modules", {}), Path(url).parent)
        states = {k.removeprefix("preprocess."): v for k, v in arrays.items() if k.startswith("preprocess.")}
        preprocessor = FittedPreprocessor.from_state(states, a["preprocessor"])
        if "kernel" in a:
            points = open_dataset(a["points"]) if "points" in a else arrays["points"]
            return KernelRidgeModel(
                preprocessor,
                registry.from_config(a["kernel"], "kernel"),
                points,
                arrays["coefficients"],
                arrays["intercept"],
                a["alpha"],
                a["n_classes"],
                a["block_rows"],
            )
        learned = {k.removeprefix("map."): v for k, v in arrays.items() if k.startswith("map.")}
        feature_map: Any = from_state(learned, a["map"])
        return RidgeModel(preprocessor, feature_map, arrays["weights"], arrays["intercept"], a["alpha"], a["n_classes"])

    return shared.get(("model", url), load)


def _save(
    root: Path | str,
    preprocessor: FittedPreprocessor,
    arrays: dict[str, np.ndarray],
    attributes: dict[str, Any],
    thing: Any,
) -> str:
    states, described = preprocessor.to_state()
    modules = module_states(thing, root)
    if modules:
        attributes["modules"] = modules
    named = {f"preprocess.{name}": a for name, a in states.items()}
    return save_state(root, named | arrays, {"preprocessor": described, **attributes})


@dataclass(frozen=True)
class RidgeFit:
    """A fitted model, the path of scores over alphas (smaller is better; empty for one alpha), where the model lies, and what
    else the metrics of its fold should say.
    """

    model: Any
    path: list[dict[str, float]]
    score_name: str
    url: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
