"""Whoever writes to a place is alone there: every workflow asks for the same lock; verify looks on without being misled."""

import dask.array as da
import numpy as np
import pytest
from job_examples import ONE_THREAD, Counter, class_data, feature_map, regression_data, ridge_job, stored
from matrix_examples import kernel, rows
from store_examples import create, fill

import ntkdask as nd
from ntkdask.datasets import write_dataset
from ntkdask.errors import StoreError
from ntkdask.files import remove
from ntkdask.jobs.inspect import verify
from ntkdask.jobs.run import run_job
from ntkdask.matrices.factorize import factorize
from ntkdask.store import TileStore, tile_stores

PLAN = nd.Plan(tile_rows=8)


def matrix_of(folder):
    nd.kernel_matrix(kernel(), rows(20), url=folder / "matrix", plan=PLAN)
    return folder / "matrix"


def job_of(folder):
    path = folder / "data.zarr"
    return ridge_job(nd.open_dataset(path) if path.exists() else stored(folder, *class_data()))


def sweep_of(url, listener):
    from ntkdask.modules.descriptions import FiniteNetwork
    from ntkdask.workflows.empirical.sweep import run_pntk_sweep
    from ntkdask.workflows.empirical.sweep_cells import PntkSweep, SweepData

    x, labels = rows(12), np.arange(12) % 3
    networks = {"FCN": {8: FiniteNetwork(nd.fully_connected(1), 8, 3, (6,))}}
    sweep = PntkSweep(networks, seeds=(0,), kernels=("pntk",), alpha=0.1)
    run_pntk_sweep(sweep, SweepData(x, labels, x, labels, 3), url, listener=listener)


WRITERS = {
    "kernel_matrix": lambda folder, **to: nd.kernel_matrix(kernel(), rows(20), plan=PLAN, **to),
    "featurize": lambda folder, **to: nd.featurize(feature_map(), rows(20), plan=PLAN, **to),
    "ensemble": lambda folder, **to: nd.predict_ensemble(
        nd.fully_connected(1), rows(20), rows(20, 1), rows(9, seed=1), plan=PLAN, diag_reg=0.1, **to
    ),
    "factorize": lambda folder, **to: factorize(matrix_of(folder), 0.5, **to),
    "job": lambda folder, **to: run_job(
        job_of(folder), to["url"], resources=ONE_THREAD, **({"listener": to["listener"]} if "listener" in to else {})
    ),
    "sweep": lambda folder, **to: sweep_of(to["url"], to.get("listener")),
}


class Second(Counter):
    """While the first call runs, a second one of the same is made, at its first finished task."""

    def __init__(self, call):
        super().__init__()
        self.call, self.refused = call, None

    def task(self, label, done):
        super().task(label, done)
        if len(self.labels) == 1:
            with pytest.raises(StoreError, match="in use by another run"):
                self.call()
            self.refused = True


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path, name):
    if name == "sweep":
        pytest.importorskip("torch")
    if name == "factorize":
        matrix_of(tmp_path)
    call, url = WRITERS[name], tmp_path / "out"
    listener = Second(lambda: call(tmp_path, url=url))
    call(tmp_path, url=url, listener=listener)
    assert listener.refused
    # the lock is free again, and what is there is taken as it is
    again = Counter()
    call(tmp_path, url=url, listener=again)
    assert not again.labels
    assert not list(tmp_path.glob(".*.lock"))


def test_linearised_predictions_have_one_writer(tmp_path):
    url, f0 = matrix_of(tmp_path), rows(20, 3)

    def predict(**to):
        return nd.predict_stored_linearized(url, url, np.arange(20) % 3, f0, f0, n_classes=3, alpha=0.1, **to)

    listener = Second(lambda: predict(url=tmp_path / "out"))
    predict(url=tmp_path / "out", listener=listener)
    assert listener.refused


def test_a_dataset_has_one_writer(tmp_path):
    x, y = regression_data(20)

    def block(rows):
        if rows.size:
            with pytest.raises(StoreError, match="in use by another run"):
                write_dataset(tmp_path / "d", x, y)
        return rows

    given = da.from_array(x, chunks=(20, 6)).map_blocks(block, dtype=x.dtype)
    np.testing.assert_array_equal(write_dataset(tmp_path / "d", given, y).rows(0, 20), x)
    assert {p.name for p in tmp_path.iterdir()} == {"d"}


def test_verify_beside_a_run_finds_nothing(tmp_path):
    """Sums that a run combines are gone a moment later: neither they nor whole stores of them are damage."""
    url = tmp_path / "run" / "sums"
    fill(store := create(url))
    seen = TileStore.open(url)
    store.discard((0, 0))
    assert seen.damaged() == []
    # but a chunk that is gone without a word is
    store.chunk_path((1, 1)).unlink()
    assert seen.damaged() == TileStore.open(url).damaged() == [(1, 1)]
    remove(url)
    assert seen.damaged() == []


def test_a_store_that_goes_while_stores_are_looked_for(tmp_path, monkeypatch):
    for name in "ab":
        fill(create(tmp_path / name))
    opened = TileStore.open

    def going(url):
        if url.name == "a":
            remove(url)
        return opened(url)

    monkeypatch.setattr(TileStore, "open", going)
    assert [store.path.name for store in tile_stores(tmp_path)] == ["b"]


def test_verify_at_every_task_of_a_run(tmp_path):
    class Verified(Counter):
        def task(self, label, done):
            super().task(label, done)
            assert verify(tmp_path / "run") == []
            if len(self.labels) == 1:
                with pytest.raises(StoreError, match="in use by another run"):
                    verify(tmp_path / "run", repair=True)

    job = ridge_job(stored(tmp_path, *class_data()), plan=nd.Plan(tile_rows=40, dtype="float32"))
    run_job(job, tmp_path / "run", resources=ONE_THREAD, listener=(listener := Verified()))
    # four slabs and three sums
    assert listener.count("gram-slab") == 7
