"""Receipts of tiles as the lines of a manifest, `receipts.jsonl`: each with its own checksum, each appended whole.

`store` appends them and asks here for those that are there. A line that cannot be trusted counts as none: its tile is pending, and
the next run computes it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from ntkdask.files import writing

Index = tuple[int, ...]
_CHECK = "check"


@dataclass(frozen=True)
class Receipt:
    """What a worker returns for a tile that it has written.

    Parameters
    ----------
    index : tuple of int
        Which tile, an integer an axis.
    checksum : int
        CRC-32C of its bytes in C order.
    seconds : float, optional
        How long it took to compute and write.
    peak_bytes : int, optional
        Peak memory of the worker's process.
    worker : str, optional
        Address of the worker.
    halvings : int, optional
        How often the tile was cut in halves because it did not fit into the device's memory.
    """

    index: Index
    checksum: int
    seconds: float = 0.0
    peak_bytes: int = 0
    worker: str = ""
    halvings: int = 0

    def to_line(self) -> str:
        """The receipt as a line of the manifest: JSON with a checksum, without `halvings` where there were none."""
        row = asdict(self)
        if not self.halvings:
            del row["halvings"]
        return checked_line(row)


def checked_line(row: Mapping[str, Any]) -> str:
    """A row of the manifest as a line of JSON that ends in the CRC-32C of what comes before."""
    return json.dumps({**row, _CHECK: _crc(row)}) + "\n"


@dataclass
class Manifest:
    """What the lines of a manifest say.

    Parameters
    ----------
    receipts : dict
        The last receipt of every tile that was not discarded.
    damaged : list of int
        Numbers of the lines that cannot be read, or do not match their checksum, from 1. An unfinished last line is none of them.
    unchecked : int
        How many lines have no checksum: an earlier release wrote them.
    """

    receipts: dict[Index, Receipt] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    unchecked: int = 0


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`; an empty one where there is none."""
    found = Manifest()
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if _CHECK in row and row.pop(_CHECK) != _crc(row):
                raise ValueError("its checksum does not match")
            _take(row, found.receipts)
            found.unchecked += b'"check":' not in line
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # a driver killed while appending leaves half a line at the end: that tile is pending
            if number < len(lines):
                found.damaged.append(number)
    return found


def _take(row: dict[str, Any], receipts: dict[Index, Receipt]) -> None:
    """Apply one row: a receipt, or that a tile was discarded."""
    if "discarded" in row:
        receipts.pop(tuple(row["discarded"]), None)
        return
    receipt = Receipt(**{**row, "index": tuple(row["index"])})
    receipts[receipt.index] = receipt


def end_torn_line(path: Path) -> None:
    """Make the next receipt begin on a line of its own: complete a last line that only lacks its end, drop half a one.

    Only the driver may call this: a reader may look while the driver is in the middle of an append.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content or content.endswith(b"\n"):
        return
    torn = content[content.rfind(b"\n") + 1 :]
    with writing(path), open(path, "r+b") as manifest:
        if torn.endswith(b"}"):
            manifest.seek(0, 2)
            manifest.write(b"\n")
        else:
            manifest.truncate(len(content) - len(torn))


def _crc(row: Mapping[str, Any]) -> int:
    return int(google_crc32c.value(json.dumps(dict(row)).encode()))
