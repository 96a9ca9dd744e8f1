"""PyTorch networks and what is computed with them: the only package that imports torch, and not before something of it is used.

`descriptions` (networks by name, for job files) needs no torch until a network is built; every other module does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkdask.lazy import lazy_names
from ntkdask.modules.optional import require_torch

if TYPE_CHECKING:
    from ntkdask.modules.descriptions import FiniteNetwork, ResNet18, WideResNet, convnet8, fcn3
    from ntkdask.modules.finite import finite_module
    from ntkdask.modules.protocol import TrainingProtocol
    from ntkdask.modules.state.shipping import remember
    from ntkdask.modules.state.weights import load_weights, save_weights

_HOMES = {
    "descriptions": ("FiniteNetwork", "ResNet18", "WideResNet", "convnet8", "fcn3"),
    "finite": ("finite_module",),
    "protocol": ("TrainingProtocol",),
    "state.shipping": ("remember",),
    "state.weights": ("load_weights", "save_weights"),
}
_OF_TORCH = ("finite", "state.weights")

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


def _require(name: str, home: str) -> None:
    if home in _OF_TORCH:
        require_torch(name)


__getattr__, __dir__ = lazy_names("ntkdask.modules", _HOMES, before=_require)
