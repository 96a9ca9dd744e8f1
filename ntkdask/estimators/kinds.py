"""Classification and regression: what labels and targets become, and what scores are turned back into."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin

from ntkdask.errors import InputError
from ntkdask.estimators.base import RidgeBase
from ntkdask.preprocessing.targets import decode


class ClassifierPart(ClassifierMixin, RidgeBase):
    """Labels to zero-mean one-hot targets and back; beside `RidgeBase`."""

    classes_: np.ndarray

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit to X (n, ...) and labels y (n,), any kind; sample_weight (n,) not negative."""
        x, labels, weights = self._opened(X, y, sample_weight, classes=True)
        if labels is None:
            self.classes_ = np.arange(len(x.class_names or ()))
            return self._fit(x, None, None, self.classes_.size, self.classes_.size)
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


class RegressorPart(RegressorMixin, RidgeBase):
    """One or several targets; beside `RidgeBase`."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit to X (n, ...) and numbers y (n,) or (n, k); sample_weight (n,) not negative."""
        x, targets, weights = self._opened(X, y, sample_weight, classes=False)
        shape = tuple(x.target_shape or ()) if targets is None else targets.shape[1:]
        return self._fit(x, targets, weights, None, self._set_targets(shape))

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
