"""Failures of tiles: named with their cause, tried again or not; dead workers and lost clusters."""

import errno
import os
import re
import signal
import sys
import time
from collections import Counter

import cloudpickle
import numpy as np
import pytest
from task_examples import brackets, mark, name, square, wait_for

from ntkdask.errors import ClusterError, DamagedTileError, InputError, StoreError, TileError
from ntkdask.execution import cluster, window
from ntkdask.execution.map_reduce import TASK_BYTES, map_tiles, reduce_tiles
from ntkdask.execution.tree import tree_nodes
from ntkdask.execution.window import ATTEMPTS
from ntkdask.planning.tiles import Tile, row_tiles

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def two_workers():
    """Of this file alone: its last tests kill them."""
    with cluster.connect(n_workers=2, cuda=False, worker_memory="2 GiB") as client:
        yield client


@pytest.fixture(params=["loop", "cluster"])
def client(request):
    """None for the plain loop, or a client of two workers."""
    return None if request.param == "loop" else request.getfixturevalue("two_workers")


# failures


def test_a_failure_names_the_tile_and_the_cause(client):
    def task(tile: Tile) -> int:
        if tile.start == 30:
            raise ZeroDivisionError("the mathematics")
        return 0

    with pytest.raises(
        TileError, match=r"bad-tile: tile \(3,\) \(rows 30:40\).* ZeroDivisionError: the mathematics"
    ) as failure:
        map_tiles(task, row_tiles(60, 10), client, label="bad-tile")
    assert failure.value.exit_code == 1
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    # the line of the task by its number: its text is only there where a process still has the source
    notes = "".join(failure.value.__cause__.__notes__)
    assert re.search(r"line \d+, in task\b", notes)
    assert "ZeroDivisionError: the mathematics" in notes


def test_a_failing_combination_names_its_node(client):
    def combine(node, left, right):
        raise KeyError(node)

    with pytest.raises(TileError, match=r"gram-sum: \(1, 0\).* failed: KeyError"):
        reduce_tiles(name, combine, range(2), client, label="gram-slab", sum_label="gram-sum")


@pytest.mark.parametrize("kind", [InputError, DamagedTileError, StoreError])
def test_errors_of_the_package_pass_through(client, kind):
    def task(tile: int) -> None:
        raise kind("rows 3, 8 hold NaN")

    with pytest.raises(kind, match="rows 3, 8 hold NaN") as failure:
        map_tiles(task, [5], client, label="nan")
    assert failure.type is kind
    assert failure.value.exit_code == kind.exit_code
    assert any("in nan: 5" in note for note in failure.value.__notes__)


def test_errors_that_cannot_travel_still_arrive(client):
    class Secretive(Exception):
        def __reduce__(self):
            raise TypeError("no")

    def task(tile: int) -> None:
        raise Secretive("of its own kind")

    with pytest.raises(TileError, match="Secretive: of its own kind"):
        map_tiles(task, [0], client, label="shy")


def test_an_out_of_memory_task_gets_advice(client):
    def task(tile: int) -> None:
        raise MemoryError("Unable to allocate 1 TiB")

    with pytest.raises(TileError, match=r"smaller Plan\.memory_bytes"):
        map_tiles(task, [0], client, label="large")


@pytest.mark.parametrize("failures", [ATTEMPTS - 1, ATTEMPTS])
def test_errors_of_the_system_are_tried_three_times(client, tmp_path, failures):
    def task(tile: int) -> int:
        if tile == 1 and mark(tmp_path, "try") <= failures:
            raise OSError(errno.EIO, "input/output error")
        return tile

    received = []

    def run() -> None:
        map_tiles(task, range(3), client, label="disk", receive=lambda tile, done: received.append(tile))

    if failures < ATTEMPTS:
        run()
        assert sorted(received) == [0, 1, 2]
    else:
        with pytest.raises(TileError, match=r"disk: 1.*input/output error"):
            run()
    assert len(list(tmp_path.glob("try.*"))) == ATTEMPTS


