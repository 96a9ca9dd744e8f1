"""S and T of pairs of images at the readout of a convolutional network, on the CPU: stages of compiled loops over folded slabs.

For networks of activations with one kink at 0 (`takes`); the rest goes through `planes`.
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
from ntkdask.kernels.planes import stage as codes
from ntkdask.kernels.planes.program import Program
from ntkdask.kernels.planes.tables import CompiledStage, compiled_stages, foldable

ROWS, POOLED_ROWS, FLAT_COLUMNS = 16, 4, 64
"""Images x that meet one image z at a time: their maps stay in a core's second cache, beside pooled slabs where there are any. For a
Flatten readout, where one slab of a pair is all there is, as many images z one after the other."""

LIMIT = 100.0
"""Mean of 1/√(1 − c²) in a slab above which float32 is not enough: the error of κ₀ is up to 1.5e-7/π times that, 5e-6."""

LATER_LIMIT = 0.01
"""Share of a later slab's entries near ±1 above which a pair that began in float32 is done again in float64."""

ALONE = 4
"""Images that a thread lets meet themselves at a time: their maps are all that `diagonal` holds."""

SIDE_ROWS = 16
"""Images that a thread lays out at a time, in a core's second cache."""

FEW_PIXELS = 4
"""Of windows over which sums stay in float32 where pairs began in it."""

ALIGNED = 64
"""Bytes of a vector and of a cache line."""

Block: TypeAlias = tuple[slice, slice]


def takes(program: Program) -> bool:
    """Whether the passes can run it: all but circular convolutions of what strides do not divide."""
    return foldable(program)


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
    tables = compiled_stages(program)
    left = _side(tables, x, maps_x, divisor, True)
    right = _side(tables, x if y is None else y, maps_x if y is None else maps_y, 1.0, False)
    found = np.zeros((2, x.shape[0], right.images.shape[0]))
    size = _block_size(program)
    blocks: SimpleQueue[Block] = SimpleQueue()
    count = 0
    for block in _blocks(x.shape[0], right.images.shape[0], *size, y is None):
        blocks.put(block)
        count += 1
    run = [_Worker(tables, left, right, size, tangent).run for _ in range(min(threads.current(), count))]

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


