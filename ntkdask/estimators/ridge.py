"""scikit-learn estimators over the workflows: ridge on features, and features as a transformer.

Nothing is computed here: `inputs.py` checks what comes in and puts it where tasks read it, `workflows/` compute. Without a
client and a url everything happens in this process's memory and nothing is written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
    clone,
)
from sklearn.utils.validation import check_is_fitted

from ntkdask import registry, threads
from ntkdask.arrays import Array, device_memory_bytes, is_device_array
from ntkdask.datasets import Dataset
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMap
from ntkdask.inputs import (
    as_input,
    check_targets,
    check_weights,
    check_x,
    fitted_map,
    is_lazy,
    locate,
    numerics_dtype,
    prepared,
    to_memory,
)
from ntkdask.rows import DatasetRows, MemoryRows, Rows
from ntkdask.states import save_state
from ntkdask.store import exclusive, local_path, sweep
from ntkdask.targets import decode
from ntkdask.tiles import Plan
from ntkdask.workers import resources
from ntkdask.workflows.budget import Resources, RidgePlan, RidgeShape, costs_of, plan_ridge
from ntkdask.workflows.featurize import featurize
from ntkdask.workflows.fit_ridge import RidgeOptions, fit_ridge
from ntkdask.workflows.jobs import NUMERICS, require_disk, require_labels
from ntkdask.workflows.predict import predict
from ntkdask.workflows.progress import Record
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS, deal_inner, group_rows, state_of

SEED = 0
"""Of the folds that selection="kfold" and "holdout" deal; features have their own."""


class _WithParts(BaseEstimator):
    """An estimator with frozen parts (feature maps, kernels): `part__name` in set_params goes through the part's replace."""

    _parts: tuple[str, ...] = ()

    def set_params(self, **params: Any) -> Self:
        """Set parameters; `features__n_components=512` gives the features that number of components."""
        nested: dict[str, dict[str, Any]] = defaultdict(dict)
        own = {}
        for name, value in params.items():
            part, _, inner = name.partition("__")
            if inner and part in self._parts:
                nested[part][inner] = value
            else:
                own[name] = value
        super().set_params(**own)
        for part, changes in nested.items():
            held = getattr(self, part)
            if not hasattr(held, "replace"):
                raise InputError(
                    f"{type(self).__name__}: {part} is {held!r}, which has no parameter {next(iter(changes))!r}."
                )
            setattr(self, part, held.replace(**changes))
        return self

    def __sklearn_clone__(self) -> Self:
        # a connection cannot be copied: clones share the client
        shared = ("client", *self._parts)
        params = self.get_params(deep=False)
        new = type(self)(**{k: v if k in shared else clone(v, safe=False) for k, v in params.items()})
        for name in ("_metadata_request", "_sklearn_output_config"):
            if name in vars(self):
                setattr(new, name, clone(vars(self)[name], safe=False))
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "client" in state:
            state["client"] = None
        return state


