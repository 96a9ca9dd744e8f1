"""The progress of a workflow: listeners hear of it while it runs, records keep it between runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ntkdask.errors import FingerprintError, StoreError
from ntkdask.execution.window import Done
from ntkdask.files import read_json, write_text
from ntkdask.registry import differences, digest, identity

RECORD = "record.json"
HERE = "@run/"
"""Begins a path that is written relative to the folder of its run."""
_ADVICE = (
    "`ntkdask verify --repair FOLDER` drops what is damaged and the next run computes it again; or start the run again with "
    "--overwrite."
)

DRIVER = "driver"
"""Stands for the worker where the driver itself runs a step between tasks; the memory of workers does not count it."""


class Listener(Protocol):
    """Called when a stage begins and when a task finishes; the command line draws its progress bars with one."""

    def stage(self, label: str, total: int, done: int = 0) -> None:
        """A stage of `total` tasks begins; an earlier run finished `done` of them."""

    def task(self, label: str, done: Done) -> None:
        """One task of a stage finished."""


class Silent:
    """A listener that does nothing."""

    def stage(self, label: str, total: int, done: int = 0) -> None:
        """Nothing."""

    def task(self, label: str, done: Done) -> None:
        """Nothing."""


@dataclass
class Record:
    """The results of the finished stages of a run, kept in a JSON file with the run's fingerprint.

    The file is written whole after every stage, each entry with a checksum, and paths below `root` relative to it: a run that was
    moved or copied reads its own files. A record with another fingerprint is refused, with the keys that differ.

    Parameters
    ----------
    path : Path or None
        The file. None: the results are kept for one call.
    fingerprint : mapping
        Everything that decides the results.
    stages : dict
        {name: result}, results ready for JSON (urls, numbers).
    root : Path or None
        The folder that holds the files of the run. None: that of the record.
    """

    path: Path | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    root: Path | None = None

    @classmethod
    def open(cls, folder: Path | None, fingerprint: Mapping[str, Any], root: Path | None = None) -> Record:
        """The record in `folder`, a new one when there is none; FingerprintError when it is another run's.

        A new one is written with its first stage, or by `begin`: a plan that is refused leaves nothing behind.
        """
        if folder is None:
            return cls(None, fingerprint)
        path = folder / RECORD
        asked = identity(json.loads(json.dumps(dict(fingerprint))))
        if not path.exists():
            return cls(path, asked, root=root)
        record = cls.read(path, root)
        lines = differences(identity(record.fingerprint), asked)
        if lines:
            raise FingerprintError(
                f"{folder} holds a run of other parameters:\n  "
                + "\n  ".join(lines)
                + "\nGive the run another name, or --overwrite (overwrite=True) to start again."
            )
        return replace(record, fingerprint=asked)

    @classmethod
    def read(cls, path: Path, root: Path | None = None) -> Record:
        """The record at `path`, whoever's it is; StoreError, naming the entries, where it is damaged."""
        record, damaged = cls.examine(path, root)
        if damaged:
            raise StoreError(f"{path} is damaged: {', '.join(damaged)} changed since it was written. {_ADVICE}")
        return record

    @classmethod
    def examine(cls, path: Path, root: Path | None = None) -> tuple[Record, list[str]]:
        """(the record at `path`, its entries that do not match their checksums); StoreError where it cannot be read at all."""
        table = read_json(path, _ADVICE)
        is_record = isinstance(table, dict) and all(isinstance(table.get(k), dict) for k in ("fingerprint", "stages"))
        checksums = table.get("checksums", {}) if is_record else None
        if not isinstance(checksums, dict):
            raise StoreError(f"{path} is damaged (it is no record of a run). {_ADVICE}")
        entries = {f"stage {name}": value for name, value in table["stages"].items()}
        entries["the fingerprint"] = table["fingerprint"]
        # an earlier release wrote no checksums
        damaged = [name for name, value in entries.items() if checksums and checksums.get(name) != digest(value)]
        here = root or path.parent
        return cls(path, table["fingerprint"], _placed(table["stages"], here), root), damaged

    def begin(self) -> Record:
        """The record itself, written: from now on another run is refused in its folder."""
        if self.path is not None and not self.path.exists():
            self._write()
        return self

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of stage `name`: from the record, or else computed now and recorded."""
        if name not in self.stages:
            self.stages[name] = make()
            self._write()
        return self.stages[name]

    def put(self, name: str, value: Any) -> None:
        """Set the result of stage `name`, also where it has one: a checkpoint."""
        self.stages[name] = value
        self._write()

    def forget(self, prefix: str) -> None:
        """Drop the stages whose names begin with `prefix`."""
        self.stages = {k: v for k, v in self.stages.items() if not k.startswith(prefix)}
        self._write()

    def drop(self, names: Collection[str]) -> None:
        """Drop the stages of these names, and write what is left with its checksums."""
        self.stages = {k: v for k, v in self.stages.items() if k not in names}
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        stages = json.loads(json.dumps(_relative(self.stages, self.root or self.path.parent)))
        checksums = {f"stage {name}": digest(value) for name, value in stages.items()}
        checksums["the fingerprint"] = digest(self.fingerprint)
        table = {"fingerprint": dict(self.fingerprint), "stages": stages, "checksums": checksums}
        write_text(self.path, json.dumps(table, indent=1))


def _relative(value: Any, root: Path) -> Any:
    """`value` with every path below `root` written from there on."""
    if isinstance(value, Mapping):
        return {k: _relative(v, root) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_relative(v, root) for v in value]
    prefix = f"{root}/"
    return HERE + value.removeprefix(prefix) if isinstance(value, str) and value.startswith(prefix) else value


def _placed(value: Any, root: Path) -> Any:
    """`value` with every path that `_relative` wrote, or an earlier release, as one below `root`."""
    if isinstance(value, Mapping):
        return {k: _placed(v, root) for k, v in value.items()}
    if isinstance(value, list):
        return [_placed(v, root) for v in value]
    if not isinstance(value, str):
        return value
    if value.startswith(HERE):
        return str(root / value.removeprefix(HERE))
    if not value.startswith("/") or value.startswith(f"{root}/"):
        return value
    # an absolute path of an earlier release, and the run has moved: the original, which may still be there, is not read
    parts = Path(value).parts[1:]
    ends = [root.joinpath(*parts[start:]) for start in range(len(parts))]
    return str(next((end for end in ends if end.exists()), ends[max(0, len(ends) - 2)]))


NUMERICS = 3
"""Raised when a change makes equal parameters give other numbers; part of every fingerprint."""
