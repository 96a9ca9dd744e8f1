"""Random features of the arc-cosine kernels: √(2/m)·step(Wᵀx) for order 0, √(2/m)·relu(Wᵀx) for order 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, flatten_rows, is_device_array, namespace, require_float, to_device
from ntkdask.cache import shared
from ntkdask.errors import InputError, nearest
from ntkdask.features.base import FeatureMapBase, require_components
from ntkdask.features.gibbs import gibbs_directions
from ntkdask.features.sketching.operands import padded_size
from ntkdask.features.sketching.structured import (
    RELU,
    STEP,
    StructuredDirections,
    scratch_bytes,
    structured_bytes,
    structured_directions,
)
from ntkdask.kernels.arccosine import ArcCosine
from ntkdask.registry import register

SAMPLINGS = ("gaussian", "spherical", "structured")


def require_sampling(sampling: str, allowed: tuple[str, ...] = SAMPLINGS) -> str:
    """`sampling` when it is one of `allowed`; InputError with the nearest known name otherwise."""
    if sampling not in allowed:
        raise InputError(f"unknown sampling {sampling!r}{nearest(str(sampling), allowed)}")
    return sampling


Weights = Array | StructuredDirections
"""(d, m) directions: a matrix, or a product that stands for one."""


def step_weights(seed: int, path: seeds.Path, d: int, m: int, like: Array, sampling: str = "gaussian") -> Weights:
    """Directions of step features, (d, m): Gaussian, or "structured"; only the signs of their products with rows matter.

    Parameters
    ----------
    seed : int
        Seed of the random numbers.
    path : tuple
        Place of these weights in the map, which with the seed fixes the numbers.
    d : int
        Features of a row.
    m : int
        Number of directions.
    like : array
        The weights take its dtype and its device.
    sampling : str
        "structured" for directions by Walsh–Hadamard transforms, anything else for a Gaussian matrix.

    Returns
    -------
    array (d, m) or StructuredDirections
        Kept by the cache of the process.
    """
    if sampling == "structured":
        return structured_directions(seed, path, d, m, like)
    return _cached("step", seed, path, d, m, like, lambda: seeds.normals(seed, path, d, m, like.dtype.name))


def relu_weights(seed: int, path: seeds.Path, d: int, m: int, sampling: str, like: Array, n_sweeps: int = 1) -> Weights:
    """Weights of ReLU features, (d, m), with the factor that makes them features of κ₁: E⟨relu(xᵀW), relu(yᵀW)⟩ = ‖x‖‖y‖κ₁.

    Parameters
    ----------
    seed : int
        Seed of the random numbers.
    path : tuple
        Place of these weights in the map, which with the seed fixes the numbers.
    d : int
        Features of a row.
    m : int
        Number of directions.
    sampling : {"gaussian", "spherical", "gibbs", "structured"}
        "gaussian": √(2/m)·N(0, I). "spherical": √(2d/m)·u with u uniform on the sphere, which has exactly the law of the
        leverage-score features of eq. 15: p(w) ∝ ‖w‖²exp(−‖w‖²/2) is isotropic, and only w/‖w‖ enters. "gibbs": the same with
        the paper's sampler in place of the exact law. "structured": the spherical law for rows padded to a power of two;
        products are Walsh–Hadamard transforms, and the directions of one transform depend on each other
        (`sketching.structured`).
    like : array
        The weights take its dtype and its device.
    n_sweeps : int
        Sweeps of the Gibbs sampler.

    Returns
    -------
    array (d, m) or StructuredDirections
        Kept by the cache of the process.

    References
    ----------
    Zandieh et al. 2021, eq. 15.
    """
    if sampling == "structured":
        return structured_directions(seed, path, d, m, like, math.sqrt(2.0 / m))
    dtype = like.dtype.name

    def make() -> np.ndarray:
        if sampling == "gibbs":
            return gibbs_directions(seed, path, d, m, n_sweeps, dtype, math.sqrt(2.0 * d / m))
        if sampling == "spherical":
            return seeds.sphere(seed, path, d, m, dtype, math.sqrt(2.0 * d / m))
        return seeds.normals(seed, path, d, m, dtype, math.sqrt(2.0 / m))

    law = f"gibbs-{n_sweeps}" if sampling == "gibbs" else sampling
    return _cached("relu-" + law, seed, path, d, m, like, make)


def _cached(law: str, seed: int, path: seeds.Path, d: int, m: int, like: Array, make) -> Array:
    device = is_device_array(like)
    key = (law, seed, path, d, m, like.dtype.name, device and like.device.id)
    return shared.get(key, lambda: to_device(make(), device))


def step_into(x: Array, weights: Weights, out: Array) -> Array:
    """Write step(x·weights) to `out`: 1 where a product is positive, else 0; x (n, d), weights (d, m), out (n, m)."""
    if isinstance(weights, StructuredDirections):
        return weights.into(x, out, STEP)
    xp = namespace(x)
    xp.matmul(x, weights, out=out)
    xp.greater(out, 0, out=out)
    return out


def relu_into(x: Array, weights: Weights, out: Array) -> Array:
    """Write max(x·weights, 0) to `out`; x (n, d), weights (d, m), out (n, m), which may be a slice of columns."""
    if isinstance(weights, StructuredDirections):
        return weights.into(x, out, RELU)
    xp = namespace(x)
    xp.matmul(x, weights, out=out)
    xp.maximum(out, 0, out=out)
    return out


@register("feature map")
@dataclass(frozen=True)
class ArcCosineFeatures(FeatureMapBase):
    """Random features of ArcCosine(order): unbiased, variance O(1/n_components).

    Order 0: √(2/m)·step(Wᵀx), whose products estimate κ₀(cos). Order 1: √(2/m)·relu(Wᵀx), whose products estimate ‖x‖‖y‖κ₁(cos).

    Parameters
    ----------
    n_components : int
        Number of features m >= 1.
    order : {0, 1}
        Order of the kernel.
    seed : int
        Seed of the directions W.
    sampling : {"gaussian", "spherical", "structured"}
        "gaussian": independent normal directions. "spherical": for order 1 directions on the sphere, which is leverage-score
        sampling and has a smaller variance. "structured": directions by Walsh–Hadamard transforms, in a fraction of the time
        (`sketching.structured`).

    Raises
    ------
    InputError
        For n_components < 1, other orders and other samplings.

    References
    ----------
    Cho & Saul 2009; Zandieh et al. 2021, eq. 11 and 15; Le et al. 2013.
    """

    n_components: int
    order: int = 1
    seed: int = 0
    sampling: str = "gaussian"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_sampling(self.sampling)
        if self.order not in (0, 1):
            raise InputError(f"ArcCosineFeatures: order is {self.order!r}; there are features of orders 0 and 1.")

    @property
    def target(self) -> ArcCosine:
        """The arc-cosine kernel of this order."""
        return ArcCosine(self.order)

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""
        x = flatten_rows(require_float(x))
        out = namespace(x).empty((x.shape[0], self.n_components), x.dtype)
        path = ("arccosine", self.order)
        if self.order:
            return relu_into(x, relu_weights(self.seed, path, x.shape[1], self.n_components, self.sampling, x), out)
        step_into(x, step_weights(self.seed, path, x.shape[1], self.n_components, x, self.sampling), out)
        out[~x.any(axis=1)] = 0.5  # step(0) = ½ makes a zero row's products those of κ₀(0) = ½
        out *= out.dtype.type(math.sqrt(2.0 / self.n_components))
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: the result and, when the shape of a row is given, the weights and their drawing."""
        d = math.prod(row_shape or (0,))
        m = self.n_components
        weights = weights_bytes(d, m, itemsize, self.sampling) + product_bytes(n, d, itemsize, self.sampling)
        return n * m * itemsize + weights + drawing_bytes(d, m, self.sampling)


def weights_bytes(d: int, m: int, itemsize: int, sampling: str) -> int:
    """Bytes of weights (d, m)."""
    return structured_bytes(d, m, itemsize) if sampling == "structured" else d * m * itemsize


def product_bytes(n: int, d: int, itemsize: int, sampling: str) -> int:
    """Bytes that a product of n rows with weights takes beside its result."""
    return scratch_bytes(n, d, itemsize) if sampling == "structured" else 0


def drawing_bytes(d: int, m: int, sampling: str = "gaussian") -> int:
    """Bytes that drawing weights (d, m) takes beside them.

    One block of columns exists as bits and in float64 steps; for the Gibbs sampler also the state of the sweep and its uniforms.
    """
    if sampling == "structured":
        d = padded_size(d)
        m = -(-m // d)
    kept = 3 * 8 * d * min(m, seeds.COLUMN_BLOCK) if sampling == "gibbs" else 0
    return 5 * 8 * d * min(m, seeds.COLUMN_BLOCK) + kept
