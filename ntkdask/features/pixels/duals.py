"""What an activation does to features of pixels: features of k_σ(Λ) and of T·k_σ'(Λ), in place on a block of rows.

μ are features of Λ, χ of T. A dual is realised in one of two ways, for k and for k' separately:
- "random": z = H G μ with G a diagonal of normals; every z_j is exactly N(0, Λ), and jointly so for two pixels, whatever μ is. So
  σ(z)/√p are unbiased features of k given μ, and σ'(z) ⊙ H χ/p of T·k'. One transform serves k and k', another one T.
- "series": Σ_ℓ ±r_ℓ·Q_ℓ μ̂ with the Hermite coefficients r_ℓ of σ and sketches Q_ℓ of powers; the same for k', multiplied with
χ by
  a TensorSRHT. The series is truncated; what it leaves out at c = 1 is added to the last degree.
Then rows are scaled to their exact norms √S'(p, p), √T'(p, p), where those are known, and multiplied by random signs, on which
the next operations (sums over a filter, Hadamard transforms) rely. Called by `pixels.layers`. MATH.md §1, §2, §4; Zandieh et
al. 2021, Definition 2 and Algorithm 1; structured normals: Le et al. 2013.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds
from ntkdask.activations import ActivationFunction, NormalizedGaussian, RectifiedMonomial, Sign, Step
from ntkdask.activations.derivatives import derivative
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.compiled import compiled
from ntkdask.features.pixels.random_vectors import random_normals, random_signs
from ntkdask.features.sketching.hadamard import walsh_hadamard
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.features.sketching.radial_functions import active_degrees, radial_functions, slope_functions
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.networks import Activation

METHODS = ("random", "mixed", "sketch")


@dataclass(frozen=True)
class Norms:
    """Exact squared norms for a block of rows, (rows,) float64.

    s of μ and t of χ before the activation, s_after and t_after after it.
    """

    s: Array
    t: Array
    s_after: Array
    t_after: Array

    def __getitem__(self, rows: slice) -> Norms:
        return Norms(self.s[rows], self.t[rows], self.s_after[rows], self.t_after[rows])


def norms_after(layer: Activation, s: Array, t: Array) -> Norms:
    """The norms around a layer, for S(p, p) and T(p, p) of any shape, flattened: S' = k(√S, √S, 1), T' = T·k'(√S, √S, 1)."""
    a = namespace(s).sqrt(s.ravel())
    after = layer.gain * layer.sigma.dual(a, a, 1.0)
    slope = layer.gain * layer.sigma.dual_derivative(a, a, 1.0)
    return Norms(s.ravel(), t.ravel(), after, t.ravel() * slope)


def has_slope(sigma: ActivationFunction) -> bool:
    """Whether k_σ' is not zero: it is where σ' is 0 almost everywhere."""
    return not (isinstance(sigma, (Step, Sign)) or (isinstance(sigma, RectifiedMonomial) and sigma.q == 0))


def require_function(sigma: ActivationFunction) -> ActivationFunction:
    """`sigma` when random features can be made of it; InputError unless σ and σ' are known or it is a normalised Gaussian."""
    if not isinstance(sigma, NormalizedGaussian):
        derivative(sigma, np.ones(1))
    return sigma


