"""Own folds and scores for choosing alpha: against scikit-learn's RidgeCV and GridSearchCV, and refused where nothing takes them."""

import pickle

import dask.array as da
import numpy as np
import pytest
from estimator_examples import ALPHAS, IMAGES, LABELS, WEIGHTS, Y2, X, Y
from scipy.sparse import csr_array
from sklearn import linear_model
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import make_scorer, median_absolute_error
from sklearn.model_selection import GridSearchCV, KFold, RepeatedKFold, ShuffleSplit, StratifiedKFold

from ntkdask import write_dataset
from ntkdask.errors import FingerprintError, InputError
from ntkdask.estimators import KernelRidgeClassifier, KernelRidgeRegressor, RidgeClassifier, RidgeRegressor
from ntkdask.features import ArcCosineFeatures, NTKSketch
from ntkdask.kernels import RBF
from ntkdask.networks import fully_connected

GROUPS = list(KFold(4, shuffle=True, random_state=3).split(X))
HOLD = [(np.arange(30, 90), np.arange(30))]


def grid(model, name, cv, scoring, y=Y, **fit):
    return GridSearchCV(model, {name: ALPHAS}, cv=cv, scoring=scoring).fit(X, y, **fit)


@pytest.mark.parametrize("weights", [None, WEIGHTS + 1], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(
    "cv", [5, KFold(3, shuffle=True, random_state=1), GROUPS, HOLD], ids=lambda c: type(c).__name__
)
def test_folds_that_cut_the_rows_are_sums(cv, weights):
    ours = RidgeRegressor(alphas=ALPHAS, cv=cv).fit(X, Y2, weights)
    kernel = KernelRidgeRegressor(RBF(0.2), ALPHAS, fit_intercept=False, cv=cv).fit(X, Y2, weights)
    folds = [*KFold(5).split(X)] if cv == 5 else cv if isinstance(cv, list) else [*cv.split(X)]
    for model, make in (
        (ours, linear_model.Ridge),
        (kernel, lambda alpha: KernelRidge(alpha=alpha, kernel="rbf", gamma=0.2)),
    ):
        for row, alpha in zip(model.alpha_path_, ALPHAS, strict=True):
            w, errors = np.ones(90) if weights is None else weights, []
            for train, test in folds:
                fold = make(alpha=alpha).fit(X[train], Y2[train], sample_weight=w[train])
                errors.append(np.average(((Y2[test] - fold.predict(X[test])) ** 2).mean(axis=1), weights=w[test]))
            assert row["score"] == pytest.approx(np.mean(errors), rel=1e-7)
        assert model.best_score_ == -min(row["score"] for row in model.alpha_path_)
        final = make(alpha=model.alpha_).fit(X, Y2, sample_weight=weights)
        np.testing.assert_allclose(model.predict(X), final.predict(X), rtol=1e-7, atol=1e-8)


def test_an_integer_is_stratified_for_classes():
    ours = RidgeClassifier(alphas=ALPHAS, cv=3).fit(X, LABELS)
    same = RidgeClassifier(alphas=ALPHAS, cv=list(StratifiedKFold(3).split(X, LABELS))).fit(X, LABELS)
    other = RidgeClassifier(alphas=ALPHAS, cv=list(KFold(3).split(X))).fit(X, LABELS)
    assert ours.alpha_path_ == same.alpha_path_ != other.alpha_path_


@pytest.mark.parametrize(
    "cv",
    [4, ShuffleSplit(3, random_state=0), RepeatedKFold(n_splits=3, n_repeats=2, random_state=0)],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize(
    "scoring", ["r2", "neg_mean_absolute_error", make_scorer(median_absolute_error, greater_is_better=False)]
)
def test_scores_are_those_of_grid_search(cv, scoring):
    weights = WEIGHTS + 1
    theirs = grid(linear_model.Ridge(), "alpha", cv, scoring, sample_weight=weights)
    ours = RidgeRegressor(alphas=ALPHAS, cv=cv, scoring=scoring).fit(X, Y, weights)
    assert ours.alpha_ == theirs.best_params_["alpha"]
    assert ours.best_score_ == pytest.approx(theirs.best_score_, rel=1e-8)
    np.testing.assert_allclose(
        [-row["score"] for row in ours.alpha_path_], theirs.cv_results_["mean_test_score"], rtol=1e-8
    )
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8)


def test_scores_of_classifiers_and_kernels():
    theirs = grid(linear_model.RidgeClassifier(class_weight="balanced"), "alpha", 3, "balanced_accuracy", LABELS)
    ours = RidgeClassifier(alphas=ALPHAS, cv=3, scoring="balanced_accuracy", class_weight="balanced").fit(X, LABELS)
    np.testing.assert_allclose([-row["score"] for row in ours.alpha_path_], theirs.cv_results_["mean_test_score"])
    kernel = KernelRidgeClassifier(RBF(0.1), ALPHAS, cv=3, scoring="accuracy").fit(X, LABELS)
    assert 0.5 < kernel.best_score_ <= 1.0


@pytest.mark.parametrize("selection", ["kfold", "holdout"])
def test_own_folds_serve_scores(selection):
    squares = RidgeRegressor(alphas=ALPHAS, selection=selection).fit(X, Y)
    scored = RidgeRegressor(alphas=ALPHAS, selection=selection, scoring="neg_mean_squared_error").fit(X, Y)
    np.testing.assert_allclose(
        [row["score"] for row in squares.alpha_path_], [row["score"] for row in scored.alpha_path_], rtol=1e-8
    )


def test_folds_of_images_datasets_and_dask(tmp_path):
    labels, images = np.arange(40) % 2, ArcCosineFeatures(16)
    model = RidgeClassifier(images, ALPHAS, cv=4, scoring="accuracy").fit(IMAGES, labels)
    assert len(model.alpha_path_) == 3
    expected = RidgeRegressor(alphas=ALPHAS, cv=GROUPS).fit(X, Y)
    dataset = write_dataset(tmp_path / "d", X, Y)
    for x, y in ((dataset, None), (da.from_array(X, chunks=40), Y)):
        ours = RidgeRegressor(alphas=ALPHAS, cv=GROUPS).fit(x, y)
        np.testing.assert_allclose(
            [row["score"] for row in ours.alpha_path_], [row["score"] for row in expected.alpha_path_], rtol=1e-9
        )
        with pytest.raises(InputError, match="rows in memory"):
            RidgeRegressor(alphas=ALPHAS, cv=GROUPS, scoring="r2").fit(x, y)


def test_a_url_keeps_fits_of_other_folds_apart(tmp_path):
    RidgeRegressor(alphas=ALPHAS, cv=GROUPS, url=tmp_path / "fit").fit(X, Y)
    RidgeRegressor(alphas=ALPHAS, cv=GROUPS, url=tmp_path / "fit").fit(X, Y)
    with pytest.raises(FingerprintError):
        RidgeRegressor(alphas=ALPHAS, cv=KFold(4), url=tmp_path / "fit").fit(X, Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "r2"}, "makes none"),
        ({"scoring": "r2", "selection": "loo"}, "makes none"),
        ({"cv": 3, "selection": "loo"}, "so does selection"),
        ({"cv": 3, "selection": "holdout"}, "so does selection"),
        ({"cv": 1}, "cv is 1"),
        ({"cv": True}, "cv is True"),
        ({"cv": "five"}, "cv is 'five'"),
        ({"cv": 3, "scoring": ["r2", "max_error"]}, "one score"),
        ({"cv": ShuffleSplit(3, random_state=0)}, "every row out once"),
        ({"cv": RepeatedKFold(n_splits=3, n_repeats=2, random_state=0)}, "every row out once"),
        ({"cv": [(np.arange(30, 60), np.arange(30))]}, "every row out once"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        RidgeRegressor(alphas=ALPHAS, **options).fit(X, Y)


@pytest.mark.parametrize(
    "options", [{"cv": 3}, {"cv": 3, "scoring": "r2"}, {"selection": "kfold", "scoring": "r2"}], ids=str
)
def test_folds_of_sparse_rows_are_those_of_dense_ones(options):
    rows = np.where(np.abs(X) > 1.0, X, 0.0)
    model = RidgeRegressor(NTKSketch(fully_connected(1), 32, leaves="count"), ALPHAS, **options)
    scores = [[row["score"] for row in model.fit(x, Y).alpha_path_] for x in (csr_array(rows), rows)]
    if "cv" in options:  # the house's own folds are dealt by the bytes of rows
        np.testing.assert_allclose(*scores, rtol=1e-8)
    assert np.isfinite(scores).all()


def test_pickles_and_used_up_splits():
    model = RidgeRegressor(alphas=ALPHAS, cv=KFold(4), scoring="r2").fit(X, Y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
    once = RidgeRegressor(alphas=ALPHAS, cv=KFold(4).split(X), scoring="r2").fit(X, Y)
    assert once.alpha_path_ == model.alpha_path_
