"""Text tables: CSV and its relatives (commas, semicolons, tabs, blanks), compressed or not; an example a line.

All columns but the target hold numbers (float64). The target is the last column unless `target` names another: text
and integers are classes, other numbers regression. A first pass over the target's column finds out which.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from ntkdask.datasets.bounds import BLOCK_BYTES, BoundedStream
from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, open_binary, reading
from ntkdask.errors import DataError, nearest
from ntkdask.wording import format_bytes

_CELLS = 2**18
MAX_COLUMNS = 2**18
_MISSING = ("", "nan", "na", "n/a", "null", "#n/a")
_NAMED_LINES = 5
_READ_BYTES = 2**18


@dataclass(frozen=True)
class Table:
    """How a text table is laid out.

    Parameters
    ----------
    path : Path
        The file.
    separator : str
        ",", ";", a tab, or the regular expression of blanks.
    first_line : int
        Number of the first line of data, counted from 1.
    columns : tuple of str
        Their names in the header; their numbers where there is none.
    target : int or None
        Number of the target's column; None without targets.
    style : str, optional
        What the target's column holds: "text", "integer" or "number".
    """

    path: Path
    separator: str
    first_line: int
    columns: tuple[str, ...]
    target: int | None
    style: str | None = None


def open_source(path: Path, request: Request) -> Source:
    """The rows of the table at `path`."""
    with reading(path):
        table = _sniff(path, request)
        if table.target is not None:
            table = replace(table, style=_target_style(table))
            if request.kind == "regression" and table.style == "text":
                where = _label(table, table.target)
                raise DataError(f"{path}: the target, column {where}, holds text; regression takes numbers.")
    return Source(_batches(table), file_digest(path), kind=request.kind)


def _sniff(path: Path, request: Request) -> Table:
    """The layout of the table, from its first two lines and what was asked for."""
    with open_binary(path) as file, io.TextIOWrapper(io.BufferedReader(bounded(path, file)), "utf-8-sig") as text:
        lines = ((i, line) for i, line in enumerate(text, start=1) if line.strip())
        number, first = next(lines, (0, ""))
        second = next(lines, (0, ""))[1]
    if not first:
        raise DataError(f"{path} is empty. Check the file.")
    separator = max(",;\t", key=first.count)
    separator = separator if separator in first else r"\s+"
    width = len(first.split(None, MAX_COLUMNS)) if separator == r"\s+" else first.count(separator)
    if width > MAX_COLUMNS:
        raise DataError(f"{path} has more than {MAX_COLUMNS:,} columns. Save such rows with np.save or np.savez.")
    fields, below = _fields(first, separator), _fields(second, separator)
    header = _is_header(fields, below)
    if header and not second:
        raise DataError(f"{path} has a header and no rows. Check the file.")
    columns = tuple(fields) if header else tuple(str(i) for i in range(len(fields)))
    target = None if request.kind == "unlabelled" else _target_column(path, request.target, columns, header)
    if len(columns) < (1 if target is None else 2):
        raise DataError(f"{path} has one column, {first.strip()[:60]!r}. A table needs features and a target.")
    return Table(path, separator, number + header, columns, target)


def bounded(path: Path, file: IO[bytes]) -> BoundedStream:
    """The bytes of a table; DataError where a line or a quoted field does not end."""
    size = format_bytes(BLOCK_BYTES)
    return BoundedStream(
        file, f"{path}: a line, a quoted field or a block of lines takes more than {size} of text. Check the file."
    )


def _fields(line: str, separator: str) -> list[str]:
    """The fields of a line, without blanks around them."""
    if separator == r"\s+":
        return line.split()
    try:
        return [f.strip() for f in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error as error:
        raise DataError(f"its first lines are no table ({error}). Check the file.") from error


def _is_header(first: list[str], second: list[str]) -> bool:
    """Whether the first line is a header: it has text where the second has a number, or text throughout."""
    text = [not _is_number(f) for f in first]
    names = [t and f.lower() not in _MISSING for t, f in zip(text, first, strict=True)]
    return all(text) or any(name and _is_number(f) for name, f in zip(names, second, strict=False))


def _is_number(field: str) -> bool:
    """Whether a field reads as a number."""
    try:
        float(field)
    except ValueError:
        return False
    return True


def _target_column(path: Path, target: str | int | None, columns: tuple[str, ...], header: bool) -> int:
    """The number of the target's column; DataError where there is no such column."""
    if target is None:
        return len(columns) - 1
    if isinstance(target, str):
        if header and target in columns:
            return columns.index(target)
        if not target.lstrip("-").isdigit():
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


