"""tanh, sigmoid, SiLU and softplus: no closed dual is known, so a and b choose one of two methods, which agree to 1e-11.

Up to `SERIES_LIMIT` standard deviations it is the truncated Hermite expansion (`expansion`, degrees up to 512): one multiplication
and one addition per degree, to the degree that the entry's own a and b need. Beyond, where the expansion converges slowly, the
logistic function is taken as a mixture of normal CDFs, sigmoid(t) = E[Φ(t/2K)] with K of the Kolmogorov-Smirnov law (Stefanski 1991),
by an 18-point Gauss rule in log K. Then every dual is a positive sum over pairs of closed forms (`probit`), accurate for any a, b.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np

from ntkdask.activations import probit
from ntkdask.activations.base import ActivationFunction, largest
from ntkdask.activations.expansion import BLOCK_ENTRIES, DEVICE_BLOCK_ENTRIES, by_blocks, expand_alone, expanded_dual
from ntkdask.arrays import Array, is_device_array, namespace, special
from ntkdask.registry import register

TOLERANCE = 1e-12
MAX_DEGREE = 512
MIXTURE_POINTS = 18


def _kolmogorov_density(k: np.ndarray) -> np.ndarray:
    """Density of the Kolmogorov-Smirnov law: 8k·Σ(−1)^{n+1}n²e^{−2n²k²}, below 0.8 by its theta-transformed series."""
    n = np.arange(1, 40)[:, None]
    direct = 8 * k * ((-1.0) ** (n + 1) * n**2 * np.exp(-2 * n**2 * k**2)).sum(axis=0)
    m = (2 * n - 1) ** 2 * math.pi**2 / 8
    transformed = math.sqrt(2 * math.pi) * (np.exp(-m / k**2) * (2 * m / k**4 - 1 / k**2)).sum(axis=0)
    return np.where(k < 0.8, transformed, direct)


@functools.cache
def logistic_mixture(points: int = MIXTURE_POINTS) -> tuple[tuple[float, float], ...]:
    """Pairs (weight w_i, scale s_i) with sigmoid(t) = Σ w_i·Φ(s_i·t), Σ w_i = 1.

    Parameters
    ----------
    points : int
        Number of pairs; 18 give an error of at most 1e-12 for every t.

    Returns
    -------
    tuple of (float, float)

    Notes
    -----
    The Gauss rule of the law of log K, from 92 equispaced points (exact to rounding) by the Lanczos process; s = 1/(2K).

    References
    ----------
    Stefanski 1991; Monahan & Stefanski 1992 fit such mixtures.
    """
    logs = np.arange(math.log(0.13), math.log(5.0), 0.04)
    mass = 0.04 * np.exp(logs) * _kolmogorov_density(np.exp(logs))
    basis = np.zeros((points, logs.size))
    diagonal, below = np.zeros(points), np.zeros(points)
    vector = np.sqrt(mass / mass.sum())
    for j in range(points):
        basis[j] = vector
        rest = logs * vector
        diagonal[j] = vector @ rest
        for _ in range(2):  # a second pass makes the vectors orthogonal to rounding
            rest = rest - basis[: j + 1].T @ (basis[: j + 1] @ rest)
        below[j] = np.linalg.norm(rest)
        vector = rest / below[j]
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(below[:-1], 1) + np.diag(below[:-1], -1))
    weights = vectors[0] ** 2 / (vectors[0] ** 2).sum()
    return tuple((float(w), 0.5 * math.exp(-float(z))) for w, z in zip(weights, nodes, strict=True))


def mixture_dual(
    term: Callable[[Array, Array, Array], Array], a: Array, b: Array, c: Array, stretch: float = 1.0, power: int = 0
) -> Array:
    """Σ_ij w_i w_j (m_i m_j)^power·term(m_i a, m_j b, c) over the mixture of `logistic_mixture`, m_i = stretch·s_i.

    Parameters
    ----------
    term : callable
        (a, b, c) → the dual of one pair of normal CDFs.
    a, b : array, float64
        Standard deviations, >= 0.
    c : array, float64
        Correlations within [−1, 1]; shapes broadcast.
    stretch : float
        A factor on every scale: 2 for functions of sigmoid(2t).
    power : int
        The power of each scale that multiplies a term.

    Returns
    -------
    array of the broadcast shape, float64
        Symmetric in a and b to the last bit, because pairs (i, j) and (j, i) are added first.
    """
    mixture = [(w, stretch * s) for w, s in logistic_mixture()]

    def pairs(a: Array, b: Array, c: Array) -> Array:
        total = 0.0
        for i, (w, m) in enumerate(mixture):
            total = total + w * w * (m * m) ** power * term(m * a, m * b, c)
            for v, n in mixture[:i]:
                total = total + w * v * (m * n) ** power * (term(m * a, n * b, c) + term(n * a, m * b, c))
        return total

    return by_blocks(pairs, a, b, c, DEVICE_BLOCK_ENTRIES if is_device_array(c) else BLOCK_ENTRIES)


@dataclass(frozen=True)
class Logistic(ActivationFunction):
    """What tanh, sigmoid, SiLU and softplus share, the choice of a method; a subclass gives σ, σ' and its sums over the mixture."""

    SERIES_LIMIT: ClassVar[float] = 4.0
    """Largest a or b for which the expansion of σ and of σ' reaches 1e-12 by degree 512."""

    def derivative(self, t: Array) -> Array:
        """σ'(t), elementwise."""
        raise NotImplementedError

    def expansion_dual(self, a: Array, b: Array, c: Array, *, derivative: bool = False) -> Array:
        """k_σ, or k_σ' with `derivative`, by the truncated Hermite expansion; float64 arrays that broadcast, c within [−1, 1].

        Accurate to 1e-11 normwise for a, b <= `SERIES_LIMIT`; for larger ones the expansion is cut at degree 512.
        """
        f = self.derivative if derivative else self
        return expanded_dual(lambda values: expand_alone(f, values, TOLERANCE, MAX_DEGREE), a, b, c)[0]

    def mixture_dual(self, a: Array, b: Array, c: Array, *, derivative: bool = False) -> Array:
        """k_σ, or k_σ' with `derivative`, by the mixture of normal CDFs, for any a, b >= 0; arguments as of `expansion_dual`."""
        raise NotImplementedError

    def _choose(self, a: Array, b: Array, c: Array, derivative: bool) -> Array:
        """k_σ or k_σ' of every entry by the method for its own a and b: what stands beside it in a tile does not matter."""
        limit = self.SERIES_LIMIT
        if largest(a, b) <= limit:
            return self.expansion_dual(a, b, c, derivative=derivative)
        value, xp = self.mixture_dual(a, b, c, derivative=derivative), namespace(c)
        short = (a <= limit) & (b <= limit)
        if bool(short.any()):
            series = self.expansion_dual(xp.minimum(a, limit), xp.minimum(b, limit), c, derivative=derivative)
            xp.copyto(value, series, where=short)
        return value

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return self._choose(a, b, c, False)

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        return self._choose(a, b, c, True)


