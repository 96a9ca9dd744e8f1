"""Gram accumulation against a bare SYRK of the same shapes, threads and process; rates counted as n·m² flops.

    python -m benchmarks.gram [--rows 16384] [--components 4096] [--threads 1 2] [--repeats 5]

Both sides walk the same float32 feature batches. SYRK overwrites one float32 triangle and forgets the others; accumulation
also adds every product to float64 sums, and ΦᵀY, Φᵀ1, ‖Y‖² beside it. Prints the median ratio of pairs measured in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
from scipy.linalg.blas import ssyrk

from ntkdask import threads
from ntkdask.solvers.gram import GramSums


def seconds(call) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(n: int, m: int, k: int, n_threads: int, repeats: int, batch: int = 4096) -> None:
    """Print rates and the ratio for one number of threads."""
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((batch, m), dtype=np.float32)
    y = rng.standard_normal((batch, k))
    c = np.zeros((m, m), np.float32, order="F")
    batches = max(1, n // batch)

    def bare() -> None:
        for _ in range(batches):
            ssyrk(1.0, phi.T, beta=0.0, c=c, overwrite_c=1, lower=1)

    def ours() -> None:
        sums = GramSums.zeros(m, k)
        for _ in range(batches):
            sums.add(phi, y, None, c)

    with threads.limited(n_threads):
        bare(), ours()
        pairs = [(seconds(bare), seconds(ours)) for _ in range(repeats)]
    flops = batches * batch * m * m / 1e9
    floor, mine = (statistics.median(flops / p[i] for p in pairs) for i in (0, 1))
    ratios = sorted(p[0] / p[1] for p in pairs)
    print(
        f"{n_threads} threads, {batches * batch} x {m}: SYRK {floor:6.1f} G/s, accumulation {mine:6.1f} G/s, "
        f"ratio {statistics.median(ratios):.3f} (of {repeats}: {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--components", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, threads.current()}))
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    print(
        f"BLAS {threads.blas_name()}, OPENBLAS_CORETYPE={os.environ.get('OPENBLAS_CORETYPE', 'unset')}, load {os.getloadavg()}"
    )
    for n_threads in a.threads:
        for m in a.components:
            compare(a.rows, m, a.targets, n_threads, a.repeats)


if __name__ == "__main__":
    main()
