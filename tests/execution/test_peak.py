"""The peak memory of a task is its own: not what its process held before, and all of what it held itself."""

import sys

import cloudpickle
import numpy as np
import pytest

from ntkdask.execution.map_reduce import map_tiles
from ntkdask.execution.peak import _RESET, PeakMemory, peak_bytes, run_peak

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 2**20


def _resets():
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _resets(), reason="this system does not set the peak of a process back")


def touch(mebibytes: int) -> int:
    """Hold so much memory for a moment; large arrays go back to the system at once."""
    return int(np.ones(mebibytes * MIB, np.uint8)[-1])


def peaks(client, sizes):
    found = {}
    map_tiles(touch, sizes, client, label="touch", receive=lambda size, done: found.update({size: done.peak_bytes}))
    return found


def test_a_task_is_not_charged_for_what_was_before():
    touch(128)
    before = peak_bytes()
    found = peaks(None, [1])
    assert found[1] < before - 64 * MIB


def test_what_a_task_holds_counts():
    small, large = (peaks(None, [size])[size] for size in (1, 129))
    assert 96 * MIB < large - small < 160 * MIB


def test_tasks_side_by_side_in_one_process():
    with PeakMemory() as first:
        touch(128)
        with PeakMemory() as second:
            touch(1)
    with PeakMemory() as third:
        touch(1)
    assert first.bytes - third.bytes > 96 * MIB
    assert second.bytes - third.bytes < 32 * MIB


def test_a_run_counts_tasks_that_no_listener_hears_of():
    with run_peak() as run:
        found = peaks(None, [1, 2])
        assert run.bytes == max(found.values())
        peaks(None, [128])
    assert run.bytes > max(found.values()) + 96 * MIB
    with run_peak() as nothing:
        pass
    assert nothing.bytes == 0


def test_a_run_on_a_worker_that_held_more_before(one_worker):
    earlier = peaks(one_worker, [256])[256]
    assert peaks(one_worker, [1])[1] < earlier - 128 * MIB
