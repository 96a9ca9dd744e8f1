"""Exact NTKs of convolutional networks on 32×32×3 images: seconds per pair, beside neural-tangents and the arithmetic limit.

    python -m benchmarks.convolutional [--peer PYTHON] [--networks NAME ...] [--pairs 256] [--repeats 7] [--threads 2] [--json FILE]
    python -m benchmarks.convolutional --gpu [--pairs 4096]

For every network and dtype, rectangular matrices of about `pairs` pairs (`flatten`: 256 times as many), timed after a warm-up, on
two kinds of images: "noise", standard normal pixels, and "smooth", blurred noise clipped to [0, 1] and rounded to 255 steps as
photographs are, with flat patches where |c| = 1; both standardised per channel. PYTHON: an interpreter that can import
neural_tangents (`_neural_tangents.py` says how one is made); it runs right after, jitted, in its fastest batch of those tried, on as
many cores, on noise (its time does not depend on the images). Both compute MATH.md's network with `scale_inputs=True,
weight_variance=2, normalize=False`, which is neural-tangents' `W_std=√2, b_std=0`.

The limit: operations as counted in `_operations.py` over the rates of `_arithmetic.py`, measured in the same run: flops at the
rate of fused multiply-adds or square roots at theirs, whichever takes longer. Processors that add in other pipes than they
multiply in can pass it. Differences are normwise, |error|/√(Θ(x,x)·Θ(y,y)), largest of both kinds: from neural-tangents in the same
dtype, and from it in float64. On a GPU the peak is that of CUDA fused multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from scipy.ndimage import gaussian_filter

from benchmarks import _arithmetic
from benchmarks._operations import count
from ntkdask import threads
from ntkdask.arrays import Array, gpu_status, namespace, to_device, to_host
from ntkdask.kernels import NTK
from ntkdask.networks import Activation, AvgPool, Conv, Dense, Flatten, GlobalAvgPool, Network, convolutional, myrtle

NETWORKS: dict[str, Callable[..., Network]] = {
    "convolutional(3)": partial(convolutional, 3),
    "convolutional(10)": partial(convolutional, 10),
    "myrtle(5)": partial(myrtle, 5),
    "myrtle(7)": partial(myrtle, 7),
    "myrtle(10)": partial(myrtle, 10),
    "flatten(3)": partial(convolutional, 3, readout="flatten"),
}
DTYPES = ("float32", "float64")
SHAPE = (32, 32, 3)
COMPARED = 2
"""Rows of x and of y, of either kind, that are compared with neural-tangents."""

PEER_BATCHES = {False: (1, 2, 4, 8), True: (16, 32, 64, 128)}
"""Rows of x and of y that neural-tangents is tried with; True: with a Flatten, which carries one plane only."""


def noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, *SHAPE) standard normal pixels, standardised per channel, float32."""
    return _standardised(rng.standard_normal((n, *SHAPE)))


