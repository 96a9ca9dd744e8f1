"""map_tiles and reduce_tiles: the only place that schedules, over a Dask client or a plain loop.

Tasks carry addresses, not data: a task is a small picklable object that holds urls of stores and is called with a tile. The loop is a
rolling window of futures, each released as it finishes: after a worker's death the tasks in flight are repeated and no others.
Labels are the words of the mathematics; the Dask dashboard shows them.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
import traceback
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from uuid import uuid4

import cloudpickle

from ntkdask import threads
from ntkdask.errors import ClusterError, NtkdaskError, TileError
from ntkdask.execution.tree import Node, Tree

T = TypeVar("T")

ATTEMPTS = 3
"""Attempts at a task that fails with an error of the operating system, which may pass; other errors are final at once."""
TASK_BYTES = 2**20
"""Largest size of a pickled task; a larger one carries data."""
PATIENCE_SECONDS = 60.0
"""How long a cluster may be without workers before a run gives up: a nanny restarts a dead one within seconds."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """A finished task.

    Parameters
    ----------
    value : T
        What the task returned.
    seconds : float
        How long it took.
    peak_bytes : int
        The highest resident memory that its process ever held.
    worker : str
        Address of the worker, or "local".
    error : Exception or None
        The error that it raised.
    """

    value: T
    seconds: float
    peak_bytes: int
    worker: str
    error: Exception | None = None


@dataclass(frozen=True)
class _Item:
    key: Hashable
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    label: str
    near: int | None = None
    order: int = 0


def peak_bytes() -> int:
    """Highest resident memory this process ever held, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # not ru_maxrss: on Linux it survives exec, so a worker would report its parent's peak
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _call(call: Callable[..., Any], arguments: tuple[Any, ...], n_threads: int | None) -> Done:
    """Run one task with `n_threads`, on a worker or here. An error is returned, not raised: the driver reports it."""
    started, value, failed = time.perf_counter(), None, None
    try:
        with threads.limited(n_threads or threads.ambient()):
            value = call(*arguments)
    except Exception as error:
        failed = _portable(error)
    return Done(value, time.perf_counter() - started, peak_bytes(), _worker_address(), failed)


