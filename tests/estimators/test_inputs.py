"""What estimators take: dtypes, images, data frames, lists, dask arrays, datasets; odd sizes and refusals."""

from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from estimator_examples import ALPHAS, IMAGES, LABELS, MAP, RNG, WEIGHTS, Y2, X, Y
from sklearn import linear_model

from ntkdask import write_dataset
from ntkdask.errors import InputError
from ntkdask.estimators import FeatureTransformer, RidgeClassifier, RidgeRegressor
from ntkdask.features import ArcCosineFeatures

# dtypes and inputs


def test_dtypes():
    single = RidgeRegressor().fit(X.astype(np.float32), Y)
    half = RidgeRegressor().fit(X.astype(np.float16), Y)
    integers = (10 * X).astype(int)
    assert [m.model_.preprocessor.dtype for m in (single, half)] == ["float32", "float32"]
    np.testing.assert_allclose(single.predict(X.astype(np.float32)), RidgeRegressor().fit(X, Y).predict(X), rtol=1e-4)
    for x in (integers, integers > 10, integers.clip(0, 255).astype(np.uint8)):
        ours = RidgeRegressor().fit(x, Y)
        assert ours.model_.preprocessor.dtype == "float64"
        np.testing.assert_allclose(ours.predict(x), linear_model.Ridge().fit(x, Y).predict(x), rtol=1e-8)


def test_the_users_arrays_stay_as_they_are():
    x, weights = X.copy(), WEIGHTS.copy()
    for features in (None, MAP):
        for selection in ("gcv", "loo", "kfold"):
            RidgeRegressor(features, ALPHAS, selection=selection).fit(x, Y, weights)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(weights, WEIGHTS)


def test_images():
    labels = np.arange(40) % 2
    ours = RidgeClassifier(MAP).fit(IMAGES, labels)
    flat = (IMAGES / np.float32(255)).reshape(40, -1)
    np.testing.assert_allclose(
        ours.decision_function(IMAGES), RidgeClassifier(MAP).fit(flat, labels).decision_function(flat), atol=1e-4
    )
    assert ours.n_features_in_ == 48
    assert FeatureTransformer(MAP).fit(IMAGES).transform(IMAGES).shape == (40, 32)
    with pytest.raises(InputError, match=r"rows of shape \(4, 3, 3\), but RidgeClassifier is expecting \(4, 4, 3\)"):
        ours.predict(IMAGES[:, :, :3])
    with pytest.raises(ValueError, match="expecting 48 features"):
        ours.predict(flat[:, :5])
    with pytest.raises(ValueError, match="dim 4"):
        RidgeClassifier().fit(IMAGES, labels)
    with pytest.raises(ValueError, match="uint8"):
        ours.predict(IMAGES / 255)


def test_bool_images_mean_zero_and_one(tmp_path):
    images, y = IMAGES > 127, np.arange(40.0)
    expected = RidgeRegressor(MAP).fit(images.astype(np.float32), y).predict(images.astype(np.float32))
    np.testing.assert_array_equal(RidgeRegressor(MAP).fit(images, y).predict(images), expected)
    lazy = da.from_array(images, chunks=(15, 4, 4, 3))
    np.testing.assert_allclose(
        RidgeRegressor(MAP, url=tmp_path).fit(lazy, y).predict(lazy), expected, rtol=1e-3, atol=1e-3
    )


def test_data_frames_lists_and_dask():
    frame = pd.DataFrame(X, columns=list("abcdef"))
    lazy = da.from_array(X, chunks=(40, 3))
    expected = RidgeRegressor().fit(X, Y).predict(X)
    named = RidgeRegressor().fit(frame, pd.Series(Y), pd.Series(np.ones(90)))
    assert named.feature_names_in_.tolist() == list("abcdef")
    np.testing.assert_allclose(named.predict(frame), expected, rtol=1e-12)
    np.testing.assert_array_equal(RidgeRegressor().fit(X.tolist(), Y.tolist()).predict(X.tolist()), expected)
    ours = RidgeRegressor().fit(lazy, da.from_array(Y, chunks=50), da.ones(90))
    np.testing.assert_allclose(ours.predict(lazy), expected, rtol=1e-12)
    assert ours.score(lazy, da.from_array(Y, chunks=50)) == pytest.approx(named.score(frame, Y))
    filtered = lazy[lazy[:, 0] > 1]
    np.testing.assert_allclose(ours.predict(filtered), expected[X[:, 0] > 1], rtol=1e-12)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        RidgeRegressor().fit(lazy, Y[:50])


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold"])
def test_datasets(tmp_path, selection):
    data = write_dataset(tmp_path / "d.zarr", X, LABELS, weights=WEIGHTS)
    codes = np.unique(LABELS, return_inverse=True)[1]
    expected = RidgeClassifier(MAP, ALPHAS, selection=selection).fit(X, codes, WEIGHTS)
    for x in (data, data.url, Path(data.url)):
        ours = RidgeClassifier(MAP, ALPHAS, selection=selection).fit(x)
        assert ours.alpha_ == expected.alpha_
        np.testing.assert_allclose(ours.decision_function(x), expected.decision_function(X), rtol=1e-10)
        np.testing.assert_array_equal(ours.predict(X), expected.predict(X))
        assert ours.score(x) == expected.score(X, codes, WEIGHTS)
    assert list(tmp_path.iterdir()) == [tmp_path / "d.zarr"]


