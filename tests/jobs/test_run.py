"""Whole runs: what they write, that test rows never enter, that any cluster and any kill give the same model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from job_examples import (
    ONE_THREAD,
    Counter,
    Killed,
    class_data,
    feature_map,
    naive_ridge,
    regression_data,
    ridge_job,
    run,
    stored,
)

from ntkdask import files
from ntkdask.errors import DiskSpaceError, FingerprintError, InputError, JobError, MemoryBudgetError, StoreError
from ntkdask.files import exclusive
from ntkdask.jobs.data import open_job_data
from ntkdask.jobs.folds import stored_parts
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import fit_in_memory, parse_steps
from ntkdask.store import TileStore
from ntkdask.workflows.model import RidgeModel
from ntkdask.workflows.ridge.fit import RidgeOptions

SMALL = Plan(tile_rows=16, dtype="float32")
ALPHAS = (0.01, 1.0, 100.0)


def models(metrics) -> list[str]:
    """Addresses of the folds' models: digests of preprocessing, map, weights, intercept and alpha."""
    return [Path(fold["model"]).name for fold in metrics["folds"]]


def without_times(metrics) -> dict:
    gone = ("seconds", "finished", "tasks", "memory", "workers", "versions", "data")
    kept = {k: v for k, v in metrics.items() if k not in gone}
    return {**kept, "folds": [{**fold, "model": Path(fold["model"]).name} for fold in kept["folds"]]}


def test_a_run_is_the_naive_fit(tmp_path):
    x, y = regression_data()
    job = ridge_job(
        stored(tmp_path, x, y),
        steps=parse_steps(["standardize"]),
        options=RidgeOptions((0.5,)),
        plan=Plan(tile_rows=40, dtype="float64"),
    )
    metrics = run(job, tmp_path / "run")
    test = stored_parts(tmp_path / "run") == 1
    assert test.sum() == 150 // 4
    phi = job.recipe.features(fit_in_memory(["standardize"], x[~test], "float64")(x))
    w, b = naive_ridge(phi[~test], y[~test], 0.5)
    model = RidgeModel.load(metrics["folds"][0]["model"])
    assert np.allclose(model.weights, w, rtol=1e-7)
    assert np.allclose(model.intercept, b, rtol=1e-7)
    predicted = TileStore.open(tmp_path / "run" / "fold-0" / "predictions").zarr_array()[...]
    assert np.allclose(predicted[test], phi[test] @ w + b, rtol=1e-6, atol=1e-9)
    assert np.isnan(predicted[~test]).all()
    assert metrics["test"]["mse"] == pytest.approx(((predicted[test, 0] - y[test]) ** 2).mean())
    assert metrics["folds"][0]["n_train"] == 150 - test.sum()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"] == metrics["test"]


def test_cross_validation_tests_every_row_once(tmp_path):
    x, labels = class_data()
    x[75:] = x[:75]  # every row twice
    labels = labels.copy()
    labels[75:] = labels[:75]
    job = ridge_job(stored(tmp_path, x, labels), split=SplitRule(folds=3), plan=SMALL)
    metrics = run(job, tmp_path / "run")
    parts = stored_parts(tmp_path / "run")
    assert np.array_equal(parts[:75], parts[75:])
    tested = np.zeros(150, int)
    for i, fold in enumerate(metrics["folds"]):
        predicted = TileStore.open(tmp_path / "run" / f"fold-{i}" / "predictions").zarr_array()[...]
        here = np.isfinite(predicted).all(axis=1)
        assert np.array_equal(here, parts == i)
        assert (fold["n_train"], fold["n_test"]) == (150 - here.sum(), here.sum())
        tested += here
    assert (tested == 1).all()
    assert metrics["test"]["accuracy"] == pytest.approx(np.mean([f["test"]["accuracy"] for f in metrics["folds"]]))
    assert len(set(models(metrics))) == 3