class _Ridge(_WithParts):
    """What the two ridge estimators share; see their texts."""

    _parts = ("features",)

    def __init__(
        self,
        features: FeatureMap | None = None,
        alphas: Sequence[float] = (1.0,),
        fit_intercept: bool = True,
        selection: str = "gcv",
        solver: str = "auto",
        client: Any = None,
        url: Any = None,
    ) -> None:
        self.features = features
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.selection = selection
        self.solver = solver
        self.client = client
        self.url = url

    @property
    def coef_(self) -> np.ndarray:
        """Weights of the features, (n_targets, n_components) or, for one target, (n_components,), float64."""
        check_is_fitted(self)
        return self._coefficients(self.model_.weights.T)

    @property
    def intercept_(self) -> np.ndarray | float:
        """Intercept of every target, (n_targets,) or a number, float64; 0 without an intercept."""
        check_is_fitted(self)
        return self._coefficients(self.model_.intercept)

    def _fit(self, x: Any, targets: Any, weights: Any, n_classes: int | None, k: int) -> Self:
        """Fit to checked x; targets None: those of the dataset x."""
        options = RidgeOptions(tuple(np.atleast_1d(self.alphas)), self.fit_intercept, self.selection, self.solver)
        with _folder(self.client, self.url) as folder, contextlib.ExitStack() as held:
            if folder is not None:
                held.enter_context(exclusive(folder))
                sweep(folder)
            rows, digest = locate(x, targets, weights, folder=folder, client=self.client)
            dtype = numerics_dtype(x)
            features = fitted_map(self.features, x, targets, dtype)
            # in memory nothing is recorded, and a map need not be describable
            fingerprint = {} if folder is None else {
                "data": digest, "n_classes": n_classes, "features": registry.to_config(features), "dtype": dtype,
                "solver": {**asdict(options), "folds": INNER_FOLDS, "holdout": HOLDOUT, "seed": SEED}, "numerics": NUMERICS,
            }  # fmt: skip
            record = Record.open(folder, fingerprint)
            found = _resources(self.client, x)
            plan = _plan(rows, features, options, k, dtype, found, record, folder)
            rows, groups = _grouped(rows, options, record, folder, self.client, held)
            fit = fit_ridge(
                rows, groups, options, plan, features=features, n_classes=n_classes, k=k, url=folder, client=self.client,
                record=record,
            )  # fmt: skip
        self.model_, self.alpha_, self.alpha_path_ = fit.model, fit.model.alpha, fit.path
        return self

    def _scores(self, X: Any) -> np.ndarray:
        """(n, k) float64 outputs of the model."""
        check_is_fitted(self)
        x = check_x(self, as_input(X), reset=False, allow_images=self.model_.map is not None)
        if is_lazy(x) and self.client is None:
            return np.concatenate([self._scores(x.blocks[i].compute()) for i in range(x.numblocks[0])])
        k, dtype, client = self.model_.intercept.size, self.model_.preprocessor.dtype, self.client
        with _folder(client, self.url) if client is not None else contextlib.nullcontext() as folder:
            rows, _ = locate(x, folder=folder, client=client)
            plan = _plan(rows, self.model_.map, RidgeOptions(), k, dtype, _resources(client, x))
            model = self.model_ if folder is None else self.model_.save(folder / "state")
            scores = predict(model, rows, plan, k=k, client=client)
        return np.asarray(scores)

    def _truth(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
        """y and sample_weight in memory; those of the dataset X when y is None."""
        x = as_input(X)
        if y is None and isinstance(x, Dataset):
            _require_kind(self, x)
            return x.targets(0, x.n), x.weights(0, x.n) if sample_weight is None else to_memory(sample_weight)
        return to_memory(y), to_memory(sample_weight)

    def _coefficients(self, values: np.ndarray) -> Any:
        raise NotImplementedError


class RidgeClassifier(ClassifierMixin, _Ridge):
    """Ridge regression of features onto zero-mean one-hot targets; the class with the largest output.

    min_W ‖Y − Φ(x)W − 1bᵀ‖² + α‖W‖², Y = 1 − 1/C in the column of the class, −1/C elsewhere. α multiplies the identity
    beside the unnormalised ΦᵀΦ, as in scikit-learn.

    features: a feature map such as `NTKRandomFeatures`; None takes X as it is.
    alphas: one α > 0, or several to choose from by `selection`: "gcv" (generalised cross-validation), "loo" (exact
    leave-one-out), "kfold" (5 folds) or "holdout" (a fifth of the rows), by squared error. Rows that repeat share a fold.
    solver: "eigh", "tridiagonal" (not for "loo"), "cholesky" (one α, or folds), or "auto".
    client: a Dask client, see `connect`; None computes here. With a client X is written once to `<url>/inputs`; without a
    url to a temporary folder of this machine for as long as fit or predict takes, which the workers must see: local
    clusters do. Pickles leave the client out, clones share it.
    url: a folder that keeps partial results: an equal fit, even after a crash, goes on from there; one of other data or
    parameters raises FingerprintError.

    X: (n, d), images (n, h, w, c) when there are features, NumPy, CuPy, data frames, dask arrays, or a dataset or its url,
    which brings its own labels 0..C−1 and weights (leave y out). float64, integers and bool compute in float64, float32 and
    float16 in float32, uint8 images in float32 after division by 255. Without client and url, dask arrays are computed
    into memory. Feature maps that depend on data are fitted to X when it is in memory; fit them first otherwise.

    After fit: `alpha_`, `alpha_path_` (a dict with alpha and score per α, smaller is better; empty for one), `classes_`,
    `coef_`, `intercept_` (of the decision function and the features, (m,) and a number for two classes), `model_`, `n_features_in_`.
    Predictions are NumPy arrays. Source: Zandieh et al. 2021, §5.1.

    >>> X, y = np.array([[0.0], [1.0], [9.0], [10.0]]), np.array(["low", "low", "high", "high"])
    >>> print(*RidgeClassifier(alphas=(0.1, 1.0)).fit(X, y).predict([[2.0], [8.0]]))
    low high
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit to X (n, ...) and labels y (n,), any kind; sample_weight (n,) not negative."""
        x = as_input(X)
        if isinstance(x, Dataset) and y is None:
            _require_kind(self, x)
            x = check_x(self, x, reset=True, allow_images=self.features is not None)
            _require_no_weights(sample_weight)
            self.classes_ = np.arange(len(x.class_names or ()))
            return self._fit(x, None, None, self.classes_.size, self.classes_.size)
        _require_no_dataset(x)
        labels = check_targets(self, y, classes=True)
        x = check_x(self, x, reset=True, allow_images=self.features is not None)
        weights = check_weights(sample_weight, len(labels))
        self.classes_, targets = np.unique(labels, return_inverse=True)
        count = self.classes_.size
        if count < 2 or (weights is not None and np.unique(targets[weights > 0]).size < 2):
            raise InputError(
                "Classifier can't train when only one class is present (with positive weight): one class in y."
            )
        return self._fit(x, targets.astype(np.int64), weights, count, count)

    def decision_function(self, X: Any) -> np.ndarray:
        """(n, C) outputs; for two classes (n,), the output of the second minus that of the first, positive for the second.

        For two classes these are the values of scikit-learn's RidgeClassifier, whose targets are ±1.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if self.classes_.size == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """(n,) classes; of equal outputs the first class."""
        scores = self._scores(X)
        return self.classes_[decode(scores)]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy; X may be a dataset with its own labels."""
        y, sample_weight = self._truth(X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def _coefficients(self, values: np.ndarray) -> np.ndarray | float:
        return values[1] - values[0] if self.classes_.size == 2 else values


class RidgeRegressor(RegressorMixin, _Ridge):
    """Ridge regression of features onto one or several targets: min_W ‖Y − Φ(x)W − 1bᵀ‖² + α‖W‖².

    Parameters, inputs and attributes are those of `RidgeClassifier`, without `classes_`; y is (n,) or (n, k), and `coef_`,
    `intercept_` and predictions have the shapes of scikit-learn's Ridge. One α is chosen for all the targets.

    >>> X = np.array([[0.0], [1.0], [2.0]])
    >>> RidgeRegressor(alphas=(1e-9,)).fit(X, 2 * X[:, 0] + 1).predict([[3.0]]).round(3)
    array([7.])
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit to X (n, ...) and numbers y (n,) or (n, k); sample_weight (n,) not negative."""
        x = as_input(X)
        if isinstance(x, Dataset) and y is None:
            _require_kind(self, x)
            x = check_x(self, x, reset=True, allow_images=self.features is not None)
            _require_no_weights(sample_weight)
            return self._fit(x, None, None, None, self._set_targets(tuple(x.target_shape or ())))
        _require_no_dataset(x)
        targets = check_targets(self, y, classes=False)
        x = check_x(self, x, reset=True, allow_images=self.features is not None)
        weights = check_weights(sample_weight, len(targets))
        return self._fit(x, targets, weights, None, self._set_targets(targets.shape[1:]))

    def predict(self, X: Any) -> np.ndarray:
        """(n,) or (n, k) float64, as y was; (n,) for a single column."""
        scores = self._scores(X)
        return scores.reshape(len(scores), *self._target_shape)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """R², for several targets the mean of theirs; X may be a dataset with its own targets."""
        y, sample_weight = self._truth(X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def _set_targets(self, shape: tuple[int, ...]) -> int:
        """Remember a row's targets, a single one as (), as scikit-learn's Ridge does; returns their number."""
        count = int(np.prod(shape, dtype=int))
        self._target_shape = () if count == 1 else shape
        return count

    def _coefficients(self, values: np.ndarray) -> np.ndarray | float:
        return values if self._target_shape else values[0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class FeatureTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _WithParts):
    """A feature map as a scikit-learn transformer: x ↦ φ(x), (n, ...) → (n, n_components).

    map: a feature map; None passes rows on, cast to the dtype of the numerics. `fit` keeps `map_`, the map itself or, where
    it depends on data, fitted to X (dask arrays and datasets: fit the map first).
    X: as in `RidgeClassifier`. CuPy arrays give CuPy arrays; dask arrays and datasets a lazy dask array.

    >>> from ntkdask.features import ArcCosineFeatures
    >>> FeatureTransformer(ArcCosineFeatures(8)).fit_transform(np.eye(3)).shape
    (3, 8)
    """

    _parts = ("map",)

    def __init__(self, map: FeatureMap | None = None) -> None:
        self.map = map

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the map where it depends on data."""
        x = check_x(self, as_input(X), reset=True, allow_images=self.map is not None)
        self.map_ = fitted_map(self.map, x, y, numerics_dtype(x))
        self._n_features_out = self.n_features_in_ if self.map_ is None else self.map_.n_components
        return self

    def transform(self, X: Any) -> Array:
        """(n, n_components) features."""
        check_is_fitted(self)
        x = check_x(self, as_input(X), reset=False, allow_images=self.map_ is not None)
        dtype = numerics_dtype(x)
        if isinstance(x, Dataset) or is_lazy(x):
            if self.map_ is None:
                return (x.x if isinstance(x, Dataset) else x).astype(dtype)
            return featurize(self.map_, x, plan=Plan(dtype=dtype))
        rows = prepared(x, dtype)
        return rows if self.map_ is None else self.map_(rows)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


@contextlib.contextmanager
def _folder(client: Any, url: Any) -> Iterator[Path | None]:
    """Where a fit keeps what it writes: url, with a client alone a temporary folder, else nowhere."""
    if url is not None:
        yield local_path(url)
    elif client is not None:
        with tempfile.TemporaryDirectory(prefix="ntkdask-") as folder:
            yield Path(folder)
    else:
        yield None


def _resources(client: Any, x: Any) -> Resources:
    """What a plan may count on. Here: the threads BLAS has now (joblib lowers them), and the GPU when x lives there."""
    if client is not None:
        return resources(client)
    n_threads = threads.ambient()
    device_bytes = device_memory_bytes() if is_device_array(x) else 0
    return replace(Resources.here(), threads=n_threads, solve_threads=n_threads, device_bytes=device_bytes)


def _plan(
    rows: Rows, features: FeatureMap | None, options: RidgeOptions, k: int, dtype: str, found: Resources,
    record: Record | None = None, folder: Path | None = None,
) -> RidgePlan:  # fmt: skip
    """Sizes that fit; those of the first run when the record has them."""
    d = int(np.prod(rows.row_shape, dtype=int))
    shape = RidgeShape(
        rows.n_total, rows.n_total, rows.row_shape, d * np.dtype(rows.dtype).itemsize,
        d if features is None else features.n_components, k, options.n_groups(INNER_FOLDS), options.selection,
    )  # fmt: skip
    plan = plan_ridge(shape, features, (), plan=Plan(dtype=dtype), resources=found)
    if folder is None or record is None:
        return plan
    require_disk(folder, costs_of(shape, features, (), plan))
    return RidgePlan(**record.once("plan", plan.to_json))


def _grouped(
    rows: Rows, options: RidgeOptions, record: Record, folder: Path | None, client: Any, held: contextlib.ExitStack
) -> tuple[Rows, list[tuple[int, ...]]]:
    """Rows with a part number each, and the parts as groups, when alpha is chosen by folds or a holdout; else no groups."""
    count = options.n_groups(INNER_FOLDS)
    if count == 1:
        return rows, []

    def numbers() -> np.ndarray:
        return deal_inner(group_rows(rows, client), options.selection, count, HOLDOUT, SEED)

    groups: list[tuple[int, ...]] = [(i,) for i in range(count)]
    if isinstance(rows, MemoryRows):
        return replace(rows, numbers=numbers()), groups
    assert isinstance(rows, DatasetRows)
    # tasks read a dataset's part numbers from a state; without a folder it goes with this fit
    states = folder / "state" if folder else Path(held.enter_context(tempfile.TemporaryDirectory(prefix="ntkdask-")))
    return replace(rows, parts_url=record.once("split", lambda: save_state(states, state_of(numbers())))), groups


def _require_kind(estimator: Any, dataset: Dataset) -> None:
    """InputError unless the dataset's targets are what the estimator learns."""
    require_labels(dataset)
    wanted = "classification" if isinstance(estimator, ClassifierMixin) else "regression"
    if dataset.kind != wanted:
        other = "RidgeRegressor" if wanted == "classification" else "RidgeClassifier"
        raise InputError(
            f"dataset {dataset.url} is for {dataset.kind}, {type(estimator).__name__} is for {wanted}: use {other}."
        )


def _require_no_dataset(x: Any) -> None:
    if isinstance(x, Dataset):
        raise InputError(f"dataset {x.url} brings its own targets: leave y out, or give arrays (dataset.x, y).")


def _require_no_weights(sample_weight: Any) -> None:
    if sample_weight is not None:
        raise InputError("a dataset brings its own weights: leave sample_weight out (write_dataset takes weights).")
