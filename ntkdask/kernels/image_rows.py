"""The checks that kernels of images make on their inputs (n, H, W, C), NHWC. Called by `convolutional`."""

from __future__ import annotations

from ntkdask.arrays import Array, is_device_array, require_float, same_dtype
from ntkdask.errors import InputError

EXPECTED = "the network takes images, (n, H, W, C) with channels last"
CHANNELS = (1, 3, 4)


def image_shape(row_shape: tuple[int, ...], name: str = "x", layout: str | None = None) -> tuple[int, int, int]:
    """(H, W, C) of a row of images; InputError for other shapes, for sides of 0 and, unless `layout` is "nhwc", for channels first."""
    shape = ("n", *row_shape)
    said = f"{name} has rows of shape {tuple(row_shape)}, but {EXPECTED}."
    if len(row_shape) != 3:
        hint = "Reshape it: x.reshape(n, H, W, C)."
        if len(row_shape) == 2:
            hint = "Add the axis of channels to grey images: x[..., None]."
        raise InputError(f"{said} {hint}")
    h, w, c = (int(side) for side in row_shape)
    if not (h and w and c):
        raise InputError(f"{said} Give images at least one row, one column and one channel.")
    # such as (3, 32, 32): few "rows", and the other two axes are of similar lengths, as the sides of an image are
    if layout is None and h in CHANNELS and min(w, c) > max(CHANNELS) and max(w, c) <= 4 * min(w, c):
        raise InputError(
            f"{said} {shape[1:]} looks like (C, H, W), channels first (NCHW): give x.transpose(0, 2, 3, 1). Where it is an image "
            f"of {h}×{w} pixels with {c} channels, say so to the network: layout='nhwc', an argument of Network, convolutional and "
            "myrtle."
        )
    return h, w, c


def image_rows(x: Array, name: str = "x", layout: str | None = None) -> Array:
    """`x` as float (n, H, W, C), of the `layout` of a network.

    InputError for other shapes, DtypeError for dtypes other than float32 and float64.
    """
    x = require_float(x, name)
    if x.ndim < 2:
        raise InputError(f"{name} has shape {x.shape}, but {EXPECTED}.")
    image_shape(x.shape[1:], name, layout)
    return x


def image_pair(x: Array, y: Array | None, layout: str | None = None) -> tuple[Array, Array | None]:
    """Both inputs as float images of one dtype; InputError for other (H, W, C) or devices, DtypeError for no floats."""
    x = image_rows(x, layout=layout)
    if y is None:
        return x, None
    y = image_rows(y, "y", layout)
    if x.shape[1:] != y.shape[1:]:
        raise InputError(f"x has images of {_named(x)} and y of {_named(y)}; they must agree.")
    if is_device_array(x) != is_device_array(y):
        raise InputError(
            "x and y lie on different devices, one NumPy and one CuPy. Move one of them: arrays.to_device."
        )
    return same_dtype(x, y)


def _named(x: Array) -> str:
    """The shape of the images of x in words."""
    h, w, c = x.shape[1:]
    return f"{h}×{w} pixels with {c} channel{'s' if c > 1 else ''}"
