"""Linear sketches by subsampled randomised Hadamard transforms: SRHT of vectors, TensorSRHT of tensor products.

Both are maps S with E⟨S x, S x'⟩ = ⟨x, x'⟩, drawn by `seeds` from (seed, path): two sketches of equal fields are the
same map on any machine, and a row's sketch does not depend on the rows beside it. They are building blocks of feature
maps, not feature maps of a network themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds, threads
from ntkdask.arrays import Array, flatten_rows, is_device_array, require_float, same_dtype, to_device
from ntkdask.cache import shared
from ntkdask.errors import InputError
from ntkdask.features.sketching.hadamard import sampled_hadamard
from ntkdask.features.sketching.operands import Factor, checked_out, padded_size, unit_stride


@dataclass(frozen=True)
class SRHT:
    """Sketch of vectors: S x = (1/√m)·(H D x)[p], with m = n_components.

    x is padded with zeros to the next power of two, D holds random signs, H is the unnormalised Hadamard matrix, p
    samples its rows as evenly as m allows. E⟨S x, S x'⟩ = ⟨x, x'⟩, exactly so when m is a multiple of the padded size.
    Source: MATH.md §4.
    """

    n_components: int
    seed: int
    path: seeds.Path = ()

    def __post_init__(self) -> None:
        _check_components(self.n_components)

    def __call__(self, x: Array, *, out: Array | None = None, scale: float = 1.0) -> Array:
        """The sketch of rows: (n, *s) -> (n, n_components) of x's dtype, times `scale`; float32 or float64, NumPy or CuPy.

        out: written and returned when given; a slice of columns of a C-ordered array will do.
        """
        x = _rows(x, "x")
        out = checked_out(out, x, (x.shape[0], self.n_components))
        return sampled_hadamard((_factor(self, 0, x),), scale / math.sqrt(self.n_components), out)

    def workspace_bytes(self, n: int, d: int, itemsize: int) -> int:
        """Peak bytes of a call on (n, d) rows of unit stride, output included."""
        return _workspace_bytes(self.n_components, n, (d,), itemsize)


@dataclass(frozen=True)
class TensorSRHT:
    """Sketch of tensor products: S(x ⊗ y) = (1/√m)·(H D₁ x)[p₁] ⊙ (H D₂ y)[p₂], with m = n_components.

    x ⊗ y is never formed. E⟨S(x⊗y), S(x'⊗y')⟩ = ⟨x, x'⟩⟨y, y'⟩. For unit vectors with α = ⟨x, x'⟩, β = ⟨y, y'⟩
    the variance is at most ((1+2α²)(1+2β²) − α²β²)/m. Source: MATH.md §4; Ahle et al. 2020.
    """

    n_components: int
    seed: int
    path: seeds.Path = ()

    def __post_init__(self) -> None:
        _check_components(self.n_components)

    def __call__(self, x: Array, y: Array, *, out: Array | None = None, scale: float = 1.0) -> Array:
        """The sketch of x ⊗ y: (n, d1), (n, d2) -> (n, n_components) of their common dtype, times `scale`.

        x and y: float32 or float64, NumPy or CuPy. out: written and returned when given; a slice of columns of a C-ordered
        array will do. Raises InputError when x and y differ in rows or device.
        """
        x, y = _rows(x, "x"), _rows(y, "y")
        if x.shape[0] != y.shape[0] or is_device_array(x) != is_device_array(y):
            raise InputError(
                f"x has {x.shape[0]} rows and y {y.shape[0]}; they need the same rows, on the same device."
            )
        x, y = same_dtype(x, y)
        out = checked_out(out, x, (x.shape[0], self.n_components))
        factors = (_factor(self, 0, x), _factor(self, 1, y))
        return sampled_hadamard(factors, scale / math.sqrt(self.n_components), out)

    def workspace_bytes(self, n: int, d1: int, d2: int, itemsize: int) -> int:
        """Peak bytes of a call on (n, d1), (n, d2) rows of unit stride, output included."""
        return _workspace_bytes(self.n_components, n, (d1, d2), itemsize)


def _check_components(n_components: int) -> None:
    if n_components < 1:
        raise InputError(f"n_components is {n_components}; a sketch needs at least 1.")


def _rows(x: Array, name: str) -> Array:
    x = unit_stride(flatten_rows(require_float(x, name)))
    if not x.shape[1]:
        raise InputError(f"{name} has shape {x.shape}; a sketch needs at least one column.")
    return x


def _factor(sketch: SRHT | TensorSRHT, k: int, x: Array) -> Factor:
    """Operand `k` with its signs and sampled rows, drawn once per process and device."""
    d, dtype, device = x.shape[1], x.dtype.name, is_device_array(x)
    size = padded_size(d)

    def draw() -> tuple[Array, Array]:
        signs = seeds.signs(sketch.seed, (*sketch.path, "signs", k), size, dtype)[:d]
        rows = seeds.balanced_integers(sketch.seed, (*sketch.path, "rows", k), size, sketch.n_components)
        return to_device(signs, device), to_device(rows.astype(np.uint32), device)

    key = ("srht", sketch.seed, sketch.path, k, d, sketch.n_components, dtype, device and x.device.id)
    signs, rows = shared.get(key, draw)
    return Factor(x, signs, rows, size)


def _workspace_bytes(m: int, n: int, widths: tuple[int, ...], itemsize: int) -> int:
    sizes = [padded_size(d) for d in widths]
    scratch = threads.current() * sum(size * itemsize + 256 for size in sizes)
    # Drawing: random words, their order and two copies of the indices in 64 bits, whole permutations at a time.
    drawing = sum(24 * size + 16 * (m + size) + 8 * m + 2 * size * itemsize for size in sizes)
    return n * m * itemsize + scratch + drawing + 32 * 1024
