"""S and T of pairs of images at the readout of a convolutional network, on the CPU: compiled stages on folded slabs.

For networks of activations with one kink at 0 (`takes`); other networks go through `planes.reference`.
The first stage runs in the dtype of the images. Later stages, which are small, run in float64. So do those float32 slabs of the first
stage in which too many correlations are near ±1, where κ₀ turns an error ε into ε/√(1 − c²). Sums over pixels are float64. Called by
`kernels.convolutional`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TypeAlias

import numpy as np

from ntkdask import threads
from ntkdask.kernels.planes.layout import SideArrays, aligned, lay_out, row_stride
from ntkdask.kernels.planes.program import Program
from ntkdask.kernels.planes.stage import Scratch, Slabs, Sums, run_stage
from ntkdask.kernels.planes.tables import CompiledStage, compiled_stages, foldable

ROWS, POOLED_ROWS, FLAT_COLUMNS = 16, 4, 64
"""Images x that meet one image z at a time, so that their maps stay in a core's second cache: ROWS, or POOLED_ROWS where pooled slabs
share it. FLAT_COLUMNS: images z that follow one another in a block with a Flatten readout, which takes one slab of a pair."""

LIMIT = 100.0
"""Mean of 1/√(1 − c²) in a slab above which float32 is not enough: the error of κ₀ is up to 1.5e-7/π times that, 5e-6."""

LATER_LIMIT = 0.01
"""Share of entries near ±1 in a slab of a later stage above which a pair that began in float32 is done again in float64."""

ALONE = 4
"""Images that a thread lets meet themselves at a time: their maps are all that `diagonal` holds."""

FEW_PIXELS = 4
"""Pixels of a pooling window up to which the sums of pairs that began in float32 stay in float32."""

FLOAT64 = np.dtype(np.float64)

Block: TypeAlias = tuple[slice, slice]
"""Rows and columns of pairs (x_i, z_j)."""


def takes(program: Program) -> bool:
    """Whether the compiled stages can run the program: not circular convolutions of images that their strides do not divide."""
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
    """S and T of all pairs of images at the readout.

    Parameters
    ----------
    program : Program
        One that `takes` accepts.
    x : array (n, H, W, C), float32 or float64
        Images on the left.
    y : array (m, H, W, C), float32 or float64, or None
        Images on the right; None for x with itself, where the diagonal may be anything finite.
    maps_x, maps_y : list of arrays (n, H_k, W_k), float64
        Variances of x and of y before every activation and LayerNorm; maps_y is not read where y is None.
    divisor : float
        What products of images are divided by.
    tangent : bool
        Whether T is computed; otherwise it is 0.

    Returns
    -------
    tuple of two arrays (n, m), float64
        S and T.
    """
    tables = compiled_stages(program)
    left = lay_out(tables, x, maps_x, divisor, True)
    right = lay_out(tables, x if y is None else y, maps_x if y is None else maps_y, 1.0, False)
    totals = np.zeros((2, x.shape[0], right.images.shape[0]))
    size = _block_size(program)
    blocks: SimpleQueue[Block] = SimpleQueue()
    count = 0
    for block in _blocks(x.shape[0], right.images.shape[0], *size, y is None):
        blocks.put(block)
        count += 1
    workers = [_Worker(tables, left, right, size, tangent) for _ in range(min(threads.current(), count))]

    def work(worker: _Worker) -> None:
        while True:
            try:
                block = blocks.get_nowait()
            except Empty:
                return
            worker.run(block, totals)

    threads.on_threads(work, workers)
    pixels = math.prod(program.stages[-1].shape_out)
    totals /= pixels**2 if program.gap else pixels
    if y is None:
        below = np.tril(np.ones(totals.shape[1:], bool), -1)
        totals[:, below] = totals.transpose(0, 2, 1)[:, below]
    return totals[0], totals[1]


def diagonal(
    program: Program, x: np.ndarray, maps: list[np.ndarray], divisor: float, tangent: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(S, T) float64 (n,) at the readout of every image (n, H, W, C) with itself, in float64, where equal patches have c = 1.

    maps, divisor and tangent are those of `readout`.
    """
    tables = compiled_stages(program)
    totals = np.empty((2, x.shape[0]))

    def work(part: slice) -> None:
        images, own = x[part].astype(np.float64), [v[part] for v in maps]
        sides = lay_out(tables, images, own, divisor, True), lay_out(tables, images, own, 1.0, False)
        worker = _Worker(tables, *sides, (1, 1), tangent)
        for i in range(images.shape[0]):
            pair, _ = worker.pairs(slice(i, i + 1), slice(i, i + 1), images.dtype)
            totals[:, part.start + i] = pair[:, 0, 0]

    threads.on_threads(work, [slice(first, first + ALONE) for first in range(0, x.shape[0], ALONE)])
    pixels = math.prod(program.stages[-1].shape_out)
    return tuple(totals / (pixels**2 if program.gap else pixels))


def _block_size(program: Program) -> tuple[int, int]:
    """Rows and columns of a block of pairs."""
    if len(program.stages) > 1:
        return POOLED_ROWS, 1
    return ROWS, 1 if program.gap else FLAT_COLUMNS


def _blocks(n: int, m: int, rows: int, columns: int, symmetric: bool) -> Iterator[Block]:
    """Blocks that cover the pairs, or of a symmetric matrix those above the diagonal, long columns first."""
    for start in reversed(range(0, m, columns)):
        stop = min(start + columns, m)
        last = stop - 1 if symmetric else n
        for first in range(0, last, rows):
            yield slice(first, min(first + rows, last)), slice(start, stop)


