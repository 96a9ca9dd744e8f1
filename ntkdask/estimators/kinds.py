"""Classification and regression: how labels become targets, and how outputs become labels or predictions again."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score

from ntkdask.errors import InputError
from ntkdask.estimators.base import RidgeBase
from ntkdask.estimators.class_weights import weights_by_class, weights_of_classes
from ntkdask.estimators.inputs import to_memory
from ntkdask.preprocessing.targets import decode


class ClassifierPart(ClassifierMixin, RidgeBase):
    """A classifier: labels become zero-mean one-hot targets, and outputs labels again. A mixin beside a `RidgeBase`."""

    class_weight: Any
    classes_: np.ndarray

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit to rows and their labels.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Training rows.
        y : array (n,) or (n, k), or None
            Labels of any kind, of at least two classes; or k labels of 0 and 1, of which a row has any number (multilabel). None:
            those of the dataset X.
        sample_weight : array (n,), float or None
            Weights of the rows, at least 0; a number stands for n equal ones. None: 1, or those of the dataset.

        Returns
        -------
        self
            Itself, fitted.

        Raises
        ------
        InputError
            For data that it cannot use: other numbers of rows, NaN, one class only, negative weights, or labels beside a dataset.
            It is a ValueError.
        """
        x, labels, weights = self._opened(X, y, sample_weight, classes=True)
        if labels is None:
            self.classes_ = np.arange(len(x.class_names or ()))
            count, choice = self.classes_.size, self._chosen(x, None, None)
            self._is_multilabel = False
            of_classes = weights_of_classes(self.class_weight, self.classes_, x)
            return self._fit(x, None, None, count, count, choice=choice, class_weights=of_classes)
        choice = self._chosen(x, labels, weights)
        weights = weights_by_class(self.class_weight, labels, weights)
        self._is_multilabel = labels.ndim > 1
        if self._is_multilabel:
            self.classes_ = np.arange(labels.shape[1])
            return self._fit(x, 2.0 * labels - 1.0, weights, None, labels.shape[1], choice=choice)
        self.classes_, targets = np.unique(labels, return_inverse=True)
        count = self.classes_.size
        if count < 2 or (weights is not None and np.unique(targets[weights > 0]).size < 2):
            raise InputError(
                "Classifier can't train when only one class is present (with positive weight): one class in y."
            )
        return self._fit(x, targets.astype(np.int64), weights, count, count, choice=choice)

    def decision_function(self, X: Any) -> np.ndarray:
        """Compute the outputs from which the class is chosen.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows of the shape seen in `fit`.

        Returns
        -------
        array (n, C), or (n,) for two classes, float64
            The outputs of the classes. For two: the output of the second minus that of the first, positive for the second. These are
            the values of scikit-learn's RidgeClassifier, whose targets are ±1. For k labels of 0 and 1 (n, k), positive for 1. For a
            dask array a lazy one in its blocks.
        """
        return self._from_scores(X, lambda scores: scores[:, 1] - scores[:, 0] if self._decides_between_two else scores)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the classes of rows.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows of the shape seen in `fit`.

        Returns
        -------
        array (n,) or (n, k)
            The class with the largest output; of equal outputs the first class. For k labels of 0 and 1 an integer array of those,
            1 where the output is positive. For a dask array a lazy one in its blocks.
        """
        return self._from_scores(
            X, lambda scores: (scores > 0).astype(int) if self._is_multilabel else self.classes_[decode(scores)]
        )

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of the predictions.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows of the shape seen in `fit`.
        y : array (n,) or None
            True labels. None: those of the dataset X.
        sample_weight : array (n,), float or None
            Weights of the rows, at least 0; a number stands for n equal ones. None: 1, or those of the dataset.

        Returns
        -------
        float
            Share of rows, by weight, whose class is predicted; of several labels all.
        """
        y, sample_weight = self._truth(X, y, sample_weight)
        return float(accuracy_score(y, to_memory(self.predict(X)), sample_weight=sample_weight))

    def _coefficients(self, values: np.ndarray) -> np.ndarray | float:
        return values[1] - values[0] if self._decides_between_two else values

    @property
    def _decides_between_two(self) -> bool:
        return not self._is_multilabel and self.classes_.size == 2

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class RegressorPart(RegressorMixin, RidgeBase):
    """A regressor onto one or several targets. A mixin beside a `RidgeBase`."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit to rows and their targets.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Training rows.
        y : array (n,) or (n, k), or None
            Targets; they are cast to float64. None: those of the dataset X.
        sample_weight : array (n,), float or None
            Weights of the rows, at least 0; a number stands for n equal ones. None: 1, or those of the dataset.

        Returns
        -------
        self
            Itself, fitted.

        Raises
        ------
        InputError
            For data that it cannot use: other numbers of rows, NaN, negative weights, or targets beside a dataset. It is a ValueError.
        """
        x, targets, weights = self._opened(X, y, sample_weight, classes=False)
        shape = tuple(x.target_shape or ()) if targets is None else targets.shape[1:]
        choice = self._chosen(x, targets, weights)
        return self._fit(x, targets, weights, None, self._set_targets(shape), choice=choice)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the targets of rows.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows of the shape seen in `fit`.

        Returns
        -------
        array (n,) or (n, k), float64
            In the shape of the y of `fit`; (n,) for a single column. For a dask array a lazy one in its blocks.
        """
        return self._from_scores(X, lambda scores: scores.reshape(len(scores), *self._target_shape))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Coefficient of determination R² of the predictions.

        Parameters
        ----------
        X : array, dask array, data frame, dataset or url, (n, ...)
            Rows of the shape seen in `fit`.
        y : array (n,) or (n, k), or None
            True targets. None: those of the dataset X.
        sample_weight : array (n,), float or None
            Weights of the rows, at least 0; a number stands for n equal ones. None: 1, or those of the dataset.

        Returns
        -------
        float
            R²; for several targets the mean of theirs.
        """
        y, sample_weight = self._truth(X, y, sample_weight)
        return float(r2_score(y, to_memory(self.predict(X)), sample_weight=sample_weight))

    def _set_targets(self, shape: tuple[int, ...]) -> int:
        """Remember the shape of a row's targets, () for a single one as scikit-learn's Ridge does; return their number."""
        count = int(np.prod(shape, dtype=int))
        self._target_shape, self._column_of_targets = () if count == 1 else shape, bool(shape)
        return count

    def _coefficients(self, values: np.ndarray) -> np.ndarray | float:
        return values if self._target_shape else values[0]

    def _intercepts(self, values: np.ndarray) -> np.ndarray | float:
        return values if self._column_of_targets else values[0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
