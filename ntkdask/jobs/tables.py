"""Read TOML files strictly into dataclasses: what job files and sweep files share.

An unknown key is an error that names the nearest known one. Called by `spec.py` and `sweep_spec.py`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ntkdask.errors import JobError, nearest

STRICT = ConfigDict(extra="forbid", strict=False)
"""The pydantic configuration of the dataclasses that a file's tables become."""

T = TypeVar("T")
Tables = Mapping[tuple[str, ...], type]
"""{path of a table: the dataclass that it becomes}; () is the whole file."""


def read_tables(path: Path, kind: str) -> dict[str, Any]:
    """The tables of a file; JobError, which calls it a `kind` file, where it does not exist or is not TOML."""
    if not path.exists():
        raise JobError(f"{kind} file {path} does not exist. Examples are in jobs/.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path} is not valid TOML: {error}") from error


def validated(cls: type[T], table: Mapping[str, Any], tables: Tables) -> T:
    """The dataclass `cls` of a file's tables; JobError with the first problems in words."""
    try:
        return TypeAdapter(cls).validate_python(dict(table))
    except ValidationError as error:
        raise JobError(_explained(error, {(): cls, **tables})) from error


def require_name(name: str) -> None:
    """JobError for a name that cannot be that of a folder."""
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
            lines.append(f"{where} is {problem.get('input')!r}: {problem['msg']}")
    return "; ".join(dict.fromkeys(lines))


def _is_union_branch(part: Any, tables: Tables) -> bool:
    return isinstance(part, str) and ("[" in part or part in {cls.__name__ for cls in tables.values()})


def _keys_at(path: Sequence[str], tables: Tables) -> list[str]:
    """The keys of the table at `path`, where positions in lists of tables are left out."""
    cls = tables.get(tuple(part for part in path if not part.isdigit()))
    return [] if cls is None else [f.name for f in dataclasses.fields(cls)]
