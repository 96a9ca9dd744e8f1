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
    pool,
    products,
    rectify,
    roll,
    rows_sum,
    sum_columns,
    sum_rectify,
    three_rows,
    total,
)

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
def _slab(ops, constants, s, t, v, u, saved, left, right, rx, rz, sx, sz, h, w, dy, dx, tangent):
    """All operations on S and T (hw,) of slab (dy, dx); the largest Σ of the doubts (`plane_loops`) of its activations.

    v, u: (hw + 2,) scratch. saved: (2·depth, hw) for residual paths. rx, sx: (nodes, hw); rz, sz: (nodes, 2hw) rolled by dx.
    """
    n, first, depth = h * w, dy * w, 0
    worst, one = s.dtype.type(0), s.dtype.type(1)
    for o in range(ops.shape[0]):
        op, k = ops[o], constants[o]
        node, code = op[NODE], op[CODE]
        if code <= CONVOLVE_3:
            three_rows(s, v[1 : n + 1], h, w, dy)
            if tangent:
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
            if tangent:
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


@compiled_on_views
def run_stage(
    ops, constants, shape, window, x, z, rx, rz, sx, sz, inputs, scale, todo, limit, outputs, sums, planes, saved, columns, near
):  # fmt: skip
    """A stage of the pairs (x_i, z), i < B, on the slabs that `todo` (B, H, W) marks; it unmarks those it has done.

    x (B, C, HW), z (C, HW): images, of the first stage (C > 0). inputs (B, 2, H, W, HW) float64: slabs of S and T of a later one,
    times `scale`. rx, sx (B, nodes, HW) and rz, sz (nodes, HW): 1/√v and √v of the stage's nodes in its units, sx times curve/π.
    limit: slabs in which the mean doubt is larger stay marked and are not added. outputs (B, 2, H/rows, W/columns,
    HW/rows·columns) float64: the pooled slabs; sums (B, 2) float64: of S and T where window is (0, 0). planes (4, ≥ HW + 2): scratch,
    each row aligned so that its second entry is. columns (C + 2·nodes, 2HW): scratch for what z becomes for each dx; near (2, HW)
    uint8: for its masks.
    """
    h, w = shape
    n, channels, nodes = h * w, z.shape[0], rz.shape[0]
    v, u = planes[0, : n + 2], planes[1, : n + 2]
    s, t = planes[2, 1 : n + 1], planes[3, 1 : n + 1]
    left, right = near[0], near[1]
    v[:] = 0
    u[:] = 0
    begins = channels > 0
    tangent = not begins or ops.shape[0] == 0 or ops[0, CODE] > CONVOLVE
    zc, zr, zs = columns[:channels], columns[channels : channels + nodes], columns[channels + nodes :]
    for dx in range(w):
        if not todo[:, :, dx].any():
            continue
        masks(left, right, h, w, dx)
        for row in range(channels):
            roll(z[row], zc[row], h, w, dx)
        for row in range(nodes):
            roll(rz[row], zr[row], h, w, dx)
            roll(sz[row], zs[row], h, w, dx)
        for i in range(todo.shape[0]):
            for dy in range(h):
                if not todo[i, dy, dx]:
                    continue
                if begins:
                    products(x[i], zc, dy * w, s)
                    if tangent:
                        t[:] = 0
                else:
                    _load(inputs[i, 0, dy, dx], scale, s)
                    _load(inputs[i, 1, dy, dx], scale, t)
                worst = _slab(
                    ops, constants, s, t, v, u, saved, left, right, rx[i], zr, sx[i], zs, h, w, dy, dx, tangent
                )
                if worst > limit * n:
                    continue
                todo[i, dy, dx] = 0
                if window[0]:
                    pool(s, outputs[i, 0], h, w, dy, dx, window[0], window[1])
                    pool(t, outputs[i, 1], h, w, dy, dx, window[0], window[1])
                else:
                    sums[i, 0] += total(s)
                    sums[i, 1] += total(t)