@pytest.mark.parametrize(
    ("selection", "split"),
    [
        ("gcv", SplitRule(test=0.3)),
        ("loo", SplitRule(test=0.3)),
        ("holdout", SplitRule(test=0.3)),
        ("kfold", SplitRule(folds=3)),
    ],
)
def test_test_rows_never_enter(tmp_path, selection, split):
    """Other values and targets in the test rows: the same model, bit for bit. In one training row: another one."""
    x, labels = class_data()

    def model_of(name, x, labels, fold=0):
        job = ridge_job(
            stored(tmp_path, x, labels, f"{name}.zarr"),
            split=split,
            steps=parse_steps(["standardize"]),
            options=RidgeOptions(ALPHAS, selection=selection),
            inner_folds=3,
            plan=Plan(dtype="float32"),
        )
        return models(run(job, tmp_path / name))[fold]

    clean = model_of("clean", x, labels)
    parts = stored_parts(tmp_path / "clean")
    inner = {"kfold": 3, "holdout": 2}.get(selection, 1)
    test = parts // inner == (0 if split.folds else 1)
    assert 30 < test.sum() < 60
    other_x, other_labels = x.copy(), labels.copy()
    other_x[test] = other_x[test] * 50 + 7
    other_labels[test] = (other_labels[test] + 1) % 3
    assert model_of("perturbed", other_x, other_labels) == clean
    assert np.array_equal(stored_parts(tmp_path / "perturbed"), parts)
    other_x[np.flatnonzero(~test)[0], 0] += 0.5
    assert model_of("training", other_x, other_labels) != clean


def test_any_cluster_gives_the_same_bits(tmp_path, one_worker, two_workers):
    x, labels = class_data()
    job = ridge_job(
        stored(tmp_path, x, labels),
        split=SplitRule(folds=2),
        steps=parse_steps(["standardize"]),
        options=RidgeOptions(ALPHAS, selection="kfold"),
        inner_folds=3,
        plan=SMALL,
    )
    loop = run(job, tmp_path / "loop")
    two = run(job, tmp_path / "two", two_workers)
    one = run(job, tmp_path / "one", one_worker)
    assert without_times(loop) == without_times(two) == without_times(one)


@pytest.mark.parametrize("selection", ["gcv", "kfold"])
def test_a_killed_run_goes_on(tmp_path, selection):
    x, labels = class_data()
    job = ridge_job(
        stored(tmp_path, x, labels), options=RidgeOptions(ALPHAS, selection=selection), inner_folds=3, plan=SMALL
    )
    whole = Counter()
    expected = run(job, tmp_path / "whole", listener=whole)
    done, kills = 0, 0
    for stop_at in (3, 5, 8, 13, 21):
        listener = Counter(stop_at)
        try:
            run(job, tmp_path / "killed", listener=listener)
        except Killed:
            kills += 1
        done += len(listener.labels)
    resumed = Counter()
    found = run(job, tmp_path / "killed", listener=resumed)
    assert kills >= 2
    assert without_times(found) == without_times(expected)
    # a task that was killed before its receipt is the only thing to repeat: the solve
    assert done + len(resumed.labels) <= len(whole.labels) + kills
    again = Counter()
    assert without_times(run(job, tmp_path / "killed", listener=again)) == without_times(expected)
    assert again.labels == []


def test_train_and_test_datasets(tmp_path):
    x, y = regression_data()
    train, test = stored(tmp_path, x[:100], y[:100], "train.zarr"), stored(tmp_path, x[100:], y[100:], "test.zarr")
    metrics = run(ridge_job(train, test, plan=SMALL), tmp_path / "run")
    assert (metrics["folds"][0]["n_train"], metrics["folds"][0]["n_test"]) == (100, 50)


@pytest.mark.parametrize("k", [1, 3])
def test_regression_targets(tmp_path, k):
    x, y = regression_data(k=k)
    metrics = run(ridge_job(stored(tmp_path, x, y), features=feature_map(96), plan=SMALL), tmp_path / "run")
    assert metrics["task"] == "regression"
    assert 0 < metrics["test"]["r2"] <= 1
    assert RidgeModel.load(metrics["folds"][0]["model"]).weights.shape == (96, k)


