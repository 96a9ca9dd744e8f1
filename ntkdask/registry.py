"""One registry of frozen dataclasses by name, for job files, fingerprints and saved models.

`to_config` turns an object into plain tables (`{"type": "Dense", "weight_variance": 1.0, ...}`, every default spelled
out). `from_config` builds the object from its table; its error for an unknown key names the nearest one. No code comes from a
table: only registered classes can be made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ntkdask.errors import InputError, JobError, nearest

T = TypeVar("T", bound=type)

LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a field that a class got after its first release: configurations and fingerprints leave it out at its default."""

_classes: dict[str, type] = {}
_kinds: dict[str, str] = {}
_describers: dict[str, Callable[[Any], Any]] = {}

_STATE_PATH = re.compile(r"/.*/state/([0-9a-f]{16})")


def register(kind: str) -> Callable[[T], T]:
    """Class decorator: register a dataclass under its own name as a `kind` ("layer", "feature map", "kernel", ...).

    InputError where a class of another kind or module has that name: descriptions know classes by their name alone.
    """

    def add(cls: T) -> T:
        before = _classes.get(cls.__name__)
        if before is not None and (before.__module__, _kinds[cls.__name__]) != (cls.__module__, kind):
            raise InputError(
                f"register: a {_kinds[cls.__name__]} of {before.__module__} is called {cls.__name__!r}; {cls.__module__} asks for "
                f"that name for a {kind}. Give the class another name."
            )
        _classes[cls.__name__] = cls
        _kinds[cls.__name__] = kind
        return cls

    return add


def describe_by(base: str, describe: Callable[[Any], Any]) -> None:
    """Let `to_config` describe an object whose class descends from `base` by `describe(object)`.

    `base` is the dotted name of a class ("package.module.Class") of a library that is not imported here, such as torch.
    """
    _describers[base] = describe


def names(kind: str | None = None) -> list[str]:
    """The names of the registered classes, sorted: of one kind, or of all."""
    return sorted(n for n, k in _kinds.items() if kind is None or k == kind)


def lookup(name: str, kind: str | None = None) -> type:
    """The class registered as `name`; JobError where there is none, which names the nearest."""
    registered = names(kind)
    if name not in registered:
        raise JobError(f"unknown {kind or 'type'} {name!r}{nearest(name, registered)}")
    return _classes[name]


def to_config(value: Any) -> Any:
    """`value` as tables, lists and scalars that JSON can write; the table of a registered dataclass has a `type` key.

    An object with a method `to_config` describes itself, as those do that hold arrays (by a digest). Objects of other libraries
    are described as `describe_by` was told. InputError for a function, TypeError for anything else.
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
            content = getattr(value, field.name)
            if field.metadata.get("later") and content == field.default:
                continue
            if callable(content) and not dataclasses.is_dataclass(content) and _describer(content) is None:
                raise InputError(
                    f"{name} holds the function {content!r}, which a job file or a fingerprint cannot describe: code is never "
                    "stored or loaded. Use it in memory (no url), or a registered object in its place."
                )
            fields[field.name] = to_config(content)
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
    """The function that `describe_by` was given for the object's class or one of its bases; None where there is none."""
    if isinstance(value, type):
        return None
    by_base = (_describers.get(f"{c.__module__}.{c.__qualname__}") for c in type(value).__mro__) if _describers else ()
    return next((describe for describe in by_base if describe is not None), None)


def from_config(table: Any, kind: str | None = None, **given: Any) -> Any:
    """The object that `table` describes.

    Parameters
    ----------
    table : mapping
        Its `type`, the name of a registered class, and arguments of that class; tables within it are built first.
    kind : str, optional
        What the class must be registered as; None: anything.
    **given
        Arguments that do not come from the table, such as a job's network.

    Raises
    ------
    JobError
        Where the type or a key is unknown (the message names the nearest), or an argument is missing.
    InputError
        Where the class refuses a value.
    """
    if not isinstance(table, Mapping) or "type" not in table:
        raise JobError(f"expected a table with a `type` key for a {kind or 'object'}, found {table!r}")
    cls = lookup(str(table["type"]), kind)
    kinds = {f.name: f.type for f in dataclasses.fields(cls) if f.init}
    arguments = dict(given)
    for key, value in table.items():
        if key == "type":
            continue
        if key not in kinds:
            raise JobError(f"unknown key {key!r} for {cls.__name__}{nearest(key, kinds)}")
        require_kind(f"{cls.__name__}.{key}", kinds[key], value)
        arguments[key] = _build_nested(value)
    try:
        return cls(**arguments)
    except (TypeError, OverflowError) as error:
        raise JobError(f"cannot build {cls.__name__}: {error}") from error


def require_kind(where: str, annotation: Any, value: Any) -> None:
    """JobError where a table has true, NaN or infinity for a number, or something else for true or false.

    `annotation` is that of the argument, as Python keeps it: "int | None". Arguments of other kinds are left to their classes.
    """
    kinds = set(re.findall(r"\w+", annotation if isinstance(annotation, str) else str(annotation))) - {"None", "tuple"}
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, bool) and kinds & {"int", "float"} and not kinds & {"bool", "Any"}:
            raise JobError(f"{where} is {str(one).lower()}, expected a number.")
        if kinds == {"bool"} and one is not None and not isinstance(one, bool):
            raise JobError(f"{where} is {one!r:.200}, expected true or false.")
        if isinstance(one, float) and not math.isfinite(one):
            raise JobError(f"{where} is {one}, expected a finite number.")


def _build_nested(value: Any) -> Any:
    """A table with a `type` as the object it describes, a list as a tuple of such values, anything else as it is."""
    if isinstance(value, Mapping) and "type" in value:
        return from_config(value)
    if isinstance(value, list):
        return tuple(_build_nested(v) for v in value)
    return value


def digest(value: Any) -> str:
    """The short address of a configuration: 16 hex digits of SHA-256 of its canonical JSON."""
    text = json.dumps(to_config(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(value: Any) -> Any:
    """What `value`, tables that JSON can write, says of results wherever their files lie: digests stand for paths.

    The path of a state becomes the digest that it ends in; the path of a file of weights is left out, as its digest is beside it.
    """
    if isinstance(value, Mapping):
        has_digest = value.get("weights_digest") is not None
        return {str(k): identity(v) for k, v in value.items() if not (has_digest and k == "weights")}
    if isinstance(value, (list, tuple)):
        return [identity(v) for v in value]
    state = _STATE_PATH.fullmatch(value) if isinstance(value, str) else None
    return value if state is None else state[1]


def differences(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """A line `key: stored A, asked B` for each value in which two configurations differ; `prefix` goes before its key."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted(set(stored) | set(asked)):
            lines += differences(stored.get(key), asked.get(key), f"{prefix}{key}.")
        return lines
    return [] if stored == asked else [f"{prefix.rstrip('.')}: stored {stored!r}, asked {asked!r}"]
