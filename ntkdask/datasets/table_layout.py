"""How a text table is laid out: its separator, its header, its columns and the target among them.

The first 200 records are looked at. A line of names differs from the lines below it: words stand over numbers, or numbers over words.
Where a first line has both signs, of names and of data, `--header yes` or `--header no` has to say which it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ntkdask.datasets.bounds import BLOCK_BYTES, BoundedStream
from ntkdask.datasets.source import Request, open_binary
from ntkdask.errors import DataError, nearest
from ntkdask.wording import format_bytes

MISSING = ("", "nan", "na", "n/a", "null", "#n/a", "?")
"""What stands in the place of a value that is missing, in lower case."""

BLANKS = r"\s+"
_NO_NAMES = (*MISSING, "-", "--", "*", ".", "none", "missing", "unknown")
# with commas, too: such numbers are refused later, but they are no names
_NUMBER = re.compile(r"[-+]?((\d[\d,]*\.?\d*|\.\d+)([eE][-+]?\d+)?|inf|infinity)", re.ASCII | re.IGNORECASE)
# of the index that pandas and R write as a column; pandas calls it so when it writes the file again
_ROW_NAMES = ("", "Unnamed: 0")
MAX_COLUMNS = 2**18
_SAMPLE_RECORDS = 200
_SAMPLE_BYTES = 2**21


@dataclass(frozen=True)
class Table:
    """How a text table is laid out.

    Parameters
    ----------
    path : Path
        The file.
    separator : str
        ",", ";", a tab, or the regular expression of blanks.
    skip : int
        Number of records before the first row: blank lines and the header.
    first_line : int
        Number of the line of the first row, counted from 1.
    columns : tuple of str
        Their names in the header; their numbers where there is none.
    target : int or None
        Number of the target's column; None without targets.
    header : bool
        Whether the file begins with the names of its columns.
    left_out : tuple of int, optional
        Columns that are no features: the names of rows, and what follows a separator at the end of each line.
    style : str, optional
        What the target's column holds: "text", "integer" or "number".
    """

    path: Path
    separator: str
    skip: int
    first_line: int
    columns: tuple[str, ...]
    target: int | None
    header: bool
    left_out: tuple[int, ...] = ()
    style: str | None = None

    def label(self, column: int | None) -> str:
        """A column's name for messages, its number where it has none."""
        if column is None:
            return ""
        return repr(self.columns[column]) if self.columns[column] else f"number {column}"


def find_layout(path: Path, request: Request) -> Table:
    """The layout of the table at `path`, from its first records and what was asked for."""
    before, lines = _first_lines(path)
    if any(max(map(line.count, "\t;, ")) > MAX_COLUMNS for line in lines):
        raise DataError(f"{path} has more than {MAX_COLUMNS:,} columns. Save such rows with np.save or np.savez.")
    separator = _separator(lines)
    records, header_lines = _records(path, lines, separator)
    first, below = records[0], records[1:]
    header = _is_header(first, below) if request.header is None else request.header
    if header is None:
        raise DataError(
            f"{path}: line {before + 1}, {lines[0].strip()[:60]!r}, may be a header or the first row. "
            "Say which: --header yes or --header no (header=True or False)."
        )
    if header and not below:
        raise DataError(f"{path} has a header and no rows. Check the file.")
    columns, left_out = _columns(path, first, below, header)
    target = None if request.kind == "unlabelled" else _target_column(path, request.target, columns, header, left_out)
    features = len(columns) - len({*left_out} - {target}) - (target is not None)
    if features < 1:
        raise DataError(f"{path} has one column, {lines[0].strip()[:60]!r}. A table needs features and a target.")
    left_out = tuple(i for i in left_out if i != target)
    first_line = before + 1 + (header_lines if header else 0)
    return Table(path, separator, before + header, first_line, columns, target, header, left_out)


