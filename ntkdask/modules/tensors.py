"""Arrays to tensors and back: CuPy by DLPack and NumPy by its buffer, without copies.

A module sees rows in its own layout: images lie as (n, H, W, C) in this package and go to most PyTorch modules as (n, C, H, W).
Used wherever a module is called; kernels and maps themselves take and give arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError

LAYOUTS = ("nchw", None)


def require_layout(layout: str | None, name: str = "input_layout") -> str | None:
    """`layout` itself; InputError, which calls it `name`, where it is neither "nchw" nor None."""
    if layout not in LAYOUTS:
        raise InputError(
            f"{name} is {layout!r}; give 'nchw' (4-d rows (n, H, W, C) reach the module as (n, C, H, W)) or None (rows as they are)."
        )
    return layout


def as_tensor(x: Array, dtype: torch.dtype | None = None, layout: str | None = "nchw") -> torch.Tensor:
    """`x` as a tensor on the device where it lies, which shares its memory where torch allows that.

    Parameters
    ----------
    x : NumPy or CuPy array, or tensor
        NumPy arrays that torch cannot share (read-only, of negative strides or foreign byte order) are copied.
    dtype : torch.dtype, optional
        Of the result; None: that of x.
    layout : str or None, optional
        "nchw": 4-d rows (n, H, W, C) are viewed as (n, C, H, W); None: as they are.

    Returns
    -------
    tensor
        Write to it only where it is known to be a copy.
    """
    require_layout(layout, "layout")
    if isinstance(x, torch.Tensor):
        tensor = x
    elif is_device_array(x):
        tensor = torch.from_dlpack(namespace(x).ascontiguousarray(x))
    else:
        x = np.asarray(x)
        if not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
        if not x.flags.writeable or any(stride < 0 for stride in x.strides):
            x = x.copy()
        tensor = torch.from_numpy(x)
    if layout == "nchw" and tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor if dtype is None else tensor.to(dtype)


def as_array(t: torch.Tensor, like: Array) -> Array:
    """`t` as an array of `like`'s kind, NumPy or CuPy, without a copy where both lie on one device."""
    t = t.detach()
    if is_device_array(like):
        return namespace(like).from_dlpack(t.cuda())
    return t.cpu().numpy()


def device_of(x: Array) -> torch.device:
    """The torch device on which `x` lies."""
    if isinstance(x, torch.Tensor):
        return x.device
    return torch.device("cuda", x.device.id) if is_device_array(x) else torch.device("cpu")


def dtype_of(x: Any) -> torch.dtype:
    """The torch dtype of an array's floats: float32 or float64."""
    return torch.float64 if str(x.dtype).endswith("float64") else torch.float32


def cuda_words() -> str:
    """Whether torch can use a GPU: its build, and how many devices of which name it sees."""
    if torch.version.cuda is None:
        return "a build without CUDA: modules run on the CPU"
    if not torch.cuda.is_available():
        return f"built for CUDA {torch.version.cuda}, sees no device: modules run on the CPU"
    return f"built for CUDA {torch.version.cuda}, sees {torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
