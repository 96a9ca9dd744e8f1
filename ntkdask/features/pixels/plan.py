"""How much memory a sketch of pixels takes, and what its truncated series leave out. No images are read. Called by `cntk_sketch`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkdask import threads
from ntkdask.activations import ActivationFunction, NormalizedGaussian
from ntkdask.features.pixels.duals import completed_series, has_slope
from ntkdask.features.pixels.layers import THREAD_ELEMENTS, block_rows, reads_covariance
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.networks import Activation, Conv, Dense, Flatten, Layer, LayerNorm, Network, Residual
from ntkdask.networks.network import every_layer, output_shape

RECTIFIER_TEMPORARIES, GAUSSIAN_TEMPORARIES, OTHER_TEMPORARIES, SERIES_TEMPORARIES = 2, 5, 12, 8
"""Arrays of a block of rows that a dual takes, beside the powers of a series."""
VECTORS_OF_A_LAYER = 12
"""Random vectors that a layer draws, in float64 units."""
GRID = 401
"""Correlations at which truncation errors are taken."""


@dataclass(frozen=True)
class _Held:
    """Which feature vectors of a pixel are held between layers: φ, ψ, or neither (inputs, which are short)."""

    phi: bool = False
    psi: bool = False
    fresh: bool = False

    @property
    def count(self) -> int:
        return self.phi + self.psi


def held_pixels(network: Network, shape: tuple[int, int]) -> int:
    """The most feature vectors that one image (H, W) holds: φ and ψ of the pixels before and after a layer; at least 1."""
    layers, readout = network.layers, network.readout_position
    return max(1, _through(layers[: readout + 1], shape, _Held(), layers[readout + 1 :])[0])


def _through(layers: Sequence[Layer], shape: tuple[int, int], held: _Held, after: Sequence[Layer]) -> tuple[int, _Held]:
    """(most vectors held at once, what is held at the end); follows `PixelLayers.through`."""
    most, position = 0, 0
    while position < len(layers):
        layer = layers[position]
        following = layers[position + 1] if position + 1 < len(layers) else None
        fused = isinstance(layer, (Conv, Dense)) and isinstance(following, Activation)
        position += 1 + fused
        rest = (*layers[position:], *after)
        before = held.count * shape[0] * shape[1]
        out = output_shape([layer], shape)
        pixels, copies = out[0] * out[1], 1
        if isinstance(layer, Residual):
            branch = _through(layer.branch, shape, held, rest)
            shortcut = _through(layer.shortcut, shape, held, rest)
            held = _Held(reads_covariance(rest), branch[1].psi or shortcut[1].psi)
            # both paths' results, the sum and a signed copy
            most = max(most, before + branch[0], before + 2 * pixels + shortcut[0], before + 7 * pixels)
        elif isinstance(layer, (Conv, Dense)):
            copies = 1 if held.fresh else 2
            psi = (layer.trainable or held.psi) and not (
                isinstance(following, Activation) and not has_slope(following.sigma)
            )
            held = _Held(reads_covariance(rest), psi, fused)
        elif isinstance(layer, Activation):
            most = max(most, 2 * before)
            held = _Held(reads_covariance(rest), held.psi and has_slope(layer.sigma), True)
        most = max(most, copies * before + held.count * pixels)
        shape = out
    return most, held


def block_bytes(network: Network, method: str, degree: int, width: int, images: int, pixels: int, itemsize: int) -> int:
    """Bytes beside the features of all pixels: each thread's block of rows, random vectors, and those of a Flatten.

    Parameters
    ----------
    network : Network
        The network.
    method : str
        How dual activations are realised, as in `PixelDual`.
    degree : int
        Degree of series.
    width : int
        Features of a pixel.
    images : int
        Images of a block.
    pixels : int
        Pixels of an image.
    itemsize : int
        Bytes of a number.

    Returns
    -------
    int
        Peak bytes, of all threads together.
    """
    layers = tuple(every_layer(network.layers))
    rows = min(block_rows(width, itemsize), images * pixels)
    sharing = min(threads.current(), -(-images * pixels // rows)) if images * pixels * width >= THREAD_ELEMENTS else 1
    block = rows * width * itemsize
    sigmas = [layer.sigma for layer in layers if isinstance(layer, Activation)]
    each = max((_temporaries(s, method) for s in sigmas), default=1) * block
    if method != "random" and sigmas:
        powers = range(1, degree + 1)
        each += SERIES_TEMPORARIES * block + PolySketch(degree, width, 0).workspace_bytes(rows, width, itemsize, powers)
    vectors = VECTORS_OF_A_LAYER * len(layers) * width * 8
    if method != "random":
        vectors += len(sigmas) * degree * 8 * width * itemsize
    if any(isinstance(layer, Flatten) for layer in layers):
        vectors += pixels * (width * itemsize + 1024)
    return sharing * (each + 4 * width * itemsize) + vectors + 2**17


def _temporaries(sigma: ActivationFunction, method: str) -> int:
    if isinstance(sigma, NormalizedGaussian):
        return GAUSSIAN_TEMPORARIES
    return RECTIFIER_TEMPORARIES if method == "random" and sigma.slopes is not None else OTHER_TEMPORARIES


@dataclass(frozen=True)
class _Pair:
    """S, Ŝ, T, T̂ of two pixels over a grid of correlations, the last of which is 1; hats mark what the truncated series give."""

    s: np.ndarray
    s_hat: np.ndarray
    t: np.ndarray
    t_hat: np.ndarray

    def times(self, factor: float) -> _Pair:
        return _Pair(self.s * factor, self.s_hat * factor, self.t * factor, self.t_hat * factor)


def truncation_error(network: Network, method: str, degree: int) -> float:
    """max |T̂ − T|/T(1) over the correlation of two images whose pixels are all alike and of length 1; 0 without series.

    Borders and the means of a Flatten or a pooling are not taken into account. Raises InputError where an activation has no
    usable expansion.
    """
    if method == "random":
        return 0.0
    c = np.linspace(-1.0, 1.0, GRID)
    zero = np.zeros_like(c)
    end = _pair_through(network.layers, _Pair(c, c, zero, zero), method, degree)
    return float(np.abs(end.t_hat - end.t).max() / end.t[-1]) if end.t[-1] > 0 else 0.0


def _pair_through(layers: Sequence[Layer], pair: _Pair, method: str, degree: int) -> _Pair:
    for layer in layers:
        if isinstance(layer, (Conv, Dense)):
            pair = pair.times(layer.weight_variance)
            s, s_hat = pair.s + layer.bias_variance, pair.s_hat + layer.bias_variance
            pair = _Pair(s, s_hat, pair.t + s * layer.trainable, pair.t_hat + s_hat * layer.trainable)
        elif isinstance(layer, Activation):
            pair = _activated(layer, pair, method, degree)
        elif isinstance(layer, LayerNorm):
            pair = pair.times(1 / pair.s[-1])
        elif isinstance(layer, Residual):
            a, b = (_pair_through(path, pair, method, degree) for path in (layer.branch, layer.shortcut))
            pair = _Pair(a.s + b.s, a.s_hat + b.s_hat, a.t + b.t, a.t_hat + b.t_hat)
    return pair


def _activated(layer: Activation, pair: _Pair, method: str, degree: int) -> _Pair:
    sigma, length = layer.sigma, math.sqrt(pair.s[-1])
    weights, slopes = (w[:, 0] ** 2 for w in completed_series(sigma, np.array([length]), degree))
    c, c_hat = (np.clip(s / pair.s[-1], -1, 1) for s in (pair.s, pair.s_hat))
    value, slope = sigma.dual(length, length, c), sigma.dual_derivative(length, length, c)
    value_hat = np.polynomial.polynomial.polyval(c_hat, weights)
    slope_hat = np.polynomial.polynomial.polyval(c_hat, slopes)
    if method == "mixed":
        slope_hat = sigma.dual_derivative(length, length, c_hat)
    pair = _Pair(value, value_hat, pair.t * slope, pair.t_hat * slope_hat)
    return pair.times(layer.gain)