def _first_lines(path: Path) -> tuple[int, list[str]]:
    """(number of blank lines before it, the first lines from the first that is not blank)."""
    before, size = 0, 0
    lines: list[str] = []
    with (
        open_binary(path) as file,
        io.TextIOWrapper(io.BufferedReader(bounded(path, file)), "utf-8-sig", newline="") as text,
    ):
        for line in text:
            if not lines and not line.strip():
                before += 1
                continue
            lines.append(line)
            size += len(line)
            if len(lines) > 2 * _SAMPLE_RECORDS or (len(lines) > 1 and size > _SAMPLE_BYTES):
                # the last record may go on in a line that was not read
                lines.pop()
                break
    if not lines:
        raise DataError(f"{path} is empty. Check the file.")
    return before, lines


def bounded(path: Path, file: IO[bytes]) -> BoundedStream:
    """The bytes of a table; DataError where a line or a quoted field does not end."""
    size = format_bytes(BLOCK_BYTES)
    return BoundedStream(
        file, f"{path}: a line, a quoted field or a block of lines takes more than {size} of text. Check the file."
    )


def _separator(lines: Sequence[str]) -> str:
    """The separator that gives equally many fields to all of the first records, the most of them; else to most records."""
    widths = {s: [len(r) for r in _first_records(lines, s, 10)] for s in "\t;,"}
    # the names of columns may be one fewer than the fields below
    equal = {s: w[-1] for s, w in widths.items() if w[-1] > 1 and len(set(w[1:])) <= 1 and w[0] in (w[-1], w[-1] - 1)}
    if ";" in equal and not any(re.search(r"(^|\D),|,(\D|$)", line.strip()) for line in lines[1:10]):
        return ";"  # the commas are those of numbers
    likely = equal or {s: statistics.mode(w) for s, w in widths.items()}
    best = max(likely, key=lambda s: likely[s])
    return best if likely[best] > 1 else BLANKS


def _first_records(lines: Sequence[str], separator: str, most: int) -> list[list[str]]:
    """The fields of the first records by this separator, up to one that cannot be read."""
    records: list[list[str]] = []
    with contextlib.suppress(csv.Error):
        for record in csv.reader(lines, delimiter=separator, skipinitialspace=True):
            if record:
                records.append(record)
            if len(records) == most:
                break
    return records or [[""]]


def _records(path: Path, lines: Sequence[str], separator: str) -> tuple[list[list[str]], int]:
    """(the fields of the first records, without blanks around them; how many lines the first takes)."""
    blanks = separator == BLANKS
    reader = csv.reader(
        (line.rstrip(" \r\n") + "\n" for line in lines) if blanks else lines,
        delimiter=" " if blanks else separator,
        skipinitialspace=True,
    )
    records: list[list[str]] = []
    first_lines = 1
    try:
        for record in reader:
            if records and not any(field.strip() for field in record):
                continue
            records.append([field.strip() for field in record])
            if len(records) == 1:
                first_lines = reader.line_num
            if len(records) > _SAMPLE_RECORDS:
                break
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}. Check the file.") from error
    return records or [[""]], first_lines


def _is_header(first: list[str], below: list[list[str]]) -> bool | None:
    """Whether the first record holds names; None where it has signs of names and of data.

    Words over numbers are names. Numbers over numbers, unless they count the columns, and words that come again below are data.
    """
    if not below:
        return not any(map(is_number, first))
    width = max(map(len, below))
    aligned = [""] * max(0, width - len(first)) + first
    numbers: list[str] = []
    words = alone = repeated = numbers_over_words = fractions = False
    for name, *column in zip(aligned, *(r + [""] * (width - len(r)) for r in below), strict=False):
        values = [v for v in column if v.lower() not in MISSING]
        numeric = [is_number(v) for v in values]
        if name.lower() in _NO_NAMES:
            continue
        if not is_number(name):
            words = words or (bool(values) and all(numeric))
            repeated = repeated or (name in values and not all(numeric))
            alone = alone or name not in values
        elif values and (all(numeric) or not any(numeric)):
            numbers.append(name)
            numbers_over_words = numbers_over_words or not any(numeric)
            fractions = fractions or (all(numeric) and not all(map(_is_whole, values)))
    if words and not numbers:
        # a mark of a missing value is no name
        return None if any(name and name.lower() in _NO_NAMES for name in first) else True
    if words or numbers_over_words:
        return True if _count_columns(numbers, 3 - numbers_over_words) and not repeated else None
    if not numbers:
        return not repeated and not any(map(is_number, first)) and not any(v.lower() in _NO_NAMES for v in first)
    if repeated or not _are_whole_steps(numbers, alone, fractions):
        return False
    # 0, 1, 2, ... over fractions: so pandas writes the names of columns that have none
    return True if fractions and _count_columns(numbers, 3, first=("0",)) else None


