"""IDX files (MNIST): what is read and what is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from import_examples import everything, generator, refused, write_folder

from ntkdask.datasets import import_dataset


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files() -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    draw = generator(2)
    arrays, files = {}, {}
    for prefix, n in (("train", 30), ("t10k", 11)):
        arrays[f"{prefix}-x"], arrays[f"{prefix}-y"] = draw.integers(0, 256, (n, 28, 28)), draw.integers(0, 10, n)
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(arrays[f"{prefix}-x"])
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(arrays[f"{prefix}-y"])
    return files, arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path: Path, packed: bool) -> None:
    files, arrays = idx_files()
    if packed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    folder = write_folder(tmp_path / "mnist", files)
    parts = import_dataset(str(folder), str(tmp_path / "d"))
    for part, prefix in (("train", "train"), ("test", "t10k")):
        x, targets = everything(parts[part])
        np.testing.assert_array_equal(x, arrays[f"{prefix}-x"][..., None])
        np.testing.assert_array_equal(np.array(parts[part].class_names, int)[targets], arrays[f"{prefix}-y"])
    assert parts["train"].row_shape == (28, 28, 1)
    assert parts["train"].class_names == parts["test"].class_names

    single = folder / f"t10k-images-idx3-ubyte{'.gz' * packed}"
    assert import_dataset(str(single), str(tmp_path / "one"))["all"].n == 11


def test_damaged_idx_is_refused(tmp_path: Path) -> None:
    whole, _ = idx_files()
    url, images, labels = tmp_path / "d", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    changes = {
        "images has 30 images.*29 labels|has 30 images, but .* 29 labels": {labels: idx_bytes(np.zeros(29))},
        "truncated": {images: whole[images][:-1]},
        "more bytes": {images: whole[images] + b"x"},
        "cut": {images: whole[images][:9]},
        "begins with 00000a03": {images: b"\0\0\x0a\x03" + whole[images][4:]},
        "begins with 00000803": {labels: idx_bytes(np.zeros((30, 1, 1)))},
        "truncated or damaged": {images: gzip.compress(whole[images])[:-500]},
        "its shape is": {images: idx_bytes(np.zeros((0, 28, 28)))},
    }
    for i, (words, change) in enumerate(changes.items()):
        refused(write_folder(tmp_path / f"m{i}", whole | change), url, words)
    del whole[labels]
    refused(write_folder(tmp_path / "alone", whole), url, f"no labels file {labels}")


CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def typed(array: np.ndarray, dtype: str) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[dtype], array.ndim, *array.shape)
    return head + array.astype(f">{dtype}").tobytes()


@pytest.mark.parametrize(
    ("dtype", "stored"), [("i1", "int64"), ("i2", "int64"), ("i4", "int64"), ("f4", "float32"), ("f8", "float64")]
)
def test_idx_of_integers_and_floats(tmp_path: Path, dtype: str, stored: str) -> None:
    x = generator(3).integers(-100, 100, (9, 4, 5)) + (0.5 if dtype[0] == "f" else 0)
    folder = write_folder(
        tmp_path / "f",
        {
            f"train-images-idx3-{dtype}": typed(x, dtype),
            "train-labels-idx1-int": typed(np.arange(9) + 70_000, "i4"),
            f"t10k-images.idx2-{dtype}": typed(x.reshape(9, 20)[:, :20], dtype),
            "t10k-labels.idx1-float": typed(np.arange(9) / 2, "f4"),
        },
    )
    single = import_dataset(str(folder / f"train-images-idx3-{dtype}"), str(tmp_path / "d"))["all"]
    np.testing.assert_array_equal(everything(single)[0], x[..., None])
    assert (single.dtype, single.class_names[0], single.kind) == (stored, "70000", "classification")
    vectors = import_dataset(str(folder / f"t10k-images.idx2-{dtype}"), str(tmp_path / "v"))["all"]
    assert (vectors.row_shape, vectors.kind, vectors.targets(1, 2).tolist()) == ((20,), "regression", [0.5])


def test_idx_labels_of_several_columns_ask_for_one(tmp_path: Path) -> None:
    labels = np.arange(24).reshape(3, 8)
    files = {
        "qmnist-train-images-idx3-ubyte": typed(np.zeros((3, 2, 2)), "u1"),
        "qmnist-train-labels-idx2-int": typed(labels, "i4"),
    }
    folder = write_folder(tmp_path / "q", files)
    refused(folder, tmp_path / "d", "8 numbers a row.*--target 0 to 7")
    refused(folder, tmp_path / "d", "8 numbers a row", target=8)
    parts = import_dataset(str(folder), str(tmp_path / "d"), target="1")
    assert parts["train"].class_names == ("1", "9", "17")
    write_folder(folder, {"emnist-train-images-idx3-ubyte": typed(np.zeros((3, 2, 2)), "u1")})
    refused(folder, tmp_path / "e", "for the part train. Put one dataset in a folder")