def test_other_errors_are_tried_once(client, tmp_path):
    def task(tile: int) -> None:
        mark(tmp_path, "try")
        raise ValueError("final")

    with pytest.raises(TileError):
        map_tiles(task, [0], client, label="final")
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_in_flight_when_a_tile_fails_is_received(two_workers, tmp_path):
    def task(tile: int) -> int:
        (tmp_path / str(tile)).touch()
        if tile == 0:
            wait_for((tmp_path / "1").exists)
            raise ValueError("first")
        if tile == 1:
            wait_for((tmp_path / "0").exists)
            time.sleep(0.5)  # the driver should hear of the failure first; if not, the test is weaker, not wrong
        return tile

    received = []
    with pytest.raises(TileError, match="first"):
        map_tiles(task, range(40), two_workers, label="flight", receive=lambda tile, done: received.append(tile))
    started = {int(p.name) for p in tmp_path.iterdir()}
    assert 1 in received
    assert set(received) == started - {0}
    assert len(started) < 40, "tiles were started long after the failure"


def test_an_error_of_the_receiver_ends_the_map(client):
    def receive(tile, done):
        raise StoreError("no space for receipts")

    with pytest.raises(StoreError, match="no space for receipts"):
        map_tiles(square, row_tiles(30, 1), client, label="square", receive=receive)
    if client is not None:
        wait_for(lambda: not client.cluster.scheduler.tasks)


def test_cancelled_tasks_say_that_nothing_is_lost(two_workers, tmp_path):
    from distributed import Future

    def task(tile: int) -> None:
        if tile:
            wait_for((tmp_path / "go").exists)

    def receive(tile, done):
        two_workers.cancel([Future(key, client=two_workers) for key in list(two_workers.futures)], force=True)

    try:
        with pytest.raises(ClusterError, match="everything committed is kept"):
            map_tiles(task, range(3), two_workers, label="cancelled", receive=receive)
    finally:
        (tmp_path / "go").touch()


def test_tasks_that_carry_data_are_refused(two_workers):
    data = np.zeros(TASK_BYTES)
    with pytest.raises(ValueError, match=r"carries data; store it"):
        map_tiles(lambda tile: data.sum(), [0], two_workers, label="heavy")
    with pytest.raises(ValueError, match=r"carries data; store it"):
        reduce_tiles(name, lambda node, left, right: data.sum(), [0], two_workers, label="heavy")
    map_tiles(lambda tile: data.sum(), [0], None, label="heavy")  # in this process it stays where it is


# deaths (last: they change the cluster)


def test_a_dead_worker_costs_what_was_in_flight(two_workers, tmp_path):
    def task(tile: int) -> str:
        times = mark(tmp_path, f"tile-{tile}")
        if tile == 9 and times == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return name(tile)

    received = []
    total = reduce_tiles(
        task, brackets, range(16), two_workers, label="death", receive=lambda node, done: received.append(node)
    )
    assert total == reduce_tiles(name, brackets, range(16), None, label="name")
    assert sorted(received) == sorted(tree_nodes(16))
    runs = Counter(int(p.name.split(".")[0].removeprefix("tile-")) for p in tmp_path.iterdir())
    assert set(runs) == set(range(16))
    assert runs[9] == 2
    # the worker that died had one slot and what the window of 6 gave it beforehand
    assert sum(runs.values()) <= 16 + 6


def test_a_task_that_always_kills_its_worker_is_named(two_workers):
    def task(tile: int) -> int:
        if tile == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return tile

    # Dask then blames tasks that waited beside the killer too: they are tried again alone, and finish
    two_workers.cluster.scheduler.allowed_failures = 1
    received = []
    with pytest.raises(
        TileError, match=r"killer: 2 failed: KilledWorker.*most likely out of memory.*run again to resume"
    ):
        map_tiles(task, range(5), two_workers, label="killer", receive=lambda tile, done: received.append(tile))
    assert sorted(received) == [0, 1, 3, 4]


def test_a_cluster_that_lost_its_workers_ends_the_run(monkeypatch):
    """Nobody would ever finish what is in flight: the run says so instead of waiting for ever."""
    from distributed import Client, LocalCluster

    monkeypatch.setattr(window, "PATIENCE_SECONDS", 0.5)
    # a scheduler without workers, as after all of them were stopped
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as empty,
        Client(empty) as alone,
        pytest.raises(ClusterError, match="no workers"),
    ):
        map_tiles(abs, [1, 2, 3], alone, label="nobody")
