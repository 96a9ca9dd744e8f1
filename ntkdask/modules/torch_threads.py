"""torch's own threads, as many as the running task may use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ntkdask import threads


@contextlib.contextmanager
def task_threads() -> Iterator[None]:
    """Run the body with `threads.current()` threads within torch's operators, and give back what there was.

    torch keeps a number of its own beside BLAS's and OpenMP's, which `threads.limited` does not reach.
    """
    before = torch.get_num_threads()
    wanted = threads.current()
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
