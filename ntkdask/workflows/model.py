"""A fitted ridge model: preprocessing, feature map, weights; stored as plain arrays and tables, never as pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, namespace
from ntkdask.cache import shared
from ntkdask.features.base import FeatureMap
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.rows import Rows
from ntkdask.states import load_state, save_state
from ntkdask.workflows.stream import FeatureStream


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

    def save(self, root: Path | str) -> str:
        """Store the model as a state under `root`; returns its url."""
        arrays, attributes = self.preprocessor.to_state()
        arrays = {f"preprocess.{name}": a for name, a in arrays.items()}
        arrays |= {"weights": self.weights, "intercept": self.intercept}
        return save_state(root, arrays, {
            "preprocessor": attributes, "map": registry.to_config(self.map), "alpha": self.alpha, "n_classes": self.n_classes,
        })  # fmt: skip

    @classmethod
    def load(cls, url: str) -> RidgeModel:
        """The model stored at `url`, once per process."""

        def load() -> RidgeModel:
            arrays, a = load_state(url)
            states = {k.removeprefix("preprocess."): v for k, v in arrays.items() if k.startswith("preprocess.")}
            preprocessor = FittedPreprocessor.from_state(states, a["preprocessor"])
            feature_map: Any = None if a["map"] is None else registry.from_config(a["map"], "feature map")
            return cls(preprocessor, feature_map, arrays["weights"], arrays["intercept"], a["alpha"], a["n_classes"])

        return shared.get(("model", url), load)
