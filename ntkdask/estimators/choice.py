"""How alpha is chosen in one fit of an estimator: by the recipe's own selection, by folds of the user's, or by a score of the user's.

Folds that hold every row out once become part numbers: the recipe scores all alphas from sums, without a fit for each. A score that is
not the squared error needs predictions, so it takes a fit for each fold and alpha: scikit-learn's search.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit, check_cv

from ntkdask.arrays import is_dask, is_sparse, to_host
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import MemoryRows
from ntkdask.errors import InputError
from ntkdask.workflows.selection import best_alpha, flat_alphas, score_path
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS, deal_inner, group_rows, parts_of_splits

SEED = 0
"""Seed of the folds of selection="kfold" and "holdout"; features have seeds of their own."""


@dataclass(frozen=True)
class Choice:
    """The alphas of a fit, and how one of them is chosen.

    Parameters
    ----------
    alphas : float or sequence of float
        Those from which the recipe chooses.
    selection : str
        How the recipe chooses.
    parts : array (n,) or None
        Folds of the user's as part numbers. None: the recipe's own folds.
    path : list of dict
        The scores, where alpha is chosen already.
    """

    alphas: Any
    selection: str
    parts: np.ndarray | None = None
    path: list[dict[str, float]] = field(default_factory=list)

    @property
    def inner_folds(self) -> int:
        """How many folds "kfold" has."""
        return INNER_FOLDS if self.parts is None else int(self.parts.max()) + 1


def choose(estimator: Any, x: Any, y: Any, weights: Any) -> Choice:
    """How alpha is chosen.

    Parameters
    ----------
    estimator : RidgeBase
        Its alphas, selection, cv and scoring say how.
    x : array, dask array or Dataset, (n, ...)
        Checked rows.
    y : array or None
        Checked labels or targets. None: those of the dataset x.
    weights : array (n,) or None
        Weights of the rows.

    Raises
    ------
    InputError
        For values that do not go together.
    """
    cv, scoring = estimator.cv, estimator.scoring
    own = Choice(estimator.alphas, estimator.selection)
    if cv is None and scoring is None:
        return own
    _require_together(estimator)
    alphas = flat_alphas(estimator.alphas)
    if len(alphas) == 1:
        return own
    if scoring is not None:
        return _search(estimator, alphas, x, y, weights)
    splits, n = _splits(estimator, x, y), x.n if isinstance(x, Dataset) else x.shape[0]
    selection, parts = parts_of_splits(splits, n)
    return Choice(alphas, selection, parts)


def _require_together(estimator: Any) -> None:
    """InputError where cv or scoring does not go with the selection, or is of a type that it cannot have."""
    cv, scoring, selection, name = estimator.cv, estimator.scoring, estimator.selection, type(estimator).__name__
    if cv is not None and selection in ("loo", "holdout"):
        raise InputError(
            f"{name}: cv says which rows are held out, and so does selection={selection!r}. Leave one of them out, or give "
            'selection="kfold".'
        )
    if cv is None and selection not in ("kfold", "holdout"):
        raise InputError(
            f"{name}: scoring={scoring!r} scores predictions of held-out rows, and selection={selection!r} makes none: it takes the "
            'squared error. Give cv, selection="kfold" or "holdout", or leave scoring out.'
        )
    if isinstance(cv, (bool, str, bytes)) or (isinstance(cv, numbers.Integral) and cv < 2):
        raise InputError(
            f"{name}: cv is {cv!r}; expected an integer >= 2, a splitter of scikit-learn, or (train, test) pairs."
        )
    if scoring is not None and not isinstance(scoring, str) and not callable(scoring):
        raise InputError(f"{name}: scoring is {scoring!r}; expected the name of one score, or scorer(estimator, X, y).")


def _splits(estimator: Any, x: Any, y: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (train, test) row numbers of every fold of the estimator's cv."""
    if y is None:
        assert isinstance(x, Dataset)
        y = x.targets(0, x.n)
    splitter = check_cv(estimator.cv, y, classifier=is_classifier(estimator))
    return list(splitter.split(np.zeros((len(y), 1)), y))


def _search(estimator: Any, alphas: tuple[float, ...], x: Any, y: Any, weights: Any) -> Choice:
    """Alpha by scikit-learn's search: a fit of a clone with one alpha for every fold, in memory or on the client, not in the url."""
    if isinstance(x, Dataset) or is_dask(x):
        raise InputError(
            f"{type(estimator).__name__}: scoring={estimator.scoring!r} takes rows in memory, which are cut for every fold, and X is "
            f"a {type(x).__name__}. Leave scoring out (the squared error needs no cut), or give arrays."
        )
    x, folds = x if is_sparse(x) else to_host(x), estimator.cv
    if folds is None:
        parts = deal_inner(group_rows(MemoryRows(x)), estimator.selection, INNER_FOLDS, HOLDOUT, SEED, weights)
        folds = PredefinedSplit(parts if estimator.selection == "kfold" else parts - 1)
    # cv may be a generator, which is used up by now and cannot be cloned
    own = {**estimator.get_params(deep=False), "cv": None, "scoring": None, "url": None}
    single = clone(type(estimator)(**own))
    grid = {"alphas": [(alpha,) for alpha in alphas]}
    search = GridSearchCV(single, grid, cv=folds, scoring=estimator.scoring, refit=False, error_score="raise")
    search.fit(x, y, **({} if weights is None else {"sample_weight": weights}))
    path = score_path(alphas, (-search.cv_results_["mean_test_score"]).tolist())
    return Choice((best_alpha(path),), estimator.selection, None, path)
