"""Any activation from a Python function: its duals by Hermite expansion or by quadrature, to a stated tolerance.

For use in memory and on Dask workers, to which cloudpickle takes it. A job file, a fingerprint or a saved model cannot hold it,
because code is neither stored nor loaded; `registry.to_config` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ntkdask.activations.base import ActivationFunction, largest
from ntkdask.activations.expansion import Coefficients, expand, expand_slope, expanded_dual
from ntkdask.activations.quadrature import derivative_from_dual, quadrature_dual
from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError

METHODS = ("hermite", "quadrature")
MAX_DEGREE = {"hermite": 1024, "quadrature": 128}
_PROBES = (-1.0, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.0)
_CAUTION = 3.0


@dataclass(frozen=True)
class FromFunction(ActivationFunction):
    """The activation σ = `function`; `from_function` makes it and says more about the fields.

    Parameters
    ----------
    function : callable
        σ, elementwise on float64 arrays of any shape.
    derivative : callable, optional
        σ', elementwise; without it k' follows from the dual.
    method : {"hermite", "quadrature"}
        How the duals are computed.
    degree : int, optional
        Degree of the expansion or the quadrature; None for the first that meets the tolerance.
    tolerance : float
        Bound for the estimated normwise error of a dual, at least 1e-13.
    """

    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array] | None = None
    method: str = "hermite"
    degree: int | None = None
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"from_function: method is {self.method!r}, expected 'hermite' or 'quadrature'.")
        if not (isinstance(self.tolerance, float) and 1e-13 <= self.tolerance < math.inf):
            raise InputError(f"from_function: tolerance is {self.tolerance!r}, expected a float >= 1e-13.")
        limit, degree = MAX_DEGREE[self.method], self.degree
        if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= limit):
            raise InputError(f"from_function: degree is {degree!r}, expected None or an integer from 1 to {limit}.")
        _check_elementwise("function", self.function)
        if self.derivative is not None:
            _check_elementwise("derivative", self.derivative)

    def __call__(self, t: Array) -> Array:
        """function(t), in t's dtype."""
        return namespace(t).asarray(self.function(t)).astype(t.dtype, copy=False)

    def error_estimate(self, a: float, *, derivative: bool = False) -> float:
        """Estimate of |error of k(a, b, c)|/√(k(a, a, 1)·k(b, b, 1)) for b <= a, which `dual` compares with `tolerance`.

        Parameters
        ----------
        a : float
            The largest standard deviation.
        derivative : bool
            Whether the estimate is for k' instead of k.

        Returns
        -------
        float
            For "hermite" the larger of the tail of the expansion and the error of its coefficients; for "quadrature" the change from
            doubling the degree. It may be large: nothing is raised.
        """
        value = np.array([float(a)])
        if self.method == "hermite":
            return self._expansion(derivative)(value).error
        return self._quadrature_error(value, value, derivative, self.degree or MAX_DEGREE["quadrature"])

    def _dual(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        if self.method == "hermite":
            return self._expanded(a, b, c, False)
        return quadrature_dual(self.function, a, b, c, self._quadrature_degree(a, b, False))

    def _dual_derivative(self, xp: ModuleType, a: Array, b: Array, c: Array) -> Array:
        if self.method == "hermite":
            return self._expanded(a, b, c, True)
        degree = self._quadrature_degree(a, b, True)
        if self.derivative is not None:
            return quadrature_dual(self.derivative, a, b, c, degree)
        return derivative_from_dual(lambda a, b, c: quadrature_dual(self.function, a, b, c, degree), a, b, c)

    def _expansion(self, derivative: bool) -> Callable[[Array], Coefficients]:
        """A function from standard deviations to coefficients of σ or σ', at `degree` or at the degree that the tolerance needs."""
        make, f = (expand_slope, self.function) if derivative else (expand, self.function)
        if derivative and self.derivative is not None:
            make, f = expand, self.derivative
        # a polynomial of degree J has J + 1 coefficients
        lowest, highest = (self.degree + 1,) * 2 if self.degree else (1, MAX_DEGREE["hermite"] + 1)
        return lambda values: make(f, values, self.tolerance, highest, lowest)

    def _expanded(self, a: Array, b: Array, c: Array, derivative: bool) -> Array:
        """k_σ or k_σ' by the expansion; InputError where it misses the tolerance."""
        value, error = expanded_dual(self._expansion(derivative), a, b, c)
        self._require(error, a, b, derivative)
        return value

    def _quadrature_degree(self, a: Array, b: Array, derivative: bool) -> int:
        """`degree`, or the first of 16, 32, 64, … that meets the tolerance at a few (a, b, c) of this call."""
        degree, limit = self.degree or 16, self.degree or MAX_DEGREE["quadrature"]
        while (error := self._quadrature_error(a, b, derivative, degree)) > self.tolerance and 2 * degree <= limit:
            degree *= 2
        self._require(error, a, b, derivative)
        return degree

    def _quadrature_error(self, a: Array, b: Array, derivative: bool, degree: int) -> float:
        """`_CAUTION` times the largest normwise change of k when the degree doubles, at the extremes of a and b and nine values of c.

        Where errors fall like 1/degree (kinks), the change is half the error, and other c are somewhat worse.
        """
        f = self.derivative if derivative and self.derivative is not None else self.function
        if not a.size or not b.size:
            return 0.0
        ends = np.array([[float(v.min()), float(v.max())] for v in (a, b)])
        left, right, cosine = np.meshgrid(ends[0], ends[1], np.array(_PROBES), indexing="ij")
        change = quadrature_dual(f, left, right, cosine, 2 * degree) - quadrature_dual(f, left, right, cosine, degree)
        one = np.ones_like(cosine)
        size = np.sqrt(quadrature_dual(f, left, left, one, degree) * quadrature_dual(f, right, right, one, degree))
        return _CAUTION * float((np.abs(change) / np.where(size > 0, size, 1.0)).max())

    def _require(self, error: float, a: Array, b: Array, derivative: bool) -> None:
        """InputError, with advice, where an estimated error exceeds the tolerance."""
        if error <= self.tolerance:
            return
        degree = f"degree {self.degree}" if self.degree else f"degrees up to {MAX_DEGREE[self.method]}"
        larger = "a larger degree, " if self.degree else ""
        slope = "derivative=, " if derivative and self.derivative is None else ""
        raise InputError(
            f"from_function: {self.function!r} was asked for {'the dual of its derivative' if derivative else 'its dual'} to "
            f"tolerance {self.tolerance:.1e}, but {self.method} with {degree} errs by about {error:.1e} of k(a, a, 1) at standard "
            f"deviations up to {largest(a, b):.3g}. Use {slope}{larger}tolerance >= {error:.0e} or smaller inputs; a function with "
            "kinks or steep parts needs a closed form, ntkdask.activations.get(name)."
        )


def _check_elementwise(field: str, function: Callable[[Array], Array]) -> None:
    """InputError, naming the `field`, unless `function` takes a float64 array and gives finite real numbers of its shape."""
    if not callable(function):
        raise InputError(f"from_function: {field} is {function!r}, expected a function of an array.")
    t = np.array([[-0.5, 0.25], [0.0, 1.0], [0.75, -1.0]])
    try:
        value = np.asarray(function(t.copy()))
    except Exception as error:  # a user's function raises anything
        raise InputError(
            f"from_function: {field} {function!r} fails on a float64 array of shape (3, 2): {error}"
        ) from error
    if value.shape != t.shape or value.dtype.kind not in "fiub" or not np.isfinite(value).all():
        raise InputError(
            f"from_function: {field} {function!r} took a float64 array of shape (3, 2) and gave {value.dtype} of shape "
            f"{value.shape}; expected finite real numbers of the same shape. Write it with NumPy functions of whole arrays."
        )


def from_function(
    function: Callable[[Array], Array],
    derivative: Callable[[Array], Array] | None = None,
    method: str = "hermite",
    degree: int | None = None,
    tolerance: float = 1e-8,
) -> FromFunction:
    """The activation σ = `function`, for a `Network` in memory or on Dask workers.

    Parameters
    ----------
    function : callable
        σ, elementwise on float64 arrays of any shape, written with NumPy's functions: where the kernel runs on a GPU it gets CuPy
        arrays, which NumPy's functions pass on to CuPy.
    derivative : callable, optional
        σ', written alike. Without it k' follows from Theorem 3 of Han et al.; then its error is 1e-8 at best for a < 1e-4, and for
        quadrature for |c| > 0.95.
    method : {"hermite", "quadrature"}
        "hermite" expands σ(at) once per distinct a and sums a power series in c, `degree` flops per entry; "quadrature" takes the
        2·degree² evaluations per entry of Han et al. 2022, eq. 15.
    degree : int, optional
        A fixed degree of at least 1; None for the first that meets `tolerance` in a call, so that an entry depends on its tile
        within that tolerance. At most 1024, for quadrature 128.
    tolerance : float
        Bound, at least 1e-13, for the estimated |error|/√(k(a, a, 1)·k(b, b, 1)); checked in every call, also with a fixed degree.

    Returns
    -------
    FromFunction

    Raises
    ------
    InputError
        For a function that is not elementwise, and, when a dual is computed, where the tolerance cannot be met (kinks, steep
        functions at large a): a dual is never less accurate than was asked.

    Notes
    -----
    It cannot be described in a job file or a fingerprint.

    Examples
    --------
    >>> import numpy as np
    >>> swish = from_function(lambda t: t / (1 + np.exp(-t)))
    >>> round(float(swish.dual(1.0, 1.0, 0.5)), 6)
    0.18317
    """
    return FromFunction(function, derivative, method, degree, tolerance)
