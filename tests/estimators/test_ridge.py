"""Ridge estimators: scikit-learn's checks and its own ridge on the same features; clusters, urls, pickles, searches."""

import json
import pickle

import dask.array as da
import numpy as np
import pytest
from estimator_examples import ALPHAS, IMAGES, LABELS, MAP, RNG, WEIGHTS, Y2, X, Y
from sklearn import config_context, linear_model
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

from ntkdask import threads, write_dataset
from ntkdask.arrays import host_cores
from ntkdask.datasets.rows import MemoryRows
from ntkdask.errors import FingerprintError, MemoryBudgetError
from ntkdask.estimators import FeatureTransformer, RidgeClassifier, RidgeRegressor, base
from ntkdask.features import ArcCosineFeatures, NTKRandomFeatures
from ntkdask.networks import fully_connected
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS, deal_inner, group_rows

DIGITS, DIGIT_LABELS = load_digits(return_X_y=True)


@parametrize_with_checks(
    [
        RidgeClassifier(),
        RidgeRegressor(),
        FeatureTransformer(),
        RidgeClassifier(MAP),
        RidgeRegressor(MAP),
        RidgeRegressor(selection="loo", alphas=[0.1, 1.0]),
        FeatureTransformer(MAP),
    ],
    # by definition: a row of weight k is not k rows when rows are left out one at a time
    expected_failed_checks=lambda e: (
        {
            "check_sample_weight_equivalence_on_dense_data": "leaving out a row of weight 2 leaves out both of two equal rows"
        }
        if getattr(e, "selection", "") == "loo"
        else {}
    ),
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# against scikit-learn


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("y", [Y, Y2, Y2[:, :1]], ids=["1-d", "2-d", "column"])
def test_regressor_is_ridge(y, solver, fit_intercept, weights):
    for alpha in ALPHAS:
        ours = RidgeRegressor(alphas=(alpha,), fit_intercept=fit_intercept, solver=solver).fit(X, y, weights)
        theirs = linear_model.Ridge(alpha=alpha, fit_intercept=fit_intercept).fit(X, y, weights)
        np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8, atol=1e-8)
        assert ours.predict(X).shape == theirs.predict(X).shape
        assert np.shape(ours.coef_) == np.shape(theirs.coef_)
        assert ours.score(X, y, weights) == pytest.approx(theirs.score(X, y, weights), abs=1e-9)
        assert (ours.alpha_, ours.alpha_path_, ours.n_features_in_) == (alpha, [], 6)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_classifier_is_ridge_classifier(weights):
    ours = RidgeClassifier(alphas=0.5).fit(X, LABELS, weights)
    theirs = linear_model.RidgeClassifier(alpha=0.5).fit(X, LABELS, weights)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    # their targets are ±1, ours 1 − 1/C and −1/C
    np.testing.assert_allclose(2 * ours.decision_function(X) + 2 / 3 - 1, theirs.decision_function(X), atol=1e-8)
    assert ours.score(X, LABELS) == theirs.score(X, LABELS) > 0.6


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_two_classes_decide_as_ridge_classifier_does(fit_intercept):
    labels = LABELS == "bee"
    ours = RidgeClassifier(fit_intercept=fit_intercept).fit(X, labels)
    theirs = linear_model.RidgeClassifier(fit_intercept=fit_intercept).fit(X, labels)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-8)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8)
    np.testing.assert_allclose([ours.intercept_], np.ravel(theirs.intercept_), atol=1e-8)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("selection", "mode"), [("loo", "eigen"), ("loo", "svd")])
def test_leave_one_out_is_ridge_cv(selection, mode, fit_intercept):
    ours = RidgeRegressor(alphas=ALPHAS, selection=selection, fit_intercept=fit_intercept).fit(X, Y2)
    theirs = linear_model.RidgeCV(ALPHAS, gcv_mode=mode, store_cv_results=True, fit_intercept=fit_intercept).fit(X, Y2)
    assert ours.alpha_ == theirs.alpha_
    scores = [row["score"] for row in ours.alpha_path_]
    np.testing.assert_allclose(scores, theirs.cv_results_.mean(axis=(0, 1)), rtol=1e-8)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8)


