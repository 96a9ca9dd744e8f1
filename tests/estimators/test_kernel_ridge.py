"""Kernel ridge estimators: scikit-learn's checks and its kernel ridge; inputs, clusters, urls, pickles, searches, warnings."""

import pickle
import shutil
import warnings
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ntkdask import write_dataset
from ntkdask.datasets.rows import MemoryRows
from ntkdask.errors import FingerprintError, InputError
from ntkdask.estimators import KernelRidgeClassifier, KernelRidgeRegressor, RidgeRegressor
from ntkdask.kernels import NNGP, NTK, RBF
from ntkdask.networks import fully_connected
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_ridge import plan as kernel_ridge_plan
from ntkdask.workflows.split import HOLDOUT, INNER_FOLDS, deal_inner, group_rows

ALPHAS = (1e-2, 1.0, 1e2)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 4)) + 0.5
Y2 = np.sin(X @ RNG.normal(size=(4, 2))) + 0.2 * RNG.normal(size=(70, 2)) + 3.0
Y = Y2[:, 0]
LABELS = np.array(["ant", "bee", "cow"])[np.argmax(X[:, :3] + 0.3 * RNG.normal(size=(70, 3)), axis=1)]
WEIGHTS = RNG.integers(0, 4, 70).astype(float)
IMAGES = RNG.integers(0, 256, (30, 4, 4, 3)).astype(np.uint8)
KERNEL = RBF(0.3)
OUT_OF_CORE = ("tiled_cholesky", "cg")
SOLVERS = ("eigh", "cholesky", "tiled_cholesky", "cg")


@parametrize_with_checks(
    [
        KernelRidgeClassifier(),
        KernelRidgeRegressor(),
        KernelRidgeClassifier(KERNEL, alphas=ALPHAS),
        KernelRidgeRegressor(KERNEL, solver="cg", tolerance=1e-10),
        KernelRidgeRegressor(KERNEL, ALPHAS, selection="loo", solver="cholesky"),
    ],
    # by definition: a row of weight k is not k rows when rows are left out one at a time
    expected_failed_checks=lambda e: (
        {
            "check_sample_weight_equivalence_on_dense_data": "leaving out a row of weight 2 leaves out both of two equal rows"
        }
        if e.selection == "loo"
        else {}
    ),
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# against scikit-learn, and ridge on the rows


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("y", [Y, Y2, Y2[:, :1]], ids=["1-d", "2-d", "column"])
def test_without_an_intercept_it_is_kernel_ridge(tmp_path, y, solver, weights):
    url = tmp_path / "run" if solver == "tiled_cholesky" else None
    ours = KernelRidgeRegressor(KERNEL, (0.5,), fit_intercept=False, solver=solver, tolerance=1e-11, url=url).fit(
        X, y, weights
    )
    theirs = KernelRidge(alpha=0.5, kernel="rbf", gamma=0.3).fit(X, y, weights)
    expected = theirs.predict(X) if y.shape[1:] != (1,) else theirs.predict(X)[:, 0]
    np.testing.assert_allclose(ours.predict(X), expected, rtol=1e-8)
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_.reshape(ours.dual_coef_.shape), atol=1e-8)
    assert not np.any(ours.intercept_)
    assert ours.dual_coef_.shape == ((70, 2) if y.shape[1:] == (2,) else (70,))
    assert (ours.alpha_, ours.alpha_path_, ours.n_features_in_, ours.solver_) == (0.5, [], 4, solver)
    assert ours.score(X, y, weights) == pytest.approx(theirs.score(X, y, weights), abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_kernel_is_ridge(tmp_path, solver):
    linear = NNGP(fully_connected(1, "identity", normalize=False))  # ⟨x, z⟩
    np.testing.assert_allclose(linear(X), X @ X.T, rtol=1e-12)
    url = tmp_path / "run" if solver == "tiled_cholesky" else None
    ours = KernelRidgeRegressor(linear, ALPHAS, selection="kfold", solver=solver, tolerance=1e-11, url=url).fit(
        X, Y2, WEIGHTS + 1
    )
    theirs = RidgeRegressor(None, ALPHAS, selection="kfold").fit(X, Y2, WEIGHTS + 1)
    assert ours.alpha_ == theirs.alpha_
    np.testing.assert_allclose(
        [r["score"] for r in ours.alpha_path_], [r["score"] for r in theirs.alpha_path_], rtol=1e-8
    )
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8)


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold", "holdout"])
def test_scores_are_those_of_ridge(selection):
    linear = NNGP(fully_connected(1, "identity", normalize=False))
    theirs = RidgeRegressor(None, ALPHAS, selection=selection).fit(X, Y2, WEIGHTS + 1)
    for solver in ("eigh", "cholesky"):
        ours = KernelRidgeRegressor(linear, ALPHAS, selection=selection, solver=solver).fit(X, Y2, WEIGHTS + 1)
        np.testing.assert_allclose(
            [r["score"] for r in ours.alpha_path_], [r["score"] for r in theirs.alpha_path_], rtol=1e-7
        )
        assert ours.alpha_ == theirs.alpha_ == min(ours.alpha_path_, key=lambda r: r["score"])["alpha"]


