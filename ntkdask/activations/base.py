"""Activations σ with their dual activations, which are all that an infinitely wide layer needs of σ.

For (u, v) ~ N(0, [[a², abc], [abc, b²]]) the dual activation is k_σ(a, b, c) = E[σ(u)σ(v)], and the dual of the derivative is
k_σ'(a, b, c) = E[σ'(u)σ'(v)]. Formulas and their sources: MATH.md §2. Each activation is a frozen dataclass, registered under its
class name and found by `get("relu")`; a new activation is a new class and nothing else. Arrays are NumPy or CuPy, float32 or float64;
the result has their dtype, and a dual is computed in float64 in between.
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

from ntkdask.arrays import FLOAT_DTYPES, Array, as_array, is_device_array, namespace
from ntkdask.errors import DtypeError, InputError, nearest

_by_name: dict[str, type[ActivationFunction]] = {}


@dataclass(frozen=True)
class ActivationFunction:
    """An activation σ, its dual activation and the dual of its derivative; the base class of all activations.

    Notes
    -----
    A subclass defines `__call__`, `_dual` and `_dual_derivative`. The last two get arrays that this class has prepared:
    of one namespace and one floating dtype (float64 unless `_any_precision`), with c within [−1, 1] and shapes that broadcast.
    """

    name: ClassVar[str] = ""
    homogeneous: ClassVar[bool] = False
    """Whether σ(st) = sσ(t) for s >= 0, so that k_σ(a, b, c) = ab·k_σ(1, 1, c)."""
    _any_precision: ClassVar[bool] = False
    """Duals of float32 arrays are computed in float32, without float64 copies: the error is at most 1e-5 away from |c| = 1."""

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
        """The dual activation k_σ(a, b, c) = E[σ(u)σ(v)], (u, v) ~ N(0, [[a², abc], [abc, b²]]).

        Parameters
        ----------
        a, b : array, float32 or float64, or number
            Standard deviations, >= 0.
        c : array, float32 or float64, or number
            Correlations; clipped to [−1, 1].

        Returns
        -------
        array of the broadcast shape and the common dtype
            k_σ(a, b, c), equal to k_σ(b, a, c) to the last bit.

        Raises
        ------
        DtypeError
            For arrays of other dtypes.

        Notes
        -----
        Shapes broadcast, for example (n, 1), (m,) and (n, m).
        """
        return self._evaluate(self._dual, a, b, c)

    def dual_derivative(self, a: Array, b: Array, c: Array) -> Array:
        """The dual activation of the derivative, k_σ'(a, b, c) = E[σ'(u)σ'(v)], σ' almost everywhere; arguments as in `dual`."""
        return self._evaluate(self._dual_derivative, a, b, c)

    def second_moment(self) -> float:
        """E[σ(t)²] for t ~ N(0, 1), by which `normalize=True` divides; infinite where it overflows float64."""
        return _second_moment(self)

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        raise NotImplementedError

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        raise NotImplementedError

    def _evaluate(self, formula: Callable[..., Array], a: Array, b: Array, c: Array) -> Array:
        """The formula on prepared arrays, cast to the common dtype and broadcast to the common shape."""
        xp, dtype, (a, b, c) = common_arrays(a, b, c)
        if not self._any_precision:
            a, b, c = (v.astype(xp.float64, copy=False) for v in (a, b, c))
        # where the exact value exceeds the dtype, inf is the answer
        with np.errstate(over="ignore"):
            value = xp.asarray(formula(xp, a, b, xp.clip(c, -1.0, 1.0))).astype(dtype, copy=False)
        shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
        return value if value.shape == shape else xp.broadcast_to(value, shape).copy()


def common_arrays(*values: Array) -> tuple[ModuleType, np.dtype, tuple[Array, ...]]:
    """(namespace, dtype, arrays) of arguments that are arrays or Python numbers; DtypeError unless float32 or float64."""
    xp = next((namespace(v) for v in values if is_device_array(v)), np)
    typed = [v.dtype for v in values if hasattr(v, "dtype")]
    dtype = np.result_type(*typed) if typed else np.dtype("float64")
    if dtype.name not in FLOAT_DTYPES:
        raise DtypeError(f"a dual activation got {dtype} arrays, but takes float32 or float64. Cast them first.")
    return xp, dtype, tuple(xp.asarray(as_array(v) if hasattr(v, "dtype") else v, dtype=dtype) for v in values)


def largest(*arrays: Array) -> float:
    """The largest value in any of the arrays; 0 where all are empty (CuPy's `max` has no `initial`)."""
    return max((float(v.max()) for v in arrays if v.size), default=0.0)


@functools.lru_cache(maxsize=256)
def _second_moment(sigma: ActivationFunction) -> float:
    """`ActivationFunction.second_moment`, computed once for equal activations."""
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
    """The activation of a name and its parameters.

    Parameters
    ----------
    name : str or ActivationFunction
        A name such as "relu"; an activation object is returned as it is. The keyword arguments after it are the fields of the
        activation's class, such as A and B of "abrelu".

    Returns
    -------
    ActivationFunction

    Raises
    ------
    InputError
        For an unknown name (the message gives the nearest one), for parameters that the activation does not take (the message lists
        those that it takes) or that are missing, and for values that it refuses.

    Examples
    --------
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
