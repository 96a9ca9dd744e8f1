"""Activations σ with their dual activations: what infinitely many neurons do to a covariance.

k_σ(a, b, c) = E[σ(u)σ(v)] and k_σ'(a, b, c) = E[σ'(u)σ'(v)] for (u, v) ~ N(0, [[a², abc], [abc, b²]]). Formulas and
their sources: MATH.md §2. Each activation is a frozen dataclass, registered under its class name and found by
`get("relu")`; a new one is a new class and nothing else. Arrays are NumPy or CuPy, float32 or float64; the result has
their dtype, and a dual is computed in float64 in between.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from ntkdask.arrays import FLOAT_DTYPES, Array, is_device_array, namespace
from ntkdask.errors import DtypeError, InputError, nearest

_by_name: dict[str, type[ActivationFunction]] = {}


@dataclass(frozen=True)
class ActivationFunction:
    """σ, its dual and the dual of its derivative.

    A subclass gives `__call__`, and `_dual` and `_dual_derivative` for arrays that this class has prepared: one
    namespace, one floating dtype (float64 unless `_any_precision`), c within [−1, 1], shapes that broadcast.
    """

    name: ClassVar[str] = ""
    homogeneous: ClassVar[bool] = False
    """σ(st) = sσ(t) for s >= 0, so that k_σ(a, b, c) = ab·k_σ(1, 1, c)."""
    _any_precision: ClassVar[bool] = False
    """Float32 duals are within 1e-5 when computed in float32 (away from |c| = 1), so no float64 copies are made."""

    @property
    def slopes(self) -> tuple[float, float] | None:
        """(A, B) where σ(t) = −A·min(t, 0) + B·max(t, 0), for the fused passes of `kernels/`; None for any other σ."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("name"):
            _by_name[cls.name] = cls

    def __call__(self, t: Array) -> Array:
        """σ(t), elementwise, in t's dtype."""
        raise NotImplementedError

    def dual(self, a: Array, b: Array, c: Array) -> Array:
        """k_σ(a, b, c); a, b >= 0 are standard deviations, c a correlation (clipped to [−1, 1]).

        Shapes broadcast, (n, 1), (m,) and (n, m) say; float32 or float64, Python numbers besides. Returns the common
        shape and dtype. k_σ(a, b, c) = k_σ(b, a, c) to the last bit. Raises DtypeError for other dtypes.
        """
        return self._evaluate(self._dual, a, b, c)

    def dual_derivative(self, a: Array, b: Array, c: Array) -> Array:
        """k_σ'(a, b, c), the dual activation of the (almost everywhere) derivative of σ; arguments as in `dual`."""
        return self._evaluate(self._dual_derivative, a, b, c)

    def second_moment(self) -> float:
        """E[σ(t)²] for t ~ N(0, 1), what `normalize=True` divides by; infinite where float64 overflows."""
        return _second_moment(self)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        raise NotImplementedError

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        raise NotImplementedError

    def _evaluate(self, formula: Callable[..., Array], a: Array, b: Array, c: Array) -> Array:
        xp, dtype, (a, b, c) = common_arrays(a, b, c)
        if not self._any_precision:
            a, b, c = (v.astype(xp.float64, copy=False) for v in (a, b, c))
        # over: where the exact value exceeds the dtype, inf is the answer
        with np.errstate(over="ignore"):
            value = xp.asarray(formula(xp, a, b, xp.clip(c, -1.0, 1.0))).astype(dtype, copy=False)
        shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
        return value if value.shape == shape else xp.broadcast_to(value, shape).copy()


def common_arrays(*values: Array) -> tuple[ModuleType, np.dtype, tuple[Array, ...]]:
    """(namespace, dtype, arrays) of arguments that may be arrays or Python numbers; DtypeError unless float32 or float64."""
    xp = next((namespace(v) for v in values if is_device_array(v)), np)
    typed = [v.dtype for v in values if hasattr(v, "dtype")]
    dtype = np.result_type(*typed) if typed else np.dtype("float64")
    if dtype.name not in FLOAT_DTYPES:
        raise DtypeError(f"a dual activation got {dtype} arrays, but takes float32 or float64. Cast them first.")
    return xp, dtype, tuple(xp.asarray(v, dtype=dtype) for v in values)


def largest(*arrays: Array) -> float:
    """The largest value of all, 0 where there is none: CuPy's `max` has no `initial`."""
    return max((float(v.max()) for v in arrays if v.size), default=0.0)


@functools.lru_cache(maxsize=256)
def _second_moment(sigma: ActivationFunction) -> float:
    return float(sigma.dual(1.0, 1.0, 1.0))


def set_number(sigma: ActivationFunction, field: str, *, positive: bool = False) -> None:
    """Store a parameter of a frozen activation as a float; InputError unless it is a finite number (> 0)."""
    value = getattr(sigma, field)
    expected = "a positive number" if positive else "a finite number"
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        raise InputError(f"activation {sigma.name!r}: {field} is {value!r}, expected {expected}.")
    object.__setattr__(sigma, field, number)


MAX_DEGREE = 150
"""The second moment of tⁿ, (2n − 1)‼, exceeds float64 for larger n."""


def set_degree(sigma: ActivationFunction, field: str) -> None:
    """Store a degree of a frozen activation as an int; InputError unless it is an integer from 0 to `MAX_DEGREE`."""
    value = getattr(sigma, field)
    whole = isinstance(value, (int, float, np.integer)) and not isinstance(value, bool) and value == value // 1
    if not (whole and 0 <= value <= MAX_DEGREE):
        raise InputError(
            f"activation {sigma.name!r}: {field} is {value!r}, expected an integer from 0 to {MAX_DEGREE} "
            "(its second moment must fit float64)."
        )
    object.__setattr__(sigma, field, int(value))


def get(name: str | ActivationFunction, **parameters: Any) -> ActivationFunction:
    """The activation called `name` with its parameters; an activation object is returned as it is.

    Raises InputError for an unknown name (naming the nearest), for parameters that it does not take (naming those that
    it does) and for values that it refuses.

    >>> get("abrelu", A=0.5, B=1.5)
    ABReLU(A=0.5, B=1.5)
    """
    if isinstance(name, ActivationFunction):
        if parameters:
            raise InputError(
                f"activation {name!r} is an object already; it does not take {', '.join(parameters)} again."
            )
        return name
    if not isinstance(name, str) or name not in _by_name:
        raise InputError(f"unknown activation {name!r}{nearest(str(name), _by_name)}")
    cls = _by_name[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in parameters:
        if key not in fields:
            raise InputError(
                f"activation {name!r} does not take {key!r}; it takes {', '.join(fields) or 'no parameters'}."
            )
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in parameters]
    if missing:
        raise InputError(f"activation {name!r} needs {', '.join(missing)}: get({name!r}, {missing[0]}=...).")
    return cls(**parameters)
