"""torch's own threads, as many as the running task may use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from ntkdask import threads


@contextlib.contextmanager
def task_threads() -> Iterator[None]:
    """Run the body with `threads.current()` threads within torch's operators, and give back what there was.

    torch speaks to OpenMP and to MKL, and reports OpenMP's number alone. `threads.limited` reaches OpenMP where it knows torch's copy
    of it, and never MKL: so the number is always set, and both are given back.
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
