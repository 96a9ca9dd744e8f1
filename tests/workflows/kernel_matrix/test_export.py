"""export_matrix: both triangles in plain Zarr, tile by tile, continued where it was cut off."""

import numpy as np
import pytest
import xarray
import zarr
from factor_examples import lower
from job_examples import damage
from matrix_examples import PAIR, kernel, rows

import ntkdask as nd
from ntkdask.errors import DamagedTileError, StoreError
from ntkdask.files import exclusive
from ntkdask.kernels import NNGP, NTK
from ntkdask.matrices.factorize import factorize
from ntkdask.store import RECEIPTS, TileStore
from ntkdask.workflows.kernel_matrix import export as module


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("m", [None, 13])
def test_the_whole_matrix_for_zarr_and_xarray(tmp_path, dtype, m):
    y = None if m is None else rows(m, seed=1)
    whole = nd.kernel_matrix(kernel(), rows(21), y, url=tmp_path / "k", plan=nd.Plan(8, 8, dtype=dtype)).compute()
    assert nd.export_matrix(tmp_path / "k", tmp_path / "copy") == tmp_path / "copy"
    found = zarr.open(tmp_path / "copy", mode="r")["matrix"]
    assert found.dtype == dtype
    assert found[...].tobytes() == whole.tobytes()
    opened = xarray.open_zarr(tmp_path / "copy")["matrix"]
    assert opened.dims == ("row", "column")
    assert opened.values.tobytes() == whole.tobytes()
    assert not (tmp_path / "copy" / "matrix" / RECEIPTS).exists()
    assert {p.name for p in tmp_path.iterdir()} == {"k", "copy"}


def test_parts_become_arrays(tmp_path):
    nd.kernel_matrix(PAIR, rows(9), url=tmp_path / "k", plan=nd.Plan(4))
    opened = xarray.open_zarr(nd.export_matrix(tmp_path / "k", tmp_path / "copy"))
    assert set(opened) == {"nngp", "ntk"}
    np.testing.assert_allclose(opened["nngp"], NNGP(PAIR.network)(rows(9)), rtol=1e-12)
    np.testing.assert_allclose(opened["ntk"], NTK(PAIR.network)(rows(9)), rtol=1e-12)


def test_a_factor_has_zeros_above_its_diagonal(tmp_path):
    nd.kernel_matrix(kernel(), rows(12), url=tmp_path / "k", plan=nd.Plan(5))
    factorize(tmp_path / "k", 0.5, url=tmp_path / "l")
    found = zarr.open(nd.export_matrix(tmp_path / "l", tmp_path / "copy"), mode="r")["matrix"][...]
    assert (np.triu(found, 1) == 0).all()
    np.testing.assert_allclose(found @ found.T, kernel()(rows(12)) + 0.5 * np.eye(12), rtol=1e-10)
    assert np.array_equal(found, lower(tmp_path / "l"))


def test_a_copy_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    whole = nd.kernel_matrix(kernel(), rows(20), url=tmp_path / "k", plan=nd.Plan(4)).compute()
    read, reads = TileStore.read, []

    def counted(self, index):
        reads.append(index)
        if len(reads) == 6:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(TileStore, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        nd.export_matrix(tmp_path / "k", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    nd.export_matrix(tmp_path / "k", tmp_path / "copy")
    # 15 stored tiles, the one that was cut off twice
    assert len(reads) == 16
    assert zarr.open(tmp_path / "copy", mode="r")["matrix"][...].tobytes() == whole.tobytes()


def test_a_copy_of_another_matrix_is_begun_again(tmp_path, monkeypatch):
    for depth in (1, 2):
        nd.kernel_matrix(NTK(nd.fully_connected(depth)), rows(9), url=tmp_path / f"k{depth}", plan=nd.Plan(4))
    monkeypatch.setattr(module, "_finish", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nd.export_matrix(tmp_path / "k1", tmp_path / "copy")
    monkeypatch.undo()
    found = zarr.open(nd.export_matrix(tmp_path / "k2", tmp_path / "copy"), mode="r")["matrix"][...]
    np.testing.assert_allclose(found, kernel()(rows(9)), rtol=1e-12)


def test_refusals(tmp_path):
    url = tmp_path / "k"
    nd.kernel_matrix(kernel(), rows(9), url=url, plan=nd.Plan(4))
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match="exists already"):
        nd.export_matrix(url, tmp_path / "there")
    (tmp_path / "copy.partial").mkdir()
    with pytest.raises(StoreError, match=r"copy\.partial exists already"):
        nd.export_matrix(url, tmp_path / "copy")
    with pytest.raises(StoreError, match="holds no stored matrix"):
        nd.export_matrix(tmp_path / "there", tmp_path / "new")
    with pytest.raises(StoreError, match="holds no Zarr array"):
        nd.export_matrix(tmp_path / "nothing", tmp_path / "new")
    with exclusive(tmp_path / "new", beside=True), pytest.raises(StoreError, match="in use by another run"):
        nd.export_matrix(url, tmp_path / "new")
    damage(url, (1, 0))
    with pytest.raises(DamagedTileError, match=r"tile \(1, 0\)"):
        nd.export_matrix(url, tmp_path / "new")
    TileStore.open(url).forget([(1, 0)])
    with pytest.raises(StoreError, match="has 5 of its 6 tiles"):
        nd.export_matrix(url, tmp_path / "new")


def test_on_a_cluster(tmp_path, client):
    whole = nd.kernel_matrix(kernel(), rows(20), url=tmp_path / "k", plan=nd.Plan(8)).compute(scheduler="synchronous")
    nd.export_matrix(tmp_path / "k", tmp_path / "copy", client=client)
    assert zarr.open(tmp_path / "copy", mode="r")["matrix"][...].tobytes() == whole.tobytes()
