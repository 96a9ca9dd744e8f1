"""The module that a kernel or feature map was given: a torch.nn.Module, or a description of one, which is built once in a process."""

from __future__ import annotations

from typing import Any

from torch import nn

from ntkdask.cache import shared
from ntkdask.errors import InputError


class _Built:
    """A module with its bytes, as the cache of the process asks for them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.nbytes = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def build(source: Any, caller: str = "build") -> nn.Module:
    """`source` itself where it is a module; for a description (a frozen dataclass) the module that `source.build()` gives, cached.

    A built module is shared: never write to it. InputError, in the name of the `caller`, for anything else.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, type) or not callable(getattr(source, "build", None)):
        raise InputError(
            f"{caller}: module is {source!r}; give a torch.nn.Module, or a description of one such as ResNet18()."
        )
    return shared.get(("module", source), lambda: _Built(source.build())).module
