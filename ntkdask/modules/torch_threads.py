"""The number of threads of torch's operators: as many as the running task may use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from ntkdask import threads


@contextlib.contextmanager
def task_threads() -> Iterator[None]:
    """A context in which torch's operators use `threads.current()` threads; afterwards the numbers are as before.

    torch sets the threads of OpenMP and of MKL, and reports those of OpenMP alone. `threads.limited` reaches OpenMP where it knows
    torch's copy of the library, and never MKL. So both numbers are set here, and both restored.
    """
    openmp = torch.get_num_threads()
    mkl = mkl_threads()
    torch.set_num_threads(threads.current())
    try:
        yield
    finally:
        torch.set_num_threads(openmp if mkl is None else mkl)
        if mkl not in (None, openmp):
            threads.set_openmp(openmp)


def mkl_threads() -> int | None:
    """Threads that MKL has in this process now; None for a torch without it, or one that does not tell."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else None
