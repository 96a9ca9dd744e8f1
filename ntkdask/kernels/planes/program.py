"""The part of a network that works on images, as a program for the passes over offset planes: pure planning, no arrays.

Between poolings, entries of S and T with the offset δ = p' − p only meet entries with the same δ (with a stride s, output plane δ
reads input plane sδ). So a stage, which is all layers up to the next pooling, runs plane by plane. MATH.md §3. The passes on the CPU
(`planes.host`) and on a GPU (`planes.device`) follow these stages; networks that they cannot run have no program and go through
`planes.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ntkdask.networks import Activation, AvgPool, Conv, GlobalAvgPool, Layer, LayerNorm, Network, Residual

Shape: TypeAlias = tuple[int, int]

WIDE_FACTOR = 1e6
"""Factors of S beyond this, or below its inverse, may take S out of float32 where several follow one another."""


@dataclass(frozen=True)
class Convolve:
    """S ← σ_w²·A[S] + σ_b², T ← σ_w²·A[T] + (S if trainable).

    Parameters
    ----------
    conv : Conv
        The layer.
    shape_in, shape_out : (H, W)
        Of the images before and after it.
    before : (rows, columns)
        l of MATH.md §1: how much of the filter lies above and before the pixel it stands on.
    """

    conv: Conv
    shape_in: Shape
    shape_out: Shape
    before: Shape


@dataclass(frozen=True)
class Rectify:
    """An activation σ = −A·min(t, 0) + B·max(t, 0): S ← curve·√(vv')·κ₁(c) − line·S, T ← T·(curve·κ₀(c) − line), c = S/√(vv').

    Both are 0 where a variance is 0.

    Parameters
    ----------
    curve : float
        gain·(A + B)²/2.
    line : float
        gain·A·B.
    node : int
        The number of the variance map that v is.
    shape : (H, W)
        Of the images.
    """

    curve: float
    line: float
    node: int
    shape: Shape


@dataclass(frozen=True)
class Normalise:
    """A LayerNorm: S ← S/√(vv'), T alike; 0 where a variance is 0. node: the number of the variance map that v is."""

    node: int
    shape: Shape


@dataclass(frozen=True)
class Save:
    """The branch of a Residual begins: copy S and T onto a stack."""


@dataclass(frozen=True)
class Exchange:
    """The branch ends and the shortcut begins: exchange S and T with the top of the stack."""


@dataclass(frozen=True)
class Add:
    """The Residual ends: take S and T from the stack and add them."""


Op: TypeAlias = Convolve | Rectify | Normalise | Save | Exchange | Add


@dataclass(frozen=True)
class Stage:
    """Layers up to the next pooling.

    Parameters
    ----------
    shape_in : (H, W)
        Of the images before the stage.
    ops : tuple of operations
        What the layers do, in order.
    shape_out : (H, W)
        Of the images before the pooling.
    stride : (rows, columns)
        Of all layers together: output plane δ reads input plane stride·δ.
    reach : (rows, columns)
        Output planes with |δ| ≤ reach will be read.
    window : (rows, columns) or None
        Of the pooling after the stage; None after the last.
    """

    shape_in: Shape
    ops: tuple[Op, ...]
    shape_out: Shape
    stride: Shape
    reach: Shape
    window: Shape | None

    @property
    def is_wide(self) -> bool:
        """Whether a factor is so large or small that S may leave float32 between two variance maps, whatever the images."""
        factors = [op.conv.weight_variance for op in self.ops if isinstance(op, Convolve)]
        factors += [op.curve for op in self.ops if isinstance(op, Rectify)]
        return not all(1 / WIDE_FACTOR <= factor <= WIDE_FACTOR for factor in factors if factor)


@dataclass(frozen=True)
class Program:
    """The image part of a network.

    Parameters
    ----------
    stages : tuple of Stage
        In order.
    nodes : tuple of (H, W)
        Shapes of the variance maps that the stages read, in order.
    gap : bool
        Whether the readout is a GlobalAvgPool; otherwise it is a Flatten.
    tail : tuple of layers
        The layers after the readout.
    """

    stages: tuple[Stage, ...]
    nodes: tuple[Shape, ...]
    gap: bool
    tail: tuple[Layer, ...]


def program(network: Network, shape: Shape) -> Program | None:
    """The program of a network for images of (H, W); None where the passes cannot run it.

    They cannot run an activation without `slopes` or a pooling within a Residual.

    Raises
    ------
    InputError
        Naming the layer, where the images do not fit.
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
    """Collects the stages of a network, layer by layer."""

    def __init__(self, shape: Shape) -> None:
        self.stages: list[Stage] = []
        self.nodes: list[Shape] = []
        self.shape = self.start = shape
        self.stride = (1, 1)
        self.ops: list[Op] = []

    def add(self, layers: tuple[Layer, ...], within: bool = False) -> bool:
        """Append the layers; False at the first that the passes cannot run. within: inside a Residual."""
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
        """Append a Residual; False where the passes cannot run it."""
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
        """End the stage, at a pooling with `window` or at the readout."""
        self.stages.append(Stage(self.start, tuple(self.ops), self.shape, self.stride, (0, 0), window))
        if window:
            self.shape = (self.shape[0] // window[0], self.shape[1] // window[1])
        self.start, self.stride, self.ops = self.shape, (1, 1), []


def _with_reach(stages: list[Stage], gap: bool) -> tuple[Stage, ...]:
    """The stages with their `reach`, from the last on: the planes that later stages read."""
    extended: list[Stage] = []
    wanted = stages[-1].shape_out if gap else (1, 1)
    reach = (wanted[0] - 1, wanted[1] - 1)
    for stage in reversed(stages):
        if stage.window:
            # windows at an offset of Δ hold pixels at offsets sΔ − (s − 1) to sΔ + (s − 1)
            reach = tuple(s * r + s - 1 for s, r in zip(stage.window, reach, strict=True))  # type: ignore[assignment]
        reach = tuple(min(r, n - 1) for r, n in zip(reach, stage.shape_out, strict=True))  # type: ignore[assignment]
        extended.append(Stage(stage.shape_in, stage.ops, stage.shape_out, stage.stride, reach, stage.window))
        reach = (reach[0] * stage.stride[0], reach[1] * stage.stride[1])
    return tuple(reversed(extended))
