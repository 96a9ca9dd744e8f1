"""Read TOML files strictly into dataclasses: what job files and sweep files share.

An unknown key is an error that names the nearest known one. Called by `spec.py` and `sweep_spec.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from ntkdask.errors import JobError, nearest

STRICT = ConfigDict(extra="forbid", strict=False)
"""The pydantic configuration of the dataclasses that a file's tables become."""

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 32
_MAX_NAME_BYTES = 200
_MAX_COMPONENT_BYTES = 255


def _require_number(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("expected a number")
    return value


Int = Annotated[int, BeforeValidator(_require_number)]
"""An integer of a table; true and "1" are none."""
Number = Annotated[float, BeforeValidator(_require_number)]
"""A number of a table."""
Bool = Annotated[bool, Strict()]
"""true or false; 1 is neither."""

T = TypeVar("T")
Tables = Mapping[tuple[str, ...], type]
"""{path of a table: the dataclass that it becomes}; () is the whole file."""


def read_tables(path: Path, kind: str) -> dict[str, Any]:
    """The tables of a file; JobError, which calls it a `kind` file, where it does not exist, is not TOML or far too large."""
    # False for a name that no file can have, where Path.exists raises
    if not os.path.exists(path):
        raise JobError(f"{kind} file {path} does not exist. Examples are in jobs/.")
    if not path.is_file():
        raise JobError(f"{path} is a folder or a device, not a {kind} file. Give the file itself.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise JobError(f"{path} has {path.stat().st_size:,} bytes; a {kind} file has at most {MAX_FILE_BYTES:,}.")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise JobError(f"{path} nests tables or lists more than {MAX_DEPTH} deep.") from error
    except ValueError as error:  # no TOML, no UTF-8, an integer of thousands of digits
        raise JobError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise JobError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    try:
        require_plain(table)
    except JobError as error:
        raise JobError(f"{path}: {error}") from error
    return table


def require_plain(table: Mapping[str, Any]) -> None:
    """JobError for what no table holds: deep nesting, dates, NUL in a text, integers beyond 64 bits, infinity and NaN."""
    waiting: list[tuple[str, Any, int]] = [("", table, 0)]
    while waiting:
        where, value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise JobError(f"{where:.60} ... nests tables or lists more than {MAX_DEPTH} deep.")
        if isinstance(value, Mapping):
            waiting += [(f"{where}.{key}" if where else key, v, depth + 1) for key, v in value.items()]
        elif isinstance(value, list):
            waiting += [(where, v, depth + 1) for v in value]
        elif isinstance(value, str):
            if "\0" in value:
                raise JobError(f"{where} is {value!r:.200}, which holds a NUL character. Remove it.")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise JobError(f"{where} is {value}, expected a finite number.")
        elif not isinstance(value, int):
            raise JobError(f"{where} is {value!s:.60}, a date or a time. Write a number or a text in quotes.")
        elif not -(2**63) <= value < 2**63:
            raise JobError(f"{where} has {len(str(abs(value)))} digits; integers have at most 64 bits.")


def require_path(key: str, url: str | None) -> None:
    """JobError for a path that no file system takes; None is none."""
    parts = os.fsencode(url or "").split(b"/")
    if b"\0" in b"".join(parts) or max(map(len, parts)) > _MAX_COMPONENT_BYTES:
        raise JobError(
            f"{key} is {url!r:.80} ..., no path: names have at most {_MAX_COMPONENT_BYTES} bytes, without NUL."
        )


def validated(cls: type[T], table: Mapping[str, Any], tables: Tables) -> T:
    """The dataclass `cls` of a file's tables; JobError with the first problems in words."""
    try:
        return TypeAdapter(cls).validate_python(dict(table))
    except ValidationError as error:
        raise JobError(_explained(error, {(): cls, **tables})) from error


def require_name(name: str) -> None:
    """JobError for a name that cannot be that of a folder."""
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise JobError(f"name has {len(name)} letters: it names the run's folder. Use at most {_MAX_NAME_BYTES} bytes.")
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise JobError(f"name is {name!r}: use letters, digits, '-', '_' and '.'; it names the run's folder.")


def _explained(error: ValidationError, tables: Tables) -> str:
    """The first problems in words, with the nearest known key for an unknown one."""
    lines = []
    for problem in error.errors()[:5]:
        path = [str(p) for p in problem["loc"] if not _is_union_branch(p, tables)]
        where = ".".join(path)
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"unknown key {where!r}{nearest(path[-1], _keys_at(path[:-1], tables))}")
        elif problem["type"] in ("missing", "missing_argument"):
            lines.append(f"{where} is missing")
        else:
            lines.append(f"{where} is {problem.get('input')!r:.200}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(dict.fromkeys(lines))


def _is_union_branch(part: Any, tables: Tables) -> bool:
    return isinstance(part, str) and ("[" in part or part in {cls.__name__ for cls in tables.values()})


def _keys_at(path: Sequence[str], tables: Tables) -> list[str]:
    """The keys of the table at `path`, where positions in lists of tables are left out."""
    cls = tables.get(tuple(part for part in path if not part.isdigit()))
    return [] if cls is None else [f.name for f in dataclasses.fields(cls)]
