"""Datasets in Zarr: what is written is read, batches do not matter, damage and half-written stores are noticed."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ntkdask import store
from ntkdask.datasets import Dataset, open_dataset, open_parts, write_dataset
from ntkdask.datasets.targets import LabelEncoder
from ntkdask.datasets.writer import DatasetWriter, replacing
from ntkdask.errors import DamagedTileError, DataError, InputError


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def numbers(n: int, columns: int = 5, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, columns)).astype(dtype)


def write_in_batches(url: Path, x: np.ndarray, targets: np.ndarray, sizes: list[int]) -> Dataset:
    with replacing(url) as partial:
        writer, start = DatasetWriter(partial), 0
        for size in sizes:
            writer.append(x[start : start + size], targets[start : start + size])
            start += size
        writer.finish({"source": "test"})
    return open_dataset(url)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_rows_come_back_as_they_were(tmp_path: Path, dtype: str) -> None:
    x = (images(37) if dtype == "uint8" else numbers(37)).astype(dtype)
    targets = np.arange(37) % 3
    dataset = write_dataset(tmp_path / "d", x, targets, class_names=["a", "b", "c"])
    assert (dataset.n, dataset.row_shape, dataset.dtype) == (37, x.shape[1:], dtype)
    assert (dataset.kind, dataset.target_shape, dataset.class_names) == ("classification", (), ("a", "b", "c"))
    assert dataset.provenance["counts"] == {"a": 13, "b": 12, "c": 12}
    assert dataset == open_dataset(tmp_path / "d")
    assert hash(dataset) == hash(open_dataset(tmp_path / "d"))
    for start, stop in ((0, 37), (5, 6), (36, 37), (9, 9)):
        np.testing.assert_array_equal(dataset.rows(start, stop), x[start:stop])
        np.testing.assert_array_equal(dataset.targets(start, stop), targets[start:stop])
    assert dataset.rows(0, 2).dtype == dtype
    assert dataset.weights(0, 37) is None


@pytest.mark.parametrize(
    ("given", "stored"), [("float16", "float32"), ("bool", "uint8"), ("int32", "int64"), ("uint16", "int64")]
)
def test_other_dtypes_are_stored_exactly_in_a_wider_one(tmp_path: Path, given: str, stored: str) -> None:
    x = (numbers(9) * 3).astype(given) if given != "uint16" else np.full((9, 2), 65535, np.uint16)
    dataset = write_dataset(tmp_path / "d", x)
    assert dataset.dtype == stored
    assert dataset.provenance["dtype"] == given
    np.testing.assert_array_equal(dataset.rows(0, 9), x.astype(stored))


@pytest.mark.parametrize(
    ("targets", "names", "labels"),
    [
        (np.array(["dog", "cat", "dog", "ant"]), ("ant", "cat", "dog"), [2, 1, 2, 0]),
        (np.array(["dog", "cat", "dog", "ant"], object), ("ant", "cat", "dog"), [2, 1, 2, 0]),
        (np.array([10, -1, 9, 10]), ("-1", "9", "10"), [2, 0, 1, 2]),
        (np.array([True, False, True, True]), ("0", "1"), [1, 0, 1, 1]),
        (np.array([[1], [0], [1], [0]]), ("0", "1"), [1, 0, 1, 0]),
        (np.array([5, 5, 5, 5]), ("5",), [0, 0, 0, 0]),
    ],
)
def test_labels_become_integers_with_names(tmp_path: Path, targets, names, labels) -> None:
    dataset = write_dataset(tmp_path / "d", numbers(4), targets)
    assert dataset.kind == "classification"
    assert dataset.class_names == names
    assert dataset.targets(0, 4).tolist() == labels
    assert dataset.targets(0, 4).dtype == np.int64


def test_float_targets_are_regression_and_weights_travel_along(tmp_path: Path) -> None:
    targets, weights = numbers(20, 3, seed=1), np.linspace(0, 2, 20)
    dataset = write_dataset(tmp_path / "d", numbers(20), targets, weights=weights)
    assert (dataset.kind, dataset.target_shape, dataset.class_names) == ("regression", (3,), None)
    np.testing.assert_array_equal(dataset.targets(3, 20), targets[3:])
    np.testing.assert_array_equal(dataset.weights(3, 20), weights[3:])
    assert dataset.provenance["target_range"] == [targets.min(), targets.max()]
    assert dataset.digest != write_dataset(tmp_path / "e", numbers(20), targets).digest


def test_kind_overrides_the_dtype(tmp_path: Path) -> None:
    x = numbers(4)
    as_numbers = write_dataset(tmp_path / "a", x, np.array([3, 1, 2, 2]), kind="regression")
    assert (as_numbers.kind, as_numbers.targets(0, 4).tolist()) == ("regression", [3.0, 1.0, 2.0, 2.0])
    as_classes = write_dataset(tmp_path / "b", x, np.array([3.0, 1.0, 2.0, 2.0]), kind="classification")
    assert (as_classes.kind, as_classes.targets(0, 4).tolist()) == ("classification", [2, 0, 1, 1])
    assert write_dataset(tmp_path / "c", x, np.full(4, 7.0)).provenance["target_range"] == [7.0, 7.0]


def test_without_targets(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", numbers(4))
    assert (dataset.kind, dataset.target_shape) == ("unlabelled", None)
    with pytest.raises(InputError, match="no targets"):
        dataset.targets(0, 1)
    with pytest.raises(InputError, match="no targets"):
        _ = dataset.y


def test_digest_and_chunks_do_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdask.datasets.writer.CHUNK_BYTES", 1000)  # 25 rows of 40 bytes
    x, targets = numbers(130), np.random.default_rng(3).choice(["z", "k", "a"], 130)
    whole = write_in_batches(tmp_path / "whole", x, targets, [130])
    ones = write_in_batches(tmp_path / "ones", x, targets, [1] * 130)
    ragged = write_in_batches(tmp_path / "ragged", x, targets, [7, 60, 0, 25, 38])
    assert whole.digest == ones.digest == ragged.digest
    for dataset in (whole, ones, ragged):
        assert store.open_array(Path(dataset.url) / "x").chunks == (25, 5)
        assert store.open_array(Path(dataset.url) / "targets").chunks == (25,)
        np.testing.assert_array_equal(dataset.rows(20, 130), x[20:])
        np.testing.assert_array_equal(np.array(dataset.class_names)[dataset.targets(0, 130)], targets)
    x[77, 3] += 1e-12
    assert write_in_batches(tmp_path / "other", x, targets, [130]).digest != whole.digest


def test_chunks_are_about_four_mebibytes(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", np.zeros((3000, 1000), np.float32))
    rows, columns = store.open_array(tmp_path / "d" / "x").chunks
    assert columns == 1000
    assert 3.9 * 2**20 < rows * columns * 4 <= 4 * 2**20
    assert store.open_array(tmp_path / "d" / "x").shape == (dataset.n, 1000)


def test_lazy_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdask.datasets.writer.CHUNK_BYTES", 1000)
    x, targets = numbers(130), np.arange(130) % 4
    dataset = write_dataset(tmp_path / "d", x, targets)
    lazy = dataset.x
    assert lazy.chunks[0] == (25,) * 5 + (5,)
    assert lazy.dtype == np.float64
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), x)
    np.testing.assert_array_equal(lazy[3:99:7, 1].compute(scheduler="synchronous"), x[3:99:7, 1])
    np.testing.assert_array_equal(lazy[::-1].compute(scheduler="synchronous"), x[::-1])
    np.testing.assert_array_equal(lazy[[5, 2, 99]].compute(scheduler="synchronous"), x[[5, 2, 99]])
    np.testing.assert_array_equal(lazy[64].compute(scheduler="synchronous"), x[64])
    np.testing.assert_array_equal(dataset.y.compute(scheduler="synchronous"), targets)
    assert len(pickle.dumps(dataset)) < 2000


def test_dask_input_is_written_block_by_block(tmp_path: Path) -> None:
    import dask
    import dask.array as da

    largest = 0

    def block(block_info=None):
        nonlocal largest
        (start, stop), _ = block_info[None]["array-location"]
        largest = max(largest, stop - start)
        return np.arange(start * 6.0, stop * 6.0).reshape(stop - start, 6)

    x = da.map_blocks(block, chunks=((10, 20, 7), (6,)), dtype=float, meta=np.empty((0, 0)))
    targets = da.from_array(np.arange(37) % 2, chunks=5)
    # in this process, also where an earlier test's client is still open
    with dask.config.set(scheduler="synchronous"):
        dataset = write_dataset(tmp_path / "d", x, targets)
    assert largest == 20
    np.testing.assert_array_equal(dataset.rows(0, 37), np.arange(37 * 6.0).reshape(37, 6))
    np.testing.assert_array_equal(dataset.targets(0, 37), np.arange(37) % 2)
    some = x[x[:, 0] > 100]  # chunks of unknown length
    assert write_dataset(tmp_path / "e", some, targets.rechunk({0: x.chunks[0]})[x[:, 0] > 100]).n == 20
    with pytest.raises(InputError, match="different lengths"):
        write_dataset(tmp_path / "g", some, np.zeros(37))


def test_other_arrays(tmp_path: Path) -> None:
    x = [[1.0, 2.0], [3.0, 4.0]]
    dataset = write_dataset(tmp_path / "list", x, [0, 1])
    np.testing.assert_array_equal(dataset.rows(0, 2), x)
    again = write_dataset(tmp_path / "zarr", store.open_array(tmp_path / "list" / "x"), [0, 1])
    assert again.digest == dataset.digest
    columns = np.asfortranarray(numbers(30))
    swapped = columns.astype(">f8")
    assert write_dataset(tmp_path / "f", columns).digest == write_dataset(tmp_path / "s", swapped).digest


@pytest.mark.parametrize(
    ("x", "targets", "words"),
    [
        (np.zeros((0, 3)), None, "0 rows"),
        (np.zeros(3), None, r"shape \(3,\)"),
        (3.0, None, "single float"),
        ([[1.0, 2.0], [3.0]], None, "rows disagree"),
        (np.array([[1, "a"]], object), None, "dtype object"),
        (np.array([["1", "a"]]), None, "cannot hold"),
        (np.zeros((3, 2), complex), None, "complex128"),
        (np.zeros((3, 2), np.uint64), None, "uint64"),
        (np.zeros((3, 2)), np.zeros(2), "different lengths"),
        (np.zeros((3, 2)), np.array([1, "a", None], object), "dtype object"),
        (np.zeros((3, 2)), np.eye(3, dtype=int), "argmax"),
        (np.zeros((3, 2)), np.zeros((3, 1, 1)), "Reshape"),
        (np.zeros((3, 2)), np.array([0.5, np.nan, 1]), "row 1 of targets holds NaN"),
        (np.full((3, 2), np.inf), None, "rows 0, 1, 2 of x hold NaN"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, x, targets, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_dataset(tmp_path / "d", x, targets)
    assert not list(tmp_path.iterdir())


def test_wrong_labels_weights_and_kinds_are_refused(tmp_path: Path) -> None:
    x = numbers(3)
    for arguments, words in (
        ({"targets": np.array([0, 3, 1]), "class_names": "abc"}, "row 1 has the label 3, but 3 classes"),
        ({"targets": np.array([0, -1, 1]), "class_names": "abc"}, "label -1"),
        ({"targets": np.array(["a", "q", "b"]), "class_names": "abc"}, "'q', which is not among"),
        ({"targets": np.array([0, 1, 1]), "class_names": "aa"}, "twice"),
        ({"targets": np.array([0.5, 1, 1]), "kind": "classification"}, "row 0 has the target 0.5"),
        ({"targets": np.array(["a", "b", "b"]), "kind": "regression"}, "text"),
        ({"targets": np.zeros(3), "kind": "regresion"}, "did you mean 'regression'"),
        ({"targets": np.zeros(3), "kind": "unlabelled"}, "unlabelled"),
        ({"kind": "regression"}, "without targets"),
        ({"weights": np.array([1.0, -1.0, 1.0])}, "negative in row 1"),
        ({"weights": np.array([1.0, np.nan, 1.0])}, "row 1 of weights"),
        ({"weights": np.array(["a", "b", "c"])}, "one number per row"),
    ):
        with pytest.raises(InputError, match=words):
            write_dataset(tmp_path / "d", x, **arguments)
    with pytest.raises(InputError, match="more than 1000"):
        write_dataset(tmp_path / "d", np.zeros((1001, 1)), np.arange(1001))
    assert (
        len(write_dataset(tmp_path / "d", np.zeros((1001, 1)), np.arange(1001), kind="classification").class_names)
        == 1001
    )


def test_rows_that_hold_nan_are_named(tmp_path: Path) -> None:
    x = numbers(2000, 3)
    x[[17, 42, 1003], 1] = np.nan, np.inf, -np.inf
    with pytest.raises(InputError, match="rows 17, 42, 1003 of x hold NaN or infinite values; remove or impute them"):
        write_dataset(tmp_path / "d", x)
    x[1500:] = np.nan
    with pytest.raises(InputError, match="rows 17, 42, 1003, 1500, 1501 and more"):
        write_dataset(tmp_path / "d", x)


def test_batches_that_disagree_are_refused(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d")
    writer.append(numbers(3), np.arange(3))
    for x, targets, words in (
        (numbers(3, 4), np.arange(3), "Give rows of one shape"),
        (numbers(3).astype(complex), np.arange(3), "complex"),
        (numbers(3), None, "without targets"),
        (numbers(3), np.arange(2), "targets has 2"),
        (numbers(3), np.array(["a", "b", "c"]), "mix text and integers"),
    ):
        with pytest.raises(InputError, match=words):
            writer.append(x, targets)


def test_an_encoder_serves_several_parts() -> None:
    encoder = LabelEncoder()
    first, second = encoder.encode(np.array(["c", "a"])), encoder.encode(np.array(["b", "c"]))
    names, table = encoder.finish()
    assert names == ("a", "b", "c")
    assert [names[i] for i in table[np.concatenate([first, second])]] == ["c", "a", "b", "c"]


def test_an_existing_dataset_is_replaced_on_request_only(tmp_path: Path) -> None:
    url = tmp_path / "d"
    first = write_dataset(url, numbers(5))
    with pytest.raises(DataError, match=r"exists already.*overwrite=True"):
        write_dataset(url, numbers(6))
    assert open_dataset(url) == first
    assert write_dataset(url, numbers(6), overwrite=True).n == 6
    with pytest.raises(InputError):
        write_dataset(url, np.full((2, 2), np.nan), overwrite=True)
    assert open_dataset(url).n == 6


def test_overwrite_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(DataError, match="not a dataset"):
        write_dataset(tmp_path / "thesis", numbers(3), overwrite=True)
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "notes.txt").write_text("...")
    with pytest.raises(DataError, match="stands in the way"):
        write_dataset(tmp_path / "x", numbers(3))
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    assert (tmp_path / "x.partial" / "notes.txt").exists()


def test_an_interrupted_import_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdask.datasets.writer.CHUNK_BYTES", 400)
    url = tmp_path / "d"

    def interrupted() -> None:
        with replacing(url) as partial:
            DatasetWriter(partial).append(numbers(50), np.arange(50))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())

    dies = f"""