def diagonal(
    program: Program, x: np.ndarray, maps: list[np.ndarray], divisor: float, tangent: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(S, T) float64 (n,) at the readout of every image (n, H, W, C) with itself, in float64, where equal patches have c = 1.

    maps, divisor, tangent: as of `readout`.
    """
    tables = compiled_stages(program)
    found = np.empty((2, x.shape[0]))

    def work(part: slice) -> None:
        images, own = x[part].astype(np.float64), [v[part] for v in maps]
        sides = _side(tables, images, own, divisor, True), _side(tables, images, own, 1.0, False)
        worker = _Worker(tables, *sides, (1, 1), tangent)
        for i in range(images.shape[0]):
            pair, _ = worker.pairs(slice(i, i + 1), slice(i, i + 1), images.dtype)
            found[:, part.start + i] = pair[:, 0, 0]

    threads.on_threads(work, [slice(first, first + ALONE) for first in range(0, x.shape[0], ALONE)])
    pixels = math.prod(program.stages[-1].shape_out)
    return tuple(found / (pixels**2 if program.gap else pixels))


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
    stages: tuple[CompiledStage, ...], x: np.ndarray, maps: list[np.ndarray], divisor: float, left: bool
) -> _Side:
    n, h, w, channels = x.shape
    frame, size = stages[0].frame, stages[0].pixels
    images = np.zeros((n, channels, _stride(size, x.dtype.itemsize)), x.dtype)
    root = [np.zeros((n, len(stage.curves), _stride(stage.pixels, 4))) for stage in stages]
    inverse = [np.zeros_like(s) for s in root]

    def fill(part: slice) -> None:
        given = images[part, :, :size].reshape(-1, channels, *frame)[:, :, :h, :w]
        np.divide(x[part].transpose(0, 3, 1, 2), x.dtype.type(divisor), out=given)
        for stage, every, over in zip(stages, root, inverse, strict=True):
            s = every[part]
            for k, (node, (rows, columns)) in enumerate(zip(maps[stage.nodes], stage.node_frames, strict=True)):
                v = s[:, k, : rows * columns].reshape(-1, rows, columns)
                np.divide(node[part], stage.units[k], out=v[:, : node.shape[1], : node.shape[2]])
            np.sqrt(s, out=s)
            np.divide(1.0, s, out=over[part], where=s > 0)
            if left:
                s *= np.array(stage.curves)[:, None]

    threads.on_threads(fill, [slice(first, first + SIDE_ROWS) for first in range(0, n, SIDE_ROWS)])
    single = None
    if x.dtype == np.float32:
        single = (inverse[0].astype(np.float32), root[0].astype(np.float32))
    return _Side(images, inverse, root, single)


class _Worker:
    """A thread's scratch, and the stages run in it on one block of pairs after the other."""

    def __init__(
        self, stages: tuple[CompiledStage, ...], left: _Side, right: _Side, size: tuple[int, int], tangent: bool
    ) -> None:
        self.stages, self.left, self.right, self.tangent = stages, left, right, tangent
        self.dtype = left.images.dtype
        self.scratch: dict[tuple[int, np.dtype], tuple[np.ndarray, ...]] = {}
        rows, columns = size
        self.pooled = {
            dtype: [np.empty((rows, 2, stage.pooled), _slab_dtype(stages, dtype)) for stage in stages]
            for dtype in {self.dtype, np.dtype(np.float64)}
        }
        self.sums = np.empty(columns * rows * 2)

    def run(self, block: Block, found: np.ndarray) -> None:
        """S and T of the pairs of a block into found (2, n, m), summed over the readout's pixels."""
        found[:, *block], doubtful = self.pairs(*block, self.dtype)
        for row, column in np.argwhere(doubtful) + [side.start for side in block]:
            alone = slice(row, row + 1), slice(column, column + 1)
            found[:, *alone] = self.pairs(*alone, np.dtype(np.float64))[0]

    def pairs(self, rows: slice, columns: slice, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(2, rows, columns) S and T after all stages, the first of them in `dtype`; which pairs a later stage leaves in doubt."""
        count = columns.stop - columns.start, rows.stop - rows.start
        single = dtype == np.float32
        doubtful = np.zeros(count, bool)
        slabs = self.pooled[dtype]
        nothing = slabs[0][: count[1], :, :0]
        inputs, scale = nothing, 1.0
        # whole, also of a ragged block: for arrays with gaps the stage would be compiled once more
        sums = self.sums[: 2 * count[0] * count[1]].reshape(*count, 2)
        sums[:] = 0
        for index, stage in enumerate(self.stages):
            outputs = nothing
            if stage.window:
                outputs = slabs[index][: count[1]]
                outputs[...] = 0
            todo = np.broadcast_to(stage.wanted, (*count, *stage.wanted.shape)).copy()
            call = (index, rows, columns, inputs, scale, todo, outputs, sums)
            if index == 0 and single:
                self._stage(dtype, LIMIT, *call)
            if todo.any():
                self._stage(np.dtype(np.float64), LATER_LIMIT if index and single else 1.0, *call)
                doubtful |= todo.any(axis=(2, 3))
            inputs = outputs
            scale = stage.unit / math.prod(stage.window or (1, 1)) ** 2
        return stage.unit * sums.transpose(2, 1, 0), doubtful.T

    def _stage(
        self,
        dtype: np.dtype,
        limit: float,
        index: int,
        rows: slice,
        columns: slice,
        inputs: np.ndarray,
        scale: float,
        todo: np.ndarray,
        outputs: np.ndarray,
        sums: np.ndarray,
    ) -> None:
        stage = self.stages[index]
        channels = 0 if index else self.left.images.shape[1]
        x = self.left.images[rows, :channels].astype(dtype, copy=False)
        z = self.right.images[columns, :channels].astype(dtype, copy=False)
        rx, sx = (part[rows] for part in self.left.maps(index, dtype))
        rz, sz = (part[columns] for part in self.right.maps(index, dtype))
        codes.run_stage(
            stage.ops,
            stage.constants.astype(dtype),
            stage.levels,
            stage.ends,
            self.tangent,
            x,
            z,
            rx,
            rz,
            sx,
            sz,
            inputs,
            dtype.type(scale),
            todo,
            limit,
            outputs,
            sums,
            *self._scratch(index, dtype, channels),
        )

    def _scratch(self, index: int, dtype: np.dtype, channels: int) -> tuple[np.ndarray, ...]:
        key = (index, dtype)
        if key not in self.scratch:
            stage = self.stages[index]
            n = stage.pixels
            planes = _aligned(4, n + 2, dtype)
            saved = np.empty((2 * stage.depth, n), dtype)
            columns = _aligned(channels + 2 * len(stage.curves), 2 * n, dtype, 0)
            strips = np.empty((2, stage.strips), dtype)
            self.scratch[key] = planes, saved, columns, strips, np.empty((2 * len(stage.levels), n), np.uint8)
        return self.scratch[key]


def _slab_dtype(stages: tuple[CompiledStage, ...], dtype: np.dtype) -> np.dtype:
    """Of pooled slabs of pairs that begin in `dtype`: sums over few pixels need no more, and half the traffic of float64."""
    small = all(math.prod(stage.window or (1, 1)) <= FEW_PIXELS for stage in stages)
    return dtype if small else np.dtype(np.float64)


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
    stages = compiled_stages(program)
    pixels, nodes = [stage.pixels for stage in stages], [len(stage.curves) for stage in stages]
    apart = [_stride(p, 4) for p in pixels]
    maps = sum(2 * 8 * k * p for k, p in zip(nodes, apart, strict=True)) + 2 * itemsize * nodes[0] * apart[0]
    # while roots and inverses are made two more of the maps
    images = channels * itemsize * _stride(pixels[0], itemsize)
    sides = (n + m) * (images + maps) + 2 * 8 * max(n, m) * max(k * p for k, p in zip(nodes, apart, strict=True))
    # of the two dtypes that a block may run in
    planes = sum((6 + 4 * k + 4) * p * (8 + itemsize) for k, p in zip(nodes, pixels, strict=True))
    planes += sum(2 * stage.strips * (8 + itemsize) for stage in stages)
    block = (
        planes
        + 2 * (8 if itemsize == 8 else 12) * rows * sum(stage.pooled for stage in stages)
        + (rows + columns) * channels * pixels[0] * 8
        + rows * columns * max(pixels)
        + 2 * channels * pixels[0] * (8 + itemsize)
    )
    return 3 * 2 * 8 * n * m + sides + threads.current() * block


def diagonal_bytes(program: Program, n: int, channels: int) -> int:
    """Bytes of `diagonal` on n images: each thread's sides and scratch."""
    images = min(n, ALONE)
    return min(threads.current(), -(-n // ALONE)) * workspace_bytes(program, images, images, 8, channels) + 4 * 8 * n
