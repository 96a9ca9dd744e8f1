"""What this machine's arithmetic can do at most, measured: fused multiply-adds and square roots in registers, the matrix product.

A loop of independent chains of vector instructions, written out in LLVM so that nothing touches memory, on every thread at once
(on a GPU: CUDA threads of a few chains each). Rates are of single operations, lanes counted: a fused multiply-add is one
operation and two flops. `python -m benchmarks._arithmetic` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import llvmlite.binding as binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ntkdask import threads
from ntkdask.arrays import cuda_module, device_memory_bytes, to_device

CHAINS = 12
"""Independent vectors in flight: two pipes with a latency of four or five cycles stay busy, and 16 registers suffice."""

DEVICE_CHAINS = 8
"""Independent numbers of a CUDA thread; with 2 048 threads a multiprocessor, latency is no matter."""

BURST_SECONDS = 0.1
REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """Operations a second of one dtype on all threads together: fused multiply-adds, square roots; flops of the matrix product."""

    fused: float
    roots: float
    product_flops: float


def vector_bytes() -> int:
    """Bytes of this processor's widest floating-point vector."""
    features = binding.get_host_cpu_features()
    return next((size for name, size in (("avx512f", 64), ("avx", 32)) if features.get(name)), 16)


def _burst(kind: Any, dtype: str, step: Callable[[ir.IRBuilder, Any, Any, Any], Any]) -> Any:
    """burst(rounds, start) -> one number of the type `kind`, after rounds·CHAINS vector steps x ← step(x)."""
    lanes = vector_bytes() // np.dtype(dtype).itemsize

    @intrinsic
    def chains(typing_context: Any, rounds: Any, start: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            scalar = context.get_value_type(kind)
            vector = ir.VectorType(scalar, lanes)
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[1], ir.IntType(32)(0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            spread = builder.shuffle_vector(first, first, mask)
            # chains that begin alike would be merged into one
            starts = [builder.fadd(spread, ir.Constant(vector, [float(i)] * lanes)) for i in range(CHAINS)]
            kept = [cgutils.alloca_once_value(builder, x) for x in starts]
            a, b = (ir.Constant(vector, [value] * lanes) for value in (0.9990234375, 0.0009765625))
            with cgutils.for_range(builder, args[0]):
                for x in kept:
                    builder.store(step(builder, builder.load(x), a, b), x)
            total = builder.load(kept[0])
            for x in kept[1:]:
                total = builder.fadd(total, builder.load(x))
            return builder.extract_element(total, ir.IntType(32)(0))

        return kind(types.int64, kind), generate

    @njit([kind(types.int64, kind)], nogil=True)
    def burst(rounds: int, start: float) -> float:
        return chains(rounds, start)

    return burst


def _fused(builder: ir.IRBuilder, x: Any, a: Any, b: Any) -> Any:
    return _call(builder, "llvm.fma", x, a, b)


def _root(builder: ir.IRBuilder, x: Any, a: Any, b: Any) -> Any:
    # the addition keeps x away from 1, whose root some dividers find early; it costs next to nothing beside the root
    return _call(builder, "llvm.sqrt", builder.fadd(x, a))


def _call(builder: ir.IRBuilder, name: str, *vectors: Any) -> Any:
    kind = vectors[0].type
    bits = {"float": 32, "double": 64}[str(kind.element)]
    signature = ir.FunctionType(kind, [kind] * len(vectors))
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, f"{name}.v{kind.count}f{bits}"), vectors
    )


def _rate(burst: Any, dtype: str, count: int) -> float:
    """Lanes·steps a second of `count` threads together, the best of REPEATS bursts."""
    per_round = CHAINS * (vector_bytes() // np.dtype(dtype).itemsize)
    start, rounds = np.dtype(dtype).type(0.5), 100_000
    while (once := _seconds(partial(burst, rounds, start))) < BURST_SECONDS / 2:
        rounds = int(rounds * min(10.0, 1.2 * BURST_SECONDS / max(once, 1e-6)))
    with ThreadPoolExecutor(count) as pool:

        def together() -> None:
            for done in [pool.submit(burst, rounds, start) for _ in range(count)]:
                done.result()

        best = min(_seconds(together) for _ in range(REPEATS))
    return per_round * rounds * count / best


def _product_flops(dtype: str, n: int = 2048) -> float:
    x = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
    out = np.empty_like(x)
    np.matmul(x, x, out=out)
    return 2.0 * n**3 / min(_seconds(lambda: np.matmul(x, x, out=out)) for _ in range(REPEATS))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rates(dtype: str, count: int) -> Rates:
    """The processor's rates in "float32" or "float64" with `count` threads; takes about two seconds."""
    kind = getattr(types, dtype)
    with threads.limited(count):
        product = _product_flops(dtype)
    fused, roots = (_rate(_burst(kind, dtype, step), dtype, count) for step in (_fused, _root))
    return Rates(fused, roots, product)


_CUDA = """
extern "C" __global__ void burst(REAL* out, REAL start, int rounds) {
    REAL x[CHAINS];
    for (int i = 0; i < CHAINS; ++i) x[i] = start + REAL(threadIdx.x + i);
    for (int round = 0; round < rounds; ++round) {
        #pragma unroll
        for (int i = 0; i < CHAINS; ++i) x[i] = fma(x[i], REAL(0.9990234375), REAL(0.0009765625));
    }
    REAL total = 0;
    for (int i = 0; i < CHAINS; ++i) total += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
"""


def cuda_source(real: str) -> str:
    """The CUDA C++ of the probe for "float" or "double"."""
    return _CUDA.replace("REAL", real).replace("CHAINS", str(DEVICE_CHAINS))


def device_fused_rate(dtype: str, rounds: int = 1 << 14) -> float:
    """Fused multiply-adds a second of the current GPU in "float32" or "float64", the best of REPEATS launches."""
    import cupy

    if not device_memory_bytes():
        return 0.0
    kernel = cuda_module(cuda_source({"float32": "float", "float64": "double"}[dtype])).get_function("burst")
    blocks = 16 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    out = to_device(np.empty(blocks * 256, dtype))
    taken = []
    for _ in range(REPEATS + 1):
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record()
        kernel((blocks,), (256,), (out, np.dtype(dtype).type(0.5), np.int32(rounds)))
        after.record()
        after.synchronize()
        taken.append(cupy.cuda.get_elapsed_time(before, after) / 1e3)
    return float(DEVICE_CHAINS) * rounds * out.size / min(taken[1:])


def described(found: Rates) -> str:
    """The rates in words."""
    return (
        f"{found.fused / 1e9:.1f} G fused multiply-adds/s ({2 * found.fused / 1e9:.0f} GFLOP/s), "
        f"{found.roots / 1e9:.1f} G square roots/s, matrix product {found.product_flops / 1e9:.0f} GFLOP/s"
    )


def main() -> None:
    """Print the rates of this machine."""
    count = threads.current()
    for dtype in ("float32", "float64"):
        print(f"{dtype}, {count} threads: {described(rates(dtype, count))}")


if __name__ == "__main__":
    main()
