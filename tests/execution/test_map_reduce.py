"""map_tiles and reduce_tiles: every tile once, a fixed tree, failures with names, nothing finished computed twice."""

import errno
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from ntkdask import threads
from ntkdask.errors import ClusterError, DamagedTileError, InputError, StoreError, TileError
from ntkdask.execution import cluster, window
from ntkdask.execution.map_reduce import TASK_BYTES, map_tiles, reduce_tiles
from ntkdask.execution.tree import tree_children, tree_nodes
from ntkdask.execution.window import ATTEMPTS
from ntkdask.planning.tiles import Tile, row_tiles

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def two_workers():
    with cluster.connect(n_workers=2, cuda=False, worker_memory="2 GiB") as client:
        yield client


@pytest.fixture(params=["loop", "cluster"])
def client(request):
    """None for the plain loop, or a client of two workers."""
    return None if request.param == "loop" else request.getfixturevalue("two_workers")


def square(tile: Tile) -> int:
    return tile.start**2


def name(tile: int) -> str:
    return chr(ord("a") + tile)


def brackets(node, left: str, right: str) -> str:
    return f"({left}{right})"


def mark(folder: Path, text: str) -> int:
    """Note that a task ran; how often it has."""
    count = len(list(folder.glob(f"{text}.*")))
    (folder / f"{text}.{os.getpid()}.{time.time_ns()}").touch()
    return count + 1


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing happened in time")
        time.sleep(0.01)


# maps


@pytest.mark.parametrize("n", [0, 1, 50])
def test_map_covers_every_tile_once(client, n):
    received = {}
    tiles = row_tiles(n, 1)
    map_tiles(
        square, tiles, client, label="square", receive=lambda tile, done: received.setdefault(tile, []).append(done)
    )
    assert {tile: [d.value for d in done] for tile, done in received.items()} == {t: [t.start**2] for t in tiles}
    for (done,) in received.values():
        assert done.error is None
        assert done.seconds >= 0
        assert done.peak_bytes > 2**20
        assert (done.worker == "local") == (client is None)


def test_map_without_a_receiver(client, tmp_path):
    map_tiles(lambda tile: mark(tmp_path, str(tile)), range(5), client, label="mark")
    assert len(list(tmp_path.iterdir())) == 5


def test_tiles_may_be_a_generator(client):
    received = []
    map_tiles(
        abs, (i for i in range(-3, 0)), client, label="abs", receive=lambda tile, done: received.append(done.value)
    )
    assert sorted(received) == [1, 2, 3]


def test_receipts_come_as_tasks_finish(two_workers, tmp_path):
    """The first tile waits until the others are received here: receipts in the order of submission would dead-lock."""

    def task(tile: int) -> int:
        if tile == 0:
            wait_for(lambda: len(list(tmp_path.iterdir())) == 5)
        return tile

    def receive(tile: int, done) -> None:
        order.append(tile)
        (tmp_path / str(tile)).touch()

    order: list[int] = []
    map_tiles(task, range(6), two_workers, label="late", receive=receive)
    assert sorted(order) == list(range(6))
    assert order[-1] == 0


def test_both_workers_work(two_workers):
    workers = Counter()
    map_tiles(
        lambda tile: time.sleep(0.05),
        range(12),
        two_workers,
        label="nap",
        receive=lambda tile, done: workers.update([done.worker]),
    )
    assert set(workers) == set(two_workers.scheduler_info(n_workers=-1)["workers"])


def test_labels_are_what_the_dashboard_shows(two_workers):
    reduce_tiles(name, brackets, [0, 1, 2], two_workers, label="gram-slab", sum_label="gram-sum")
    reduce_tiles(name, brackets, [0, 1], two_workers, label="cntk-tile")
    assert {"gram-slab", "gram-sum", "cntk-tile", "cntk-tile-sum"} <= set(two_workers.cluster.scheduler.task_prefixes)


def test_nothing_is_held_after_a_map(two_workers):
    map_tiles(square, row_tiles(20, 1), two_workers, label="square")
    wait_for(lambda: not two_workers.cluster.scheduler.tasks)
    assert not two_workers.futures


def test_threads_of_a_task(client):
    def look(tile: int):
        import numba
        from threadpoolctl import threadpool_info

        blas = {r["num_threads"] for r in threadpool_info() if r["user_api"] == "blas"}
        return threads.current(), blas, numba.get_num_threads()

    before = threads.current()
    for n in (1, 2):
        found = []
        map_tiles(look, [0], client, label="look", threads=n, receive=lambda tile, done: found.append(done.value))  # noqa: B023
        assert found[0][:2] == (n, {n})
        assert found[0][2] <= n
    assert threads.current() == before


def pyramid(tile: tuple[int, int]) -> list[tuple[int, int]]:
    """Like a factorisation: (i, j) needs the tiles left of it in its row, and those of row j up to the diagonal."""
    i, j = tile
    return [(i, k) for k in range(j)] + [(j, k) for k in range(j + (i != j))]