@register("activation")
@dataclass(frozen=True)
class Sigmoid(Logistic):
    """σ(t) = 1/(1 + e^{−t}).

    k = Σ_ij w_i w_j·E[Φ(u)Φ(v)] and k' = Σ_ij w_i w_j s_i s_j·E[φ(u)φ(v)] over the mixture, u and v scaled by s_i and s_j; or the
    expansion.
    """

    name: ClassVar[str] = "sigmoid"

    def __call__(self, t: Array) -> Array:
        """1/(1 + e^{−t})."""
        return special(t).expit(t)

    def derivative(self, t: Array) -> Array:
        """σ(t)·σ(−t)."""
        return special(t).expit(t) * special(t).expit(-t)

    def mixture_dual(self, a: Array, b: Array, c: Array, *, derivative: bool = False) -> Array:
        """See `Logistic.mixture_dual`."""
        if derivative:
            return mixture_dual(probit.density_dual, a, b, c, power=1)
        return mixture_dual(probit.probit_dual, a, b, c)


@register("activation")
@dataclass(frozen=True)
class Tanh(Logistic):
    """σ(t) = tanh t = 2·sigmoid(2t) − 1."""

    name: ClassVar[str] = "tanh"
    SERIES_LIMIT: ClassVar[float] = 2.0

    def __call__(self, t: Array) -> Array:
        """tanh t."""
        return namespace(t).tanh(t)

    def derivative(self, t: Array) -> Array:
        """1/cosh² t = 4·sigmoid(2t)·sigmoid(−2t)."""
        return 4 * special(t).expit(2 * t) * special(t).expit(-2 * t)

    def mixture_dual(self, a: Array, b: Array, c: Array, *, derivative: bool = False) -> Array:
        """See `Logistic.mixture_dual`."""
        if derivative:
            return 4 * mixture_dual(probit.density_dual, a, b, c, stretch=2.0, power=1)
        return mixture_dual(probit.centred_probit_dual, a, b, c, stretch=2.0)


@register("activation")
@dataclass(frozen=True)
class SiLU(Logistic):
    """σ(t) = t·sigmoid(t) = Σ w_i·gelu(s_i t)/s_i, also called swish.

    References
    ----------
    Elfwing et al. 2018.
    """

    name: ClassVar[str] = "silu"

    def __call__(self, t: Array) -> Array:
        """t/(1 + e^{−t})."""
        return t * special(t).expit(t)

    def derivative(self, t: Array) -> Array:
        """sigmoid(t)·(1 + t·sigmoid(−t))."""
        return special(t).expit(t) * (1 + t * special(t).expit(-t))

    def mixture_dual(self, a: Array, b: Array, c: Array, *, derivative: bool = False) -> Array:
        """See `Logistic.mixture_dual`."""
        if derivative:
            return mixture_dual(probit.gelu_dual_derivative, a, b, c)
        return mixture_dual(probit.gelu_dual, a, b, c, power=-1)


@register("activation")
@dataclass(frozen=True)
class Softplus(Logistic):
    """σ(t) = log(1 + e^t), the integral of sigmoid, so that k' is the dual of sigmoid."""

    name: ClassVar[str] = "softplus"

    def __call__(self, t: Array) -> Array:
        """max(t, 0) + log(1 + e^{−|t|})."""
        xp = namespace(t)
        return xp.maximum(t, 0) + xp.log1p(xp.exp(-xp.abs(t)))

    def derivative(self, t: Array) -> Array:
        """sigmoid(t)."""
        return special(t).expit(t)

    def mixture_dual(self, a: Array, b: Array, c: Array, *, derivative: bool = False) -> Array:
        """See `Logistic.mixture_dual`."""
        if derivative:
            return mixture_dual(probit.probit_dual, a, b, c)
        return mixture_dual(probit.smooth_ramp_dual, a, b, c, power=-1)
