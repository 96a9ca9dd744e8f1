"""Whole runs of kernel ridge: the naive fit, test rows that never enter, what metrics tell, what is refused."""

import json

import numpy as np
import pytest
from job_examples import Counter, Killed, class_data, regression_data, run, stored
from kernel_job_examples import ALPHAS, assert_equal_models, job_of, model

from ntkdask import files, registry
from ntkdask.errors import DiskSpaceError, FingerprintError, InputError
from ntkdask.jobs.folds import stored_parts
from ntkdask.jobs.training import SplitRule
from ntkdask.kernels import NNGP, NTK, RBF
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import fit_in_memory
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_ridge import choose as kernel_options
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.model import load_model

SOLVERS = ("eigh", "cholesky", "tiled_cholesky", "cg")


def naive(kernel, y, alpha):
    """(coefficients, intercept) by the bordered system."""
    n = len(y)
    matrix = np.block([[kernel + alpha * np.eye(n), np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    solved = np.linalg.solve(matrix, np.concatenate([y.reshape(n, -1), np.zeros((1, y.reshape(n, -1).shape[1]))]))
    return solved[:n], solved[n]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_is_the_naive_fit(tmp_path, solver):
    x, y = regression_data(110, 4, 2)
    metrics = run(job_of(stored(tmp_path, x, y), solver=solver, alphas=(0.1,)), tmp_path / "run")
    test = stored_parts(tmp_path / "run") == 1
    z = fit_in_memory(["standardize"], x[~test], "float64")(x)
    coefficients, b = naive(RBF(0.2)(z[~test]), y[~test], 0.1)
    np.testing.assert_allclose(model(metrics)["coefficients"], coefficients, atol=1e-7 * np.abs(coefficients).max())
    predicted = TileStore.open(tmp_path / "run" / "fold-0" / "predictions").zarr_array()[...]
    np.testing.assert_allclose(predicted[test], RBF(0.2)(z[test], z[~test]) @ coefficients + b, rtol=1e-6)
    assert np.isnan(predicted[~test]).all()
    assert metrics["test"]["mse"] == pytest.approx(((predicted[test] - y[test]) ** 2).mean())
    assert metrics["folds"][0]["solver"] == solver
    assert metrics["folds"][0]["solver_reason"] == "as asked"


def test_cross_validation_and_the_best_alpha(tmp_path):
    """Inner folds within the training rows of every outer fold: the path by refits."""
    x, y = regression_data(90, 4)
    metrics = run(
        job_of(stored(tmp_path, x, y), selection="kfold", solver="cg", split=SplitRule(folds=2)), tmp_path / "run"
    )
    parts = stored_parts(tmp_path / "run")
    assert set(parts) == set(range(6))
    tested = np.zeros(90, int)
    for i, fold in enumerate(metrics["folds"]):
        train = np.flatnonzero(parts // 3 != i)
        z = fit_in_memory(["standardize"], x[train], "float64")(x)
        expected = []
        for alpha in ALPHAS:
            errors = []
            for g in range(3):
                rest, held = train[parts[train] % 3 != g], train[parts[train] % 3 == g]
                coefficients, b = naive(RBF(0.2)(z[rest]), y[rest], alpha)
                errors.append(np.mean((y[held] - (RBF(0.2)(z[held], z[rest]) @ coefficients + b)[:, 0]) ** 2))
            expected.append(np.mean(errors))
        np.testing.assert_allclose([row["score"] for row in fold["alpha_path"]], expected, rtol=1e-5)
        assert fold["alpha"] == ALPHAS[int(np.argmin(expected))]
        assert fold["selection"] == "kfold"
        tested += np.isfinite(TileStore.open(tmp_path / "run" / f"fold-{i}" / "predictions").zarr_array()[:, 0])
    assert (tested == 1).all()


@pytest.mark.parametrize(
    ("solver", "selection", "split"),
    [
        ("eigh", "gcv", SplitRule(test=0.3)),
        ("eigh", "loo", SplitRule(folds=2)),
        ("tiled_cholesky", "holdout", SplitRule(test=0.3)),
        ("cg", "kfold", SplitRule(folds=2)),
    ],
)
def test_test_rows_never_enter(tmp_path, solver, selection, split):
    """Other values and targets in the test rows: the same model, bit for bit. In one training row: another one."""
    x, labels = class_data(90)

    def model_of(name, x, labels):
        job = job_of(stored(tmp_path, x, labels, f"{name}.zarr"), solver=solver, selection=selection, split=split)
        return model(run(job, tmp_path / name))

    clean = model_of("clean", x, labels)
    parts = stored_parts(tmp_path / "clean")
    inner = {"kfold": 3, "holdout": 2}.get(selection, 1)
    test = parts // inner == (0 if split.folds else 1)
    assert 20 < test.sum() < 50
    other_x, other_labels = x.copy(), labels.copy()
    other_x[test] = other_x[test] * 50 + 7
    other_labels[test] = (other_labels[test] + 1) % 3
    for name, value in model_of("perturbed", other_x, other_labels).items():
        np.testing.assert_array_equal(value, clean[name])
    other_x[np.flatnonzero(~test)[0], 0] += 0.5
    changed = model_of("training", other_x, other_labels)
    assert not np.array_equal(changed["coefficients"], clean["coefficients"])


@pytest.mark.parametrize("solver", ["tiled_cholesky", "cg"])
def test_any_cluster_gives_the_same_bits(tmp_path, client, solver):
    job = job_of(stored(tmp_path, *class_data(90)), solver=solver, plan=Plan(tile_cols=30, dtype="float32"))
    loop = run(job, tmp_path / "loop")
    two = run(job, tmp_path / "two", client)
    assert_equal_models(loop, two)


@pytest.mark.parametrize("kernel", [NTK(fully_connected(2)), NNGP(fully_connected(1, "erf"))])
def test_classes_by_a_neural_kernel(tmp_path, client, kernel):
    x, labels = class_data(90)
    metrics = run(
        job_of(stored(tmp_path, x, labels), kernel=kernel, plan=Plan(dtype="float32")), tmp_path / "run", client
    )
    assert metrics["task"] == "classification"
    assert metrics["test"]["accuracy"] > 0.5
    assert load_model(metrics["folds"][0]["model"]).kernel == kernel


def test_weights_of_a_dataset(tmp_path):
    """Rows of weight 0 are rows that are not there."""
    x, y = regression_data(80, 4)
    weights = (np.arange(80) % 2).astype(float)
    train = stored(tmp_path, x, y, "weighted.zarr", weights=weights)
    half, test = stored(tmp_path, x[1::2], y[1::2], "half.zarr"), stored(tmp_path, x, y, "test.zarr")
    for solver in ("eigh", "cg", "tiled_cholesky"):
        found = [
            run(job_of(data, test, solver, (0.1,), steps=()), tmp_path / f"{solver}-{i}")
            for i, data in enumerate((train, half))
        ]
        np.testing.assert_allclose(
            model(found[0])["coefficients"][1::2], model(found[1])["coefficients"], rtol=1e-6, atol=1e-9
        )
        assert not model(found[0])["coefficients"][::2].any()


def test_zero_rows_and_constant_features(tmp_path):
    x, y = regression_data(80, 4)
    x[[3, 50]] = 0.0
    x[:, 2] = 0.0
    for kernel in (NTK(fully_connected(1)), RBF(0.2)):
        folder = tmp_path / type(kernel).__name__
        metrics = run(job_of(stored(tmp_path, x, y, f"{folder.name}.zarr"), kernel=kernel, steps=()), folder)
        assert np.isfinite(model(metrics)["coefficients"]).all()
        json.dumps(metrics, allow_nan=False)


# what a run tells, and what it refuses


def test_metrics_tell_what_the_report_shows(tmp_path, client):
    x, labels = class_data(110)
    metrics = run(job_of(stored(tmp_path, x, labels)), tmp_path / "run", client, resolved={"name": "tiny"})
    (fold,) = metrics["folds"]
    assert (fold["score_name"], fold["selection"], fold["solver"]) == ("GCV", "gcv", "eigh")
    assert [row["alpha"] for row in fold["alpha_path"]] == list(ALPHAS)
    assert all(0 < row["effective_dimension"] <= 83 for row in fold["alpha_path"])
    ranks, values = zip(*fold["spectrum"], strict=True)
    assert (ranks[0], ranks[-1]) == (1, fold["n_train"] - 1)
    assert list(values) == sorted(values, reverse=True)
    picture = fold["heat_map"]
    assert picture["sorted_by"] == "class"
    assert picture["labels"] == sorted(picture["labels"])
    found = model(metrics)
    np.testing.assert_allclose(np.diag(picture["values"]), 1.0, atol=1e-3)
    assert np.shape(picture["values"]) == (len(found["points"]),) * 2
    assert {"gather-rows", "kernel-tile", "solve", "predict", "total"} <= metrics["seconds"].keys()
    assert metrics["tasks"]["kernel-tile"]["count"] == 6
    assert metrics["plan"]["matrix_tile"] == 30
    assert metrics["notes"] == [
        "alpha was chosen on training rows alone; test rows never entered preprocessing, features or solver."
    ]
    json.dumps(metrics, allow_nan=False)


def test_gradients_that_do_not_converge_are_noted(tmp_path, monkeypatch):
    """One note a fold that has such solves, with the residual; the run ends well."""
    monkeypatch.setattr("ntkdask.workflows.kernel_ridge.plan.MAX_RANK", 3)
    options = KernelRidgeOptions(ALPHAS, selection="holdout", solver="cg", tolerance=1e-12, max_iterations=2)
    metrics = run(
        job_of(stored(tmp_path, *class_data(110)), options=options, split=SplitRule(folds=2)), tmp_path / "run"
    )
    notes = [n for n in metrics["notes"] if "did not converge" in n]
    assert [n[:7] for n in notes] == ["fold 0:", "fold 1:"]
    for note, fold in zip(notes, metrics["folds"], strict=True):
        short = [s for s in fold["solves"] if not s["converged"]]
        assert f"in {len(short)} of 4 solves" in note
        assert f"relative residual is {max(s['residual'] for s in short):.2g} (max_iterations=2 reached)" in note
    assert np.isfinite(metrics["test"]["accuracy"])


def test_alpha_zero_with_duplicates_loses_nothing(tmp_path):
    """The matrix stays; another alpha is another fit, refused under this name."""
    x, labels = class_data(110)
    x[55:], labels = x[:55], labels.copy()
    labels[55:] = (labels[:55] + 1) % 3
    data = stored(tmp_path, x, labels)
    for solver, words in (("eigh", "duplicate rows with different targets"), ("tiled_cholesky", "Use alpha >=")):
        folder = tmp_path / solver
        with pytest.raises(InputError, match=words):
            run(job_of(data, solver=solver, alphas=(0.0,)), folder)
        kernel = TileStore.open(folder / "fold-0" / "kernel")
        assert kernel.pending() == []
        with pytest.raises(FingerprintError, match=r"solver\.alphas: stored \[0\.0\], asked \[0\.5\]"):
            run(job_of(data, solver=solver, alphas=(0.5,)), folder)
        assert kernel.damaged() == []
        again = Counter()
        with pytest.raises(InputError, match=words):
            run(job_of(data, solver=solver, alphas=(0.0,)), folder, listener=again)
        assert again.count("kernel-tile") == 0
        run(job_of(data, solver=solver, alphas=(0.5,)), folder, overwrite=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": RBF(0.3)}, r"kernel\.gamma: stored 0\.2, asked 0\.3"),
        ({"kernel": NTK(fully_connected(1))}, r"kernel\.type: stored 'RBF', asked 'NTK'"),
        (
            {"options": KernelRidgeOptions(ALPHAS, solver="cholesky")},
            r"solver\.solver: stored 'eigh', asked 'cholesky'",
        ),
        (
            {"options": KernelRidgeOptions(ALPHAS, solver="eigh", max_iterations=5)},
            r"solver\.max_iterations: stored 1000, asked 5",
        ),
        ({"inner_folds": 4}, r"solver\.folds: stored 3, asked 4"),
        ({"seed": 1}, "seed: stored 0, asked 1"),
        ({"steps": ()}, "preprocess"),
        ({"plan": Plan(dtype="float32")}, "dtype: stored 'float64', asked 'float32'"),
    ],
)
def test_another_job_in_the_folder_is_refused(tmp_path, change, words):
    data = stored(tmp_path, *class_data(60))
    run(job_of(data), tmp_path / "run")
    with pytest.raises(FingerprintError, match=words):
        run(job_of(data, **change), tmp_path / "run")


def test_overwriting_in_one_process_takes_nothing_over(tmp_path):
    """Other data under the same name: pictures, points and predictions are those of the second run."""
    first = stored(tmp_path, *regression_data(90, 4), "first.zarr")
    second = stored(tmp_path, *regression_data(60, 4, seed=1), "second.zarr")
    for solver in ("eigh", "cg"):
        run(job_of(first, solver=solver), tmp_path / solver)
        found = run(job_of(second, solver=solver), tmp_path / solver, overwrite=True)
        expected = run(job_of(second, solver=solver), tmp_path / f"fresh-{solver}")
        assert_equal_models(found, expected)
        assert found["folds"][0]["heat_map"] == expected["folds"][0]["heat_map"]


def test_a_full_disk_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(DiskSpaceError, match="where 1,000 B are free"):
        run(job_of(stored(tmp_path, *class_data(60))), tmp_path / "run")
    assert not (tmp_path / "run" / "fold-0").exists()


def test_a_stored_plan_decides(tmp_path, monkeypatch):
    """The solver that the first run chose goes on, whatever today's estimates say."""
    data = stored(tmp_path, *class_data(60))
    with pytest.raises(Killed):
        run(job_of(data, solver="auto"), tmp_path / "run", listener=Counter(6))
    monkeypatch.setattr(kernel_options, "WORTH_A_SPECTRUM", 0.0)
    metrics = run(job_of(data, solver="auto"), tmp_path / "run")
    assert metrics["folds"][0]["solver"] == "eigh"
    other = run(job_of(data, solver="auto"), tmp_path / "other")
    assert other["folds"][0]["solver"] != "eigh"
    assert registry.to_config(RBF(0.2)) == other["job"]["kernel"]
