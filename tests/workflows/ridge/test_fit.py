"""Ridge fits from sums against fits from rows: every way to choose alpha, with and without weights, here and on workers."""

from pathlib import Path

import numpy as np
import pytest
from job_examples import (
    Counter,
    Killed,
    class_data,
    feature_map,
    naive_ridge,
    regression_data,
    ridge_plan,
    sited,
    stored,
)

from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import InputError
from ntkdask.execution.progress import Record
from ntkdask.preprocessing import fit_in_memory, parse_steps
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.states import save_state
from ntkdask.workflows.model import RidgeModel
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge
from ntkdask.workflows.selection import best_alpha, score_path
from ntkdask.workflows.split import state_of

ALPHAS = (0.003, 0.3, 30.0)
FOLDS = [(0,), (1,), (2,)]
N = 90
PARTS = (np.random.default_rng(8).permutation(N) % 4).astype(np.int16)
"""Three folds; rows of part 3 are test rows."""
TRAIN = PARTS < 3


def data(k: int = 2):
    x, y = regression_data(N, k=k)
    return x / x.std(axis=0), y


def naive_gcv(phi, y, alpha):
    n = len(phi)
    w, b = naive_ridge(phi, y, alpha)
    centred = phi - phi.mean(axis=0)
    hat = centred @ np.linalg.solve(centred.T @ centred + alpha * np.eye(phi.shape[1]), centred.T) + 1 / n
    residual = y.reshape(n, -1) - phi @ w - b
    return n * (residual**2).sum(axis=0).mean() / (n - np.trace(hat)) ** 2


def naive_errors(phi, y, alpha, train, test, weights=None):
    """Mean squared error per target and unit of weight on `test` of the fit on `train`."""
    every = np.ones(len(phi)) if weights is None else weights
    w, b = naive_ridge(phi[train], y[train], alpha, every[train])
    error = y.reshape(len(y), -1)[test] - phi[test] @ w - b
    return (every[test] @ error**2).mean() / every[test].sum()


def naive_loo(phi, y, alpha, weights=None):
    n = len(phi)
    every = np.ones(n) if weights is None else weights
    errors = [
        naive_errors(phi, y, alpha, np.arange(n) != i, [i])
        if weights is None
        else naive_errors(phi, y, alpha, np.arange(n) != i, [i], weights)
        for i in range(n)
        if every[i] > 0
    ]
    return np.average(errors, weights=every[every > 0])


def naive_scores(selection, phi, y, parts, weights=None):
    scores = []
    for alpha in ALPHAS:
        if selection == "gcv":
            scores.append(naive_gcv(phi, y, alpha))
        elif selection == "loo":
            scores.append(naive_loo(phi, y, alpha, weights))
        else:
            folds = [2] if selection == "holdout" else range(3)
            scores.append(np.mean([naive_errors(phi, y, alpha, parts != f, parts == f, weights) for f in folds]))
    return scores


def rows_in(where: str, folder: Path, x, y, weights=None):
    if where == "memory":
        return MemoryRows(x, y, weights, PARTS, ())
    return DatasetRows(stored(folder, x, y, weights=weights).url, save_state(folder / "state", state_of(PARTS)), ())


