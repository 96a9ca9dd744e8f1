"""Truncated Hermite expansions: the dual of any smooth σ from its coefficients. Han et al. 2022, §3.1.

With h_j(a) = E[σ(at)·He_j(t)]/√j!, t ~ N(0, 1), σ(at) = Σ_j h_j(a)·He_j(t)/√j!, and for u and v of standard deviations a, b and
correlation c, k_σ(a, b, c) = Σ_j h_j(a)h_j(b)c^j. Cut at a degree J, the error is at most √(tail(a)·tail(b)) by Cauchy-Schwarz, with
tail(a) = E σ(at)² − Σ_{j<J} h_j(a)² (Theorem 2 bounds that tail; here it is measured). The coefficients are one-dimensional
integrals, computed once per distinct a by the trapezoidal rule, which is exact to rounding for analytic σ.
Memory: J values per distinct a and b, and two arrays of a block of rows; never J arrays of c's shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError

Function = Callable[[Array], Array]

MAX_NODES = 8192
"""Most nodes of the trapezoidal rule."""
SMALLEST_SLOPE = 2e-5
"""Smallest standard deviation by which `expand_slope` divides."""
BLOCK_ENTRIES = 2**15
"""Entries of c that one pass of Horner's rule walks: three float64 arrays of that size stay in cache."""
DEVICE_BLOCK_ENTRIES = 2**24
STEPS_AN_OCTAVE, SMALLEST_STEP = 8, 0.125
"""Standard deviations in steps of 2^(1/STEPS_AN_OCTAVE), those below SMALLEST_STEP together, have one degree in `expand_alone`."""
COEFFICIENT_ROWS = 2**13
"""Values of a and b whose coefficients are held at once."""
REACHES = (13.0, 20.0, 30.0)
"""Half-widths of the trapezoidal rule, in standard deviations: enough for bounded σ, for e^{|t|}, for functions steeper still."""


@dataclass(frozen=True)
class Coefficients:
    """h_j(a), j < J, and the size of what was left out.

    Parameters
    ----------
    values : array (J, *a.shape), or (J, 1, …) where all a are equal; float64
        The coefficients.
    tail : float
        The maximum over a of 1 − Σ_j h_j²/E σ(at)²: the relative error of k(a, a, 1), and a bound for that of any k.
    rule_error : float
        The maximum over a of ‖h − h from half the nodes‖/√E σ(at)²; for analytic σ far above the error of h.
    degrees : array of a's shape, int64, optional
        How many coefficients each value needs by itself: k(a, b, c) is summed to the larger of both numbers, whatever else is
        expanded in the same call. None: all are summed.
    """

    values: Array
    tail: float
    rule_error: float
    degrees: Array | None = None

    def shortened(self, tolerance: float, min_degree: int) -> Coefficients:
        """Without the highest degrees, as many as have a sum of squares below tolerance/10 of the whole for every a."""
        xp = namespace(self.values)
        squares = self.values**2
        above = xp.cumsum(squares[::-1], axis=0)[::-1] / xp.maximum(squares.sum(axis=0), 1e-300)
        needed = int((above.reshape(len(above), -1).max(axis=1) > tolerance / 10).sum())
        return Coefficients(self.values[: max(needed, min_degree)], max(self.tail, tolerance / 10), self.rule_error)

    @property
    def error(self) -> float:
        """Estimate of |error of k(a, b, c)|/√(k(a, a, 1)·k(b, b, 1)), the larger of both sources."""
        return max(self.tail, self.rule_error)


