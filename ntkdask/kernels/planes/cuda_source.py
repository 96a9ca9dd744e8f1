"""CUDA C++ for the stages of convolutional networks: each stage's constants, generated, before folded.cu or general.cu.

`folded.cu` gives each slab a warp and its registers; it takes convolutions of stride 1 with "same" or "circular" padding on images of
at most 32×32, without residuals. `general.cu` gives each plane a block and its shared memory, and takes the rest. Pure text and
arithmetic, no arrays; `planes.device` launches the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources

from ntkdask.kernels.planes.program import Add, Convolve, Exchange, Normalise, Op, Program, Rectify, Save, Shape, Stage

LANES = 32
GENERAL_THREADS = 256
FOLDED_THREADS = {4: 128, 8: 128}
"""Threads of a block of the last stage, by the item size: a slab takes 64 registers of each thread in float32 and 128 in float64."""
FOLDED_BLOCKS = {4: 4, 8: 2}
"""Blocks of the last stage that a multiprocessor should hold, by the item size; this caps their registers."""
POOLED_THREADS = {4: 512, 8: 256}
REALS = {4: "float", 8: "double"}


@dataclass(frozen=True)
class StageCode:
    """A stage as CUDA C++, and how to launch it.

    Parameters
    ----------
    stage : Stage
        The stage.
    source : str
        Its CUDA C++.
    itemsize : int
        4 for planes of float32, 8 for float64.
    folded : bool
        Whether it is for folded.cu; otherwise for general.cu.
    offsets : tuple of (dy, dx)
        The output planes to compute; residues modulo the output image where the planes are slabs.
    nodes : tuple of (H, W)
        Shapes of the stage's variance maps.
    first_node : int
        Where they begin among those of the program.
    threads : int
        Of a block.
    shared_bytes : int
        Dynamic shared memory of a block.
    addends : int
        How many arrays add up to the pooled one: 2 for folded.cu, where each block writes its own planes and what it carries to the
        next.
    gain : float
        The most by which the mean of |T| grows in the stage, apart from its `divisors`.
    divisors : tuple of int
        Numbers of the variance maps of its LayerNorms.
    """

    stage: Stage
    source: str
    itemsize: int
    folded: bool
    offsets: tuple[Shape, ...]
    nodes: tuple[Shape, ...]
    first_node: int
    threads: int
    shared_bytes: int
    addends: int
    gain: float
    divisors: tuple[int, ...]

    @property
    def pooled(self) -> Shape | None:
        """(H, W) after the pooling; None for the last stage."""
        window = self.stage.window
        return window and (self.stage.shape_out[0] // window[0], self.stage.shape_out[1] // window[1])

    @property
    def seen(self) -> int:
        """Number of entries of the output planes that are computed."""
        h, w = self.stage.shape_out
        if _foldable(self.stage):
            return len(self.offsets) * h * w
        return sum((h - abs(dy)) * (w - abs(dx)) for dy, dx in self.offsets)

    @property
    def all_offsets(self) -> bool:
        """Whether every entry of the output is computed."""
        return all(r == n - 1 for r, n in zip(self.stage.reach, self.stage.shape_out, strict=True))


def cuda_text(name: str) -> str:
    """A CUDA C++ file of this folder."""
    return resources.files("ntkdask.kernels.planes").joinpath(name).read_text()


def refusal(program: Program, itemsize: int, tangent: bool, shared_limit: int) -> str | None:
    """Why the code of this module cannot run the program, in one line; None where it can.

    shared_limit: bytes of shared memory that a block may have.
    """
    for stage in program.stages:
        if not _foldable(stage) and any(isinstance(op, Convolve) and op.conv.padding == "circular" for op in stage.ops):
            return (
                "a circular convolution in one stage with a 'valid' one or with a stride that does not divide the image: its planes "
                "are no slabs"
            )
    need = max(code.shared_bytes for code in stage_codes(program, itemsize, tangent, shared_limit))
    if need > shared_limit:
        return f"a plane needs {need} bytes of shared memory and a block has {shared_limit}"
    return None


def stage_codes(program: Program, itemsize: int, tangent: bool, shared_limit: int) -> tuple[StageCode, ...]:
    """The stages of a program for planes of float32 (itemsize 4) or float64 (8), without T unless `tangent`.

    Stages whose pooled planes take more than `shared_limit` bytes go to general.cu.
    """
    codes, state, first = [], _Flow(False, False), 0
    for stage in program.stages:
        count = sum(isinstance(op, (Rectify, Normalise)) for op in stage.ops)
        writer = _StepWriter(stage, state, program.nodes[first : first + count], first)
        writer.write()
        code = _folded(writer, itemsize, tangent)
        if code is None or code.shared_bytes > shared_limit:
            code = _general(writer, itemsize, tangent)
        codes.append(code)
        state, first = writer.flow, first + count
    return tuple(codes)


@dataclass(frozen=True)
class _Flow:
    """What is known of S and T at a point of the program. positive: S ≥ 0. live: T is not zero everywhere."""

    positive: bool
    live: bool


def _foldable(stage: Stage) -> bool:
    """Whether the stage's planes can be slabs modulo the image: no "valid" padding, and every stride divides its image."""
    convs = [op for op in stage.ops if isinstance(op, Convolve)]
    return all(
        op.conv.padding != "valid" and all(n % s == 0 for n, s in zip(op.shape_in, op.conv.strides, strict=True))
        for op in convs
    )


