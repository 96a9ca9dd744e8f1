"""S and T of pairs of images at the readout on a GPU: stages in registers and shared memory; global memory holds pooled arrays only.

The CUDA C++ comes from `planes.cuda_source`; here are its inputs, batches of pairs, launches and their sums. In float32 κ₀ loses half
its digits near |c| = 1 (MATH.md §1, rounding). So every launch estimates the error of each pair, and pairs whose error would be too
large are computed again in float64. Sums over planes are float64 and no float is added atomically: equal calls give equal bits.
Called by `kernels.convolutional`, with the variance maps of `planes.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array, block_shared_bytes, cuda_module, namespace, to_device
from ntkdask.kernels.planes.cuda_source import LANES, StageCode, refusal, stage_codes
from ntkdask.kernels.planes.layout import LEAST, MOST
from ntkdask.kernels.planes.program import Program

OPTIONS = ("--std=c++17", "--ftz=true", "--prec-sqrt=false", "--prec-div=false")
BATCH_BYTES = 2**30
"""Bytes of the pooled arrays and sums of a batch of pairs."""
BATCH_PAIRS = 2**15
"""Most pairs of a batch: the second axis of a grid ends at 65535."""
DOUBT_LIMIT = 64.0
"""A pair of float32 images is computed in float64 where the mean of |T|/√(1 − c²), added over all layers, exceeds this times
√(T_ii·T_jj). An error ε of c becomes ε/(π√(1 − c²)) in κ₀. For equal images ε/π was 4e-8, so T is good to 3e-6 below the limit."""
POOL_THREADS = 256


def readout(
    program: Program, x: Array, y: Array | None, maps_x: list[Array], maps_y: list[Array], divisor: float, tangent: bool
) -> tuple[Array, Array | None]:
    """S and T of all pairs of images at the readout.

    Parameters
    ----------
    program : Program
        One that `supports` accepts.
    x : CuPy array (n, H, W, C), float32 or float64
        Images on the left; planes are computed in their dtype.
    y : CuPy array (m, H, W, C) of x's dtype, or None
        Images on the right; None for x with itself, of which one triangle is computed and mirrored.
    maps_x, maps_y : list of CuPy arrays (n, H_k, W_k), float64
        Variances of x and of y before every activation and LayerNorm, in the order of `program.nodes`.
    divisor : float
        What products of images are divided by.
    tangent : bool
        Whether T is wanted.

    Returns
    -------
    tuple of two CuPy arrays (n, m), float64
        S, and T or None: means over all pixel pairs for a GlobalAvgPool, over p = p' for a Flatten.

    Notes
    -----
    Normwise errors are at most 1e-10 in float64 and 1e-5 in float32.
    """
    xp, n, m = namespace(x), x.shape[0], (x if y is None else y).shape[0]
    out = tuple(xp.zeros((n, m)) for _ in range(1 + tangent))
    if n and m:
        limit = block_shared_bytes()
        sides = (x, maps_x), (x, maps_x) if y is None else (y, maps_y)
        run = _Run(stage_codes(program, x.dtype.itemsize, tangent, limit), sides, divisor, tangent)
        doubtful = tangent and x.dtype == np.float32
        wide = [_wide_images(*side, program) for side in sides] if x.dtype == np.float32 else []
        scales = [_own_tangents(run, side) for side in sides[: 1 if y is None else 2]] if doubtful else []
        precise: _Run | None = None
        for i, j in _batches(xp, n, m, y is None, run.batch_pairs):
            means = run.means(i, j)
            if wide:
                in_doubt = wide[0][i] | wide[1][j]
                if doubtful:
                    scale = xp.sqrt(scales[0][i] * scales[-1][j])
                    in_doubt |= ~(means[2] <= DOUBT_LIMIT * scale)  # a NaN is in doubt, too
                doubted = xp.flatnonzero(in_doubt)
                if len(doubted):
                    precise = precise or _Run(stage_codes(program, 8, tangent, limit), sides, divisor, tangent)
                    for part in _cut(doubted, precise.batch_pairs):
                        means[:, part] = precise.means(i[part], j[part])
            for matrix, values in zip(out, means[: len(out)], strict=True):
                matrix[i, j] = values
                if y is None:
                    matrix[j, i] = values
    return out[0], out[1] if tangent else None


def supports(program: Program, itemsize: int, tangent: bool) -> bool:
    """Whether `readout` can run the program on the current GPU; for float32 (itemsize 4) also in float64, for pairs in doubt."""
    limit = block_shared_bytes()
    return not any(refusal(program, size, tangent, limit) for size in {itemsize, 8})


def workspace_bytes(program: Program, n: int, m: int, channels: int, itemsize: int, tangent: bool) -> int:
    """Bytes beside inputs, variance maps and results.

    Parameters
    ----------
    program : Program
        The network.
    n, m : int
        Images on the left and on the right.
    channels : int
        Channels of an image.
    itemsize : int
        4 for float32, 8 for float64.
    tangent : bool
        Whether T is wanted.

    Returns
    -------
    int
        Images and roots of variances as the kernels read them, also in float64, and a batch.
    """
    codes = stage_codes(program, 8, tangent, 2**17)
    pixels = math.prod(program.stages[0].shape_in) * channels + sum(map(math.prod, program.nodes))
    inputs = (n + 2 * m) * pixels * (itemsize + (8 if itemsize < 8 else 0))
    return inputs + 2 * max(BATCH_BYTES, _pair_bytes(codes, 8, tangent)) + 8 * 8 * min(n * m, BATCH_PAIRS)


def _wide_images(x: Array, maps: list[Array], program: Program) -> Array:
    """(n,) bool: images whose entries of S may leave float32 in some stage."""
    xp = namespace(x)
    wide = xp.full(x.shape[0], any(stage.is_wide for stage in program.stages))
    for v in (xp.square(x.astype(xp.float64)).sum(axis=3), *maps):
        wide |= ((v > MOST) | ((v < LEAST) & (v > 0))).any(axis=(1, 2))
    return wide


def _own_tangents(run: _Run, side: tuple[Array, list[Array]]) -> Array:
    """T(x_i, x_i) (n,) of the images of a side, in the run's precision."""
    same = _Run(run.codes, (side, side), run.divisor, True)
    rows = run.xp.arange(len(side[0]))
    return run.xp.concatenate([same.means(part, part)[1] for part in _cut(rows, same.batch_pairs)])


