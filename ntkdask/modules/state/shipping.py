"""Torch modules as state: what a module is (for fingerprints), what travels of it, how a process builds it again.

A module is two things: its structure (classes, their plain attributes, names and shapes of parameters and buffers) and its
weights. The weights are arrays, stored once under the digest of their content. The structure is a skeleton, the module on torch's
meta device, which holds no numbers; it lives in processes and travels between them, and is never written to a file. Both are
known to a process by their digests, and a `StoredModule` is these digests alone: small enough for every task.

Called by `workflows/ship.py`, which stores the arrays and brings skeletons to the workers, and by the registry.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkdask.errors import InputError
from ntkdask.modules.optional import require_torch
from ntkdask.modules.state.structure import HOOKS, dotted, recorded_name, structure_of
from ntkdask.registry import describe_by, register

if TYPE_CHECKING:
    import torch

Arrays = Mapping[str, np.ndarray]


@register("module")
@dataclass(frozen=True)
class StoredModule:
    """A torch module by the digests of its structure and of its weights; `build` needs a process that knows both.

    class_name: of the module, dotted. structure, weights: 16 hex digits of SHA-256 each. Equal digests are equal modules. A process
    knows what it was told by `remember`, and a worker what `workflows.ship` brought it.
    """

    class_name: str
    structure: str
    weights: str

    def build(self) -> torch.nn.Module:
        """The module, on the host; a new one each time (`modules.build` keeps one). InputError where a digest is unknown here."""
        require_torch(self.class_name)
        skeleton, source = _known.get(self)
        return filled(skeleton, source())


class _Known:
    """Skeletons and sources of weights that this process was told of, by digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._skeletons: dict[str, Any] = {}
        self._sources: dict[str, Callable[[], Arrays]] = {}

    def add(self, stored: StoredModule, skeleton: Any, source: Callable[[], Arrays] | None) -> None:
        with self._lock:
            self._skeletons.setdefault(stored.structure, skeleton)
            if source is not None:
                self._sources[stored.weights] = source

    def add_source(self, weights: str, source: Callable[[], Arrays]) -> None:
        with self._lock:
            self._sources.setdefault(weights, source)

    def get(self, stored: StoredModule) -> tuple[Any, Callable[[], Arrays]]:
        with self._lock:
            skeleton, source = self._skeletons.get(stored.structure), self._sources.get(stored.weights)
        if skeleton is None or source is None:
            what = f"structure {stored.structure}" if skeleton is None else f"weights {stored.weights}"
            raise InputError(
                f"the torch module {stored.class_name} ({what}) is not known to this process: it was given as an object, and no code "
                "is ever stored. Make the module again and call ntkdask.modules.remember(module) first, or use a registered "
                "description (ResNet18, WideResNet, FiniteNetwork), which needs neither."
            )
        return skeleton, source


_known = _Known()


def is_module(value: Any) -> bool:
    """Whether value is a torch module; does not import torch."""
    return any(f"{c.__module__}.{c.__qualname__}" == _BASE for c in type(value).__mro__)


_BASE = "torch.nn.modules.module.Module"


def described(module: Any) -> StoredModule:
    """The address of a module: what fingerprints keep of it. The module itself is not kept and not changed."""
    module = unwrapped(module)
    structure = hashlib.sha256(json.dumps(structure_of(module, _numbers), sort_keys=True).encode()).hexdigest()[:16]
    return StoredModule(recorded_name(type(module)), structure, _weights_digest(module))


def remember(module: Any) -> StoredModule:
    """Tell this process of a module, so that what was stored with it (models, kernels by address) can be used again.

    Returns its address. The process keeps the structure and a copy of the weights, not the module.
    """
    stored, arrays = described(module), weights_of(module)
    _known.add(stored, skeleton_of(module), lambda: arrays)
    return stored


def know(stored: StoredModule, skeleton: Any, source: Callable[[], Arrays] | None) -> None:
    """Tell this process of a skeleton and of where weights are read from, as `weights_of` gave them."""
    _known.add(stored, skeleton, source)


def know_weights(weights: str, source: Callable[[], Arrays]) -> None:
    """Tell this process where the weights of a digest are read from, if it does not know."""
    _known.add_source(weights, source)


def known(stored: StoredModule) -> tuple[Any, Callable[[], Arrays]]:
    """(skeleton, source of the weights) of an address; InputError where this process does not know them."""
    return _known.get(stored)


