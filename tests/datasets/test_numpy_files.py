"""NumPy files: npy and npz, what is refused, and the memory that reading takes."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from import_examples import everything, generator, refused

from ntkdask.datasets import import_dataset, open_dataset
from ntkdask.errors import UserError


def test_npy(tmp_path: Path) -> None:
    x, targets = generator(10).standard_normal((20, 4)).astype(np.float32), np.arange(20) % 3
    np.save(tmp_path / "a.npy", x)
    assert import_dataset(str(tmp_path / "a.npy"), str(tmp_path / "u"))["all"].kind == "unlabelled"
    np.save(tmp_path / "a_targets.npy", targets)
    dataset = import_dataset(str(tmp_path / "a.npy"), str(tmp_path / "d"))["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    np.testing.assert_array_equal(everything(dataset)[1], targets)
    np.save(tmp_path / "a_targets.npy", targets[:-1])
    refused(tmp_path / "a.npy", tmp_path / "e", "one target per row")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable) -> None:
    x, targets = generator(11).standard_normal((20, 4, 2)), np.arange(20) % 3
    save(tmp_path / "a.npz", X=np.asfortranarray(x), labels=targets)
    dataset = import_dataset(str(tmp_path / "a.npz"), str(tmp_path / "a"))["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    np.testing.assert_array_equal(everything(dataset)[1], targets)
    for i, names in enumerate((("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels"))):
        arrays = dict(zip(names, (x[:15], targets[:15].astype(str), x[15:], targets[15:].astype(str)), strict=False))
        save(tmp_path / "b.npz", **arrays)
        parts = import_dataset(str(tmp_path / "b.npz"), str(tmp_path / f"b{i}"))
        assert list(parts) == ["train", "test"][: len(names) // 2]
        np.testing.assert_array_equal(everything(parts["train"])[0], x[:15])
        np.testing.assert_array_equal(everything(parts["train"])[1], targets[:15])
    save(tmp_path / "c.npz", x=x, y=targets, depth=targets * 0.5)
    dataset = import_dataset(str(tmp_path / "c.npz"), str(tmp_path / "c"), target="depth")["all"]
    np.testing.assert_array_equal(everything(dataset)[1], targets * 0.5)


def test_numpy_files_that_are_refused(tmp_path: Path) -> None:
    url, x = tmp_path / "d", np.zeros((100, 40))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(tmp_path / "o.npy", url, "Python objects")
    np.savez(tmp_path / "o.npz", x=np.array([[None]], object))
    refused(tmp_path / "o.npz", url, "Python objects")
    np.save(tmp_path / "a.npy", x)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    refused(tmp_path / "a.npy", url, "truncated")
    np.savez_compressed(tmp_path / "a.npz", x=generator(1).standard_normal((100, 40)), y=np.zeros(100))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-200])
    refused(tmp_path / "cut.npz", url, "truncated or damaged")
    flipped = bytearray(whole)
    flipped[5000] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(tmp_path / "flipped.npz", url, "truncated or damaged")
    for arrays, words in (
        ({"a": x, "b": x}, "Name the rows x"),
        ({"x": x, "data": x}, "both 'x' and 'data'"),
        ({"x": x, "y": np.zeros(99)}, "one per row|targets has 99"),
        ({"x": np.array(3.0)}, "single number"),
    ):
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(UserError, match=words):
            import_dataset(str(tmp_path / "b.npz"), str(url))
    refused(tmp_path / "b.npz", url, "no array 'z'", target="z")


def test_npy_memory_is_bounded(tmp_path: Path) -> None:
    x = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (60_000, 256))  # 61 MB
    x[::1000] = 1
    x.flush()
    np.savez(tmp_path / "a.npz", x=x)
    for name in ("a.npy", "a.npz"):
        tracemalloc.start()
        import_dataset(str(tmp_path / name), str(tmp_path / f"{name}.zarr"))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 25 * 2**20
    assert open_dataset(tmp_path / "a.npy.zarr").digest == open_dataset(tmp_path / "a.npz.zarr").digest


@pytest.mark.parametrize(
    ("pattern", "words", "parts"),
    [
        ("{1}_{0}", ("train", "val", "test"), ["train", "validation", "test"]),
        ("{0}_{1}", ("train", "valid"), ["train", "validation"]),
        ("{1}_{0}", ("Train", "validation", "TEST"), ["train", "validation", "test"]),
        ("{0}_{1}", ("training", "testing"), ["train", "test"]),
    ],
)
def test_npz_parts_by_their_common_names(tmp_path: Path, pattern: str, words, parts: list[str]) -> None:
    x = generator(12).standard_normal((3, 4))
    arrays = {pattern.format(w, "X"): x + i for i, w in enumerate(words)}
    arrays |= {pattern.format(w, "labels"): np.array([[0], [1], [0]], np.uint8) for w in words}
    np.savez(tmp_path / "a.npz", **arrays, mean=x)
    found = import_dataset(str(tmp_path / "a.npz"), str(tmp_path / "d"))
    assert list(found) == parts
    for i, part in enumerate(found.values()):
        np.testing.assert_array_equal(everything(part)[0], x + i)
        assert (everything(part)[1].tolist(), part.provenance["arrays_left_out"]) == ([0, 1, 0], ["mean"])


def test_npz_without_rows_is_refused(tmp_path: Path) -> None:
    for arrays, words in (
        ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, "x has 0 rows"),
        ({"x": np.zeros((0, 4))}, "x has 0 rows"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(0)}, "y has 0 rows"),
        ({"x_train": np.zeros((3, 4)), "x_test": np.zeros((0, 4))}, "x_test has 0 rows"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        refused(tmp_path / "a.npz", tmp_path / "d", words)
    np.save(tmp_path / "a.npy", np.zeros((0, 4)))
    refused(tmp_path / "a.npy", tmp_path / "d", "0 rows")


def test_npz_arrays_of_other_names(tmp_path: Path) -> None:
    x = generator(13).standard_normal((3, 4))
    np.savez(tmp_path / "a.npz", x, np.array([2, 1, 2]))
    refused(tmp_path / "a.npz", tmp_path / "d", "--rows NAME")
    dataset = import_dataset(str(tmp_path / "a.npz"), str(tmp_path / "d"), rows="arr_0", target="arr_1")["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    assert dataset.class_names == ("1", "2")
    np.savez(tmp_path / "b.npz", x)
    assert import_dataset(str(tmp_path / "b.npz"), str(tmp_path / "u"))["all"].kind == "unlabelled"
    np.savez(tmp_path / "c.npz", x=x, y=np.array([2, 1, 2]))
    assert import_dataset(str(tmp_path / "c.npz"), str(tmp_path / "k"), kind="unlabelled")["all"].kind == "unlabelled"


def test_headers_of_python2_are_read(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 3L), }".ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + x.tobytes()
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("a.npy", "b.npz"):
        dataset = import_dataset(str(tmp_path / name), str(tmp_path / f"{name}.zarr"))["all"]
        np.testing.assert_array_equal(dataset.rows(0, 2), x)
