"""What a kernel is, and the checks that every kernel makes on its inputs."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ntkdask.arrays import Array, flatten_rows, is_device_array, namespace, require_float
from ntkdask.errors import InputError


@runtime_checkable
class Kernel(Protocol):
    """A positive semi-definite kernel on rows; a frozen dataclass."""

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of x's kind and dtype; y=None means x, and the result is symmetric."""

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): k(x_i, x_i)."""

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes that a call on (n, ·), (m, ·) holds at its peak beyond its inputs: result, temporaries and, given a row's
        shape, copies of the rows.
        """


def flat_rows(x: Array, name: str = "x") -> Array:
    """`x` as a (rows, features) float matrix; InputError for no features, DtypeError for other dtypes."""
    x = flatten_rows(require_float(x, name))
    if not x.shape[1]:
        raise InputError(f"{name} has shape {x.shape}: rows without features. Give at least one feature a row.")
    return x


def flat_pair(x: Array, y: Array | None) -> tuple[Array, Array | None]:
    """Both inputs as (rows, features) float matrices of equal width and device; InputError or DtypeError otherwise."""
    x = flat_rows(x)
    if y is None:
        return x, None
    y = flat_rows(y, "y")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"x has {x.shape[1]} features a row and y has {y.shape[1]}; they must agree.")
    if is_device_array(x) != is_device_array(y):
        raise InputError(
            "x and y lie on different devices, one NumPy and one CuPy. Move one of them: arrays.to_device."
        )
    return x, y


def set_diagonal(k: Array, diagonal: Array) -> Array:
    """The square matrix `k` with `diagonal` (n,) written onto its own, in place."""
    index = namespace(k).arange(k.shape[0])
    k[index, index] = diagonal
    return k


def is_slow(kernel: Any) -> bool:
    """Whether time may bound the tiles of a kernel before memory does: its network, or that of a kernel within, takes images."""
    network, inner = getattr(kernel, "network", None), getattr(kernel, "kernel", None)
    return bool(getattr(network, "takes_images", False)) or (inner is not None and is_slow(inner))


def parts_of(kernel: Any) -> tuple[str, ...]:
    """Names of the matrices that one call of the kernel gives, when it gives several; empty for the one matrix of most kernels."""
    parts = tuple(getattr(kernel, "parts", ()))
    return parts if len(parts) > 1 else ()


def entry_size(kernel: Any, row_shape: tuple[int, ...]) -> int:
    """k where one entry of the kernel is a k × k matrix (EmpiricalNTK with output="full": its logits); 1 for most kernels."""
    size = getattr(kernel, "entry_size", None)
    return 1 if size is None else int(size(tuple(row_shape)))
