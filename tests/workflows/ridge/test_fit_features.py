"""Maps that learn from training rows, streamed: the bits of a fit in memory, on workers as here, resumed, and never from test rows."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from job_examples import (
    Counter,
    Killed,
    class_data,
    flip_bit,
    job_text,
    naive_ridge,
    regression_data,
    ridge_job,
    ridge_plan,
    run,
    site_of,
    sited,
    stored,
)

from ntkdask import FeatureTransformer, RidgeClassifier, RidgeRegressor, features, kernels, threads
from ntkdask import featurize as nd_featurize
from ntkdask.datasets import open_dataset
from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import InputError, JobError, MemoryBudgetError
from ntkdask.execution.progress import Record
from ntkdask.features.alignment import Alignment
from ntkdask.features.fitting import FittedMap, from_state, to_state
from ntkdask.jobs.inspect import verify
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor, parse_steps
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.states import save_state
from ntkdask.workflows.model import RidgeModel
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge
from ntkdask.workflows.ridge.fit_features import fit_features
from ntkdask.workflows.ridge.plan import RidgeShape, costs_of, plan_ridge
from ntkdask.workflows.split import state_of
from ntkdask.workflows.stream import FeatureStream, load_map

N = 150
ALPHAS = (0.003, 0.3, 30.0)


def optimized(n_components=40, depth=1, **changes):
    arguments = {"sampling": "optimized", "alignment": Alignment(300, 8.0), **changes}
    return features.NTKRandomFeatures(fully_connected(depth), n_components, **arguments)


def landmarks(**changes):
    return features.Nystrom(kernels.RBF(0.1), 12, **changes)


MAPS = [optimized(), optimized(depth=2), optimized(kernel="nngp"), landmarks(landmarks="leverage")]
every_map = pytest.mark.parametrize("map", MAPS, ids=["depth 1", "depth 2", "nngp", "nystrom"])


def data(k=2):
    x, y = regression_data(N, k=k)
    return (x - x.mean(axis=0)) / x.std(axis=0), y


def stream_of(rows, dtype="float64", batch_rows=32, n_classes=None):
    return FeatureStream(
        rows, FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype), None, n_classes, batch_rows
    )


def one_slab(dtype="float64"):
    """The plan of a fit in memory: one slab, the threads that this process has."""
    return replace(ridge_plan(dtype, slab_rows=N, batch_rows=4096), threads=threads.ambient())


@every_map
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stream_of_equal_plan_gives_the_bits_of_a_fit_in_memory(tmp_path, map, dtype):
    x, y = data()
    x = x.astype(dtype)
    # blocks of rows, and so the shapes of BLAS's products, follow the threads
    with threads.limited(threads.ambient()):
        expected = map.fit(x, y)
    here = fit_features(
        stream_of(MemoryRows(x, y), dtype, 4096), map, one_slab(dtype), 2, site_of(threads=threads.ambient())
    )
    assert here == expected
    dataset = stored(tmp_path, x, y)
    url = fit_features(
        stream_of(DatasetRows(dataset.url), dtype, 4096),
        map,
        one_slab(dtype),
        2,
        site_of(tmp_path / "run", threads=threads.ambient()),
    )
    assert load_map(url) == expected
    np.testing.assert_array_equal(load_map(url)(x), expected(x))


@every_map
def test_slabs_on_workers_give_the_bits_of_slabs_here(tmp_path, client, map):
    x, y = data()
    rows = DatasetRows(stored(tmp_path, x, y).url)
    found = [
        load_map(
            fit_features(stream_of(rows), map, ridge_plan(slab_rows=40), 2, site_of(url=tmp_path / name, client=where))
        )
        for name, where in (("here", None), ("there", client))
    ]
    assert found[0] == found[1]
    assert found[0] == fit_features(stream_of(MemoryRows(x, y)), map, ridge_plan(slab_rows=40), 2, site_of())


@pytest.mark.parametrize("slab_rows", [1, 37, 64, 150])
def test_slabs_hardly_matter(slab_rows):
    x, y = data()
    streamed = fit_features(stream_of(MemoryRows(x, y)), optimized(), ridge_plan(slab_rows=slab_rows), 2, site_of())
    np.testing.assert_allclose(streamed(x), optimized().fit(x, y)(x), atol=1e-10)


@every_map
def test_rows_of_other_parts_never_enter(map):
    x, y = data()
    parts = (np.arange(N) % 3).astype(np.int16)
    spoiled_x, spoiled_y = x.copy(), y.copy()
    spoiled_x[parts == 2] = 1e6
    spoiled_y[parts == 2] = -1e9
    found = [
        fit_features(stream_of(MemoryRows(a, b, None, parts, (0, 1))), map, ridge_plan(slab_rows=40), 2, site_of())
        for a, b in ((x, y), (spoiled_x, spoiled_y))
    ]
    assert found[0] == found[1]
    alone = map.fit(x[parts < 2], y[parts < 2])
    if map.needs_targets:  # landmarks are drawn by row numbers
        np.testing.assert_allclose(found[0](x), alone(x), atol=1e-10)


@pytest.mark.parametrize("stop_at", [1, 3, 6, 9])
def test_a_killed_fit_goes_on(tmp_path, stop_at):
    x, y = data()
    rows, plan = DatasetRows(stored(tmp_path, x, y).url), ridge_plan(slab_rows=40)
    whole = fit_features(stream_of(rows), optimized(), plan, 2, site_of(url=tmp_path / "whole"))
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        fit_features(
            stream_of(rows),
            optimized(),
            plan,
            2,
            site_of(url=folder, listener=Counter(stop_at), record=Record.open(folder, {})),
        )
    counter = Counter()
    again = fit_features(
        stream_of(rows), optimized(), plan, 2, site_of(url=folder, listener=counter, record=Record.open(folder, {}))
    )
    assert load_map(again) == load_map(whole)
    total = 2 * (7 + 1)  # two passes of four slabs, three sums and an end
    # the task at which the driver died was recorded, except the end of a pass, which is recorded after the last word
    assert total - stop_at <= len(counter.labels) <= total - stop_at + 1
    finished = Counter()
    fit_features(
        stream_of(rows), optimized(), plan, 2, site_of(url=folder, listener=finished, record=Record.open(folder, {}))
    )
    assert finished.labels == []
    assert not list(folder.glob("features-*"))


def test_maps_that_learn_nothing_pass_through():
    plain = features.NTKRandomFeatures(fully_connected(1), 20)
    x, y = data()
    assert fit_features(stream_of(MemoryRows(x, y)), plain, ridge_plan(), 2, site_of()) is plain
    assert fit_features(stream_of(MemoryRows(x, y)), None, ridge_plan(), 2, site_of()) is None


def test_targets_are_asked_for_before_rows_are_read():
    x, _ = data()
    with pytest.raises(InputError, match="targets are missing"):
        fit_features(stream_of(MemoryRows(x)), optimized(), ridge_plan(), 0, site_of())


# --- ridge --------------------------------------------------------------------------------------------------------------

PARTS = (np.random.default_rng(8).permutation(N) % 4).astype(np.int16)
TRAIN = PARTS < 3
FOLDS = [(0,), (1,), (2,)]


def naive_path(map, x, y, selection):
    """Held-out scores with the map fitted anew on the other folds."""
    scores = []
    for alpha in ALPHAS:
        errors = []
        for fold in range(3) if selection == "kfold" else [2]:
            train, own = TRAIN & (fold != PARTS), fold == PARTS
            fitted = map.fit(x[train], y[train])
            w, b = naive_ridge(fitted(x[train]), y[train], alpha)
            errors.append(((y[own] - fitted(x[own]) @ w - b) ** 2).mean())
        scores.append(np.mean(errors))
    return scores


@pytest.mark.parametrize("selection", ["kfold", "holdout"])
@pytest.mark.parametrize("where", ["memory", "cluster"])
def test_features_that_saw_targets_are_fitted_anew_for_every_fold(tmp_path, client, where, selection):
    x, y = data()
    if where == "memory":
        rows, keywords = MemoryRows(x, y, None, PARTS, ()), {}
    else:
        rows = DatasetRows(stored(tmp_path, x, y).url, save_state(tmp_path / "state", state_of(PARTS)), ())
        keywords = {"url": tmp_path / "run", "client": client}
    found = fit_ridge(
        rows,
        FOLDS,
        RidgeOptions(ALPHAS, selection=selection),
        ridge_plan(slab_rows=64),
        features=optimized(),
        k=2,
        **sited(keywords),
    )
    np.testing.assert_allclose(
        [row["score"] for row in found.path], naive_path(optimized(), x, y, selection), rtol=1e-6
    )
    fitted = optimized().fit(x[TRAIN], y[TRAIN])
    w, b = naive_ridge(fitted(x[TRAIN]), y[TRAIN], found.model.alpha)
    np.testing.assert_allclose(found.model.map(x), fitted(x), atol=1e-9)
    np.testing.assert_allclose(fitted(x) @ found.model.weights + found.model.intercept, fitted(x) @ w + b, atol=1e-6)


def test_features_that_saw_rows_alone_are_fitted_once():
    x, y = data()
    counter = Counter()
    fit_ridge(
        MemoryRows(x, y, None, PARTS, ()),
        FOLDS,
        RidgeOptions(ALPHAS, selection="kfold"),
        ridge_plan(slab_rows=N),
        features=landmarks(),
        k=2,
        site=site_of(listener=counter),
    )
    assert counter.count("features-slab") == 1
    assert counter.count("gram-slab") == 3


def test_features_are_fitted_to_preprocessed_rows():
    x, y = regression_data(N)
    found = fit_ridge(
        MemoryRows(x, y), [], RidgeOptions((0.1,)), one_slab(), features=optimized(), steps=parse_steps(["standardize"])
    )
    expected = optimized().fit((x - x.mean(axis=0)) / x.std(axis=0), y)
    np.testing.assert_allclose(found.model.map.learned["0.relu"], expected.learned["0.relu"], rtol=1e-10)


@every_map
def test_models_keep_what_was_learned(tmp_path, map):
    x, y = data()
    model = fit_ridge(MemoryRows(x, y), [], RidgeOptions((0.1,)), ridge_plan(), features=map, k=2).model
    again = RidgeModel.load(model.save(tmp_path))
    assert again.map == model.map
    np.testing.assert_array_equal(again.scores(again.map(x)), model.scores(model.map(x)))
    assert not list(tmp_path.rglob("*.pkl"))


def test_states_describe_maps_of_every_kind():
    x, y = data()
    for map in (None, features.NTKRandomFeatures(fully_connected(1), 20), optimized().fit(x, y)):
        arrays, described = to_state(map)
        assert from_state(arrays, json.loads(json.dumps(described))) == map


# --- estimators and featurize -------------------------------------------------------------------------------------------


def test_estimators_fit_the_map(tmp_path, client):
    x, labels = class_data(N)
    x = x.astype(float)
    here = RidgeClassifier(optimized(), 0.1).fit(x, labels)
    assert isinstance(here.model_.map, FittedMap)
    expected = optimized().fit(x, labels)
    np.testing.assert_allclose(here.model_.map(x), expected(x), atol=1e-9)
    w, b = naive_ridge(expected(x), encode_targets(labels, 3, "float64"), 0.1)
    np.testing.assert_allclose(here.decision_function(x), expected(x) @ w + b, atol=1e-6)
    there = RidgeClassifier(optimized(), 0.1, client=client, url=tmp_path / "run").fit(x, labels)
    np.testing.assert_allclose(there.decision_function(x), here.decision_function(x), atol=1e-7)
    dataset = RidgeClassifier(optimized(), 0.1).fit(stored(tmp_path, x, labels).url)
    np.testing.assert_allclose(dataset.decision_function(x), here.decision_function(x), atol=1e-7)
    grid = RidgeClassifier(optimized(), 0.1).set_params(features__n_components=50).fit(x, labels)
    assert grid.model_.map.n_components == 50


def test_a_fitted_map_is_used_as_it_is(tmp_path, client):
    x, y = data(1)
    # more than a MiB of weights: a task may not carry them
    fitted = optimized(1500, n_step=1300, n_relu=1300, alignment=Alignment(1300, 0.0), depth=2).fit(x[:50], y[:50])
    assert fitted.learned.nbytes > 2**20
    model = RidgeRegressor(fitted, 0.1).fit(x, y)
    assert model.model_.map is fitted
    there = RidgeRegressor(fitted, 0.1, client=client, url=tmp_path / "run").fit(x, y)
    np.testing.assert_allclose(there.predict(x), model.predict(x), atol=1e-8)


def test_the_transformer_fits_the_map(tmp_path):
    import dask.array as da

    x, labels = class_data(N)
    expected = optimized().fit(x, labels)
    assert FeatureTransformer(optimized()).fit(x, labels).map_ == expected
    assert FeatureTransformer(optimized()).fit(da.from_array(x, chunks=(40, 6)), labels).map_ == expected
    dataset = stored(tmp_path, x, labels)
    assert FeatureTransformer(optimized()).fit(dataset.url).map_ == expected
    with pytest.raises(InputError, match="brings its own targets"):
        FeatureTransformer(optimized()).fit(dataset.url, labels)
    with pytest.raises(InputError, match="targets are missing"):
        FeatureTransformer(optimized()).fit(x)
    unlabelled = stored(tmp_path, x, None, "unlabelled.zarr", kind="unlabelled")
    with pytest.raises(InputError, match="targets are missing"):
        FeatureTransformer(optimized()).fit(unlabelled.url)
    assert FeatureTransformer(landmarks()).fit(unlabelled.url).map_ == landmarks().fit(x)


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_featurize_takes_fitted_maps(tmp_path, client, where):
    x, y = data()
    fitted, plan = (
        optimized(600, n_step=500, n_relu=500, alignment=Alignment(500, 0.0), depth=2).fit(x, y),
        Plan(tile_rows=60, dtype="float64"),
    )
    out = nd_featurize(fitted, x, url=tmp_path / "phi", client=None if where == "here" else client, plan=plan)
    np.testing.assert_allclose(out.compute(), fitted(x), atol=1e-12)
    np.testing.assert_allclose(nd_featurize(fitted, x, plan=plan).compute(), fitted(x), atol=1e-12)
    with pytest.raises(InputError, match="is not fitted"):
        nd_featurize(optimized(), x)


# --- jobs ---------------------------------------------------------------------------------------------------------------


def test_a_job_fits_the_map_in_every_fold(tmp_path, client):
    """The features of fold i come from its own training rows, on workers as here; verify finds every state."""
    from ntkdask.jobs.folds import stored_parts
    from ntkdask.jobs.training import SplitRule

    x, y = regression_data(N)
    dataset = stored(tmp_path, x.astype(np.float32), y)
    job = ridge_job(
        dataset,
        split=SplitRule(folds=3),
        features=optimized(),
        steps=parse_steps(["standardize"]),
        plan=Plan(dtype="float64"),
    )
    here, there = run(job, tmp_path / "here"), run(job, tmp_path / "there", client)
    assert here["test"]["mse"] == there["test"]["mse"]
    parts = stored_parts(tmp_path / "here")
    for fold in here["folds"]:
        train = parts != fold["fold"]
        own = dataset.rows(0, N)[train].astype(float)
        scale = own.std(axis=0)
        expected = optimized().fit((own - own.mean(axis=0)) / scale, dataset.targets(0, N)[train])
        learned = RidgeModel.load(fold["model"]).map.learned
        np.testing.assert_allclose(learned["0.factors"], expected.learned["0.factors"], rtol=1e-6)
    assert verify(tmp_path / "here") == []
    assert open_dataset(dataset.url).n == N


def test_the_plan_counts_the_fit():
    shape = RidgeShape(
        n_total=50_000, n_train=40_000, row_shape=(100,), row_bytes=400, m=512, k=10, n_groups=1, selection="gcv"
    )
    plain, learning = features.NTKRandomFeatures(fully_connected(1), 512), optimized(512, alignment=Alignment())
    plan = plan_ridge(shape, learning, (), plan=Plan(), resources=Resources(2**30, 0, 1, 1, 1))
    costs = costs_of(shape, learning, (), plan)
    assert costs.tasks > costs_of(shape, plain, (), plan).tasks
    assert costs.memory["features-slab"] <= 2**30
    # 20 000 candidates of 100 features, float32, twice
    assert costs.memory["features-slab"] - costs.memory["features-sum"] > 2 * 20_000 * 100 * 4 / 2
    huge = learning.replace(alignment=Alignment(5_000_000))
    with pytest.raises(MemoryBudgetError, match=r"features-slab needs .*fewer candidates"):
        plan_ridge(shape, huge, (), plan=Plan(), resources=Resources(2**30, 0, 1, 1, 1))


@pytest.mark.slow
def test_a_job_file_from_end_to_end(tmp_path, monkeypatch, capfd):
    """plan, run, a run again, verify: digits, optimised features, by the command line."""
    from sklearn.datasets import load_digits

    from ntkdask.cli import commands as cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ntkdask", *arguments])
        with contextlib.suppress(SystemExit):
            cli.main()
        return capfd.readouterr()

    monkeypatch.chdir(tmp_path)
    x, labels = load_digits(return_X_y=True)
    stored(tmp_path, x[:400].astype(np.float32), labels[:400], "d.zarr")
    nested = {"type": "Alignment", "n_candidates": 500, "rho": 10, "sampling": "gaussian"}
    table = {"type": "NTKRandomFeatures", "n_components": 96, "sampling": "optimized", "alignment": nested}
    Path("job.toml").write_text(job_text("digits", features=table, run={"slab_rows": 128}))
    assert "features-slab" in call("plan", "job.toml").out
    call("run", "job.toml")
    metrics = json.loads(Path("runs/digits/metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.75
    assert metrics["job"]["features"]["alignment"]["rho"] == 10
    # four slabs and three sums, for the mean and for the one hidden layer
    assert metrics["tasks"]["features-slab"]["count"] == 2 * 7
    before = {p: p.stat().st_mtime_ns for p in Path("runs/digits/fold-0").rglob("c")}
    call("run", "job.toml")
    assert {p: p.stat().st_mtime_ns for p in Path("runs/digits/fold-0").rglob("c")} == before
    assert "fold-0/features-1" in call("status", "digits").out
    assert verify("runs/digits") == []
    damaged = [p for p in Path("runs/digits/fold-0/state").iterdir() if (p / "0.relu").exists()]
    chunk = next(p for p in sorted((damaged[0] / "0.relu" / "c").rglob("*")) if p.is_file())
    flip_bit(chunk)
    assert len(verify("runs/digits", repair=True)) == 1
    call("run", "job.toml")
    assert verify("runs/digits") == []
    assert json.loads(Path("runs/digits/metrics.json").read_text())["test"] == metrics["test"]


def test_job_files_refuse_what_an_alignment_cannot_be():
    from ntkdask.jobs.spec import build_job

    def build(**alignment):
        table = {"type": "NTKRandomFeatures", "n_components": 96, "sampling": "optimized", "alignment": alignment}
        tables = {
            "name": "j",
            "data": {"url": "d"},
            "network": {"preset": "fully_connected", "depth": 1},
            "features": table,
        }
        return build_job(tables).features

    assert build(type="Alignment", rho=3).alignment == Alignment(rho=3)
    with pytest.raises(JobError, match="unknown key 'roh' for Alignment; did you mean 'rho'"):
        build(type="Alignment", roh=3)
    with pytest.raises(InputError, match="rho is -1"):
        build(type="Alignment", rho=-1)
