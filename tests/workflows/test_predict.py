"""Predictions by tiles and what they are worth."""

import numpy as np
import pytest
from job_examples import Counter, Killed, class_data, feature_map, regression_data, ridge_plan, site_of, stored

from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import DamagedTileError, FingerprintError, InputError
from ntkdask.states import save_state
from ntkdask.store import TileStore
from ntkdask.workflows.predict import classification_metrics, evaluate, predict, regression_metrics
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge
from ntkdask.workflows.split import state_of

PLAN = ridge_plan("float32", tile_rows=40, batch_rows=16)  # 150 rows: 4 tiles, the last of 30


@pytest.fixture
def fitted(tmp_path):
    """(model's url, rows whose part is 1, x, targets, parts)"""
    x, y = regression_data(k=2)
    parts = (np.arange(150) % 3 == 0).astype(np.int16)
    parts[40:80] = 0  # a tile without selected rows
    rows = DatasetRows(stored(tmp_path, x, y).url, save_state(tmp_path / "state", state_of(parts)))
    fit = fit_ridge(
        rows.select(0), [], RidgeOptions((1.0,)), PLAN, features=feature_map(), k=2, site=site_of(url=tmp_path / "fit")
    )
    return fit, rows.select(1), x, y, parts


def test_scores_of_selected_rows_and_nan_elsewhere(tmp_path, fitted, client):
    fit, rows, x, _, parts = fitted
    expected = fit.model.map(x.astype("float32")) @ fit.model.weights + fit.model.intercept
    plain = predict(fit.model, rows, PLAN, 2, site_of())
    here = predict(fit.url, rows, PLAN, 2, site_of(), store=tmp_path / "here")
    there = predict(fit.url, rows, PLAN, 2, site_of(client=client), store=tmp_path / "there")
    for found in (plain, here.zarr_array()[...], there.zarr_array()[...]):
        assert found.shape == (150, 2)
        assert np.isnan(found[parts == 0]).all()
        assert np.allclose(found[parts == 1], expected[parts == 1], atol=1e-4 * np.abs(expected).max())
        assert found.tobytes() == plain.tobytes()
    assert here.receipts.keys() == there.receipts.keys() == set(here.indices())
    assert {i: r.checksum for i, r in here.receipts.items()} == {i: r.checksum for i, r in there.receipts.items()}


def test_predictions_resume(tmp_path, fitted):
    fit, rows, *_ = fitted
    whole = predict(fit.url, rows, PLAN, 2, site_of(), store=tmp_path / "whole")
    with pytest.raises(Killed):
        predict(fit.url, rows, PLAN, 2, site_of(listener=Counter(3)), store=tmp_path / "p")
    listener = Counter()
    resumed = predict(fit.url, rows, PLAN, 2, site_of(listener=listener), store=tmp_path / "p")
    assert listener.stages == [("predict", 4, 3)]
    assert listener.labels == ["predict"]
    assert resumed.zarr_array()[...].tobytes() == whole.zarr_array()[...].tobytes()


def test_another_models_predictions_are_refused(tmp_path, fitted):
    fit, rows, *_ = fitted
    predict(fit.url, rows, PLAN, 2, site_of(), fingerprint={"model": "a"}, store=tmp_path / "p")
    with pytest.raises(FingerprintError, match="model: stored 'a', asked 'b'"):
        predict(fit.url, rows, PLAN, 2, site_of(), fingerprint={"model": "b"}, store=tmp_path / "p")


def test_evaluation_reads_the_tiles(tmp_path, fitted):
    fit, rows, _, y, parts = fitted
    store = predict(fit.url, rows, PLAN, 2, site_of(), store=tmp_path / "p")
    chosen = parts == 1
    scores = store.zarr_array()[...][chosen]
    found = evaluate(store, rows, None)
    assert found["rows"] == chosen.sum()
    assert found["mse"] == pytest.approx(((scores - y[chosen]) ** 2).mean(), rel=1e-12)
    assert found["rmse"] == pytest.approx(found["mse"] ** 0.5)
    assert found["r2"] == pytest.approx(1 - found["mse"] / y[chosen].var(axis=0).mean())
    assert found["scatter"]["predicted"] == scores[:, 0].tolist()
    store.chunk_path((0, 0)).unlink()
    with pytest.raises(DamagedTileError, match=r"tile \(0, 0\)"):
        evaluate(store, rows, None)


def test_evaluation_of_no_rows(tmp_path, fitted):
    fit, rows, *_ = fitted
    store = predict(fit.url, rows, PLAN, 2, site_of(), store=tmp_path / "p")
    assert evaluate(store, rows.select(7), None) == {"rows": 0}


def test_rows_of_another_shape_are_refused(fitted):
    fit, _, x, *_ = fitted
    with pytest.raises(InputError, match=r"rows have shape \(5,\)"):
        predict(fit.model, MemoryRows(x[:, :5]), PLAN, 2, site_of())


def test_classification_by_hand():
    scores = np.array([[0.6, -0.3, -0.3], [0.2, 0.1, 0.0], [0.0, 0.0, 0.5]])
    found = classification_metrics(np.array([0, 1, 2]), scores, 3)
    assert found["rows"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    truth = np.eye(3) - 1 / 3
    assert found["mse"] == pytest.approx(((scores - truth) ** 2).mean())


def test_regression_by_hand():
    found = regression_metrics(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]))
    assert (found["mse"], found["r2"]) == (0.5, 0.5)
    assert np.isnan(regression_metrics(np.ones((3, 1)), np.zeros((3, 1)))["r2"])
    many = np.arange(5001.0)[:, None]
    assert len(regression_metrics(many, many)["scatter"]["target"]) <= 1000


def test_a_classifier_end_to_end(tmp_path):
    x, labels = class_data()
    dataset = stored(tmp_path, x, labels)
    rows = DatasetRows(dataset.url)
    fit = fit_ridge(
        rows,
        [],
        RidgeOptions((0.001,)),
        PLAN,
        features=feature_map(400),
        n_classes=3,
        k=3,
        site=site_of(url=tmp_path / "fit"),
    )
    found = evaluate(predict(fit.url, rows, PLAN, 3, site_of(), store=tmp_path / "p"), rows, dataset.class_names)
    assert found["accuracy"] == 1.0  # more features than rows interpolate
    assert np.trace(found["confusion"]) == 150
    assert isinstance(TileStore.open(tmp_path / "p"), TileStore)