def _are_whole_steps(names: list[str], alone: bool, fractions: bool) -> bool:
    """Whether numbers over numbers may be names: years, or 0, 1, 2, ..., or whole numbers over fractions beside a word of its own."""
    if len(names) < 2 or not all(map(_is_whole, names)) or len(set(names)) < len(names):
        return False
    steps = {int(b) - int(a) for a, b in itertools.pairwise(names)}
    in_steps = len(names) > 2 and len(steps) == 1
    if alone:
        return fractions or in_steps
    return in_steps and (fractions or names[0] == "0")


def _is_whole(value: str) -> bool:
    """Whether a field is an integer."""
    return value.lstrip("-+").isdecimal()


def _count_columns(names: list[str], least: int, first: tuple[str, ...] = ("0", "1")) -> bool:
    """Whether at least so many names count 0, 1, 2, ... or 1, 2, 3, ..."""
    if len(names) < least or names[0] not in first:
        return False
    start = int(names[0])
    return names == [str(i) for i in range(start, start + len(names))]


def _columns(
    path: Path, first: list[str], below: list[list[str]], header: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(names of the columns, those of them that are no features); DataError where a header has more or fewer names than rows."""
    if not header:
        width = len(first)
        empty = width > 2 and all(len(r) == width and not r[-1] for r in (first, *below))
        return tuple(map(str, range(width))), (width - 1,) if empty else ()
    width = len(below[0])
    equal = [r for r in below if len(r) == width]
    empty = width > 2 and all(not r[-1] for r in equal)
    if len(first) == width:
        named = first[0] in _ROW_NAMES and _name_rows([r[0] for r in equal])
        last = (width - 1,) if empty and not first[-1] else ()
        return tuple(first), ((0,) if named else ()) + last
    if len(first) == width - 1:
        if empty:
            return (*first, ""), (width - 1,)
        # R's write.table leaves the column of row names without a name
        return ("", *first), (0,)
    raise DataError(
        f"{path} has {len(first)} names in its header and {width} fields in the line below. "
        "Give every column one name, or pass --header no (header=False)."
    )


def _name_rows(values: list[str]) -> bool:
    """Whether the values of a column can be names or numbers of rows: words, or whole numbers, each of them once."""
    return not any(map(is_number, values)) or (all(map(str.isdigit, values)) and len(set(values)) == len(values))


def is_number(field: str) -> bool:
    """Whether a field reads as a number, be it with commas."""
    return _NUMBER.fullmatch(field) is not None


def _target_column(
    path: Path, target: str | int | None, columns: tuple[str, ...], header: bool, left_out: tuple[int, ...]
) -> int:
    """The number of the target's column; DataError where there is no such column, or more than one of that name."""
    if target is None:
        return max(i for i in range(len(columns)) if i not in left_out or len(columns) == len(left_out))
    if isinstance(target, str):
        if header and columns.count(target) > 1:
            raise DataError(f"{path} has {columns.count(target)} columns {target!r}. Name the target by its number.")
        if header and target in columns:
            return columns.index(target)
        if not re.fullmatch(r"-?\d+", target):
            advice = (
                nearest(target, columns)
                if header
                else f"; it has no header: give a number from 0 to {len(columns) - 1}"
            )
            raise DataError(f"{path} has no column {target!r}{advice}")
    index = int(target)
    if not -len(columns) <= index < len(columns):
        raise DataError(
            f"{path} has {len(columns)} columns, no column {index}. Give 0 to {len(columns) - 1}, or -1 for the last."
        )
    return index % len(columns)