def _offsets(stage: Stage) -> tuple[Shape, ...]:
    """The output planes to compute; where they are slabs, their residues modulo the image, each once."""
    axes = []
    for n, reach in zip(stage.shape_out, stage.reach, strict=True):
        around = range(-reach, reach + 1)
        axes.append(sorted({d % n for d in around}) if _foldable(stage) else list(around))
    return tuple((dy, dx) for dy in axes[0] for dx in axes[1])


class _StepWriter:
    """Walks through a stage and writes the `Step`s of planes.cuh, and a list of the compiled forms that they use."""

    def __init__(self, stage: Stage, flow: _Flow, nodes: tuple[Shape, ...], first_node: int) -> None:
        self.stage, self.flow, self.nodes, self.first_node = stage, flow, nodes, first_node
        self.steps: list[str] = []
        self.boxes: list[str] = []
        self.rectifiers: list[str] = []
        self.shape, self.done = stage.shape_in, (1, 1)
        self.saved: list[tuple[_Flow, Shape, Shape]] = []
        self.deepest, self.largest, self.map, self.node = 0, math.prod(stage.shape_in), 0, 0
        self.offsets = _offsets(stage)
        self.gain: float = 1.0
        self.divisors: list[int] = []

    def write(self) -> None:
        """Fill `steps`, `boxes` and `rectifiers`; afterwards `flow` holds for the end of the stage."""
        for op in self.stage.ops:
            _WRITERS[type(op)](self, op)

    def code(self, source: str, itemsize: int, folded: bool, threads: int, shared_bytes: int) -> StageCode:
        """The `StageCode` of the stage that was written."""
        nodes = (self.nodes, self.first_node)
        launch = (threads, shared_bytes, 2 if folded else 1)
        return StageCode(
            self.stage, source, itemsize, folded, self.offsets, *nodes, *launch, self.gain, tuple(self.divisors)
        )

    def _times(self) -> Shape:
        """How many times the offset of the stage's output the offset at this point is."""
        return self.stage.stride[0] // self.done[0], self.stage.stride[1] // self.done[1]

    def _add(
        self, kind: str, numbers: tuple[int, int, int] = (0, 0, 0), floats: tuple[float, float, float] = (0.0, 0.0, 1.0)
    ) -> None:
        """Write a step that keeps shapes. numbers: variant, trainable, live. floats: first, second, gain."""
        self._add_step(kind, numbers, floats, (self.shape, self._times()), (0,) * 7)

    def _add_step(
        self,
        kind: str,
        numbers: tuple[int, int, int],
        floats: tuple[float, float, float],
        before: tuple[Shape, Shape],
        geometry: tuple[int, ...],
    ) -> None:
        """Write a step, its fields in the order of `Step`. before: shape and times before it. geometry: filter, strides, l, wraps."""
        variant, trainable, live = numbers
        fields = [
            kind,
            variant,
            self.map,
            trainable,
            live,
            *map(repr, map(float, floats)),
            *before[0],
            *self.shape,
            *geometry,
            *before[1],
            *self._times(),
        ]
        self.steps.append("{" + ", ".join(map(str, fields)) + "}")

    def _convolve(self, op: Convolve) -> None:
        """Write a convolution; T is live after it where it trains."""
        conv, before = op.conv, (self.shape, self._times())
        taps, wraps = math.prod(conv.filter), conv.padding == "circular"
        box = f"{conv.filter[0]}, {conv.filter[1]}, {op.before[0]}, {op.before[1]}, {str(wraps).lower()}"
        numbers = (_variant(self.boxes, box), int(conv.trainable), int(self.flow.live))
        # of a sum over entries, not of a mean: a stride leaves fewer entries
        gain = conv.weight_variance * math.prod(op.shape_out) / math.prod(op.shape_in)
        self.shape = op.shape_out
        self.done = (self.done[0] * conv.strides[0], self.done[1] * conv.strides[1])
        self.largest = max(self.largest, math.prod(self.shape))
        geometry = (*conv.filter, *conv.strides, *op.before, int(wraps))
        self._add_step("CONVOLVE", numbers, (conv.weight_variance / taps, conv.bias_variance, gain), before, geometry)
        self.flow = _Flow(self.flow.positive, self.flow.live or conv.trainable)
        self.gain *= conv.weight_variance

    def _rectify(self, op: Rectify) -> None:
        """Write an activation."""
        plain = op.curve == 1.0 and op.line == 0.0
        variant = _variant(self.rectifiers, f"{str(plain).lower()}, {str(self.flow.positive).lower()}")
        gain = max(abs(op.curve - op.line), abs(op.line))
        self._add("RECTIFY", (variant, 0, int(self.flow.live)), (op.curve, op.line, gain))
        # κ₁ ≥ 0 and κ₁(c) ≥ c: S becomes negative only where line < 0 and c < 0
        self.flow = _Flow(self.flow.positive or op.line >= 0, self.flow.live)
        self.gain *= gain
        self._next_node()

    def _normalise(self, op: Normalise) -> None:
        """Write a LayerNorm."""
        self._add("NORMALISE", floats=(0.0, 0.0, float(math.prod(self.shape)) ** 2))
        self.divisors.append(self.node)
        self._next_node()

    def _next_node(self) -> None:
        """Go on to the next variance map."""
        self.map, self.node = self.map + math.prod(self.nodes[self.node]), self.node + 1

    def _save(self, op: Save) -> None:
        """Write the beginning of a Residual."""
        self._add("SAVE")
        self.saved.append((self.flow, self.shape, self.done))
        self.deepest = max(self.deepest, len(self.saved))

    def _exchange(self, op: Exchange) -> None:
        """Write the change from the branch to the shortcut."""
        self._add("EXCHANGE")
        now = (self.flow, self.shape, self.done)
        self.flow, self.shape, self.done = self.saved[-1]
        self.saved[-1] = now

    def _end(self, op: Add) -> None:
        """Write the end of a Residual."""
        other = self.saved.pop()[0]
        self.flow = _Flow(self.flow.positive and other.positive, self.flow.live or other.live)
        self._add("ADD")


