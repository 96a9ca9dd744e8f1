"""One stage of a convolutional network on the folded slabs of pairs of images: the compiled program that `plane_pass` hands blocks to.

A slab runs through all operations of the stage in a core's first cache (`plane_loops`) and is then added to the sums of the readout
or to the slabs of the pooled image. In float32 a slab whose correlations are too near ±1 for float32 is left for a float64 call.
"""

from __future__ import annotations

from ntkdask.compiled import compiled_on_views, inlined_on_views
from ntkdask.kernels.plane_loops import (
    affine,
    columns_sum,
    masks,
    normalise,
    products,
    rectify,
    roll,
    rows_sum,
    sum_columns,
    sum_rectify,
    three_rows,
    total,
)
from ntkdask.kernels.plane_pooling import pool_columns, pool_rows

SUM_RECTIFY, CONVOLVE_3, CONVOLVE, RECTIFY, NORMALISE, SAVE, EXCHANGE, ADD = range(8)

CODE, ROWS, COLUMNS, ABOVE, BEFORE, CIRCULAR, NODE = range(7)
"""Columns of an operation: filter, pixels of it above and before, and the variance map it reads."""

SCALE, BIAS, TRAINABLE, CURVE, LINE = range(5)
"""Columns of its constants: σ_w²/q², σ_b², 1 or 0, and those of `stages.Rectify`."""


@inlined_on_views
def _box(a, v, op, h, w, dy, dx):
    """Sums of a (hw,) over the filter, in place; v: as large."""
    if op[ROWS] * op[COLUMNS] > 1:
        rows_sum(a, v, h, w, dy, op[ROWS], op[ABOVE], op[CIRCULAR])
        columns_sum(v, a, h, w, dx, op[COLUMNS], op[BEFORE], op[CIRCULAR])


@inlined_on_views
def _swap(a, b):
    for i in range(a.size):
        a[i], b[i] = b[i], a[i]


@inlined_on_views
def _accumulate(a, b):
    for i in range(a.size):
        a[i] += b[i]


@inlined_on_views
def _load(a, scale, out):
    for i in range(out.size):
        out[i] = a[i] * scale


@inlined_on_views
def _slab(ops, constants, s, t, v, u, saved, left, right, rx, rz, sx, sz, h, w, dy, dx, tangent, both):
    """All operations on S and T (hw,) of slab (dy, dx), of T when `both`; the largest Σ of its activations' doubts (`plane_loops`).

    v, u: (hw + 2,) scratch. saved: (2·depth, hw) for residual paths. rx, sx: (nodes, hw); rz, sz: (nodes, 2hw) rolled by dx.
    """
    n, first, depth = h * w, dy * w, 0
    worst, one = s.dtype.type(0), s.dtype.type(1)
    for o in range(ops.shape[0]):
        op, k = ops[o], constants[o]
        node, code = op[NODE], op[CODE]
        if code <= CONVOLVE_3:
            three_rows(s, v[1 : n + 1], h, w, dy)
            if tangent and both:
                three_rows(t, u[1 : n + 1], h, w, dy)
        if code == SUM_RECTIFY:
            found = sum_rectify(
                v, u, left, right, rx[node], rz[node, first:], sx[node], sz[node, first:], s, t, tangent
            )
            worst = max(worst, found)
            tangent = True
        elif code == CONVOLVE_3:
            sum_columns(v, left, right, s)
            if tangent:
                sum_columns(u, left, right, t)
            affine(s, t, k[SCALE], k[BIAS], k[TRAINABLE], tangent)
            tangent = True
        elif code == CONVOLVE:
            _box(s, v[1 : n + 1], op, h, w, dy, dx)
            if tangent and both:
                _box(t, v[1 : n + 1], op, h, w, dy, dx)
            affine(s, t, k[SCALE], k[BIAS], k[TRAINABLE], tangent)
            tangent = True
        elif code == RECTIFY:
            found = rectify(s, t, rx[node], rz[node, first:], sx[node], sz[node, first:], k[CURVE], k[LINE])
            worst = max(worst, found)
        elif code == NORMALISE:
            normalise(s, t, rx[node], rz[node, first:])
        elif code == SAVE:
            _load(s, one, saved[depth])
            _load(t, one, saved[depth + 1])
            depth += 2
        elif code == EXCHANGE:
            _swap(s, saved[depth - 2])
            _swap(t, saved[depth - 1])
        else:
            depth -= 2
            _accumulate(s, saved[depth])
            _accumulate(t, saved[depth + 1])
    return worst


