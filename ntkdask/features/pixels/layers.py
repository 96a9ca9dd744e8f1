"""Features of pixels through the layers of a network: φ of S and ψ of T, a block of images at a time.

What each layer of MATH.md §1 does to S and T is done to features: a Conv or Dense is in `pixels.filters`, an Activation in
`pixels.duals`; poolings are exact means of feature vectors; a trainable layer and a Residual add direct sums, kept at one width
by random signs. Layers after the readout see images of one pixel. Every random vector depends on the layer's position, none on
the rows. Rows of pixels are cut into blocks that stay in cache, which the task's threads share. Called by `cntk_sketch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ntkdask import seeds, threads
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.features.base import row_blocks
from ntkdask.features.pixels.duals import Norms, PixelDual, has_slope, norms_after
from ntkdask.features.pixels.filters import Filter
from ntkdask.features.pixels.random_vectors import random_signs
from ntkdask.features.sketching.sketches import SRHT
from ntkdask.networks import Activation, AvgPool, Conv, Dense, Flatten, Layer, LayerNorm, Residual
from ntkdask.networks.network import every_layer, output_shape

BLOCK_BYTES, DEVICE_BLOCK_BYTES = 2**19, 2**28
"""Bytes of one array of a block of pixels; a block holds three such arrays."""
THREAD_ELEMENTS = 2**18
"""Entries below which a second thread costs more than it saves."""

Node = tuple[Array, Array]


@dataclass(frozen=True)
class Pixels:
    """Features of a block of images.

    Parameters
    ----------
    phi : array (n·H·W, width), optional
        Features of S; None where no later layer reads S.
    psi : array (n·H·W, width), optional
        Features of T; None where T = 0.
    shape : tuple of int
        (H, W).
    raw : bool
        Whether phi are the channels of the inputs themselves, of any width.
    fresh : bool
        Whether the coordinates carry random signs that nothing has used.
    """

    phi: Array
    psi: Array
    shape: tuple[int, int]
    raw: bool = False
    fresh: bool = False

    @property
    def n_pixels(self) -> int:
        """H·W, the pixels of an image."""
        return self.shape[0] * self.shape[1]


def reads_covariance(layers: Sequence[Layer]) -> bool:
    """Whether any of the layers needs features of S: an activation, a normalisation, or weights that are trained."""
    return any(
        isinstance(layer, (Activation, LayerNorm)) or (isinstance(layer, (Conv, Dense)) and layer.trainable)
        for layer in every_layer(layers)
    )


@dataclass(frozen=True)
class PixelLayers:
    """The layers of one sketch.

    Parameters
    ----------
    width : int
        Features of a pixel.
    method : str
        How dual activations are realised, as in `PixelDual`.
    degree : int
        Degree of series.
    seed : int
        Seed of all random numbers.
    nodes : iterator of (S, T), optional
        The diagonals of `tangent_maps` for this block of images, in order; None for estimated norms.
    """

    width: int
    method: str
    degree: int
    seed: int
    nodes: Iterator[Node] | None

    def through(self, layers: Sequence[Layer], pixels: Pixels, path: seeds.Path, after: Sequence[Layer] = ()) -> Pixels:
        """The pixels after these layers.

        after: the layers that follow them, which decide what has to be kept. path: place of the random numbers, to which the
        position of each layer is added.
        """
        position = 0
        while position < len(layers):
            if pixels.phi is None and pixels.psi is None:  # T = 0 from here on, and S is read no more
                return replace(pixels, shape=output_shape(layers[position:], pixels.shape))
            layer, rest = layers[position], (*layers[position + 1 :], *after)
            here = (*path, position)
            if isinstance(layer, (Conv, Dense)):
                following = layers[position + 1] if position + 1 < len(layers) else None
                activation = following if isinstance(following, Activation) else None
                pixels = self._weighted(layer, activation, pixels, here, rest[1:] if activation else rest)
                position += activation is not None
            elif isinstance(layer, Activation):
                pixels = self._activated(layer, pixels, here, rest)
            elif isinstance(layer, Residual):
                pixels = self._residual(layer, pixels, here, rest)
            elif isinstance(layer, LayerNorm):
                pixels = self._normalised(pixels)
            else:
                pixels = self._pooled(layer, pixels, here)
            position += 1
        return pixels

    # --- weights and activations

    def _weighted(
        self,
        layer: Conv | Dense,
        activation: Activation | None,
        pixels: Pixels,
        path: seeds.Path,
        after: Sequence[Layer],
    ) -> Pixels:
        """The pixels after a Conv or Dense and, block by block, the activation that follows it."""
        weights = Filter.of(layer, pixels.shape, self.width, self.seed, path)
        if pixels.raw and not weights.takes_patches(pixels.phi.shape[1]):
            pixels = self._widened(pixels, path)
        if not (pixels.raw or pixels.fresh or weights.count == 1):
            pixels = self._signed(pixels, path)
        norms = None if activation is None else self._norms(activation)
        dual = None if activation is None else self._dual(activation, path)
        phi_needed = reads_covariance(after)
        like = pixels.psi if pixels.phi is None else pixels.phi
        xp, rows = namespace(like), like.shape[0] // pixels.n_pixels * weights.neighbourhood.rows_out
        tangent = layer.trainable or pixels.psi is not None
        phi = xp.empty((rows, self.width), like.dtype) if phi_needed else None
        psi = None
        if tangent and (activation is None or has_slope(activation.sigma)):
            psi = xp.empty((rows, self.width), like.dtype)

        def fill(block: slice) -> None:
            mu, chi = (None if features is None else features[block] for features in (phi, psi))
            if layer.trainable or activation is not None or phi_needed:
                mu = xp.empty((block.stop - block.start, self.width), like.dtype) if mu is None else mu
                weights.covariance_into(mu, pixels.phi, block.start, pixels.raw)
            if chi is not None:
                weights.tangent_into(chi, mu, pixels.psi, block.start)
            if dual is not None:
                dual(mu, chi, norms and norms[block], phi_needed)

        over_rows(fill, rows, self.width, like)
        return Pixels(phi, psi, weights.conv.output_shape(pixels.shape), fresh=activation is not None)

    def _activated(self, layer: Activation, pixels: Pixels, path: seeds.Path, after: Sequence[Layer]) -> Pixels:
        """The pixels after an activation that does not follow its weights directly; the given features are left unchanged."""
        dual, norms = self._dual(layer, path), self._norms(layer)
        phi = pixels.phi.copy()
        psi = pixels.psi.copy() if pixels.psi is not None and has_slope(layer.sigma) else None
        needed = reads_covariance(after)

        def fill(block: slice) -> None:
            dual(phi[block], None if psi is None else psi[block], norms and norms[block], needed)

        over_rows(fill, phi.shape[0], self.width, phi)
        return Pixels(phi if needed else None, psi, pixels.shape, fresh=True)

    def _dual(self, layer: Activation, path: seeds.Path) -> PixelDual:
        return PixelDual(layer, self.width, self.method, self.degree, self.seed, path)

    def _norms(self, layer: Activation) -> Norms | None:
        return None if self.nodes is None else norms_after(layer, *next(self.nodes))

    # --- the other layers

    def _normalised(self, pixels: Pixels) -> Pixels:
        """The pixels after LayerNorm: features over √S(p, p), exact where it is known; 0 where it is 0."""
        xp = namespace(pixels.phi)
        own = xp.einsum("ij,ij->i", pixels.phi, pixels.phi).astype(xp.float64)
        squares = own if self.nodes is None else next(self.nodes)[0].ravel()
        factors = xp.where(squares > 0, 1 / xp.sqrt(xp.where(squares > 0, squares, 1)), 0)[:, None]
        phi, psi = (None if f is None else f * factors.astype(f.dtype) for f in (pixels.phi, pixels.psi))
        return replace(pixels, phi=phi, psi=psi)

    def _residual(self, layer: Residual, pixels: Pixels, path: seeds.Path, after: Sequence[Layer]) -> Pixels:
        """Branch and shortcut from the same pixels; signs between them make the sum of features a sum of kernels."""
        branch = self.through(layer.branch, pixels, (*path, "branch"), after)
        shortcut = self.through(layer.shortcut, pixels, (*path, "shortcut"), after)
        branch, shortcut = (self._widened(p, (*path, k)) if p.raw else p for k, p in enumerate((branch, shortcut)))
        needed = reads_covariance(after)
        phi = self._added(branch.phi, shortcut.phi, path) if needed else None
        return Pixels(phi, self._added(branch.psi, shortcut.psi, path), branch.shape)

    def _added(self, first: Array | None, second: Array | None, path: seeds.Path) -> Array | None:
        if first is None or second is None:
            return second if first is None else first
        return first + second * self._random_signs((*path, "sum"), first)

    def _pooled(self, layer: Layer, pixels: Pixels, path: seeds.Path) -> Pixels:
        """The pixels after AvgPool or a readout."""
        h, w = pixels.shape
        if isinstance(layer, Flatten):
            phi, psi = (None if f is None else self._flattened(f, pixels, path) for f in (pixels.phi, pixels.psi))
            return Pixels(phi, psi, (1, 1), raw=pixels.raw)
        a, b = layer.window if isinstance(layer, AvgPool) else (h, w)

        def mean(features: Array) -> Array:
            windows = features.reshape(-1, h // a, a, w // b, b, features.shape[1])
            return windows.mean(axis=(2, 4)).reshape(-1, features.shape[1])

        phi, psi = (None if f is None else mean(f) for f in (pixels.phi, pixels.psi))
        return replace(pixels, phi=phi, psi=psi, shape=(h // a, w // b))

    def _flattened(self, features: Array, pixels: Pixels, path: seeds.Path) -> Array:
        """Direct sum of the pixels over √(H·W), kept at one width by random signs for each pixel; inputs' channels side by side."""
        count, width = pixels.n_pixels, features.shape[1]
        images = features.reshape(-1, count, width)
        root = features.dtype.type(1 / math.sqrt(count))
        if pixels.raw:
            return images.reshape(len(images), count * width) * root
        total = namespace(features).zeros((len(images), width), features.dtype)
        for p in range(count):
            total += images[:, p] * self._random_signs((*path, "pixel", p), features)
        return total * root

    def _widened(self, pixels: Pixels, path: seeds.Path) -> Pixels:
        """The inputs sketched to the width."""
        sketch = SRHT(self.width, self.seed, (*path, "inputs"))
        return Pixels(sketch(pixels.phi), None, pixels.shape)

    def _signed(self, pixels: Pixels, path: seeds.Path) -> Pixels:
        """The same pixels with random signs for this layer."""
        phi = None if pixels.phi is None else pixels.phi * self._random_signs((*path, "fresh"), pixels.phi)
        psi = None if pixels.psi is None else pixels.psi * self._random_signs((*path, "fresh tangent"), pixels.psi)
        return replace(pixels, phi=phi, psi=psi, fresh=True)

    def _random_signs(self, path: seeds.Path, like: Array) -> Array:
        return random_signs(self.seed, path, self.width, like)


def block_rows(width: int, itemsize: int, device: bool = False) -> int:
    """How many rows of pixels a block has."""
    return max(1, (DEVICE_BLOCK_BYTES if device else BLOCK_BYTES) // (width * itemsize))


def over_rows(fill: Callable[[slice], None], rows: int, width: int, like: Array) -> None:
    """Call fill(block) for all rows: on a GPU one block after the other, on the CPU by the task's threads."""
    device = is_device_array(like)
    blocks = row_blocks(rows, block_rows(width, like.dtype.itemsize, device))
    if device or rows * width < THREAD_ELEMENTS:
        for block in blocks:
            fill(block)
    else:
        threads.on_threads(fill, blocks)
