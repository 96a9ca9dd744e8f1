"""Exact kernels against the bare product of the same rows, in one process with the same threads.

    python -m benchmarks.kernels [--rows 4000] [--features 784] [--repeats 9] [--threads 2] [--peer PYTHON]

Symmetric and rectangular NTK of ReLU networks over `x @ x.T` and `x @ y.T`, where NumPy computes half of a symmetric product
too; beside them neural-tangents, jitted, in the interpreter PYTHON. Prints the best and the median seconds and their ratios.
Every timed call follows an untimed one of its own: OpenBLAS's threads spin for some 25 ms after a product and would slow down
what comes next.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

from ntkdask import threads
from ntkdask.kernels import NTK, both
from ntkdask.networks import fully_connected


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of the second of two calls."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(label: str, product: Callable[[], object], calls: dict[str, Callable[[], object]], repeats: int) -> None:
    """Print the product's seconds and those of each call, measured in turn, with their ratios to it."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in ("product", *calls)}
    for _ in range(repeats):
        for name, call in (("product", product), *calls.items()):
            taken[name].append(seconds(call))
    bare = taken["product"]
    print(f"{label}: product best {min(bare):.4f} s, median {statistics.median(bare):.4f} s, worst {max(bare):.4f} s")
    for name in calls:
        mine = taken[name]
        ratios = sorted(a / b for a, b in zip(mine, bare, strict=True))
        print(
            f"  {name:22s} best {min(mine):.4f} s, median {statistics.median(mine):.4f} s; ratio of bests "
            f"{min(mine) / min(bare):.2f}, median ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def print_peer(python: str, arguments: argparse.Namespace, depth: int) -> None:
    """Print the seconds of neural-tangents in another interpreter, on as many threads, after everything else of this run."""
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    script = Path(__file__).with_name("_neural_tangents.py")
    sizes = [str(n) for n in (arguments.rows, arguments.features, depth, arguments.repeats)]
    command = [python, str(script), *sizes]
    answer = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    taken = [float(line) for line in answer.stdout.split()]
    print(
        f"neural-tangents, float32 symmetric, depth {depth}: best {min(taken):.4f} s, median {statistics.median(taken):.4f} s"
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--features", type=int, default=784)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=threads.current())
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that can import neural_tangents")
    a = parser.parse_args()
    print(
        f"BLAS {threads.blas_name()}, OPENBLAS_CORETYPE={os.environ.get('OPENBLAS_CORETYPE', 'unset')}, Numba {numba.__version__}, "
        f"{a.threads} threads, n = {a.rows}, d = {a.features}, load {os.getloadavg()}"
    )
    rng = np.random.default_rng(0)
    one, three = NTK(fully_connected(1)), NTK(fully_connected(3))
    with threads.limited(a.threads):
        for dtype in ("float32", "float64"):
            x, y = (rng.standard_normal((a.rows, a.features)).astype(dtype) for _ in range(2))
            calls = {
                "NTK depth 1": lambda x=x: one(x),
                "NTK depth 3": lambda x=x: three(x),
                "NNGP and NTK depth 3": lambda x=x: both(three.network)(x),
            }
            compare(f"{dtype} symmetric", lambda x=x: x @ x.T, calls, a.repeats)
            rectangular = {"NTK depth 3": lambda x=x, y=y: three(x, y)}
            compare(f"{dtype} rectangular", lambda x=x, y=y: x @ y.T, rectangular, a.repeats)
    if a.peer:
        print_peer(a.peer, a, 3)


if __name__ == "__main__":
    main()
