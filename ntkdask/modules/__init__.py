"""PyTorch networks and what is computed with them: the only package that imports torch, and not before something of it is used.

`descriptions` (networks by name, for job files) needs no torch until a network is built; every other module does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ntkdask.modules.optional import require_torch

if TYPE_CHECKING:
    from ntkdask.modules.descriptions import FiniteNetwork, ResNet18, WideResNet, convnet8, fcn3
    from ntkdask.modules.finite import finite_module
    from ntkdask.modules.protocol import TrainingProtocol
    from ntkdask.modules.shipping import remember
    from ntkdask.modules.weights import load_weights, save_weights

_HOMES = {
    "descriptions": ("FiniteNetwork", "ResNet18", "WideResNet", "convnet8", "fcn3"),
    "finite": ("finite_module",),
    "protocol": ("TrainingProtocol",),
    "shipping": ("remember",),
    "weights": ("load_weights", "save_weights"),
}
_OF_TORCH = ("finite", "weights")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "FiniteNetwork",
    "ResNet18",
    "TrainingProtocol",
    "WideResNet",
    "convnet8",
    "fcn3",
    "finite_module",
    "load_weights",
    "remember",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        if _HOME_OF[name] in _OF_TORCH:
            require_torch(name)
        return getattr(importlib.import_module(f"ntkdask.modules.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'ntkdask.modules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
