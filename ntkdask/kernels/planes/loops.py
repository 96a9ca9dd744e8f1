"""Compiled loops over one folded slab of offset planes: what the inputs, a convolution and the readout do to its S and T.

A slab (dy, dx) of images of H×W holds all pixel pairs with p' = p + (dy, dx) modulo (H, W), one entry a pixel p: the plane of offset
(dy, dx) and up to three partners that wrap. So every slab is a dense H×W array. A convolution moves along it. Unless it is circular,
it stops at the image's border and at the cuts, in row H − dy and column W − dx, where p' wraps. H×W is the image's frame
(`planes.tables`), which strides make smaller. S and T of a slab and two buffers stay in a core's first cache through all layers of a
stage. MATH.md §3. Called by `planes.stage`; arrays are C-ordered and flat.
"""

from __future__ import annotations

from typing import NamedTuple

from ntkdask.compiled import inlined_on_views
from ntkdask.kernels.planes.lanes import add_row, copy_row, sum_two_rows


class AxisFilter(NamedTuple):
    """A convolution along one axis, rows or columns, of the frame.

    Parameters
    ----------
    length : int
        Of the filter.
    before : int
        How much of the filter lies before the pixel it stands on.
    circular : int
        1 where the axis wraps at the border.
    stride : int
        From one output to the next.
    inside, kept : int
        How much of the frame belongs to the image, before and after the convolution.
    """

    length: int
    before: int
    circular: int
    stride: int
    inside: int
    kept: int


@inlined_on_views
def products(x, z, first, out):
    """S of the inputs: out (N,) = Σ_c x[c]·z[c, first:]. x: (C, ≥ N), z: (C, ≥ first + N)."""
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
    """Move the columns of an image by dx, so that entry p of slab (dy, dx) meets out[dy·w + p].

    Parameters
    ----------
    z : array (h·w,)
        The image.
    out : array (2·h·w,)
        The moved image, and with `twice` once more below it.
    h, w : int
        Rows and columns of the frame.
    dx : int
        The offset of columns.
    twice : bool
        Whether slabs of dy > 0 will read it.
    """
    for row in range(h):
        first = row * w
        copy_row(out, first, z, first + dx, w - dx)
        copy_row(out, first + w - dx, z, first, dx)
    if twice:
        copy_row(out, h * w, out, 0, h * w)


@inlined_on_views
def masks(left, right, h, w, dx):
    """Mark with 1, in (hw,) each, where the left and the right neighbour of an entry belong to the same plane; 0 elsewhere."""
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
    """out = sums of each row of a slab with the rows above and below it that belong to the same plane."""
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
def rows_sum(src, out, h, w, dy, axis):
    """Sum a slab over the rows of a filter.

    Parameters
    ----------
    src : array (h·w,)
        The slab.
    out : array (h/stride · w,)
        The sums of rows of the same plane, or of rows modulo h where they wrap; 0 beyond the image.
    h, w : int
        Rows and columns of the frame of `src`.
    dy : int
        The slab's offset of rows.
    axis : AxisFilter
        The convolution down the rows.
    """
    q, before, circular, stride, inside, kept = axis
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
def columns_sum(src, out, h, w, dx, axis):
    """Sum a slab over the columns of a filter.

    Parameters
    ----------
    src : array (h·w,)
        The slab.
    out : array (h · w/stride,)
        The sums of columns of the same plane, or of columns modulo w where they wrap; 0 beyond the image.
    h, w : int
        Rows and columns of the frame of `src`.
    dx : int
        The slab's offset of columns.
    axis : AxisFilter
        The convolution along the columns.
    """
    q, before, circular, stride, inside, kept = axis
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
    """Set entries of a slab to 0 where p or p' lies beyond the image.

    Parameters
    ----------
    s : array (h·w,)
        The slab.
    h, w : int
        Rows and columns of the frame.
    dy, dx : int
        The slab's offset.
    rows, columns : int
        Rows and columns of the frame that belong to the image.
    """
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
    """S ← k·S + bias, T ← k·T + trainable·S, in place.

    Parameters
    ----------
    s, t : array (N,)
        S and T.
    k, bias : float
        The factor and the bias variance.
    trainable : float
        1 or 0.
    tangent : bool
        Whether T is not 0 everywhere before; otherwise `t` is not read.
    """
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


@inlined_on_views
def sum_columns(v, left, right, s):
    """s (N,) = sums of each entry of v (N + 2,) with the left and the right neighbour that the masks allow."""
    n, zero = s.size, s.dtype.type(0)
    v0, v1, v2 = v[:n], v[1 : n + 1], v[2 : n + 2]
    for i in range(n):
        s[i] = v1[i] + (v0[i] if left[i] else zero) + (v2[i] if right[i] else zero)


@inlined_on_views
def total(a):
    """Σ a as float64, summed in a's dtype and in the order that the compiler chose."""
    value = a.dtype.type(0)
    for i in range(a.size):
        value += a[i]
    return float(value)
