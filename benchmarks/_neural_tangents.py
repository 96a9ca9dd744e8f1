"""Seconds of neural-tangents' jitted symmetric NTK, one a line: the peer of `kernels.py`, in an interpreter of its own.

It wants jax 0.4.28 with NumPy 1.26, which the package's own environment does not have. Run by `kernels.py --peer PYTHON`.
"""

import sys
import time

import jax
import numpy as np
from neural_tangents import stax


def main() -> None:
    """Arguments: rows, features, depth, repeats."""
    rows, features, depth, repeats = map(int, sys.argv[1:])
    x = np.random.default_rng(0).standard_normal((rows, features)).astype("float32")
    layers = [layer for _ in range(depth) for layer in (stax.Dense(1, W_std=2**0.5), stax.Relu())]
    kernel = stax.serial(*layers, stax.Dense(1))[2]
    jitted = jax.jit(lambda rows: kernel(rows, None, "ntk"))
    jitted(x).block_until_ready()
    for _ in range(repeats):
        started = time.perf_counter()
        jitted(x).block_until_ready()
        print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
