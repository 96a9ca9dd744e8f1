"""What each layer does to offset planes of S and T, in float64: sources of planes that read from one another.

Plane δ = (dy, dx) of a batch of image pairs holds the entries (p, p + δ) with both pixels in the image: rows max(0, −dy) to min(H, H
− dy) of p, columns alike, after the batch's leading axes. A source's `get(δ)` gives (S, T) of that shape; T is None where it is 0 or
not asked for. Nobody writes to an array that a source gives. Every entry is summed in one order, whatever its plane and its image,
so that equal patches have equal S to the last bit. MATH.md §1, §3. Built and swept by `planes.reference`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol, TypeAlias

import numpy as np

from ntkdask.arrays import Array, namespace
from ntkdask.networks import Activation, AvgPool, Conv

Offset: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int, int]
Plane: TypeAlias = tuple[Array, Array | None]

CERTAIN = 1e-15
"""Correlations this close to ±1 count as ±1: κ₀ would turn their four roundings into an error of 1e-8."""
REMEMBERED, REMEMBERED_AROUND = 1, 4
"""Planes that the second path of a Residual may read again: the last one, or with circular convolutions all planes whose offsets are
equal modulo the image."""


class PlaneSource(Protocol):
    """Planes of S and T of images of `shape`, (H, W)."""

    shape: Shape

    def get(self, delta: Offset) -> Plane:
        """(S, T) of plane `delta`, (*batch, rows, columns) float64 each, T or None; `delta` lies within the image."""


def span(length: int, d: int) -> tuple[int, int]:
    """The range of positions p for which p and p + d are in [0, length): first, and last + 1."""
    return max(0, -d), min(length, length - d)


def around(d: int, length: int) -> list[int]:
    """The offsets within (−length, length) that are equal to d modulo the length: one (0) or two."""
    r = d % length
    return [r - length, r] if r else [0]


def sweep(offsets: Iterable[int], length: int, wraps: bool) -> list[int]:
    """The offsets in the order in which planes are read: ascending, or, where layers wrap, by their value modulo the length."""
    return sorted(offsets, key=lambda d: (d % length, d) if wraps else (0, d))


class Inputs:
    """The planes of the images: S(p, p') = Σ_channels x_p·y_p' / divisor, T = 0.

    x, y: (channels, *batch, H, W), batches that broadcast.
    """

    def __init__(self, x: Array, y: Array, divisor: float) -> None:
        self.shape: Shape = x.shape[-2:]
        self._x, self._y, self._divisor = x, y, divisor

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        left, right = _sides(self._x, self._y, self.shape, delta)
        total = left[0] * right[0]
        for a, b in zip(left[1:], right[1:], strict=True):
            total += a * b
        total /= self._divisor
        return total, None


class Convolved:
    """After a convolution: plane δ reads plane sδ, or with circular padding all planes that are sδ modulo the image.

    S ← σ_w²·A[S] + σ_b², T ← σ_w²·A[T] + (S if trainable).
    """

    def __init__(self, source: PlaneSource, conv: Conv, tangent: bool) -> None:
        self.shape = conv.output_shape(source.shape)
        self._source, self._conv = source, conv
        self._before = conv.before(source.shape)
        self._trains = tangent and conv.trainable
        self._wrapped: tuple[Offset, Plane] | None = None

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        conv = self._conv
        inner = delta[0] * conv.strides[0], delta[1] * conv.strides[1]
        if conv.padding == "circular":
            parts, first = self._all_around(inner), (0, 0)
        else:
            # s·(output − 1) < H: the plane is one of the input's
            parts = self._source.get(inner)
            first = span(self._source.shape[0], inner[0])[0], span(self._source.shape[1], inner[1])[0]
        s = self._gathered(parts[0], delta, first)
        t = None if parts[1] is None else self._gathered(parts[1], delta, first)
        s += conv.bias_variance
        if self._trains:
            t = s if t is None else t + s
        return s, t

    def _gathered(self, plane: Array, delta: Offset, first: Offset) -> Array:
        """σ_w²·A of a plane that begins at the pixels `first`, or, with circular padding, of all planes around the image."""
        conv = self._conv
        for axis in (0, 1):
            wanted = span(self.shape[axis], delta[axis])
            q, s, before = conv.filter[axis], conv.strides[axis], self._before[axis]
            start = first[axis]
            if conv.padding == "circular":
                start = wanted[0] * s - before
                index = np.arange(start, (wanted[1] - 1) * s - before + q) % self._source.shape[axis]
                plane = namespace(plane).take(plane, namespace(plane).asarray(index), axis=axis - 2)
            plane = _box(plane, axis - 2, start, wanted, q, s, before)
        plane *= conv.weight_variance / (conv.filter[0] * conv.filter[1])
        return plane

    def _all_around(self, delta: Offset) -> Plane:
        """(S, T)(p, p + delta modulo the image) for every pixel p: (*batch, H, W)."""
        (h, w), key = self._source.shape, (delta[0] % self._source.shape[0], delta[1] % self._source.shape[1])
        if self._wrapped is None or self._wrapped[0] != key:
            whole: list[Array | None] = [None, None]
            for dy in around(key[0], h):
                for dx in around(key[1], w):
                    rows, columns = slice(*span(h, dy)), slice(*span(w, dx))
                    for k, part in enumerate(self._source.get((dy, dx))):
                        if part is not None:
                            if whole[k] is None:
                                whole[k] = namespace(part).zeros((*part.shape[:-2], h, w))
                            whole[k][..., rows, columns] = part  # type: ignore[index]
            self._wrapped = key, (whole[0], whole[1])
        return self._wrapped[1]


def _box(plane: Array, axis: int, start: int, outputs: tuple[int, int], q: int, s: int, before: int) -> Array:
    """Σ_a plane(sP + a − before) along one axis, for outputs P in [low, high); the sum is 0 where it has no term.

    Parameters
    ----------
    plane : array
        Begins at pixel `start` of the axis; pixels outside it count as 0.
    axis : int
        Negative.
    start : int
        The first pixel.
    outputs : tuple of 2 int
        low, high.
    q, s, before : int
        Length of the filter, stride, and how much of the filter lies before its pixel.
    """
    low, high = outputs
    shape = list(plane.shape)
    stop = start + shape[axis]
    shape[axis] = high - low
    total = namespace(plane).zeros(shape)
    rest = (slice(None),) * (-1 - axis)
    for a in range(q):
        # P with start <= sP + a − before < stop
        first = max(low, -((a - before - start) // s))
        last = min(high, -((a - before - stop) // s))
        if first < last:
            begin = first * s + a - before - start
            end = begin + (last - first - 1) * s + 1
            total[(..., slice(first - low, last - low), *rest)] += plane[(..., slice(begin, end, s), *rest)]
    return total


class Activated:
    """After an activation: S ← k_σ(√v, √v', c), T ← T·k_σ'(√v, √v', c), c = S/√(vv').

    Parameters
    ----------
    source : PlaneSource
        The planes before it.
    layer : Activation
        The layer.
    left, right : array (*batch, H, W)
        Variances of the images on either side.
    own : bool
        Whether images meet themselves, so that c = 1 on plane 0.
    tangent : bool
        Whether T is wanted.
    """

    def __init__(
        self, source: PlaneSource, layer: Activation, left: Array, right: Array, own: bool, tangent: bool
    ) -> None:
        self.shape = source.shape
        self._source, self._layer, self._left, self._right = source, layer, left, right
        self._own, self._tangent = own, tangent

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        v, w = _sides(self._left, self._right, self.shape, delta)
        xp, layer, t = namespace(v), self._layer, None
        if self._own and delta == (0, 0):
            c = xp.where(v > 0, 1.0, 0.0)
            if self._tangent:
                _, t = self._source.get(delta)
        else:
            s, t = self._source.get(delta)
            c = _correlations(s, v, w)
        a, b = xp.sqrt(v), xp.sqrt(w)
        if t is not None:
            t = t * layer.sigma.dual_derivative(a, b, c)
            t *= layer.gain
        s = layer.sigma.dual(a, b, c)
        s *= layer.gain
        return s, t


class Normalised:
    """After a LayerNorm: S ← S/√(vv'), T alike, 0 where a variance is 0. left, right: variances, (*batch, H, W) each."""

    def __init__(self, source: PlaneSource, left: Array, right: Array) -> None:
        self.shape = source.shape
        self._source, self._left, self._right = source, left, right

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        v, w = _sides(self._left, self._right, self.shape, delta)
        xp = namespace(v)
        size = xp.sqrt(v * w)
        inside = size > 0
        size = xp.where(inside, size, 1.0)
        s, t = self._source.get(delta)
        return s / size * inside, None if t is None else t / size * inside


class Pooled:
    """After a pooling: means over both windows of a pair, for planes with offsets in `rows` × `columns`.

    The first `get` sweeps over the planes of the source and makes all of these planes, which are held as long as this object lives.
    """

    def __init__(
        self, source: PlaneSource, layer: AvgPool, rows: frozenset[int], columns: frozenset[int], wraps: bool
    ) -> None:
        self.shape = layer.output_shape(source.shape)
        self._source, self._window, self._wraps = source, layer.window, wraps
        self._wanted = rows, columns
        self._planes: dict[Offset, list[Array | None]] = {}

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        if not self._planes:
            self._sweep()
        s, t = self._planes[delta]
        return s, t

    def _sweep(self) -> None:
        """Read every plane of the source once, and add it to the pooled planes."""
        (h, w), (a, b) = self._source.shape, self._window
        rows, columns = (pooled_from(d, s, n) for d, s, n in zip(self._wanted, (a, b), (h, w), strict=True))
        for dy in sweep(rows, h, self._wraps):
            vertical = self._targets(dy, 0)
            for dx in sweep(columns, w, self._wraps):
                horizontal = self._targets(dx, 1)
                plane = self._source.get((dy, dx))
                for delta_y, inner_rows in vertical:
                    for delta_x, inner_columns in horizontal:
                        self._add(plane, (delta_y, delta_x), inner_rows, inner_columns)
        for parts in self._planes.values():
            for part in parts:
                if part is not None:
                    part /= (a * b) ** 2

    def _targets(self, d: int, axis: int) -> list[tuple[int, slice]]:
        """For every position in a window whose pooled offset is wanted: that offset, and the part of plane d that goes there."""
        s, targets = self._window[axis], []
        start = span(self._source.shape[axis], d)[0]
        for a in range(s):
            target = (a + d) // s
            if target in self._wanted[axis] and abs(target) < self.shape[axis]:
                first, last = span(self.shape[axis], target)
                begin = first * s + a - start
                targets.append((target, slice(begin, begin + (last - first - 1) * s + 1, s)))
        return targets

    def _add(self, plane: Plane, delta: Offset, rows: slice, columns: slice) -> None:
        """Add some rows and columns of a plane to the pooled plane `delta`."""
        held = self._planes.setdefault(delta, [None, None])
        for k, part in enumerate(plane):
            if part is not None:
                taken = part[..., rows, columns]
                if held[k] is None:
                    held[k] = taken.copy()
                else:
                    held[k] += taken


def pooled_from(offsets: Iterable[int], window: int, length: int) -> frozenset[int]:
    """Offsets between pixels of an axis of `length` whose windows are at any of `offsets`."""
    within = range(1 - window, window)
    return frozenset(window * d + e for d in offsets for e in within if abs(window * d + e) < length)


class Summed:
    """After a Residual: S and T of its two paths, added."""

    def __init__(self, branch: PlaneSource, shortcut: PlaneSource) -> None:
        self.shape = branch.shape
        self._paths = branch, shortcut

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        (s, t), (other_s, other_t) = (path.get(delta) for path in self._paths)
        if t is None or other_t is None:
            return s + other_s, other_t if t is None else t
        return s + other_s, t + other_t


class Remembered:
    """The planes of a source that two paths read: the last `count` are kept."""

    def __init__(self, source: PlaneSource, count: int) -> None:
        self.shape = source.shape
        self._source, self._count = source, count
        self._planes: OrderedDict[Offset, Plane] = OrderedDict()

    def get(self, delta: Offset) -> Plane:
        """See `PlaneSource`."""
        if delta not in self._planes:
            self._planes[delta] = self._source.get(delta)
            if len(self._planes) > self._count:
                self._planes.popitem(last=False)
        return self._planes[delta]


def _sides(left: Array, right: Array, shape: Shape, delta: Offset) -> tuple[Array, Array]:
    """`left` at the pixels p of plane delta, and `right` at p + delta."""
    (top, bottom), (west, east) = (span(n, d) for n, d in zip(shape, delta, strict=True))
    there = slice(top + delta[0], bottom + delta[0]), slice(west + delta[1], east + delta[1])
    return left[..., top:bottom, west:east], right[(..., *there)]


def _correlations(s: Array, v: Array, w: Array) -> Array:
    """c = S/√(vw), clipped to [−1, 1] and rounded to ±1 within `CERTAIN` of it; 0 where a variance is 0, since S is 0 there.

    Of equal variances the root of their product is the variance itself, so that equal patches have c = 1.
    """
    xp = namespace(s)
    size = xp.sqrt(v * w)
    xp.maximum(size, np.finfo(np.float64).tiny, out=size)
    c = xp.divide(s, size, out=size)
    xp.clip(c, -1.0, 1.0, out=c)
    return xp.where(xp.abs(c) >= 1.0 - CERTAIN, xp.rint(c), c)
