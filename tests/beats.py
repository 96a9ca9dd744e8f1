"""Beats of another thread while a call runs: none if the call holds the interpreter lock, as SciPy's LAPACK functions do."""

import itertools
import sys
import threading
import time

ENOUGH = 20
PACE_SECONDS = 0.001


def beats_during(call, pace=PACE_SECONDS):
    """How often another thread, which sleeps in between, had its turn while `call()` ran."""
    count, started, ended = itertools.count(), threading.Event(), threading.Event()

    def beat():
        while not ended.is_set():
            next(count)
            started.set()
            time.sleep(pace)

    thread, interval = threading.Thread(target=beat), sys.getswitchinterval()
    thread.start()
    started.wait()
    # Python code keeps the lock: only calls that let go of it count
    sys.setswitchinterval(1e6)
    try:
        before = next(count)
        call()
        return next(count) - before - 1
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()


def assert_beats(prepare, sizes, pace=PACE_SECONDS):
    """At one of the ascending sizes ENOUGH beats fall into `prepare(n)()`: a call that takes the lock has none at any.

    A call that is over too soon, or on a busy machine without a turn for the other thread, is tried again at the next size.
    """
    beats = []
    for n in sizes:
        beats.append(beats_during(prepare(n), pace))
        if beats[-1] >= ENOUGH:
            return
    raise AssertionError(f"{beats} beats at the sizes {sizes}: the call holds the interpreter lock")