_WRITERS: dict[type[Op], Callable] = {
    Convolve: _StepWriter._convolve,
    Rectify: _StepWriter._rectify,
    Normalise: _StepWriter._normalise,
    Save: _StepWriter._save,
    Exchange: _StepWriter._exchange,
    Add: _StepWriter._end,
}


def _variant(forms: list[str], form: str) -> int:
    """The number of a compiled form, which is added where it is new."""
    if form not in forms:
        forms.append(form)
    return forms.index(form)


def _text(name: str, writer: _StepWriter, itemsize: int, tangent: bool, macros: Mapping[str, object]) -> str:
    """The source of a stage: macros, planes.cuh and the file `name`."""
    forms = {"PLANE_BOXES(F)": writer.boxes, "PLANE_RECTIFIERS(F)": writer.rectifiers}
    steps = writer.steps or ["{SAVE}"]  # C++ has no empty arrays; with PLANE_STEP_COUNT 0 the element is not run
    all_macros = {
        "PLANE_REAL": REALS[itemsize],
        "PLANE_TANGENT": int(tangent),
        **macros,
        **{macro: " ".join(f"F({k}, {form})" for k, form in enumerate(used)) for macro, used in forms.items()},
        "PLANE_STEPS": ", ".join(steps),
        "PLANE_STEP_COUNT": len(writer.steps),
    }
    lines = [f"#define {key} {value}" for key, value in all_macros.items()]
    return "\n".join([*lines, cuda_text("planes.cuh"), cuda_text(name)])


