"""Ridge on data far from zero: the sums are taken about a centre, so float32 features keep their digits. Against float64 twins."""

import numpy as np
import pytest
from job_examples import feature_map, naive_ridge, ridge_plan, sited, stored
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

import ntkdask as nd
from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import FingerprintError
from ntkdask.execution.progress import Record
from ntkdask.solvers.gram import NARROW
from ntkdask.states import save_state
from ntkdask.workflows.model import RidgeModel, load_model
from ntkdask.workflows.ridge.centre import sample_rows
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge
from ntkdask.workflows.split import state_of

N, D = 400, 6
EVERY = [(0,), (1,), (2,)]
PARTS = (np.random.default_rng(3).permutation(N) % 3).astype(np.int16)


def far(mean, dtype="float32", order="random", n=N, d=D):
    """Rows of spread 1 about a mean, targets that depend on them, in units of the targets' deviation."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((n, d))
    if order == "sorted":
        x = x[np.argsort(x[:, 0])]
    x = (x + mean).astype(dtype)
    if order == "zeros first":
        x[: n // 20] = 0
    exact = x.astype(np.float64)
    y = (exact - exact.mean(axis=0)) @ rng.standard_normal((d, 2)) + 0.1 * rng.standard_normal((n, 2))
    return x, y / y.std(axis=0) + mean


def worst(model, x, y, alpha, intercept=True, weights=None, phi=None):
    """The largest error of predictions, in deviations of the targets, against the float64 twin."""
    phi = x.astype(np.float64) if phi is None else phi.astype(np.float64)
    if intercept:
        centre, level = phi.mean(axis=0), y.mean(axis=0)
        w, b = naive_ridge(phi - centre, y - level, alpha, weights)
        expected = (phi - centre) @ w + b + level
    else:
        w, _ = naive_ridge(phi, y, alpha, weights, intercept=False)
        expected = phi @ w
    return (np.abs(model.predict(x) - expected) / y.std(axis=0)).max()


@pytest.mark.parametrize("order", ["random", "sorted", "zeros first"])
@pytest.mark.parametrize("mean", [100.0, 1000.0, 1e4])
def test_float32_rows_far_from_zero(mean, order):
    x, y = far(mean, order=order)
    for options in ({"alphas": 1.0}, {"alphas": (0.5, 1.0, 2.0)}, {"alphas": 1.0, "solver": "cholesky"}):
        model = nd.RidgeRegressor(**options).fit(x, y)
        assert worst(model, x, y, model.alpha_) < 2e-6


@pytest.mark.parametrize("alphas", [1.0, (0.5, 1.0, 2.0)])
def test_float32_features_far_from_zero(alphas):
    """More features than are multiplied in float64: as good as scikit-learn's Ridge, which centres rows first."""
    x, y = far(1000.0, n=600, d=200)
    model = nd.RidgeRegressor(alphas=alphas).fit(x, y)
    assert worst(model, x, y, model.alpha_) < 1e-5
    theirs = Ridge(model.alpha_).fit(x, y.astype("float32"))
    assert worst(model, x, y, model.alpha_) < worst(theirs, x, y, model.alpha_)


def test_groups_of_rows_far_apart():
    """No centre is near both; products of narrow rows are float64."""
    x, y = far(0.0)
    x[N // 2 :] += np.float32(3000.0)
    model = nd.RidgeRegressor(alphas=1.0).fit(x, y)
    assert worst(model, x, y, 1.0) < 1e-6


@pytest.mark.parametrize("mean", [1e8, 1e12])
def test_float64_rows_very_far_from_zero(mean):
    """Differences of such rows are exact in float64; scikit-learn rounds its intercept to 1e-16 of the mean."""
    x, y = far(mean, "float64")
    model = nd.RidgeRegressor(alphas=(0.5, 1.0, 2.0)).fit(x, y)
    assert worst(model, x, y, model.alpha_) < 4e-16 * mean


def test_a_column_of_years():
    rng = np.random.default_rng(0)
    x = np.stack([rng.integers(1950, 2021, 300), rng.standard_normal(300)], axis=1).astype("float32")
    y = 0.05 * (x[:, 0] - 1985.0) + x[:, 1] + 0.1 * rng.standard_normal(300)
    found = nd.RidgeRegressor(alphas=1e-3).fit(x, y)
    expected = Ridge(alpha=1e-3).fit(x.astype("float64"), y).predict(x.astype("float64"))
    np.testing.assert_allclose(found.predict(x), expected, rtol=0, atol=2e-6)
    assert found.intercept_ == pytest.approx(Ridge(alpha=1e-3).fit(x.astype("float64"), y).intercept_, rel=1e-5)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold", "holdout"])
def test_every_selection_finds_the_scores_of_float64(tmp_path, selection, intercept):
    """Weighted, in folds, of arrays and of datasets: float32 rows of mean 1 000 against their float64 copies."""
    x, y = far(1000.0, order="sorted", d=NARROW + 2)
    weights, fits = np.random.default_rng(1).uniform(0, 2, N) * (np.arange(N) % 5 > 0), []
    for dtype in ("float32", "float64"):
        rows, url = MemoryRows(x.astype(dtype), y, weights, PARTS), None
        if intercept and selection in ("loo", "kfold"):
            data, url = stored(tmp_path, x.astype(dtype), y, dtype, weights=weights), tmp_path / f"run-{dtype}"
            rows = DatasetRows(data.url, save_state(tmp_path / "state", state_of(PARTS)), (), data.digest)
        options = RidgeOptions((1e-2, 1.0, 100.0, 1e4), intercept, selection)
        keywords = sited({"features": None, "k": 2, "url": url})
        fits.append(fit_ridge(rows, EVERY, options, ridge_plan(dtype, N, 150), **keywords))
    narrow, wide = fits
    scores = [[row["score"] for row in fit.path] for fit in fits]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3)
    assert narrow.model.alpha == wide.model.alpha
    left, right = narrow.model.scores(x), wide.model.scores(x.astype("float64"))
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4)
    assert intercept or not narrow.model.intercept.any()


