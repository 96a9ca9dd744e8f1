"""The most bytes of tensors that a piece of code holds at once, on any device, for plans and for tests of plans.

Counts the storages that PyTorch's operators make, until they are released. What a library allocates within one operator (workspaces of
cuDNN and oneDNN) is not seen. Small operators take several times as long: meant for one dry run of two rows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """A context in which `peak` is the most bytes that new tensors held at once so far, and `held` what they hold now.

    Tensors made before it, and views of them, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of the operator; its new storages are counted."""
        kwargs = kwargs or {}
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._alive:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def release() -> None:
            self._alive.pop(key, None)
            self.held -= size

        self._alive[key] = weakref.finalize(storage, release)
        self._alive[key].atexit = False
        self.held += size
        self.peak = max(self.peak, self.held)
