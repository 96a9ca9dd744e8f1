"""One stage of a convolutional network on the folded slabs of pairs of images: the compiled program that `plane_pass` hands blocks to.

A slab runs through all operations of the stage in a core's first cache (`plane_loops`) and is then added to the sums of the readout
or to the slabs of the pooled image. In float32 a slab whose correlations are too near ±1 for float32 is left for a float64 call.
"""

from __future__ import annotations

from ntkdask.compiled import compiled_on_views, inlined_on_views
from ntkdask.kernels.planes.lanes import add_row, copy_row, exchange_rows
from ntkdask.kernels.planes.loops import (
    affine,
    clip,
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
from ntkdask.kernels.planes.pooling import pool_columns, pool_rows

SUM_RECTIFY, CONVOLVE_3, CONVOLVE, RECTIFY, NORMALISE, SAVE, EXCHANGE, ADD = range(8)

CODE, ROWS, COLUMNS, ABOVE, BEFORE, CIRCULAR, NODE, LEVEL = range(8)
DOWN, ACROSS, ROWS_IN, COLUMNS_IN, ROWS_OUT, COLUMNS_OUT = range(8, 14)
"""Columns of an operation: filter, pixels of it above and before, the variance map it reads, the level of what follows; strides and
sizes of the images before and after a convolution."""

HIGH, WIDE, STEP, STRIDE = range(4)
"""Columns of a level: the frame, and the inputs' frame over it."""

SCALE, BIAS, TRAINABLE, CURVE, LINE = range(5)
"""Columns of its constants: σ_w²/q², σ_b², 1 or 0, and those of `stages.Rectify`."""


@inlined_on_views
def _box(a, v, op, h, w, dy, dx):
    """Sums of a (hw,) over the filter, in place: as large as a, of which the frame over the strides counts. v: as large."""
    if op[ROWS] * op[COLUMNS] * op[DOWN] * op[ACROSS] > 1:
        rows_sum(a, v, h, w, dy, op[ROWS], op[ABOVE], op[CIRCULAR], op[DOWN], op[ROWS_IN], op[ROWS_OUT])
        columns_sum(
            v,
            a,
            h // op[DOWN],
            w,
            dx,
            op[COLUMNS],
            op[BEFORE],
            op[CIRCULAR],
            op[ACROSS],
            op[COLUMNS_IN],
            op[COLUMNS_OUT],
        )


@inlined_on_views
def _load(a, scale, out):
    for i in range(a.size):
        out[i] = a[i] * scale


@inlined_on_views
def _slab(ops, constants, levels, planes, hw, saved, near, rx, rz, sx, sz, dy, dx, tangent, both):
    """All operations on S and T of slab (dy, dx), of T when `both`; the largest mean doubt (`plane_loops`) of its activations.

    planes, saved: scratch of `run_stage`, S and T in `planes`. rx, sx: (nodes, hw); rz, sz: (nodes, 2hw) rolled by dx.
    """
    level, depth, worst = -1, 0, 0.0
    following, h, w, n, first, oy, ox = 0, 0, 0, 0, 0, 0, 0
    for o in range(ops.shape[0]):
        op, k = ops[o], constants[o]
        node, code = op[NODE], op[CODE]
        if following != level:
            level = following
            h, w, oy, ox = (
                levels[level, HIGH],
                levels[level, WIDE],
                dy // levels[level, STEP],
                dx // levels[level, STRIDE],
            )
            n, first = h * w, oy * w
        following = op[LEVEL]
        v, u, s, t = planes[0, : n + 2], planes[1, : n + 2], planes[2, 1 : n + 1], planes[3, 1 : n + 1]
        left, right = near[2 * level], near[2 * level + 1]
        if code <= CONVOLVE_3:
            for part in range(2 if tangent and both else 1):
                three_rows(planes[2 + part, 1 : n + 1], planes[part, 1 : n + 1], h, w, oy)
        if code == SUM_RECTIFY:
            found = sum_rectify(
                v, u, left, right, rx[node], rz[node, first:], sx[node], sz[node, first:], s, t, tangent
            )
            worst = max(worst, found / n)
            tangent = True
        elif code <= CONVOLVE:
            kept = n
            if code == CONVOLVE_3:
                for part in range(2 if tangent else 1):
                    sum_columns(planes[part, : n + 2], left, right, planes[2 + part, 1 : n + 1])
            else:
                for part in range(2 if tangent and both else 1):
                    _box(planes[2 + part, 1 : n + 1], v[1 : n + 1], op, h, w, oy, ox)
                kept = n // (op[DOWN] * op[ACROSS])
            affine(s[:kept], t[:kept], k[SCALE], k[BIAS], k[TRAINABLE], tangent)
            tangent = True
        elif code == RECTIFY:
            found = rectify(s, t, rx[node], rz[node, first:], sx[node], sz[node, first:], k[CURVE], k[LINE])
            worst = max(worst, found / n)
        elif code == NORMALISE:
            normalise(s, t, rx[node], rz[node, first:])
        elif code == SAVE:
            for part in range(2):
                copy_row(saved[depth + part], 0, planes[2 + part], 1, n)
            depth += 2
        elif code == EXCHANGE:
            for part in range(2):
                exchange_rows(planes[2 + part, 1:], saved[depth - 2 + part], hw)
        else:
            depth -= 2
            for part in range(2):
                add_row(planes[2 + part], 1, saved[depth + part], 0, n)
    return worst


@inlined_on_views
def _start(inputs, x, zc, scale, dy, dx, w, n, begins, tangent, both, planes):
    """S and T (n,) of a slab before the stage: from the images, or `inputs` (2, n²) times scale."""
    t = planes[3, 1 : n + 1]
    if begins:
        products(x, zc, dy * w, planes[2, 1 : n + 1])
        if tangent:
            t[:] = 0
        return
    first = (dy * w + dx) * n
    for part in range(2 if both else 1):
        _load(inputs[part, first : first + n], scale, planes[2 + part, 1 : n + 1])
    if not both:
        t[:] = 0


@inlined_on_views
def _roll_columns(levels, ops, z, rz, sz, columns, dx, beyond):
    """What dx makes of the image z, of its variance maps and of the masks; `beyond`: of dy > 0 too."""
    h, w = levels[0, HIGH], levels[0, WIDE]
    channels, nodes = z.shape[0], rz.shape[0]
    for row in range(channels):
        roll(z[row], columns[row], h, w, dx, beyond)
    for o in range(ops.shape[0]):
        # an activation's level is that of what follows it
        code, node, level = ops[o, CODE], ops[o, NODE], ops[o, LEVEL]
        if code in (SUM_RECTIFY, RECTIFY, NORMALISE):
            h, w, shift = levels[level, HIGH], levels[level, WIDE], dx // levels[level, STRIDE]
            for part in range(2):
                source = rz[node] if part == 0 else sz[node]
                roll(source, columns[channels + part * nodes + node], h, w, shift, beyond)


@compiled_on_views
def run_stage(
    ops,
    constants,
    levels,
    ends,
    both,
    x,
    z,
    rx,
    rz,
    sx,
    sz,
    inputs,
    scale,
    todo,
    limit,
    outputs,
    sums,
    planes,
    saved,
    columns,
    strips,
    near,
):
    """A stage of the pairs (x_i, z_j), i < B, j < J, on the slabs that `todo` (J, B, H, W) marks; it unmarks those it has done.

    x (B, C, HW), z (J, C, HW): images, of the first stage (C > 0). inputs (B, 2, (HW)²), floating: slabs of S and T of a later one,
    times `scale`, J = 1. rx, sx (B, nodes, HW) and rz, sz (J, nodes, HW): 1/√v and √v of the stage's nodes in its units, sx times
    curve/π. both: T as well as S; what there is of T otherwise does not matter. limit: slabs in which the mean doubt is larger stay
    marked and are not added.

    ends: (rows, columns) of the image after the stage, the window of its pooling and the frame (h, w) of what is pooled, or zeros.
    outputs (B, 2, (hw)²), floating: the pooled slabs, J = 1; sums (J, B, 2) float64: of S and T where there is no window.

    Scratch: planes (4, ≥ HW + 2), each row aligned so that its second entry is; columns (C + 2·nodes, 2HW), for what z becomes for
    each dx; strips (2, W·h²), for sums over the windows' rows; near (2·levels, HW) uint8, for masks.
    """
    h, w = levels[0, HIGH], levels[0, WIDE]
    n, channels, nodes = h * w, z.shape[1], rz.shape[1]
    planes[:2] = 0
    begins = channels > 0
    tangent = not begins or ops.shape[0] == 0 or ops[0, CODE] > CONVOLVE
    zc, zr, zs = columns[:channels], columns[channels : channels + nodes], columns[channels + nodes :]
    rows_out, columns_out, rows, across, high, wide = ends
    last = levels[ops[-1, LEVEL] if ops.shape[0] else 0]
    out_h, out_w = last[HIGH], last[WIDE]
    whole = out_h == rows_out and out_w == columns_out
    parts, left = 2 if both else 1, out_h * out_w
    for dx in range(w):
        if not todo[:, :, :, dx].any():
            continue
        for level in range(levels.shape[0]):
            masks(
                near[2 * level],
                near[2 * level + 1],
                levels[level, HIGH],
                levels[level, WIDE],
                dx // levels[level, STRIDE],
            )
        beyond = h > 1 and todo[:, :, 1:, dx].any()
        for j in range(z.shape[0]):
            _roll_columns(levels, ops, z[j], rz[j], sz[j], columns, dx, beyond)
            for i in range(todo.shape[1]):
                strips[:] = 0
                pooled = False
                for dy in range(h):
                    if not todo[j, i, dy, dx]:
                        continue
                    _start(inputs[i], x[i], zc, scale, dy, dx, w, n, begins, tangent, both, planes)
                    worst = _slab(
                        ops, constants, levels, planes, n, saved, near, rx[i], zr, sx[i], zs, dy, dx, tangent, both
                    )
                    if worst > limit:
                        continue
                    todo[j, i, dy, dx] = 0
                    oy, ox = dy // last[STEP], dx // last[STRIDE]
                    for part in range(parts):
                        slab = planes[2 + part, 1 : left + 1]
                        if not whole:
                            clip(slab, out_h, out_w, oy, ox, rows_out, columns_out)
                        if rows:
                            pool_rows(slab, strips[part], out_h, out_w, oy, rows, rows_out, high)
                        else:
                            sums[j, i, part] += total(slab)
                    pooled = rows > 0
                if pooled:
                    ox = dx // last[STRIDE]
                    for part in range(parts):
                        pool_columns(strips[part], outputs[i, part], out_w, ox, across, columns_out, high, wide)
