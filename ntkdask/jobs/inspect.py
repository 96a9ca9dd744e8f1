"""What a run folder holds: how far it is (`status`), whether its bytes are whole (`verify`), and mending it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkdask.errors import StoreError, UserError
from ntkdask.execution.progress import Record
from ntkdask.files import exclusive, local_path, remove
from ntkdask.states import is_damaged, list_states
from ntkdask.store import tile_stores


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run: tiles committed of all; finished stages say so whatever their tiles (sums give theirs up)."""

    name: str
    done: int
    total: int
    finished: bool


def open_record(folder: Path | str) -> dict[str, Any]:
    """The record of a run; UserError when the folder holds none."""
    path = local_path(folder) / "record.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run (no record.json). Runs lie in runs/<name>.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is damaged ({error}). Start the run again with --overwrite.") from error


def status(folder: Path | str) -> list[StageStatus]:
    """Every stage that has begun."""
    folder = local_path(folder)
    stages = open_record(folder)["stages"]
    rows = [StageStatus(name, 1, 1, True) for name in stages if name != "plan"]
    for store in tile_stores(folder):
        done, total = len(store.receipts), len(store.indices())
        name = str(store.path.relative_to(folder))
        summed = f"{name.split('/')[0]}/solve" in stages and "gram" in name
        rows.append(StageStatus(name, done, total, summed or done == total))
    return rows


@dataclass(frozen=True)
class Damage:
    """Something that does not read back: a tile of a store, or a whole state."""

    path: Path
    index: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"{self.path}" + ("" if self.index is None else f" tile {self.index}")


def verify(folder: Path | str, repair: bool = False) -> list[Damage]:
    """Read every committed tile and state once; what is damaged. repair: make it pending, so that the next run redoes it."""
    folder = local_path(folder)
    record = open_record(folder)
    found = [Damage(store.path, index) for store in tile_stores(folder) for index in store.damaged()]
    found += [Damage(path, None) for path in list_states(folder) if is_damaged(path)]
    if repair and found:
        with exclusive(folder):
            for store in tile_stores(folder):
                bad = [d.index for d in found if d.path == store.path and d.index is not None]
                if bad:
                    store.forget(bad)
            lost = [str(d.path) for d in found if d.index is None]
            kept = Record(folder / "record.json", record["fingerprint"], record["stages"])
            for name in [
                n
                for n, value in kept.stages.items()
                if any(url in json.dumps(value, ensure_ascii=False) for url in lost)
            ]:
                kept.forget(name)
            for url in lost:
                remove(url)
    return found
