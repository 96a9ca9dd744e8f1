"""NumPy files: npy and npz, what is refused, and the memory that reading takes."""

from __future__ import annotations

import tracemalloc
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
