"""Average pooling of folded slabs, in compiled loops: where a slab's entries go in the slabs of the pooled image.

A pixel p = window·P + (b, a) and its partner p' of slab (dy, dx) lie in windows at the offset ((b + dy)//rows, (a + dx)//columns),
modulo the frame of the pooled image (`planes.tables`). Rows are pooled slab by slab, columns once for all slabs of one dx. Called by
`planes.stage`; arrays are flat.
"""

from __future__ import annotations

from ntkdask.compiled import inlined_on_views
from ntkdask.kernels.planes.lanes import LANES, add_apart, add_every_second, add_row, add_two_rows


@inlined_on_views
def pool_rows(src, out, h, w, dy, rows, inside, high):
    """Add a slab to the sums over the rows of the windows, which all slabs of one dx share.

    Parameters
    ----------
    src : array (h·w,)
        The slab.
    out : array (high · high · w,)
        The sums: offsets of rows, rows of windows, columns of pixels.
    h, w : int
        Rows and columns of the slab's frame.
    dy : int
        The slab's offset of rows.
    rows : int
        Rows of a window.
    inside : int
        Rows of the frame that belong to the image.
    high : int
        Rows of the frame of the pooled image.
    """
    pairs = rows == 2 and dy % 2 == 0 and high * 2 == h
    for b in range(1 if pairs else rows):
        near, far = ((b + dy) // rows) % high, ((b + dy - h) // rows) % high
        for window in range(inside // rows):
            row = window * rows + b
            offset = near if row + dy < h else far
            if (row + dy if row + dy < h else row + dy - h) >= inside:
                continue
            o, a = (offset * high + window) * w, row * w
            if pairs:
                add_two_rows(out, o, src, a, a + w, w)
            else:
                add_row(out, o, src, a, w)


@inlined_on_views
def pool_columns(sums, out, w, dx, columns, inside, high, wide):
    """Add the sums over rows for one dx to the slabs of the pooled image.

    Parameters
    ----------
    sums : array (high · high · w,)
        The output of `pool_rows`.
    out : array (high · wide · high · wide,)
        Slabs of the pooled image: offsets, then pixels.
    w : int
        Columns of the slab's frame.
    dx : int
        The slabs' offset of columns.
    columns : int
        Columns of a window.
    inside : int
        Columns of the frame that belong to the image.
    high, wide : int
        Rows and columns of the frame of the pooled image.
    """
    slab = high * wide
    # two passes, so that the first one's rows do not prepare the divisions of the second
    whole = w - w % LANES if columns == 2 and wide * 2 == w else 0
    if whole:
        one, two = dx // 2 % wide * slab, (dx + 1) // 2 % wide * slab
        for b in range(high):
            for row in range(high):
                s, o = (b * high + row) * w, (b * wide * high + row) * wide
                if dx % 2 == 0:
                    for i in range(0, whole, LANES):
                        add_every_second(out, o + one + i // 2, sums, s + i)
                else:
                    for i in range(0, whole, LANES):
                        add_apart(out, o + one + i // 2, o + two + i // 2, sums, s + i)
    for i in range(whole, inside):
        other = (i + dx) % w
        if other >= inside:
            continue
        offset = (other // columns - i // columns) % wide * slab + i // columns
        for b in range(high):
            for row in range(high):
                out[(b * wide * high + row) * wide + offset] += sums[(b * high + row) * w + i]
