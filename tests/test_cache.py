"""The byte-bounded cache."""

import threading

import numpy as np
import pytest

from ntkdask.cache import ByteCache, shared


def test_made_once_while_it_is_kept():
    cache, made = ByteCache(1000), []

    def make():
        made.append(1)
        return np.zeros(10)

    first = cache.get("a", make)
    assert cache.get("a", make) is first
    assert len(made) == 1
    cache.clear()
    assert cache.get("a", make) is not first
    assert len(made) == 2


def test_least_recently_used_goes_first():
    cache, made = ByteCache(250), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or np.zeros(100, np.uint8))

    for key in "abacab":  # c drives b out, then b drives c out: a was used in between
        get(key)
    assert made == ["a", "b", "c", "b"]


def test_bound_holds_bytes_not_entries():
    cache = ByteCache(1000)
    for i in range(50):
        cache.get(i, lambda: np.zeros(300, np.uint8))
        assert cache._entries.currsize <= 1000
    assert len(cache._entries) == 3


def test_a_value_larger_than_the_bound_is_returned_but_not_kept():
    cache = ByteCache(100)
    small = cache.get("small", lambda: np.zeros(50, np.uint8))
    assert cache.get("large", lambda: np.ones(101, np.uint8)).sum() == 101
    assert len(cache._entries) == 1
    assert cache.get("small", lambda: None) is small


def test_nested_values_count_all_their_arrays():
    cache = ByteCache(10_000)
    cache.get("nested", lambda: {"a": np.zeros(10), "b": (np.zeros(5), [np.zeros(1)])})
    assert cache._entries.currsize == 8 * 16
    cache.get("unknown", object)
    assert cache._entries.currsize == 8 * 16 + 1024


def test_threads_get_equal_values():
    cache, barrier, results = ByteCache(10_000), threading.Barrier(4), []

    def work():
        barrier.wait()
        for key in range(20):
            results.append((key, cache.get(key, lambda key=key: np.full(3, key)).sum()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(total == 3 * key for key, total in results)


def test_a_failed_make_leaves_nothing():
    cache = ByteCache(100)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert cache.get("a", lambda: 5) == 5


def test_there_is_one_for_the_process():
    assert isinstance(shared, ByteCache)


def test_discard_forgets_what_is_stale():
    cache = ByteCache(1000)
    for key in (("tile", "a", 0), ("tile", "b", 0), "other"):
        cache.get(key, lambda: np.zeros(10))
    cache.discard(lambda key: isinstance(key, tuple) and key[1] == "a")
    made = []
    for key in (("tile", "a", 0), ("tile", "b", 0), "other"):
        cache.get(key, lambda key=key: made.append(key))
    assert made == [("tile", "a", 0)]
