"""A feature map as a scikit-learn transformer."""

from __future__ import annotations

from typing import Any, Self

from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ntkdask.arrays import Array, is_dask
from ntkdask.datasets import Dataset
from ntkdask.estimators.base import WithParts
from ntkdask.estimators.inputs import as_input, check_x, fitted_map, numerics_dtype, prepared
from ntkdask.features.base import FeatureMap, require_map, takes_sparse
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.featurize import featurize


class FeatureTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, WithParts):
    """A feature map as a scikit-learn transformer: x ↦ φ(x), (n, ...) → (n, n_components).

    Parameters
    ----------
    map : FeatureMap or None
        The feature map φ. None: rows are passed on, cast to the dtype of the numerics. Its parameters are set as `map__n_components`.

    Attributes
    ----------
    map_ : FeatureMap or None
        The map itself or, where it depends on data, the map fitted to X and, where it needs them, y.
    n_features_in_ : int
        Numbers in a row of X; for images the product of a row's shape.

    Notes
    -----
    X is (n, d), or (n, *row_shape), such as images (n, h, w, c), when there is a map: a NumPy or CuPy array, a torch tensor, a data
    frame, a dask array, or a dataset or its url. CuPy arrays give CuPy arrays; dask arrays and datasets give a lazy dask array; all
    others NumPy arrays. The features are float64 for rows that are float64, integers or bool, and float32 for float32, float16 and
    uint8 images, which are divided by 255.

    y, for maps that learn from it, is numbers or labels (integers, strings). To fit a map that depends on data, a dataset is streamed
    and brings its own targets; a dask array is computed into memory. Nothing is stored and no cluster is used.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdask.features import ArcCosineFeatures
    >>> FeatureTransformer(ArcCosineFeatures(8)).fit_transform(np.eye(3)).shape
    (3, 8)
    """

    _parts = ("map",)

    def __init__(self, map: FeatureMap | None = None) -> None:
        self.map = map

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the map where it depends on data.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows to learn from; with any map, later rows must have their shape.
        y : array (n,) or (n, k), or None
            Labels or numbers, for maps that learn from targets. None beside a dataset, which brings its own.

        Returns
        -------
        FeatureTransformer
            Itself.

        Raises
        ------
        InputError
            For targets that the map needs and that are missing, or that are given beside a dataset.
        """
        if self.map is not None:
            require_map(self.map, f"{type(self).__name__}: map")
        x = check_x(
            self, as_input(X), reset=True, allow_images=self.map is not None, allow_sparse=takes_sparse(self.map)
        )
        self.map_ = fitted_map(self.map, x, y, numerics_dtype(x))
        self._n_features_out = self.n_features_in_ if self.map_ is None else self.map_.n_components
        return self

    def transform(self, X: Any) -> Array:
        """Compute the features of rows.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows of the shape seen in `fit`.

        Returns
        -------
        array (n, n_components), float32 or float64
            NumPy or CuPy as X is; a lazy dask array for dask arrays and datasets.
        """
        check_is_fitted(self)
        x = check_x(
            self, as_input(X), reset=False, allow_images=self.map_ is not None, allow_sparse=takes_sparse(self.map_)
        )
        dtype = numerics_dtype(x)
        if isinstance(x, Dataset) or is_dask(x):
            if self.map_ is None:
                return (x.x if isinstance(x, Dataset) else x).astype(dtype)
            return featurize(self.map_, x, plan=Plan(dtype=dtype))
        rows = prepared(x, dtype)
        return rows if self.map_ is None else self.map_(rows)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = takes_sparse(self.map)
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