def fit(rows, selection="gcv", *, alphas=ALPHAS, features=None, dtype="float64", slab_rows=32, **keywords):
    options = {"features": features, "k": 2}
    return fit_ridge(
        rows,
        FOLDS,
        RidgeOptions(alphas, selection=selection),
        ridge_plan(dtype, slab_rows, 16),
        **sited({**options, **keywords}),
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("where", ["memory", "dataset"])
@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold", "holdout"])
def test_scores_and_weights_are_the_naive_ones(tmp_path, client, selection, where, dtype):
    x, y = data()
    map = feature_map(40)
    keywords = {} if where == "memory" else {"url": tmp_path / "run", "client": client}
    found = fit(rows_in(where, tmp_path, x, y), selection, features=map, dtype=dtype, **keywords)
    phi = map(x.astype(dtype)).astype(np.float64)[TRAIN]
    expected = naive_scores(selection, phi, y[TRAIN], PARTS[TRAIN])
    rtol = 1e-7 if dtype == "float64" else 2e-3
    assert [row["alpha"] for row in found.path] == list(ALPHAS)
    assert np.allclose([row["score"] for row in found.path], expected, rtol=rtol)
    assert found.model.alpha == ALPHAS[int(np.argmin(expected))]
    w, b = naive_ridge(phi, y[TRAIN], found.model.alpha)
    scale = np.abs(w).max()
    assert np.abs(found.model.weights - w).max() < (1e-8 if dtype == "float64" else 1e-3) * scale
    assert np.allclose(found.model.intercept, b, atol=1e-7 if dtype == "float64" else 1e-3)


@pytest.mark.parametrize("selection", ["loo", "kfold", "holdout"])
def test_weighted_rows(tmp_path, selection):
    """An integer weight is a repeated row in the fit; scores average by weight."""
    x, y = data()
    weights = np.random.default_rng(1).integers(0, 3, N).astype(float)
    found = fit(rows_in("memory", tmp_path, x, y, weights), selection)
    expected = naive_scores(selection, x[TRAIN], y[TRAIN], PARTS[TRAIN], weights[TRAIN])
    assert np.allclose([row["score"] for row in found.path], expected, rtol=1e-7)
    repeated = np.repeat(np.flatnonzero(TRAIN), weights[TRAIN].astype(int))
    w, b = naive_ridge(x[repeated], y[repeated], found.model.alpha)
    assert np.allclose(found.model.weights, w, rtol=1e-8)
    assert np.allclose(found.model.intercept, b, rtol=1e-8)


@pytest.mark.parametrize("slab_rows", [N, 7])
def test_slabs_do_not_matter(tmp_path, slab_rows):
    x, y = data()
    assert np.allclose(
        fit(rows_in("memory", tmp_path, x, y), slab_rows=slab_rows).model.weights,
        fit(rows_in("memory", tmp_path, x, y)).model.weights,
        rtol=1e-9,
    )


def test_rows_of_other_parts_never_enter(tmp_path):
    x, y = data()
    spoiled_x, spoiled_y = x.copy(), y.copy()
    spoiled_x[~TRAIN] *= 1e6
    spoiled_y[~TRAIN] = 1e9
    for selection in ("gcv", "loo", "kfold", "holdout"):
        clean = fit(rows_in("memory", tmp_path, x, y), selection, steps=parse_steps(["standardize"]))
        spoiled = fit(rows_in("memory", tmp_path, spoiled_x, spoiled_y), selection, steps=parse_steps(["standardize"]))
        assert clean.path == spoiled.path
        assert clean.model.weights.tobytes() == spoiled.model.weights.tobytes()


def test_preprocessing_is_fitted_on_the_training_rows(tmp_path):
    x, y = regression_data(N, k=2)
    found = fit(rows_in("memory", tmp_path, x, y), steps=parse_steps(["standardize"])).model
    expected = fit_in_memory(["standardize"], x[TRAIN], "float64")
    assert np.allclose(found.preprocessor(x), expected(x), rtol=1e-12)
    w, b = naive_ridge(expected(x)[TRAIN], y[TRAIN], found.alpha)
    assert np.allclose(found.weights, w, rtol=1e-8)
    assert np.allclose(found.intercept, b, rtol=1e-8)


def test_classes_are_zero_mean_one_hot(tmp_path):
    x, labels = class_data(N)
    found = fit(rows_in("memory", tmp_path, x, labels), n_classes=3, k=3).model
    w, b = naive_ridge(x[TRAIN].astype(float), encode_targets(labels[TRAIN], 3, "float64"), found.alpha)
    assert np.allclose(found.weights, w, rtol=1e-8)
    assert np.allclose(found.intercept, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "eigh"])
@pytest.mark.parametrize("intercept", [True, False])
def test_one_alpha_by_any_factorisation(tmp_path, solver, intercept):
    x, y = data()
    found = fit_ridge(
        rows_in("memory", tmp_path, x, y),
        FOLDS,
        RidgeOptions((0.3,), intercept, "kfold", solver),
        ridge_plan(),
        features=None,
        k=2,
    )
    w, b = naive_ridge(x[TRAIN], y[TRAIN], 0.3, intercept=intercept)
    assert found.path == []
    assert found.model.alpha == 0.3
    assert np.allclose(found.model.weights, w, rtol=1e-8)
    assert np.allclose(found.model.intercept, b, rtol=1e-8, atol=1e-12)
    assert intercept or not found.model.intercept.any()


