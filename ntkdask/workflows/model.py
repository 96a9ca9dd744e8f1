"""Fitted models: preprocessing and ridge on features, or on a kernel. They are stored as arrays and tables, never as pickles."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, is_device_array, namespace, to_device
from ntkdask.cache import shared
from ntkdask.datasets import Dataset, open_dataset
from ntkdask.datasets.rows import Rows
from ntkdask.errors import DamagedTileError
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import from_state, to_state
from ntkdask.files import local_path
from ntkdask.kernels import Kernel
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.solvers.gram import widened
from ntkdask.states import load_places, load_state, save_state
from ntkdask.workflows.selection import KeptScores
from ntkdask.workflows.ship import know_states, module_states, shipped
from ntkdask.workflows.stream import ROWWISE, FeatureStream
from ntkdask.workflows.weight_files import described_in, located

POINTS_BYTES = 64 * 2**20
"""Training rows of a kernel model, in bytes, that a process keeps between batches; more are read again for every batch."""


@dataclass(frozen=True, eq=False)
class RidgeModel:
    """Ridge on features, ŷ = φ(x)·weights + intercept, computed as (φ(x) − centre)·weights + offset.

    Parameters
    ----------
    preprocessor : FittedPreprocessor
        Applied to rows before the map.
    map : FeatureMap or None
        The feature map φ, m features. None: the preprocessed rows, flattened.
    weights : array (m, k), float64
        Weights of the features.
    intercept : array (k,), float64
        Added to every output; 0 where no intercept was fitted.
    alpha : float
        The ridge, on the unnormalised Gram matrix.
    n_classes : int or None
        Of a classifier, whose k outputs are those of the classes. None: regression.
    centre : array (m,) or None
        A point near the mean of the training features, in numbers that their dtype holds: far from zero φ·weights and the intercept
        cancel in float32. None: the origin, as in models of earlier versions.
    offset : array (k,) or None
        The outputs at the centre. None: the intercept.
    """

    preprocessor: FittedPreprocessor
    map: FeatureMap | None
    weights: np.ndarray
    intercept: np.ndarray
    alpha: float
    n_classes: int | None = None
    centre: np.ndarray | None = None
    offset: np.ndarray | None = None

    def scores(self, phi: Array) -> Array:
        """(b, m) features → (b, k) float64 outputs."""
        xp, phi = namespace(phi), widened(phi)
        weights, offset = xp.asarray(self.weights, dtype=phi.dtype), self.intercept
        if self.centre is not None and self.offset is not None:
            phi, offset = phi - xp.asarray(self.centre, dtype=phi.dtype), self.offset
        return (phi @ weights).astype("float64") + xp.asarray(offset)

    def stream(self, rows: Rows, batch_rows: int, device: bool = False) -> FeatureStream:
        """A stream of the features of rows, as this model's `scores` takes them."""
        return FeatureStream(rows, self.preprocessor, self.map, self.n_classes, batch_rows, device)

    def save(self, root: Path | str, client: Any = None) -> str:
        """Store the model as a state in the folder `root`; returns its url. client: the cluster whose workers will load it."""
        feature_map = shipped(self.map, root, client)
        learned, described = to_state(feature_map)
        arrays = {"weights": self.weights, "intercept": self.intercept, **{f"map.{k}": v for k, v in learned.items()}}
        about = {"centre": self.centre, "offset": self.offset}
        arrays |= {name: array for name, array in about.items() if array is not None}
        config, places = described_in(described, root)
        attributes = {"map": config, "alpha": self.alpha, "n_classes": self.n_classes}
        places |= module_states(feature_map, root)
        return _save(root, self.preprocessor, arrays, attributes, places)

    @classmethod
    def load(cls, url: str) -> RidgeModel:
        """The model stored at `url`, once per process."""
        model = load_model(url)
        assert isinstance(model, cls)
        return model


