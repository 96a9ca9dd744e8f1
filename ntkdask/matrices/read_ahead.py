"""Reading tiles one ahead of their use, so that a task that streams over a factor computes while the disk reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(read: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """read(item) for every item in order, the next one read by a thread while the caller uses this one.

    At most two results are alive here: the caller's latest and the next one. An error of `read` is raised in its turn.
    """
    if not items:
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, items[0])
        for item in items[1:]:
            here, following = following, pool.submit(read, item)
            yield here.result()
            del here
        yield following.result()
