"""What readers who know nothing of this package find on disk: NaN where nothing is stored, names of axes, words."""

import dask.array as da
import numpy as np
import pytest
import xarray
import zarr
from job_examples import ONE_THREAD, class_data, feature_map, ridge_job, stored
from matrix_examples import kernel, rows
from store_examples import arrays, create

import ntkdask as nd
from ntkdask.datasets import write_dataset
from ntkdask.errors import DamagedTileError
from ntkdask.jobs.run import run_job
from ntkdask.states import save_state
from ntkdask.store import TileStore, tile_stores


@pytest.mark.parametrize("triangle", [None, "symmetric", "lower"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_stored_is_nan_and_said_in_words(tmp_path, triangle, dtype):
    store = create(tmp_path / "k", shape=(5, 5), tile_shape=(2, 2), dtype=dtype, triangle=triangle)
    tile = np.zeros((2, 2), dtype)
    store.record(store.commit((1, 0), tile))
    found = zarr.open(tmp_path / "k", mode="r")
    assert np.isnan(found[:2]).all()
    assert (found[2:4, :2] == 0).all()
    assert np.isnan(found[2:4, 2:]).all()
    assert found.metadata.dimension_names == ("row", "column")
    assert "NaN" in found.attrs["comment"]
    assert ("triang" in found.attrs["comment"] or "symmetric" in found.attrs["comment"]) == (triangle is not None)


def test_every_array_of_a_run_names_its_axes(tmp_path):
    run_job(ridge_job(stored(tmp_path, *class_data())), tmp_path / "run", resources=ONE_THREAD)
    found = [zarr.open(path.parent, mode="r") for path in tmp_path.rglob("zarr.json")]
    found = [array for array in found if isinstance(array, zarr.Array)]
    assert len(tile_stores(tmp_path)) == 2
    # the dataset's two arrays, the two stores, the split and the model
    assert len(found) >= 6
    for array in found:
        assert array.metadata.dimension_names is not None
        assert len(set(array.metadata.dimension_names)) == array.ndim
        assert np.isnan(array.fill_value) if array.dtype.kind == "f" else array.fill_value == 0


@pytest.mark.parametrize("shape", [(3,), (4, 5, 3), (4, 5), (4, 4, 3, 2)])
@pytest.mark.parametrize("k", [None, 2])
def test_datasets_open_in_xarray(tmp_path, shape, k):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, *shape)), rng.normal(size=(7,) if k is None else (7, k))
    write_dataset(tmp_path / "d", x, y, weights=np.arange(7.0))
    found = xarray.open_zarr(tmp_path / "d")
    assert set(found) == {"x", "targets", "weights"}
    assert found.sizes["row"] == 7
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["targets"], y)
    assert found["targets"].dims == (("row",) if k is None else ("row", "output"))


def test_states_open_in_xarray(tmp_path):
    found = xarray.open_zarr(save_state(tmp_path, arrays()), consolidated=False)
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)


def test_a_missing_tile_of_features_is_an_error_here_and_nan_elsewhere(tmp_path):
    x = rows(40)
    phi = nd.featurize(feature_map(), x, url=tmp_path / "phi", plan=nd.Plan(tile_rows=10))
    expected = feature_map()(x)
    store = TileStore.open(tmp_path / "phi")
    assert store.zarr_array().metadata.dimension_names == ("row", "component")
    store.chunk_path((2, 0)).unlink()
    np.testing.assert_allclose(phi[:20].compute(), expected[:20], atol=1e-12)
    with pytest.raises(DamagedTileError, match=r"tile \(2, 0\)"):
        phi.compute(scheduler="synchronous")
    found = da.from_zarr(tmp_path / "phi").compute()
    assert np.isnan(found[20:30]).all()
    assert np.isfinite(found[:20]).all()


def test_a_missing_tile_of_an_ensemble_is_an_error(tmp_path):
    x, y = rows(20), rows(20, 1)
    found = nd.predict_ensemble(
        nd.fully_connected(1), x, y, rows(9, seed=1), url=tmp_path / "e", plan=nd.Plan(tile_rows=4), diag_reg=0.1
    )
    assert np.isfinite(found.mean.compute()).all()
    (values,) = [s for s in tile_stores(found.url) if s.path.name == "values"]
    values.chunk_path((0, 1, 0)).unlink()
    with pytest.raises(DamagedTileError, match=r"tile \(0, 1, 0\)"):
        found.mean.compute(scheduler="synchronous")


def test_a_foreign_reader_of_a_kernel_matrix(tmp_path):
    nd.kernel_matrix(kernel(), rows(20), url=tmp_path / "k", plan=nd.Plan(8, dtype="float64"))
    found = zarr.open(tmp_path / "k", mode="r")
    assert np.isnan(found[0, 17])
    assert np.isclose(found[17, 0], kernel()(rows(20))[17, 0])