@pytest.mark.parametrize("heavy", [1e6, 1e12])
def test_the_centre_follows_the_weights(heavy):
    """All the weight on ten rows at 1 000, many light rows at 0."""
    x, y = far(1000.0)
    x[10:] -= np.float32(1000.0)
    weights = np.where(np.arange(N) < 10, heavy, 1e-3)
    model = nd.RidgeRegressor(alphas=1e-3).fit(x, y, sample_weight=weights)
    expected = Ridge(alpha=1e-3).fit(x.astype("float64"), y, sample_weight=weights).predict(x[:10].astype("float64"))
    np.testing.assert_allclose(model.predict(x[:10]), expected, rtol=0, atol=1e-3)


def test_random_features_of_digits_far_from_zero():
    digits, labels = load_digits(return_X_y=True)
    x = (digits[:600] / 16 + 3).astype("float32")
    map = feature_map(200)
    y = np.eye(10)[labels[:600]]
    phi = map(x)
    for alphas in (1.0, (0.1, 1.0)):
        model = nd.RidgeRegressor(map, alphas=alphas).fit(x, y)
        assert worst(model, x, y, model.alpha_, phi=phi) < 3e-4


def test_constant_columns_and_nan_rows_are_as_before():
    x, y = far(1000.0)
    x[:, 2] = np.float32(0.1)
    model = nd.RidgeRegressor(alphas=1e-6).fit(x, y)
    assert np.abs(model.coef_[:, 2]).max() == 0.0
    x[7, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        nd.RidgeRegressor().fit(x, y)


def test_another_centre_is_another_run(tmp_path):
    """What a run's sums were counted from is in their fingerprint."""
    x, y = far(1000.0)
    keywords = {"features": None, "k": 2, "url": tmp_path / "run"}
    fit_ridge(MemoryRows(x, y), [], RidgeOptions(), ridge_plan("float32"), **sited(keywords))
    with pytest.raises(FingerprintError, match="centre: stored"):
        fit_ridge(MemoryRows(x + 500, y), [], RidgeOptions(), ridge_plan("float32"), **sited(keywords))
    record = Record()
    found = fit_ridge(
        MemoryRows(x, y), [], RidgeOptions(), ridge_plan("float32"), **sited({**keywords, "record": record})
    )
    assert record.stages["centre"]
    loaded = load_model(found.url)
    assert isinstance(loaded, RidgeModel)
    np.testing.assert_array_equal(loaded.scores(x), found.model.scores(x))
    np.testing.assert_allclose(loaded.centre, 1000.0, atol=1.0)


def test_the_sample_is_spread_over_all_rows_by_weight():
    x = np.zeros((10_000, 1))
    found = sample_rows(MemoryRows(x), 100)
    assert ((found // 100) == np.arange(100)).all()
    weights = np.zeros(10_000)
    weights[[5, 9_000]] = 1.0, 3.0
    rows, counts = np.unique(sample_rows(MemoryRows(x, None, weights), 100), return_counts=True)
    np.testing.assert_array_equal(rows, [5, 9_000])
    np.testing.assert_allclose(counts, [25, 75], atol=1)
    parts = (np.arange(10_000) % 2).astype(np.int16)
    assert (sample_rows(MemoryRows(x, None, None, parts, (1,)), 100) % 2 == 1).all()
    assert sample_rows(MemoryRows(x, None, np.zeros(10_000)), 100).size == 0
    np.testing.assert_array_equal(sample_rows(MemoryRows(x[:3]), 100), [0, 1, 2])
