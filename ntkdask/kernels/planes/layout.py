"""How images and their variance maps lie in memory for the compiled stages: padded to frames, spread over cache sets, aligned.

Called by `planes.host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkdask import threads
from ntkdask.kernels.planes.stage import Side
from ntkdask.kernels.planes.tables import CompiledStage

CHUNK_ROWS = 16
"""Images that a thread lays out at a time, in a core's second cache."""

LEAST, MOST = 2.0**-100, 2.0**100
"""Variances between which products of two pixels fit float32, with room for what a stage sums and for the digits of small ones."""

ALIGNED = 64
"""Bytes of a vector and of a cache line."""


@dataclass(frozen=True)
class SideArrays:
    """All images of one side of the pairs, and their variance maps for each stage.

    Parameters
    ----------
    images : array (n, C, ≥ HW), float32 or float64
        Pixels, in the frame of the first stage; 0 beyond the image.
    inverse : list of arrays (n, nodes, ≥ HW), float64
        1/√v for each stage.
    root : list of arrays (n, nodes, ≥ HW), float64
        √v for each stage; on the left side times curve/π.
    single : pair of arrays (n, nodes, ≥ HW), float32, or None
        (1/√v, √v) of the first stage; None where the images are float64.
    wide : array (n,) of bool
        Images whose entries of S may leave float32 in the first stage, which then runs in float64.
    """

    images: np.ndarray
    inverse: list[np.ndarray]
    root: list[np.ndarray]
    single: tuple[np.ndarray, np.ndarray] | None
    wide: np.ndarray

    def rows(self, rows: slice, stage: int, channels: int, dtype: np.dtype) -> Side:
        """Some of the images as a stage reads them in `dtype`, with `channels` channels: all for the first stage, 0 for others.

        Only the first stage runs in float32.
        """
        inverse, root = self.inverse[stage], self.root[stage]
        if dtype == np.float32 and self.single:
            inverse, root = self.single
        return Side(self.images[rows, :channels].astype(dtype, copy=False), inverse[rows], root[rows])


def lay_out(
    stages: Sequence[CompiledStage], x: np.ndarray, maps: list[np.ndarray], divisor: float, left: bool
) -> SideArrays:
    """Lay out one side of the pairs.

    Parameters
    ----------
    stages : sequence of CompiledStage
        The stages that will read it.
    x : array (n, H, W, C), float32 or float64
        The images.
    maps : list of arrays (n, H_k, W_k), float64
        Their variances before every activation and LayerNorm.
    divisor : float
        What the pixels are divided by.
    left : bool
        Whether √v is multiplied by curve/π, as on the left side.

    Returns
    -------
    SideArrays
    """
    n, h, w, channels = x.shape
    frame, size = stages[0].frame, stages[0].pixels
    images = np.zeros((n, channels, row_stride(size, x.dtype.itemsize)), x.dtype)
    root = [np.zeros((n, len(stage.curves), row_stride(stage.pixels, 4))) for stage in stages]
    inverse = [np.zeros_like(s) for s in root]
    wide = np.full(n, stages[0].is_wide)

    def fill(part: slice) -> None:
        framed = images[part, :, :size].reshape(-1, channels, *frame)[:, :, :h, :w]
        np.divide(x[part].transpose(0, 3, 1, 2), x.dtype.type(divisor), out=framed)
        for stage, all_roots, all_inverses in zip(stages, root, inverse, strict=True):
            s = all_roots[part]
            for k, (node, (rows, columns)) in enumerate(zip(maps[stage.nodes], stage.node_frames, strict=True)):
                v = s[:, k, : rows * columns].reshape(-1, rows, columns)
                np.divide(node[part], stage.units[k], out=v[:, : node.shape[1], : node.shape[2]])
            if stage is stages[0]:
                outside = np.concatenate([s.reshape(len(s), -1), _squares(framed) / divisor], axis=1)
                wide[part] |= ((outside > MOST) | ((outside < LEAST) & (outside > 0))).any(axis=1)
            np.sqrt(s, out=s)
            np.divide(1.0, s, out=all_inverses[part], where=s > 0)
            if left:
                s *= np.array(stage.curves)[:, None]

    threads.on_threads(fill, [slice(first, first + CHUNK_ROWS) for first in range(0, n, CHUNK_ROWS)])
    single = None
    if x.dtype == np.float32:
        with np.errstate(over="ignore"):  # those of wide images are not read
            single = (inverse[0].astype(np.float32), root[0].astype(np.float32))
    return SideArrays(images, inverse, root, single, wide)


def _squares(images: np.ndarray) -> np.ndarray:
    """Σ_channels x² of every pixel of images (n, C, H, W): (n, HW) float64."""
    return np.einsum("nchw,nchw->nhw", images, images, dtype=np.float64).reshape(len(images), -1)


def row_stride(length: int, itemsize: int) -> int:
    """Entries from one array of `length` to the next, such that equal places of arrays fall in different sets of the first cache."""
    lines = -(-(length * itemsize) // ALIGNED)
    return (lines + (5 - lines) % 64) * ALIGNED // itemsize


def aligned(rows: int, length: int, dtype: np.dtype, lead: int = 1) -> np.ndarray:
    """Zeros (rows, ≥ length) in which entry `lead` of every row begins a cache line."""
    size = dtype.itemsize
    stride = row_stride(length, size) * size
    raw = np.zeros(rows * stride + 2 * ALIGNED, np.uint8)
    start = (-raw.ctypes.data - lead * size) % ALIGNED
    return raw[start : start + rows * stride].view(dtype).reshape(rows, stride // size)
