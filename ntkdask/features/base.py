"""What a feature map is: a function of rows whose inner products approximate a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

from ntkdask.arrays import Array
from ntkdask.errors import InputError, nearest
from ntkdask.kernels.base import Kernel, is_kernel
from ntkdask.networks import Network

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

    @property
    def takes_sparse(self) -> bool:
        """Whether rows may be a SciPy sparse matrix."""
        return False

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


def is_map(thing: Any) -> bool:
    """Whether `thing` is a feature map, this package's or a user's: an object, not a class, that computes so many components."""
    return not isinstance(thing, type) and callable(thing) and hasattr(thing, "n_components")


def takes_sparse(feature_map: Any) -> bool:
    """Whether a map, this package's or a user's, takes SciPy sparse rows; None does not."""
    return bool(getattr(feature_map, "takes_sparse", False))


def require_map(thing: Any, where: str) -> Any:
    """`thing` itself where it is a feature map; InputError, which begins with `where` and says what to give, otherwise.

    `where` names the argument, too: "RidgeClassifier: features".
    """
    if is_map(thing):
        return thing
    found, advice = repr(thing), "such as NTKRandomFeatures(network, n_components=4096)"
    if isinstance(thing, type):
        found = f"the class {thing.__name__}"
        advice = "an object and not its class, such as NTKRandomFeatures(network, n_components=4096)"
    elif is_kernel(thing):
        found = f"the kernel {type(thing).__name__}"
        advice = (
            "such as NTKRandomFeatures(network, n_components=4096), or Nystrom(kernel, n_components=1024) for any kernel; the kernel "
            "itself goes to KernelRidgeClassifier, KernelRidgeRegressor and kernel_matrix"
        )
    elif isinstance(thing, Network):
        found = "a Network"
    elif hasattr(thing, "fit_transform"):
        found = f"the scikit-learn transformer {type(thing).__name__}"
        advice = (
            "such as the `map` of a FeatureTransformer, or put the transformer before the estimator: "
            "make_pipeline(transformer, estimator)"
        )
    raise InputError(f"{where} is {found}; give one of ntkdask.features, {advice}.")


def require_components(n_components: Any, name: str = "n_components", least: int = 1) -> int:
    """`n_components` as an int; InputError unless it is an integer >= `least`."""
    if isinstance(n_components, bool) or not hasattr(n_components, "__index__") or n_components.__index__() < least:
        raise InputError(f"{name} is {n_components!r}, expected an integer >= {least}.")
    return int(n_components.__index__())


def row_blocks(n: int, rows: int) -> list[slice]:
    """The range [0, n) cut into slices of `rows`; the last slice may be shorter."""
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
