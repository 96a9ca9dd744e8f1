"""Kernel ridge by every solver against the bordered system and other implementations; tiles, dtypes, stored models, bad rows."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from job_examples import regression_data, site_of, stored
from kernel_fit_examples import (
    ALPHAS,
    GROUPS,
    KERNEL,
    SOLVERS,
    WEIGHTS,
    N,
    X,
    Y,
    assert_equals_naive,
    fitted,
    naive,
    options,
    plan_of,
)
from sklearn.kernel_ridge import KernelRidge

from ntkdask.cache import shared
from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import InputError
from ntkdask.kernels import NTK, RBF
from ntkdask.networks import fully_connected
from ntkdask.preprocessing import parse_steps
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_ridge.fit import fit_kernel_ridge
from ntkdask.workflows.model import load_model
from ntkdask.workflows.predict import predict
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge

STORED = [
    ("eigh", "loop"),
    ("cholesky", "loop"),
    ("tiled_cholesky", "loop"),
    ("cg", "loop"),
    ("eigh", "cluster"),
    ("cholesky", "cluster"),
    ("tiled_cholesky", "cluster"),
    ("cg", "cluster"),
]


PLACES = [("eigh", "memory"), ("cholesky", "memory"), ("cg", "memory"), *STORED]


# every solver against one dense system


@pytest.mark.parametrize(("solver", "place"), PLACES)
@pytest.mark.parametrize(
    ("intercept", "weights"),
    [
        (True, WEIGHTS),
        (False, None),
        pytest.param(True, None, marks=pytest.mark.slow),
        pytest.param(False, WEIGHTS, marks=pytest.mark.slow),
    ],
    ids=["intercept, weighted", "no intercept", "intercept", "no intercept, weighted"],
)
def test_against_the_bordered_system(tmp_path, client, solver, place, weights, intercept):
    fit = fitted(options(solver, fit_intercept=intercept), place, tmp_path, client, weights=weights)
    assert_equals_naive(fit.model, KERNEL(X), Y, 0.1, weights, intercept)
    probe = X[:7] + 0.1
    found = predict(
        fit.model if place == "memory" else fit.url, MemoryRows(probe), plan_of(options(solver)), 2, site_of()
    )
    coefficients, b = naive(KERNEL(X), Y, 0.1, weights, intercept)
    np.testing.assert_allclose(found, KERNEL(probe, X) @ coefficients + b, rtol=1e-8)
    assert fit.path == []
    assert fit.facts["solver"] == solver
    if solver == "cg":
        (solve,) = fit.facts["solves"]
        assert solve["converged"]
        assert solve["residual"] <= 1e-12
        assert solve["iterations"] > 3


@pytest.mark.parametrize("solver", ["tiled_cholesky", "cg"])
def test_loop_and_cluster_give_the_same_bits(tmp_path, client, solver):
    fits = []
    for place in ("loop", "cluster"):
        (tmp_path / place).mkdir()
        fits.append(
            fitted(
                options(solver, ALPHAS, selection="holdout"),
                place,
                tmp_path / place,
                client,
                groups=GROUPS,
                weights=WEIGHTS,
            )
        )
    one, two = fits
    np.testing.assert_array_equal(one.model.coefficients, two.model.coefficients)
    np.testing.assert_array_equal(one.model.intercept, two.model.intercept)
    assert one.path == two.path


@pytest.mark.parametrize(
    "tile", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(9, marks=pytest.mark.slow), 500]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_tiles_of_any_size(tmp_path, solver, tile):
    x, y = X[:10], Y[:10]
    plan = plan_of(options(solver), 10, tile=tile, rank=4)
    fit = fitted(options(solver), "loop", tmp_path, None, x=x, y=y, plan=plan)
    assert_equals_naive(fit.model, KERNEL(x), y, 0.1)
    store = TileStore.open(tmp_path / "run" / "kernel")
    assert store.tile_shape == (min(tile, 10),) * 2
    assert store.pending() == []


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_few_rows(tmp_path, solver, n):
    fit = fitted(options(solver), "loop", tmp_path, None, x=X[:n], y=Y[:n], plan=plan_of(options(solver), n, rank=1))
    assert_equals_naive(fit.model, KERNEL(X[:n]), Y[:n], 0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_classes_are_zero_mean_one_hot(tmp_path, solver):
    labels = np.arange(N) % 3
    fit = fitted(options(solver), "loop", tmp_path, None, y=labels, plan=plan_of(options(solver), k=3), n_classes=3)
    assert_equals_naive(fit.model, KERNEL(X), encode_targets(labels, 3, "float64"), 0.1)
    assert fit.model.n_classes == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_tiles(tmp_path, solver):
    """The matrix is stored in float32, everything after it is float64: the solution of the stored matrix."""
    choices = options(solver)
    fit = fitted(choices, "loop", tmp_path, None, plan=plan_of(choices, dtype="float32"))
    kernel = TileStore.open(tmp_path / "run" / "kernel")
    assert kernel.dtype == "float32"
    single = KERNEL(X.astype(np.float32)).astype(float)
    assert_equals_naive(fit.model, single, Y, 0.1, rtol=1e-5)
    assert_equals_naive(fit.model, KERNEL(X), Y, 0.1, rtol=1e-4)


def test_preprocessing_and_groups_order_the_rows(tmp_path):
    """Coefficients follow the gathered rows: group after group, standardised by the training rows."""
    fit = fitted(
        options("eigh", ALPHAS, selection="kfold"),
        "loop",
        tmp_path,
        None,
        groups=GROUPS,
        steps=parse_steps(["standardize"]),
    )
    order = np.argsort(GROUPS, kind="stable")
    x = ((X - X.mean(axis=0)) / X.std(axis=0))[order]
    np.testing.assert_allclose(fit.model.points.rows(0, N), x, rtol=1e-12, atol=1e-12)
    assert_equals_naive(fit.model, KERNEL(x), Y[order], fit.model.alpha)


# against other implementations


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_a_linear_kernel_is_ridge_on_the_rows(tmp_path, solver, weights):
    """NTK(Dense) = ⟨x, z⟩: the same predictions and scores as the primal, whatever the solver."""
    linear, selection = NTK(fully_connected(1, "identity", normalize=False)), "kfold"
    np.testing.assert_allclose(linear(X), 2 * X @ X.T, rtol=1e-12)
    alphas = tuple(2 * a for a in ALPHAS)
    groups = np.where(WEIGHTS > 0, GROUPS, 0).astype(np.int16)
    fit = fitted(
        options(solver, alphas, selection=selection),
        "loop",
        tmp_path,
        None,
        kernel=linear,
        weights=weights,
        groups=groups,
        plan=plan_of(options(solver), rank=2),
    )
    plan = plan_of(options(solver))
    primal = fit_ridge(
        MemoryRows(X, Y, weights, groups),
        [(0,), (1,), (2,)],
        RidgeOptions(ALPHAS, selection=selection),
        plan,
        features=None,
        k=2,
    )
    assert fit.model.alpha == 2 * primal.model.alpha
    np.testing.assert_allclose([row["score"] for row in fit.path], [row["score"] for row in primal.path], rtol=1e-7)
    expected = predict(primal.model, MemoryRows(X), plan, 2, site_of())
    np.testing.assert_allclose(predict(fit.url, MemoryRows(X), plan, 2, site_of()), expected, rtol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scikit_learns_kernel_ridge(tmp_path, solver):
    fit = fitted(options(solver, fit_intercept=False), "loop", tmp_path, None, weights=WEIGHTS)
    theirs = KernelRidge(alpha=0.1, kernel="precomputed").fit(KERNEL(X), Y, WEIGHTS)
    np.testing.assert_allclose(fit.model.coefficients, theirs.dual_coef_, atol=1e-8)


def test_the_model_is_stored_with_the_address_of_its_points(tmp_path):
    fit = fitted(options("eigh"), "loop", tmp_path, None)
    back = load_model(fit.url)
    assert back.points.url == str(tmp_path / "run" / "points")
    assert (back.alpha, back.kernel, back.n_classes) == (0.1, KERNEL, None)
    in_memory = fitted(options("eigh"), "memory", tmp_path, None).model
    np.testing.assert_allclose(in_memory.scores(X), back.scores(X), rtol=1e-9)
    moved = load_model(in_memory.save(tmp_path / "states"))
    np.testing.assert_array_equal(moved.points, X)
    np.testing.assert_array_equal(moved.scores(X), in_memory.scores(X))


@pytest.mark.parametrize("block_rows", [1, 20, 83, 1000])
def test_blocks_of_training_rows_do_not_change_scores(tmp_path, block_rows):
    model = fitted(options("eigh"), "memory", tmp_path, None).model
    np.testing.assert_allclose(replace(model, block_rows=block_rows).scores(X[:9]), model.scores(X[:9]), rtol=1e-10)


def test_points_too_large_to_keep_are_read_again(tmp_path, monkeypatch):
    from ntkdask.workflows import model as models

    fit = fitted(options("eigh"), "loop", tmp_path, None)
    expected = fit.model.scores(X[:9])
    shared.clear()
    monkeypatch.setattr(models, "POINTS_BYTES", 1000)
    np.testing.assert_array_equal(fit.model.scores(X[:9]), expected)
    shutil.rmtree(tmp_path / "run" / "points")
    with pytest.raises(Exception, match="points"):
        fit.model.scores(X[:9])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_rows_with_nan_are_named(tmp_path):
    x = X.copy()
    x[[7, 40], 1] = np.nan
    for place in ("memory", "loop"):
        rows = MemoryRows(x, Y) if place == "memory" else None
        if rows is None:
            with pytest.raises(InputError, match=r"rows? .*7"):
                stored(tmp_path, x, Y)
            # finite as stored, infinite in the job's dtype
            big = np.where(np.isnan(x), 1e300, x)
            data = stored(tmp_path, big, Y)
            rows = DatasetRows(data.url, digest=data.digest)
        plan = plan_of(options("eigh"), dtype="float32")
        with pytest.raises(InputError, match="in row 7"):
            fit_kernel_ridge(
                rows,
                (),
                options("eigh"),
                plan,
                kernel=KERNEL,
                site=site_of(url=None if place == "memory" else tmp_path / "run"),
            )


def test_regression_in_one_column(tmp_path):
    x, y = regression_data(60, 4)
    fit = fitted(
        options("tiled_cholesky"),
        "loop",
        tmp_path,
        None,
        x=x,
        y=y,
        kernel=RBF(0.01),
        plan=plan_of(options("eigh"), 60, 1),
    )
    assert_equals_naive(fit.model, RBF(0.01)(x), y, 0.1)
