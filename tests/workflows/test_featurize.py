"""featurize: the map's own values as a dask array, lazily or stored once."""

import dask.array as da
import numpy as np
import pytest
from job_examples import Counter, Killed, damage, feature_map, regression_data, stored

from ntkdask.errors import DamagedTileError, FingerprintError, InputError, MemoryBudgetError
from ntkdask.planning.pace import RowPace
from ntkdask.planning.tiles import Plan
from ntkdask.store import TileStore
from ntkdask.workflows import featurize as module
from ntkdask.workflows.featurize import featurize

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def images(n: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)


def rows(n: int = 60, dtype: str = "float64") -> np.ndarray:
    return regression_data(n)[0].astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tile_rows", [None, 1, 17, 60, 100])
@pytest.mark.parametrize("store", [False, True])
def test_the_maps_own_values(tmp_path, dtype, tile_rows, store):
    x, map = rows(dtype=dtype), feature_map()
    phi = featurize(map, x, url=tmp_path / "phi" if store else None, plan=Plan(tile_rows=tile_rows))
    assert isinstance(phi, da.Array)
    assert phi.shape == (60, 48)
    assert phi.dtype == dtype
    assert phi.chunks[1] == (48,)
    assert tile_rows is None or phi.chunks[0][0] == min(tile_rows, 60)
    expected = map(x)
    assert np.abs(phi.compute() - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("source", ["array", "dask", "dataset", "url"])
@pytest.mark.parametrize("store", [False, True])
def test_uint8_images_are_scaled(tmp_path, source, store):
    x, map = images(), feature_map()
    dataset = stored(tmp_path, x, np.zeros(60))
    given = {"array": x, "dask": da.from_array(x, chunks=(25, 4, 2, 3)), "dataset": dataset, "url": dataset.url}[source]
    phi = featurize(map, given, url=tmp_path / "phi" if store else None, plan=Plan(tile_rows=20))
    assert phi.dtype == "float32"
    assert np.allclose(phi.compute(), map((x / 255).astype("float32")), atol=1e-5)


@pytest.mark.parametrize("source", ["array", "dask", "url"])
def test_on_a_cluster(tmp_path, client, source):
    x, map = images(), feature_map()
    given = {"array": x, "dask": da.from_array(x, chunks=(25, 4, 4, 3)), "url": stored(tmp_path, x, np.zeros(60)).url}
    phi = featurize(map, given[source], url=tmp_path / "phi", client=client, plan=Plan(tile_rows=20, dtype="float64"))
    assert np.allclose(phi.compute(), map(x / 255), atol=1e-12)
    receipts = TileStore.open(tmp_path / "phi").receipts
    assert len(receipts) == 3
    assert all(r.worker.startswith("tcp://") for r in receipts.values())
    listener = Counter()
    featurize(
        map,
        given[source],
        url=tmp_path / "phi",
        client=client,
        plan=Plan(tile_rows=20, dtype="float64"),
        listener=listener,
    )
    assert listener.labels == []


def test_integers_and_lists_are_cast(tmp_path):
    map = feature_map()
    x = np.arange(12).reshape(4, 3)
    assert np.allclose(featurize(map, x).compute(), map(x.astype("float32")), atol=1e-6)
    assert np.allclose(featurize(map, x.tolist(), url=tmp_path / "phi").compute(), map(x.astype("float32")), atol=1e-6)


def test_lazy_means_nothing_is_computed(monkeypatch):
    map = feature_map()
    calls = []

    def count(self, x):
        calls.append(len(x))
        return np.zeros((len(x), 48), x.dtype)

    monkeypatch.setattr(type(map), "__call__", count)
    phi = featurize(map, rows(), plan=Plan(tile_rows=20))
    assert calls == []
    phi[:20].compute(scheduler="synchronous")
    assert calls == [20]


def test_resume_computes_what_is_missing(tmp_path):
    x, map, plan = rows(), feature_map(), Plan(tile_rows=10)
    whole = featurize(map, x, url=tmp_path / "whole", plan=plan).compute()
    with pytest.raises(Killed):
        featurize(map, x, url=tmp_path / "phi", plan=plan, listener=Counter(2))
    TileStore.open(tmp_path / "phi").chunk_path((0, 0)).unlink()
    listener = Counter()
    phi = featurize(map, x, url=tmp_path / "phi", plan=plan, listener=listener)
    assert listener.stages == [("featurize", 6, 1)]
    assert len(listener.labels) == 5
    assert phi.compute().tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"map": feature_map(seed=1)}, r"map\.seed: stored 0, asked 1"),
        ({"map": feature_map(64)}, r"map\.n_components: stored 48, asked 64"),
        ({"x": rows() + 1e-12}, "data: stored"),
        ({"plan": Plan(tile_rows=20, dtype="float32")}, "dtype: stored 'float64', asked 'float32'"),
        ({"plan": Plan(tile_rows=30)}, "tile_shape"),
    ],
)
def test_other_features_are_refused(tmp_path, change, words):
    arguments = {"map": feature_map(), "x": rows(), "plan": Plan(tile_rows=20)}
    featurize(**arguments, url=tmp_path / "phi")
    with pytest.raises(FingerprintError, match=words):
        featurize(**{**arguments, **change}, url=tmp_path / "phi")


