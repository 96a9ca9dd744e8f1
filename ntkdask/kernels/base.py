"""What a kernel is, what planning asks of it, and the checks that every kernel makes on its inputs.

Kernels of this package inherit the answers of most kernels from `KernelBase`; a user's own kernel may leave them out, and
`completed` gives it the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ntkdask.arrays import Array, flatten_rows, is_device_array, namespace, require_float, same_dtype
from ntkdask.errors import InputError
from ntkdask.networks import Network


@runtime_checkable
class Computes(Protocol):
    """The least that makes a kernel: values, diagonal, memory."""

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """(n, *s), (m, *s) → (n, m) of the rows' kind and common dtype; y=None means x, and the result is symmetric."""

    def diagonal(self, x: Array) -> Array:
        """(n, *s) → (n,): k(x_i, x_i)."""

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes that a call on (n, ·), (m, ·) holds at its peak beyond its inputs.

        They are the result, temporaries and, given a row's shape, copies of the rows.
        """


@runtime_checkable
class Kernel(Computes, Protocol):
    """A positive semi-definite kernel on rows; a frozen dataclass."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the matrices that one call gives, in its order; a kernel of one matrix has one name or none."""

    @property
    def is_slow(self) -> bool:
        """Whether time may bound the tiles of a matrix before memory does, as it does for networks of images."""

    @property
    def passes_over_rows(self) -> bool:
        """Whether a tile takes time for each row and column (a network's passes over them) beside that for its entries."""

    def entry_size(self, row_shape: tuple[int, ...]) -> int:
        """k where one entry of the kernel is a k × k matrix, for rows of this shape; 1 for a kernel of numbers."""


class KernelBase:
    """The answers of most kernels: one matrix of numbers, whose tiles take no longer than memory allows."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the matrices that one call gives: this kernel gives one matrix, without a name."""
        return ()

    @property
    def passes_over_rows(self) -> bool:
        """Whether a tile takes time for each row and column beside that for its entries: not for this kernel."""
        return False

    @property
    def is_slow(self) -> bool:
        """Whether time may bound the tiles of a matrix before memory does: not for this kernel."""
        return False

    def entry_size(self, row_shape: tuple[int, ...]) -> int:
        """Rows of a matrix for one row of data: 1."""
        return 1


def is_kernel(thing: Any) -> bool:
    """Whether `thing` is a kernel, this package's or a user's: an object, not a class, that computes and says what memory it takes.

    Feature maps do that, too, but of one set of rows; they are told apart by their components.
    """
    computes = not isinstance(thing, type) and callable(thing) and hasattr(thing, "workspace_bytes")
    return computes and not hasattr(thing, "n_components")


def require_kernel(thing: Any, where: str) -> Any:
    """`thing` itself where it is a kernel; InputError, which begins with `where` and says what to give in its place, otherwise."""
    if is_kernel(thing):
        return thing
    found, advice = repr(thing), "such as NTK(network) or RBF(0.1)"
    if isinstance(thing, type):
        found, advice = f"the class {thing.__name__}", "an object and not its class, such as NTK(network) or RBF(0.1)"
    elif isinstance(thing, Network):
        found, advice = "a Network", "NTK(network) or NNGP(network)"
    elif hasattr(thing, "n_components") and hasattr(thing, "workspace_bytes"):
        found = f"the feature map {type(thing).__name__}"
        advice = "such as the map's `target`, or fit ridge on its features with RidgeClassifier or RidgeRegressor"
    elif hasattr(thing, "get_params"):
        found = f"a {type(thing).__name__}"
    raise InputError(f"{where}: kernel is {found}; give one of ntkdask.kernels, {advice}.")


def completed(kernel: Any) -> Kernel:
    """The kernel as planning wants it: itself, or, where a user's own kernel lacks members of `Kernel`, the kernel with defaults.

    What is returned plans and computes; fingerprints, models and tasks keep the kernel itself.
    """
    return kernel if isinstance(kernel, Kernel) else _Completed(kernel)


def parts_of(kernel: Any) -> tuple[str, ...]:
    """Names of the matrices where one call gives a tuple of several; empty where it gives one matrix."""
    names = completed(kernel).parts
    return names if len(names) > 1 else ()


@dataclass(frozen=True, eq=False)
class _Completed:
    """A user's kernel with the members that it lacks."""

    kernel: Any

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        return self.kernel(x) if y is None else self.kernel(x, y)

    def diagonal(self, x: Array) -> Array:
        return self.kernel.diagonal(x)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        return self.kernel.workspace_bytes(n, m, itemsize, row_shape)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(getattr(self.kernel, "parts", ()))

    @property
    def is_slow(self) -> bool:
        """As it says; else whether its network takes images, or the kernel within it is slow."""
        if hasattr(self.kernel, "is_slow"):
            return bool(self.kernel.is_slow)
        network, within = getattr(self.kernel, "network", None), getattr(self.kernel, "kernel", None)
        return bool(getattr(network, "takes_images", False)) or (within is not None and completed(within).is_slow)

    @property
    def passes_over_rows(self) -> bool:
        return bool(getattr(self.kernel, "passes_over_rows", False))

    def entry_size(self, row_shape: tuple[int, ...]) -> int:
        size = getattr(self.kernel, "entry_size", None)
        return 1 if size is None else int(size(tuple(row_shape)))


def flat_rows(x: Array, name: str = "x") -> Array:
    """`x` as a (rows, features) float matrix; InputError for no features, DtypeError for other dtypes."""
    x = flatten_rows(require_float(x, name))
    if not x.shape[1]:
        raise InputError(f"{name} has shape {x.shape}: rows without features. Give at least one feature a row.")
    return x


def flat_pair(x: Array, y: Array | None) -> tuple[Array, Array | None]:
    """Both inputs as (rows, features) of one float dtype; InputError for other widths or devices, DtypeError for no floats."""
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
    return same_dtype(x, y)


def set_diagonal(k: Array, diagonal: Array) -> Array:
    """The square matrix `k` with `diagonal` (n,) written onto its own, in place."""
    index = namespace(k).arange(k.shape[0])
    with np.errstate(over="ignore"):  # where a value exceeds the dtype, inf is the answer
        k[index, index] = diagonal
    return k