@dataclass(frozen=True)
class PixelDual:
    """One activation layer at one place of a network; its random numbers follow from (seed, path).

    Parameters
    ----------
    layer : Activation
        The layer.
    width : int
        Features of a pixel, a power of two.
    method : {"random", "sketch", "mixed"}
        "sketch": series for k and k'; "mixed": a series for k, random features for k'.
    degree : int
        Degree of the series.
    seed : int
        Seed of the random numbers.
    path : tuple
        Place of the layer in the network.
    """

    layer: Activation
    width: int
    method: str
    degree: int
    seed: int
    path: seeds.Path

    def __call__(self, mu: Array, chi: Array | None, norms: Norms | None, phi_needed: bool = True) -> None:
        """Overwrite mu (rows, width) with features of k(Λ), and chi with features of T·k'(Λ); both are C-ordered.

        chi is None where T = 0. Unless `phi_needed`, mu is scratch. Without `norms` the rows keep the norms of their features.
        """
        if self.method == "random" and self.layer.sigma.slopes is not None:
            self._rectify(mu, chi, norms, phi_needed)
            return
        if norms is not None:
            _scale_rows(mu, norms.s)
        tangent = chi is not None
        if self.method == "random":
            value, slope = self._random(mu, tangent)
        elif self.method == "sketch":
            value, slope = self._series(mu, norms, tangent)
        else:
            value = self._series(mu, norms, False)[0] if phi_needed else None
            slope = self._random(mu, tangent)[1]
        if chi is not None:
            if self.method == "sketch":
                TensorSRHT(self.width, self.seed, (*self.path, "tensor"))(slope, chi, out=chi)
            else:
                walsh_hadamard(chi, out=chi)
                chi *= slope
                chi *= chi.dtype.type(1 / math.sqrt(self.width))
            self._finish(chi, norms and norms.t_after, "tangent signs")
        if phi_needed:
            mu[...] = value
            self._finish(mu, norms and norms.s_after, "signs")

    def _rectify(self, mu: Array, chi: Array | None, norms: Norms | None, phi_needed: bool) -> None:
        """The whole call for σ = −A·min(t, 0) + B·max(t, 0), whose σ' does not depend on lengths."""
        root = math.sqrt(self.layer.gain / self.width)
        low, high = (root * slope for slope in self.layer.sigma.slopes or ())
        mu *= self._normals(mu)
        walsh_hadamard(mu, out=mu)
        if chi is not None:
            walsh_hadamard(chi, out=chi)
        if is_device_array(mu):
            slopes = _slopes_of(mu, low, high)
            if chi is not None:
                chi *= slopes
                self._finish(chi, norms and norms.t_after, "tangent signs")
            mu *= slopes
            self._finish(mu, norms and norms.s_after, "signs")
            return
        signs = self._signs("signs", mu), self._signs("tangent signs", mu)
        exact = np.zeros((2, 0)) if norms is None else np.sqrt(np.stack([norms.s_after, norms.t_after]))
        _rectify_rows(mu, mu if chi is None else chi, chi is not None, phi_needed, low, high, *signs, exact)

    def _random(self, z: Array, tangent: bool) -> tuple[Array, Array]:
        """(features of k, factors of k' on H χ/√width) of rows z = μ, which is overwritten; no factors without `tangent`."""
        xp, sigma, root = namespace(z), self.layer.sigma, math.sqrt(self.layer.gain)
        lengths = xp.sqrt(xp.einsum("ij,ij->i", z, z))[:, None]
        if isinstance(sigma, NormalizedGaussian):
            z /= xp.where(lengths > 0, lengths, 1)
        z *= self._normals(z)
        walsh_hadamard(z, out=z)
        if isinstance(sigma, NormalizedGaussian):
            # exp(scale·(c − 1)) is a Gaussian kernel of unit vectors: cosines and sines of the same half of z
            half, scale = self.width // 2, math.sqrt(sigma.scale)
            z *= z.dtype.type(scale)
            slope = xp.concatenate([xp.cos(z[:, :half]), xp.sin(z[:, :half])], axis=1)
            slope *= z.dtype.type(math.sqrt(2))
            return slope * (lengths * z.dtype.type(1 / math.sqrt(self.width))), slope * z.dtype.type(scale)
        slope = None
        if tangent:
            slope = _slopes_of(z, *sigma.slopes) * root if sigma.slopes else root * derivative(sigma, z)
        value = sigma(z)
        if not has_slope(sigma):
            value = xp.where(z == 0, (sigma(z) + sigma(-z)) / 2, value)
        value = value * z.dtype.type(root / math.sqrt(self.width))
        return value, None if slope is None else slope.astype(z.dtype, copy=False)

    def _series(self, mu: Array, norms: Norms | None, tangent: bool) -> tuple[Array, Array]:
        """(features of k, features of k') of rows μ; without `tangent` the latter are None."""
        xp, sigma = namespace(mu), self.layer.sigma
        squares = xp.einsum("ij,ij->i", mu, mu)
        unit = mu / xp.sqrt(xp.where(squares > 0, squares, 1))[:, None]
        a = xp.sqrt(squares.astype(xp.float64) if norms is None else norms.s)
        degrees, slope_degrees = active_degrees(sigma, self.degree), slope_powers(sigma, self.degree) if tangent else ()
        weights, slopes = completed_series(sigma, a, self.degree, tangent)
        powers = sorted({*degrees, *slope_degrees} - {0})
        sketches = self._powers(powers)(unit, degrees=powers)
        by_power = dict(zip(powers, sketches, strict=True))
        value = self._summed(by_power, degrees, weights, "value", mu)
        return value, None if slopes is None else self._summed(by_power, slope_degrees, slopes, "slope", mu)

    def _powers(self, powers: Sequence[int]) -> PolySketch:
        return PolySketch(max(powers, default=1), self.width, self.seed, (*self.path, "powers"))

    def _summed(
        self, sketches: Mapping[int, Array], degrees: tuple[int, ...], weights: Array, name: str, like: Array
    ) -> Array:
        """√gain·Σ_ℓ ±w_ℓ·Q_ℓ, (rows, width); each degree has signs of its own, whose stream `name` tells apart."""
        dtype, root = like.dtype, math.sqrt(self.layer.gain)
        constant = self._signs((name, 0), like) * dtype.type(root / math.sqrt(self.width))
        total = weights[0].astype(dtype)[:, None] * constant
        for degree in degrees:
            if not degree:
                continue
            sketch = sketches[degree]
            total += (root * weights[degree]).astype(dtype)[:, None] * (sketch * self._signs((name, degree), like))
        return total

    def _finish(self, features: Array, squares: Array | None, name: str) -> None:
        """Multiply by random signs and scale to exact norms where those are known."""
        features *= self._signs(name, features)
        if squares is not None:
            _scale_rows(features, squares)

    def _normals(self, like: Array) -> Array:
        return random_normals(self.seed, (*self.path, "normals"), self.width, like)

    def _signs(self, name: str | tuple[str, int], like: Array) -> Array:
        return random_signs(self.seed, (*self.path, *((name,) if isinstance(name, str) else name)), self.width, like)


