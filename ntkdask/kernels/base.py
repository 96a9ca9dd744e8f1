"""What a kernel is, the checks that every kernel makes on its inputs, and the correlations that most begin with."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import numpy as np

from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.errors import InputError


@runtime_checkable
class Kernel(Protocol):
    """A positive semi-definite kernel on rows; a frozen dataclass."""

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of x's kind and dtype; y=None means x, and the result is symmetric."""

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): k(x_i, x_i)."""

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes that a call on (n, ·), (m, ·) holds at its peak beyond its inputs: result, temporaries and, given a row's
        shape, copies of the rows."""


def flat_pair(x: Array, y: Array | None) -> tuple[Array, Array | None]:
    """Both inputs as (rows, features) float matrices of equal width; InputError or DtypeError otherwise."""
    x = flatten_rows(require_float(x, "x"))
    if y is None:
        return x, None
    y = flatten_rows(require_float(y, "y"))
    if x.shape[1] != y.shape[1]:
        raise InputError(f"x has {x.shape[1]} features a row and y has {y.shape[1]}; they must agree.")
    return x, y


def cosines(x: Array, y: Array | None, scale: float = 1.0) -> tuple[Array, Array, Array]:
    """(cos(x_i, y_j), √scale·‖x_i‖, √scale·‖y_j‖) in float64: (n, m), (n,), (m,). A zero row has cosine 0.

    y=None means x: the diagonal is then exactly 1 (0 for zero rows).
    """
    xp = namespace(x)
    x = x.astype(xp.float64, copy=False)
    other = x if y is None else y.astype(xp.float64, copy=False)
    a = xp.sqrt(scale * xp.einsum("ij,ij->i", x, x))
    b = a if y is None else xp.sqrt(scale * xp.einsum("ij,ij->i", other, other))
    c = x @ other.T
    c *= scale
    to_correlation(c, a, b, symmetric=y is None)
    return c, a, b


def to_correlation(s: Array, a: Array, b: Array, symmetric: bool) -> None:
    """Divide a covariance by both standard deviations in place; 0 where either is 0, diagonal exact, clipped to ±1."""
    xp = namespace(s)
    least = math.sqrt(np.finfo(np.float64).tiny)
    # one division by the product, not two divisions: a symmetric s stays symmetric to the last bit
    s /= xp.maximum(a, least)[:, None] * xp.maximum(b, least)
    if symmetric:
        diagonal = xp.arange(s.shape[0])
        s[diagonal, diagonal] = (a > 0).astype(s.dtype)
    xp.clip(s, -1.0, 1.0, out=s)


def row_copies_bytes(n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None) -> int:
    """Bytes of both inputs in float64, which `cosines` makes of float32 rows; 0 for float64 rows or an unknown shape."""
    return 0 if row_shape is None or itemsize == 8 else 8 * (n + m) * math.prod(row_shape)
