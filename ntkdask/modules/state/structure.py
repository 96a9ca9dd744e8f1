"""The structure of a torch module as a table: classes, plain attributes, names, shapes, ties. Equal modules have equal tables.

Classes and functions that can be imported stand in it by name; which code a name stands for is a question of versions, as
everywhere in fingerprints. A name does not identify lambdas, what is defined within a function, and what is defined in `__main__`
(the cells of a notebook): there the table holds the code, with its defaults and what it refers to. Code is Python's bytecode, so
that another version of Python may give another table. Tensors other than parameters and buffers are digests. Called by `shipping`.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import logging
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
DEPTH = 8
"""Levels of attributes in attributes; deeper ones are recorded as their class."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Hooks that can change what a module computes."""


def dotted(cls: type) -> str:
    """The name under which a class is imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def recorded_name(cls: type) -> str:
    """The name of a class in fingerprints: its own `recorded_as`, else the name under which it is imported.

    Layers of this package state `recorded_as`, so that moving a file changes no fingerprint.
    """
    own = vars(cls).get("recorded_as")
    return own if isinstance(own, str) else dotted(cls)


def short_digest(flat: np.ndarray) -> str:
    """16 hex digits of SHA-256 of an array's bytes."""
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()[:16]


def structure_of(module: Any, numbers: Callable[[Any], np.ndarray]) -> list[Any]:
    """All of a module but the numbers of its parameters and buffers, for JSON; numbers(t) gives those of any other tensor, flat."""
    import torch

    own = set(vars(torch.nn.Module()))
    tensors = (*module.named_parameters(), *module.named_buffers())
    plain = _Plain({id(held): name for name, held in (*module.named_modules(), *tensors)}, numbers)
    first: dict[int, str] = {}
    lines: list[Any] = []
    for name, part in module.named_modules(remove_duplicate=False):
        if id(part) in first:
            lines.append([name, "is", first[id(part)]])
            continue
        first[id(part)] = name
        attributes = {key: plain.of(value) for key, value in sorted(vars(part).items()) if key not in own}
        hooks = [
            [kind, [plain.of(h) for h in getattr(part, kind).values()]] for kind in HOOKS if getattr(part, kind, None)
        ]
        kind = plain.of(type(part))
        lines.append([name, kind, _without_address(part.extra_repr()), bool(part.training), attributes, hooks])
    for get in (module.named_parameters, module.named_buffers):
        for name, t in get(remove_duplicate=False):
            same = first.setdefault(id(t), name)
            lines.append([name, "is", same] if same != name else [name, str(t.dtype), list(t.shape), t.requires_grad])
    return lines


class _Plain:
    """Attributes as JSON: numbers and texts themselves, tensors and arrays by digest, objects by class and attributes.

    named: {id: name} of the module's parts, parameters and buffers, which attributes may hold too.
    """

    def __init__(self, named: Mapping[int, str], numbers: Callable[[Any], np.ndarray]) -> None:
        self._named, self._numbers = named, numbers
        self._open: set[int] = set()

    def of(self, value: Any, depth: int = DEPTH) -> Any:
        """The value in the table."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (types.ModuleType, logging.Logger)):
            return _name(value)
        if id(value) in self._named:
            return ["is", self._named[id(value)]]
        if hasattr(value, "detach") and hasattr(value, "layout"):
            return ["tensor", str(value.dtype), list(value.shape), short_digest(self._numbers(value))]
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return ["array", value.dtype.str, list(value.shape), short_digest(np.ascontiguousarray(value).reshape(-1))]
        if id(value) in self._open or not depth:
            return _name(value)
        self._open.add(id(value))
        try:
            return self._compound(value, depth - 1)
        finally:
            self._open.remove(id(value))

    def _compound(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return {str(k): self.of(v, depth) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(v, depth) for v in value]
        if isinstance(value, (set, frozenset)):
            return ["set", sorted(json.dumps(self.of(v, depth), sort_keys=True) for v in value)]
        if isinstance(value, functools.partial):
            return ["partial", *(self.of(v, depth) for v in (value.func, value.args, value.keywords))]
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__, depth), self.of(value.__self__, depth)]
        if isinstance(value, (types.FunctionType, type)) and not _is_importable_name(value):
            return [_name(value), self._code_of(value, depth)]
        if isinstance(value, type) or hasattr(value, "__qualname__"):
            return _name(value)
        if hasattr(value, "__dict__") and not type(value).__module__.startswith(
            "torch.fx."
        ):  # GraphModule has its code as text
            return [_name(value), self.of(vars(value), depth)]
        return [_name(value), _without_address(repr(value))]

    def _code_of(self, value: Any, depth: int) -> Any:
        """The code of a function, or of a class's functions and of those of its bases, and what it refers to."""
        if isinstance(value, type):
            held = {name: _function(member) for name, member in vars(value).items()}
            functions = {name: self.of(member, depth) for name, member in held.items() if member is not None}
            return [functions, [self.of(base, depth) for base in value.__bases__]]
        named = {i.argval for i in dis.get_instructions(value) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        globals_ = {name: self.of(value.__globals__[name], depth) for name in named if name in value.__globals__}
        cells = [self.of(_content(cell), depth) for cell in value.__closure__ or ()]
        return [
            _bytecode(value.__code__),
            *(self.of(v, depth) for v in (value.__defaults__, value.__kwdefaults__)),
            globals_,
            cells,
        ]


def _name(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type):
        return recorded_name(value)
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return recorded_name(type(value))


def _is_importable_name(value: Any) -> bool:
    """Whether a function's or class's name says which it is."""
    return value.__module__ != "__main__" and "<" not in value.__qualname__


def _function(member: Any) -> Any:
    """The function behind a member of a class; None for a member that is none."""
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return member if isinstance(member, types.FunctionType) else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _bytecode(code: types.CodeType) -> list[Any]:
    """Code without file names and line numbers."""
    constants = [
        _bytecode(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [hashlib.sha256(code.co_code).hexdigest()[:16], list(code.co_names), list(code.co_varnames), constants]


def _without_address(text: str) -> str:
    return _ADDRESS.sub("", text)
