"""The part of a network that works on images, as a program for the passes over offset planes: pure planning, no arrays.

Between poolings, entries of S and T with the offset δ = p' − p only meet entries with the same δ (with a stride s, output plane δ
reads input plane sδ), so a stage, all layers up to the next pooling, runs plane by plane. MATH.md §3. The passes on the CPU
(`plane_pass`) and on a GPU (`plane_device`) follow these stages; networks that they cannot take give None and go through `planes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ntkdask.networks import Activation, AvgPool, Conv, GlobalAvgPool, Layer, LayerNorm, Network, Residual

Shape: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Convolve:
    """S ← σ_w²·A[S] + σ_b², T ← σ_w²·A[T] + (S if trainable). before: l of MATH.md §1, rows and columns."""

    conv: Conv
    shape_in: Shape
    shape_out: Shape
    before: Shape


@dataclass(frozen=True)
class Rectify:
    """S ← curve·√(vv')·κ₁(c) − line·S, T ← T·(curve·κ₀(c) − line), c = S/√(vv'), from σ = −A·min(t, 0) + B·max(t, 0).

    curve = gain·(A + B)²/2, line = gain·A·B. node: which of the variance maps v is; 0 where a variance is 0.
    """

    curve: float
    line: float
    node: int
    shape: Shape


@dataclass(frozen=True)
class Normalise:
    """S ← S/√(vv'), T alike; 0 where a variance is 0. node: which of the variance maps v is."""

    node: int
    shape: Shape


@dataclass(frozen=True)
class Save:
    """Put a copy of S and T by: the branch of a Residual begins."""


@dataclass(frozen=True)
class Exchange:
    """Change S and T for those put by last: the branch has ended, the shortcut begins with what the branch began with."""


@dataclass(frozen=True)
class Add:
    """Add S and T put by last: the Residual ends."""


Op: TypeAlias = Convolve | Rectify | Normalise | Save | Exchange | Add


@dataclass(frozen=True)
class Stage:
    """Layers up to the next pooling. stride: of all its layers together, so that output plane δ reads input plane stride·δ.

    reach: output planes with |δ| ≤ reach, rows and columns, are wanted. window: of the pooling after it; None after the last.
    """

    shape_in: Shape
    ops: tuple[Op, ...]
    shape_out: Shape
    stride: Shape
    reach: Shape
    window: Shape | None


@dataclass(frozen=True)
class Program:
    """Stages, the variance maps (n, *shape) that they read, one a node, and the layers after the readout. gap: the readout is a
    GlobalAvgPool, otherwise a Flatten.
    """

    stages: tuple[Stage, ...]
    nodes: tuple[Shape, ...]
    gap: bool
    tail: tuple[Layer, ...]


def program(network: Network, shape: Shape) -> Program | None:
    """The stages for images of (H, W); None where a layer is not for the passes: an activation without slopes, a pooling within a
    Residual. InputError, naming the layer, where the images do not fit.
    """
    network.image_shapes(shape)
    readout = network.readout_position
    builder = _Builder(shape)
    if not builder.add(network.layers[:readout]):
        return None
    builder.end(None)
    gap = isinstance(network.layers[readout], GlobalAvgPool)
    stages = _with_reach(builder.stages, gap)
    return Program(stages, tuple(builder.nodes), gap, network.layers[readout + 1 :])


class _Builder:
    def __init__(self, shape: Shape) -> None:
        self.stages: list[Stage] = []
        self.nodes: list[Shape] = []
        self.shape = self.start = shape
        self.stride = (1, 1)
        self.ops: list[Op] = []

    def add(self, layers: tuple[Layer, ...], within: bool = False) -> bool:
        """Append the layers; False at the first that the passes cannot take. within: inside a Residual."""
        for layer in layers:
            if isinstance(layer, Conv):
                out = layer.output_shape(self.shape)
                self.ops.append(Convolve(layer, self.shape, out, layer.before(self.shape)))
                s = layer.strides
                self.shape, self.stride = out, (self.stride[0] * s[0], self.stride[1] * s[1])
            elif isinstance(layer, Activation):
                slopes = layer.sigma.slopes
                if not slopes or not any(slopes):
                    return False
                a, b = slopes
                self.ops.append(Rectify(layer.gain * (a + b) ** 2 / 2, layer.gain * a * b, len(self.nodes), self.shape))
                self.nodes.append(self.shape)
            elif isinstance(layer, LayerNorm):
                self.ops.append(Normalise(len(self.nodes), self.shape))
                self.nodes.append(self.shape)
            elif isinstance(layer, AvgPool):
                if within:
                    return False
                self.end(layer.window)
            elif isinstance(layer, Residual):
                if not self._add_residual(layer):
                    return False
            else:
                return False
        return True

    def _add_residual(self, layer: Residual) -> bool:
        shape, stride = self.shape, self.stride
        self.ops.append(Save())
        if not self.add(layer.branch, within=True):
            return False
        after = self.stride
        self.ops.append(Exchange())
        self.shape, self.stride = shape, stride
        if not self.add(layer.shortcut, within=True) or self.stride != after:
            return False
        self.ops.append(Add())
        return True

    def end(self, window: Shape | None) -> None:
        self.stages.append(Stage(self.start, tuple(self.ops), self.shape, self.stride, (0, 0), window))
        if window:
            self.shape = (self.shape[0] // window[0], self.shape[1] // window[1])
        self.start, self.stride, self.ops = self.shape, (1, 1), []


def _with_reach(stages: list[Stage], gap: bool) -> tuple[Stage, ...]:
    """The stages with the planes that later ones want, from the last on."""
    found: list[Stage] = []
    wanted = stages[-1].shape_out if gap else (1, 1)
    reach = (wanted[0] - 1, wanted[1] - 1)
    for stage in reversed(stages):
        if stage.window:
            # windows at an offset of Δ hold pixels at offsets sΔ − (s − 1) to sΔ + (s − 1)
            reach = tuple(s * r + s - 1 for s, r in zip(stage.window, reach, strict=True))  # type: ignore[assignment]
        reach = tuple(min(r, n - 1) for r, n in zip(reach, stage.shape_out, strict=True))  # type: ignore[assignment]
        found.append(Stage(stage.shape_in, stage.ops, stage.shape_out, stage.stride, reach, stage.window))
        reach = (reach[0] * stage.stride[0], reach[1] * stage.stride[1])
    return tuple(reversed(found))