@pytest.mark.parametrize("weights", [None, WEIGHTS + 1], ids=["unweighted", "weighted"])
def test_k_fold_and_holdout_are_what_they_say(weights):
    w = np.ones(len(X)) if weights is None else weights
    for selection, count in (("kfold", INNER_FOLDS), ("holdout", 2)):
        ours = RidgeRegressor(alphas=ALPHAS, selection=selection).fit(X, Y, weights)
        parts = deal_inner(group_rows(MemoryRows(X)), selection, count, HOLDOUT, 0)
        expected = []
        for alpha in ALPHAS:
            errors = []
            for held in range(count) if selection == "kfold" else [1]:
                out = parts == held
                model = linear_model.Ridge(alpha=alpha).fit(X[~out], Y[~out], w[~out])
                errors.append(np.average((Y[out] - model.predict(X[out])) ** 2, weights=w[out]))
            expected.append(np.mean(errors))
        np.testing.assert_allclose([row["score"] for row in ours.alpha_path_], expected, rtol=1e-8)
        assert ours.alpha_ == ALPHAS[int(np.argmin(expected))]
        final = linear_model.Ridge(alpha=ours.alpha_).fit(X, Y, weights)
        np.testing.assert_allclose(ours.predict(X), final.predict(X), rtol=1e-8)


def test_features_are_the_maps_own():
    ours = RidgeClassifier(MAP, alphas=ALPHAS).fit(X, LABELS)
    targets = encode_targets(np.unique(LABELS, return_inverse=True)[1], 3, "float64")
    theirs = linear_model.Ridge(alpha=ours.alpha_).fit(MAP(X), targets)
    np.testing.assert_allclose(ours.decision_function(X), theirs.predict(MAP(X)), atol=1e-8)
    assert ours.coef_.shape == (3, 32)
    assert [row["alpha"] for row in ours.alpha_path_] == list(ALPHAS)
    assert min(ours.alpha_path_, key=lambda row: row["score"])["alpha"] == ours.alpha_


def test_digits():
    network, accuracies = fully_connected(1), []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(DIGITS))
        train, test = order[:1300], order[1300:]
        ours = RidgeClassifier(NTKRandomFeatures(network, n_components=512, seed=seed), alphas=np.logspace(-3, 3, 7))
        ours.fit(DIGITS[train] / 16, DIGIT_LABELS[train])
        accuracies.append(ours.score(DIGITS[test] / 16, DIGIT_LABELS[test]))
    assert min(accuracies) >= 0.96


# the manners of scikit-learn


def test_parameters_reach_into_features():
    estimator = RidgeClassifier(MAP)
    assert estimator.get_params()["features__n_components"] == 32
    assert "features__n_components" not in estimator.get_params(deep=False)
    estimator.set_params(features__n_components=8, features__seed=3, fit_intercept=False)
    assert estimator.features == ArcCosineFeatures(8, seed=3)
    assert MAP.n_components == 32
    estimator.set_params(features=MAP, features__seed=4)
    assert estimator.features == ArcCosineFeatures(32, seed=4)
    assert FeatureTransformer(MAP).set_params(map__order=0).map == ArcCosineFeatures(32, order=0)
    with pytest.raises(ValueError, match="did you mean 'n_components'"):
        estimator.set_params(features__n_component=8)
    with pytest.raises(ValueError, match="features is None"):
        RidgeClassifier().set_params(features__n_components=8)
    with pytest.raises(ValueError, match="Invalid parameter"):
        estimator.set_params(feature__n_components=8)


def test_clones_and_pickles():
    with config_context(enable_metadata_routing=True):
        estimator = RidgeClassifier(MAP, alphas=[0.1, 1.0]).set_fit_request(sample_weight=True).fit(X, LABELS)
        twin = clone(estimator)
    assert twin.features is MAP
    assert twin.alphas == [0.1, 1.0]
    assert twin.alphas is not estimator.alphas
    assert twin.get_metadata_routing().fit.requests["sample_weight"] is True
    assert not hasattr(twin, "model_")
    assert not hasattr(twin, "coef_")
    back = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(back.decision_function(X), estimator.decision_function(X))
    assert back.alpha_path_ == estimator.alpha_path_
    estimator.client = object()
    assert clone(estimator).client is estimator.client
    assert pickle.loads(pickle.dumps(RidgeClassifier(client=lambda: 0))).client is None