def test_sample_weights_of_a_dataset(tmp_path):
    """Rows of weight 0 are rows that are not there."""
    x, y = regression_data()
    weights = (np.arange(150) % 2).astype(float)
    train = stored(tmp_path, x, y, "weighted.zarr", weights=weights)
    half = stored(tmp_path, x[1::2], y[1::2], "half.zarr")
    test = stored(tmp_path, x, y, "test.zarr")
    options = {"options": RidgeOptions((1.0,)), "plan": Plan(tile_rows=200, dtype="float64")}
    found = [run(ridge_job(data, test, **options), tmp_path / data.url.split("/")[-1][:4]) for data in (train, half)]
    a, b = (RidgeModel.load(m["folds"][0]["model"]).weights for m in found)
    assert np.allclose(a, b, rtol=1e-8)


def test_the_identity_map(tmp_path):
    x, y = regression_data()
    metrics = run(ridge_job(stored(tmp_path, x, y), features=None, plan=SMALL), tmp_path / "run")
    assert RidgeModel.load(metrics["folds"][0]["model"]).map is None


def test_metrics_tell_what_the_report_shows(tmp_path, client):
    x, labels = class_data()
    x[:, 2] = 1.0
    job = ridge_job(stored(tmp_path, x, labels), steps=parse_steps(["standardize"]), plan=SMALL)
    metrics = run(job, tmp_path / "run", client, resolved={"name": "tiny"})
    assert metrics["job"] == {"name": "tiny"}
    assert metrics["plan"]["slab_rows"] == 16
    assert [row["alpha"] for row in metrics["folds"][0]["alpha_path"]] == list(ALPHAS)
    assert metrics["folds"][0]["score_name"] == "GCV"
    assert metrics["folds"][0]["constant_features"] == 1
    assert "1 constant features" in metrics["notes"][-1]
    assert metrics["tasks"]["gram-slab"]["count"] == 19
    assert metrics["memory"]["measured_peak_bytes"] > 2**26
    assert {"preprocess-slab", "gram-slab", "solve", "predict", "total"} <= metrics["seconds"].keys()
    assert metrics["data"]["digest"] == job.train.digest
    json.dumps(metrics, allow_nan=False)


# refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed: stored 0, asked 1"),
        ({"features": feature_map(64)}, r"features\.n_components: stored 48, asked 64"),
        ({"split": SplitRule(folds=3)}, r"split\.folds: stored None, asked 3"),
        ({"options": RidgeOptions((1.0,))}, r"solver\.alphas"),
        ({"steps": parse_steps(["unit_norm"])}, "preprocess"),
        ({"plan": Plan(dtype="float64")}, "dtype: stored None, asked 'float64'"),
    ],
)
def test_another_job_in_the_folder_is_refused(tmp_path, change, words):
    data = stored(tmp_path, *class_data())
    run(ridge_job(data), tmp_path / "run")
    with pytest.raises(FingerprintError, match=words):
        run(ridge_job(data, **change), tmp_path / "run")
    run(ridge_job(data, **change), tmp_path / "run", overwrite=True)


def test_other_data_in_the_folder_is_refused(tmp_path):
    x, labels = class_data()
    run(ridge_job(stored(tmp_path, x, labels)), tmp_path / "run")
    x[0, 0] += 1
    with pytest.raises(FingerprintError, match="train: stored"):
        run(ridge_job(stored(tmp_path, x, labels, "other.zarr")), tmp_path / "run")


def test_overwrite_starts_again(tmp_path):
    job = ridge_job(stored(tmp_path, *class_data()))
    whole, again = Counter(), Counter()
    first = run(job, tmp_path / "run", listener=whole)
    (tmp_path / "run" / "left-over").mkdir()
    second = run(job, tmp_path / "run", listener=again, overwrite=True)
    assert again.labels == whole.labels
    assert models(first) == models(second)
    assert not (tmp_path / "run" / "left-over").exists()


def test_two_drivers_of_one_folder(tmp_path):
    job = ridge_job(stored(tmp_path, *class_data()))
    with exclusive(tmp_path / "run"), pytest.raises(StoreError, match="in use by another run"):
        run(job, tmp_path / "run")


def test_a_damaged_record_is_named(tmp_path):
    job = ridge_job(stored(tmp_path, *class_data()))
    run(job, tmp_path / "run")
    (tmp_path / "run" / "record.json").write_text("{")
    with pytest.raises(StoreError, match=r"record.json is damaged.*--overwrite"):
        run(job, tmp_path / "run")


