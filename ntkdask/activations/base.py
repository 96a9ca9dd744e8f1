"""Activations σ with their dual activations: what infinitely many neurons do to a covariance.

k_σ(a, b, c) = E[σ(u)σ(v)] and k_σ'(a, b, c) = E[σ'(u)σ'(v)] for (u, v) ~ N(0, [[a², abc], [abc, b²]]). Formulas and
their sources: MATH.md §2. Each activation is a frozen dataclass, registered under its class name and found by
`get("relu")`; a new one is a new class and nothing else. Arrays are NumPy or CuPy, float32 or float64; the result has
their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ntkdask.arrays import Array
from ntkdask.errors import InputError, nearest

_by_name: dict[str, type[ActivationFunction]] = {}


@dataclass(frozen=True)
class ActivationFunction:
    """σ, its dual and the dual of its derivative. Subclasses give the four methods below."""

    name: ClassVar[str] = ""
    homogeneous: ClassVar[bool] = False
    """σ(st) = sσ(t) for s >= 0, so that k_σ(a, b, c) = ab·k_σ(1, 1, c)."""

    @property
    def slopes(self) -> tuple[float, float] | None:
        """(A, B) where σ(t) = −A·min(t, 0) + B·max(t, 0), for the fused passes of `kernels/`; None for any other σ."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            _by_name[cls.name] = cls

    def __call__(self, t: Array) -> Array:
        """σ(t), elementwise."""
        raise NotImplementedError

    def dual(self, a: Array, b: Array, c: Array) -> Array:
        """k_σ(a, b, c); a, b >= 0 are standard deviations, c a correlation (clipped to [-1, 1])."""
        raise NotImplementedError

    def dual_derivative(self, a: Array, b: Array, c: Array) -> Array:
        """k_σ'(a, b, c), the dual activation of the (almost everywhere) derivative of σ."""
        raise NotImplementedError

    def second_moment(self) -> float:
        """E[σ(t)²] for t ~ N(0, 1), the constant that `normalize=True` divides by."""
        one = 1.0
        return float(self.dual(*(_scalar(one) for _ in range(3))))


def _scalar(value: float) -> Array:
    import numpy as np

    return np.asarray(value, dtype=np.float64)


def get(name: str | ActivationFunction, **parameters: float) -> ActivationFunction:
    """The activation called `name` with its parameters; an activation object is returned as it is.

    Raises InputError for an unknown name (naming the nearest) or parameters it does not take.
    """
    if isinstance(name, ActivationFunction):
        return name
    if not isinstance(name, str) or name not in _by_name:
        raise InputError(f"unknown activation {name!r}{nearest(str(name), _by_name)}")
    try:
        return _by_name[name](**parameters)
    except TypeError as error:
        raise InputError(f"activation {name!r} does not take these parameters: {error}") from error