def test_representations():
    estimator = RidgeClassifier(MAP)
    assert "ArcCosineFeatures(n_components=32" in repr(estimator)
    assert "ArcCosineFeatures" in estimator._repr_html_()
    assert "ArcCosineFeatures" in make_pipeline(FeatureTransformer(MAP), estimator).fit(X, LABELS)._repr_html_()


def test_pipelines_and_searches():
    pipeline = make_pipeline(StandardScaler(), RidgeClassifier(MAP))
    grid = {"ridgeclassifier__alphas": [(0.1,), (10.0,)], "ridgeclassifier__features__n_components": [4, 64]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, LABELS)
    assert search.best_params_["ridgeclassifier__features__n_components"] == 64
    assert search.best_estimator_[-1].coef_.shape == (3, 64)
    maps = GridSearchCV(RidgeClassifier(), {"features": [None, MAP]}, cv=3).fit(X, LABELS)
    assert np.isfinite(maps.cv_results_["mean_test_score"]).all()
    two_steps = make_pipeline(FeatureTransformer(MAP), RidgeRegressor())
    np.testing.assert_allclose(two_steps.fit(X, Y2).predict(X), RidgeRegressor(MAP).fit(X, Y2).predict(X), rtol=1e-10)
    scores = cross_val_score(RidgeRegressor(alphas=ALPHAS), X, Y, cv=3)
    np.testing.assert_allclose(scores, cross_val_score(linear_model.RidgeCV(ALPHAS), X, Y, cv=3), atol=1e-2)


# urls and clusters


