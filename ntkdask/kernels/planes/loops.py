"""Compiled loops over one folded slab of offset planes: what a convolution, an activation, a pooling do to its S and T.

A slab (dy, dx) of images of H×W holds all pixel pairs with p' = p + (dy, dx) modulo (H, W), one entry a pixel p: the plane of offset
(dy, dx) and up to three partners that wrap. So every slab is a dense H×W array; a convolution moves along it and stops, or wraps if
it is circular, at the image's border and at the cuts, in row H − dy and column W − dx, where p' wraps. H×W is the image's frame
(`plane_tables`), after strides the smaller one of what is left. S and T of a slab and two
buffers stay in a core's first cache through all layers of a stage. MATH.md §3. Called by `plane_stage`; arrays are C-ordered and flat.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ntkdask.compiled import inlined_on_views, polynomial
from ntkdask.kernels.planes.lanes import add_row, copy_row, sum_two_rows

# arccos(u)/(π√(1 − u²)) on [0, 1]: the smallest largest error of the angle, 1.7e-7, and Chebyshev interpolation, 8e-16
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
"""1 − c² of float32 that is no more than rounding: what 1/√(1 − c²) is bounded by."""

NEAR = 1e-4
"""1 − c² below which S that comes from float32 is in doubt."""

PARALLEL = 2e-14
"""1 − c² of float64 that is no more than rounding: equal patches have c = 1."""


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


@inlined_on_views
def products(x, z, first, out):
    """out (N,) = Σ_c x[c]·z[c, first:]: S of the inputs. x: (C, ≥ N), z: (C, ≥ first + N)."""
    n = out.size
    if x.shape[0] == 3:
        a, b, c, d, e, f = x[0], x[1], x[2], z[0, first : first + n], z[1, first : first + n], z[2, first : first + n]
        for i in range(n):
            out[i] = a[i] * d[i] + b[i] * e[i] + c[i] * f[i]
        return
    out[:] = 0
    for channel in range(x.shape[0]):
        a, d = x[channel], z[channel, first : first + n]
        for i in range(n):
            out[i] += a[i] * d[i]


@inlined_on_views
def roll(z, out, h, w, dx, twice):
    """out (2hw,) = z (hw,) with its columns moved by dx, `twice` one below the other: entry p of slab (dy, dx) is out[dy·w + p]."""
    for row in range(h):
        first = row * w
        copy_row(out, first, z, first + dx, w - dx)
        copy_row(out, first + w - dx, z, first, dx)
    if twice:
        copy_row(out, h * w, out, 0, h * w)


@inlined_on_views
def masks(left, right, h, w, dx):
    """1 where the neighbour on the left, or right, is of the same plane, else 0; (hw,) each."""
    for row in range(h):
        a, b = left[row * w : row * w + w], right[row * w : row * w + w]
        a[:] = 1
        b[:] = 1
        a[0] = 0
        b[w - 1] = 0
        if dx:
            a[w - dx] = 0
            b[w - dx - 1] = 0


@inlined_on_views
def three_rows(src, out, h, w, dy):
    """out = sums of each row with those above and below it of the same plane."""
    n = (h - 2) * w
    if n > 0:
        a, b, c, o = src[:n], src[w : w + n], src[2 * w : 2 * w + n], out[w : w + n]
        for i in range(n):
            o[i] = a[i] + b[i] + c[i]
    for plane in range(2):
        first, last = (h - dy if plane else 0), (h if plane else h - dy)
        if last - first == 1:
            copy_row(out, first * w, src, first * w, w)
        elif last > first:
            sum_two_rows(out, first * w, src, first * w, (first + 1) * w, w)
            sum_two_rows(out, (last - 1) * w, src, (last - 2) * w, (last - 1) * w, w)


@inlined_on_views
def rows_sum(src, out, h, w, dy, q, before, circular, stride, inside, kept):
    """out (h/stride · w,) = sums of the rows of src (hw,) under filters of q rows, from `before` above, of the same plane or modulo h.

    Of the frame's rows `inside` are the image's, of those of the output `kept`; the rest of the output is 0.
    """
    high, offset = h // stride, dy // stride
    out[: high * w] = 0
    for row in range(kept):
        if row < kept - offset:
            first, last = 0, inside - dy
        elif row >= high - offset:
            first, last = h - dy, inside
        else:
            continue
        if circular:
            first, last = -q, h + q
        for other in range(max(stride * row - before, first), min(stride * row - before + q, last)):
            add_row(out, row * w, src, other % h * w, w)


@inlined_on_views
def columns_sum(src, out, h, w, dx, q, before, circular, stride, inside, kept):
    """The same over columns: out (h · w/stride,) from src (hw,)."""
    wide, offset = w // stride, dx // stride
    out[: h * wide] = 0
    for row in range(h):
        o, s = out[row * wide : row * wide + wide], src[row * w : row * w + w]
        for a in range(q):
            shift = a - before
            if circular:
                for i in range(wide):
                    o[i] += s[(stride * i + shift) % w]
                continue
            for start, stop, first, last in ((0, kept - offset, 0, inside - dx), (wide - offset, kept, w - dx, inside)):
                # stride·i + shift within [first, last)
                low, high = max(start, -((shift - first) // stride)), min(stop, (last - 1 - shift) // stride + 1)
                if stride == 1 and high > low:
                    add_row(o, low, s, low + shift, high - low)
                else:
                    for i in range(low, high):
                        o[i] += s[stride * i + shift]


@inlined_on_views
def clip(s, h, w, dy, dx, rows, columns):
    """0 where p or p' of slab (dy, dx) lies beyond the image, (rows, columns) of the frame (h, w)."""
    for row in range(h):
        a = s[row * w : row * w + w]
        if row >= rows or (row + dy) % h >= rows:
            a[:] = 0
            continue
        for i in range(w):
            if i >= columns or (i + dx) % w >= columns:
                a[i] = 0


