"""Text tables: CSV and its relatives (commas, semicolons, tabs, blanks), compressed or not; an example a line.

All columns but the target hold numbers (float64). The target is the last column unless `target` names another: text
and integers are classes, other numbers regression. A first pass over the target's column finds out which. `table_layout` finds
the header; a column that names or counts the rows, as pandas and R write it, is left out.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ntkdask.datasets.source import ALL, Batch, Request, Source, file_digest, open_binary, reading
from ntkdask.datasets.table_layout import MISSING, Table, bounded, find_layout
from ntkdask.datasets.targets import EXACT
from ntkdask.errors import DataError

_CELLS = 2**18
_NAMED_LINES = 5
_READ_BYTES = 2**18
# a comma, an apostrophe or a blank among digits, a sign of money or per cent: numbers that are not written as numbers
_NEARLY_NUMBER = re.compile(r"[-+\u2212]?[$€£]?\s?\d[\d\s.,'’_]*([eE][-+]?\d+)?\s?[%€$£]?")
_ADVICE = "Write numbers with a decimal point and nothing else (1234.5)"


def open_source(path: Path, request: Request) -> Source:
    """The rows of the table at `path`."""
    with reading(path):
        table = find_layout(path, request)
        if table.target is not None:
            table = replace(table, style=_target_style(table, request.kind))
            if request.kind == "regression" and table.style == "text":
                where = table.label(table.target)
                raise DataError(f"{path}: the target, column {where}, holds text; regression takes numbers.")
    return Source(_batches(table), file_digest(path), kind=request.kind, notes=_notes(table))


def _notes(table: Table) -> dict[str, Any]:
    """What the provenance says of the layout."""
    notes: dict[str, Any] = {"header": table.header}
    if table.target is not None:
        notes["target"] = table.columns[table.target] if table.header else table.target
        notes["target_column"] = f"{table.target} of {len(table.columns)}, counted from 0"
    if table.left_out:
        notes["columns_left_out"] = [table.columns[i] or i for i in table.left_out]
    return notes


def _chunks(table: Table, only_target: bool = False) -> Iterator[pd.DataFrame]:
    """The table in data frames of some MiB: features as pandas reads them, the target as text, line numbers as the index."""
    width = len(table.columns)
    names = list(range(width))
    missing = {i: [m for word in MISSING for m in (word, word.upper(), word.title(), "NaN")] for i in names}
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
                skiprows=table.skip,
                skip_blank_lines=False,
                index_col=False,
                na_values=missing,
                keep_default_na=False,
                skipinitialspace=True,
                encoding="utf-8-sig",
                low_memory=False,
                chunksize=max(1, _CELLS // width),
            )
            while (frame := _next_chunk(chunks)) is not None:
                frame.index += table.first_line
                blank = frame.isna().all(axis=1)
                if not blank.all():
                    yield frame[~blank] if blank.any() else frame
                block.refill()
        except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
            reason = str(error).strip()
            raise DataError(f"{table.path}: {reason}. Every line needs {width} fields, as the first has.") from error


def _next_chunk(chunks: Iterator[pd.DataFrame]) -> pd.DataFrame | None:
    """The next data frame. pandas only warns where the first row is longer than the others: here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(chunks, None)


def _target_style(table: Table, kind: str | None) -> str:
    """What the target's column holds: "text", "integer" or "number"; reading ends when that is known."""
    where = table.label(table.target)
    for frame in _chunks(table, only_target=True):
        words = frame[table.target].dropna().str.strip()
        numbers = pd.to_numeric(words, errors="coerce")
        # 1e20 is a number, 100000000000000000000 an integer that no 64 bits hold
        large = _beyond_float(numbers) & numbers.notna()
        fractions = numbers.notna() & (numbers != np.rint(numbers))
        if large.any():
            fractions |= large & words.str.contains("[.eEfF]", regex=True)
        text = numbers.isna() & ~words.str.lower().isin(MISSING)
        if text.any() and fractions.any():
            line = words.index[text.to_numpy()][0]
            raise DataError(
                f"{table.path}: the target, column {where}, holds numbers, but {words[line]!r} in line {line}."
            )
        if text.any():
            _require_words(table, words[text], kind)
            return "text"
        if fractions.any() or (large.any() and kind == "regression"):
            return "number"
        if large.any() and kind == "classification":
            return "text"
        if large.any():
            line = words.index[large.to_numpy()][0]
            raise DataError(
                f"{table.path}: the target, column {where}, holds {words[line]!r} in line {line}, an integer that would lose "
                "digits. Pass --kind classification for labels, --kind regression for numbers."
            )
    return "integer"


