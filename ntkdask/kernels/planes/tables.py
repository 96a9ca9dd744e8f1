"""The stages of a network as tables for the compiled loops over folded slabs: pure planning, no images.

A slab (dy, dx) is folded modulo a frame: the image, or a little more, so that the strides of the stage divide it and every output
plane reads one slab of the input. Entries beyond the image, where the frame is larger, count as 0. `planes.stage` says what the
columns of the tables are and runs them; `planes.host` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ntkdask.kernels.planes import stage as codes
from ntkdask.kernels.planes.program import Add, Convolve, Exchange, Normalise, Op, Program, Rectify, Save, Shape, Stage

SMALLEST_UNIT = 1e-12
"""Smallest unit of S: a factor that would make it smaller is multiplied out instead, so that values stay far from float32's limits."""


@dataclass(frozen=True)
class CompiledStage:
    """A stage as tables, of which `planes.stage` names the columns.

    Parameters
    ----------
    ops : array (count, 14), int64
        The operations.
    constants : array (count, 5), float64
        Their factors.
    levels : array (levels, 4), int64
        The frames that the image has in the course of the stage.
    nodes : slice
        The stage's variance maps among those of the program.
    node_frames : tuple of (rows, columns)
        The frame of each variance map.
    units : tuple of float
        The unit in which S is counted where each variance map is read.
    curves : tuple of float
        curve/π of each variance map's activation, by which its √v on the left side is multiplied.
    unit : float
        The unit in which S and T are counted after the last operation.
    frame : (rows, columns)
        Of the inputs.
    wanted : array (H, W), uint8
        1 for each slab of the inputs to compute.
    ends : tuple of 6 int
        Image, pooling window and pooled frame at the end, as in `planes.stage.Tables`.
    depth : int
        The most residual paths that are open at once.
    is_wide : bool
        `program.Stage.is_wide`.
    """

    ops: np.ndarray
    constants: np.ndarray
    levels: np.ndarray
    nodes: slice
    node_frames: tuple[Shape, ...]
    units: tuple[float, ...]
    curves: tuple[float, ...]
    unit: float
    frame: Shape
    wanted: np.ndarray
    ends: tuple[int, int, int, int, int, int]
    depth: int
    is_wide: bool

    def tables(self, dtype: np.dtype) -> codes.Tables:
        """The arguments of `planes.stage.run_stage` for slabs of `dtype`."""
        return codes.Tables(self.ops, self.constants.astype(dtype), self.levels, self.ends)

    @property
    def pixels(self) -> int:
        """Entries of a slab at the beginning of the stage, where slabs are largest."""
        return math.prod(self.frame)

    @property
    def window(self) -> Shape | None:
        """(rows, columns) of the pooling window at the end; None without pooling."""
        return (self.ends[2], self.ends[3]) if self.ends[2] else None

    @property
    def pooled(self) -> int:
        """Entries of all slabs of the pooled image; 0 without pooling."""
        return (self.ends[4] * self.ends[5]) ** 2 if self.window else 0

    @property
    def strips(self) -> int:
        """Entries of the sums over the rows of the windows, for all slabs of one dx; 0 without pooling."""
        if not self.window:
            return 0
        last = self.levels[self.ops[-1, codes.LEVEL] if len(self.ops) else 0]
        return self.ends[4] ** 2 * int(last[codes.WIDE])