@inlined_on_views
def affine(s, t, k, bias, trainable, tangent):
    """S ← k·S + bias, T ← k·T + trainable·S; without `tangent` T counts as 0."""
    if tangent:
        for i in range(s.size):
            value = k * s[i] + bias
            s[i] = value
            t[i] = k * t[i] + trainable * value
    else:
        for i in range(s.size):
            value = k * s[i] + bias
            s[i] = value
            t[i] = trainable * value


def _root(x: Any) -> Any:
    """(√x, doubt) of x = 1 − c². In float32 √x is at least that of rounding and the doubt is 1/√x; in float64 √x = 0 for what is
    rounding, and the doubt is 1 where x < NEAR, else 0.
    """
    if isinstance(x, np.float32):
        x = max(x, np.float32(NEAREST))
        return math.sqrt(x), 1 / math.sqrt(x)
    return (math.sqrt(x) if x > PARALLEL else 0.0), float(x < NEAR)


@overload(_root, jit_options={"fastmath": {"contract", "reassoc", "nsz"}, "forceinline": True})
def _compiled_root(x):
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
    """(κ₀(c), √(1 − c²), doubt of `_root`). The sign of c enters by its bit: comparisons share their ports with
    multiplications, additions do not.
    """
    half, one = type(c)(0.5), type(c)(1)
    root, inverse = _root(one - c * c)
    return half + math.copysign(half - root * _angle(abs(c)), c), root, inverse


@inlined_on_views
def sum_rectify(v, u, left, right, rx, rz, sx, sz, s, t, tangent):
    """Three columns of the row sums v, u of S and T, T + S, then a normalised ReLU: the inner loop of most networks.

    v, u: one entry before, N, one after; without `tangent` T counts as 0. rx, rz: 1/√v of either image at each entry; sx·sz: √(vv')/π.
    σ_w²/q² has gone into these and into what the sums are multiplied by in the end. Σ of the doubts.
    """
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
def sum_columns(v, left, right, s):
    """s = three columns of the row sums v."""
    n, zero = s.size, s.dtype.type(0)
    v0, v1, v2 = v[:n], v[1 : n + 1], v[2 : n + 2]
    for i in range(n):
        s[i] = v1[i] + (v0[i] if left[i] else zero) + (v2[i] if right[i] else zero)


@inlined_on_views
def rectify(s, t, rx, rz, sx, sz, curve, line):
    """An activation on its own, in place; sx·sz: curve·√(vv')/π. Σ of the doubts."""
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
    """S and T over √(vv'), in place."""
    for i in range(s.size):
        scale = rx[i] * rz[i]
        s[i] *= scale
        t[i] *= scale


@inlined_on_views
def total(a):
    """Σ a, in the order the compiler chose, as float64."""
    found = a.dtype.type(0)
    for i in range(a.size):
        found += a[i]
    return float(found)
