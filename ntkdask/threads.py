"""Threads of BLAS, OpenMP and Numba for one task: the host's cores ÷ its task slots, set explicitly.

Dask's nanny sets one BLAS thread, which is too few for a worker with 16 cores and one slot. A library's own default is every
core, which is too many for two workers on two cores (eigh ran 10 times slower). The number is part of a run's plan, because the
bits of BLAS results depend on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import numba
from threadpoolctl import ThreadpoolController

from ntkdask.arrays import host_cores

T = TypeVar("T")
R = TypeVar("R")

_task_threads: ContextVar[int | None] = ContextVar("ntkdask_task_threads", default=None)


@functools.cache
def _controller() -> ThreadpoolController:
    """The handle on the thread pools of the libraries in this process."""
    # Scanning the loaded libraries takes about a millisecond; the set is complete once SciPy is imported.
    import scipy.linalg  # noqa: F401

    controller = ThreadpoolController()
    with controller.select(user_api="openmp").limit(limits=None):
        # Where Numba starts its threads with OpenMP, it sets OpenMP's number for the whole process, whatever OMP_NUM_THREADS says.
        numba.get_num_threads()
    return controller


def current() -> int:
    """Threads that the running task may use; every core of the host outside a task."""
    threads = _task_threads.get()
    return host_cores() if threads is None else threads


def ambient() -> int:
    """Threads that BLAS may use in this process now: `current()`, or fewer where joblib or the environment allows fewer."""
    pools = [row["num_threads"] for row in _controller().info() if row.get("user_api") == "blas"]
    return min([current(), *pools])


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """Run the body with `threads` threads in BLAS, OpenMP and Numba, whatever the environment says."""
    controller = _controller()
    token = _task_threads.set(threads)
    numba_before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    try:
        with controller.limit(limits=threads):
            yield
    finally:
        numba.set_num_threads(numba_before)
        _task_threads.reset(token)


def set_openmp(threads: int) -> None:
    """Let OpenMP use `threads` threads from now on; the end of a surrounding `limited` restores the number before that."""
    _controller().select(user_api="openmp").limit(limits=threads)


def on_threads(call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """[call(item) for item in items], as many calls at a time as the task has threads, each with one BLAS thread.

    For calls that release the GIL and whose matrices are too small for BLAS to share out.
    """
    count = min(current(), len(items))
    if count < 2:
        return [call(item) for item in items]
    with limited(1), ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, items))


def blas_name() -> str:
    """Names and versions of the BLAS libraries in this process, for plans and `doctor`."""
    rows = _controller().info()
    names = sorted(
        {
            f"{r.get('internal_api')} {r.get('version')} {r.get('architecture', '')}".strip()
            for r in rows
            if r.get("user_api") == "blas"
        }
    )
    return "; ".join(names) or "unknown"
