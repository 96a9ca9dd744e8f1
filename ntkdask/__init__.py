"""ntkdask: neural tangent kernels at any scale, out of core, on CPUs and GPUs.

Importing this starts nothing and loads nothing: each public name is imported when it is first used, so that a script which
needs a kernel does not pay for Zarr, Dask and (through Zarr, where it is installed) CuPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkdask import activations, features, kernels
    from ntkdask.cluster import connect
    from ntkdask.datasets import import_dataset, open_dataset, write_dataset
    from ntkdask.estimators import FeatureTransformer, RidgeClassifier, RidgeRegressor
    from ntkdask.networks import Activation, Dense, Network, fully_connected
    from ntkdask.tiles import Plan
    from ntkdask.workflows.featurize import featurize

__version__ = "0.1.0"

_HOMES = {
    "networks": ("Activation", "Dense", "Network", "fully_connected"),
    "tiles": ("Plan",),
    "datasets": ("import_dataset", "open_dataset", "write_dataset"),
    "cluster": ("connect",),
    "workflows.featurize": ("featurize",),
    "estimators": ("FeatureTransformer", "RidgeClassifier", "RidgeRegressor"),
}
_MODULES = ("activations", "features", "kernels")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Activation",
    "Dense",
    "FeatureTransformer",
    "Network",
    "Plan",
    "RidgeClassifier",
    "RidgeRegressor",
    "activations",
    "connect",
    "features",
    "featurize",
    "fully_connected",
    "import_dataset",
    "kernels",
    "open_dataset",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ntkdask.{name}")
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"ntkdask.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'ntkdask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