def unwrapped(module: Any) -> Any:
    """A module without what torch.compile and data parallelism put around it: neither changes what it computes."""
    import torch

    while True:
        if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def skeleton_of(module: Any) -> Any:
    """A copy of the module on the meta device: structure without numbers, gradients or hooks; the module is not touched.

    Raises InputError for what cannot travel: forward hooks, which change what a module computes and are not part of it;
    ScriptModules; a module that torch cannot copy.
    """
    import torch

    module = unwrapped(module)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(
                f"{dotted(type(module))}: {name or 'the module itself'} is a ScriptModule, which does not travel. Give the module "
                "that it was scripted or traced from."
            )
        if any(getattr(part, hooks, None) for hooks in HOOKS):
            raise InputError(
                f"{dotted(type(module))}: {name or 'the module itself'} has forward hooks, which do not travel to other processes. "
                "Remove them, or give no client."
            )
    memo: dict[int, Any] = {}
    for _, p in module.named_parameters():
        memo[id(p)] = torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for _, b in module.named_buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for part in module.modules():
        for name, hooks in vars(part).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                memo[id(hooks)] = OrderedDict()
    return _copied(module, memo)


def filled(skeleton: Any, arrays: Arrays) -> Any:
    """A module of the skeleton's structure with the numbers of `weights_of`, in its own memory on the host."""
    import torch

    position = dict.fromkeys(arrays, 0)
    memo: dict[int, Any] = {}
    for _, t in _tensors(skeleton):
        name = str(t.dtype).removeprefix("torch.")
        held = torch.tensor(arrays[name][position[name] : position[name] + t.numel() * _items(t)])
        position[name] += t.numel() * _items(t)
        value = held.view(t.dtype).reshape(t.shape)
        if isinstance(t, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=t.requires_grad)
        memo[id(t)] = value
    return _copied(skeleton, memo)


def weights_of(module: Any) -> dict[str, np.ndarray]:
    """Parameters and buffers as one flat array per dtype, by its name, in the order of their names' first appearance.

    Shared ones count once. dtypes that NumPy lacks (bfloat16) are their bytes.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for _, t in _tensors(unwrapped(module)):
        parts.setdefault(str(t.dtype).removeprefix("torch."), []).append(_numbers(t))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def class_names(module: Any) -> list[str]:
    """Dotted names of the classes that a module is made of, sorted: what must be importable where it travels."""
    return sorted({dotted(type(part)) for part in module.modules()})


def missing_classes(names: Sequence[str]) -> list[str]:
    """Those of the dotted names that cannot be imported in this process; torch itself where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return ["torch"]
    return [name for name in names if not _is_importable(name)]


def _is_importable(dotted: str) -> bool:
    pieces = dotted.split(".")
    if "<locals>" in dotted:
        return False
    for cut in range(len(pieces) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(pieces[:cut]))
        except Exception:  # a module that is not there, or that does not load
            continue
        for name in pieces[cut:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every parameter, then every buffer, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _numbers(t: Any) -> np.ndarray:
    """A tensor's numbers, flat, on the host; the bytes where NumPy has no such dtype."""
    import torch

    if t.is_meta:
        raise InputError(
            "a module holds a tensor on the meta device, which has no numbers. Build it on a device, or load its weights first."
        )
    if t.layout != torch.strided or t.is_quantized:
        raise InputError(
            f"a module holds a tensor of layout {t.layout}; only dense parameters and buffers can be stored."
        )
    flat = t.detach().cpu().contiguous().reshape(-1).resolve_conj()
    return np.asarray(flat.view(torch.uint8) if _items(t) > 1 else flat)


def _items(t: Any) -> int:
    """Stored items of one element of a tensor: its bytes where NumPy lacks the dtype, else 1."""
    try:
        _empty_like(t.dtype).numpy()
    except TypeError:
        return t.element_size()
    return 1


@functools.cache
def _empty_like(dtype: Any) -> Any:
    import torch

    return torch.empty(0, dtype=dtype)


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever a user's class does in its copy
        raise InputError(
            f"{dotted(type(module))} cannot be copied, which sending it to workers needs: {type(error).__name__}: {error}"
        ) from error


def _weights_digest(module: Any) -> str:
    hasher = hashlib.sha256()
    for name, t in _tensors(module):
        hasher.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        hasher.update(_numbers(t).view(np.uint8).data)
    return hasher.hexdigest()[:16]


def _config(module: Any) -> dict[str, Any]:
    stored = described(module)
    return {
        "type": "StoredModule",
        "class_name": stored.class_name,
        "structure": stored.structure,
        "weights": stored.weights,
    }


describe_by(_BASE, _config)