def test_a_full_disk_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(DiskSpaceError, match="where 1,000 B are free"):
        run(ridge_job(stored(tmp_path, *class_data())), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_refused_plan_is_not_recorded(tmp_path):
    """What the error advises is another job: the folder is as free as it was."""
    data, small = stored(tmp_path, *class_data()), replace(ONE_THREAD, memory_bytes=2**20)
    with pytest.raises(MemoryBudgetError, match="n_components"):
        run_job(ridge_job(data, features=feature_map(64)), tmp_path / "run", resources=small)
    assert not (tmp_path / "run" / "record.json").exists()
    run(ridge_job(data, features=feature_map(32)), tmp_path / "run")


def test_data_that_do_not_go_together(tmp_path):
    x, labels = class_data()
    a = stored(tmp_path, x, labels, "a.zarr")
    others = {
        "row_shape": stored(tmp_path, x[:, :5], labels, "narrow.zarr"),
        "class_names": stored(tmp_path, x, labels % 2, "two.zarr"),
        "kind": stored(tmp_path, x, labels * 0.5, "numbers.zarr"),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match=f"train and test disagree: {name}"):
            open_job_data(None, a.url, other.url, None)
    with pytest.raises(InputError, match="has no targets"):
        open_job_data(stored(tmp_path, x, None, "bare.zarr").url, None, None, SplitRule(test=0.2))
    with pytest.raises(InputError, match="one class only"):
        open_job_data(stored(tmp_path, x, np.zeros(150, int), "one.zarr").url, None, None, SplitRule(test=0.2))
    with pytest.raises(JobError, match="no train and test parts"):
        open_job_data(a.url, None, None, None)


# part of the rows


@pytest.mark.parametrize("selection", ["gcv", "holdout", "kfold"])
@pytest.mark.parametrize("given", [False, True])
def test_part_of_the_rows(tmp_path, selection, given):
    """The fit and its test see so many rows and no others: those that are left out may hold anything."""
    x, y = regression_data(160)
    rng = np.random.default_rng(5)
    test = stored(tmp_path, *regression_data(80, seed=1), name="test.zarr") if given else None
    options = {"train_rows": 60, "test_rows": 20, "options": RidgeOptions(ALPHAS, selection=selection), "plan": SMALL}
    steps = parse_steps(["standardize"])
    first = run(ridge_job(stored(tmp_path, x, y), test, steps=steps, **options), tmp_path / "run")
    fold = first["folds"][0]
    assert (fold["n_train"], fold["n_test"]) == (60, 20)
    left_out = stored_parts(tmp_path / "run") == -1
    assert left_out.sum() == (100 if given else 80)
    predicted = TileStore.open(tmp_path / "run" / "fold-0" / "predictions").zarr_array()[...]
    assert (~np.isnan(predicted[:, 0])).sum() == 20

    other = np.where(left_out[:, None], rng.normal(size=x.shape) * 1e6, x)
    again = run(ridge_job(stored(tmp_path, other, y, "other.zarr"), test, steps=steps, **options), tmp_path / "other")
    assert again["folds"][0]["test"]["mse"] == pytest.approx(fold["test"]["mse"], rel=1e-9)
    assert again["folds"][0]["alpha"] == fold["alpha"]


def test_part_of_the_rows_is_in_the_fingerprint(tmp_path):
    data = stored(tmp_path, *regression_data())
    run(ridge_job(data, train_rows=60), tmp_path / "run")
    with pytest.raises(FingerprintError, match="train_rows: stored 60, asked 50"):
        run(ridge_job(data, train_rows=50), tmp_path / "run")
    with pytest.raises(InputError, match="114 rows are to be kept of 113"):
        run(ridge_job(data, train_rows=114), tmp_path / "more")


def test_how_many_rows_are_expected(tmp_path):
    data = stored(tmp_path, *regression_data())
    assert (ridge_job(data, train_rows=60, test_rows=20).n_train, ridge_job(data, test_rows=20).n_predicted) == (60, 20)
    assert (ridge_job(data).n_train, ridge_job(data).n_predicted) == (112, 38)
    assert ridge_job(data, split=SplitRule(folds=3)).n_predicted == 150
    assert ridge_job(data, data, test_rows=9).n_predicted == 9
    assert ridge_job(data, data).n_predicted == 150