def _portable(error: Exception) -> Exception:
    """`error` with its traceback as a note, since tracebacks are not pickled; a RuntimeError of its text if it cannot be pickled."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error.with_traceback(None)


def _worker_address() -> str:
    worker = sys.modules.get("distributed.worker")
    if worker is None:
        return "local"
    try:
        return str(worker.get_worker().address)
    except ValueError:  # not inside a task
        return "local"


def _failure(item: _Item, error: BaseException, worker: str) -> BaseException:
    """The error to raise for a failed task: errors of this package as they are, others as a TileError."""
    where = f"{item.label}: {item.key}" + (f" on {worker}" if worker else "")
    if isinstance(error, NtkdaskError):
        error.add_note(f"in {where}")
        return error
    advice = ""
    if type(error).__name__ == "KilledWorker":
        advice = " Its workers died, most likely out of memory: give them more, or a smaller Plan.memory_bytes."
    elif isinstance(error, MemoryError):
        advice = " Use a smaller Plan.memory_bytes."
    elif type(error).__name__ in ("CancelledError", "FutureCancelledError", "CommClosedError"):
        return ClusterError(
            f"the connection to the scheduler was lost during {where}. Everything committed is kept: run again."
        )
    failure = TileError(
        f"{where} failed: {type(error).__name__}: {error}.{advice} Everything committed is kept: run again to resume."
    )
    failure.__cause__ = error
    return failure


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, NtkdaskError)


def _run(ready: deque[_Item], done: Callable[[_Item, Done], None], client: Any, n_threads: int | None) -> None:
    """Run the items of `ready`, to which `done` may add, until it is empty and nothing is in flight.

    When a task fails, those in flight finish and are passed to `done` first, so that nothing computed is lost.
    """
    runner = _run_loop if client is None else _run_client
    runner(ready, done, client, n_threads)


def _run_loop(ready: deque[_Item], done: Callable[[_Item, Done], None], client: None, n_threads: int | None) -> None:
    while ready:
        item = ready.popleft()
        for attempt in range(1, ATTEMPTS + 1):
            result = _call(item.call, item.arguments, n_threads)
            if result.error is None:
                break
            if attempt == ATTEMPTS or not _may_pass(result.error):
                raise _failure(item, result.error, "")
        done(item, result)


def _run_client(ready: deque[_Item], done: Callable[[_Item, Done], None], client: Any, n_threads: int | None) -> None:
    run = _ClientRun(client, n_threads)
    failure: BaseException | None = None
    suspects: deque[_Item] = deque()
    try:
        while run.flying or (suspects and not isinstance(failure, ClusterError)) or (ready and failure is None):
            while ready and failure is None and run.has_room():
                run.submit(ready.popleft())
            if not run.flying:
                run.submit(suspects.popleft(), alone=True)
            item, attempt, alone, result, error = run.next()
            if error is None:
                done(item, cast(Done, result))
            elif type(error).__name__ == "KilledWorker" and not alone:
                # Dask blames every task that was on a worker when it died. Each is run again alone: only the cause dies again
                suspects.append(item)
            elif failure is not None:
                continue
            elif attempt < ATTEMPTS and _may_pass(error):
                run.submit(item, attempt + 1, alone)
            else:
                failure = _failure(item, error, result.worker if result else "")
    finally:
        run.close()
    if failure is not None:
        raise failure


class _ClientRun:
    """The futures of one map that are in flight; each is released as it finishes."""

    def __init__(self, client: Any, n_threads: int | None) -> None:
        from distributed import as_completed

        self.flying: dict[Any, tuple[_Item, int, bool]] = {}
        self._client, self._n_threads = client, n_threads
        self._run, self._counter = uuid4().hex, 0
        self._finished = as_completed(loop=client.loop, raise_errors=False)
        self._watch = _Watch(client, self.flying)

    def has_room(self) -> bool:
        """Whether fewer than two tasks a slot are in flight: a worker that finishes one has its next task already."""
        return len(self.flying) < 2 * sum(self._client.nthreads().values()) + 2

    def submit(self, item: _Item, attempt: int = 1, alone: bool = False) -> None:
        """Send an item to the cluster under a fresh key, whose prefix is the label that the dashboard shows."""
        self._counter += 1
        key = (f"{item.label}-{self._run}", self._counter)
        where: dict[str, Any] = {}
        if item.near is not None:
            workers = sorted(self._client.nthreads())
            # a preference, not a restriction: that worker has cached what the task reads
            where = {"workers": workers[item.near % len(workers)], "allow_other_workers": True} if workers else {}
        future = self._client.submit(_call, item.call, item.arguments, self._n_threads, key=key, pure=False, **where)
        self.flying[future] = (item, attempt, alone)
        self._finished.add(future)

    def next(self) -> tuple[_Item, int, bool, Done | None, BaseException | None]:
        """Wait for a task to finish: (item, attempt, alone, its result or None, its error or None)."""
        future = next(self._finished)
        item, attempt, alone = self.flying.pop(future)
        result, error = _outcome(future)
        if self._watch.lost:
            error = ClusterError(
                f"the cluster has had no workers for {PATIENCE_SECONDS:g} s. "
                "Start some and run again: everything committed is kept."
            )
        future.release()
        return item, attempt, alone, result, error

    def close(self) -> None:
        """Cancel what is still in flight."""
        self._watch.stop()
        for future in self.flying:
            future.cancel()


class _Watch:
    """A thread that cancels what is in flight when the cluster has had no workers for PATIENCE_SECONDS."""

    def __init__(self, client: Any, flying: Mapping[Any, Any]) -> None:
        self.lost = False
        self._client, self._flying, self._ended = client, flying, threading.Event()
        self._thread = threading.Thread(target=self._run, name="ntkdask-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        empty_since = None
        while not self._ended.wait(PATIENCE_SECONDS / 10):
            try:
                empty = not self._client.nthreads()
            except Exception:  # the connection is gone: the futures end by themselves
                return
            now = time.monotonic()
            empty_since = (empty_since or now) if empty else None
            if empty_since is not None and now - empty_since > PATIENCE_SECONDS:
                self.lost = True
                self._client.cancel(list(self._flying), force=True)
                return


def _outcome(future: Any) -> tuple[Done | None, BaseException | None]:
    """(result, error) of a finished future."""
    if future.status == "cancelled":
        return None, ClusterError("the scheduler cancelled a task; everything committed is kept: run again to resume.")
    if future.status == "error":
        return None, future.exception()
    result = future.result()
    return result, result.error


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
    items = [_Item(tile, task, (tile,), label, None if near is None else near(tile), i) for i, tile in enumerate(tiles)]
    ready: deque[_Item] = deque()
    waiting: dict[Hashable, set[Hashable]] = {}
    feeds: dict[Hashable, list[_Item]] = defaultdict(list)
    known = {item.key for item in items}
    for item in items:
        missing = known.intersection(needs(item.key)) if needs is not None else set()
        if not missing:
            ready.append(item)
            continue
        waiting[item.key] = missing
        for other in missing:
            feeds[other].append(item)

    def done(item: _Item, result: Done) -> None:
        if receive is not None:
            receive(item.key, result)
        for fed in feeds.pop(item.key, []):
            waiting[fed.key].discard(item.key)
            if not waiting[fed.key]:
                del waiting[fed.key]
                insort(ready, fed, key=lambda i: i.order)

    _run(ready, done, client, threads)
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
        Gives the value of a node = (level, index) from those of its children. Level 0 are the tiles; an odd node passes upwards
        unchanged.
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
    ready: deque[_Item] = deque()
    waiting: dict[Node, tuple[Node, Node]] = {}
    stack = [tree.root]
    while stack:
        node = stack.pop()
        if node in values or node in waiting:
            continue
        if node[0] == 0:
            ready.append(_Item(node, task, (tiles[node[1]],), label))
        else:
            waiting[node] = tree.children(node)
            stack += reversed(waiting[node])
    sums = sum_label or f"{label}-sum"

    def release_ready() -> None:
        for node in [n for n, children in waiting.items() if all(c in values for c in children)]:
            left, right = waiting.pop(node)
            # combine before computing tiles: a combined pair frees two stored partial sums
            ready.appendleft(_Item(node, combine, (node, values[left], values[right]), sums))

    def done(item: _Item, result: Done) -> None:
        node: Node = item.key  # type: ignore[assignment]
        values[node] = result.value
        if receive is not None:
            receive(node, result)
        release_ready()

    release_ready()
    _run(ready, done, client, threads)
    return values[tree.root]
