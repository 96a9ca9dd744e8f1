"""neural-tangents, jitted: the peer of `kernels.py` and `convolutional.py`, in an interpreter of its own.

It wants jax 0.4.28 with NumPy 1.26, which the package's own environment does not have. How such an environment is made:

    python3.11 -m venv peer
    peer/bin/pip install jax==0.4.28 jaxlib==0.4.28 numpy==1.26.4 scipy==1.12.0 ml_dtypes==0.4.1 neural-tangents==0.6.5

and then take the line `from . import experimental` out of neural_tangents/__init__.py, which wants a jax that is no longer there.
Run by the two scripts with `--peer PYTHON`. Rows are ⟨x, z⟩/d, so networks are those of `scale_inputs=True` (MATH.md §1).
"""

from __future__ import annotations

import json
import sys
import time

import jax
import neural_tangents
import numpy as np
from neural_tangents import stax

ROOT2 = 2**0.5
TRIALS = 2
"""Timed calls by which the sizes of batches are compared."""


def rows_seconds(rows: int, features: int, depth: int, repeats: int) -> None:
    """Print the seconds of a symmetric fully connected NTK, float32, one a line."""
    x = np.random.default_rng(0).standard_normal((rows, features)).astype("float32")
    layers = [layer for _ in range(depth) for layer in (stax.Dense(1, W_std=2**0.5), stax.Relu())]
    kernel = stax.serial(*layers, stax.Dense(1))[2]
    jitted = jax.jit(lambda rows: kernel(rows, None, "ntk"))
    jitted(x).block_until_ready()
    for _ in range(repeats):
        print(_timed(jitted, x))


def images(request: dict) -> dict:
    """Seconds a pair and matrices of the NTK of images, weights of variance 2 and plain ReLU, no biases.

    request: layers, a list of names and a number each ("conv" filter, "relu", "avgpool" window, "gap", "flatten", "dense");
    pairs, files of NumPy arrays (2, n, H, W, C): x and y; batches, the numbers of rows of x and of y to try, ascending;
    repeats; limit_seconds: no batch whose call is predicted to take longer is tried. Times are of the first file's images.
    Returns batch, the fastest; seconds_per_pair, a list; tried, {batch: seconds a pair}; compile_seconds; matrices, of the first
    request["compared"] rows of each file.
    """
    kernel = stax.serial(*(_layer(name, size) for name, size in request["layers"]))[2]
    jitted = jax.jit(lambda x, y: kernel(x, y, "ntk"))
    x, y = np.load(request["pairs"][0])
    tried: dict[int, float] = {}
    compiling: dict[int, float] = {}
    for batch in request["batches"]:
        if tried:
            last = max(tried)
            if tried[last] * batch**2 > request["limit_seconds"]:
                break
        compiling[batch] = _timed(jitted, x[:batch], y[:batch])
        tried[batch] = min(_timed(jitted, x[:batch], y[:batch]) for _ in range(TRIALS)) / batch**2
    best = min(tried, key=tried.__getitem__)
    seconds = [_timed(jitted, x[:best], y[:best]) / best**2 for _ in range(request["repeats"])]
    few = request["compared"]
    matrices = [np.asarray(jitted(*(side[:few] for side in np.load(path)))).tolist() for path in request["pairs"]]
    return {
        "batch": best,
        "seconds_per_pair": seconds,
        "tried": tried,
        "compile_seconds": compiling[best],
        "matrices": matrices,
        "versions": f"neural-tangents {neural_tangents.__version__}, jax {jax.__version__}",
    }


def _layer(name: str, size: int) -> tuple:
    made = {
        "conv": lambda: stax.Conv(1, (size, size), padding="SAME", W_std=ROOT2, b_std=None),
        "relu": stax.Relu,
        "avgpool": lambda: stax.AvgPool((size, size), strides=(size, size)),
        "gap": stax.GlobalAvgPool,
        "flatten": stax.Flatten,
        "dense": lambda: stax.Dense(1, W_std=ROOT2, b_std=None),
    }
    return made[name]()


def _timed(jitted, *arrays: np.ndarray) -> float:
    started = time.perf_counter()
    jitted(*arrays).block_until_ready()
    return time.perf_counter() - started


def main() -> None:
    """Arguments: rows, features, depth, repeats; or images, with a request (JSON) on the standard input and a reply on the output."""
    if sys.argv[1:] == ["images"]:
        request = json.load(sys.stdin)
        jax.config.update("jax_enable_x64", request["dtype"] == "float64")
        json.dump(images(request), sys.stdout)
    else:
        rows_seconds(*map(int, sys.argv[1:]))


if __name__ == "__main__":
    main()