@dataclass(frozen=True, eq=False)
class KernelRidgeModel:
    """Kernel ridge, ŷ(x) = Σ_i k(x, x_i)·coefficients_i + intercept.

    Parameters
    ----------
    preprocessor : FittedPreprocessor
        Applied to rows before the kernel.
    kernel : Kernel
        The kernel k.
    points : array (n, *s) or Dataset
        The preprocessed training rows x_i.
    coefficients : array (n, k), float64
        The dual solution.
    intercept : array (k,), float64
        Added to every output; 0 where no intercept was fitted.
    alpha : float
        The ridge, on the unnormalised kernel matrix.
    n_classes : int or None
        Of a classifier, whose k outputs are those of the classes. None: regression.
    block_rows : int
        How many training rows are in memory at a time.
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
        """(b, *s) preprocessed rows → (b, k) float64 outputs, summed over blocks of training rows."""
        xp = namespace(x)
        out = xp.zeros((x.shape[0], self.intercept.size)) + xp.asarray(self.intercept)
        on_device = is_device_array(x)
        for start in range(0, len(self.coefficients), self.block_rows):
            stop = min(start + self.block_rows, len(self.coefficients))
            k = self.kernel(x, to_device(self._points(start, stop), on_device))
            # float64: with a small alpha the coefficients are large and of both signs, and their sum is small
            out += k.astype("float64", copy=False) @ xp.asarray(self.coefficients[start:stop])
        return out

    def stream(self, rows: Rows, batch_rows: int, device: bool = False) -> FeatureStream:
        """A stream of the preprocessed rows in their own shape, as this model's `scores` takes them."""
        return FeatureStream(rows, self.preprocessor, ROWWISE, self.n_classes, batch_rows, device)

    def save(self, root: Path | str, client: Any = None) -> str:
        """Store the model as a state in the folder `root`; returns its url.

        Points that are a dataset are not copied: the model names them by their digest, and where they lie from `root` on. client: the
        cluster whose workers will load the model; the weights of a torch module in the kernel are sent to them.
        """
        kernel = shipped(self.kernel, root, client)
        arrays = {"coefficients": self.coefficients, "intercept": self.intercept}
        config, places = described_in(registry.to_config(kernel), root)
        attributes = {"kernel": config, "alpha": self.alpha, "n_classes": self.n_classes}
        attributes["block_rows"] = self.block_rows
        places |= module_states(kernel, root)
        if isinstance(self.points, Dataset):
            attributes["points"] = self.points.digest
            places[self.points.digest] = os.path.relpath(self.points.url, local_path(root))
        else:
            arrays["points"] = self.points
        return _save(root, self.preprocessor, arrays, attributes, places)

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
        places = load_places(url)
        know_states({**a.get("modules", {}), **places}, Path(url).parent)
        states = {k.removeprefix("preprocess."): v for k, v in arrays.items() if k.startswith("preprocess.")}
        preprocessor = FittedPreprocessor.from_state(states, a["preprocessor"])
        if "kernel" in a:
            points = _points(url, a["points"], places) if "points" in a else arrays["points"]
            return KernelRidgeModel(
                preprocessor,
                registry.from_config(located(a["kernel"], places), "kernel"),
                points,
                arrays["coefficients"],
                arrays["intercept"],
                a["alpha"],
                a["n_classes"],
                a["block_rows"],
            )
        learned = {k.removeprefix("map."): v for k, v in arrays.items() if k.startswith("map.")}
        feature_map: Any = from_state(learned, located(a["map"], places))
        about = (arrays.get("centre"), arrays.get("offset"))
        fitted = (arrays["weights"], arrays["intercept"], a["alpha"], a["n_classes"])
        return RidgeModel(preprocessor, feature_map, *fitted, *about)

    return shared.get(("model", url), load)


def _points(url: str, named: str, places: Mapping[str, str]) -> Dataset:
    """The training rows of the kernel model at `url`, which its state names by their digest; DamagedTileError for others.

    An earlier release named them by their path, and they may have moved with the run.
    """
    beside = Path(url).parent.with_name("points")
    points = open_dataset(places.get(named) or (beside if beside.exists() else named))
    if named in places and points.digest != named:
        raise DamagedTileError(
            f"{points.url} holds other rows than the model {url} was fitted to. `ntkdask verify --repair RUN` removes them, the next "
            "run gathers them again."
        )
    return points


def _save(
    root: Path | str,
    preprocessor: FittedPreprocessor,
    arrays: dict[str, np.ndarray],
    attributes: dict[str, Any],
    places: dict[str, str],
) -> str:
    states, described = preprocessor.to_state()
    named = {f"preprocess.{name}": a for name, a in states.items()}
    return save_state(root, named | arrays, {"preprocessor": described, **attributes}, places)


@dataclass(frozen=True)
class RidgeFit:
    """The result of a fit.

    Parameters
    ----------
    model : RidgeModel or KernelRidgeModel
        The model at the chosen alpha.
    path : list of dict
        A row for each alpha: "alpha", "score" (smaller is better) and, where it is known, "effective_dimension". Empty for one alpha.
    score_name : str
        What the scores are, such as "GCV".
    url : str or None
        Where the model is stored. None: nowhere.
    facts : dict
        Further entries of the metrics.
    kept : KeptScores or None
        Scores of every target, where they were asked for.
    """

    model: Any
    path: list[dict[str, float]]
    score_name: str
    url: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    kept: KeptScores | None = None
