"""One stage of a convolutional network on the folded slabs of pairs of images, compiled: `run_stage`, which `planes.host` calls.

A slab runs through all operations of the stage in a core's first cache (`planes.loops`). It is then added to the sums of the readout,
or to the slabs of the pooled image (`planes.pooling`). In float32 a slab whose correlations are too near ±1 for float32 is skipped, so
that a call in float64 can do it. The tables of the operations come from `planes.tables`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ntkdask.compiled import compiled_on_views, inlined_on_views
from ntkdask.kernels.planes.activation import Roots, normalise, rectify, sum_rectify
from ntkdask.kernels.planes.lanes import add_row, copy_row, exchange_rows
from ntkdask.kernels.planes.loops import (
    AxisFilter,
    affine,
    clip,
    columns_sum,
    masks,
    products,
    roll,
    rows_sum,
    sum_columns,
    three_rows,
    total,
)
from ntkdask.kernels.planes.pooling import pool_columns, pool_rows

SUM_RECTIFY, CONVOLVE_3, CONVOLVE, RECTIFY, NORMALISE, SAVE, EXCHANGE, ADD = range(8)

CODE, ROWS, COLUMNS, ABOVE, BEFORE, CIRCULAR, NODE, LEVEL = range(8)
DOWN, ACROSS, ROWS_IN, COLUMNS_IN, ROWS_OUT, COLUMNS_OUT = range(8, 14)
"""Columns of `Tables.ops`: the code; rows and columns of the filter, and how many of them lie above and before the pixel it stands on;
1 for circular padding; the variance map that the operation reads; the level of its output; then of a convolution the stride down and
across, and the rows and columns of the image before and after."""

HIGH, WIDE, STEP, STRIDE = range(4)
"""Columns of `Tables.levels`: rows and columns of the frame, and how many times as large the frame of the inputs is in each."""

SCALE, BIAS, TRAINABLE, CURVE, LINE = range(5)
"""Columns of `Tables.constants`: σ_w²/q², σ_b², 1 or 0, and `curve` and `line` of `program.Rectify`."""


class Tables(NamedTuple):
    """What a stage does, as compiled code reads it.

    Parameters
    ----------
    ops : array (operations, 14), int64
        Each operation's code and geometry, in order.
    constants : array (operations, 5), of the dtype of the slabs
        Each operation's factors.
    levels : array (levels, 4), int64
        The frames that images have in the course of the stage, the first that of its inputs.
    ends : tuple of 6 int
        (rows, columns) of the image after the stage, (rows, columns) of the pooling window and (rows, columns) of the frame of the
        pooled image; zeros for the last four where no pooling follows.
    """

    ops: np.ndarray
    constants: np.ndarray
    levels: np.ndarray
    ends: tuple[int, int, int, int, int, int]


class Side(NamedTuple):
    """The images on one side of a block of pairs, in the dtype of the slabs; each row of an array is one image.

    Parameters
    ----------
    images : array (n, C, ≥ HW)
        Pixels for the first stage; C = 0 for later ones, which read the slabs of the stage before.
    inverse : array (n, nodes, ≥ HW)
        1/√v of the stage's variance maps, in the units of its S; 0 where v = 0.
    root : array (n, nodes, ≥ HW)
        √v; on the left side, x, times curve/π of the activation that reads it.
    """

    images: np.ndarray
    inverse: np.ndarray
    root: np.ndarray


class Slabs(NamedTuple):
    """S and T of every slab of the stage's input image, for stages after the first; the right side has one image then.

    Parameters
    ----------
    entries : array (B, 2, (HW)²), float32 or float64
        Slabs of S and of T, offsets before pixels; of length 0 for the first stage.
    scale : float32 or float64, the dtype of the slabs
        What the entries are multiplied by when they are read.
    """

    entries: np.ndarray
    scale: np.floating


class Sums(NamedTuple):
    """Where a stage adds its slabs.

    Parameters
    ----------
    pooled : array (B, 2, (hw)²), float32 or float64
        Slabs of S and of T of the pooled image; unused where no pooling follows.
    readout : array (J, B, 2), float64
        Sums of S and of T over all slabs, where no pooling follows.
    """

    pooled: np.ndarray
    readout: np.ndarray


class Scratch(NamedTuple):
    """Memory of one thread for one stage, in the dtype of the slabs.

    Parameters
    ----------
    planes : array (4, ≥ HW + 2)
        Two buffers, S and T of a slab; the second entry of each row begins a cache line.
    saved : array (2·depth, HW)
        S and T that residual paths have put aside.
    columns : array (C + 2·nodes, ≥ 2HW)
        The right image's pixels, its 1/√v and its √v, with columns moved by dx.
    strips : array (2, W·h²)
        Sums over the rows of the pooling windows, of S and of T, for one dx.
    neighbours : array (2·levels, HW), uint8
        For each level whether the left and the right neighbour of a pixel belong to the same plane.
    """

    planes: np.ndarray
    saved: np.ndarray
    columns: np.ndarray
    strips: np.ndarray
    neighbours: np.ndarray


@inlined_on_views
def _box(a, v, op, h, w, dy, dx):
    """Sum a (h·w,) over the filter, in place; a stride leaves a smaller frame at the beginning of a. v: scratch (h·w,)."""
    if op[ROWS] * op[COLUMNS] * op[DOWN] * op[ACROSS] > 1:
        rows = AxisFilter(op[ROWS], op[ABOVE], op[CIRCULAR], op[DOWN], op[ROWS_IN], op[ROWS_OUT])
        columns = AxisFilter(op[COLUMNS], op[BEFORE], op[CIRCULAR], op[ACROSS], op[COLUMNS_IN], op[COLUMNS_OUT])
        rows_sum(a, v, h, w, dy, rows)
        columns_sum(v, a, h // op[DOWN], w, dx, columns)


@inlined_on_views
def _load(a, scale, out):
    """out = scale·a."""
    for i in range(a.size):
        out[i] = a[i] * scale


@inlined_on_views
def _slab(tables, scratch, x, z, dy, dx, live, tangent):
    """Run all operations on S and T of slab (dy, dx), in scratch.planes; the largest mean doubt of its activations (`activation`).

    x: (1/√v, √v) of the left image, (nodes, HW) each. z: those of the right image, (nodes, 2HW), rolled by dx. live: T is not zero
    everywhere at the start. tangent: T is wanted.
    """
    ops, planes, saved, neighbours = tables.ops, scratch.planes, scratch.saved, scratch.neighbours
    (rx, sx), (rz, sz) = x, z
    hw = tables.levels[0, HIGH] * tables.levels[0, WIDE]
    level, depth, worst = -1, 0, 0.0
    following, h, w, n, first, oy, ox = 0, 0, 0, 0, 0, 0, 0
    for o in range(ops.shape[0]):
        op, k = ops[o], tables.constants[o]
        node, code = op[NODE], op[CODE]
        if following != level:
            level = following
            frame = tables.levels[level]
            h, w, oy, ox = frame[HIGH], frame[WIDE], dy // frame[STEP], dx // frame[STRIDE]
            n, first = h * w, oy * w
        following = op[LEVEL]
        v, u, s, t = planes[0, : n + 2], planes[1, : n + 2], planes[2, 1 : n + 1], planes[3, 1 : n + 1]
        left, right = neighbours[2 * level], neighbours[2 * level + 1]
        if code <= CONVOLVE_3:
            for part in range(2 if live and tangent else 1):
                three_rows(planes[2 + part, 1 : n + 1], planes[part, 1 : n + 1], h, w, oy)
        if code == SUM_RECTIFY:
            roots = Roots(rx[node], rz[node, first:], sx[node], sz[node, first:])
            doubt = sum_rectify(v, u, left, right, roots, s, t, live)
            worst = max(worst, doubt / n)
            live = True
        elif code <= CONVOLVE:
            kept = n
            if code == CONVOLVE_3:
                for part in range(2 if live else 1):
                    sum_columns(planes[part, : n + 2], left, right, planes[2 + part, 1 : n + 1])
            else:
                for part in range(2 if live and tangent else 1):
                    _box(planes[2 + part, 1 : n + 1], v[1 : n + 1], op, h, w, oy, ox)
                kept = n // (op[DOWN] * op[ACROSS])
            affine(s[:kept], t[:kept], k[SCALE], k[BIAS], k[TRAINABLE], live)
            live = True
        elif code == RECTIFY:
            roots = Roots(rx[node], rz[node, first:], sx[node], sz[node, first:])
            doubt = rectify(s, t, roots, k[CURVE], k[LINE])
            worst = max(worst, doubt / n)
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
def _start(images, before, zc, offset, w, n, live, tangent, planes):
    """S and T (n,) of slab `offset` = (dy, dx) before the stage, into planes[2] and planes[3].

    images: the left image (C, n) of a first stage, whose right image `zc` is rolled by dx. C = 0 for a later stage, which reads
    `before`, the left image's `Slabs`.
    """
    dy, dx = offset
    t = planes[3, 1 : n + 1]
    if images.shape[0] > 0:
        products(images, zc, dy * w, planes[2, 1 : n + 1])
        if live:
            t[:] = 0
        return
    first = (dy * w + dx) * n
    for part in range(2 if tangent else 1):
        _load(before.entries[part, first : first + n], before.scale, planes[2 + part, 1 : n + 1])
    if not tangent:
        t[:] = 0


@inlined_on_views
def _roll_columns(tables, z, rz, sz, columns, dx, beyond):
    """Roll the image z and its variance maps by dx into `columns`.

    `beyond`: twice, one below the other, for slabs of dy > 0.
    """
    levels, ops = tables.levels, tables.ops
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
def run_stage(tables, left, right, before, todo, limit, sums, scratch, tangent):
    """Run a stage on the slabs that `todo` marks of the pairs (x_i, z_j), i < B, j < J, and unmark those that it has done.

    Parameters
    ----------
    tables : Tables
        The stage.
    left, right : Side
        The B images x and the J images z.
    before : Slabs
        S and T of the B pairs after the stage before; of a later stage J = 1.
    todo : array (J, B, H, W), uint8
        1 for each slab (dy, dx) to compute.
    limit : float
        Slabs in which the mean doubt of an activation is larger are not added and stay marked.
    sums : Sums
        Where slabs are added: its `pooled` where a pooling follows (J = 1 then), otherwise its `readout`.
    scratch : Scratch
        The thread's memory; its contents do not matter.
    tangent : bool
        T as well as S. Otherwise what stands where T would is meaningless.
    """
    levels, neighbours = tables.levels, scratch.neighbours
    planes, columns, strips = scratch.planes, scratch.columns, scratch.strips
    h, w = levels[0, HIGH], levels[0, WIDE]
    n, channels, nodes = h * w, right.images.shape[1], right.inverse.shape[1]
    planes[:2] = 0
    live = channels == 0 or tables.ops.shape[0] == 0 or tables.ops[0, CODE] > CONVOLVE
    zc, zr, zs = columns[:channels], columns[channels : channels + nodes], columns[channels + nodes :]
    rows_out, columns_out, rows, across, high, wide = tables.ends
    last = levels[tables.ops[-1, LEVEL] if tables.ops.shape[0] else 0]
    out_h, out_w = last[HIGH], last[WIDE]
    whole = out_h == rows_out and out_w == columns_out
    parts, size = 2 if tangent else 1, out_h * out_w
    for dx in range(w):
        if not todo[:, :, :, dx].any():
            continue
        for level in range(levels.shape[0]):
            frame = levels[level]
            masks(neighbours[2 * level], neighbours[2 * level + 1], frame[HIGH], frame[WIDE], dx // frame[STRIDE])
        beyond = h > 1 and todo[:, :, 1:, dx].any()
        ox = dx // last[STRIDE]
        for j in range(right.images.shape[0]):
            _roll_columns(tables, right.images[j], right.inverse[j], right.root[j], columns, dx, beyond)
            for i in range(todo.shape[1]):
                strips[:] = 0
                pooled = False
                for dy in range(h):
                    if not todo[j, i, dy, dx]:
                        continue
                    own = Slabs(before.entries[i], before.scale)
                    _start(left.images[i], own, zc, (dy, dx), w, n, live, tangent, planes)
                    maps = (left.inverse[i], left.root[i]), (zr, zs)
                    worst = _slab(tables, scratch, maps[0], maps[1], dy, dx, live, tangent)
                    if worst > limit:
                        continue
                    todo[j, i, dy, dx] = 0
                    oy = dy // last[STEP]
                    for part in range(parts):
                        slab = planes[2 + part, 1 : size + 1]
                        if not whole:
                            clip(slab, out_h, out_w, oy, ox, rows_out, columns_out)
                        if rows:
                            pool_rows(slab, strips[part], out_h, out_w, oy, rows, rows_out, high)
                        else:
                            sums.readout[j, i, part] += total(slab)
                    pooled = rows > 0
                if pooled:
                    for part in range(parts):
                        pool_columns(strips[part], sums.pooled[i, part], out_w, ox, across, columns_out, high, wide)
