"""map_tiles and reduce_tiles: every tile once, in an order that needs allow, nothing finished computed twice."""

import os
import sys
import time

import cloudpickle
import pytest
from task_examples import brackets, mark, name, square, wait_for

from ntkdask import threads
from ntkdask.execution.map_reduce import map_tiles, reduce_tiles
from ntkdask.execution.tree import tree_nodes
from ntkdask.planning.tiles import row_tiles

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=["loop", "cluster"])
def client(request):
    """None for the plain loop, or a client of two workers."""
    return None if request.param == "loop" else request.getfixturevalue("two_workers")


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


def test_both_workers_work(two_workers, tmp_path):
    """Every task waits until each worker has begun one: one worker alone would dead-lock."""

    def task(tile: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)

    workers = set()
    map_tiles(task, range(12), two_workers, label="meet", receive=lambda tile, done: workers.add(done.worker))
    assert workers == set(two_workers.scheduler_info(n_workers=-1)["workers"])


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


@pytest.fixture
def no_stealing(two_workers):
    """Idle workers take no task from others, which they do when one of them is held up by something else on the machine."""
    stealing = two_workers.cluster.scheduler.extensions["stealing"]
    two_workers.sync(stealing.stop)
    yield
    two_workers.sync(stealing.start)


@pytest.mark.usefixtures("no_stealing")
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


def test_threads_of_a_task_without_a_number_are_those_of_its_process():
    """`featurize` names none: a worker's environment already says how many."""
    seen = []
    with threads.limited(1):
        map_tiles(
            lambda tile: threads.current(), [0], label="ambient", receive=lambda tile, done: seen.append(done.value)
        )
    assert seen == [1]


def test_a_submission_does_not_ask_for_the_workers(two_workers, monkeypatch):
    """That would be a round trip to the scheduler for each; they are asked for now and then."""
    asked, nthreads = [], two_workers.nthreads
    monkeypatch.setattr(two_workers, "nthreads", lambda: asked.append(1) or nthreads())
    map_tiles(square, row_tiles(40, 1), two_workers, label="square", near=lambda tile: tile.start)
    assert 1 <= len(asked) < 20
