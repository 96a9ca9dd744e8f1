"""A layer with weights, Conv or Dense, on features of pixels: φ of S to μ of Λ, ψ of T to χ of σ_w²·A[T] + (Λ if trainable).

Sums over the filter are those of `pixels.sums`; a bias is a direct summand σ_b·(±1)/√p, and a trained layer adds ±μ to χ.
Patches of the network's inputs, which are short, are put side by side instead, which is exact, and spread over the width by H
D/√p. A layer's random numbers are drawn once, before its rows are cut into blocks. Called by `pixels.layers`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, namespace
from ntkdask.features.pixels.random_vectors import random_signs
from ntkdask.features.pixels.sums import Neighbours, draw_shifts, neighbours, shifted_sums
from ntkdask.features.sketching.hadamard import sampled_hadamard
from ntkdask.features.sketching.operands import Factor
from ntkdask.networks import Conv, Dense


@dataclass(frozen=True)
class Filter:
    """One layer with weights at one place of a network; its random numbers follow from (seed, path).

    Parameters
    ----------
    conv : Conv
        The layer.
    shape : tuple of int
        (H, W) of its input images.
    width : int
        Features of a pixel, a power of two.
    seed : int
        Seed of the random numbers.
    path : tuple
        Place of the layer in the network.
    """

    conv: Conv
    shape: tuple[int, int]
    width: int
    seed: int
    path: seeds.Path

    @staticmethod
    def of(layer: Conv | Dense, shape: tuple[int, int], width: int, seed: int, path: seeds.Path) -> Filter:
        """The filter of a layer on images (H, W); a Dense is a convolution of one pixel."""
        if isinstance(layer, Dense):
            layer = Conv(1, "valid", 1, layer.weight_variance, layer.bias_variance, layer.trainable)
        return Filter(layer, shape, width, seed, path)

    @functools.cached_property
    def neighbourhood(self) -> Neighbours:
        """The pixels under the filter at each output pixel."""
        return neighbours(self.conv, self.shape)

    @property
    def count(self) -> int:
        """q², the number of pixels under the filter."""
        return self.conv.filter[0] * self.conv.filter[1]

    def takes_patches(self, channels: int) -> bool:
        """Whether patches of inputs with so many channels, side by side and with a bias, fit into the width."""
        return self.count * channels + 1 <= self.width

    def covariance_into(self, mu: Array, source: Array, first: int, patches: bool) -> None:
        """Write features of Λ of the output pixels from number `first` on to `mu`.

        source: (n·H·W, ·), the features φ of S or, with `patches`, the inputs.
        """
        if patches:
            self._patches_into(mu, source, first)
            return
        shifted_sums(source, self.neighbourhood, self._shifts("shifts"), self._scale(mu), first, mu)
        if self.conv.bias_variance:
            root = math.sqrt(self.conv.bias_variance / self.width)
            mu += self._signs("bias", mu) * mu.dtype.type(root)

    def tangent_into(self, chi: Array, mu: Array | None, source: Array | None, first: int) -> None:
        """Write features of σ_w²·A[T] + (Λ if trainable) to `chi`.

        source: (n·H·W, width), the features ψ of T; None for T = 0. mu: features of Λ.
        """
        signs = self._signs("trained", chi) if self.conv.trainable else None
        if source is None:
            namespace(chi).multiply(mu, signs, out=chi)
            return
        addend = None if signs is None else mu
        shifted_sums(
            source, self.neighbourhood, self._shifts("tangent shifts"), self._scale(chi), first, chi, addend, signs
        )

    def _patches_into(self, mu: Array, source: Array, first: int) -> None:
        """Write H D [σ_w/q·patch, σ_b, 0 … 0]/√width to `mu`."""
        xp, neighbourhood = namespace(mu), self.neighbourhood
        chosen, factors = self._patch_tables
        row = np.arange(first, first + mu.shape[0])
        image, pixel = row // neighbourhood.rows_out, row % neighbourhood.rows_out
        size = self.count * source.shape[1]
        patch = xp.empty((mu.shape[0], size + 1), mu.dtype)
        taken = source[xp.asarray((image * neighbourhood.rows_in)[:, None] + chosen[pixel])]
        taken *= xp.asarray(factors[pixel], mu.dtype)[:, :, None]
        patch[:, :size] = taken.reshape(mu.shape[0], size)
        patch[:, size] = math.sqrt(self.conv.bias_variance)
        rows = xp.arange(self.width, dtype=xp.uint32)
        factor = Factor(patch, self._signs("inputs", mu)[: size + 1], rows, self.width)
        sampled_hadamard((factor,), 1 / math.sqrt(self.width), mu)

    @functools.cached_property
    def _patch_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The input pixel and the factor of each filter entry at each output pixel, (H'·W', q²) each.

        The factor is σ_w/q, and 0 outside the image.
        """
        neighbourhood = self.neighbourhood
        chosen = np.zeros((neighbourhood.rows_out, self.count), np.int64)
        factors = np.zeros((neighbourhood.rows_out, self.count))
        used = np.arange(self.count) < neighbourhood.counts[:, None]
        where = (np.nonzero(used)[0], neighbourhood.filter[used])
        chosen[where], factors[where] = neighbourhood.pixels[used], math.sqrt(self.conv.weight_variance / self.count)
        return chosen, factors

    def _shifts(self, name: str) -> np.ndarray:
        return self._drawn_shifts[name]

    @functools.cached_property
    def _drawn_shifts(self) -> dict[str, np.ndarray]:
        names = ("shifts", "tangent shifts")
        return {name: draw_shifts(self.seed, (*self.path, name), self.count, self.width) for name in names}

    def _scale(self, like: Array) -> Array:
        return namespace(like).full(self.width, math.sqrt(self.conv.weight_variance / self.count), like.dtype)

    def _signs(self, name: str, like: Array) -> Array:
        return random_signs(self.seed, (*self.path, name), self.width, like)
