"""S and T of pairs of images at the readout of a convolutional network, on the CPU: stages of compiled loops over folded slabs.

For networks of activations with one kink at 0 whose convolutions keep the image's size (`takes`); the rest goes through `planes`.
The first stage runs in the images' dtype; of float32 slabs in which too many correlations are near ±1, where κ₀ turns an error ε
into ε/√(1 − c²), and all later stages, which are small, are float64. Sums over pixels are float64. Called by `convolutional`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

import numpy as np

from ntkdask import threads
from ntkdask.kernels import plane_stage as codes
from ntkdask.kernels.stages import Add, Convolve, Exchange, Normalise, Op, Program, Rectify, Save, Shape, Stage

ROWS, POOLED_ROWS, FLAT_COLUMNS = 16, 4, 64
"""Images x that meet one image z at a time: their maps stay in a core's second cache, beside pooled slabs where there are any. For a
Flatten readout, where one slab of a pair is all there is, as many images z one after the other."""

LIMIT = 100.0
"""Mean of 1/√(1 − c²) in a slab above which float32 is not enough: the error of κ₀ is up to 1.5e-7/π times that, 5e-6."""

LATER_LIMIT = 0.01
"""Share of a later slab's entries near ±1 above which a pair that began in float32 is done again in float64."""

ALIGNED = 64
"""Bytes of a vector and of a cache line."""

Block: TypeAlias = tuple[slice, slice]


def takes(program: Program) -> bool:
    """Whether every convolution keeps the image's size, so that offsets fold modulo the image."""
    convolutions = [op for stage in program.stages for op in stage.ops if isinstance(op, Convolve)]
    return all(op.shape_in == op.shape_out and op.conv.strides == (1, 1) for op in convolutions)