def test_coefficients_stand_in_the_order_of_the_groups():
    parts = deal_inner(group_rows(MemoryRows(X)), "kfold", INNER_FOLDS, HOLDOUT, 0)
    ours = KernelRidgeRegressor(KERNEL, ALPHAS, selection="kfold").fit(X, Y)
    order = np.argsort(parts, kind="stable")
    np.testing.assert_array_equal(ours.model_.points, X[order])
    single = KernelRidgeRegressor(KERNEL, (ours.alpha_,)).fit(X, Y)
    np.testing.assert_allclose(ours.dual_coef_, single.dual_coef_[order], atol=1e-8)


def test_classifiers():
    ours = KernelRidgeClassifier(KERNEL, (0.5,)).fit(X, LABELS)
    one_hot = (LABELS[:, None] == ours.classes_) - 1 / 3
    theirs = KernelRidgeRegressor(KERNEL, (0.5,)).fit(X, one_hot)
    np.testing.assert_allclose(ours.decision_function(X), theirs.predict(X), atol=1e-10)
    np.testing.assert_array_equal(ours.predict(X), ours.classes_[theirs.predict(X).argmax(axis=1)])
    assert ours.score(X, LABELS) > 0.7
    two = KernelRidgeClassifier(KERNEL, (0.5,)).fit(X, LABELS == "bee")
    signs = KernelRidgeRegressor(KERNEL, (0.5,)).fit(X, np.where(LABELS == "bee", 1.0, -1.0))
    np.testing.assert_allclose(two.decision_function(X), signs.predict(X), atol=1e-10)
    np.testing.assert_allclose(two.dual_coef_, signs.dual_coef_, atol=1e-10)
    assert two.intercept_ == pytest.approx(signs.intercept_)


def test_the_default_kernel_is_an_ntk():
    ours = KernelRidgeRegressor().fit(X, Y)
    assert ours.model_.kernel == NTK(fully_connected(1))
    np.testing.assert_allclose(ours.predict(X), KernelRidgeRegressor(NTK(fully_connected(1))).fit(X, Y).predict(X))


# dtypes and inputs


def test_dtypes():
    expected = KernelRidgeRegressor(KERNEL).fit(X, Y).predict(X)
    for dtype in ("float32", "float16"):
        ours = KernelRidgeRegressor(KERNEL).fit(X.astype(dtype), Y)
        assert ours.model_.preprocessor.dtype == "float32"
        np.testing.assert_allclose(ours.predict(X.astype(dtype)), expected, rtol=1e-2)
    integers = (3 * X).round().astype(int)
    for x in (integers, integers > 1, integers.clip(0, 255).astype(np.uint8)):
        ours = KernelRidgeRegressor(KERNEL).fit(x, Y)
        assert ours.model_.preprocessor.dtype == "float64"
        np.testing.assert_allclose(
            ours.predict(x), KernelRidgeRegressor(KERNEL).fit(x.astype(float), Y).predict(x.astype(float))
        )


