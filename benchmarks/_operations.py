"""Arithmetic of the exact NTK of two images, counted from the algorithm of MATH.md §3, for the fraction of the machine's limit.

Counted are vector operations on entries of S and T that no reordering saves: not loads, stores, shuffles and loop counters, and not
what is done once per image (variance maps and their reciprocal roots). Per entry:

    inner product of two pixels   C channels: 1 multiplication, C − 1 fused multiply-adds
    box sum of q×q, separable     (q − 1) + (q − 1) additions for S, and as many for T from the second convolution on
    T ← box(T) + Λ                1 addition from the second convolution on; σ_w²/q² is part of the constants below
    c = Λ·(1/√v)·(1/√v')          2 multiplications; |c| and its clip at 1: 2
    arccos |c| = √(1−|c|)·P(|c|)  1 subtraction, 1 root, 7 (float32) or 17 (float64) fused multiply-adds, 1 multiplication
    κ₀ for c of either sign       1 subtraction, 1 selection
    √(1−c²)                       1 fused multiply-add, 1 root
    S' = √v·√v'·(c·κ₀ + √(1−c²)/π)  1 fused multiply-add, 2 multiplications
    T' = T·κ₀                     1 multiplication
    pooling or readout            1 addition each for S and T

Entries of a layer: pairs of pixels whose offset a later layer reads, (HW)² with a global mean, HW for a Flatten.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntkdask.kernels.planes import program as stages
from ntkdask.networks import Network

ARCCOS_DEGREE = {"float32": 7, "float64": 17}


@dataclass(frozen=True)
class Operations:
    """Counts per pair of images. simple: additions, multiplications, comparisons; fused: multiply-adds."""

    simple: float = 0.0
    fused: float = 0.0
    roots: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.simple + other.simple, self.fused + other.fused, self.roots + other.roots)

    def times(self, entries: int) -> Operations:
        """As many for each of the entries."""
        return Operations(entries * self.simple, entries * self.fused, entries * self.roots)

    @property
    def flops(self) -> float:
        """A fused multiply-add counts as two, everything else as one."""
        return self.simple + 2 * self.fused + self.roots


def count(network: Network, shape: tuple[int, int], channels: int, dtype: str) -> Operations:
    """Operations for one pair of images (*shape, channels) in "float32" or "float64".

    Counts stride 1, padding "same" and activations with one kink, with poolings, and no Residual or LayerNorm; ValueError otherwise.
    """
    program = stages.program(network, shape)
    if program is None:
        raise ValueError(f"the operations of {network} are not counted here")
    total, first = Operations(), True
    for stage in program.stages:
        for op in stage.ops:
            if isinstance(op, stages.Convolve) and op.conv.strides == (1, 1) and op.conv.padding == "same":
                per_entry = _convolve(op, channels, first)
                first = False
            elif isinstance(op, stages.Rectify):
                per_entry = Operations(11, 2 + ARCCOS_DEGREE[dtype], 2)
            else:
                raise ValueError(f"the operations of {op} are not counted here")
            total += per_entry.times(entries(stage.shape_out, stage.reach))
        total += Operations(2).times(entries(stage.shape_out, stage.reach))
    return total


def _convolve(op: stages.Convolve, channels: int, first: bool) -> Operations:
    box = sum(q - 1 for q in op.conv.filter)
    return Operations(1 + box, channels - 1) if first else Operations(2 * box + 1)


def entries(shape: tuple[int, int], reach: tuple[int, int]) -> int:
    """Pairs of pixels of an image of (H, W) whose offset is at most `reach`, rows and columns."""
    rows, columns = (n + sum(2 * (n - d) for d in range(1, r + 1)) for n, r in zip(shape, reach, strict=True))
    return rows * columns
