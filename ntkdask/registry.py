"""One registry of named, frozen dataclasses: job files, fingerprints and saved models all speak it.

`to_config` turns an object into plain tables (`{"type": "Dense", "weight_variance": 1.0, ...}`, every default spelled
out), `from_config` builds it back and names the nearest known key when one is unknown. Nothing is executed or imported
on the way: only classes that registered themselves can be made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ntkdask.errors import InputError, JobError, nearest

T = TypeVar("T", bound=type)

_classes: dict[str, type] = {}
_kinds: dict[str, str] = {}
_describers: dict[str, Callable[[Any], Any]] = {}


def register(kind: str) -> Any:
    """Class decorator: make a dataclass known under its own name as a `kind` ("layer", "feature map", "kernel", ...)."""

    def add(cls: T) -> T:
        _classes[cls.__name__] = cls
        _kinds[cls.__name__] = kind
        return cls

    return add


def describe_by(base: str, describe: Callable[[Any], Any]) -> None:
    """Let `to_config` describe foreign objects, whose class descends from `base` ("package.module.Class"), by `describe(object)`.

    For classes of libraries that are not imported here, such as torch's modules: they are known by name alone.
    """
    _describers[base] = describe


def names(kind: str | None = None) -> list[str]:
    """Registered class names, all or of one kind, sorted."""
    return sorted(n for n, k in _kinds.items() if kind is None or k == kind)


def lookup(name: str, kind: str | None = None) -> type:
    """The class registered as `name`; JobError naming the nearest known one otherwise."""
    known = names(kind)
    if name not in known:
        raise JobError(f"unknown {kind or 'type'} {name!r}{nearest(name, known)}")
    return _classes[name]


def to_config(value: Any) -> Any:
    """`value` as JSON-ready tables, lists and scalars; registered dataclasses gain a `type` key.

    What holds arrays describes itself, by a digest: its `to_config` is called; foreign objects as `describe_by` said.
    """
    foreign = _describer(value)
    if foreign is not None:
        return foreign(value)
    if hasattr(value, "to_config") and not isinstance(value, type):
        return value.to_config()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        fields = {}
        for field in (f for f in dataclasses.fields(value) if f.init):
            held = getattr(value, field.name)
            if callable(held) and not dataclasses.is_dataclass(held) and _describer(held) is None:
                raise InputError(
                    f"{name} holds the function {held!r}, which a job file or a fingerprint cannot describe: code is never "
                    "stored or loaded. Use it in memory (no url), or a registered object in its place."
                )
            fields[field.name] = to_config(held)
        return {"type": name, **fields} if _classes.get(name) is type(value) else fields
    if isinstance(value, Mapping):
        return {str(k): to_config(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_config(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"cannot describe {type(value).__name__} {value!r} in a job file or a fingerprint")


def _describer(value: Any) -> Callable[[Any], Any] | None:
    if isinstance(value, type):
        return None
    found = (_describers.get(f"{c.__module__}.{c.__qualname__}") for c in type(value).__mro__) if _describers else ()
    return next((describe for describe in found if describe is not None), None)


def from_config(table: Any, kind: str | None = None, **given: Any) -> Any:
    """Build the object that `table` describes. `given`: arguments that come from elsewhere (a job's network).

    Raises JobError for an unknown type or key (naming the nearest) or missing arguments; values that the class refuses
    raise its own InputError.
    """
    if not isinstance(table, Mapping) or "type" not in table:
        raise JobError(f"expected a table with a `type` key for a {kind or 'object'}, found {table!r}")
    cls = lookup(str(table["type"]), kind)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    arguments = dict(given)
    for key, value in table.items():
        if key == "type":
            continue
        if key not in known:
            raise JobError(f"unknown key {key!r} for {cls.__name__}{nearest(key, known)}")
        arguments[key] = _build_nested(value)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise JobError(f"cannot build {cls.__name__}: {error}") from error


def _build_nested(value: Any) -> Any:
    if isinstance(value, Mapping) and "type" in value:
        return from_config(value)
    if isinstance(value, list):
        return tuple(_build_nested(v) for v in value)
    return value


def digest(value: Any) -> str:
    """Short content address of a configuration: 16 hex digits of SHA-256 of its canonical JSON."""
    text = json.dumps(to_config(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """Lines `key: stored A, asked B` for every leaf in which two configurations differ."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted(set(stored) | set(asked)):
            lines += differences(stored.get(key), asked.get(key), f"{prefix}{key}.")
        return lines
    return [] if stored == asked else [f"{prefix.rstrip('.')}: stored {stored!r}, asked {asked!r}"]