def _chunks(table: Table, only_target: bool = False) -> Iterator[pd.DataFrame]:
    """The table in data frames of some MiB: features as pandas reads them, the target as text, line numbers as the index."""
    width = len(table.columns)
    names = list(range(width))
    missing = {i: [m for word in _MISSING for m in (word, word.upper(), word.title(), "NaN")] for i in names}
    if table.target is not None:
        missing[table.target] = [""]
    with open_binary(table.path) as file:
        block = bounded(table.path, file)
        stream = io.BufferedReader(block, _READ_BYTES)
        try:
            chunks = pd.read_csv(
                stream,
                sep=table.separator,
                header=None,
                names=names,
                usecols=[table.target] if only_target else None,
                dtype={table.target: str} if table.target is not None else None,
                skiprows=table.first_line - 1,
                skip_blank_lines=False,
                index_col=False,
                na_values=missing,
                keep_default_na=False,
                skipinitialspace=True,
                encoding="utf-8-sig",
                chunksize=max(1, _CELLS // width),
            )
            for frame in chunks:
                frame.index += table.first_line
                blank = frame.isna().all(axis=1)
                if not blank.all():
                    yield frame[~blank] if blank.any() else frame
                block.refill()
        except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
            reason = str(error).strip()
            raise DataError(f"{table.path}: {reason}. Every line needs {width} fields, as the first has.") from error


def _target_style(table: Table) -> str:
    """What the target's column holds: "text", "integer" or "number"; reading ends when that is known."""
    where = _label(table, table.target)
    for frame in _chunks(table, only_target=True):
        words = frame[table.target].dropna().str.strip()
        numbers = pd.to_numeric(words, errors="coerce")
        fractions = numbers.notna() & (numbers != np.rint(numbers))
        text = numbers.isna() & ~words.str.lower().isin(_MISSING)
        if text.any() and fractions.any():
            line = words.index[text.to_numpy()][0]
            raise DataError(
                f"{table.path}: the target, column {where}, holds numbers, but {words[line]!r} in line {line}."
            )
        if text.any():
            return "text"
        if fractions.any():
            return "number"
    return "integer"


def _batches(table: Table) -> Iterator[Batch]:
    """The rows of the table in batches."""
    with reading(table.path):
        for frame in _chunks(table):
            _require_numbers(table, frame)
            _require_complete(table, frame)
            targets = None
            if table.target is not None:
                targets = _targets(table, frame[table.target])
                frame = frame.drop(columns=table.target)
            yield Batch(ALL, frame.to_numpy(np.float64), targets)


def _targets(table: Table, words: pd.Series) -> np.ndarray:
    """The target's column as text, int64 or float64; DataError for text in a column of numbers."""
    words = words.str.strip()
    if table.style == "text":
        return words.to_numpy(str)
    numbers = pd.to_numeric(words, errors="coerce")
    if numbers.isna().any():
        line = words.index[numbers.isna().to_numpy()][0]
        where = _label(table, table.target)
        raise DataError(f"{table.path}: the target, column {where}, holds numbers, but {words[line]!r} in line {line}.")
    values = numbers.to_numpy(np.float64)
    return values.astype(np.int64) if table.style == "integer" and np.isfinite(values).all() else values


def _require_numbers(table: Table, frame: pd.DataFrame) -> None:
    """DataError, with its line, for a feature that is no number."""
    for column in frame.columns:
        if column == table.target or pd.api.types.is_numeric_dtype(frame[column]):
            continue
        words = frame[column].dropna()
        line = words.index[pd.to_numeric(words.astype(str), errors="coerce").isna().to_numpy()][0]
        raise DataError(
            f"{table.path}: column {_label(table, column)} holds {words[line]!r} in line {line}; features are numbers. "
            "Encode that column as numbers, remove it, or name it as the target."
        )


def _require_complete(table: Table, frame: pd.DataFrame) -> None:
    """DataError, with lines and columns, where values are missing."""
    missing = frame.isna()
    if not missing.to_numpy().any():
        return
    lines = frame.index[missing.any(axis=1).to_numpy()]
    named = ", ".join(str(line) for line in lines[:_NAMED_LINES]) + (" and more" if len(lines) > _NAMED_LINES else "")
    columns = ", ".join(_label(table, c) for c in frame.columns[missing.any().to_numpy()][:_NAMED_LINES])
    raise DataError(
        f"{table.path}: values are missing in line{'s' if len(lines) > 1 else ''} {named} (columns: {columns}). "
        "Remove those lines or impute them."
    )


def _label(table: Table, column: int | None) -> str:
    """A column's name for messages."""
    return "" if column is None else repr(table.columns[column])