@pytest.mark.parametrize("alpha", [1e-16, 1e-6, 1e-2])
@pytest.mark.parametrize("intercept", [True, False])
def test_one_alpha_with_fewer_rows_than_features(alpha, intercept):
    """float32: the Gram is singular but for rounding of 1e-7; "auto" cuts the rank. Against the float64 twin by a pseudoinverse."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 200)).astype("float32")
    y = rng.standard_normal((20, 2))
    options = RidgeOptions((alpha,), intercept)
    found = fit_ridge(MemoryRows(x, y), [], options, ridge_plan("float32"), features=None, k=2)
    exact = x.astype(float) - (x.astype(float).mean(axis=0) if intercept else 0)
    dual = exact.T @ np.linalg.solve(exact @ exact.T + (alpha + 1e-13) * np.eye(20) + intercept, y)
    assert np.abs(found.model.weights - dual).max() <= 1e-4 * np.abs(dual).max()


def test_folds_by_cholesky_are_those_by_eigh(tmp_path):
    x, y = data()
    found = [
        fit_ridge(
            rows_in("memory", tmp_path, x, y),
            FOLDS,
            RidgeOptions(ALPHAS, True, "kfold", solver),
            ridge_plan(),
            features=None,
            k=2,
        )
        for solver in ("cholesky", "eigh")
    ]
    assert np.allclose([r["score"] for r in found[0].path], [r["score"] for r in found[1].path], rtol=1e-9)
    assert np.allclose(found[0].model.weights, found[1].model.weights, rtol=1e-8)


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold"])
def test_more_features_than_rows(tmp_path, selection):
    x, y = data()
    map = feature_map(160)
    found = fit(rows_in("memory", tmp_path, x, y), selection, features=map)
    expected = naive_scores(selection, map(x)[TRAIN], y[TRAIN], PARTS[TRAIN])
    assert np.allclose([row["score"] for row in found.path], expected, rtol=1e-6)


def test_constant_targets_and_features(tmp_path):
    x = np.ones((N, 3))
    found = fit(rows_in("memory", tmp_path, x, np.full((N, 2), 7.0)))
    assert np.allclose(found.model.weights, 0.0, atol=1e-12)
    assert np.allclose(found.model.intercept, 7.0)


def test_repeated_rows_and_one_row():
    x, y = data()
    twice = MemoryRows(np.repeat(x, 2, axis=0), np.repeat(y, 2, axis=0))
    fitted = fit_ridge(twice, [], RidgeOptions((0.6,)), ridge_plan(), features=None, k=2).model
    assert np.allclose(fitted.weights, naive_ridge(x, y, 0.3)[0], rtol=1e-8)
    alone = fit_ridge(MemoryRows(x[:1], y[:1]), [], RidgeOptions((0.6,)), ridge_plan(), features=None, k=2).model
    assert np.allclose(alone.weights, 0.0)
    assert np.allclose(alone.intercept, y[0])


def test_a_fold_without_rows_is_refused(tmp_path):
    x, y = data()
    weights = (PARTS != 1).astype(float)
    with pytest.raises(InputError, match="fold 1 has no rows"):
        fit(rows_in("memory", tmp_path, x, y, weights), "kfold")


def test_no_rows_at_all():
    x, y = data()
    with pytest.raises(InputError, match="no rows"):
        fit_ridge(MemoryRows(x, y, np.zeros(N)), [], RidgeOptions((1.0,)), ridge_plan(), features=None, k=2)


# stored fits


def test_a_stored_model_is_the_one_in_memory(tmp_path):
    x, y = data()
    plain = fit(rows_in("memory", tmp_path, x, y), steps=parse_steps(["standardize"]))
    found = fit(rows_in("dataset", tmp_path, x, y), steps=parse_steps(["standardize"]), url=tmp_path / "run")
    loaded = RidgeModel.load(found.url)
    assert loaded.weights.tobytes() == plain.model.weights.tobytes()
    assert loaded.intercept.tobytes() == plain.model.intercept.tobytes()
    assert (loaded.alpha, loaded.n_classes, loaded.map) == (plain.model.alpha, None, None)
    assert np.array_equal(loaded.preprocessor(x), plain.model.preprocessor(x))
    assert found.path == plain.path


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold"])
def test_resume_gives_equal_bits(tmp_path, selection):
    """Killed again and again, a little later each time: what was finished is kept, the model's address is the same."""
    rows = rows_in("dataset", tmp_path, *data())

    def run(name, listener=None):
        url = tmp_path / name
        url.mkdir(exist_ok=True)
        record = Record.open(url, {"seed": 0})
        keywords = {"url": url / "fold-0", "listener": listener, "record": record, "name": "fold-0/"}
        return fit(rows, selection, steps=parse_steps(["standardize"]), **keywords)

    whole = Path(run("whole").url).name
    for kill_after in range(6, 30):
        try:
            resumed = run("killed", Counter(stop_at=kill_after))
            break
        except Killed:
            assert kill_after < 25
    assert kill_after > 6
    assert Path(resumed.url).name == whole
    again = Counter()
    run("killed", again)
    assert again.labels == []


# options


def test_ties_go_to_the_largest_alpha():
    assert best_alpha(score_path((0.1, 1.0, 10.0), (2.0, 1.0, 1.0))) == 10.0
    assert best_alpha(score_path((0.1, 1.0), (float("inf"), 5.0))) == 1.0
    with pytest.raises(InputError, match="larger alphas"):
        best_alpha(score_path((0.1,), (float("inf"),)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphas": ()}, "at least one"),
        ({"alphas": (1.0, 0.0)}, "all positive and finite"),
        ({"alphas": (-1.0,)}, "all positive and finite"),
        ({"alphas": (float("nan"),)}, "all positive and finite"),
        ({"alphas": (float("inf"),)}, "all positive and finite"),
        ({"selection": "gvc"}, "did you mean 'gcv'"),
        ({"solver": "choleski"}, "did you mean 'cholesky'"),
        ({"alphas": (1.0, 2.0), "solver": "cholesky"}, "no spectrum"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        RidgeOptions(**options)
