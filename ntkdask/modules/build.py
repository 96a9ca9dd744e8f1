"""A module from what a kernel or map was given: a torch.nn.Module, or a description of one that is built once per process."""

from __future__ import annotations

from typing import Any

from torch import nn

from ntkdask.cache import shared
from ntkdask.errors import InputError


class _Built:
    """A module in the process's cache, which asks for its bytes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.nbytes = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def build(source: Any, caller: str = "build") -> nn.Module:
    """`source` itself when it is a module; what `source.build()` gives for a description (a frozen dataclass), from the cache.

    A built module is shared: never write to it. InputError for anything else.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, type) or not callable(getattr(source, "build", None)):
        raise InputError(
            f"{caller}: module is {source!r}; give a torch.nn.Module, or a description of one such as ResNet18()."
        )
    return shared.get(("module", source), lambda: _Built(source.build())).module
