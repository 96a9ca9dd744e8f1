"""The longest silence of another thread during each dense call of a task, beside the call's own length.

    python -m benchmarks.silence [--rows 4000] [--threads 1]

A worker answers its scheduler from such a thread: Dask takes one that is silent for `distributed.scheduler.worker-ttl` (300 s) for
dead and begins its task again. The other thread sleeps a millisecond at a time and notes how long it waited for its turn at most; aim:
below a second on an idle machine, whatever the length of the call. The last line is SciPy's own function, which keeps the
interpreter lock, for comparison.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg

from ntkdask import lapack, threads
from ntkdask.features.quality import gram_error
from ntkdask.solvers import cholesky, gradient_flow, preconditioners
from ntkdask.solvers.dual import DualEigh
from ntkdask.solvers.dual_cholesky import DualCholesky
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge, solve_cholesky
from ntkdask.solvers.tridiagonal import TridiagonalRidge

PACE_SECONDS = 0.001


def longest_silence(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds of the call, seconds of the longest wait of another thread for its turn)."""
    started, ended = threading.Event(), threading.Event()
    longest = [0.0]

    def listen() -> None:
        last = time.perf_counter()
        while not ended.is_set():
            started.set()
            time.sleep(PACE_SECONDS)
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now

    listener = threading.Thread(target=listen)
    listener.start()
    started.wait()
    begun = time.perf_counter()
    try:
        call()
    finally:
        seconds = time.perf_counter() - begun
        ended.set()
        listener.join()
    return seconds, longest[0]


def dense_calls(n: int) -> dict[str, Callable[[], Any]]:
    """What a task may spend its time in, by name, on n rows of a kernel or n features; arguments are made by the call's making."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, n))
    kernel, y = x @ x.T / n + np.eye(n), rng.standard_normal((n, 2))

    def sums(dtype: str = "float64") -> GramSums:
        out = GramSums.zeros(n, 2)
        out.add(x.astype(dtype), y)
        return out

    centred = [Centred.of(sums()) for _ in range(3)]
    fit = DualCholesky.factorise(kernel, y, 0.1)
    return {
        "Gram sums, float64": sums,
        "Gram sums, float32": partial(sums, "float32"),
        "ridge, eigh": partial(EighRidge.factorise, centred[0]),
        "ridge, tridiagonal": partial(TridiagonalRidge.factorise, centred[1]),
        "ridge, cholesky": partial(solve_cholesky, centred[2], 0.1),
        "kernel ridge, eigh": partial(DualEigh.factorise, kernel, y),
        "kernel ridge, cholesky": partial(DualCholesky.factorise, kernel, y, 0.1),
        "kernel ridge, scores": fit.scores,
        "tiled Cholesky, one tile": partial(cholesky.factor_lower, kernel.copy()),
        "tiled Cholesky, lost pivot": partial(cholesky.smallest_eigenvalue, kernel),
        "preconditioner": lambda: preconditioners.LowRankPreconditioner.of(x[:, : n // 4]),
        "pivoted Cholesky": partial(preconditioners.pivoted_cholesky, kernel, n // 4),
        "gradient flow": partial(gradient_flow._eigh, kernel.copy()),
        "spectrum": lambda: lapack.eigvalsh(kernel.copy(order="F")),
        "errors of features": partial(gram_error, kernel, kernel),
        "SciPy's eigh (not used)": lambda: scipy.linalg.eigh(kernel, driver="evd"),
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=threads.current())
    a = parser.parse_args()
    print(f"{threads.blas_name()}, {a.threads} threads, load {os.getloadavg()}, {a.rows} rows, float64")
    print("| call | seconds | longest silence s |\n|---|---|---|")
    with threads.limited(a.threads):
        for name, call in dense_calls(a.rows).items():
            seconds, silence = longest_silence(call)
            print(f"| {name} | {seconds:.2f} | {silence:.3f} |", flush=True)


if __name__ == "__main__":
    main()