def _scale_rows(x: Array, squares: Array) -> None:
    """Scale the rows of x to the norms √squares, in place; rows of 0 stay 0."""
    xp = namespace(x)
    own = xp.einsum("ij,ij->i", x, x).astype(xp.float64)
    factors = xp.sqrt(squares / xp.where(own > 0, own, 1))
    x *= xp.where(own > 0, factors, 0)[:, None].astype(x.dtype)


def slope_powers(sigma: ActivationFunction, degree: int) -> tuple[int, ...]:
    """The ℓ <= degree for which the Hermite coefficients of σ' are not zero at every length."""
    return tuple(n - 1 for n in active_degrees(sigma, degree + 1) if n)


def completed_series(sigma: ActivationFunction, a: Array, degree: int, tangent: bool = True) -> tuple[Array, Array]:
    """Hermite coefficients of σ(at) and of σ'(at), each (degree + 1, rows) for lengths a (rows,), with exact sums of squares.

    k(a, b, c) ≈ Σ_ℓ w_ℓ(a)w_ℓ(b)c^ℓ, equal at a = b, c = 1; k' alike. Unless `tangent`, the coefficients of σ' are None. Raises
    InputError where σ has no usable expansion.
    """
    radii = radial_functions(sigma, a, degree + 1)
    weights = _completed(radii[: degree + 1].copy(), sigma.dual(a, a, 1.0), active_degrees(sigma, degree))
    if not tangent:
        return weights, None
    if not has_slope(sigma):
        return weights, namespace(a).zeros_like(weights)
    slopes = slope_functions(sigma, a, degree + 1, radii)
    return weights, _completed(slopes, sigma.dual_derivative(a, a, 1.0), slope_powers(sigma, degree))


def _completed(weights: Array, whole: Array, degrees: tuple[int, ...]) -> Array:
    """Weights with Σ_ℓ w_ℓ² = whole: the last of the degrees is given what a truncation leaves out, so that norms are right."""
    missing = namespace(weights).maximum(whole - (weights * weights).sum(axis=0), 0.0)
    last = max((degree for degree in degrees if degree < len(weights)), default=0)
    weights[last] = namespace(weights).sqrt(weights[last] ** 2 + missing)
    return weights


def _slopes_of(z: Array, low: float, high: float) -> Array:
    """σ'(z) of a rectifier: B above 0, −A below, and at 0 their mean, where the kernels have the limit of κ₀."""
    xp = namespace(z)
    middle = z.dtype.type((high - low) / 2)
    return xp.where(z > 0, z.dtype.type(high), xp.where(z < 0, z.dtype.type(-low), middle))


@compiled
def _rectify_rows(z, u, tangent, phi_needed, low, high, signs, tangent_signs, exact):
    """z ← ±σ(z), u ← ±σ'(z)·u in place, then rows scaled to the norms exact[0], exact[1] (2, rows); left as they are for (2, 0)."""
    middle = (high - low) / 2
    kind = z.dtype.type
    up, down, between = kind(high), kind(-low), kind(middle)
    for r in range(z.shape[0]):
        row, other = z[r], u[r]
        own, square = kind(0), kind(0)
        if tangent:
            for j in range(row.size):
                t = row[j]
                slope = up if t > 0 else (down if t < 0 else between)
                v = other[j] * slope
                square += v * v
                other[j] = v * tangent_signs[j]
                w = t * slope
                own += w * w
                row[j] = w * signs[j]
        else:
            for j in range(row.size):
                t = row[j]
                w = t * (up if t > 0 else (down if t < 0 else between))
                own += w * w
                row[j] = w * signs[j]
        if exact.shape[1]:
            if phi_needed:
                factor = kind(exact[0, r] / math.sqrt(own)) if own > 0 else kind(0)
                for j in range(row.size):
                    row[j] *= factor
            if tangent:
                factor = kind(exact[1, r] / math.sqrt(square)) if square > 0 else kind(0)
                for j in range(row.size):
                    other[j] *= factor
