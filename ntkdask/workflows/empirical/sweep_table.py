"""The finished cells of a sweep: a JSON file for each, with what was asked for and what was measured, and one table of all.

folder/cells/<cell>.json    {"asked": everything that decides the cell, "found": its measures, "checksum": of both}
folder/table.csv            all cells as flat rows
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkdask import registry
from ntkdask.errors import FingerprintError, StoreError
from ntkdask.files import local_path, write_text
from ntkdask.workflows.empirical.sweep_cells import Cell, PntkSweep

KEYS = ("network", "width", "seed", "epoch")


def sweep_rows(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every finished cell as a flat row, by network, width, seed and epoch; nested numbers as `entk_lambda_min`.

    StoreError where there are no cells, or a damaged one.
    """
    paths = sorted((local_path(folder) / "cells").glob("*.json"))
    if not paths:
        raise StoreError(f"{folder} has no cells of a sweep yet. Run it first.")
    rows = []
    for path in paths:
        cell = _read(path)
        rows.append({key: cell["asked"][key] for key in KEYS} | _flat(cell["found"]))
    return sorted(rows, key=lambda r: tuple(r[key] for key in KEYS))


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Write folder/table.csv; returns its rows."""
    rows = sweep_rows(folder)
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "table.csv", out.getvalue())
    return rows


def asked_of(sweep: PntkSweep, cell: Cell, data_digest: str) -> dict[str, Any]:
    """Everything that decides a cell, as JSON."""
    protocol = registry.to_config(sweep.protocol) if cell.epoch else None
    if protocol is not None:
        # training up to this epoch is the same whatever comes later, and whatever is kept of it
        protocol = {key: value for key, value in protocol.items() if key not in ("epochs", "checkpoints")}
    return {
        "network": cell.network,
        "width": cell.width,
        "seed": cell.seed,
        "epoch": cell.epoch,
        "data": data_digest,
        "description": registry.to_config(cell.description),
        "protocol": protocol,
        "kernels": list(sweep.kernels),
        "alpha": sweep.alpha,
        "dtype": sweep.dtype,
    }


def is_done(folder: Path, cell: Cell, asked: Mapping[str, Any]) -> bool:
    """Whether the cell is there; FingerprintError, naming the keys, when its file is of another sweep."""
    path = _path(folder, cell)
    if not path.exists():
        return False
    lines = registry.differences(*(registry.identity(a) for a in (_read(path)["asked"], json.loads(json.dumps(asked)))))
    if lines:
        raise FingerprintError(
            f"{path} is a cell of another sweep:\n  "
            + "\n  ".join(lines)
            + "\nUse another folder, or delete that one's cells."
        )
    return True


def write_cell(folder: Path, cell: Cell, asked: Mapping[str, Any], measures: Mapping[str, Any]) -> None:
    """Write a finished cell, whole."""
    table = json.loads(json.dumps({"asked": asked, "found": _plain(measures)}, allow_nan=False))
    text = json.dumps({**table, "checksum": registry.digest(table)}, indent=1)
    write_text(_path(folder, cell), text)


def _path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _read(path: Path) -> dict[str, Any]:
    """A cell as it was written; StoreError when it is damaged."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if not set(KEYS) <= set(cell["asked"]) or not isinstance(cell["found"], dict):
            raise ValueError("it says nothing of a cell")
        # an earlier release wrote no checksum
        if cell.pop("checksum", None) not in (None, registry.digest(cell)):
            raise ValueError("it changed since it was written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it; the sweep computes it again.") from error
    return cell


def _plain(value: Any) -> Any:
    """A table with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one level, with keys joined by underscores."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
