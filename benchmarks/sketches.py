"""Walsh–Hadamard transforms and TensorSRHT against a memory copy, SciPy's real FFT and plain NumPy, in one run.

Run with `python -m benchmarks.sketches`; under 20 seconds. Ratios matter more than rates: the machine may be shared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import scipy.fft

from ntkdask import seeds, threads
from ntkdask.features.hadamard import padded_size, walsh_hadamard
from ntkdask.features.sketches import TensorSRHT


def seconds(function: Callable[[], object], budget: float = 0.6) -> float:
    """The fastest of the calls that fit `budget` seconds, at least three, after one that compiles."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def numpy_hadamard(x: np.ndarray) -> np.ndarray:
    """The textbook transform: log₂p radix-2 passes over the whole array."""
    n, p = x.shape
    h = 1
    while h < p:
        pairs = x.reshape(n, p // (2 * h), 2, h)
        x = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2).reshape(n, p)
        h *= 2
    return x


def numpy_sketch(x: np.ndarray, y: np.ndarray, m: int, seed: int) -> np.ndarray:
    """TensorSRHT as its formula reads: pad, sign, transform, gather, multiply."""
    out = np.full((len(x), m), 1 / np.sqrt(m), x.dtype)
    for k, factor in enumerate((x, y)):
        size = padded_size(factor.shape[1])
        signed = np.zeros((len(x), size), x.dtype)
        signed[:, : factor.shape[1]] = factor * seeds.signs(seed, ("signs", k), size, x.dtype.name)[: factor.shape[1]]
        out *= numpy_hadamard(signed)[:, seeds.balanced_integers(seed, ("rows", k), size, m)]
    return out


def transforms(count: int) -> None:
    print(f"{'walsh_hadamard':24} {'ms':>8} {'GB/s':>7} {'÷ copy':>7} {'rfft ÷':>7}   (GB/s: bytes of x per second)")
    for dtype in ("float32", "float64"):
        for n, p in ((4096, 4096), (64, 2048), (8192, 512), (256, 65536)):
            x = np.random.default_rng(0).standard_normal((n, p)).astype(dtype)
            out = np.zeros_like(x)
            own = seconds(lambda x=x, out=out: walsh_hadamard(x, out))
            copy = seconds(lambda x=x, out=out: np.copyto(out, x), 0.2)
            fft = seconds(lambda x=x: scipy.fft.rfft(x, workers=count), 0.2)
            label = f"{n} x {p} {dtype}"
            print(f"{label:24} {own * 1e3:8.3f} {x.nbytes / own / 1e9:7.1f} {own / copy:7.2f} {fft / own:7.2f}")


def sketches() -> None:
    print(f"\n{'TensorSRHT, float32':34} {'ms':>8} {'ns/output':>10} {'NumPy ÷':>8}")
    for n, d1, d2, m in ((1024, 4096, 784, 4096), (1024, 4096, 9, 4096), (1024, 512, 512, 512)):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((n, d1), np.float32), rng.standard_normal((n, d2), np.float32)
        sketch, out = TensorSRHT(m, 0), np.zeros((n, m), np.float32)
        own = seconds(lambda sketch=sketch, x=x, y=y, out=out: sketch(x, y, out=out))
        plain = seconds(lambda x=x, y=y, m=m: numpy_sketch(x, y, m, 0), 0.2)
        label = f"({n}, {d1}) x ({n}, {d2}) -> {m}"
        print(f"{label:34} {own * 1e3:8.2f} {own / n / m * 1e9:10.2f} {plain / own:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    count = parser.parse_args().threads
    start = time.perf_counter()
    with threads.limited(count):
        x = np.ones((2, 64), np.float32)
        first = time.perf_counter()
        walsh_hadamard(x)
        TensorSRHT(8, 0)(x, x)
        loaded = time.perf_counter() - first
        print(f"{count} thread(s), load {os.getloadavg()[0]:.1f}; compiling or loading the loops took {loaded:.2f} s\n")
        transforms(count)
        sketches()
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
