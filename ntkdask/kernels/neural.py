"""NTK and NNGP of fully connected networks, exactly, by the recursion of MATH.md §1.

S and T go through the layers as whole (n, m) matrices in float64, whatever the input's dtype: κ₀ loses half the digits
of its argument near |c| = 1, and float32 has too few. The result is returned in the input's dtype; the diagonal of a
symmetric call is exact. Called by workflows on tiles and by tests as the target of the feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.errors import InputError
from ntkdask.kernels.base import cosines, flat_pair, row_copies_bytes, to_correlation
from ntkdask.networks import Activation, Network
from ntkdask.registry import register


def _recursion(network: Network, x: Array, y: Array | None) -> tuple[Array, Array]:
    """Final (S, T) of a fully connected network, float64."""
    xp = namespace(x)
    c, a, b = cosines(x, y, 1.0 / x.shape[1] if network.scale_inputs else 1.0)
    s = a[:, None] * b * c
    t = xp.zeros_like(s)
    va, vb = a * a, b * b
    for layer in network.layers:
        if isinstance(layer, Activation):
            a, b = xp.sqrt(va), xp.sqrt(vb)
            to_correlation(s, a, b, symmetric=y is None)
            t *= layer.gain * layer.sigma.dual_derivative(a[:, None], b, s)
            s = layer.gain * layer.sigma.dual(a[:, None], b, s)
            one = xp.ones_like(a), xp.ones_like(b)
            va = layer.gain * layer.sigma.dual(a, a, one[0])
            vb = layer.gain * layer.sigma.dual(b, b, one[1])
        else:
            s = layer.weight_variance * s + layer.bias_variance
            t = layer.weight_variance * t + (s if layer.trainable else 0.0)
            va = layer.weight_variance * va + layer.bias_variance
            vb = layer.weight_variance * vb + layer.bias_variance
    return s, t


def _diagonal(network: Network, x: Array) -> tuple[Array, Array]:
    """(S(x_i, x_i), T(x_i, x_i)) in float64, O(n·d)."""
    xp = namespace(x)
    x = x.astype(xp.float64)
    s = xp.einsum("ij,ij->i", x, x) / (x.shape[1] if network.scale_inputs else 1.0)
    t = xp.zeros_like(s)
    one = xp.ones_like(s)
    for layer in network.layers:
        if isinstance(layer, Activation):
            a = xp.sqrt(s)
            # a zero row has no direction: its correlation with itself is 0 by the convention of `cosines`
            c = xp.where(a > 0, one, 0.0)
            t = t * layer.gain * layer.sigma.dual_derivative(a, a, c)
            s = layer.gain * layer.sigma.dual(a, a, one)
        else:
            s = layer.weight_variance * s + layer.bias_variance
            t = layer.weight_variance * t + (s if layer.trainable else 0.0)
    return s, t


def both(network: Network, x: Array | None = None, y: Array | None = None):
    """(NNGP, NTK) in one pass: two (n, m) matrices of x's dtype. Without x, a function of (x, y=None) that gives them."""
    if x is None:
        return lambda x, y=None: both(network, x, y)
    x, y = flat_pair(x, y)
    s, t = _recursion(network, x, y)
    return s.astype(x.dtype), t.astype(x.dtype)


@dataclass(frozen=True)
class _NeuralKernel:
    network: Network

    def __post_init__(self) -> None:
        if not isinstance(self.network, Network):
            raise InputError(
                f"{type(self).__name__}: network is {self.network!r}; give a Network, for example fully_connected(1)."
            )

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """S, T and about six float64 temporaries of (n, m), the result, and float64 copies of float32 rows."""
        return 8 * 8 * n * m + n * m * itemsize + row_copies_bytes(n, m, itemsize, row_shape)


@register("kernel")
@dataclass(frozen=True)
class NTK(_NeuralKernel):
    """The neural tangent kernel Θ of a `Network` at infinite width. Source: Jacot et al. 2018; MATH.md §1."""

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m), computed in float64, returned in x's dtype."""
        return both(self.network, x, y)[1]

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): Θ(x_i, x_i); (depth+1)‖x_i‖² for normalised ReLU."""
        x = flatten_rows(require_float(x))
        return _diagonal(self.network, x)[1].astype(x.dtype)


@register("kernel")
@dataclass(frozen=True)
class NNGP(_NeuralKernel):
    """The covariance of a random `Network` at infinite width (its Gaussian process at initialisation)."""

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m), computed in float64, returned in x's dtype."""
        return both(self.network, x, y)[0]

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): S(x_i, x_i); ‖x_i‖² for normalised ReLU."""
        x = flatten_rows(require_float(x))
        return _diagonal(self.network, x)[0].astype(x.dtype)