def test_a_dataset_written_over_another(tmp_path):
    for n in (90, 50):
        data = write_dataset(tmp_path / "d.zarr", X[:n], Y[:n], overwrite=True)
        expected = RidgeRegressor().fit(X[:n], Y[:n])
        np.testing.assert_allclose(RidgeRegressor().fit(data).predict(data), expected.predict(X[:n]), rtol=1e-10)


def test_datasets_that_do_not_fit(tmp_path):
    classes = write_dataset(tmp_path / "c.zarr", X, LABELS)
    numbers = write_dataset(tmp_path / "n.zarr", X, Y2)
    np.testing.assert_allclose(
        RidgeRegressor().fit(numbers).predict(X), RidgeRegressor().fit(X, Y2).predict(X), rtol=1e-10
    )
    with pytest.raises(
        InputError, match="is for classification, RidgeRegressor is for regression: use RidgeClassifier"
    ):
        RidgeRegressor().fit(classes)
    with pytest.raises(InputError, match="use RidgeRegressor"):
        RidgeClassifier().fit(numbers)
    with pytest.raises(InputError, match="brings its own targets"):
        RidgeClassifier().fit(classes, LABELS)
    with pytest.raises(InputError, match="brings its own weights"):
        RidgeClassifier().fit(classes, sample_weight=WEIGHTS)
    with pytest.raises(InputError, match="has no targets"):
        RidgeClassifier().fit(write_dataset(tmp_path / "u.zarr", X))
    with pytest.raises(InputError, match="one class only"):
        RidgeClassifier().fit(write_dataset(tmp_path / "o.zarr", X, np.full(90, "ant")))


# odd sizes, and what is refused


@pytest.mark.parametrize("selection", ["gcv", "loo"])
def test_fewer_rows_than_features(selection):
    x, labels = RNG.normal(size=(3, 50)), ["a", "b", "c"]  # one row a class
    for features in (None, ArcCosineFeatures(128)):
        ours = RidgeClassifier(features, alphas=(0.1, 1.0), selection=selection).fit(x, labels)
        assert ours.predict(x).tolist() == labels
    theirs = linear_model.Ridge().fit(x, [1.0, 2.0, 3.0])
    np.testing.assert_allclose(RidgeRegressor().fit(x, [1, 2, 3]).predict(x), theirs.predict(x), rtol=1e-8)


def test_one_row_and_constant_features():
    assert RidgeRegressor().fit(X[:1], Y[:1]).predict(X[:2]).tolist() == pytest.approx([Y[0], Y[0]])
    constant = np.column_stack([X, np.full(90, 7.0), np.zeros(90)])
    np.testing.assert_allclose(
        RidgeRegressor().fit(constant, Y).predict(constant), RidgeRegressor().fit(X, Y).predict(X), rtol=1e-8
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": (0.0,)}, "positive"),
        ({"alphas": ()}, "at least one"),
        ({"alphas": (-1.0, 1.0)}, "positive"),
        ({"selection": "gvc"}, "did you mean 'gcv'"),
        ({"solver": "eig"}, "did you mean 'eigh'"),
        ({"solver": "cholesky", "alphas": (1.0, 2.0)}, "no spectrum"),
    ],
)
def test_refused_parameters(change, message):
    estimator = RidgeRegressor(**change)  # nothing is checked before fit
    with pytest.raises(InputError, match=message):
        estimator.fit(X, Y)


def test_refused_data():
    with pytest.raises(InputError, match="only one class"):
        RidgeClassifier().fit(X, np.zeros(90, int))
    with pytest.raises(InputError, match="only one class"):
        RidgeClassifier().fit(X, LABELS, (LABELS == "ant").astype(float))
    with pytest.raises(InputError, match=r"negative in row 3"):
        RidgeRegressor().fit(X, Y, np.where(np.arange(90) == 3, -1.0, 1.0))
    with pytest.raises(InputError, match="non-zero"):
        RidgeRegressor().fit(X, Y, np.zeros(90))
    with pytest.raises(ValueError, match="NaN"):
        RidgeRegressor().fit(np.where(X > 2, np.nan, X), Y)
    with pytest.raises(ValueError, match="NaN"):
        RidgeRegressor().fit(da.from_array(np.where(X > 2, np.nan, X), chunks=30), Y)
    with pytest.raises(ValueError, match="NaN"):
        RidgeClassifier(MAP).fit(np.full((4, 2, 2, 1), np.nan), [0, 1, 0, 1])
    with pytest.raises(InputError, match="5 folds of 3 distinct rows"):
        RidgeRegressor(alphas=ALPHAS, selection="kfold").fit(np.repeat(X[:3], 4, axis=0), Y[:12])