def test_a_tile_starts_when_what_it_needs_is_received(client):
    tiles, received = [(i, j) for i in range(6) for j in range(i + 1)], []

    def receive(tile, done):
        assert set(pyramid(tile)) <= set(received)
        received.append(tile)

    map_tiles(str, tiles, client, label="pyramid", needs=pyramid, receive=receive)
    assert sorted(received) == sorted(tiles)


def test_among_tiles_that_may_start_the_first_does():
    received = []
    map_tiles(
        str,
        [3, 1, 2, 0],
        None,
        label="order",
        needs=lambda t: [0] if t == 3 else [],
        receive=lambda tile, done: received.append(tile),
    )
    assert received == [1, 2, 0, 3]


def test_needs_outside_the_map_count_as_received_and_circles_are_refused():
    received = []
    map_tiles(abs, [5], None, label="known", needs=lambda t: [4], receive=lambda tile, done: received.append(tile))
    assert received == [5]
    with pytest.raises(ValueError, match="2 tiles need each other, 0 among them"):
        map_tiles(abs, [0, 1, 2], None, label="circle", needs=lambda t: {0: [1], 1: [0], 2: []}[t])


def test_tiles_near_each_other_share_a_worker(two_workers):
    for _ in range(2):
        workers: dict[int, set[str]] = {0: set(), 1: set()}
        map_tiles(
            lambda t: time.sleep(0.05),
            range(8),
            two_workers,
            label="near",
            near=lambda t: t % 2,
            receive=lambda tile, done: workers[tile % 2].add(done.worker),  # noqa: B023
        )
        assert [len(w) for w in workers.values()] == [1, 1]
        assert workers[0] != workers[1]


# reductions

TREES = {
    1: "a",
    2: "(ab)",
    3: "((ab)c)",
    4: "((ab)(cd))",
    5: "(((ab)(cd))e)",
    6: "(((ab)(cd))(ef))",
    7: "(((ab)(cd))((ef)g))",
}


@pytest.mark.parametrize("n", TREES)
def test_the_tree_is_fixed(client, n):
    assert reduce_tiles(name, brackets, range(n), client, label="name") == TREES[n]


def test_sums_are_equal_bits_on_any_workers(one_worker, two_workers):
    """float32 sums whose value depends on the order, finishing in another order each time."""

    def task(tile: int) -> np.float32:
        time.sleep(0.002 * (tile * 7 % 5))
        return np.float32(1.0) / np.float32(tile + 1) ** 3

    clients = (None, two_workers, two_workers, one_worker)
    results = {reduce_tiles(task, _add, range(23), client, label="sum").tobytes() for client in clients}
    assert len(results) == 1
    values = [task(i) for i in range(23)]
    assert results != {sum(values, np.float32(0)).tobytes()}, "the order does not matter here: a weak test"


def _add(node, left, right):
    return left + right


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 64, 100])
def test_nodes_of_the_tree(n):
    nodes = tree_nodes(n)
    assert len(nodes) == len(set(nodes)) == 2 * n - 1
    below = {node: {node} for node in nodes[:n]}
    for node in nodes[n:]:
        left, right = tree_children(n, node)
        below[node] = below[left] | below[right]  # children come before their parents
        assert not below[left] & below[right]
        assert max(below[left]) < min(below[right])
    assert below[nodes[-1]] == set(nodes[:n])


def test_reduce_reports_every_new_node(client):
    received = {}
    reduce_tiles(
        name, brackets, range(5), client, label="name", receive=lambda node, done: received.update({node: done.value})
    )
    assert set(received) == set(tree_nodes(5))
    assert received[(1, 1)] == "(cd)"
    assert received[(2, 0)] == "((ab)(cd))"


def test_known_nodes_skip_what_lies_below(client):
    received = []
    total = reduce_tiles(
        name,
        brackets,
        range(7),
        client,
        label="name",
        known={(2, 0): "KNOWN", (0, 6): "G", (0, 1): "unused"},
        receive=lambda node, done: received.append(node),
    )
    assert total == "(KNOWN((ef)G))"
    assert sorted(received) == [(0, 4), (0, 5), (1, 2), (2, 1), (3, 0)]


def test_a_known_root_needs_nothing(client):
    assert reduce_tiles(name, brackets, range(4), client, label="name", known={(2, 0): "all"}) == "all"


def test_reduce_of_nothing_is_refused(client):
    with pytest.raises(ValueError, match="no tiles"):
        reduce_tiles(name, brackets, [], client, label="name")


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
    assert any("raise ZeroDivisionError" in note for note in failure.value.__cause__.__notes__)


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


def test_threads_of_a_task_without_a_number_are_those_of_its_process():
    """`featurize` names none: a worker's environment already says how many."""
    seen = []
    with threads.limited(1):
        map_tiles(
            lambda tile: threads.current(), [0], label="ambient", receive=lambda tile, done: seen.append(done.value)
        )
    assert seen == [1]