def test_equal_content_from_another_place_is_taken(tmp_path, client):
    map = feature_map()
    x = rows()
    featurize(map, da.from_array(x, chunks=(25, 6)), url=tmp_path / "phi", client=client)
    listener = Counter()
    featurize(map, da.from_array(x, chunks=(60, 6)), url=tmp_path / "phi", client=client, listener=listener)
    assert listener.labels == []


def test_a_damaged_tile_is_an_error_not_a_number(tmp_path):
    phi = featurize(feature_map(), rows(), url=tmp_path / "phi", plan=Plan(tile_rows=20))
    damage(tmp_path / "phi", (1, 0))
    with pytest.raises((ValueError, DamagedTileError)):
        phi.compute()


@pytest.mark.parametrize("x", [np.zeros(5), np.zeros((0, 3))])
def test_what_is_no_set_of_rows_is_refused(tmp_path, x):
    for url in (None, tmp_path / "phi"):
        with pytest.raises(InputError, match="expected"):
            featurize(feature_map(), x, url=url)


def test_rows_with_nan_are_named(tmp_path):
    x = rows()
    x[[4, 33], 1] = np.nan
    with pytest.raises(InputError, match=r"rows? 4\b"):
        featurize(feature_map(), x, url=tmp_path / "phi", plan=Plan(tile_rows=20))


def test_tiles_follow_the_budget(tmp_path):
    map, x = feature_map(512), rows(400)
    small = featurize(map, x, plan=Plan(memory_bytes=2**22))
    assert small.numblocks[0] > featurize(map, x).numblocks[0] == 1
    with pytest.raises(MemoryBudgetError, match=r"NTKRandomFeatures\(n_components=512\) needs"):
        featurize(map, x, plan=Plan(memory_bytes=1000))


@pytest.mark.parametrize(("row_seconds", "tile"), [(0.001, 60), (2.0, 45), (100.0, 1)])
def test_tiles_of_slow_features_are_cut_by_time(tmp_path, monkeypatch, row_seconds, tile):
    """A tile takes at most 90 s; a store that is there keeps its tiles, and no pace is asked for."""
    asked = []

    def paced(*arguments, **keywords):
        asked.append(1)
        return RowPace(row_seconds, np.inf, 2, 1)

    monkeypatch.setattr(module, "calibrate_features", paced)
    phi = featurize(feature_map(), rows(), url=tmp_path / "phi")
    assert phi.chunks[0][0] == tile
    assert phi.shape == (60, 48)
    again = featurize(feature_map(), rows(), url=tmp_path / "phi")
    featurize(feature_map(), rows(), url=tmp_path / "other", plan=Plan(tile_rows=7))
    assert again.chunks == phi.chunks
    assert len(asked) == 1