def frame_of(stage: Stage) -> Shape:
    """The sides of the stage's input image, each rounded up to a multiple of the stage's stride."""
    rows, columns = (-(-length // s) * s for length, s in zip(stage.shape_in, stage.stride, strict=True))
    return rows, columns


def foldable(program: Program) -> bool:
    """Whether all stages have folded slabs: a circular convolution wraps at the image's border, which then has to be the frame's."""
    return not any(
        isinstance(op, Convolve) and op.conv.padding == "circular" and frame != op.shape_in
        for stage in program.stages
        for op, frame in _frames(stage)
    )


def _frames(stage: Stage) -> Iterator[tuple[Op, Shape]]:
    """Every operation, and the frame of its input."""
    frame, saved = frame_of(stage), []
    for op in stage.ops:
        yield op, frame
        if isinstance(op, Convolve):
            frame = frame[0] // op.conv.strides[0], frame[1] // op.conv.strides[1]
        elif isinstance(op, Save):
            saved.append(frame)
        elif isinstance(op, Exchange):
            frame, saved[-1] = saved[-1], frame
        elif isinstance(op, Add):
            saved.pop()


def compiled_stages(program: Program) -> tuple[CompiledStage, ...]:
    """The tables of every stage of a program that is `foldable`."""
    stages: list[CompiledStage] = []
    first = 0
    following = [*program.stages[1:], None]
    for stage, after in zip(program.stages, following, strict=True):
        tables = _Tables(stage)
        nodes = slice(first, first + len(tables.curves))
        window = stage.window or (0, 0)
        pooled = frame_of(after) if after else (0, 0)
        stages.append(
            CompiledStage(
                np.array(tables.ops, np.int64).reshape(-1, 14),
                np.array(tables.constants, np.float64).reshape(-1, 5),
                np.array([(*frame, *stride) for stride, frame in tables.levels.items()], np.int64),
                nodes,
                tuple(tables.frames),
                tuple(tables.units),
                tuple(tables.curves),
                tables.unit,
                frame_of(stage),
                _wanted(stage),
                (*stage.shape_out, *window, *pooled),
                tables.deepest,
                stage.is_wide,
            )
        )
        first += len(tables.curves)
    return tuple(stages)


class _Tables:
    """Builds the rows of the tables of one stage.

    A 3×3 convolution without bias before a normalised ReLU only sums: its σ_w²/q² and the ReLU's curve become part of the unit in
    which S and T are counted. Not so in a stage with residual paths, which would have to agree on a unit.
    """

    def __init__(self, stage: Stage) -> None:
        self.ops: list[tuple[int, ...]] = []
        self.constants: list[tuple[float, ...]] = []
        self.units: list[float] = []
        self.curves: list[float] = []
        self.frames: list[Shape] = []
        self.levels: dict[Shape, Shape] = {(1, 1): frame_of(stage)}
        self.unit, self.paths = 1.0, any(isinstance(op, Save) for op in stage.ops)
        self.whole = frame_of(stage)
        self.depth = self.deepest = 0
        self.fused = False
        end = self.whole[0] // stage.stride[0], self.whole[1] // stage.stride[1]
        pairs = [*_frames(stage)]
        following: list[tuple[Op | None, Shape]] = [*pairs[1:], (None, end)]
        for (op, frame), (next_op, after) in zip(pairs, following, strict=False):
            self._add(op, frame, after, next_op)

    def _level(self, frame: Shape) -> int:
        """The number of a frame, which is the stage's frame divided by a stride; a new one is added."""
        stride = self.whole[0] // frame[0], self.whole[1] // frame[1]
        self.levels.setdefault(stride, frame)
        return list(self.levels).index(stride)

    def _add(self, op: Op, frame: Shape, after: Shape, following: Op | None) -> None:
        """Add the rows of an operation on slabs of `frame`, whose output has the frame `after`, before the operation `following`."""
        level = self._level(after)
        if isinstance(op, Convolve):
            self._convolve(op, frame, level, following)
        elif isinstance(op, (Rectify, Normalise)):
            self.units.append(self.unit)
            self.frames.append(frame)
            node = len(self.frames) - 1
            if isinstance(op, Normalise):
                # S over √(vv') is a pure number whatever the unit of S was
                self.curves.append(1.0)
                self._append(codes.NORMALISE, level, node=node)
                self.unit = 1.0
            elif self.fused:
                self.curves.append(1.0 / math.pi)
                self.unit *= op.curve
            else:
                self.curves.append(op.curve / math.pi)
                self._append(codes.RECTIFY, level, node=node, curve=op.curve, line=op.line)
            self.fused = False
        else:
            self.depth += isinstance(op, Save) - isinstance(op, Add)
            self.deepest = max(self.depth, self.deepest)
            self._append({Save: codes.SAVE, Exchange: codes.EXCHANGE, Add: codes.ADD}[type(op)], level)

    def _convolve(self, op: Convolve, frame: Shape, level: int, following: Op | None) -> None:
        """Add the row of a convolution, or of a convolution and the ReLU that follows it in one."""
        (rows, columns), conv = op.conv.filter, op.conv
        scale, circular = conv.weight_variance / (rows * columns), conv.padding == "circular"
        whole = op.shape_in == op.shape_out == frame and conv.strides == (1, 1)
        three = whole and (rows, columns, *op.before, circular) == (3, 3, 1, 1, False)
        plain = conv.bias_variance == 0 and conv.trainable and isinstance(following, Rectify) and following.line == 0
        filter_and_steps = (rows, columns, *op.before, int(circular)), (*conv.strides, *op.shape_in, *op.shape_out)
        if three and plain and not self.paths and self.unit * scale > SMALLEST_UNIT:
            self.unit *= scale
            self._append(codes.SUM_RECTIFY, level, *filter_and_steps, node=len(self.curves))
            self.fused = True
            return
        self._append(
            codes.CONVOLVE_3 if three else codes.CONVOLVE,
            level,
            *filter_and_steps,
            scale=scale,
            bias=conv.bias_variance / self.unit,
            trainable=float(conv.trainable),
        )

    def _append(
        self,
        code: int,
        level: int,
        geometry: tuple[int, ...] = (0,) * 5,
        steps: tuple[int, ...] = (1, 1, 0, 0, 0, 0),
        node: int = 0,
        scale: float = 0.0,
        bias: float = 0.0,
        trainable: float = 0.0,
        curve: float = 0.0,
        line: float = 0.0,
    ) -> None:
        """Append a row to `ops` and one to `constants`; names are those of the columns in `planes.stage`.

        geometry: filter rows, filter columns, rows above, columns before, circular. steps: strides, then the image's sides before
        and after.
        """
        self.ops.append((code, *geometry, node, level, *steps))
        self.constants.append((scale, bias, trainable, curve, line))


def _wanted(stage: Stage) -> np.ndarray:
    """(H, W) uint8: 1 for each slab of the inputs that holds a plane which is read by an output plane within the stage's reach."""
    axes = []
    for length, reach, stride in zip(frame_of(stage), stage.reach, stage.stride, strict=True):
        offsets = np.arange(length)
        furthest = stride * reach
        axes.append((offsets % stride == 0) & ((offsets <= furthest) | (length - offsets <= furthest)))
    return (axes[0][:, None] & axes[1]).astype(np.uint8)
