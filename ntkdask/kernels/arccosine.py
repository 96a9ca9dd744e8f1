"""Arc-cosine kernels of orders 0 and 1, the building blocks of every ReLU kernel."""

from __future__ import annotations

from dataclasses import dataclass

from ntkdask.activations import kappa0, kappa1
from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.errors import InputError
from ntkdask.kernels.base import cosines, flat_pair, row_copies_bytes
from ntkdask.registry import register


@register("kernel")
@dataclass(frozen=True)
class ArcCosine:
    """κ₀(cos) for order 0, ‖x‖‖y‖κ₁(cos) for order 1; κ(1) = 1. A zero row has cosine 0 with every row.

    Computed in float64, returned in x's dtype. Source: Cho & Saul 2009, normalised as Zandieh et al. 2021, eq. 2.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if self.order not in (0, 1):
            raise InputError(f"ArcCosine: order is {self.order!r}; orders 0 and 1 are there.")

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m)."""
        x, y = flat_pair(x, y)
        c, a, b = cosines(x, y)
        return (kappa0(c) if self.order == 0 else a[:, None] * b * kappa1(c)).astype(x.dtype)

    def diagonal(self, x: Array) -> Array:
        """‖x‖² for order 1; for order 0 κ₀(1) = 1, and κ₀(0) = ½ for a zero row."""
        x = flatten_rows(require_float(x))
        xp = namespace(x)
        if self.order == 0:
            return xp.where(x.any(axis=1), 1.0, 0.5).astype(x.dtype)
        return xp.einsum("ij,ij->i", x, x)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Six float64 matrices of (n, m) live at the peak, and float64 copies of float32 rows."""
        return 6 * 8 * n * m + n * m * itemsize + row_copies_bytes(n, m, itemsize, row_shape)
