"""dask arrays in, dask arrays out: predictions and features by blocks, whatever their lengths."""

import pickle

import dask
import dask.array as da
import numpy as np
import pytest
from estimator_examples import LABELS, MAP, Y2, X, Y

from ntkdask.errors import InputError
from ntkdask.estimators import (
    FeatureTransformer,
    KernelRidgeClassifier,
    KernelRidgeRegressor,
    RidgeClassifier,
    RidgeRegressor,
)

LAZY = da.from_array(X, chunks=(40, 3))
UNKNOWN = LAZY[da.from_array(X, chunks=(40, 6))[:, 0] > 0]
KEPT = X[X[:, 0] > 0]


def fitted():
    yield RidgeClassifier(MAP).fit(X, LABELS)
    yield RidgeClassifier().fit(X, np.where(Y.mean() < Y, "yes", "no"))
    yield KernelRidgeClassifier().fit(X, LABELS)
    for y in (Y, Y[:, None], Y2):
        yield RidgeRegressor(MAP).fit(X, y)
        yield KernelRidgeRegressor().fit(X, y)


FITTED = {f"{type(m).__name__}-{i}": m for i, m in enumerate(fitted())}


@pytest.mark.parametrize("name", FITTED)
def test_predictions_of_a_dask_array_are_one(name):
    model = FITTED[name]
    for method in ("predict", "decision_function") if "Classifier" in name else ("predict",):
        expected, call = getattr(model, method)(X), getattr(model, method)
        found = call(LAZY)
        assert isinstance(found, da.Array)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert found.chunks[0] == (40, 40, 10)
        with dask.config.set(scheduler="threads"):
            same = np.testing.assert_array_equal if expected.dtype.kind == "U" else np.testing.assert_allclose
            same(found.compute(), expected)
            same(call(UNKNOWN).compute(), getattr(model, method)(KEPT))


@pytest.mark.parametrize("name", ["RidgeClassifier-0", "KernelRidgeRegressor-4"])
def test_wrappers_that_map_blocks_get_blocks(name):
    """dask-ml's ParallelPostFit pickles the estimator, tries it on one row of zeros, and maps `predict` over blocks."""
    model = pickle.loads(pickle.dumps(FITTED[name]))
    meta = model.predict(np.zeros((1, X.shape[1]), X.dtype))[:0]
    rows = LAZY.rechunk({1: -1})
    found = rows.map_blocks(model.predict, dtype=meta.dtype, drop_axis=1, meta=meta).compute(scheduler="threads")
    np.testing.assert_array_equal(found, model.predict(X))


def test_scores_of_a_dask_array_are_numbers():
    classes, numbers = FITTED["RidgeClassifier-0"], FITTED["RidgeRegressor-3"]
    assert classes.score(LAZY, LABELS) == classes.score(X, LABELS)
    assert numbers.score(LAZY, da.from_array(Y)) == pytest.approx(numbers.score(X, Y), rel=1e-12)


def test_blocks_of_unknown_lengths_and_empty_ones_have_features():
    transformer = FeatureTransformer(MAP).fit(X)
    found = transformer.transform(UNKNOWN)
    assert np.isnan(found.shape[0])
    assert found.shape[1] == 32
    np.testing.assert_allclose(found.compute(), MAP(KEPT))
    none = LAZY[da.from_array(X, chunks=(40, 6))[:, 0] > 1e9]
    assert transformer.transform(none).compute().shape == (0, 32)
    assert FITTED["RidgeRegressor-7"].predict(none).compute().shape == (0, 2)


def test_rows_of_another_shape_are_refused_before_anything_is_computed():
    with pytest.raises(InputError, match="X has rows of shape"):
        FITTED["RidgeClassifier-0"].predict(LAZY[:, :4])
