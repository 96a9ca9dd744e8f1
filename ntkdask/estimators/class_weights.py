"""The weights that `class_weight` gives to the rows of each class, as scikit-learn computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import compute_class_weight, compute_sample_weight

from ntkdask.datasets import Dataset
from ntkdask.errors import InputError
from ntkdask.estimators.inputs import check_weights


def weights_by_class(class_weight: Any, labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
    """(n,) weights of rows times those of their classes; `weights` itself where class_weight is None."""
    _require_known(class_weight)
    if class_weight is None:
        return weights
    # a rare class counts by its rows, not by their weights: as in scikit-learn
    by_class = compute_sample_weight(class_weight, labels)
    return check_weights(by_class if weights is None else weights * by_class, len(labels))


def weights_of_classes(class_weight: Any, classes: np.ndarray, dataset: Dataset) -> tuple[float, ...]:
    """A weight for each class of a dataset, whose labels are `classes`; empty where class_weight is None."""
    _require_known(class_weight)
    if class_weight is None:
        return ()
    labels = dataset.targets(0, dataset.n)
    found = np.unique(labels)
    given = np.ones(classes.size)
    given[found] = compute_class_weight(class_weight, classes=found, y=labels)
    check_weights(given[found], found.size)
    return tuple(given.tolist())


def _require_known(class_weight: Any) -> None:
    if not (class_weight is None or isinstance(class_weight, dict) or class_weight == "balanced"):
        raise InputError(f'class_weight is {class_weight!r}; expected None, "balanced" or a dict {{label: weight}}.')
