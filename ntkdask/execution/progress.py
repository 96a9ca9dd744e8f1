"""The progress of a workflow: listeners hear of it while it runs, records keep it between runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ntkdask.errors import FingerprintError, StoreError
from ntkdask.execution.window import Done
from ntkdask.files import write_text
from ntkdask.registry import differences

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

    The file is written whole after every stage. A record with another fingerprint is refused, with the keys that differ.

    Parameters
    ----------
    path : Path or None
        The file. None: the results are kept for one call.
    fingerprint : mapping
        Everything that decides the results.
    stages : dict
        {name: result}, results ready for JSON (urls, numbers).
    """

    path: Path | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None, fingerprint: Mapping[str, Any]) -> Record:
        """The record in `folder`, a new one when there is none; FingerprintError when it is another run's."""
        if folder is None:
            return cls(None, fingerprint)
        path = folder / "record.json"
        asked = json.loads(json.dumps(dict(fingerprint)))
        if not path.exists():
            record = cls(path, asked)
            record._write()
            return record
        try:
            stored = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise StoreError(f"{path} is damaged ({error}). Start the run again with --overwrite.") from error
        lines = differences(stored["fingerprint"], asked)
        if lines:
            raise FingerprintError(
                f"{folder} holds a run of other parameters:\n  "
                + "\n  ".join(lines)
                + "\nGive the run another name, or --overwrite (overwrite=True) to start again."
            )
        return cls(path, asked, stored["stages"])

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

    def _write(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps({"fingerprint": dict(self.fingerprint), "stages": self.stages}, indent=1))


NUMERICS = 3
"""Raised when a change makes equal parameters give other numbers; part of every fingerprint."""