def smooth(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, *SHAPE) blurred noise, its contrast raised until a part is cut off at 0 and 1, in 255 steps, standardised, float32."""
    grey, colour = rng.standard_normal((n, *SHAPE[:2], 1)), rng.standard_normal((n, *SHAPE))
    fields = gaussian_filter(grey, (0, 3, 3, 0), mode="wrap") + 0.4 * gaussian_filter(colour, (0, 3, 3, 0), mode="wrap")
    level = rng.uniform(0.2, 0.8, (n, 1, 1, 1))
    return _standardised(np.round(255 * np.clip(level + 4 * fields, 0, 1)))


KINDS = {"noise": noise, "smooth": smooth}


def _standardised(x: np.ndarray) -> np.ndarray:
    return ((x - x.mean((0, 1, 2))) / x.std((0, 1, 2))).astype("float32")


@dataclass(frozen=True)
class Measured:
    """One network in one dtype; seconds are per pair, one a repeat. peer: its reply without the matrices, empty without one;
    difference: from the peer in the same dtype and in float64."""

    network: str
    dtype: str
    pairs: int
    ours: dict[str, list[float]]
    flops: float
    roots: float
    peak_flops: float
    limit: float
    peer: dict[str, Any]
    difference: float
    difference_float64: float


def seconds(call: Callable[[], Array]) -> float:
    """Wall seconds of a call, to the end of what it started on a GPU."""
    started = time.perf_counter()
    found = call()
    if namespace(found) is not np:
        namespace(found).cuda.Device().synchronize()
    return time.perf_counter() - started


def time_ours(kernel: NTK, dtype: str, a: argparse.Namespace, factor: int) -> tuple[int, dict[str, list[float]]]:
    """(pairs, seconds per pair of every repeat by kind of images); fewer pairs where a call would pass --limit seconds."""
    rng = np.random.default_rng(0)
    few = {kind: (make(2, rng).astype(dtype), make(2, rng).astype(dtype)) for kind, make in KINDS.items()}
    few_on = {kind: tuple(to_device(side, a.gpu) for side in pair) for kind, pair in few.items()}
    slowest = 0.0
    for x, y in few_on.values():
        seconds(lambda x=x, y=y: kernel(x, y))  # compiles
        slowest = max(slowest, seconds(lambda x=x, y=y: kernel(x, y)) / 4)
    rows = max(1, math.isqrt(min(a.pairs * factor, int(a.limit / slowest))))
    taken: dict[str, list[float]] = {}
    sides = {kind: [to_device(make(rows, rng).astype(dtype), a.gpu) for _ in "xy"] for kind, make in KINDS.items()}
    for x, y in sides.values():
        seconds(lambda x=x, y=y: kernel(x, y))
    for _ in range(a.repeats):
        for kind, (x, y) in sides.items():
            taken.setdefault(kind, []).append(seconds(lambda x=x, y=y: kernel(x, y)) / rows**2)
    return rows**2, taken


def peer_layers(network: Network) -> list[tuple[str, int]]:
    """The layers as `_neural_tangents.py` reads them."""
    names: dict[type, Callable[[Any], tuple[str, int]]] = {
        Conv: lambda layer: ("conv", layer.filter[0]),
        Activation: lambda layer: (layer.sigma.name, 0),
        AvgPool: lambda layer: ("avgpool", layer.window[0]),
        GlobalAvgPool: lambda layer: ("gap", 0),
        Flatten: lambda layer: ("flatten", 0),
        Dense: lambda layer: ("dense", 0),
    }
    return [names[type(layer)](layer) for layer in network.layers]


def ask_peer(network: Network, dtype: str, pairs: dict[str, np.ndarray], a: argparse.Namespace) -> dict[str, Any]:
    """The reply of neural-tangents in the interpreter --peer, on as many cores; pairs: (2, n, *SHAPE) by kind of images."""
    cores = sorted(os.sched_getaffinity(0))[: a.threads]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for kind, sides in pairs.items():
            paths.append(str(Path(folder) / f"{kind}.npy"))
            np.save(paths[-1], sides.astype(dtype))
        request = {
            "layers": peer_layers(network),
            "dtype": dtype,
            "pairs": paths,
            "batches": PEER_BATCHES[_flattens(network)],
            "repeats": a.peer_repeats,
            "limit_seconds": a.limit,
            "compared": COMPARED,
        }
        answer = subprocess.run(
            [a.peer, str(Path(__file__).with_name("_neural_tangents.py")), "images"],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    return json.loads(answer.stdout)


def _flattens(network: Network) -> bool:
    return any(isinstance(layer, Flatten) for layer in network.layers)


def measure(name: str, peaks: dict[str, _arithmetic.Rates], a: argparse.Namespace) -> list[Measured]:
    """Both dtypes of one network: ours, then neural-tangents."""
    network = NETWORKS[name](scale_inputs=True, weight_variance=2.0, normalize=False)
    kernel, flattens = NTK(network), _flattens(network)
    ours = {dtype: time_ours(kernel, dtype, a, 256 if flattens else 1) for dtype in DTYPES}
    rng = np.random.default_rng(1)
    n = PEER_BATCHES[flattens][-1]
    pairs = {kind: np.stack([make(n, rng), make(n, rng)]) for kind, make in KINDS.items()}
    replies = {dtype: ask_peer(network, dtype, pairs, a) for dtype in DTYPES} if a.peer else {}
    found = []
    for dtype in DTYPES:
        operations, peak = count(network, SHAPE[:2], SHAPE[2], dtype), peaks[dtype]
        limit = max(operations.flops / (2 * peak.fused), operations.roots / peak.roots)
        differences = [
            difference(kernel, pairs, dtype, replies[other]["matrices"], a.gpu) if a.peer else math.nan
            for other in (dtype, "float64")
        ]
        counted = (operations.flops, operations.roots, 2 * peak.fused, limit)
        reply = {key: value for key, value in replies.get(dtype, {}).items() if key != "matrices"}
        found.append(Measured(name, dtype, *ours[dtype], *counted, reply, *differences))
    return found


def difference(
    kernel: NTK, pairs: dict[str, np.ndarray], dtype: str, matrices: list[list[list[float]]], gpu: bool
) -> float:
    """The largest |Θ − matrix|/√(Θ(x,x)·Θ(y,y)) over the first rows of every kind of images."""
    found = 0.0
    for (x, y), matrix in zip(pairs.values(), matrices, strict=True):
        x, y = x[:COMPARED].astype(dtype), y[:COMPARED].astype(dtype)
        scale = np.sqrt(np.outer(*(kernel.diagonal(side.astype("float64")) for side in (x, y))))
        mine = to_host(kernel(to_device(x, gpu), to_device(y, gpu)))
        found = max(found, float(np.max(np.abs(mine - np.array(matrix)) / scale)))
    return found


HEADER = """
| network | dtype | noise µs | smooth µs | GFLOP/s | of peak | limit µs | of limit | neural-tangents ms | ratio | differences |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line(m: Measured) -> str:
    """One row of the table: best (median) per pair; the ratio of bests (of medians)."""
    mine, theirs = m.ours["noise"], m.peer.get("seconds_per_pair")
    best = min(mine)
    cells = [m.network, m.dtype, *(_summary(m.ours[kind], 1e6) for kind in KINDS)]
    cells += [f"{m.flops / best / 1e9:.0f}", f"{m.flops / best / m.peak_flops:.0%}"]
    cells += [f"{m.limit * 1e6:.3g}", f"{m.limit / best:.0%}"]
    if theirs:
        middle = statistics.median(theirs) / statistics.median(mine)
        cells += [f"{_summary(theirs, 1e3)}, batch {m.peer['batch']}", f"{min(theirs) / best:.0f} ({middle:.0f})"]
        cells += [f"{m.difference:.1e}, {m.difference_float64:.1e}"]
    return "| " + " | ".join(cells) + " |"


