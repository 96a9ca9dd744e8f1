"""Torch modules as state: how fingerprints describe a module, what of it travels, how a process builds it again.

A module is two things: its structure (classes, their plain attributes, names and shapes of parameters and buffers) and its
weights. The weights are arrays, stored once under the digest of their content. The structure travels as a skeleton: the module on
torch's meta device, which holds no numbers. Skeletons live in processes and are never written to a file. A process keeps both under
their digests, and a `StoredModule` holds these digests alone: small enough for every task.

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

from ntkdask.errors import DataError, InputError
from ntkdask.modules.optional import require_torch
from ntkdask.modules.state.structure import HOOKS, dotted, recorded_name, structure_of
from ntkdask.registry import describe_by, register

if TYPE_CHECKING:
    import torch

Arrays = Mapping[str, np.ndarray]


@register("module")
@dataclass(frozen=True)
class StoredModule:
    """A torch module by the digests of its structure and of its weights; equal digests are equal modules.

    `build` needs a process that has both: `remember` gives them to this process, `workflows.ship` to workers.

    Parameters
    ----------
    class_name : str
        Dotted name of the module's class.
    structure : str
        16 hex digits of SHA-256.
    weights : str
        16 hex digits of SHA-256.
    """

    class_name: str
    structure: str
    weights: str

    def build(self) -> torch.nn.Module:
        """The module, on the host; a new one each time (`modules.build` keeps one).

        InputError where a digest is not known here, DataError where other weights lie where those of the digest were.
        """
        require_torch(self.class_name)
        skeleton, source = _modules.get(self)
        module = filled(skeleton, source())
        if _weights_digest(module) != self.weights:
            raise DataError(
                f"the weights that are stored for {self.class_name} are not those of digest {self.weights}. Fit or compute again what "
                "they belong to, at another url."
            )
        return module


class _KnownModules:
    """The skeletons of this process, and the functions that read weights, by digest."""

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
            self._sources[weights] = source

    def get(self, stored: StoredModule) -> tuple[Any, Callable[[], Arrays]]:
        with self._lock:
            skeleton, source = self._skeletons.get(stored.structure), self._sources.get(stored.weights)
        if skeleton is None or source is None:
            missing = f"structure {stored.structure}" if skeleton is None else f"weights {stored.weights}"
            raise InputError(
                f"the torch module {stored.class_name} ({missing}) is not known to this process: it was given as an object, and no "
                "code is ever stored. Make the module again and call ntkdask.modules.remember(module) first, or use a registered "
                "description (ResNet18, WideResNet, FiniteNetwork), which needs neither."
            )
        return skeleton, source


_modules = _KnownModules()


def is_module(value: Any) -> bool:
    """Whether `value` is a torch module; does not import torch."""
    return any(f"{c.__module__}.{c.__qualname__}" == _BASE for c in type(value).__mro__)


_BASE = "torch.nn.modules.module.Module"


def described(module: Any) -> StoredModule:
    """The address of a module, which fingerprints hold; the module itself is neither kept nor changed."""
    module = unwrapped(module)
    structure = hashlib.sha256(json.dumps(structure_of(module, _numbers), sort_keys=True).encode()).hexdigest()[:16]
    return StoredModule(recorded_name(type(module)), structure, _weights_digest(module))


def remember(module: Any) -> StoredModule:
    """Let this process know a module, so that models and kernels that were stored with it can be used again.

    Parameters
    ----------
    module : torch.nn.Module
        The module, with equal classes, attributes and weights as when it was stored. Its structure and a copy of its weights are
        kept in the process, not the module.

    Returns
    -------
    StoredModule
        Its address.

    Raises
    ------
    InputError
        For a module that cannot travel: with forward hooks, ScriptModules, or what torch cannot copy.
    """
    stored, arrays = described(module), weights_of(module)
    _modules.add(stored, skeleton_of(module), lambda: arrays)
    return stored


def register_module(stored: StoredModule, skeleton: Any, source: Callable[[], Arrays] | None) -> None:
    """Let this process know a skeleton, and the function that reads the weights, as `weights_of` gives them."""
    _modules.add(stored, skeleton, source)


def register_weights(weights: str, source: Callable[[], Arrays]) -> None:
    """Let this process know the function that reads the weights of a digest, in the place of one that it knows."""
    _modules.add_source(weights, source)


def lookup(stored: StoredModule) -> tuple[Any, Callable[[], Arrays]]:
    """(skeleton, function that reads the weights) of an address; InputError where this process does not know them."""
    return _modules.get(stored)


def unwrapped(module: Any) -> Any:
    """A module without the wrappers of torch.compile and of data parallelism, which do not change what it computes."""
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

    InputError for what cannot travel: forward hooks, which change what a module computes and are not part of it; ScriptModules; a
    module that torch cannot copy.
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
    """A module of the skeleton's structure with the numbers that `weights_of` gave, in its own memory on the host."""
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
    """{name of a dtype: the numbers of all parameters and buffers of that dtype, flat, in the module's order}.

    Shared tensors count once. Numbers of dtypes that NumPy lacks (bfloat16) are given as bytes.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for _, t in _tensors(unwrapped(module)):
        parts.setdefault(str(t.dtype).removeprefix("torch."), []).append(_numbers(t))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def class_names(module: Any) -> list[str]:
    """Dotted names of the classes of a module and its parts, sorted; a process that builds it must be able to import them."""
    return sorted({dotted(type(part)) for part in module.modules()})


def missing_classes(names: Sequence[str]) -> list[str]:
    """Those of the dotted names that cannot be imported in this process; ["torch"] where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return ["torch"]
    return [name for name in names if not _is_importable(name)]


def _is_importable(dotted: str) -> bool:
    """Whether a dotted name can be imported."""
    pieces = dotted.split(".")
    if "<locals>" in dotted:
        return False
    for cut in range(len(pieces) - 1, 0, -1):
        try:
            member: Any = importlib.import_module(".".join(pieces[:cut]))
        except Exception:  # a module that is not there, or that does not load
            continue
        for name in pieces[cut:]:
            member = getattr(member, name, None)
        return member is not None
    return False


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every parameter, then every buffer, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _numbers(t: Any) -> np.ndarray:
    """The numbers of a tensor, flat, on the host; its bytes where NumPy lacks the dtype."""
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
    """Items of the array that stand for one number of a tensor: its bytes where NumPy lacks the dtype, else 1."""
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
    """A deep copy of the module in which the objects of `memo`, by id, stand for the originals."""
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever a user's class does in its copy
        raise InputError(
            f"{dotted(type(module))} cannot be copied, which sending it to workers needs: {type(error).__name__}: {error}"
        ) from error


def _weights_digest(module: Any) -> str:
    """16 hex digits of SHA-256 over names, dtypes, shapes and numbers of all tensors."""
    hasher = hashlib.sha256()
    for name, t in _tensors(module):
        hasher.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        hasher.update(_numbers(t).view(np.uint8).data)
    return hasher.hexdigest()[:16]


def _config(module: Any) -> dict[str, Any]:
    """The configuration of a module for fingerprints: that of its address."""
    stored = described(module)
    return {
        "type": "StoredModule",
        "class_name": stored.class_name,
        "structure": stored.structure,
        "weights": stored.weights,
    }


describe_by(_BASE, _config)
