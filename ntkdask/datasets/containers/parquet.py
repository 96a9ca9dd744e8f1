"""Parquet tables, a file or a folder of them, read by pyarrow in batches of rows. A column is a feature, as in a text table.

The target is the last column unless `target` names another. Its type decides: text, integers, bool and categories are classes, floats
regression. Features are numbers, float32 where all of them are, else float64; or one column of lists of equal length. The index that
pandas stores is left out. In a folder, files whose names or folders begin with train, validation or test make parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from ntkdask.datasets.source import ALL, PARTS, Batch, Request, Source, file_digest, files_under, part_of, reading
from ntkdask.errors import DataError, nearest

_CELLS = 2**18
_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class _Columns:
    """Which columns are features, and which is the target."""

    features: tuple[str, ...]
    target: str | None
    dtype: np.dtype


def open_source(path: Path, request: Request) -> Source:
    """The rows of the Parquet file, or of the folder of files, at `path`."""
    with reading(path):
        files = _files(path)
        schema = _opened(files[0][1]).schema_arrow
        columns, left_out = _columns(path, schema, request)
        total = 0
        for _, file in files:
            opened = _opened(file)
            if not opened.schema_arrow.equals(schema):
                raise DataError(f"{file} has other columns than {files[0][1]}. Give files of one table.")
            total += opened.metadata.num_rows
    notes: dict[str, object] = {"target": columns.target} if columns.target is not None else {}
    if left_out:
        notes["columns_left_out"] = left_out
    return Source(_batches(files, columns), file_digest(path), kind=request.kind, total=total, notes=notes)


def _files(path: Path) -> list[tuple[str, Path]]:
    """(part, file), parts in their order; DataError where some files are of no part and others are."""
    if not path.is_dir():
        return [(ALL, path)]
    found = [(_part(name), file) for name, file in files_under(path) if file.suffix.lower() in _SUFFIXES]
    parts = {part for part, _ in found}
    if not found:
        raise DataError(f"{path} holds no Parquet files. Check the folder.")
    if ALL in parts and len(parts) > 1:
        raise DataError(f"{path} holds files of the parts {', '.join(sorted(parts - {ALL}))} and others. Sort them.")
    return sorted(found, key=lambda entry: (*PARTS, ALL).index(entry[0]))


def _part(name: str) -> str:
    """The part that a file belongs to, by the first word of its name or by a folder: train-00000-of-00002.parquet."""
    *folders, last = name.split("/")
    named = [part_of(word) for word in (*folders, re.split(r"[-_.]", last)[0])]
    return next((part for part in named if part is not None), ALL)


def _opened(file: Path) -> parquet.ParquetFile:
    """A file, its footer read."""
    try:
        return parquet.ParquetFile(file)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{file} is truncated, damaged or no Parquet file ({error}). Download it again.") from error


def _columns(path: Path, schema: pa.Schema, request: Request) -> tuple[_Columns, list[str]]:
    """(features and target, columns that are left out); DataError for columns that are no numbers."""
    names = list(schema.names)
    index = [n for n in _index_columns(schema) if n in names]
    target = None if request.kind == "unlabelled" else _target(path, names, index, request.target)
    left_out = [n for n in index if n != target]
    features = [n for n in names if n != target and n not in left_out]
    if request.rows is not None:
        if request.rows not in features:
            raise DataError(f"{path} has no column {request.rows!r} for rows{nearest(request.rows, features)}")
        left_out += [n for n in features if n != request.rows]
        features = [request.rows]
    if not features:
        raise DataError(f"{path} has one column, {names}. A table needs features and a target.")
    types = [schema.field(n).type for n in features]
    if len(features) == 1 and _is_list(types[0]):
        types = [types[0].value_type]
    for name, kind in zip(features, types, strict=True):
        if not _is_number(kind):
            raise DataError(
                f"{path}: column {name!r} holds {kind}; features are numbers. Encode that column as numbers, remove it, name it as "
                "the target, or name one column of lists with --rows."
            )
    small = all(pa.types.is_float32(t) or pa.types.is_float16(t) for t in types)
    return _Columns(tuple(features), target, np.dtype(np.float32 if small else np.float64)), left_out


def _target(path: Path, names: list[str], index: list[str], target: str | int | None) -> str:
    """The name of the target's column."""
    if target is None:
        return [n for n in names if n not in index or len(names) == len(index)][-1]
    if isinstance(target, str) and target in names:
        return target
    if not re.fullmatch(r"-?\d+", str(target)):
        raise DataError(f"{path} has no column {target!r}{nearest(str(target), names)}")
    if not -len(names) <= int(target) < len(names):
        raise DataError(f"{path} has {len(names)} columns, no column {target}. Give 0 to {len(names) - 1}, or a name.")
    return names[int(target)]


def _index_columns(schema: pa.Schema) -> list[str]:
    """The columns in which pandas stored its index."""
    try:
        described = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        return []
    return [name for name in described if isinstance(name, str)]


def _is_number(kind: pa.DataType) -> bool:
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _batches(files: list[tuple[str, Path]], columns: _Columns) -> Iterator[Batch]:
    """The rows of the files in batches."""
    wanted = [*columns.features, *([] if columns.target is None else [columns.target])]
    for part, file in files:
        first = 0
        opened = _opened(file)
        rows = max(1, _CELLS // len(wanted))
        if _is_list(opened.schema_arrow.field(columns.features[0]).type):
            rows = 256
        with reading(file):
            try:
                for batch in opened.iter_batches(batch_size=rows, columns=wanted):
                    _require_complete(file, batch, first)
                    targets = None if columns.target is None else _values(file, batch.column(columns.target))
                    yield Batch(part, _features(file, batch, columns), targets)
                    first += batch.num_rows
            except pa.ArrowException as error:
                raise DataError(f"{file} is truncated or damaged ({error}); download it again.") from error


def _features(file: Path, batch: pa.RecordBatch, columns: _Columns) -> np.ndarray:
    """The features of a batch (b, d)."""
    first = batch.column(columns.features[0])
    if not _is_list(first.type):
        out = np.empty((batch.num_rows, len(columns.features)), columns.dtype)
        for i, name in enumerate(columns.features):
            out[:, i] = _numbers(batch.column(name))
        return out
    lengths = pc.unique(pc.list_value_length(first)).to_pylist()
    if len(lengths) != 1:
        raise DataError(f"{file}: column {columns.features[0]!r} holds lists of {lengths[:5]} values. Give one length.")
    inside = first.flatten()
    if inside.null_count:
        raise DataError(f"{file}: column {columns.features[0]!r} holds lists with missing values. Impute them.")
    return _numbers(inside).astype(columns.dtype).reshape(batch.num_rows, lengths[0])


def _numbers(column: pa.Array) -> np.ndarray:
    """A column of numbers as an array."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    return column.to_numpy(zero_copy_only=False)


def _values(file: Path, column: pa.Array) -> np.ndarray:
    """The target's column: integers, floats, or text; decimal numbers as floats, categories as their names."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return np.asarray(column.to_pylist(), dtype=str)
    if not _is_number(kind):
        raise DataError(f"{file}: the target holds {kind}. Give text, integers or floats; name another with --target.")
    return _numbers(column)


def _require_complete(file: Path, batch: pa.RecordBatch, first: int) -> None:
    """DataError, with the row and the column, where a value is missing."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count:
            row = first + pc.index(pc.is_null(column), True).as_py()
            raise DataError(
                f"{file}: a value is missing in row {row} of column {name!r}. Remove that row or impute it."
            )
