"""A feature map as a scikit-learn transformer."""

from __future__ import annotations

from typing import Any, Self

from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ntkdask.arrays import Array, is_dask
from ntkdask.datasets import Dataset
from ntkdask.estimators.base import WithParts
from ntkdask.estimators.inputs import as_input, check_x, fitted_map, numerics_dtype, prepared
from ntkdask.features.base import FeatureMap
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.featurize import featurize


class FeatureTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, WithParts):
    """A feature map as a scikit-learn transformer: x ↦ φ(x), (n, ...) → (n, n_components).

    map: a feature map; None passes rows on, cast to the dtype of the numerics. `fit` keeps `map_`, the map itself or, where
    it depends on data, fitted to X and, where it needs them, y: numbers, or labels (integers, strings). Datasets are streamed and
    bring their own targets; dask arrays are computed into memory for that.
    X: as in `RidgeClassifier`. CuPy arrays give CuPy arrays; dask arrays and datasets a lazy dask array.

    >>> import numpy as np
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
        if isinstance(x, Dataset) or is_dask(x):
            if self.map_ is None:
                return (x.x if isinstance(x, Dataset) else x).astype(dtype)
            return featurize(self.map_, x, plan=Plan(dtype=dtype))
        rows = prepared(x, dtype)
        return rows if self.map_ is None else self.map_(rows)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