def _batches(xp: Any, n: int, m: int, symmetric: bool, step: int) -> Iterator[tuple[Array, Array]]:
    """(i, j) int64 of all pairs, or where symmetric of those with i >= j, `step` at a time."""
    starts = xp.asarray([i * (i + 1) // 2 if symmetric else i * m for i in range(n + 1)], dtype=xp.int64)
    total = n * (n + 1) // 2 if symmetric else n * m
    for low in range(0, total, step):
        pair = xp.arange(low, min(low + step, total), dtype=xp.int64)
        i = xp.searchsorted(starts, pair, side="right") - 1
        yield i, pair - starts[i]


def _cut(values: Array, step: int) -> Iterator[Array]:
    """The values, `step` at a time."""
    for low in range(0, len(values), step):
        yield values[low : low + step]


def _sums_count(code: StageCode) -> int:
    """Number of rows (Σ S, Σ T, doubt) that a launch writes for a pair."""
    if not code.folded:
        return len(code.offsets)
    if code.pooled:
        return code.pooled[0] * code.threads // LANES
    return _rows_wanted(code) * -(-_columns_wanted(code) // _slabs_a_warp(code))


def _rows_wanted(code: StageCode) -> int:
    """Number of row offsets of the slabs to compute."""
    return len({dy for dy, _ in code.offsets})


def _columns_wanted(code: StageCode) -> int:
    """Number of column offsets of the slabs to compute."""
    return len({dx for _, dx in code.offsets})


def _slabs_a_warp(code: StageCode) -> int:
    """Slabs that share a warp, where images are narrower than it."""
    return LANES >> (code.stage.shape_in[1] - 1).bit_length()


def _pair_bytes(codes: tuple[StageCode, ...], itemsize: int, tangent: bool) -> int:
    """Bytes that a pair takes on its way: pooled arrays, sums, and in general.cu whole planes before a pooling."""
    total = 0
    for code in codes:
        total += 24 * _sums_count(code)
        if code.pooled:
            total += (1 + tangent) * itemsize * code.addends * math.prod(code.pooled) ** 2
            if not code.folded:
                total += (1 + tangent) * itemsize * math.prod(code.stage.shape_out) ** 2
    return total


@dataclass(frozen=True)
class _Side:
    """One side of the pairs as a stage reads it.

    Parameters
    ----------
    roots : array (n, Σ pixels)
        √v of the stage's variance maps, one after another.
    shares : array (n, nodes), float32
        1/Σ√v of each variance map; 0 where the sum is 0.
    """

    roots: Array
    shares: Array


class _Run:
    """The launches for batches of pairs of fixed images, in the precision of the codes."""

    def __init__(
        self, codes: tuple[StageCode, ...], sides: tuple[tuple[Array, list[Array]], ...], divisor: float, tangent: bool
    ) -> None:
        (x, maps_x), (y, maps_y) = sides
        self.codes, self.xp, self.tangent, self.divisor = codes, namespace(x), tangent, divisor
        self.dtype = np.dtype(f"float{8 * codes[0].itemsize}")
        self.channels = x.shape[3]
        # where slabs fold, y is stored twice, one below the other, so that row h + dy exists for every dy
        self.images = self._planar(x, False), self._planar(y, codes[0].folded)
        self.sides = [(self._side(code, maps_x, False), self._side(code, maps_y, code.folded)) for code in codes]
        self.batch_pairs = max(1, min(BATCH_PAIRS, BATCH_BYTES // _pair_bytes(codes, self.dtype.itemsize, tangent)))

    def _planar(self, x: Array, twice: bool) -> Array:
        """Images (n, H, W, C) as (n, C, H, W), or (n, C, 2H, W) with every image twice."""
        images = x.transpose(0, 3, 1, 2).astype(self.dtype)
        images = self.xp.concatenate([images, images], axis=2) if twice else images
        return self.xp.ascontiguousarray(images)

    def _side(self, code: StageCode, maps: list[Array], twice: bool) -> _Side:
        """One side of the pairs for a stage, its roots twice with `twice`."""
        xp = self.xp
        stage_maps = maps[code.first_node : code.first_node + len(code.nodes)]
        if not stage_maps:
            return _Side(xp.zeros((1, 1), self.dtype), xp.zeros((1, 1), np.float32))
        roots = [xp.sqrt(v).reshape(len(v), -1) for v in stage_maps]
        sums = xp.stack([r.sum(axis=1) for r in roots], axis=1)
        shares = xp.where(sums > 0, 1 / xp.where(sums > 0, sums, 1), 0).astype(np.float32)
        flat = xp.concatenate([r for root in roots for r in ([root, root] if twice else [root])], axis=1)
        return _Side(xp.ascontiguousarray(flat.astype(self.dtype)), xp.ascontiguousarray(shares))

    def means(self, i: Array, j: Array) -> Array:
        """(3, pairs) float64: the means of S and T at the readout over the wanted entries, and of the doubt in T."""
        xp = self.xp
        pairs = xp.ascontiguousarray(i.astype(np.int32)), xp.ascontiguousarray(j.astype(np.int32))
        pooled, addends, doubt = None, 0, xp.zeros(len(i))
        for position, code in enumerate(self.codes):
            sums = xp.zeros((len(i), _sums_count(code), 3))
            arguments = self._arguments(position, pooled, addends, pairs)
            pooled = self._launch(code, arguments, sums, len(i))
            addends = code.addends
            means = sums.sum(axis=1) / code.seen
            doubt = doubt * self._gain(position, *pairs) + means[:, 2]
        return xp.stack([means[:, 0], means[:, 1], doubt])

    def _gain(self, position: int, i: Array, j: Array) -> Array | float:
        """The most by which the mean of |T| of each pair grows in a stage."""
        code, (left, right) = self.codes[position], self.sides[position]
        gain: Array | float = code.gain
        for node in code.divisors:
            gain = gain * (float(math.prod(code.nodes[node])) ** 2 * left.shares[i, node] * right.shares[j, node])
        return gain

    def _arguments(
        self, position: int, pooled: Array | None, addends: int, pairs: tuple[Array, Array]
    ) -> tuple[Any, ...]:
        """The arguments of a stage's kernel that all kernels share."""
        left, right = self.sides[position]
        first = pooled is None
        source = (
            *(self.images if first else (pooled, np.uintp(0))),
            np.int32(self.channels if first else 0),
            np.int32(addends),
            self.dtype.type(1 / self.divisor if first else 1),
        )
        count = np.int32(len(self.codes[position].nodes))
        return *source, left.roots, right.roots, left.shares, right.shares, *pairs, count

    def _launch(self, code: StageCode, arguments: tuple[Any, ...], sums: Array, pairs: int) -> Array | None:
        """Run a stage; returns its pooled array (pairs, parts, addends, H, W, H, W), or None after the last."""
        xp, parts, pooled = self.xp, 1 + self.tangent, None
        module = cuda_module(code.source, OPTIONS)
        if not code.folded:
            return self._launch_general(module, code, arguments, sums, pairs)
        if not code.pooled:
            warps = code.threads // LANES
            groups = -(-_columns_wanted(code) // (warps * _slabs_a_warp(code)))
            grid = (_rows_wanted(code) * groups, pairs)
            module.get_function("slab_sums")(grid, (code.threads,), (*arguments, np.int32(_columns_wanted(code)), sums))
            return None
        pooled = xp.empty((pairs, parts, code.addends, *code.pooled, *code.pooled), self.dtype)
        kernel = _with_shared(module.get_function("slab_pools"), code.shared_bytes)
        kernel((code.pooled[0], pairs), (code.threads,), (*arguments, pooled, sums), shared_mem=code.shared_bytes)
        return pooled

    def _launch_general(
        self, module: Any, code: StageCode, arguments: tuple[Any, ...], sums: Array, pairs: int
    ) -> Array | None:
        """`_launch` for a stage of general.cu."""
        xp, parts, (h, w) = self.xp, 1 + self.tangent, code.stage.shape_out
        planes, null = None, np.uintp(0)
        if code.pooled:
            # zeros where some planes are not computed: a slab holds entries of such planes beside others
            allocate = xp.empty if code.all_offsets else xp.zeros
            planes = allocate((pairs, parts, h * w, h * w), self.dtype)
        offsets = to_device(np.array(code.offsets, np.int32))
        kernel = _with_shared(module.get_function("plane_steps"), code.shared_bytes)
        plane_arguments = (*arguments, offsets, sums, null if planes is None else planes)
        kernel((len(code.offsets), pairs), (code.threads,), plane_arguments, shared_mem=code.shared_bytes)
        if planes is None or code.pooled is None or code.stage.window is None:
            return None
        pooled = xp.empty((pairs, parts, 1, *code.pooled, *code.pooled), self.dtype)
        sizes = (np.int64(pairs * parts), *map(np.int32, (h, w, *code.stage.window)))
        grid = (min(-(-pooled.size // POOL_THREADS), 2**16),)
        module.get_function("pool_planes")(grid, (POOL_THREADS,), (planes, pooled, *sizes))
        return pooled


def _with_shared(kernel: Any, shared_bytes: int) -> Any:
    """The kernel, allowed to take so much dynamic shared memory; up to 48 KiB need no permission."""
    if shared_bytes > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared_bytes
    return kernel
