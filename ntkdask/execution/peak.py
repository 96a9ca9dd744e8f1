"""The peak of a process's resident memory while a task runs: of this task, not of what the process did before.

Linux keeps the highest resident memory of a process and sets it back on request. Tasks of one process share it: whoever sets it back
first gives the tasks that run beside it what they have seen so far. Where it cannot be set back (macOS, some sandboxes) the peak is
that of the process's whole life.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_lock = threading.Lock()
_running: set[PeakMemory] = set()
"""The measurements under way in this process; under the lock."""


class PeakMemory:
    """A context in which a task runs; `bytes` is then the peak of the process's memory meanwhile."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        with _lock:
            _note()
            # "5" sets the highest resident memory to the present one
            with contextlib.suppress(OSError):
                _RESET.write_text("5")
            _running.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            _note()
            _running.discard(self)


@dataclass
class RunPeak:
    """The highest peak of all tasks that a driver ran, those too of which no listener hears (products within a solver)."""

    bytes: int = 0


_run: ContextVar[RunPeak | None] = ContextVar("ntkdask_run_peak", default=None)


@contextlib.contextmanager
def run_peak() -> Iterator[RunPeak]:
    """A block of the driver, whose tasks tell the `RunPeak` that is yielded."""
    found = RunPeak()
    before = _run.set(found)
    try:
        yield found
    finally:
        _run.reset(before)


def tell_run(peak: int) -> None:
    """Tell the run that is under way, if there is one, the peak of a finished task."""
    found = _run.get()
    if found is not None:
        found.bytes = max(found.bytes, peak)


def _note() -> None:
    """Tell every measurement under way the peak since it was last set back."""
    now = peak_bytes()
    for measured in _running:
        measured.bytes = max(measured.bytes, now)


def peak_bytes() -> int:
    """Highest resident memory of this process since a `PeakMemory` began, or of its life, bytes."""
    if _STATUS.exists():
        # not ru_maxrss: on Linux it survives exec, so a worker would report its parent's peak
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