def _beyond_float(numbers: pd.Series) -> pd.Series:
    """Where float64 stands for more than one integer; nowhere in a column of integers."""
    return (numbers.abs() >= EXACT) & (numbers.dtype.kind == "f")


def _require_words(table: Table, words: pd.Series, kind: str | None) -> None:
    """DataError where text is made of numbers that are written with commas, blanks or signs, unless labels were asked for."""
    if kind == "classification" or not words.map(lambda w: _NEARLY_NUMBER.fullmatch(w) is not None).all():
        return
    line = words.index[0]
    raise DataError(
        f"{table.path}: the target, column {table.label(table.target)}, holds {words[line]!r} in line {line}, which is not read as "
        f"a number. {_ADVICE}, or pass --kind classification for labels."
    )


def _batches(table: Table) -> Iterator[Batch]:
    """The rows of the table in batches."""
    last = len(table.columns) - 1
    with reading(table.path):
        for frame in _chunks(table):
            if last in table.left_out and frame[last].notna().any():
                line = frame.index[frame[last].notna().to_numpy()][0]
                raise DataError(
                    f"{table.path}: line {line} has a value in the last column, which is empty above. Remove that column."
                )
            if table.left_out:
                frame = frame.drop(columns=list(table.left_out))
            frame = _numbers(table, frame)
            _require_complete(table, frame)
            targets = None
            if table.target is not None:
                targets = _targets(table, frame[table.target])
                frame = frame.drop(columns=table.target)
            yield Batch(ALL, frame.to_numpy(np.float64), targets)


def _targets(table: Table, words: pd.Series) -> np.ndarray:
    """The target's column as text, integers or float64; DataError for text in a column of numbers."""
    words = words.str.strip()
    if table.style == "text":
        return words.to_numpy(str)
    numbers = pd.to_numeric(words, errors="coerce")
    if numbers.isna().any():
        line = words.index[numbers.isna().to_numpy()][0]
        where = table.label(table.target)
        raise DataError(f"{table.path}: the target, column {where}, holds numbers, but {words[line]!r} in line {line}.")
    if table.style == "number":
        return numbers.to_numpy(np.float64)
    return numbers.to_numpy() if numbers.dtype.kind in "iu" else numbers.to_numpy(np.int64)


def _numbers(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with features as numbers; DataError, with its line, for a feature that is none."""
    for column in frame.columns:
        if column == table.target or pd.api.types.is_numeric_dtype(frame[column]):
            continue
        words = frame[column].dropna()
        # pandas leaves integers of more than 64 bits as they are
        numbers = pd.to_numeric(words.astype(str), errors="coerce")
        if numbers.isna().any():
            line = words.index[numbers.isna().to_numpy()][0]
            advice = "Encode that column as numbers, remove it, or name it as the target."
            if _NEARLY_NUMBER.fullmatch(str(words[line]).strip()):
                advice = f"{_ADVICE}."
            raise DataError(
                f"{table.path}: column {table.label(column)} holds {words[line]!r} in line {line}; features are numbers. "
                f"{advice}"
            )
        frame = frame.copy()
        frame[column] = numbers.astype(np.float64)
    return frame


def _require_complete(table: Table, frame: pd.DataFrame) -> None:
    """DataError, with lines and columns, where values are missing."""
    missing = frame.isna()
    if not missing.to_numpy().any():
        return
    lines = frame.index[missing.any(axis=1).to_numpy()]
    named = ", ".join(str(line) for line in lines[:_NAMED_LINES]) + (" and more" if len(lines) > _NAMED_LINES else "")
    columns = ", ".join(table.label(c) for c in frame.columns[missing.any().to_numpy()][:_NAMED_LINES])
    raise DataError(
        f"{table.path}: values are missing in line{'s' if len(lines) > 1 else ''} {named} (columns: {columns}). "
        "Remove those lines or impute them."
    )
