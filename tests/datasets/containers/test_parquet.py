"""Parquet: columns, types, parts, the index of pandas, lists, what is refused, and the memory that reading takes."""

from __future__ import annotations

import decimal
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from import_examples import everything, generator, refused
from pyarrow import parquet

from ntkdask.datasets import import_dataset


def written(path: Path, **columns) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def test_a_table(tmp_path: Path) -> None:
    a, b = generator(1).standard_normal(50), generator(2).integers(0, 9, 50)
    path = written(tmp_path / "a.parquet", a=a, b=b.astype(np.uint8), c=b > 4, species=[f"é{v % 3}" for v in b])
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    x, targets = everything(dataset)
    np.testing.assert_array_equal(x, np.stack([a, b, b > 4], axis=1))
    assert (dataset.class_names, targets.tolist()) == (("é0", "é1", "é2"), (b % 3).tolist())
    assert dataset.provenance["target"] == "species"
    for target in ("a", 0, "-3"):
        numbers = import_dataset(
            str(written(tmp_path / "b.parquet", a=a, b=b, c=b)), str(tmp_path / "r"), target=target, overwrite=True
        )
        assert numbers["all"].kind == "regression"
        np.testing.assert_array_equal(everything(numbers["all"])[1], a)


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        (pa.array([2**53 + 1, 2**53]), "classification", (str(2**53), str(2**53 + 1))),
        (pa.array([2**64 - 1, 2], pa.uint64()), "classification", ("2", str(2**64 - 1))),
        (pa.array([True, False]), "classification", ("0", "1")),
        (pa.array(["u", "v"]).dictionary_encode(), "classification", ("u", "v")),
        (pa.array([1.0, 2.0]), "regression", None),
        (pa.array([decimal.Decimal("1.25"), decimal.Decimal("2.50")]), "regression", None),
    ],
)
def test_types_of_targets(tmp_path: Path, values: pa.Array, kind: str, stored) -> None:
    x = np.ones(2, np.float32)
    dataset = import_dataset(str(written(tmp_path / "a.parquet", x=x, y=values)), str(tmp_path / "d"))["all"]
    assert (dataset.kind, dataset.class_names, dataset.dtype) == (kind, stored, "float32")


def test_the_index_of_pandas_is_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "y": [0, 1, 0]}, index=[7, 5, 9])
    frame.to_parquet(tmp_path / "a.parquet")
    dataset = import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "d"))["all"]
    assert (dataset.row_shape, everything(dataset)[1].tolist()) == ((1,), [0, 1, 0])
    assert dataset.provenance["columns_left_out"] == ["__index_level_0__"]


def test_a_column_of_lists(tmp_path: Path) -> None:
    x = generator(3).standard_normal((6, 4)).astype(np.float32)
    for i, kind in enumerate((pa.list_(pa.float32()), pa.list_(pa.float32(), 4))):
        path = written(tmp_path / "a.parquet", url=["u"] * 6, rows=pa.array(x.tolist(), kind), y=[0, 1] * 3)
        refused(path, tmp_path / "d", "column 'url' holds string.*--rows")
        dataset = import_dataset(str(path), str(tmp_path / f"list{i}"), rows="rows")["all"]
        np.testing.assert_array_equal(everything(dataset)[0], x)
    path = written(tmp_path / "b.parquet", rows=pa.array([[1.0], [1.0, 2.0]]), y=[0, 1])
    refused(path, tmp_path / "e", "lists of .* values. Give one length")


def test_a_folder_in_parts(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for name, label in (("train-00000-of-00002", 3), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)):
        written(folder / f"{name}.parquet", a=np.full(4, label), b=np.ones(4), y=np.full(4, label))
    parts = import_dataset(str(folder), str(tmp_path / "d"))
    assert {name: part.n for name, part in parts.items()} == {"train": 8, "test": 4}
    assert everything(parts["train"])[0][:, 0].tolist() == [3] * 4 + [1] * 4
    assert parts["test"].class_names == ("1", "2", "3")
    written(folder / "more.parquet", a=np.ones(4), b=np.ones(4), y=np.ones(4))
    refused(folder, tmp_path / "e", "files of the parts test, train and others")
    (folder / "more.parquet").unlink()
    written(folder / "test-00001.parquet", a=np.ones(4))
    refused(folder, tmp_path / "e", "other columns than")


def test_tables_that_are_refused(tmp_path: Path) -> None:
    url, ones = tmp_path / "d", np.ones(3)
    for columns, words in (
        ({"a": [1.0, None, 2.0], "y": [0, 1, 0]}, "missing in row 1 of column 'a'"),
        ({"a": ones, "y": ["u", "v", None]}, "missing in row 2 of column 'y'"),
        ({"a": ["1,5", "2", "3"], "y": [0, 1, 0]}, "column 'a' holds string; features are numbers"),
        ({"a": ones, "y": pa.array([0, 1, 2], pa.timestamp("s"))}, "the target holds timestamp"),
        ({"y": ones}, "one column"),
    ):
        refused(written(tmp_path / "a.parquet", **columns), url, words)
    whole = written(tmp_path / "a.parquet", a=ones, y=ones)
    refused(whole, url, "did you mean 'a'", target="aa")
    refused(whole, url, "2 columns, no column 5", target=5)
    content = whole.read_bytes()
    for damaged in (content[:30], content[:-1], content[:20] + b"\xff" * 20 + content[40:]):
        whole.write_bytes(damaged)
        refused(whole, url, "truncated")
    whole.write_bytes(b"<!doctype html>")
    refused(whole, url, "not what its name says")


def test_memory_is_bounded(tmp_path: Path) -> None:
    columns = {f"c{i}": np.zeros(60_000) + i for i in range(64)}  # 31 MB
    path = written(tmp_path / "a.parquet", **columns)
    before, peak = pa.total_allocated_bytes(), []
    tracemalloc.start()
    import_dataset(str(path), str(tmp_path / "d"), progress=lambda *_: peak.append(pa.total_allocated_bytes() - before))
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(peak) + traced < 28 * 2**20
