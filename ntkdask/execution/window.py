"""How tasks run: a rolling window of futures over a Dask client, or a plain loop; retries, and errors that say what to do.

Each future is released as it finishes: a worker's death repeats what was in flight and nothing else. Called by `map_reduce`.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast
from uuid import uuid4

import cloudpickle

from ntkdask import threads
from ntkdask.errors import ClusterError, NtkdaskError, TileError
from ntkdask.execution.peak import PeakMemory, tell_run

T = TypeVar("T")


ATTEMPTS = 3
"""Attempts at a task that fails with an error of the operating system, which may pass; other errors are final at once."""


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
        The highest resident memory of its process while it ran (`execution.peak`).
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
class Item:
    """A task to run.

    Parameters
    ----------
    key : hashable
        The tile, or the node of a reduction.
    call : callable
        The task.
    arguments : tuple
        That it is called with.
    label : str
        Prefix of its key on the cluster, which the dashboard shows.
    near : int or None
        Tasks of an equal number go to the same worker while it has room.
    order : int
        Among tasks that may start, the least goes first.
    """

    key: Hashable
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    label: str
    near: int | None = None
    order: int = 0


def _call(call: Callable[..., Any], arguments: tuple[Any, ...], n_threads: int | None) -> Done:
    """Run one task with `n_threads`, on a worker or here. An error is returned, not raised: the driver reports it."""
    started, value, failed = time.perf_counter(), None, None
    with PeakMemory() as peak:
        try:
            with threads.limited(n_threads or threads.ambient()):
                value = call(*arguments)
        except Exception as error:
            failed = _portable(error)
    return Done(value, time.perf_counter() - started, peak.bytes, _worker_address(), failed)


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


def _failure(item: Item, error: BaseException, worker: str) -> BaseException:
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


def run_items(ready: deque[Item], done: Callable[[Item, Done], None], client: Any, n_threads: int | None) -> None:
    """Run the items of `ready`, to which `done` may add, until it is empty and nothing is in flight.

    When a task fails, those in flight finish and are passed to `done` first, so that nothing computed is lost.
    """

    def told(item: Item, result: Done) -> None:
        tell_run(result.peak_bytes)
        done(item, result)

    runner = _run_loop if client is None else _run_client
    runner(ready, told, client, n_threads)


def _run_loop(ready: deque[Item], done: Callable[[Item, Done], None], client: None, n_threads: int | None) -> None:
    while ready:
        item = ready.popleft()
        for attempt in range(1, ATTEMPTS + 1):
            result = _call(item.call, item.arguments, n_threads)
            if result.error is None:
                break
            if attempt == ATTEMPTS or not _may_pass(result.error):
                raise _failure(item, result.error, "")
        done(item, result)


def _run_client(ready: deque[Item], done: Callable[[Item, Done], None], client: Any, n_threads: int | None) -> None:
    run = _ClientRun(client, n_threads)
    failure: BaseException | None = None
    suspects: deque[Item] = deque()
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

        self.flying: dict[Any, tuple[Item, int, bool]] = {}
        self._client, self._n_threads = client, n_threads
        self._run, self._counter = uuid4().hex, 0
        self._finished = as_completed(loop=client.loop, raise_errors=False)
        self._watch = _Watch(client, self.flying)

    def has_room(self) -> bool:
        """Whether fewer than two tasks a slot are in flight: a worker that finishes one has its next task already."""
        return len(self.flying) < 2 * sum(self._watch.slots.values()) + 2

    def submit(self, item: Item, attempt: int = 1, alone: bool = False) -> None:
        """Send an item to the cluster under a fresh key, whose prefix is the label that the dashboard shows."""
        self._counter += 1
        key = (f"{item.label}-{self._run}", self._counter)
        where: dict[str, Any] = {}
        if item.near is not None:
            workers = sorted(self._watch.slots)
            # a preference, not a restriction: that worker has cached what the task reads
            where = {"workers": workers[item.near % len(workers)], "allow_other_workers": True} if workers else {}
        future = self._client.submit(_call, item.call, item.arguments, self._n_threads, key=key, pure=False, **where)
        self.flying[future] = (item, attempt, alone)
        self._finished.add(future)

    def next(self) -> tuple[Item, int, bool, Done | None, BaseException | None]:
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
    """A thread that asks for the workers now and then, and cancels what is in flight after PATIENCE_SECONDS without any.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    flying : mapping
        What is in flight, by future.

    Attributes
    ----------
    slots : dict
        Task slots of each worker, by address, as last heard: to ask before every submission would cost more than the submission.
    lost : bool
        Whether it has given up.
    """

    def __init__(self, client: Any, flying: Mapping[Any, Any]) -> None:
        self.lost, self.slots = False, dict(client.nthreads())
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
                self.slots = dict(self._client.nthreads())
            except Exception:  # the connection is gone: the futures end by themselves
                return
            now = time.monotonic()
            empty_since = None if self.slots else (empty_since or now)
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
