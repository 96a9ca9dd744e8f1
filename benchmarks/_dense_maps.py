"""The maps of Zandieh et al. 2021 as their boxes read, in NumPy and SciPy on whole arrays, for `feature_maps` to compare with.

Sketches are subsampled real Fourier transforms (SciPy's, on every core), as in the authors' released code; nothing is blocked,
fused or shared between degrees.
"""

from __future__ import annotations

import itertools

import numpy as np
import scipy.fft

from ntkdask import threads
from ntkdask.features.sketching.polynomial_fits import activation_coefficients, homogeneous_coefficients
from ntkdask.networks import Activation, fully_connected


class Sketches:
    """Fresh SRFTs and TensorSRFTs, E⟨S x, S y⟩ = ⟨x, y⟩, on the last axis; the same order of calls gives the same sketches."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def _frequencies(self, x: np.ndarray, m: int) -> np.ndarray:
        """(..., ⌈m/2⌉) complex: random signs, transform, random frequencies."""
        d = x.shape[-1]
        signs = self.rng.choice(np.array([-1, 1], x.dtype), d)
        spectrum = scipy.fft.rfft(x * signs, axis=-1, workers=threads.current())
        chosen = self.rng.integers(0, d, (m + 1) // 2)
        # the upper half is the conjugate of the lower
        mirrored = chosen > d // 2
        found = spectrum[..., np.where(mirrored, d - chosen, chosen)]
        return np.where(mirrored, found.conj(), found)

    @staticmethod
    def _real(z: np.ndarray, m: int) -> np.ndarray:
        count = z.shape[-1]
        return np.concatenate([z.real, z.imag], axis=-1)[..., :m] / np.sqrt(count, dtype=z.real.dtype)

    def vectors(self, x: np.ndarray, m: int) -> np.ndarray:
        """(..., d) → (..., m), m even."""
        return self._real(self._frequencies(x, m), m)

    def tensors(self, x: np.ndarray, y: np.ndarray, m: int) -> np.ndarray:
        """(..., d), (..., e) → (..., m): of x ⊗ y, m even."""
        return self._real(self._frequencies(x, m) * self._frequencies(y, m), m)

    def polynomial(self, x: np.ndarray, coefficients: np.ndarray, m: int) -> np.ndarray:
        """Features of Σ_j c_j⟨x, y⟩^j, (..., m): every power by one more tensor sketch, their direct sum compressed."""
        parts, power = [np.full((*x.shape[:-1], 1), np.sqrt(coefficients[0]), x.dtype)], None
        for coefficient in coefficients[1:]:
            power = self.vectors(x, m) if power is None else self.tensors(power, x, m)
            if coefficient > 0:
                parts.append(power * x.dtype.type(np.sqrt(coefficient)))
        return self.vectors(np.concatenate(parts, axis=-1), m)


def random_features(x: np.ndarray, m: int, depth: int, seed: int = 0) -> np.ndarray:
    """NTKRF, Algorithm 2: half the m components ReLU features, half sketched from as many step features."""
    sketches, half = Sketches(seed), m // 2
    phi = psi = x
    for _ in range(depth):
        steps = (phi @ sketches.rng.standard_normal((phi.shape[1], half)).astype(x.dtype) > 0) * np.sqrt(2 / half)
        relus = np.maximum(phi @ sketches.rng.standard_normal((phi.shape[1], half)).astype(x.dtype), 0)
        phi = relus * x.dtype.type(np.sqrt(2 / half))
        psi = np.concatenate([phi, sketches.tensors(steps.astype(x.dtype), psi, m - half)], axis=1)
    return psi


def polynomial_sketch(x: np.ndarray, m: int, depth: int, degree: int, seed: int = 0) -> np.ndarray:
    """NTKSketch by Remark 1: one polynomial of the cosine for the whole kernel."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    coefficients = homogeneous_coefficients(fully_connected(depth), degree)
    return lengths * Sketches(seed).polynomial(x / np.where(lengths > 0, lengths, 1), coefficients, m)


def convolutional_sketch(x: np.ndarray, m: int, depth: int, degree: int, seed: int = 0) -> np.ndarray:
    """CNTKSketch, Definition 2 with trainable ends, 3×3 filters, GAP: φ and ψ of every pixel of (n, H, W, C) images."""
    sketches = Sketches(seed)
    value, slope = activation_coefficients(Activation("relu"), degree)
    phi, psi = x, None
    for _ in range(depth):
        phi = _patches(phi)
        psi = phi if psi is None else np.concatenate([phi, _patches(psi)], axis=-1)
        lengths = np.linalg.norm(phi, axis=-1, keepdims=True)
        unit = phi / np.where(lengths > 0, lengths, 1)
        phi = lengths * sketches.polynomial(unit, value, m)
        psi = sketches.tensors(psi, sketches.polynomial(unit, slope, m), m)
    return sketches.vectors(np.concatenate([phi.mean(axis=(1, 2)), psi.mean(axis=(1, 2))], axis=-1), m)


def _patches(h: np.ndarray) -> np.ndarray:
    """(n, H, W, c) → (n, H, W, 9c)/3, zeros outside the image."""
    height, width = h.shape[1:3]
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + height, j : j + width] for i, j in itertools.product(range(3), range(3))]
    return np.concatenate(windows, axis=-1) / h.dtype.type(3)
