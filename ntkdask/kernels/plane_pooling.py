"""Average pooling of folded slabs, in compiled loops: where a slab's entries go in the slabs of the pooled image.

A pixel p = window·P + (b, a) and its partner p' of slab (dy, dx) lie in windows at the offset ((b + dy)//rows, (a + dx)//columns),
modulo the pooled image. Rows are pooled slab by slab, columns once for all slabs of one dx. Called by `plane_stage`; arrays are flat.
"""

from __future__ import annotations

from ntkdask.compiled import inlined_on_views
from ntkdask.kernels.plane_lanes import LANES, add_apart, add_every_second, add_lanes, add_two_lanes


@inlined_on_views
def pool_rows(src, out, h, w, dy, rows):
    """Add a slab (hw,) to the sums over `rows` rows of all slabs of one dx, (h/rows · h/rows · w,): offsets, rows, columns."""
    high = h // rows
    whole = w - w % LANES
    pairs = rows == 2 and dy % 2 == 0
    for b in range(1 if pairs else rows):
        first = ((b + dy) // rows) % high * high * w
        for row in range(high):
            o, a = first + row * w, (rows * row + b) * w
            if pairs:
                for i in range(0, whole, LANES):
                    add_two_lanes(out, o + i, src, a + i, a + w + i)
                for i in range(whole, w):
                    out[o + i] += src[a + i] + src[a + w + i]
            else:
                for i in range(0, whole, LANES):
                    add_lanes(out, o + i, src, a + i)
                for i in range(whole, w):
                    out[o + i] += src[a + i]


@inlined_on_views
def pool_columns(sums, out, high, w, dx, columns):
    """Add the row sums (high · high · w,) of dx to the slabs (high · wide · high · wide,) of the pooled image, wide = w/columns."""
    wide = w // columns
    whole = w - w % LANES if columns == 2 else 0
    for b in range(high):
        for row in range(high):
            s, o = (b * high + row) * w, (b * wide * high + row) * wide
            if whole:
                one, two = dx // 2 % wide, (dx + 1) // 2 % wide
                one, two = o + one * high * wide, o + two * high * wide
                for i in range(0, whole, LANES):
                    if dx % 2 == 0:
                        add_every_second(out, one + i // 2, sums, s + i)
                    else:
                        add_apart(out, one + i // 2, two + i // 2, sums, s + i)
            for i in range(whole, w):
                a = i % columns
                out[o + ((a + dx) // columns) % wide * high * wide + i // columns] += sums[s + i]