@functools.lru_cache(maxsize=16)
def _hermite_table(degree: int, nodes: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """(t (N,), He_j(t)/√j!·φ(t)·Δt as (N, degree)) of the trapezoidal rule on [−reach, reach], N = nodes + 1."""
    t = np.linspace(-reach, reach, nodes + 1)
    # both factors carry e^{−t²/4}: the Hermite functions stay bounded where He_j itself overflows
    half = np.exp(-t * t / 4)
    before, now = np.zeros_like(t), half
    table = np.empty((degree, t.size))
    for j in range(degree):
        table[j] = now
        before, now = now, (t * now - math.sqrt(j) * before) / math.sqrt(j + 1)
    table *= half * (2 * reach / nodes / math.sqrt(2 * math.pi))
    return t, np.ascontiguousarray(table.T)


def _measure(f: Function, a: Array, degree: int, nodes: int, reach: float) -> tuple[Array, Array, float, float]:
    """(h (n, degree), E σ² (n,), the rule's error, the largest relative contribution of the rule's ends) for distinct a (n,)."""
    xp = namespace(a)
    points, table = _hermite_table(degree, nodes, reach)
    t, weighted = xp.asarray(points), xp.asarray(table)
    density = xp.asarray(np.exp(-points * points / 2)) * (2 * reach / nodes / math.sqrt(2 * math.pi))
    h = xp.empty((a.size, degree))
    square = xp.empty(a.size)
    rule, ends = 0.0, 0.0
    for start in range(0, a.size, 512):
        rows = slice(start, start + 512)
        with np.errstate(over="ignore", invalid="ignore"):  # the next lines look for infinities and NaN
            values = xp.asarray(f(a[rows, None] * t), dtype=xp.float64)
            square[rows] = (values * values) @ density
        if not bool(xp.isfinite(square[rows]).all()):
            raise InputError(
                f"the activation function or its square gives NaN or inf for some |t| <= {float(a[rows].max()) * reach:.3g}, "
                "where its Hermite coefficients need it. Scale the inputs down or give a function that is finite there."
            )
        h[rows] = values @ weighted
        coarse = 2 * (values[:, ::2] @ weighted[::2])
        scale = xp.sqrt(xp.maximum(square[rows], 1e-300))
        rule = max(rule, float((xp.sqrt(((h[rows] - coarse) ** 2).sum(axis=1)) / scale).max()))
        edge = xp.maximum(xp.abs(values[:, 0]), xp.abs(values[:, -1])) * math.exp(-reach * reach / 4)
        ends = max(ends, float((edge / scale).max()))
    return h, square, rule, ends


def coefficients(f: Function, a: Array, degree: int, tolerance: float) -> Coefficients:
    """The first `degree` coefficients h_j(a), with enough nodes that they are exact to `tolerance` where that is possible.

    Parameters
    ----------
    f : callable
        σ, elementwise on float64 arrays.
    a : array of any shape, float64
        Standard deviations, >= 0; each distinct value is computed once.
    degree : int
        J.
    tolerance : float
        Relative error of the coefficients that ends the doubling of nodes.

    Returns
    -------
    Coefficients

    Raises
    ------
    InputError
        Where f is not finite, or grows so fast that its second moment does not converge.

    Notes
    -----
    A kink in f shows in `rule_error`, because the number of nodes stops at `MAX_NODES`.
    """
    xp = namespace(a)
    distinct, inverse = xp.unique(a.ravel(), return_inverse=True)
    nodes = 2 ** max(7, math.ceil(math.log2(16 * (math.sqrt(degree) + 4))))
    for reach in REACHES:
        h, square, rule, ends = _measure(f, distinct, degree, nodes, reach)
        if ends <= 1e-2 * tolerance:
            break
    else:
        raise InputError(
            f"the activation function grows too fast at a standard deviation of {float(distinct[-1]):.3g}: its Gaussian "
            "second moment does not converge. Scale the inputs down."
        )
    while rule > tolerance and nodes < MAX_NODES:
        nodes *= 2
        h, square, rule, ends = _measure(f, distinct, degree, nodes, reach)
    # f = 0 leaves no tail
    left = xp.where(square > 0, 1.0 - (h * h).sum(axis=1) / xp.maximum(square, 1e-300), 0.0)
    tail = max(0.0, float(left.max()))
    if distinct.size == 1:
        return Coefficients(h.T.reshape(degree, *(1,) * a.ndim), tail, rule)
    return Coefficients(xp.ascontiguousarray(h[inverse.ravel()].T).reshape(degree, *a.shape), tail, rule)


def blocks(a: Array, b: Array, c: Array, entries: int) -> list[tuple[slice, ...]]:
    """Slices of the first axis of the broadcast shape, with about `entries` entries each; one empty index for scalars."""
    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    if not shape or shape[0] == 0:
        return [()]
    rows = max(1, entries // max(1, math.prod(shape[1:])))
    return [(slice(start, start + rows),) for start in range(0, shape[0], rows)]


def take(x: Array, index: tuple[slice, ...], ndim: int) -> Array:
    """The part of `x` that belongs to block `index` of the broadcast shape of `ndim` axes."""
    return x[index] if index and x.ndim == ndim and x.shape[0] > 1 else x


def by_blocks(formula: Callable[[Array, Array, Array], Array], a: Array, b: Array, c: Array, entries: int) -> Array:
    """formula(a, b, c) in blocks of rows: float64, of the broadcast shape; its temporaries have the size of a block."""
    xp = namespace(c)
    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    out = xp.empty(shape)
    for index in blocks(a, b, c, entries):
        out[index] = formula(*(take(v, index, len(shape)) for v in (a, b, c)))
    return out


def series(left: Array, right: Array, c: Array, degrees: tuple[Array, Array] | None = None) -> Array:
    """Σ_j left_j·right_j·c^j by Horner's rule, in blocks of rows; symmetric in left and right to the last bit.

    left, right: (J, …), each degree broadcasting with c. degrees: how many terms each side needs, broadcasting alike; an entry's sum
    has as many as the larger of both. None: all.
    """
    xp = namespace(c)
    shape = np.broadcast_shapes(left.shape[1:], right.shape[1:], c.shape)
    out = xp.empty(shape)
    entries = DEVICE_BLOCK_ENTRIES if is_device_array(c) else BLOCK_ENTRIES
    for index in blocks(left[0], right[0], c, entries):
        x, y = ([take(level, index, len(shape)) for level in side] for side in (left, right))
        part = take(c, index, len(shape))
        total = xp.zeros(out[index].shape)
        needed = [take(side, index, len(shape)) for side in degrees or ()]
        least = max((int(side.min()) for side in needed), default=len(x))
        for j in range(len(x) - 1, -1, -1):
            total *= part
            term = x[j] * y[j]
            if j >= least:
                term = xp.where((needed[0] <= j) & (needed[1] <= j), 0.0, term)
            total += term
        out[index] = total
    return out


def expand(f: Function, a: Array, tolerance: float, max_degree: int, min_degree: int = 1) -> Coefficients:
    """h_j(a) up to the first degree whose `error` is within `tolerance`, at most `max_degree`.

    The caller compares `error` with its tolerance: this function never decides that an expansion that misses it is good enough.
    """
    degree = max(min_degree, min(32, max_degree))
    while True:
        h = coefficients(f, a, degree, tolerance)
        # more degrees do not mend a kink that the rule cannot resolve
        if h.error <= tolerance or degree >= max_degree or h.rule_error > tolerance:
            return h.shortened(tolerance, min_degree)
        degree = min(2 * degree, max_degree)


def expand_alone(f: Function, a: Array, tolerance: float, max_degree: int) -> Coefficients:
    """h_j(a) with the number of coefficients that each value needs by itself, as `expand` chooses it.

    Values within an eighth of an octave count as the largest among them. f: hashable, a smooth σ that needs more for larger a.
    """
    xp = namespace(a)
    steps = xp.ceil(STEPS_AN_OCTAVE * xp.log2(xp.maximum(a, SMALLEST_STEP))).astype(xp.int64)
    degrees = xp.zeros(a.shape, xp.int64)
    for step in xp.unique(steps).tolist():
        degrees[steps == step] = _own_degree(f, step, tolerance, max_degree)
    h = coefficients(f, a, int(degrees.max()), tolerance)
    return Coefficients(h.values, h.tail, h.rule_error, degrees)


@functools.lru_cache(maxsize=512)
def _own_degree(f: Function, step: int, tolerance: float, max_degree: int) -> int:
    """How many coefficients values up to 2^(step/STEPS_AN_OCTAVE) need."""
    return len(expand(f, np.array([2.0 ** (step / STEPS_AN_OCTAVE)]), tolerance, max_degree).values)


def expand_slope(f: Function, a: Array, tolerance: float, max_degree: int, min_degree: int = 1) -> Coefficients:
    """The coefficients of σ' from σ alone: E[σ'(at)He_j(t)]/√j! = √(j+1)·h_{j+1}(a)/a (Theorem 3, term by term).

    Values of a below `SMALLEST_SLOPE` are raised to it: k' is even and smooth there, and the quotient keeps its digits. E σ'(at)² is
    not known, so `tail` is the share of the upper half of the degrees: an upper estimate where coefficients decay.
    """
    xp = namespace(a)
    a = xp.maximum(a, SMALLEST_SLOPE)
    origin = f(xp.zeros(1))
    degree = max(min_degree, min(32, max_degree), 2)
    while True:
        h = coefficients(lambda t: f(t) - origin, a, degree, tolerance)
        factors = xp.sqrt(xp.arange(1.0, degree)).reshape(-1, *(1,) * a.ndim)
        values = h.values[1:] * factors / (a if h.values[0].size == a.size else a.ravel()[0])
        square = (values * values).sum(axis=0)
        upper = (values[degree // 2 :] ** 2).sum(axis=0)
        tail = float(xp.where(square > 0, upper / xp.maximum(square, 1e-300), 0.0).max())
        # ‖error of h‖·√J/a against √E σ'²
        size = xp.sqrt((h.values**2).sum(axis=0)) / (a * xp.sqrt(xp.maximum(square, 1e-300)))
        rule = h.rule_error * math.sqrt(degree) * float(xp.where(square > 0, size, 0.0).max())
        slope = Coefficients(values, tail, rule)
        if slope.error <= tolerance or degree >= max_degree or rule > tolerance:
            return slope.shortened(tolerance, min_degree)
        degree = min(2 * degree, max_degree)


def expanded_dual(make: Callable[[Array], Coefficients], a: Array, b: Array, c: Array) -> tuple[Array, float]:
    """(k, the largest `error` of the coefficients), k = Σ_j h_j(a)h_j(b)c^j with h = make(values of a and b).

    a, b, c: float64 arrays that broadcast, c within [−1, 1]. Where a and b hold more than `COEFFICIENT_ROWS` values, the call is
    halved along the axis that holds most of them, so that the coefficients stay small beside c.
    """
    xp = namespace(c)
    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    if not math.prod(shape):
        return xp.empty(shape), 0.0
    larger = a if a.size >= b.size else b
    # the trailing axes of `shape` are those of `larger`
    axis = len(shape) - larger.ndim + int(np.argmax(larger.shape)) if larger.ndim else 0
    if a.size + b.size > COEFFICIENT_ROWS and shape[axis] > 1:
        middle = shape[axis] // 2
        out, errors = xp.empty(shape), []
        for part in (slice(0, middle), slice(middle, None)):
            index = (*(slice(None),) * axis, part)
            pieces = (v[index] if v.shape[axis] > 1 else v for v in (_padded(v, len(shape)) for v in (a, b, c)))
            out[index], error = expanded_dual(make, *pieces)
            errors.append(error)
        return out, max(errors)
    h = make(xp.concatenate([a.ravel(), b.ravel()]))
    if h.values.shape[1] == 1:  # every a and b is the same
        left = right = h.values.reshape(-1, *(1,) * len(shape))
    else:
        left = h.values[:, : a.size].reshape(-1, *a.shape)
        right = h.values[:, a.size :].reshape(-1, *b.shape)
        if h.degrees is not None:
            degrees = h.degrees[: a.size].reshape(a.shape), h.degrees[a.size :].reshape(b.shape)
            return series(left, right, c, degrees), h.error
    return series(left, right, c), h.error


def _padded(x: Array, ndim: int) -> Array:
    """x with axes of length 1 in front, `ndim` in all."""
    return x.reshape(*(1,) * (ndim - x.ndim), *x.shape)
