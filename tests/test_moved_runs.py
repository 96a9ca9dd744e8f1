"""A run goes on wherever its folder lies: moved, copied, under a renamed parent, behind a link, by a relative path.

The original of a copy stays where it was with every chunk damaged: whoever reads it fails.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from job_examples import Counter, Killed, class_data, feature_map, flip_bit, regression_data, ridge_job, run, stored
from kernel_job_examples import job_of

from ntkdask import KernelRidgeRegressor, RidgeClassifier, cache
from ntkdask.datasets import open_dataset
from ntkdask.errors import DamagedTileError, FingerprintError
from ntkdask.features import NTKRandomFeatures
from ntkdask.jobs.folds import stored_parts
from ntkdask.jobs.inspect import open_record, status, verify
from ntkdask.kernels import RBF
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import parse_steps
from ntkdask.store import TileStore
from ntkdask.workflows.ensemble.predict import predict_ensemble
from ntkdask.workflows.model import load_model
from ntkdask.workflows.ridge.fit import RidgeOptions

SMALL = Plan(tile_rows=40, dtype="float64")


def ridge(tmp_path):
    optimised = NTKRandomFeatures(fully_connected(1), n_components=16, sampling="optimized")
    steps = parse_steps(["standardize"])
    return ridge_job(stored(tmp_path, *class_data()), features=optimised, steps=steps, plan=SMALL)


def leave_one_out(tmp_path):
    return ridge_job(
        stored(tmp_path, *regression_data()), options=RidgeOptions((0.1, 1.0), selection="loo"), plan=SMALL
    )


def kernel(tmp_path, solver="eigh"):
    return job_of(stored(tmp_path, *regression_data()), solver=solver)


def tiled(tmp_path):
    return kernel(tmp_path, "tiled_cholesky")


def gradients(tmp_path):
    return kernel(tmp_path, "cg")


def moved(run, monkeypatch):
    run.parent.rename(run.parent.with_name("archive"))
    return run.parent.with_name("archive") / run.name


def copied(run, monkeypatch):
    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    for chunk in (p for p in run.rglob("*") if p.is_file() and "c" in p.relative_to(run).parts):
        chunk.write_bytes(b"of the original")
    return copy


def linked(run, monkeypatch):
    elsewhere = run.parent.with_name("disk")
    run.parent.rename(elsewhere)
    (run.parent.parent / "link").symlink_to(elsewhere)
    return run.parent.parent / "link" / run.name


def relative(run, monkeypatch):
    place = moved(run, monkeypatch)
    monkeypatch.chdir(place.parent.parent)
    return Path("archive") / run.name


PAIRS = [(kernel, way) for way in (moved, copied, linked, relative)]
PAIRS += [(job, copied) for job in (ridge, leave_one_out, gradients)]


def predictions(folder):
    return TileStore.open(folder / "fold-0" / "predictions").zarr_array()[...]


@pytest.mark.parametrize(("job", "way"), PAIRS)
def test_a_finished_run_is_whole_elsewhere(tmp_path, monkeypatch, job, way):
    tiny = job(tmp_path)
    first = run(tiny, tmp_path / "runs" / "a")
    expected = predictions(tmp_path / "runs" / "a")
    place = way(tmp_path / "runs" / "a", monkeypatch)
    cache.shared.clear()
    assert verify(place) == []
    assert all(stage.finished for stage in status(place))
    again = run(tiny, place, listener=(listener := Counter()))
    assert not listener.labels
    assert again["test"] == first["test"]
    np.testing.assert_array_equal(predictions(place), expected)
    where = Path(again["folds"][0]["model"])
    assert where.is_relative_to(place.absolute())
    assert load_model(str(where)).alpha == first["folds"][0]["alpha"]
    np.testing.assert_array_equal(stored_parts(place), stored_parts(place.absolute()))


@pytest.mark.parametrize(("job", "way"), [(ridge, moved), (gradients, moved), (tiled, copied)])
def test_a_run_that_was_cut_off_goes_on_elsewhere(tmp_path, monkeypatch, job, way):
    tiny = job(tmp_path)
    whole = Counter()
    first = run(tiny, tmp_path / "whole", listener=whole)
    # after the first predictions: everything before them is named in the record
    with pytest.raises(Killed):
        run(tiny, tmp_path / "runs" / "a", listener=Counter(whole.labels.index("predict") + 1))
    place = way(tmp_path / "runs" / "a", monkeypatch)
    cache.shared.clear()
    again = run(tiny, place, listener=(listener := Counter()))
    assert set(listener.labels) <= {"predict"}
    assert again["test"] == first["test"]
    assert verify(place) == []


@pytest.mark.parametrize("job", [ridge, kernel])
def test_no_file_holds_the_path_of_its_run(tmp_path, job):
    run(job(tmp_path), tmp_path / "runs" / "a")
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert str(tmp_path / "runs").encode() not in text, path


@pytest.mark.parametrize("job", [ridge, kernel])
def test_equal_models_have_an_equal_digest_wherever_they_lie(tmp_path, job):
    tiny = job(tmp_path)
    names = [Path(run(tiny, tmp_path / place)["folds"][0]["model"]).name for place in ("a", "deep/er/b")]
    assert names[0] == names[1]


def test_points_of_another_fit_are_not_taken_for_those_of_a_model(tmp_path):
    metrics = run(kernel(tmp_path), tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "fold-0" / "points")
    stored(tmp_path / "a" / "fold-0", np.ones((3, 6)), None, "points")
    cache.shared.clear()
    with pytest.raises(DamagedTileError, match="other rows than the model"):
        load_model(metrics["folds"][0]["model"])


def test_a_record_of_absolute_paths_is_read_in_its_own_folder(tmp_path, monkeypatch):
    """As the first release wrote them."""
    tiny = kernel(tmp_path)
    first = run(tiny, tmp_path / "runs" / "a")
    record = tmp_path / "runs" / "a" / "record.json"
    table = json.loads(record.read_text().replace("@run/", f"{tmp_path}/runs/a/"))
    del table["checksums"]
    record.write_text(json.dumps(table))
    place = copied(tmp_path / "runs" / "a", monkeypatch)
    cache.shared.clear()
    assert verify(place) == []
    again = run(tiny, place, listener=(listener := Counter()))
    assert not listener.labels
    assert again["test"] == first["test"]
    assert str(tmp_path / "runs" / "a") not in json.dumps(open_record(place))


@pytest.mark.parametrize(
    "estimator",
    [
        lambda url: RidgeClassifier(feature_map(16), alphas=(0.1, 1.0), selection="kfold", url=url),
        lambda url: KernelRidgeRegressor(RBF(0.2), alphas=(0.1, 1.0), url=url),
    ],
)
def test_fits_of_estimators_move(tmp_path, monkeypatch, estimator):
    x, y = class_data()
    fitted = estimator(tmp_path / "fits" / "a").fit(x, y)
    expected = fitted.predict(x)
    place = copied(tmp_path / "fits" / "a", monkeypatch)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("zarr.json")}
    cache.shared.clear()
    np.testing.assert_array_equal(estimator(place).fit(x, y).predict(x), expected)
    assert {p: p.stat().st_mtime_ns for p in place.rglob("zarr.json")} == before
    assert verify(place) == []


def test_ensembles_move(tmp_path, monkeypatch):
    x, y = regression_data(40)
    asked = {"kind": "ntk", "times": (0.5,), "diag_reg": 0.1, "output": "mean"}
    first = predict_ensemble(fully_connected(1), x, y, x[:7], url=tmp_path / "runs" / "a", **asked)
    expected = np.asarray(first.mean)
    place = copied(tmp_path / "runs" / "a", monkeypatch)
    cache.shared.clear()
    again = predict_ensemble(fully_connected(1), x, y, x[:7], url=place, listener=(listener := Counter()), **asked)
    assert not listener.labels
    np.testing.assert_array_equal(np.asarray(again.mean), expected)
    other = predict_ensemble(fully_connected(1), x, y, x[7:9], url=place, **asked)  # from the stored decomposition
    assert np.asarray(other.mean).shape == (1, 2, 1)
    with pytest.raises(FingerprintError):
        predict_ensemble(fully_connected(2), x, y, x[:7], url=place, **asked)


def test_a_moved_run_is_damaged_where_its_own_files_are(tmp_path, monkeypatch):
    metrics = run(kernel(tmp_path), tmp_path / "runs" / "a")
    model = Path(metrics["folds"][0]["model"]).relative_to(tmp_path / "runs" / "a")
    place = moved(tmp_path / "runs" / "a", monkeypatch)
    flip_bit(place / model / "coefficients" / "c" / "0" / "0")
    cache.shared.clear()
    (found,) = verify(place, repair=True)
    assert found.path == place / model
    run(job_of(open_dataset(tmp_path / "data.zarr")), place, listener=(listener := Counter()))
    assert "solve" in listener.labels
    assert verify(place) == []
