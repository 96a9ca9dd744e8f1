"""Inspect the folder of a run: its progress (`status`), and damaged files, which it can make pending again (`verify`)."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkdask.datasets import open_dataset
from ntkdask.datasets.dataset import describe, has_checksum
from ntkdask.errors import DataError, StoreError, UserError
from ntkdask.execution.progress import RECORD, Record
from ntkdask.files import exclusive, local_path, read_json, remove
from ntkdask.modules.state.weight_files import file_digest
from ntkdask.states import is_damaged, list_states, list_weights
from ntkdask.store import ATTRIBUTE, RECEIPTS, TileStore, mend_description, tile_stores

METRICS = "metrics.json"
MARKER = "zarr.json"


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
    record = Record.read(_record_path(folder))
    return {"fingerprint": record.fingerprint, "stages": record.stages}


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
    """What does not read back as it was written.

    Parameters
    ----------
    path : Path
        A store, a state, a dataset, or a file.
    index : tuple of int or None
        The tile of a store. None: all of it.
    reason : str, optional
        What is wrong, where it is no tile.
    """

    path: Path
    index: tuple[int, ...] | None
    reason: str = ""

    def __str__(self) -> str:
        if self.index is not None:
            return f"{self.path} tile {self.index}"
        return f"{self.path}: {self.reason}" if self.reason else f"{self.path}"


def verify(folder: Path | str, repair: bool = False) -> list[Damage]:
    """Read everything that a run stored once, and list what is damaged; the run may go on meanwhile.

    Parameters
    ----------
    folder : Path or str
        Of the run; or of a dataset, a matrix or features without a run, which is read alike.
    repair : bool
        Mend descriptions from what is recorded beside them, and make everything else that is damaged pending, so that the next run
        computes it again. A dataset that was imported is left as it is. Then no run may go on: StoreError
        where one does.

    Returns
    -------
    list of Damage
        Empty for a whole run.

    Raises
    ------
    UserError
        Where nothing of ntkdask is stored there.
    """
    folder = local_path(folder)
    if not (folder / RECORD).exists() and not any(folder.rglob(MARKER)):
        _record_path(folder)
    with exclusive(folder) if repair else contextlib.nullcontext():
        found = _damaged_record(folder) + _damaged_stores(folder) + _damaged_states(folder) + _damaged_datasets(folder)
        if (folder / METRICS).exists():
            found += _unless(lambda: read_json(folder / METRICS, ""), folder / METRICS)
        if repair and found:
            _repair(folder, found)
    return found


def without_checksum(folder: Path | str) -> list[Path]:
    """The files of a run for which an earlier release recorded no checksum, so that `verify` cannot tell whether they were edited."""
    folder = local_path(folder)
    paths = [folder / RECORD] if (folder / RECORD).exists() and not _table(folder / RECORD).get("checksums") else []
    for store in tile_stores(folder, damaged=False):
        paths += [] if store.has_checksum else [store.path / MARKER]
        paths += [store.path / RECEIPTS] if store.manifest().unchecked else []
    return paths + [path / MARKER for path in _datasets(folder) if not has_checksum(path)]


def _record_path(folder: Path | str) -> Path:
    path = local_path(folder) / RECORD
    if not path.exists():
        raise UserError(f"{folder} holds no run (no {RECORD}). Runs lie in runs/<name>.")
    return path


def _unless(look: Any, path: Path) -> list[Damage]:
    """Nothing where look() passes; else the damage that its error tells of."""
    try:
        look()
    except StoreError as error:
        return [_damage(path, error)]
    return []


def _damage(path: Path, error: StoreError) -> Damage:
    """The damage of a file that an error tells of."""
    return Damage(path, None, str(error).removeprefix(f"{path} is damaged").lstrip(": "))


def _damaged_record(folder: Path) -> list[Damage]:
    """Entries of the record that were changed, and states that it names and that are gone."""
    path = folder / RECORD
    if not path.exists():
        return []
    try:
        record, changed = Record.examine(path)
    except StoreError as error:
        return [_damage(path, error)]
    found = [Damage(path, None, f"{name} changed since it was written") for name in changed]
    gone = {url for url in _urls(record.stages, folder) if not url.exists()}
    # a run that goes on meanwhile drops its checkpoints
    still = _urls(Record.examine(path)[0].stages, folder) if gone else []
    return found + [Damage(url, None, "it is gone") for url in sorted(gone.intersection(still))]


def _urls(value: Any, folder: Path) -> list[Path]:
    """The paths below `folder` that the result of a stage names."""
    if isinstance(value, dict):
        return [url for v in value.values() for url in _urls(v, folder)]
    if isinstance(value, list):
        return [url for v in value for url in _urls(v, folder)]
    return [Path(value)] if isinstance(value, str) and value.startswith(f"{folder}/") else []


def _damaged_stores(folder: Path) -> list[Damage]:
    """Descriptions, receipts and tiles of every store."""
    found = []
    for path in _arrays(folder):
        try:
            store = TileStore.open(path)
        except StoreError as error:
            if not path.exists():
                continue  # a run that goes on meanwhile has combined it
            found.append(_damage(path / MARKER, error))
            continue
        lines = store.manifest().damaged
        found += [Damage(path / RECEIPTS, None, f"line {number} changed since it was written") for number in lines]
        found += [Damage(path, index) for index in store.damaged()]
    return found


def _damaged_states(folder: Path) -> list[Damage]:
    """States, and files of weights beside them, whose content has another digest than their name."""
    # a state that is gone was dropped by a run that goes on
    found = [Damage(path, None) for path in list_states(folder) if is_damaged(path) and path.exists()]
    return found + [Damage(p, None, "other weights") for p in list_weights(folder) if file_digest(p) != p.stem]


def _damaged_datasets(folder: Path) -> list[Damage]:
    """Datasets whose description or rows have another digest than the one that is recorded."""
    found = []
    for path in _datasets(folder):
        try:
            described = describe(path)
            if "parts" not in described and open_dataset(path).recomputed_digest() != described["digest"]:
                found.append(Damage(path, None, "its rows or its description have another digest than recorded"))
        except (DataError, StoreError) as error:
            found.append(Damage(path, None, str(error)))
    return found


def _table(path: Path) -> dict[str, Any]:
    """A JSON file as a table; an empty one where it is damaged."""
    try:
        table = read_json(path, "")
    except StoreError:
        return {}
    return table if isinstance(table, dict) else {}


def _arrays(folder: Path) -> list[Path]:
    """The folders of tile stores: those with receipts, with a fingerprint, or with a description that cannot be read."""
    found = {path.parent for path in folder.rglob(RECEIPTS)}
    datasets = _datasets(folder)
    for path in (marker.parent for marker in folder.rglob(MARKER)):
        if "state" in path.relative_to(folder).parts or _is_partial(path):
            continue
        table = _table(path / MARKER)
        kept = table.get("attributes")
        named = isinstance(kept, dict) and isinstance(kept.get(ATTRIBUTE), dict) and "fingerprint" in kept[ATTRIBUTE]
        if named or ("node_type" not in table and path not in datasets and path.parent not in datasets):
            found.add(path)
    return sorted(found)


def _datasets(folder: Path) -> list[Path]:
    """The folders of datasets, which hold the rows x, and of those with parts."""
    found = {path.parent for path in folder.rglob("x") if path.is_dir() and not _is_partial(path)}
    with contextlib.suppress(DataError, StoreError):
        if "parts" in describe(folder):
            found.add(folder)
    return sorted(found)


def _is_partial(path: Path) -> bool:
    """Whether `path` is, or is left over from, what is being written."""
    return any(".partial" in part for part in path.parts)


def _repair(folder: Path, found: list[Damage]) -> None:
    """Mend the descriptions of stores, and remove everything else that is damaged with the stages that rest on it."""
    by_store: dict[Path, list[tuple[int, ...]]] = {}
    lost = []
    for damage in found:
        path = damage.path
        if damage.index is not None:
            by_store.setdefault(path, []).append(damage.index)
        elif path.name == MARKER:
            mend_description(path.parent)
        elif path.name == RECEIPTS:
            by_store.setdefault(path.parent, [])
        elif path.name == METRICS:
            remove(path)
        elif path.name != RECORD and folder in path.parents and (folder / RECORD).exists():
            lost.append(path)
    for path, indices in by_store.items():
        if (path / MARKER).exists():
            TileStore.open(path).forget(indices)
    _repair_record(folder, lost)
    for path in lost:
        remove(path)


def _repair_record(folder: Path, lost: list[Path]) -> None:
    """Drop the changed entries of the record and those that name what is lost; a record that says nothing steps aside."""
    path = folder / RECORD
    if not path.exists():
        return
    try:
        record, changed = Record.examine(path)
    except StoreError:
        changed = ["the fingerprint"]
    if "the fingerprint" in changed:
        path.replace(path.with_name(f"{RECORD}.damaged"))
        return
    names = {name.removeprefix("stage ") for name in changed}
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in record.stages.items()}
    names |= {name for name, text in texts.items() if any(str(p) in text for p in lost)}
    record.drop(names)