import os, numpy as np
from ntkdask.datasets.writer import DatasetWriter, replacing
with replacing({str(url)!r}) as partial:
    DatasetWriter(partial).append(np.zeros((9, 2**16)), np.arange(9))
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", dies], check=False).returncode == 9
    assert (tmp_path / "d.partial" / "x").exists()
    for left in (url, tmp_path / "d.partial"):
        with pytest.raises(DataError):
            open_dataset(left)
    assert write_dataset(url, numbers(7)).n == 7
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdask.datasets.writer.CHUNK_BYTES", 1000)
    dataset = write_dataset(tmp_path / "d", numbers(100), np.arange(100) % 5)
    chunk = tmp_path / "d" / "x" / "c" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[123] ^= 4
    chunk.write_bytes(content)
    np.testing.assert_array_equal(dataset.rows(0, 25), numbers(100)[:25])
    with pytest.raises(DamagedTileError, match=r"rows 20 to 30 of x in dataset .*/d are damaged"):
        dataset.rows(20, 30)
    with pytest.raises(DamagedTileError, match="of x"):
        dataset.x.compute(scheduler="synchronous")
    chunk.unlink()
    with pytest.raises(DamagedTileError, match="chunk 1 is not there"):
        dataset.rows(0, 100)
    (tmp_path / "d" / "targets" / "c" / "3").write_bytes(b"")
    with pytest.raises(DamagedTileError, match="of targets"):
        dataset.targets(99, 100)


def test_what_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ntkdask data import"):
        open_dataset(tmp_path / "nothing")
    (tmp_path / "file.csv").write_text("1,2\n")
    (tmp_path / "folder").mkdir()
    store.write_group_attributes(tmp_path / "group", {"ntkdask": {"alpha": 1}})
    store.create_array(tmp_path / "array", (3,), (3,), "f8")
    for name in ("file.csv", "folder", "group", "array"):
        with pytest.raises(DataError, match="not a dataset"):
            open_dataset(tmp_path / name)
    store.write_group_attributes(tmp_path / "new", {"ntkdask": {"format": "dataset", "version": 99}})
    with pytest.raises(DataError, match="newer"):
        open_dataset(tmp_path / "new")


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", numbers(5))
    for start, stop in ((-1, 3), (0, 6), (3, 2)):
        with pytest.raises(InputError, match="rows 0 to 5"):
            dataset.rows(start, stop)
    assert open_parts(tmp_path / "d") == {"all": dataset}


def test_writing_holds_one_chunk(tmp_path: Path) -> None:
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (60_000, 256))  # 61 MB
    x[::1000] = 1
    tracemalloc.start()
    write_dataset(tmp_path / "d", x, np.zeros(len(x)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25 * 2**20
