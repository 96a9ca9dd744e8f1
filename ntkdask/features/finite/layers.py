"""Forward and backward passes of the layers of a finite network on a batch of rows, without gradients of their parameters.

Each function returns its output, and a function from the gradient of the output to the gradient of the input, of the same shapes.
Vectors are (n, channels), images (n, H, W, channels). Called by `finite.network`.
"""

from __future__ import annotations

from collections.abc import Callable

from ntkdask.activations.derivatives import derivative
from ntkdask.arrays import Array, namespace
from ntkdask.networks import Activation, AvgPool, Conv

Backward = Callable[[Array], Array]


def activate(layer: Activation, h: Array) -> tuple[Array, Backward]:
    """n_σ·σ(h), with n_σ the factor of a normalised layer."""
    factor = h.dtype.type(layer.gain**0.5)
    slope = derivative(layer.sigma, h)
    slope *= factor
    out = layer.sigma(h) * factor
    return out, lambda g: g * slope


def layer_norm(h: Array) -> tuple[Array, Backward]:
    """(h − mean)/deviation over the channels; 0 where the deviation is 0."""
    xp = namespace(h)
    centred = h - h.mean(axis=-1, keepdims=True)
    deviation = xp.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    inverse = xp.where(deviation > 0, 1 / xp.where(deviation > 0, deviation, 1), 0)
    out = centred * inverse

    def backward(g: Array) -> Array:
        return (g - g.mean(axis=-1, keepdims=True) - out * (g * out).mean(axis=-1, keepdims=True)) * inverse

    return out, backward


def average_pool(layer: AvgPool, h: Array) -> tuple[Array, Backward]:
    """Means over windows whose size divides that of the image."""
    n, height, width, channels = h.shape
    a, b = layer.window
    out = h.reshape(n, height // a, a, width // b, b, channels).mean(axis=(2, 4))
    return out, lambda g: (g / (a * b)).repeat(a, axis=1).repeat(b, axis=2)


def global_average_pool(h: Array) -> tuple[Array, Backward]:
    """Means over all pixels, (n, channels)."""
    shape = h.shape
    xp = namespace(h)
    return h.mean(axis=(1, 2)), lambda g: xp.broadcast_to((g / (shape[1] * shape[2]))[:, None, None], shape)


def flatten(h: Array) -> tuple[Array, Backward]:
    """All pixels and channels of an image as one vector, (n, H·W·channels)."""
    shape = h.shape
    return h.reshape(shape[0], -1), lambda g: g.reshape(shape)


def patches(layer: Conv, h: Array) -> tuple[Array, Backward]:
    """The filter's view of each output pixel, (n, H, W, C) → (n, H', W', q₁·q₂·C), and its transpose, the sum over patches."""
    xp = namespace(h)
    n, height, width, channels = h.shape
    (rows, columns), (q, r), (s, t) = layer.output_shape((height, width)), layer.filter, layer.strides
    before = layer.before((height, width))
    down, across = (rows - 1) * s + q, (columns - 1) * t + r
    circular = layer.padding == "circular"
    runs = [
        (to_rows, to_columns, from_rows, from_columns)
        for to_rows, from_rows in _runs(height, down, before[0], circular)
        for to_columns, from_columns in _runs(width, across, before[1], circular)
    ]
    padded = xp.zeros((n, down, across, channels), h.dtype)
    for to_rows, to_columns, from_rows, from_columns in runs:
        padded[:, to_rows, to_columns] = h[:, from_rows, from_columns]
    offsets = [
        (i, j, slice(i, i + (rows - 1) * s + 1, s), slice(j, j + (columns - 1) * t + 1, t))
        for i in range(q)
        for j in range(r)
    ]
    out = xp.empty((n, rows, columns, q, r, channels), h.dtype)
    for i, j, seen_rows, seen_columns in offsets:
        out[:, :, :, i, j] = padded[:, seen_rows, seen_columns]

    def backward(g: Array) -> Array:
        g = g.reshape(n, rows, columns, q, r, channels)
        scattered, total = (
            xp.zeros((n, down, across, channels), g.dtype),
            xp.zeros((n, height, width, channels), g.dtype),
        )
        for i, j, seen_rows, seen_columns in offsets:
            scattered[:, seen_rows, seen_columns] += g[:, :, :, i, j]
        for to_rows, to_columns, from_rows, from_columns in runs:
            total[:, from_rows, from_columns] += scattered[:, to_rows, to_columns]
        return total

    return out.reshape(n, rows, columns, -1), backward


def _runs(length: int, padded: int, before: int, circular: bool) -> list[tuple[slice, slice]]:
    """How an axis of `length` lies in a padded one of `padded` entries, with its entry 0 at `before`.

    Returns pairs of slices (in the padded axis, in the axis itself); a circular axis is repeated until the padded one is full.
    """
    runs, position = [], 0
    while position < padded:
        source = (position - before) % length if circular else position - before
        stop = min(padded, position + (length - source if source >= 0 else -source))
        if 0 <= source < length:
            runs.append((slice(position, stop), slice(source, source + stop - position)))
        elif source >= length:
            break
        position = stop
    return runs