def test_images():
    labels = np.arange(30) % 2
    ours = KernelRidgeClassifier(KERNEL).fit(IMAGES, labels)
    flat = (IMAGES / np.float32(255)).reshape(30, -1)
    np.testing.assert_allclose(
        ours.decision_function(IMAGES),
        KernelRidgeClassifier(KERNEL).fit(flat, labels).decision_function(flat),
        atol=1e-4,
    )
    assert ours.n_features_in_ == 48
    assert ours.model_.points.shape == (30, 4, 4, 3)
    with pytest.raises(
        InputError, match=r"rows of shape \(4, 3, 3\), but KernelRidgeClassifier is expecting \(4, 4, 3\)"
    ):
        ours.predict(IMAGES[:, :, :3])
    bits = IMAGES > 127
    np.testing.assert_array_equal(
        KernelRidgeRegressor(KERNEL).fit(bits, labels).predict(bits),
        KernelRidgeRegressor(KERNEL).fit(bits.astype(np.float32), labels).predict(bits.astype(np.float32)),
    )


def test_data_frames_lists_and_dask(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcd"))
    lazy = da.from_array(X, chunks=(30, 3))
    expected = KernelRidgeRegressor(KERNEL).fit(X, Y).predict(X)
    named = KernelRidgeRegressor(KERNEL).fit(frame, pd.Series(Y), pd.Series(np.ones(70)))
    assert named.feature_names_in_.tolist() == list("abcd")
    np.testing.assert_allclose(named.predict(frame), expected, rtol=1e-10)
    np.testing.assert_allclose(KernelRidgeRegressor(KERNEL).fit(X.tolist(), Y.tolist()).predict(X.tolist()), expected)
    for url in (None, tmp_path / "run"):
        ours = KernelRidgeRegressor(KERNEL, url=url).fit(lazy, da.from_array(Y, chunks=50))
        np.testing.assert_allclose(ours.predict(lazy), expected, rtol=1e-10)
        assert ours.score(lazy, da.from_array(Y, chunks=50)) == pytest.approx(named.score(frame, Y))


@pytest.mark.parametrize("solver", ["eigh", "cg"])
def test_datasets(tmp_path, solver):
    data = write_dataset(tmp_path / "d.zarr", X, LABELS, weights=WEIGHTS)
    codes = np.unique(LABELS, return_inverse=True)[1]
    expected = KernelRidgeClassifier(KERNEL, ALPHAS, selection="kfold").fit(X, codes, WEIGHTS)
    for x in (data, data.url, Path(data.url)):
        ours = KernelRidgeClassifier(KERNEL, ALPHAS, selection="kfold", solver=solver, tolerance=1e-12).fit(x)
        assert ours.alpha_ == expected.alpha_
        np.testing.assert_allclose(ours.decision_function(x), expected.decision_function(X), atol=1e-8)
        assert ours.score(x) == expected.score(X, codes, WEIGHTS)
    assert list(tmp_path.iterdir()) == [tmp_path / "d.zarr"]


def test_zero_rows_and_duplicates():
    x = np.concatenate([X, X[:5], np.zeros((2, 4))])
    y = np.concatenate([Y, Y[:5], [1.0, 1.0]])
    for kernel in (None, KERNEL):
        ours = KernelRidgeRegressor(kernel, (1e-6, 1.0)).fit(x, y)
        assert np.isfinite(ours.predict(x)).all()
        assert np.isfinite(ours.dual_coef_).all()


# urls and clusters


def written(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_url_resumes(tmp_path, solver):
    url = tmp_path / "run"
    estimator = KernelRidgeClassifier(KERNEL, ALPHAS, selection="holdout", solver=solver, tolerance=1e-11, url=url)
    first = clone(estimator).fit(X, LABELS, WEIGHTS)
    before = written(url)
    again = clone(estimator).fit(X, LABELS, WEIGHTS)
    assert written(url) == before
    np.testing.assert_array_equal(again.decision_function(X), first.decision_function(X))
    assert again.alpha_path_ == first.alpha_path_
    assert TileStore.open(url / "kernel").pending() == []
    here = KernelRidgeClassifier(KERNEL, ALPHAS, selection="holdout").fit(X, LABELS, WEIGHTS)
    np.testing.assert_allclose(first.decision_function(X), here.decision_function(X), atol=1e-8)
    for changed, words in (
        ({"kernel__gamma": 0.5}, r"kernel\.gamma: stored 0\.3, asked 0\.5"),
        ({"alphas": (1.0, 2.0)}, r"solver\.alphas"),
        ({"fit_intercept": False}, r"solver\.fit_intercept: stored True, asked False"),
        ({"tolerance": 1e-3}, r"solver\.tolerance"),
    ):
        with pytest.raises(FingerprintError, match=words):
            clone(first).set_params(**changed).fit(X, LABELS, WEIGHTS)
    with pytest.raises(FingerprintError, match="data: stored"):
        clone(first).fit(X, LABELS)
    with pytest.raises(FingerprintError, match="dtype: stored"):
        clone(first).fit(X.astype(np.float32), LABELS, WEIGHTS)
    assert written(url) == before


@pytest.mark.parametrize("solver", ["eigh", "cg"])
def test_a_client(two_workers, tmp_path, solver, monkeypatch):
    """With and without a url: the same fit; without one nothing is left, and the model needs nothing that is gone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    here = KernelRidgeRegressor(KERNEL, (0.1,)).fit(X, Y2, WEIGHTS)
    for url in (None, tmp_path / "run"):
        ours = KernelRidgeRegressor(KERNEL, (0.1,), solver=solver, tolerance=1e-12, client=two_workers, url=url).fit(
            X, Y2, WEIGHTS
        )
        assert list(tmp_path.iterdir()) == ([] if url is None else [url])
        np.testing.assert_allclose(ours.predict(X), here.predict(X), rtol=1e-8)
        back = pickle.loads(pickle.dumps(ours))
        assert back.client is None
        np.testing.assert_allclose(back.predict(X[:9]), ours.predict(X[:9]), rtol=1e-10)
    assert clone(ours).client is two_workers


def test_a_client_and_inputs_of_any_kind(two_workers, tmp_path):
    expected = KernelRidgeRegressor(KERNEL).fit(X, Y).predict(X)
    data = write_dataset(tmp_path / "d.zarr", X, Y)
    for x, y in ((da.from_array(X, chunks=(30, 4)), Y), (data, None), (data.url, None)):
        ours = KernelRidgeRegressor(KERNEL, client=two_workers).fit(x, y)
        np.testing.assert_allclose(ours.predict(x), expected, rtol=1e-9)
    labels = np.array(["", "b"])[np.arange(30) % 2]
    ours = KernelRidgeClassifier(KERNEL, client=two_workers).fit(IMAGES, labels)
    np.testing.assert_array_equal(
        ours.predict(IMAGES), KernelRidgeClassifier(KERNEL).fit(IMAGES, labels).predict(IMAGES)
    )


def test_a_failed_fit_keeps_its_matrix(tmp_path):
    x = np.concatenate([X, X[:1]])
    estimator = KernelRidgeRegressor(KERNEL, (0.0,), solver="eigh", url=tmp_path / "run")
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"rows 0 and 70: duplicate rows with different targets\? Merge them, or use alpha > "
        ):
            estimator.fit(x, np.append(Y, 9.0))
    kernel = TileStore.open(tmp_path / "run" / "kernel")
    assert (kernel.pending(), kernel.damaged()) == ([], [])
    with pytest.raises(FingerprintError, match=r"solver\.alphas: stored \[0\.0\], asked \[1\.0\]"):
        clone(estimator).set_params(alphas=(1.0,)).fit(x, np.append(Y, 9.0))


# warnings


@pytest.mark.parametrize("stored", [False, True])
def test_gradients_that_do_not_converge(tmp_path, monkeypatch, stored):
    """A warning names the residual; the iterate is kept and is near; enough iterations: no warning."""
    monkeypatch.setattr(kernel_ridge_plan, "MAX_RANK", 2)
    url = tmp_path / "short" if stored else None
    estimator = KernelRidgeRegressor(
        KERNEL, ALPHAS, selection="holdout", solver="cg", tolerance=1e-10, max_iterations=8, url=url
    )
    with pytest.warns(
        ConvergenceWarning,
        match=r"KernelRidgeRegressor: conjugate gradients did not converge in \d of 4 solves: at "
        r"alpha=\S+ the relative residual is [\d.e-]+ \(max_iterations=8 reached\)",
    ) as caught:
        short = estimator.fit(X, Y)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected = KernelRidgeRegressor(KERNEL, ALPHAS, selection="holdout").fit(X, Y)
    np.testing.assert_allclose(short.predict(X), expected.predict(X), atol=0.05)
    solves = short.fit_facts_["solves"]
    assert any(not s["converged"] for s in solves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = clone(estimator).set_params(max_iterations=1000, url=None).fit(X, Y)
    assert all(s["converged"] and s["residual"] <= 1e-10 for s in whole.fit_facts_["solves"])


@pytest.mark.parametrize("kernel", [KERNEL, RBF(0.5), RBF(2.0)])
def test_gradients_at_alpha_zero_say_what_to_do(kernel):
    """A warning where there is an iterate to keep, an error where there is none; never a model with NaN."""
    x = np.concatenate([X, X[:1]])
    words = r"at alpha=0.* At alpha=0 a singular K \(duplicate rows\) has no solution but for consistent targets: use alpha > 0"
    estimator = KernelRidgeRegressor(kernel, (0.0,), solver="cg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((InputError, ConvergenceWarning), match=words):
            estimator.fit(x, np.append(Y, 9.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            found = estimator.fit(x, np.append(Y, 9.0)).dual_coef_
        except InputError:
            return
    assert np.isfinite(found).all()


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": (-1.0, 1.0)}, "none negative"),
        ({"alphas": ()}, "at least one"),
        ({"alphas": "many"}, "a list of numbers"),
        ({"selection": "gvc"}, "did you mean 'gcv'"),
        ({"solver": "eig"}, "did you mean 'eigh'"),
        ({"solver": "tiled_cholesky"}, "works on stored tiles: give a url"),
        ({"solver": "cg", "selection": "loo", "alphas": (1.0, 2.0)}, "cannot choose among 2 alphas by 'loo'"),
        ({"tolerance": 2.0}, "tolerance is 2.0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"kernel": "rbf"}, "kernel is 'rbf'; give one of ntkdask.kernels"),
        ({"kernel": RBF}, "give one of ntkdask.kernels"),
        ({"kernel": np.dot}, "give one of ntkdask.kernels"),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],
)
def test_refused_parameters(change, message):
    estimator = KernelRidgeRegressor(**change)  # nothing is checked before fit
    with pytest.raises(InputError, match=message):
        estimator.fit(X, Y)


def test_refused_data(tmp_path):
    fitted = KernelRidgeRegressor(KERNEL).fit(X, Y)
    with pytest.raises(ValueError, match="X has 3 features, but KernelRidgeRegressor is expecting 4 features"):
        fitted.predict(X[:, :3])
    with pytest.raises(ValueError, match="0 sample"):
        KernelRidgeRegressor(KERNEL).fit(X[:0], Y[:0])
    with pytest.raises(ValueError, match="NaN"):
        KernelRidgeRegressor(KERNEL).fit(np.where(X > 2, np.nan, X), Y)
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict(np.full((1, 4), np.nan))
    with pytest.raises(InputError, match="negative in row 3"):
        KernelRidgeRegressor(KERNEL).fit(X, Y, np.where(np.arange(70) == 3, -1.0, 1.0))
    with pytest.raises(InputError, match="only one class"):
        KernelRidgeClassifier(KERNEL).fit(X, np.zeros(70, int))
    with pytest.raises(InputError, match="5 folds of 3 distinct rows"):
        KernelRidgeRegressor(KERNEL, ALPHAS, selection="kfold").fit(np.repeat(X[:3], 4, axis=0), Y[:12])
    with pytest.raises(
        InputError, match="is for classification, KernelRidgeRegressor is for regression: use KernelRidgeClassifier"
    ):
        KernelRidgeRegressor().fit(write_dataset(tmp_path / "c.zarr", X, LABELS))


# the manners of scikit-learn


def test_parameters_reach_into_kernels():
    estimator = KernelRidgeRegressor(KERNEL)
    estimator.set_params(kernel__gamma=0.7, fit_intercept=False)
    assert estimator.kernel == RBF(0.7)
    assert KERNEL.gamma == 0.3
    assert estimator.get_params(deep=False).keys() >= {"kernel", "alphas", "solver", "tolerance", "max_iterations"}
    network = fully_connected(2)
    assert KernelRidgeRegressor(NTK(fully_connected(1))).set_params(kernel__network=network).kernel == NTK(network)
    with pytest.raises(ValueError, match="RBF has no parameter 'gama'; did you mean 'gamma'"):
        estimator.set_params(kernel__gama=8)
    with pytest.raises(ValueError, match="kernel is None"):
        KernelRidgeRegressor().set_params(kernel__gamma=8)
    with pytest.raises(ValueError, match="gamma is -1"):
        estimator.set_params(kernel__gamma=-1)


def test_clones_and_pickles():
    estimator = KernelRidgeClassifier(KERNEL, alphas=[0.1, 1.0]).fit(X, LABELS)
    twin = clone(estimator)
    assert twin.kernel is KERNEL
    assert twin.alphas == [0.1, 1.0]
    assert twin.alphas is not estimator.alphas
    assert not hasattr(twin, "model_")
    assert not hasattr(twin, "dual_coef_")
    back = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(back.decision_function(X), estimator.decision_function(X))
    assert back.alpha_path_ == estimator.alpha_path_
    assert "RBF(gamma=0.3)" in repr(estimator)


def test_pickles_of_a_fit_in_a_folder_need_it(tmp_path):
    estimator = KernelRidgeRegressor(KERNEL, url=tmp_path / "run").fit(X, Y)
    back = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(back.predict(X), estimator.predict(X))
    in_memory = KernelRidgeRegressor(KERNEL).fit(X, Y)
    shutil.rmtree(tmp_path / "run")
    np.testing.assert_allclose(in_memory.predict(X), KernelRidgeRegressor(KERNEL).fit(X, Y).predict(X))


def test_searches():
    grid = {"kernelridgeregressor__kernel__gamma": [0.05, 100.0], "kernelridgeregressor__alphas": [(0.1,), ALPHAS]}
    search = GridSearchCV(make_pipeline(StandardScaler(), KernelRidgeRegressor(KERNEL)), grid, cv=3).fit(
        X, np.sin(X[:, 0])
    )
    assert search.best_params_["kernelridgeregressor__kernel__gamma"] == 0.05
    assert search.best_estimator_[-1].kernel == RBF(0.05)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    kernels = GridSearchCV(KernelRidgeClassifier(), {"kernel": [None, KERNEL]}, cv=3).fit(X, LABELS)
    assert np.isfinite(kernels.cv_results_["mean_test_score"]).all()
    assert KERNEL.gamma == 0.3


def test_the_users_arrays_stay_as_they_are():
    x, y, weights = X.copy(), Y2.copy(), WEIGHTS.copy()
    for solver in ("eigh", "cholesky", "cg"):
        KernelRidgeRegressor(KERNEL, ALPHAS, selection="kfold", solver=solver).fit(x, y, weights + 1)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y2)
    np.testing.assert_array_equal(weights, WEIGHTS)
