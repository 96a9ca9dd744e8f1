"""What a feature map is: a function of rows whose inner products approximate a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

from ntkdask.arrays import Array
from ntkdask.errors import InputError, nearest
from ntkdask.kernels.base import Kernel

M = TypeVar("M", bound="FeatureMapBase")


@runtime_checkable
class FeatureMap(Protocol):
    """A map φ with ⟨φ(x), φ(y)⟩ ≈ target(x, y).

    Maps are frozen dataclasses. Their features follow from their arguments, the seed among them, and do not depend on tiling or
    device.
    """

    @property
    def n_components(self) -> int:
        """The number of features of a row."""

    @property
    def target(self) -> Kernel:
        """The kernel that the map approximates."""

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call on n rows beyond its input: result, temporaries and, when the shape of a row is given, weights."""


class FeatureMapBase:
    """What every map shares: parameters as scikit-learn handles them, and a `fit` that does nothing for data-independent maps."""

    def fit(self: M, x: Array, targets: Array | None = None) -> M:
        """Return this map unchanged: it does not depend on data."""
        return self

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor arguments by name; `deep` is scikit-learn's and changes nothing, since no argument is an estimator."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    def __sklearn_clone__(self: M) -> M:
        # frozen: scikit-learn's clone, of an estimator or of a grid of maps, shares it
        return self

    def replace(self: M, **changes: Any) -> M:
        """A copy with some arguments changed; InputError for an unknown argument, with the nearest known name."""
        parameters = self.get_params()
        for name in changes:
            if name not in parameters:
                raise InputError(f"{type(self).__name__} has no parameter {name!r}{nearest(name, parameters)}")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def require_components(n_components: Any, name: str = "n_components", least: int = 1) -> int:
    """`n_components` as an int; InputError unless it is an integer >= `least`."""
    if isinstance(n_components, bool) or not hasattr(n_components, "__index__") or n_components.__index__() < least:
        raise InputError(f"{name} is {n_components!r}, expected an integer >= {least}.")
    return int(n_components.__index__())


def row_blocks(n: int, rows: int) -> list[slice]:
    """The range [0, n) cut into slices of `rows`; the last slice may be shorter."""
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