@inlined_on_views
def _start(inputs, x, zc, scale, dy, dx, w, begins, tangent, both, s, t):
    """S and T of a slab before the stage: from the images, or `inputs` (2, H, W, HW) times scale."""
    if begins:
        products(x, zc, dy * w, s)
        if tangent:
            t[:] = 0
    else:
        _load(inputs[0, dy, dx], scale, s)
        if both:
            _load(inputs[1, dy, dx], scale, t)
        else:
            t[:] = 0


@compiled_on_views
def run_stage(
    ops, constants, shape, window, both, x, z, rx, rz, sx, sz, inputs, scale, todo, limit, outputs, sums, planes, saved, columns,
    strips, near,
):  # fmt: skip
    """A stage of the pairs (x_i, z_j), i < B, j < J, on the slabs that `todo` (J, B, H, W) marks; it unmarks those it has done.

    x (B, C, HW), z (J, C, HW): images, of the first stage (C > 0). inputs (B, 2, H, W, HW) float64: slabs of S and T of a later one,
    times `scale`, J = 1. rx, sx (B, nodes, HW) and rz, sz (J, nodes, HW): 1/√v and √v of the stage's nodes in its units, sx times
    curve/π. both: T as well as S; what there is of T otherwise does not matter. limit: slabs in which the mean doubt is larger stay
    marked and are not added. outputs (B, 2, (HW/rows·columns)²) float64: the pooled slabs, J = 1; sums (J, B, 2) float64: of S and T
    where window is (0, 0).

    Scratch: planes (4, ≥ HW + 2), each row aligned so that its second entry is; columns (C + 2·nodes, 2HW), for what z becomes for
    each dx; strips (2, W·(H/rows)²), for sums over the windows' rows; near (2, HW) uint8, for masks.
    """
    h, w = shape
    n, channels, nodes = h * w, z.shape[1], rz.shape[1]
    v, u = planes[0, : n + 2], planes[1, : n + 2]
    s, t = planes[2, 1 : n + 1], planes[3, 1 : n + 1]
    left, right = near[0], near[1]
    v[:] = 0
    u[:] = 0
    begins = channels > 0
    tangent = not begins or ops.shape[0] == 0 or ops[0, CODE] > CONVOLVE
    zc, zr, zs = columns[:channels], columns[channels : channels + nodes], columns[channels + nodes :]
    for dx in range(w):
        if not todo[:, :, :, dx].any():
            continue
        masks(left, right, h, w, dx)
        beyond = h > 1 and todo[:, :, 1:, dx].any()
        for j in range(z.shape[0]):
            for row in range(channels):
                roll(z[j, row], zc[row], h, w, dx, beyond)
            for row in range(nodes):
                roll(rz[j, row], zr[row], h, w, dx, beyond)
                roll(sz[j, row], zs[row], h, w, dx, beyond)
            for i in range(todo.shape[1]):
                strips[:] = 0
                pooled = False
                for dy in range(h):
                    if not todo[j, i, dy, dx]:
                        continue
                    _start(inputs[i], x[i], zc, scale, dy, dx, w, begins, tangent, both, s, t)
                    worst = _slab(
                        ops,
                        constants,
                        s,
                        t,
                        v,
                        u,
                        saved,
                        left,
                        right,
                        rx[i],
                        zr,
                        sx[i],
                        zs,
                        h,
                        w,
                        dy,
                        dx,
                        tangent,
                        both,
                    )
                    if worst > limit * n:
                        continue
                    todo[j, i, dy, dx] = 0
                    if window[0]:
                        pooled = True
                        pool_rows(s, strips[0], h, w, dy, window[0])
                        if both:
                            pool_rows(t, strips[1], h, w, dy, window[0])
                    else:
                        sums[j, i, 0] += total(s)
                        if both:
                            sums[j, i, 1] += total(t)
                if pooled:
                    pool_columns(strips[0], outputs[i, 0], h // window[0], w, dx, window[1])
                    if both:
                        pool_columns(strips[1], outputs[i, 1], h // window[0], w, dx, window[1])
