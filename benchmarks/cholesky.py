"""The out-of-core Cholesky factorisation against LAPACK in memory and a bare GEMM: rates counted as n³/3 and 2·t³ flops.

    python -m benchmarks.cholesky [--rows 8192] [--tile 1024] [--dtype float64] [--workers 0 2] [--folder /tmp]

One matrix, one run: SciPy's in-place Cholesky with every core; one GEMM of a tile's size with every core; then the tiled
factorisation in a loop here (workers 0: one task at a time, every core) and on local workers that share the cores. The
stores lie in a temporary folder, removed at the end; what is read comes from the page cache where it fits. Prints
the ratio of rates to both, the difference from LAPACK's factor, and what the plan says of reading and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.linalg import blas, cholesky

from ntkdask import threads
from ntkdask.execution.cluster import connect
from ntkdask.files import remove
from ntkdask.matrices.factorize import factorize
from ntkdask.matrices.factorize_plan import plan_factorize
from ntkdask.store import TileStore

ALPHA = 1.0


def store_matrix(url: Path, n: int, tile: int, dtype: str) -> np.ndarray:
    """A random positive definite matrix, XXᵀ/n of n/8 columns, stored as one triangle; returns it."""
    x = np.random.default_rng(0).standard_normal((n, max(1, n // 8)), dtype=dtype)
    matrix = x @ x.T
    matrix /= n
    store = TileStore.create(
        url, shape=(n, n), tile_shape=(tile, tile), dtype=dtype, fingerprint={}, triangle="symmetric"
    )
    for index in store.indices():
        store.record(store.commit(index, np.ascontiguousarray(matrix[store.slices(index)])))
    return matrix


def gemm_rate(tile: int, dtype: str, repeats: int = 5) -> float:
    """GFLOP/s of GEMM on tile × tile matrices with every core; the best of a few."""
    gemm = blas.dgemm if dtype == "float64" else blas.sgemm
    a, c = np.ones((tile, tile), dtype, order="F"), np.zeros((tile, tile), dtype, order="F")
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        gemm(-1.0, a, a, beta=1.0, c=c, trans_a=1, overwrite_c=1)
        best = min(best, time.perf_counter() - started)
    return 2 * tile**3 / best / 1e9


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    a = parser.parse_args()
    flops, cores = a.rows**3 / 3 / 1e9, threads.current()
    print(f"{cores} cores, {threads.blas_name()}, load {os.getloadavg()}, n={a.rows}, tiles of {a.tile}, {a.dtype}")
    folder = Path(tempfile.mkdtemp(dir=a.folder))
    try:
        matrix = store_matrix(folder / "matrix", a.rows, a.tile, a.dtype)
        with threads.limited(cores):
            product = gemm_rate(a.tile, a.dtype)
            matrix[np.diag_indices(a.rows)] += ALPHA
            started = time.perf_counter()
            expected = cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
            lapack = flops / (time.perf_counter() - started)
        print(f"GEMM {product:.1f} GFLOP/s, LAPACK in memory {lapack:.1f} GFLOP/s")
        for workers in a.workers:
            run(folder, workers, cores, a, flops, lapack, product, expected)
    finally:
        remove(folder)


def run(folder: Path, workers: int, cores: int, a, flops: float, lapack: float, product: float, expected) -> None:
    """Factorise once out of core and print its rates."""
    plan = plan_factorize(a.rows, a.tile, a.dtype, slots=max(1, workers), matrix_dtype=a.dtype)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(n_workers=workers, cuda=False)) if workers else None
        started = time.perf_counter()
        factor = factorize(
            folder / "matrix",
            ALPHA,
            url=folder / f"factor-{workers}",
            dtype=a.dtype,
            client=client,
            threads=max(1, cores // max(1, workers)),
        )
        rate = flops / (time.perf_counter() - started)
    store = TileStore.open(factor.url)
    error = max(float(np.abs(store.read(i) - expected[store.slices(i)]).max()) for i in store.indices() if i[0] != i[1])
    peak = max(r.peak_bytes for r in store.receipts.values())
    print(
        f"{workers or 'no'} workers: {rate:6.1f} GFLOP/s, {rate / lapack:.3f} of LAPACK, {rate / product:.3f} of GEMM; blocks of "
        f"{plan.block_tiles} tiles, {plan.tasks} tasks, {plan.read_bytes / 2**30:.1f} GiB read; peak {peak / 2**20:.0f} MiB, planned "
        f"{plan.memory['cholesky-tile'] / 2**20:.0f}; largest difference {error:.1e}"
    )


if __name__ == "__main__":
    main()
