"""Sketches against their peers, in one run: Walsh–Hadamard transforms and TensorSRHT against a memory copy, SciPy's real FFT and plain
NumPy; PolySketch against scikit-learn's PolynomialCountSketch; NTKSketch against its algorithm in plain NumPy.

Run with `python -m benchmarks.sketches`; about a minute. Ratios matter more than rates: the machine may be shared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import scipy.fft
from sklearn.kernel_approximation import PolynomialCountSketch

from ntkdask import seeds, threads
from ntkdask.features import NTKSketch
from ntkdask.features.sketching.hadamard import walsh_hadamard
from ntkdask.features.sketching.operands import padded_size
from ntkdask.features.sketching.poly_program import split
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.networks import fully_connected


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


def unit_rows(n: int, d: int) -> np.ndarray:
    """(n, d) float32 rows of length 1 around a common direction, so that cosines are not all near zero."""
    x = np.random.default_rng(0).standard_normal((n, d)) + 0.7
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def relative_error(phi: np.ndarray, exact: np.ndarray) -> float:
    """‖ΦΦᵀ − K‖/‖K‖, Frobenius."""
    return float(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))


def poly_sketches() -> None:
    """Time and error at equal degree and components; the errors are means over seeds on the same 256 rows."""
    print(
        f"\n{'polynomial kernel, float32':30} {'PolySketch ms':>14} {'error':>7} {'scikit-learn ms':>16} {'error':>7} {'time ÷':>7}"
    )
    for n, d, p, m in (
        (1024, 784, 2, 4096),
        (1024, 784, 4, 4096),
        (1024, 784, 8, 4096),
        (1024, 784, 8, 1024),
        (1024, 9, 4, 4096),
    ):
        x = unit_rows(n, d)
        exact = (x[:256].astype(np.float64) @ x[:256].T.astype(np.float64)) ** p

        def own(x: np.ndarray, seed: int, p: int = p, m: int = m) -> np.ndarray:
            return PolySketch(p, m, seed)(x, degrees=[p])[0]

        def peer(x: np.ndarray, seed: int, p: int = p, m: int = m) -> np.ndarray:
            return PolynomialCountSketch(degree=p, n_components=m, random_state=seed).fit(x[:1]).transform(x)

        times = [seconds(lambda f=f, x=x: f(x, 0), 0.4) for f in (own, peer)]
        errors = [np.mean([relative_error(f(x[:256], seed), exact) for seed in range(5)]) for f in (own, peer)]
        label = f"({n}, {d}), degree {p}, {m}"
        row = f"{label:30} {times[0] * 1e3:14.1f} {errors[0]:7.4f} {times[1] * 1e3:16.1f} {errors[1]:7.4f}"
        print(f"{row} {times[1] / times[0]:7.1f}")


def numpy_poly_sketch(x: np.ndarray, sketch: PolySketch, degree: int) -> np.ndarray:
    """The power `degree` of a PolySketch as its tree reads, from `numpy_hadamard` and the sketch's own signs and samples."""
    w, seed, path = sketch.width, sketch.seed, sketch.path

    def samples(first: int, end: int) -> np.ndarray:
        size = padded_size(x.shape[1]) if end - first == 1 else w
        vectors = np.zeros((len(x), size), x.dtype)
        if end - first == 1:
            vectors[:, : x.shape[1]] = x
        else:
            vectors[...] = product(first, end) / np.sqrt(w)
        vectors *= seeds.signs(seed, (*path, "signs", first, end), size, x.dtype.name)
        return numpy_hadamard(vectors)[:, seeds.balanced_integers(seed, (*path, "rows", first, end), size, w)]

    def product(first: int, end: int) -> np.ndarray:
        middle = split(first, end)
        return samples(first, middle) * samples(middle, end)

    root = samples(0, 1) if degree == 1 else product(0, degree)
    return (root / np.sqrt(sketch.n_components))[:, : sketch.n_components].astype(x.dtype)


def numpy_ntk_sketch(x: np.ndarray, sketch: NTKSketch) -> np.ndarray:
    """NTKSketch by Remark 1 in plain NumPy, a polynomial of the same coefficients and components."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    parts = sketch._polynomial
    unit, powers = x / lengths, parts._sketch
    features = []
    for degree, width in zip(powers.degrees, powers.widths(x.shape[1]), strict=True):
        if degree == 0:
            power = np.ones((len(x), 1), x.dtype)
        elif degree == 1 and width == x.shape[1]:
            power = unit
        else:
            power = numpy_poly_sketch(unit, PolySketch(degree, width, 0, ("plain", degree)), degree)
        features.append(np.sqrt(parts.polynomial[degree]) * power)
    return (lengths * np.concatenate(features, axis=1)).astype(x.dtype)


def ntk_sketches() -> None:
    """Rows per second and error of NTKSketch, and of the same algorithm in NumPy."""
    print(
        f"\n{'NTKSketch, degree 8, float32':36} {'rows/s':>9} {'error':>7} {'bias':>7} {'NumPy rows/s':>13} {'error':>7} {'÷':>6}"
    )
    for d, m, depth, method in (
        (784, 4096, 1, "polynomial"),
        (784, 4096, 3, "polynomial"),
        (784, 4096, 1, "algorithm1"),
    ):
        x, sketch = unit_rows(512, d), NTKSketch(fully_connected(depth), m, method=method)
        exact = sketch.target(x[:256].astype(np.float64))
        own = len(x) / seconds(lambda sketch=sketch, x=x: sketch(x), 0.4)
        found = relative_error(sketch(x[:256]), exact)
        row = f"{f'd {d}, {m}, depth {depth}, {method}':36} {own:9.0f} {found:7.4f} {sketch.truncation_error:7.4f}"
        if method == "polynomial":
            plain = len(x) / seconds(lambda sketch=sketch, x=x: numpy_ntk_sketch(x, sketch), 0.4)
            row += f" {plain:13.0f} {relative_error(numpy_ntk_sketch(x[:256], sketch), exact):7.4f} {own / plain:6.1f}"
        print(row)


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
        poly_sketches()
        ntk_sketches()
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