def _folded(writer: _StepWriter, itemsize: int, tangent: bool) -> StageCode | None:
    """The stage for folded.cu; None where it cannot take it."""
    stage = writer.stage
    (h, w), window = stage.shape_in, stage.window
    full = stage.reach == (h - 1, w - 1)
    plain = all(isinstance(op, (Convolve, Rectify, Normalise)) for op in stage.ops) and _foldable(stage)
    if (
        max(h, w) > LANES
        or stage.stride != (1, 1)
        or not plain
        or not (full or (window is None and stage.reach == (0, 0)))
    ):
        return None
    segment = 1 << (w - 1).bit_length()
    planes = w if full else 1
    threads, shared, blocks = FOLDED_THREADS[itemsize], 0, FOLDED_BLOCKS[itemsize]
    if window:
        pooled = (h // window[0], w // window[1])
        threads, planes, blocks = POOLED_THREADS[itemsize], pooled[1], 1
        shared = (1 + tangent) * 2 * pooled[1] * math.prod(pooled) * itemsize
    warps = min(threads // LANES, -(-planes // (LANES // segment)))
    height, width = window or (0, 0)
    macros = {
        "PLANE_THREADS": threads,
        "PLANE_BLOCKS": blocks,
        "PLANE_H": h,
        "PLANE_W": w,
        "PLANE_SEGMENT": segment,
        "PLANE_NORMALISES": int(bool(writer.divisors)),
        "PLANE_POOL_H": height,
        "PLANE_POOL_W": width,
    }
    text = _text("folded.cu", writer, itemsize, tangent, macros)
    return writer.code(text, itemsize, True, warps * LANES, shared)


def _general(writer: _StepWriter, itemsize: int, tangent: bool) -> StageCode:
    """The stage for general.cu."""
    stage, saved, parts = writer.stage, writer.deepest, 1 + tangent
    macros = {
        "PLANE_FOLDED": int(_foldable(stage)),
        "PLANE_H": stage.shape_in[0],
        "PLANE_W": stage.shape_in[1],
        "PLANE_OUT_H": stage.shape_out[0],
        "PLANE_OUT_W": stage.shape_out[1],
        "PLANE_STRIDE_H": stage.stride[0],
        "PLANE_STRIDE_W": stage.stride[1],
        "PLANE_LARGEST": writer.largest,
        "PLANE_SAVED": saved,
        "PLANE_MAPS": writer.map,
    }
    shared = 8 * GENERAL_THREADS + (2 + saved) * parts * writer.largest * itemsize
    text = _text("general.cu", writer, itemsize, tangent, macros)
    return writer.code(text, itemsize, False, GENERAL_THREADS, shared)