def written(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("selection", ["gcv", "loo", "holdout"])
def test_a_url_resumes(tmp_path, selection):
    url = tmp_path / "run"
    first = RidgeClassifier(MAP, ALPHAS, selection=selection, url=url).fit(X, LABELS, WEIGHTS)
    before = written(url)
    again = RidgeClassifier(MAP, ALPHAS, selection=selection, url=url).fit(X, LABELS, WEIGHTS)
    assert written(url) == before
    np.testing.assert_array_equal(again.decision_function(X), first.decision_function(X))
    assert again.alpha_path_ == first.alpha_path_
    here = RidgeClassifier(MAP, ALPHAS, selection=selection).fit(X, LABELS, WEIGHTS)
    np.testing.assert_allclose(first.decision_function(X), here.decision_function(X), rtol=1e-12)
    for changed in ({"features__seed": 1}, {"alphas": (1.0, 2.0)}, {"fit_intercept": False}):
        with pytest.raises(FingerprintError):
            clone(first).set_params(**changed).fit(X, LABELS, WEIGHTS)
    with pytest.raises(FingerprintError, match="data: stored"):
        clone(first).fit(X, LABELS)
    with pytest.raises(FingerprintError, match="dtype: stored"):
        clone(first).fit(X.astype(np.float32), LABELS, WEIGHTS)
    assert written(url) == before


def test_an_interrupted_fit_goes_on(tmp_path, monkeypatch):
    from ntkdask.workflows.ridge import solve as solve_ridge

    estimator = RidgeRegressor(MAP, ALPHAS, selection="kfold", url=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(solve_ridge, "_solve_folds", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            estimator.fit(X, Y)
    sums = {p: t for p, t in written(tmp_path).items() if "gram" in str(p)}
    estimator.fit(X, Y)
    assert {p: t for p, t in written(tmp_path).items() if "gram" in str(p)} == sums
    assert "solve" in json.loads((tmp_path / "record.json").read_text())["stages"]
    expected = RidgeRegressor(MAP, ALPHAS, selection="kfold").fit(X, Y)
    np.testing.assert_allclose(estimator.predict(X), expected.predict(X), rtol=1e-12)


def test_a_refused_plan_is_not_recorded(tmp_path, monkeypatch):
    """What the error advises is another fit in the same folder."""
    monkeypatch.setattr(
        base, "require_memory", lambda costs, found: (_ for _ in ()).throw(MemoryBudgetError("too much"))
    )
    with pytest.raises(MemoryBudgetError):
        RidgeRegressor(MAP, ALPHAS, url=tmp_path).fit(X, Y)
    assert not (tmp_path / "record.json").exists()
    monkeypatch.undo()
    RidgeRegressor(MAP.replace(n_components=16), ALPHAS, url=tmp_path).fit(X, Y)


def test_dask_arrays_with_a_url_are_written_once_each(tmp_path):
    one, other = (da.from_array(x, chunks=(40, 6)) for x in (X, X[::-1].copy()))
    estimator = RidgeRegressor(url=tmp_path).fit(one, Y)
    assert len(list((tmp_path / "inputs").iterdir())) == 1
    RidgeRegressor(url=tmp_path).fit(da.from_array(X, chunks=(30, 6)), Y)
    assert len(list((tmp_path / "inputs").iterdir())) == 1
    np.testing.assert_allclose(estimator.predict(other), RidgeRegressor().fit(X, Y).predict(X[::-1]), rtol=1e-10)
    with pytest.raises(FingerprintError):
        RidgeRegressor(url=tmp_path).fit(other, Y)


def test_clusters_agree(one_worker, two_workers, tmp_path):
    x, y = DIGITS[:600].astype(np.float32), DIGIT_LABELS[:600]
    weights = RNG.integers(1, 3, 600)
    for selection in ("loo", "kfold"):
        here = RidgeClassifier(MAP, ALPHAS, selection=selection).fit(x, y, weights)
        fits = [
            RidgeClassifier(MAP, ALPHAS, selection=selection, client=c, url=tmp_path / f"{selection}-{i}")
            for i, c in enumerate([one_worker, two_workers])
        ]
        # one worker has two threads, two have one each: bits are equal for an equal plan
        plan = None
        for fit in fits:
            if plan is not None:
                fit.url.mkdir()
                _with_plan(fits[0].url, fit.url, plan)
            fit.fit(x, y, weights)
            plan = json.loads((fit.url / "record.json").read_text())["stages"]["plan"]
        one, two = fits
        np.testing.assert_array_equal(one.model_.weights, two.model_.weights)
        assert one.alpha_path_ == two.alpha_path_
        assert one.alpha_ == here.alpha_
        np.testing.assert_allclose(one.decision_function(x), here.decision_function(x), atol=2e-3)
        np.testing.assert_allclose(two.decision_function(x[:100]), one.decision_function(x[:100]), atol=1e-4)
        back = pickle.loads(pickle.dumps(two))
        assert back.client is None
        np.testing.assert_allclose(back.decision_function(x), two.decision_function(x), atol=1e-4)


def _with_plan(source, target, plan):
    """Give the run to come in `target` the plan of the one in `source`, as a resumed run has it."""
    record = json.loads((source / "record.json").read_text())
    (target / "record.json").write_text(json.dumps({**record, "stages": {"plan": plan}}))


def test_a_client_without_a_url_leaves_nothing(two_workers, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    here = RidgeRegressor(MAP, ALPHAS).fit(X, Y2)
    for x in (X, da.from_array(X, chunks=(40, 6)), write_dataset(tmp_path / "d.zarr", X, Y2)):
        y = Y2 if not hasattr(x, "url") else None
        ours = RidgeRegressor(MAP, ALPHAS, client=two_workers).fit(x, y)
        np.testing.assert_allclose(ours.predict(x), here.predict(X), rtol=1e-8)
        assert clone(ours).client is two_workers
    assert list(tmp_path.iterdir()) == [tmp_path / "d.zarr"]


def test_images_and_labels_on_a_cluster(one_worker):
    labels = np.array(["", "b"])[np.arange(40) % 2]
    ours = RidgeClassifier(MAP, client=one_worker).fit(IMAGES, labels)
    np.testing.assert_array_equal(ours.predict(IMAGES), RidgeClassifier(MAP).fit(IMAGES, labels).predict(IMAGES))


def test_threads_follow_what_joblib_and_the_environment_allow():
    with threadpool_limits(1, user_api="blas"):
        assert threads.ambient() == 1
    assert 1 <= threads.ambient() <= host_cores()
