"""A site runs stages here and on a cluster alike: one task, many, tiles of a store, sums; it records, resumes and tells."""

import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
from job_examples import Counter, Killed

from ntkdask.errors import InputError, StoreError
from ntkdask.execution.progress import Record
from ntkdask.execution.site import MOST_SAMPLES, Site
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import TileGrid, row_tiles
from ntkdask.store import TileStore


@dataclass(frozen=True)
class Fill:
    """Commits rows · factor; every receipt says one halving."""

    url: str
    factor: float = 1.0

    def __call__(self, tile):
        rows = np.arange(tile.start, tile.stop, dtype=np.float64)[:, None] * self.factor
        index = (*tile.index, 0) if len(tile.index) == 1 else tile.index
        columns = 2 if len(tile.index) == 1 else tile.col_stop - tile.col_start
        return replace(TileStore.open(self.url).commit(index, np.repeat(rows, columns, axis=1)), halvings=1)


@dataclass(frozen=True)
class FillBoth:
    first: Fill
    second: Fill

    def __call__(self, tile):
        return [self.first(tile), self.second(tile)]


def double(x):
    return 2 * x


def add(node, left, right):
    return left + right


def store_at(path, columns=2):
    return TileStore.create(path, shape=(10, columns), tile_shape=(4, columns), dtype="float64", fingerprint={})


@pytest.fixture(params=["here", "cluster"])
def runner(request):
    return None if request.param == "here" else request.getfixturevalue("one_worker")


def test_values_come_in_the_order_of_the_tiles(runner):
    site = Site(client=runner, listener=(listener := Counter()), threads=1)
    assert site.map(double, range(5), "double") == [0, 2, 4, 6, 8]
    assert site.alone(double, "alone", 21) == 42
    assert site.reduce(double, add, [1, 2, 3], "sum-slab", sum_label="sum") == 12
    assert site.on_slots(double, 1) == [0]
    assert listener.stages == [("double", 5, 0), ("alone", 1, 0), ("sum-slab", 5, 0)]
    assert [listener.count(label) for label in ("double", "alone", "sum-slab")] == [5, 1, 5]


def test_tiles_that_are_pending_are_filled_and_receipts_keep_what_the_task_says(tmp_path, runner):
    store, tiles = store_at(tmp_path / "s"), row_tiles(10, 4)
    site = Site(client=runner, listener=(listener := Counter()), threads=1)
    site.fill(store, Fill(str(store.path)), tiles[:1], "fill")
    site.fill(store, Fill(str(store.path), -1.0), tiles, "fill")
    assert listener.stages == [("fill", 1, 0), ("fill", 3, 1)]
    again = TileStore.open(store.path)
    assert not again.pending()
    np.testing.assert_array_equal(again.zarr_array()[:, 0], [*range(4), *(-i for i in range(4, 10))])
    assert {r.halvings for r in again.receipts.values()} == {1}
    assert all(r.seconds > 0 and r.peak_bytes > 0 and r.worker for r in again.receipts.values())


def test_a_task_may_commit_to_several_stores_and_they_share_its_seconds(tmp_path):
    stores = [store_at(tmp_path / "a"), store_at(tmp_path / "b")]
    task = FillBoth(*(Fill(str(s.path)) for s in stores))
    Site(threads=1).commit(lambda tile: stores, task, row_tiles(10, 4), "fill")
    assert not any(TileStore.open(s.path).pending() for s in stores)
    # two receipts of one task in two stores: each has all of its seconds; in one store, half
    twice = store_at(tmp_path / "c")
    tiles = row_tiles(10, 4)
    task = FillBoth(*(Fill(str(twice.path)) for _ in range(2)))
    Site(threads=1).commit(lambda tile: [twice, twice], task, tiles[:1], "fill")
    assert 0 < twice.receipts[0, 0].seconds < 60


def test_a_matrix_is_filled_by_its_own_index(tmp_path):
    store = TileStore.create(
        tmp_path / "m", shape=(6, 6), tile_shape=(4, 4), dtype="float64", fingerprint={}, triangle="symmetric"
    )
    Site(threads=1).fill(store, Fill(str(store.path)), list(TileGrid(6, 6, 4, 4, symmetric=True)), "fill")
    assert not store.pending()


def test_a_killed_driver_loses_no_committed_tile(tmp_path):
    store = store_at(tmp_path / "s")
    with pytest.raises(Killed):
        Site(listener=Counter(2), threads=1).fill(store, Fill(str(store.path)), row_tiles(10, 4), "fill")
    listener = Counter()
    Site(listener=listener, threads=1).fill(TileStore.open(store.path), Fill(str(store.path)), row_tiles(10, 4), "fill")
    assert listener.stages == [("fill", 3, 2)]


def test_stages_are_recorded_under_the_names_of_their_parts(tmp_path):
    record = Record.open(tmp_path, {"seed": 1})
    fold = Site(tmp_path, record=record).within("fold-0")
    assert fold.folder == tmp_path / "fold-0"
    assert fold.states == tmp_path / "fold-0" / "state"
    assert fold.once("solve", lambda: 1) == 1
    assert Site(tmp_path, record=Record.open(tmp_path, {"seed": 1})).within("fold-0").once("solve", lambda: 2) == 1
    assert Record.open(tmp_path, {"seed": 1}).stages == {"fold-0/solve": 1}


def test_a_site_without_a_folder_says_what_to_give(one_worker):
    with pytest.raises(InputError, match="give a url"):
        _ = Site(client=one_worker).states


def test_resources_are_asked_of_the_workers(one_worker, monkeypatch):
    assert Site().resources() == Resources.here()
    found = Site(client=one_worker).resources()
    assert (found.slots, found.memory_bytes) == (1, int(0.9 * 2 * 2**30))
    assert Site(client=one_worker).slots == 1


def test_at_most_so_many_slots_measure():
    class Cluster:
        def nthreads(self):
            return {f"w{i}": 1 for i in range(100)}

    assert Site(client=Cluster()).slots == 100
    assert MOST_SAMPLES == 16


class Removing(Counter):
    """Removes a folder when the first task is done."""

    def __init__(self, folder):
        super().__init__()
        self._folder = folder

    def task(self, label, done):
        super().task(label, done)
        if len(self.labels) == 1:
            shutil.rmtree(self._folder)


def test_a_folder_that_is_removed_while_it_is_written_is_named(tmp_path):
    """And nobody says that what was in it is kept."""
    store = store_at(tmp_path / "run" / "store")
    record = Record.open(tmp_path / "run", {})
    for removed in (tmp_path / "run" / "store", tmp_path / "run"):
        site = Site(tmp_path / "run" / "store", listener=Removing(removed), record=record, threads=1)
        with pytest.raises(
            StoreError, match=r"run.* was removed or moved while its results were being written"
        ) as caught:
            site.fill(store, Fill(str(store.path)), row_tiles(10, 4), "fill")
        assert "is kept" not in str(caught.value)
        store = store_at(tmp_path / "run" / "store")
