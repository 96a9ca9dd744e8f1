"""Thread limits: set inside, put back outside, known to the task alone."""

import os
import subprocess
import sys
import threading

import numba
import pytest
from threadpoolctl import threadpool_info

from ntkdask import arrays, threads


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_outside_a_task_every_core_is_there():
    assert threads.current() == arrays.host_cores()


def test_limits_hold_inside_and_are_put_back():
    before, numba_before = blas_threads(), numba.get_num_threads()
    with threads.limited(1):
        assert threads.current() == 1
        assert blas_threads() == {1}
        assert numba.get_num_threads() == 1
        with threads.limited(2):
            assert threads.current() == 2
            assert blas_threads() == {2}
            assert numba.get_num_threads() == min(2, numba.config.NUMBA_NUM_THREADS)
        assert threads.current() == 1
        assert blas_threads() == {1}
    assert (blas_threads(), numba.get_num_threads()) == (before, numba_before)
    assert threads.current() == arrays.host_cores()


def test_limits_put_back_what_the_environment_says():
    """Numba's first start sets OpenMP's threads to its own number; a worker of Dask has OMP_NUM_THREADS=1 and keeps it."""
    pytest.importorskip("torch")
    program = """
import torch  # loads the OpenMP which Numba uses, too
from threadpoolctl import threadpool_info
from ntkdask import threads

of_openmp = lambda: {p["filepath"]: p["num_threads"] for p in threadpool_info() if p["user_api"] == "openmp"}
before = of_openmp()
assert set(before.values()) == {1}, before
with threads.limited(1):
    pass
assert before.items() <= of_openmp().items(), of_openmp()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": "omp"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_limits_are_put_back_after_an_error():
    before = blas_threads()
    with pytest.raises(KeyError), threads.limited(1):
        raise KeyError
    assert blas_threads() == before
    assert threads.current() == arrays.host_cores()


def test_more_threads_than_numba_has_are_allowed():
    with threads.limited(10_000):
        assert threads.current() == 10_000
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS


def test_other_threads_do_not_see_the_limit():
    seen = []
    with threads.limited(1):
        other = threading.Thread(target=lambda: seen.append(threads.current()))
        other.start()
        other.join()
    assert seen == [arrays.host_cores()]


def test_blas_is_named():
    assert any(name in threads.blas_name().lower() for name in ("openblas", "mkl", "blis", "flexiblas"))