def _summary(taken: list[float], unit: float) -> str:
    return f"{min(taken) * unit:.3g} ({statistics.median(taken) * unit:.3g})"


def measured_peaks(a: argparse.Namespace) -> dict[str, _arithmetic.Rates]:
    """The rates of the device that is measured, by dtype, printed."""
    if a.gpu:
        fused = {dtype: _arithmetic.device_fused_rate(dtype) for dtype in DTYPES}
        for dtype, rate in fused.items():
            print(f"{dtype}: {rate / 1e12:.2f} T fused multiply-adds/s")
        return {dtype: _arithmetic.Rates(rate, math.inf, math.nan) for dtype, rate in fused.items()}
    found = {dtype: _arithmetic.rates(dtype, a.threads) for dtype in DTYPES}
    for dtype, rates in found.items():
        print(f"{dtype}: {_arithmetic.described(rates)}")
    return found


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that can import neural_tangents")
    parser.add_argument("--gpu", action="store_true", help="CuPy arrays on the current GPU")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--pairs", type=int, help="default 256, 4096 on a GPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of one call that are not to be passed")
    parser.add_argument("--threads", type=int, default=threads.current())
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every second measured")
    a = parser.parse_args()
    a.pairs = a.pairs or (4096 if a.gpu else 256)
    if a.gpu and not gpu_status()[0]:
        parser.error(f"--gpu: {gpu_status()[1]}")
    return a


def main() -> None:
    """Parse, run, print."""
    a = parsed()
    where = gpu_status()[1] if a.gpu else f"{a.threads} threads, {threads.blas_name()}"
    print(f"{where}; NumPy {np.__version__}, Numba {numba.__version__}, load {os.getloadavg()}")
    with threads.limited(a.threads):
        peaks = measured_peaks(a)
        print(HEADER)
        found = []
        for name in a.networks:
            for row in measure(name, peaks, a):
                found.append(row)
                print(line(row), flush=True)
    versions = ", ".join(sorted({row.peer["versions"] for row in found if row.peer}))
    print(f"\n{versions or 'no peer'}; load at the end {os.getloadavg()}")
    if a.json:
        a.json.write_text(json.dumps([asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
