"""Inspect the folder of a run: its progress (`status`), and damaged files, which it can make pending again (`verify`)."""

from __future__ import annotations

import contextlib
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
    """The progress of one stage of a run.

    Parameters
    ----------
    name : str
        Of the stage, or path of its store.
    done, total : int
        Tiles that are committed, and all.
    finished : bool
        Whether the stage is finished, whatever its tiles: a finished sum has discarded those of its slabs.
    """

    name: str
    done: int
    total: int
    finished: bool


def open_record(folder: Path | str) -> dict[str, Any]:
    """The record of a run as a dict; UserError when the folder holds none, StoreError when it is damaged."""
    path = local_path(folder) / "record.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run (no record.json). Runs lie in runs/<name>.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is damaged ({error}). Start the run again with --overwrite.") from error


def status(folder: Path | str) -> list[StageStatus]:
    """The progress of every stage of a run that has begun."""
    folder = local_path(folder)
    stages = open_record(folder)["stages"]
    rows = [StageStatus(name, 1, 1, True) for name in stages if name != "plan"]
    for store in tile_stores(folder):
        done, total = len(store.receipts), len(store.indices())
        name = str(store.path.relative_to(folder))
        summed = f"{name.split('/')[0]}/solve" in stages and store.path.name.startswith(("gram", "loo"))
        rows.append(StageStatus(name, done, total, summed or done == total))
    return rows


@dataclass(frozen=True)
class Damage:
    """A tile of a store, or a whole state (index None), that does not read back as it was written."""

    path: Path
    index: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"{self.path}" + ("" if self.index is None else f" tile {self.index}")


def verify(folder: Path | str, repair: bool = False) -> list[Damage]:
    """Read every committed tile and state of a run once, and list what is damaged; a run may go on meanwhile.

    Parameters
    ----------
    folder : Path or str
        Of the run.
    repair : bool
        Make damaged tiles and the stages of damaged states pending, so that the next run computes them again. Then no run may go on:
        StoreError where one does.

    Returns
    -------
    list of Damage
        Empty for a whole run.
    """
    folder = local_path(folder)
    open_record(folder)
    with exclusive(folder) if repair else contextlib.nullcontext():
        found = [Damage(store.path, index) for store in tile_stores(folder) for index in store.damaged()]
        # a state that is gone was dropped by the run that goes on
        found += [Damage(path, None) for path in list_states(folder) if is_damaged(path) and path.exists()]
        if repair and found:
            _make_pending(folder, found)
    return found


def _make_pending(folder: Path, found: list[Damage]) -> None:
    """Forget damaged tiles, and the stages of damaged states; the caller holds the folder's lock."""
    record = open_record(folder)
    for store in tile_stores(folder):
        bad = [d.index for d in found if d.path == store.path and d.index is not None]
        if bad:
            store.forget(bad)
    lost = [str(d.path) for d in found if d.index is None]
    kept = Record(folder / "record.json", record["fingerprint"], record["stages"])
    for name in [
        n for n, value in kept.stages.items() if any(url in json.dumps(value, ensure_ascii=False) for url in lost)
    ]:
        kept.forget(name)
    for url in lost:
        remove(url)
