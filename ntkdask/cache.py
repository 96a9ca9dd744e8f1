"""One byte-bounded cache per process for what many tasks share: random weights, states, opened landmarks.

Anything in it can be made again from its key, so eviction costs time and never correctness. Weights are regenerated
from their seed on each worker instead of travelling with every task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from cachetools import LRUCache

DEFAULT_BYTES = 512 * 2**20


def _nbytes(value: Any) -> int:
    """Bytes of the arrays in a value; 1024 for an object that does not tell."""
    if isinstance(value, dict):
        return sum(_nbytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(v) for v in value)
    return max(1, int(getattr(value, "nbytes", 1024)))


class ByteCache:
    """A thread-safe cache that drops what was used least recently once its values exceed `maxbytes`.

    A value larger than the bound is made and returned, not kept.
    """

    def __init__(self, maxbytes: int = DEFAULT_BYTES) -> None:
        self._lock = threading.RLock()
        self._entries: LRUCache = LRUCache(maxsize=maxbytes, getsizeof=_nbytes)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value kept under `key`, else the one that `make()` gives. Values are shared: never write to them."""
        with self._lock:
            if key in self._entries:
                return self._entries[key]
        value = make()  # outside the lock: two threads may make it twice, both get equal bits
        with self._lock:
            if _nbytes(value) <= self._entries.maxsize:
                self._entries[key] = value
        return value

    def reserve(self, nbytes: int) -> None:
        """Raise the bound to `nbytes` where it is lower, for a task that planned to keep so much between its batches."""
        with self._lock:
            if nbytes > self._entries.maxsize:
                larger: LRUCache = LRUCache(maxsize=nbytes, getsizeof=_nbytes)
                for key, value in self._entries.items():
                    larger[key] = value
                self._entries = larger

    def discard(self, is_stale: Callable[[Hashable], bool]) -> None:
        """Forget the values whose keys are stale: no task asks for them again, and they would stay until others need the bytes."""
        with self._lock:
            for key in [key for key in self._entries if is_stale(key)]:
                del self._entries[key]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()


shared = ByteCache()
"""The cache of this process."""
