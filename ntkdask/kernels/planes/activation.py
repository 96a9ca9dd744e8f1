"""Compiled loops over one folded slab of offset planes: what an activation with one kink, or a LayerNorm, does to its S and T.

The doubt of an entry tells how near its correlation c is to ±1. In float32 it is 1/√(1 − c²), by which an error of c grows in κ₀. In
float64 it is 1 where 1 − c² < NEAR, so that an S that came from float32 is not good enough, and 0 elsewhere. Called by `planes.stage`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ntkdask.compiled import inlined_on_views, polynomial

# arccos(u)/(π√(1 − u²)) on [0, 1]. float32: minimax for the angle, error 1.7e-7. float64: Chebyshev interpolation, error 8e-16.
ANGLE = {
    "float32": (
        0.499999911,
        -0.318293333,
        0.249562636,
        -0.207909048,
        0.166373715,
        -0.109816715,
        0.04842126,
        -0.0100298133,
    ),
    "float64": (
        0.49999999999999944,
        -0.31830988618335027,
        0.2499999999473227,
        -0.2122065882530219,
        0.18749993497628192,
        -0.16976424879970903,
        0.15623921311734995,
        -0.14543262141780125,
        0.136276557495196,
        -0.12750246981197857,
        0.11709513145856121,
        -0.10240929437463467,
        0.08173309586037203,
        -0.0566222797856258,
        0.03226680713429852,
        -0.01424755311152839,
        0.004513159049231989,
        -0.0009048418515256898,
        8.57707343508968e-05,
    ),
}
_angle = polynomial(ANGLE["float32"], ANGLE["float64"])

NEAREST = 7.5e-8
"""Values of 1 − c² in float32 that are smaller are rounding, and are raised to this, which bounds 1/√(1 − c²)."""

NEAR = 1e-4
"""1 − c² below which an S that came from float32 is in doubt."""

PARALLEL = 2e-14
"""Values of 1 − c² in float64 that are not larger are rounding, and count as 0: equal patches have c = 1."""


class Roots(NamedTuple):
    """Roots of the variances v and v' of both images of a pair at each entry of a slab, (N,) or longer.

    Parameters
    ----------
    rx, rz : array
        1/√v of the left and 1/√v' of the right image.
    sx, sz : array
        √v and √v', of which the first is multiplied by curve/π of the activation.
    """

    rx: np.ndarray
    rz: np.ndarray
    sx: np.ndarray
    sz: np.ndarray


@intrinsic
def _inverse_root(typing_context: Any, x: Any) -> Any:
    """1/√x for x > 0; in float32 by the processor's estimate and a Newton step, which is several times faster than a division."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(x)
        root = builder.call(builder.module.declare_intrinsic("llvm.sqrt", [kind]), [args[0]], fastmath=("fast",))
        return builder.fdiv(ir.Constant(kind, 1.0), root, flags=("fast",))

    return x(x), generate


@intrinsic
def _times(typing_context: Any, x: Any, y: Any) -> Any:
    """x·y without leave to reorder, so that x·(1/√x) does not become √x again."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1], flags=("contract",))

    return x(x, y), generate


def _root(x: Any) -> Any:
    """(√x, doubt) of x = 1 − c². In float32 x is at least `NEAREST`; in float64 √x = 0 up to `PARALLEL`."""
    if isinstance(x, np.float32):
        x = max(x, np.float32(NEAREST))
        return math.sqrt(x), 1 / math.sqrt(x)
    return (math.sqrt(x) if x > PARALLEL else 0.0), float(x < NEAR)


@overload(_root, jit_options={"fastmath": {"contract", "reassoc", "nsz"}, "forceinline": True})
def _compiled_root(x):
    """`_root` for compiled code, by the type of x."""
    if x == types.float32:

        def single(x):
            x = max(x, np.float32(NEAREST))
            inverse: Any = _inverse_root(x)  # type: ignore[call-arg]
            return _times(x, inverse), inverse

        return single

    def double(x):
        return (math.sqrt(x) if x > PARALLEL else 0.0), (1.0 if x < NEAR else 0.0)

    return double


@inlined_on_views
def _step(c):
    """(κ₀(c), √(1 − c²), doubt of `_root`).

    The sign of c enters by its bit: comparisons share the processor's ports with multiplications, additions do not.
    """
    half, one = type(c)(0.5), type(c)(1)
    root, inverse = _root(one - c * c)
    return half + math.copysign(half - root * _angle(abs(c)), c), root, inverse


@inlined_on_views
def sum_rectify(v, u, left, right, roots, s, t, tangent):
    """Sum three columns of S and T, add S to T, apply a normalised ReLU: the inner loop of most networks.

    σ_w²/q² is part of the roots, and of the unit in which the result is counted.

    Parameters
    ----------
    v, u : array (N + 2,)
        Sums over rows of S and of T: one entry before the slab, N entries, one after.
    left, right : array (N,), uint8
        The `masks`.
    roots : Roots
        Of both images; the curve is 1.
    s, t : array (N,)
        Where S and T go.
    tangent : bool
        Whether T is not 0 everywhere before; otherwise `u` is not read.

    Returns
    -------
    float
        The sum of the doubts.
    """
    rx, rz, sx, sz = roots
    n, zero = s.size, s.dtype.type(0)
    total = zero
    v0, v1, v2, u0, u1, u2 = v[:n], v[1 : n + 1], v[2 : n + 2], u[:n], u[1 : n + 1], u[2 : n + 2]
    if tangent:
        for i in range(n):
            cov = v1[i] + (v0[i] if left[i] else zero) + (v2[i] if right[i] else zero)
            tan = u1[i] + (u0[i] if left[i] else zero) + (u2[i] if right[i] else zero) + cov
            slope, root, inverse = _step(cov * (rx[i] * rz[i]))
            s[i] = cov * slope + (sx[i] * sz[i]) * root
            t[i] = tan * slope
            total += inverse
    else:
        for i in range(n):
            cov = v1[i] + (v0[i] if left[i] else zero) + (v2[i] if right[i] else zero)
            slope, root, inverse = _step(cov * (rx[i] * rz[i]))
            s[i] = cov * slope + (sx[i] * sz[i]) * root
            t[i] = cov * slope
            total += inverse
    return total


@inlined_on_views
def rectify(s, t, roots, curve, line):
    """Apply an activation with one kink to S and T, in place.

    Parameters
    ----------
    s, t : array (N,)
        S and T.
    roots : Roots
        Of both images.
    curve, line : float
        Of `program.Rectify`.

    Returns
    -------
    float
        The sum of the doubts.
    """
    rx, rz, sx, sz = roots
    total = s.dtype.type(0)
    for i in range(s.size):
        step, root, inverse = _step(s[i] * (rx[i] * rz[i]))
        slope = curve * step - line
        s[i] = s[i] * slope + (sx[i] * sz[i]) * root
        t[i] = t[i] * slope
        total += inverse
    return total


@inlined_on_views
def normalise(s, t, rx, rz):
    """Divide S and T by √(vv'), in place. rx, rz: 1/√v and 1/√v' at each entry."""
    for i in range(s.size):
        scale = rx[i] * rz[i]
        s[i] *= scale
        t[i] *= scale