class _Worker:
    """One thread's scratch, in which the stages run on one block of pairs after another."""

    def __init__(
        self,
        stages: tuple[CompiledStage, ...],
        left: SideArrays,
        right: SideArrays,
        size: tuple[int, int],
        tangent: bool,
    ) -> None:
        self.stages, self.left, self.right, self.tangent = stages, left, right, tangent
        self.dtype = left.images.dtype
        self.scratch: dict[tuple[int, np.dtype], Scratch] = {}
        rows, columns = size
        self.pooled = {
            dtype: [np.empty((rows, 2, stage.pooled), _slab_dtype(stages, dtype)) for stage in stages]
            for dtype in {self.dtype, FLOAT64}
        }
        self.sums = np.empty(columns * rows * 2)

    def run(self, block: Block, totals: np.ndarray) -> None:
        """S and T of a block's pairs into totals (2, n, m), summed over the pixels of the readout."""
        rows, columns = block
        wide = self.left.wide[rows].any() or self.right.wide[columns].any()
        totals[:, *block], doubtful = self.pairs(*block, FLOAT64 if wide else self.dtype)
        for row, column in np.argwhere(doubtful) + [side.start for side in block]:
            alone = slice(row, row + 1), slice(column, column + 1)
            totals[:, *alone] = self.pairs(*alone, FLOAT64)[0]

    def pairs(self, rows: slice, columns: slice, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Run all stages on a block, the first of them in `dtype`.

        Returns S and T (2, rows, columns), and for each pair (rows, columns) whether a later stage leaves it in doubt.
        """
        shape = columns.stop - columns.start, rows.stop - rows.start
        single = dtype == np.float32
        doubtful = np.zeros(shape, bool)
        slabs = self.pooled[dtype]
        nothing = slabs[0][: shape[1], :, :0]
        inputs, scale = nothing, 1.0
        # contiguous also for a ragged block: for arrays with gaps the stage would be compiled once more
        readout_sums = self.sums[: 2 * shape[0] * shape[1]].reshape(*shape, 2)
        readout_sums[:] = 0
        for index, stage in enumerate(self.stages):
            outputs = nothing
            if stage.window:
                outputs = slabs[index][: shape[1]]
                outputs[...] = 0
            sums = Sums(outputs, readout_sums)
            todo = np.broadcast_to(stage.wanted, (*shape, *stage.wanted.shape)).copy()
            if index == 0 and single:
                self._stage(index, (rows, columns), Slabs(inputs, dtype.type(scale)), todo, LIMIT, sums)
            if todo.any():
                limit = LATER_LIMIT if index and single else 1.0
                self._stage(index, (rows, columns), Slabs(inputs, FLOAT64.type(scale)), todo, limit, sums)
                doubtful |= todo.any(axis=(2, 3))
            inputs = outputs
            scale = stage.unit / math.prod(stage.window or (1, 1)) ** 2
        return stage.unit * readout_sums.transpose(2, 1, 0), doubtful.T

    def _stage(self, index: int, block: Block, before: Slabs, todo: np.ndarray, limit: float, sums: Sums) -> None:
        """Run a stage on a block, in the dtype of the inputs' scale; arguments as of `run_stage`."""
        dtype, (rows, columns) = before.scale.dtype, block
        channels = 0 if index else self.left.images.shape[1]
        run_stage(
            self.stages[index].tables(dtype),
            self.left.rows(rows, index, channels, dtype),
            self.right.rows(columns, index, channels, dtype),
            before,
            todo,
            limit,
            sums,
            self._scratch(index, dtype, channels),
            self.tangent,
        )

    def _scratch(self, index: int, dtype: np.dtype, channels: int) -> Scratch:
        """The scratch of a stage in `dtype`, made at its first use."""
        key = (index, dtype)
        if key not in self.scratch:
            stage = self.stages[index]
            n = stage.pixels
            self.scratch[key] = Scratch(
                aligned(4, n + 2, dtype),
                np.empty((2 * stage.depth, n), dtype),
                aligned(channels + 2 * len(stage.curves), 2 * n, dtype, 0),
                np.empty((2, stage.strips), dtype),
                np.empty((2 * len(stage.levels), n), np.uint8),
            )
        return self.scratch[key]


def _slab_dtype(stages: tuple[CompiledStage, ...], dtype: np.dtype) -> np.dtype:
    """Dtype of the pooled slabs of pairs that begin in `dtype`: that dtype, with half the traffic, where sums are over few pixels."""
    small = all(math.prod(stage.window or (1, 1)) <= FEW_PIXELS for stage in stages)
    return dtype if small else FLOAT64


def workspace_bytes(program: Program, n: int, m: int, itemsize: int, channels: int) -> int:
    """Bytes of S and T of (n, m), of both sides' images and maps, and of each thread's scratch."""
    rows, columns = _block_size(program)
    rows, columns = min(rows, n), min(columns, m)
    stages = compiled_stages(program)
    pixels, nodes = [stage.pixels for stage in stages], [len(stage.curves) for stage in stages]
    strides = [row_stride(p, 4) for p in pixels]
    maps = sum(2 * 8 * k * p for k, p in zip(nodes, strides, strict=True)) + 2 * itemsize * nodes[0] * strides[0]
    # making roots and inverses takes two more of the largest map
    images = channels * itemsize * row_stride(pixels[0], itemsize)
    sides = (n + m) * (images + maps) + 2 * 8 * max(n, m) * max(k * p for k, p in zip(nodes, strides, strict=True))
    # a block may run in two dtypes, and has scratch for both
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
    """Bytes of `diagonal` on n images: both sides and the scratch of each thread."""
    images = min(n, ALONE)
    return min(threads.current(), -(-n // ALONE)) * workspace_bytes(program, images, images, 8, channels) + 4 * 8 * n
