"""Which arrays of a file hold rows and which targets, told by their names: of .npz, HDF5, NetCDF and Zarr.

The rows are called x, data or images, and the targets y, labels or targets; names that begin with train, validation (val, valid) or
test, or end so, make parts: `x_train`, `val_images`, `test/x`. Case does not matter. `rows` and `target` name arrays of other names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ntkdask.datasets.source import ALL, PARTS, Request, part_of
from ntkdask.errors import DataError, nearest

_ROWS = ("x", "data", "images", "image")
_TARGETS = ("y", "labels", "label", "targets", "target")

Parts = dict[str, tuple[str, str | None]]


def find_arrays(path: Path, names: Sequence[str], request: Request) -> tuple[Parts, list[str]]:
    """({part: (name of its rows, name of its targets or None)}, names that are neither); parts in their order."""
    places = {name: _split(name) for name in names}
    asked = {"targets": _asked(request.target, places), "x": _asked(request.rows, places)}
    for wanted, kind, word in ((request.target, "targets", "target"), (request.rows, "x", "rows")):
        if wanted is not None and not asked[kind]:
            raise DataError(f"{path} has no array {wanted!r} for {word}{nearest(str(wanted), names)}")
    arrays: dict[str, dict[str, str]] = {}
    for name, (part, base) in places.items():
        role = next((r for r, chosen in asked.items() if name in chosen), None) or _role(part, base, request)
        if role is None:
            continue
        held = arrays.setdefault(part, {})
        if role in held:
            raise DataError(f"{path} has both {held[role]!r} and {name!r} for {role}. Save one of them, or name it.")
        held[role] = name
    others = [n for n in names if n not in asked["targets"]]
    if len(others) == 1 and not any("x" in held for held in arrays.values()):
        # the only array there is, whatever it is called
        named = [n for n in names if n not in others]
        arrays = {ALL: {"x": others[0]} | ({"targets": named[0]} if named else {})}
    parts: Parts = {p: (arrays[p]["x"], arrays[p].get("targets")) for p in (*PARTS, ALL) if "x" in arrays.get(p, {})}
    used = {n for pair in parts.values() for n in pair}
    left_out = [n for n in names if n not in used]
    if not parts or (len(parts) > 1 and ALL in parts):
        raise DataError(
            f"{path} has the arrays {', '.join(names)}. Name the rows x and the targets y, or x_train, y_train, x_test, y_test "
            "(and x_validation, y_validation); or pass --rows NAME and --target NAME."
        )
    return parts, left_out


def notes_of(parts: Parts, left_out: list[str]) -> dict[str, object]:
    """What the provenance says of the arrays that were taken and left out."""
    notes: dict[str, object] = {"rows": ", ".join(x for x, _ in parts.values())}
    targets = [t for _, t in parts.values() if t is not None]
    if targets:
        notes["target"] = ", ".join(targets)
    if left_out:
        notes["arrays_left_out"] = left_out
    return notes


def require_rows(path: Path, parts: Parts, shapes: dict[str, tuple[int, ...]]) -> None:
    """DataError for an array without rows, a single number, or other numbers of targets than of rows."""
    for x, targets in parts.values():
        for name in (x, targets):
            if name is None:
                continue
            if not shapes[name]:
                raise DataError(f"{path}: {name} is a single number. Save an array of rows.")
            if shapes[name][0] == 0:
                raise DataError(
                    f"{path}: {name} has 0 rows, its shape is {shapes[name]}. Leave it out, or save its rows."
                )
        if targets is not None and shapes[targets][0] != shapes[x][0]:
            raise DataError(
                f"{path}: {x} has {shapes[x][0]} rows, {targets} has {shapes[targets][0]}. Give one per row, "
                "and rows on the first axis."
            )


def _asked(wanted: str | int | None, places: dict[str, tuple[str, str]]) -> set[str]:
    """The arrays that were asked for: the one of that name, or those that have it beside their part."""
    exact = {name for name in places if name == wanted}
    return exact or {name for name, (_, base) in places.items() if base == str(wanted).lower() and wanted is not None}


def _role(part: str, base: str, request: Request) -> str | None:
    """Whether an array that was not asked for is "x" or "targets" by its name; None for one that is neither."""
    if request.rows is None and (base in _ROWS or (not base and part != ALL)):
        return "x"
    return "targets" if request.target is None and request.kind != "unlabelled" and base in _TARGETS else None


def _split(name: str) -> tuple[str, str]:
    """(part, the rest of the name in lower case): x_train is ("train", "x").

    >>> _split("X_train"), _split("val_images"), _split("test/y"), _split("depth")
    (('train', 'x'), ('validation', 'images'), ('test', 'y'), ('all', 'depth'))
    """
    words = re.split(r"[_/.\- ]+", name.strip("/"))
    for at in (0, -1):
        part = part_of(words[at])
        if part is not None:
            return part, "_".join(w for i, w in enumerate(words) if i != at % len(words)).lower()
    return ALL, name.lower()