def readout(
    program: Program,
    x: np.ndarray,
    y: np.ndarray | None,
    maps_x: list[np.ndarray],
    maps_y: list[np.ndarray],
    divisor: float,
    tangent: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """(S, T) float64 (n, m) at the readout of images (n, H, W, C), (m, H, W, C), float32 or float64; without `tangent` T is 0.

    maps: variances (n, H_k, W_k) float64 before every activation and LayerNorm. y None: x with itself; the diagonal: anything finite.
    divisor: of the inputs' products.
    """
    compiled_stages = tuple(_compile_stages(program))
    left = _side(compiled_stages, x, maps_x, divisor, True)
    right = _side(compiled_stages, x if y is None else y, maps_x if y is None else maps_y, 1.0, False)
    found = np.zeros((2, x.shape[0], right.images.shape[0]))
    size = _block_size(program)
    blocks: SimpleQueue[Block] = SimpleQueue()
    count = 0
    for block in _blocks(x.shape[0], right.images.shape[0], *size, y is None):
        blocks.put(block)
        count += 1
    run = [_Worker(compiled_stages, left, right, size, tangent).run for _ in range(min(threads.current(), count))]

    def work(pair_block: Callable[[Block, np.ndarray], None]) -> None:
        while True:
            try:
                block = blocks.get_nowait()
            except Empty:
                return
            pair_block(block, found)

    threads.on_threads(work, run)
    pixels = math.prod(program.stages[-1].shape_out)
    found /= pixels**2 if program.gap else pixels
    if y is None:
        below = np.tril(np.ones(found.shape[1:], bool), -1)
        found[:, below] = found.transpose(0, 2, 1)[:, below]
    return found[0], found[1]


def _block_size(program: Program) -> tuple[int, int]:
    """Rows and columns of a block of pairs."""
    if len(program.stages) > 1:
        return POOLED_ROWS, 1
    return ROWS, 1 if program.gap else FLAT_COLUMNS


def _blocks(n: int, m: int, rows: int, columns: int, symmetric: bool) -> Iterator[Block]:
    """Rows and columns of blocks, those of many rows first; of a symmetric matrix those that hold something above the diagonal."""
    for start in reversed(range(0, m, columns)):
        stop = min(start + columns, m)
        last = stop - 1 if symmetric else n
        for first in range(0, last, rows):
            yield slice(first, min(first + rows, last)), slice(start, stop)


@dataclass(frozen=True)
class _CompiledStage:
    """A stage as tables: ops (count, 7) int64 and constants (count, 5) float64 of `plane_stage`. nodes: its variance maps, of which
    `units` says in what units S is there, `curves` what sx is multiplied by. unit: S and T of the last op are in that many. wanted:
    (H, W) slabs to compute. depth: of residual paths."""

    stage: Stage
    ops: np.ndarray
    constants: np.ndarray
    nodes: slice
    units: tuple[float, ...]
    curves: tuple[float, ...]
    unit: float
    wanted: np.ndarray
    depth: int


def _compile_stages(program: Program) -> Iterator[_CompiledStage]:
    first = 0
    for stage in program.stages:
        tables = _Tables(any(isinstance(op, Save) for op in stage.ops))
        for op, following in zip(stage.ops, (*stage.ops[1:], None), strict=False):
            tables.add(op, following)
        ops = np.array(tables.ops, np.int64).reshape(-1, 7)
        constants = np.array(tables.constants, np.float64).reshape(-1, 5)
        nodes = slice(first, first + len(tables.curves))
        yield _CompiledStage(
            stage, ops, constants, nodes, tuple(tables.units), tuple(tables.curves), tables.unit, _wanted(stage), tables.deepest
        )  # fmt: skip
        first += len(tables.curves)


SMALLEST_UNIT = 1e-12
"""Units of S below which another factor is multiplied out instead, far from the ends of float32."""


class _Tables:
    """Rows of the tables as operations are added. A 3×3 convolution without bias before a normalised ReLU only sums: its σ_w²/q² and
    the ReLU's curve become part of the unit in which S and T are counted, unless residual paths have to agree on one."""

    def __init__(self, paths: bool) -> None:
        self.ops: list[tuple[int, ...]] = []
        self.constants: list[tuple[float, ...]] = []
        self.units: list[float] = []
        self.curves: list[float] = []
        self.unit, self.paths = 1.0, paths
        self.depth = self.deepest = 0
        self.fused = False

    def add(self, op: Op, following: Op | None) -> None:
        """The operation; `following` is the one after it."""
        if isinstance(op, Convolve):
            self._convolve(op, following)
        elif isinstance(op, Rectify):
            self.units.append(self.unit)
            if self.fused:
                self.curves.append(1.0 / math.pi)
                self.unit *= op.curve
            else:
                self.curves.append(op.curve / math.pi)
                self._append((codes.RECTIFY, 0, 0, 0, 0, 0, len(self.curves) - 1), curve=op.curve, line=op.line)
            self.fused = False
        elif isinstance(op, Normalise):
            # S over √(vv') is a pure number whatever the unit of S was
            self.units.append(self.unit)
            self.curves.append(1.0)
            self._append((codes.NORMALISE, 0, 0, 0, 0, 0, len(self.curves) - 1))
            self.unit = 1.0
        else:
            self.depth += isinstance(op, Save) - isinstance(op, Add)
            self.deepest = max(self.depth, self.deepest)
            self._append(({Save: codes.SAVE, Exchange: codes.EXCHANGE, Add: codes.ADD}[type(op)], 0, 0, 0, 0, 0, 0))

    def _convolve(self, op: Convolve, following: Op | None) -> None:
        (rows, columns), conv = op.conv.filter, op.conv
        scale, circular = conv.weight_variance / (rows * columns), conv.padding == "circular"
        three = (rows, columns, *op.before, circular) == (3, 3, 1, 1, False)
        plain = conv.bias_variance == 0 and conv.trainable and isinstance(following, Rectify) and following.line == 0
        if three and plain and not self.paths and self.unit * scale > SMALLEST_UNIT:
            self.unit *= scale
            self._append((codes.SUM_RECTIFY, 3, 3, 1, 1, 0, len(self.curves)))
            self.fused = True
            return
        row = (codes.CONVOLVE_3 if three else codes.CONVOLVE, rows, columns, *op.before, int(circular), 0)
        self._append(row, scale=scale, bias=conv.bias_variance / self.unit, trainable=float(conv.trainable))

    def _append(
        self, row: tuple[int, ...], scale: float = 0.0, bias: float = 0.0, trainable: float = 0.0, curve: float = 0.0,
        line: float = 0.0,
    ) -> None:  # fmt: skip
        self.ops.append(row)
        self.constants.append((scale, bias, trainable, curve, line))


def _wanted(stage: Stage) -> np.ndarray:
    """(H, W) uint8: slabs that hold a plane within the stage's reach."""
    near = []
    for length, reach in zip(stage.shape_in, stage.reach, strict=True):
        offsets = np.arange(length)
        near.append((offsets <= reach) | (length - offsets <= reach))
    return (near[0][:, None] & near[1]).astype(np.uint8)


@dataclass(frozen=True)
class _Side:
    """Images (n, C, HW) as given, and for each stage 1/√v and √v (n, nodes, HW) of its variance maps, float64."""

    images: np.ndarray
    inverse: list[np.ndarray]
    root: list[np.ndarray]
    single: tuple[np.ndarray, np.ndarray] | None

    def maps(self, stage: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(1/√v, √v) of a stage in `dtype`; float32 of the first only."""
        if dtype == np.float32 and self.single:
            return self.single
        return self.inverse[stage], self.root[stage]


def _side(
    stages: tuple[_CompiledStage, ...], x: np.ndarray, maps: list[np.ndarray], divisor: float, left: bool
) -> _Side:
    n, h, w, channels = x.shape
    images = np.zeros((n, channels, _stride(h * w, x.dtype.itemsize)), x.dtype)
    images[:, :, : h * w] = x.transpose(0, 3, 1, 2).reshape(n, channels, h * w)
    images /= x.dtype.type(divisor)
    inverse, root = [], []
    for stage in stages:
        size = math.prod(stage.stage.shape_in)
        v = np.zeros((n, len(stage.curves), _stride(size, 4)))
        for k, node in enumerate(maps[stage.nodes]):
            v[:, k, :size] = node.reshape(n, size)
        s = np.sqrt(v / np.array(stage.units)[:, None])
        inverse.append(np.divide(1.0, s, out=np.zeros_like(s), where=s > 0))
        root.append(s * np.array(stage.curves)[:, None] if left else s)
    single = None
    if x.dtype == np.float32:
        single = (inverse[0].astype(np.float32), root[0].astype(np.float32))
    return _Side(images, inverse, root, single)


class _Worker:
    """A thread's scratch, and the stages run in it on one block of pairs after the other."""

    def __init__(
        self, stages: tuple[_CompiledStage, ...], left: _Side, right: _Side, size: tuple[int, int], tangent: bool
    ) -> None:
        self.stages, self.left, self.right, self.tangent = stages, left, right, tangent
        self.dtype = left.images.dtype
        self.scratch: dict[tuple[int, np.dtype], tuple[np.ndarray, ...]] = {}
        rows, columns = size
        self.pooled = [np.empty((rows, 2, *_pooled(s.stage), math.prod(_pooled(s.stage)))) for s in stages[:-1]]
        self.sums = np.empty((columns, rows, 2))

    def run(self, block: Block, found: np.ndarray) -> None:
        """S and T of the pairs of a block into found (2, n, m), summed over the readout's pixels."""
        rows, columns = block
        doubtful = self._pairs(rows, columns, self.dtype, found)
        for column, row in np.argwhere(doubtful):
            row, column = int(row) + rows.start, int(column) + columns.start
            self._pairs(slice(row, row + 1), slice(column, column + 1), np.dtype(np.float64), found)

    def _pairs(self, rows: slice, columns: slice, dtype: np.dtype, found: np.ndarray) -> np.ndarray:
        """All stages of the pairs, the first in `dtype`; (columns, rows) which of them a later stage leaves in doubt."""
        count = columns.stop - columns.start, rows.stop - rows.start
        single = dtype == np.float32
        doubtful = np.zeros(count, bool)
        inputs, scale = np.empty((count[1], 2, 0, 0, 0)), 1.0
        sums = self.sums[: count[0], : count[1]]
        sums[:] = 0
        for index, stage in enumerate(self.stages):
            outputs = np.empty((count[1], 2, 0, 0, 0))
            if index < len(self.pooled):
                outputs = self.pooled[index][: count[1]]
                outputs[...] = 0
            todo = np.broadcast_to(stage.wanted, (*count, *stage.wanted.shape)).copy()
            call = (index, rows, columns, inputs, scale, todo, outputs, sums)
            if index == 0 and single:
                self._stage(dtype, LIMIT, *call)
            if todo.any():
                self._stage(np.dtype(np.float64), LATER_LIMIT if index and single else 1.0, *call)
                doubtful |= todo.any(axis=(2, 3))
            inputs = outputs
            window = stage.stage.window or (1, 1)
            scale = stage.unit / math.prod(window) ** 2
        found[:, rows, columns] = stage.unit * sums.transpose(2, 1, 0)
        return doubtful

    def _stage(
        self, dtype: np.dtype, limit: float, index: int, rows: slice, columns: slice, inputs: np.ndarray, scale: float,
        todo: np.ndarray, outputs: np.ndarray, sums: np.ndarray,
    ) -> None:  # fmt: skip
        stage = self.stages[index]
        channels = 0 if index else self.left.images.shape[1]
        x = self.left.images[rows, :channels].astype(dtype, copy=False)
        z = self.right.images[columns, :channels].astype(dtype, copy=False)
        rx, sx = (part[rows] for part in self.left.maps(index, dtype))
        rz, sz = (part[columns] for part in self.right.maps(index, dtype))
        codes.run_stage(
            stage.ops, stage.constants.astype(dtype), stage.stage.shape_in, stage.stage.window or (0, 0), self.tangent, x, z,
            rx, rz, sx, sz, inputs, dtype.type(scale), todo, dtype.type(limit), outputs.reshape(rows.stop - rows.start, 2, -1), sums,
            *self._scratch(index, dtype, channels),
        )  # fmt: skip

    def _scratch(self, index: int, dtype: np.dtype, channels: int) -> tuple[np.ndarray, ...]:
        key = (index, dtype)
        if key not in self.scratch:
            stage = self.stages[index]
            n = math.prod(stage.stage.shape_in)
            planes = _aligned(4, n + 2, dtype)
            saved = np.empty((2 * stage.depth, n), dtype)
            columns = _aligned(channels + 2 * len(stage.curves), 2 * n, dtype, 0)
            strips = np.empty((2, _strips(stage.stage)), dtype)
            self.scratch[key] = planes, saved, columns, strips, np.empty((2, n), np.uint8)
        return self.scratch[key]


def _strips(stage: Stage) -> int:
    """Sums over the windows' rows of the slabs of one dx."""
    return _pooled(stage)[0] ** 2 * stage.shape_out[1] if stage.window else 0


def _pooled(stage: Stage) -> Shape:
    rows, columns = stage.window or (1, 1)
    return stage.shape_out[0] // rows, stage.shape_out[1] // columns


def _stride(length: int, size: int) -> int:
    """Entries from one array of `length` to the next, so that equal places of several do not meet in one set of the first cache."""
    lines = -(-(length * size) // ALIGNED)
    return (lines + (5 - lines) % 64) * ALIGNED // size


def _aligned(rows: int, length: int, dtype: np.dtype, lead: int = 1) -> np.ndarray:
    """(rows, ≥ length) of which entry `lead` of every row begins a cache line."""
    size = dtype.itemsize
    stride = _stride(length, size) * size
    raw = np.zeros(rows * stride + 2 * ALIGNED, np.uint8)
    start = (-raw.ctypes.data - lead * size) % ALIGNED
    return raw[start : start + rows * stride].view(dtype).reshape(rows, stride // size)


def workspace_bytes(program: Program, n: int, m: int, itemsize: int, channels: int) -> int:
    """S and T of (n, m), both sides' images and maps, and each thread's scratch; bytes."""
    rows, columns = _block_size(program)
    rows, columns = min(rows, n), min(columns, m)
    pixels = [math.prod(stage.shape_in) for stage in program.stages]
    nodes = [sum(isinstance(op, (Rectify, Normalise)) for op in stage.ops) for stage in program.stages]
    apart = [_stride(p, 4) for p in pixels]
    maps = sum(2 * 8 * k * p for k, p in zip(nodes, apart, strict=True)) + 2 * itemsize * nodes[0] * apart[0]
    # both orders of the images, and while roots and inverses are made two more of the maps
    images = channels * itemsize * (pixels[0] + _stride(pixels[0], itemsize))
    sides = (n + m) * (images + maps) + 2 * 8 * max(n, m) * max(k * p for k, p in zip(nodes, apart, strict=True))
    pooled = [math.prod(_pooled(stage)) ** 2 for stage in program.stages[:-1]]
    # of the two dtypes that a block may run in
    planes = sum((6 + 4 * k + 4) * p * (8 + itemsize) for k, p in zip(nodes, pixels, strict=True))
    planes += sum(2 * _strips(stage) * (8 + itemsize) for stage in program.stages)
    block = (
        planes
        + 2 * 8 * rows * sum(pooled)
        + (rows + columns) * channels * pixels[0] * 8
        + rows * columns * max(pixels)
        + 2 * channels * pixels[0] * (8 + itemsize)
    )
    return 3 * 2 * 8 * n * m + sides + threads.current() * block
