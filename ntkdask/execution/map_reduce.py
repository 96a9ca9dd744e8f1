"""map_tiles and reduce_tiles: the only place that schedules, over a Dask client or a plain loop.

Tasks carry addresses, not data: a task is a small picklable object that holds urls of stores and is called with a tile. The loop is a
rolling window of futures, each released as it finishes: after a worker's death the tasks in flight are repeated and no others.
Labels are the words of the mathematics; the Dask dashboard shows them.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import cloudpickle

from ntkdask.execution.tree import Node, Tree
from ntkdask.execution.window import Done, Item, T, run_items

TASK_BYTES = 2**20
"""Largest size of a pickled task; a larger one carries data."""


def _check_size(task: Any) -> None:
    """ValueError for a task that carries data, which would be sent with every tile."""
    size = len(cloudpickle.dumps(task))
    if size > TASK_BYTES:
        raise ValueError(f"a task of {size} bytes carries data; store it (states.save_state) and carry its url")


def map_tiles(
    task: Callable[[Any], T],
    tiles: Iterable[Any],
    client: Any = None,
    *,
    label: str,
    receive: Callable[[Any, Done[T]], None] | None = None,
    threads: int | None = None,
    needs: Callable[[Any], Iterable[Any]] | None = None,
    near: Callable[[Any], int] | None = None,
) -> None:
    """Call `task(tile)` for every tile, on the cluster or in this process.

    Parameters
    ----------
    task : function of a tile
        Picklable and below 1 MiB: it carries addresses, not data.
    tiles : iterable
        Hashable and distinct. Among tiles that may start, the first in this order does.
    client : distributed.Client or None
        The cluster. None: a loop in this process.
    label : str
        Name of the stage in the dashboard and in errors.
    receive : function of (tile, Done), or None
        Called here in order of completion; it records receipts.
    threads : int or None
        BLAS, OpenMP and Numba threads of each task. None: as they are.
    needs : function of a tile, or None
        The tiles that must have been received before this one starts; those that are not among `tiles` count as received.
    near : function of a tile, or None
        An integer. Tiles with equal ones go to the same worker while it has room, for tasks that cache what they read.

    Raises
    ------
    TileError
        Names the tile of a task that failed; errors of this package are raised themselves, with the tile in a note. Errors of the
        operating system are tried three times first. Tasks in flight finish before the error is raised.
    """
    if client is not None:
        _check_size(task)
    items = [Item(tile, task, (tile,), label, None if near is None else near(tile), i) for i, tile in enumerate(tiles)]
    ready: deque[Item] = deque()
    waiting: dict[Hashable, set[Hashable]] = {}
    feeds: dict[Hashable, list[Item]] = defaultdict(list)
    known = {item.key for item in items}
    for item in items:
        missing = known.intersection(needs(item.key)) if needs is not None else set()
        if not missing:
            ready.append(item)
            continue
        waiting[item.key] = missing
        for other in missing:
            feeds[other].append(item)

    def done(item: Item, result: Done) -> None:
        if receive is not None:
            receive(item.key, result)
        for fed in feeds.pop(item.key, []):
            waiting[fed.key].discard(item.key)
            if not waiting[fed.key]:
                del waiting[fed.key]
                insort(ready, fed, key=lambda i: i.order)

    run_items(ready, done, client, threads)
    if waiting:
        raise ValueError(f"map_tiles: {len(waiting)} tiles need each other, {next(iter(waiting))!r} among them")


def reduce_tiles(
    task: Callable[[Any], T],
    combine: Callable[[Node, T, T], T],
    tiles: Sequence[Any],
    client: Any = None,
    *,
    label: str,
    sum_label: str | None = None,
    known: Mapping[Node, T] | None = None,
    receive: Callable[[Node, Done[T]], None] | None = None,
    threads: int | None = None,
) -> T:
    """Map `task` over the tiles and combine the results in a fixed binary tree over the tile index.

    Which pairs are combined depends on the number of tiles alone, so equal plans give equal bits on any number of workers.

    Parameters
    ----------
    task : function of a tile
        Gives a small value: an address, a receipt, a few moments. Picklable and below 1 MiB, as `combine` is.
    combine : function of (node, left, right)
        Gives the value of node (level, index) from those of its children; level 0 are the tiles, an odd node passes upwards unchanged.
    tiles : sequence
        At least one.
    client, label, threads
        As in `map_tiles`.
    sum_label : str or None
        Name of the combining tasks. None: `label`-sum.
    known : mapping or None
        Values of nodes from an earlier run; nothing below them is computed.
    receive : function of (node, Done), or None
        Called here for every new node.

    Returns
    -------
    T
        The value of the root.

    Raises
    ------
    TileError
        As in `map_tiles`.
    """
    if not tiles:
        raise ValueError("reduce_tiles: no tiles")
    if client is not None:
        _check_size(task)
        _check_size(combine)
    tree = Tree(len(tiles))
    values: dict[Node, T] = dict(known or {})
    ready: deque[Item] = deque()
    waiting: dict[Node, tuple[Node, Node]] = {}
    stack = [tree.root]
    while stack:
        node = stack.pop()
        if node in values or node in waiting:
            continue
        if node[0] == 0:
            ready.append(Item(node, task, (tiles[node[1]],), label))
        else:
            waiting[node] = tree.children(node)
            stack += reversed(waiting[node])
    sums = sum_label or f"{label}-sum"

    def release_ready() -> None:
        for node in [n for n, children in waiting.items() if all(c in values for c in children)]:
            left, right = waiting.pop(node)
            # combine before computing tiles: a combined pair frees two stored partial sums
            ready.appendleft(Item(node, combine, (node, values[left], values[right]), sums))

    def done(item: Item, result: Done) -> None:
        node: Node = item.key  # type: ignore[assignment]
        values[node] = result.value
        if receive is not None:
            receive(node, result)
        release_ready()

    release_ready()
    run_items(ready, done, client, threads)
    return values[tree.root]
