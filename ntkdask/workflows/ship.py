"""Torch modules on their way to stores and workers: weights become a state, the structure goes to each worker once.

    weights  → folder/<digest>, a state that each process reads through its byte-bounded cache
    skeleton → a message of Dask to every worker, present and future; never a file
    module   → its `StoredModule`, in the kernel or the feature map: tasks, fingerprints and saved models hold that

Objects without modules, and networks by description, pass unchanged. Called by kernel_matrix, featurize, the estimators and models.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle

from ntkdask.errors import ClusterError, InputError
from ntkdask.features.fitting import FittedMap
from ntkdask.files import local_path
from ntkdask.modules.state import shipping
from ntkdask.modules.state.shipping import StoredModule
from ntkdask.states import load_state, save_state
from ntkdask.workflows.stream import store_map

T = TypeVar("T")


@dataclass(frozen=True)
class _StateArrays:
    """Reads the weights of a module from their state when it is called."""

    url: str

    def __call__(self) -> dict[str, Any]:
        return load_state(self.url, keep=False)[0]


def shipped(thing: T, folder: Path | str, client: Any = None) -> T:
    """`thing` (a kernel, a feature map, None) with a `StoredModule` in the place of every torch module in it, at any depth.

    The weights are stored under `folder`, once; the skeletons are told to this process and the client's workers. Raises InputError,
    naming the classes, when a worker cannot import those of a module, before anything is stored.
    """
    return _mapped(thing, lambda module: _stored(module, local_path(folder), client))


def located_map(feature_map: Any, folder: Path | str, client: Any) -> Any:
    """A feature map as tasks carry it: with a client its weights and what it learned are stored in `folder`."""
    if client is None:
        return feature_map
    small = shipped(feature_map, folder, client)
    return store_map(folder, small) if isinstance(small, FittedMap) else small


def module_states(thing: Any, root: Path | str) -> dict[str, str]:
    """{digest of weights: path of their state, relative to root} of every `StoredModule` in `thing`; a saved model keeps it."""
    states = {}
    for stored in _parts(thing, lambda value: isinstance(value, StoredModule)):
        _, source = shipping.lookup(stored)
        if isinstance(source, _StateArrays):
            states[stored.weights] = os.path.relpath(source.url, root)
    return states


def know_states(states: Mapping[str, str], root: Path | str) -> None:
    """Tell this process where the weights of modules are stored, from the table that `module_states` gave."""
    for weights, path in states.items():
        shipping.register_weights(weights, _StateArrays(os.path.normpath(os.path.join(root, path))))


def restored(thing: T, original: Any) -> T:
    """`thing` with the torch modules of `original` in the place of their `StoredModule`, so that it outlives its folder."""
    modules = {shipping.described(m): m for m in _parts(original, _is_module)}
    return _mapped(thing, lambda part: modules.get(part, part) if isinstance(part, StoredModule) else part)


def _is_module(value: Any) -> bool:
    """Whether value is a torch module; torch is not imported for that."""
    return "torch" in sys.modules and shipping.is_module(value)


def _parts(thing: Any, is_wanted: Callable[[Any], bool]) -> Iterator[Any]:
    """Everything in a dataclass, at any depth, for which is_wanted is true."""
    if is_wanted(thing):
        yield thing
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            yield from _parts(getattr(thing, field.name), is_wanted)


def _mapped(thing: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass with change(module) for every module and `StoredModule` in it, at any depth; itself where nothing changes."""
    if isinstance(thing, StoredModule) or _is_module(thing):
        return change(thing)
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    changes = {}
    for field in dataclasses.fields(thing):
        if field.init:
            value = getattr(thing, field.name)
            changed = _mapped(value, change)
            if changed is not value:
                changes[field.name] = changed
    return dataclasses.replace(thing, **changes) if changes else thing


def _stored(module: Any, folder: Path, client: Any) -> StoredModule:
    """The `StoredModule` of a module, its weights in `folder`, or where they were stored before."""
    if isinstance(module, StoredModule):
        stored, (skeleton, source) = module, shipping.lookup(module)
    else:
        stored, skeleton = shipping.described(module), shipping.skeleton_of(module)
        source = partial(shipping.weights_of, module)
    if client is not None:
        _require_importable(client, stored, skeleton)
    # in the folder itself, whatever other folder has them: that one may be moved or deleted
    if not (isinstance(source, _StateArrays) and Path(source.url).parent == folder and os.path.exists(source.url)):
        source = _StateArrays(save_state(folder, source(), {"torch_module": stored.class_name}))
    shipping.register_module(stored, skeleton, source)
    if client is not None:
        from ntkdask.execution.worker_setup import set_up_workers

        name = f"ntkdask-module-{stored.structure}-{stored.weights}"
        set_up_workers(client, partial(shipping.register_module, stored, skeleton, source), name)
    # the same object where nothing changed: the caller's kernel stays itself
    return module if isinstance(module, StoredModule) else stored


def _require_importable(client: Any, stored: StoredModule, skeleton: Any) -> None:
    """InputError, naming them, for classes of a module that a worker cannot import, or that cannot be sent."""
    from ntkdask.execution.workers import ask

    names = shipping.class_names(skeleton)
    answers = ask(client, partial(shipping.missing_classes, names))
    for worker, missing in sorted(answers.items()):
        if isinstance(missing, BaseException):
            raise ClusterError(f"worker {worker} could not look for the module's classes: {missing}") from missing
        if missing:
            raise InputError(
                f"the torch module {stored.class_name} cannot be sent to the workers: {worker} cannot import {', '.join(missing)}. "
                "Put the class into a module that is installed on the workers (or on their PYTHONPATH), or use torch.nn's own classes "
                "or a registered description (ResNet18, WideResNet, FiniteNetwork); without a client it runs here."
            )
    try:
        cloudpickle.dumps(skeleton)
    except Exception as error:  # whatever a user's class does when it is pickled
        raise InputError(
            f"the torch module {stored.class_name} cannot be sent to the workers: {type(error).__name__}: {error}"
        ) from error
