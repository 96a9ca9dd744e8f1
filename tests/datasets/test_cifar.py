"""CIFAR-10 as binary files and as pickles: what is read, what is damaged, and that a pickle runs no code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from import_examples import (
    cifar_arrays,
    cifar_binary,
    cifar_python,
    everything,
    generator,
    refused,
    write_folder,
    write_tar,
)

from ntkdask.datasets import import_dataset, open_dataset, open_parts
from ntkdask.errors import DataError


def test_pickles_of_python3_are_read_too(tmp_path: Path) -> None:
    arrays = cifar_arrays()
    for protocol in (0, 2, 4):
        files = {
            name: pickle.dumps({b"labels": t.tolist(), b"data": x, b"batch_label": b"one"}, protocol=protocol)
            for name, (x, t) in arrays.items()
        }
        source = write_folder(tmp_path / f"c{protocol}", files)
        parts = import_dataset(str(source), str(tmp_path / f"d{protocol}"))
        np.testing.assert_array_equal(parts["test"].targets(0, 7), arrays["test_batch"][1])


@pytest.mark.parametrize("files", [cifar_binary, cifar_python])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(tmp_path: Path, files: Callable[[], dict[str, bytes]], packed: bool) -> None:
    # the true archives hold the batches out of order, below one folder, among other files
    inside = {"readme.html": b"<p>", "batches.meta": b"x"} | dict(reversed(files().items()))
    inside = {f"cifar-10-batches/{name}": content for name, content in inside.items()}
    source = write_tar(tmp_path / "cifar.tar.gz", inside) if packed else write_folder(tmp_path / "cifar", inside)
    parts = import_dataset(str(source), str(tmp_path / "d"))
    assert list(parts) == ["train", "test"]
    assert parts == open_parts(tmp_path / "d")
    x, targets = everything(parts["train"])
    batches = list(cifar_arrays().values())
    np.testing.assert_array_equal(targets, np.concatenate([t for _, t in batches[:5]]))
    planes = np.concatenate([x for x, _ in batches[:5]]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(x, planes.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(parts["test"].targets(0, 7), batches[5][1])
    assert parts["test"].class_names[:2] == ("airplane", "automobile")
    assert (x.dtype, parts["test"].row_shape) == (np.uint8, (32, 32, 3))
    with pytest.raises(DataError, match=r"parts train, test.*d/train"):
        open_dataset(tmp_path / "d")


@pytest.mark.parametrize("files", [cifar_binary, cifar_python])
def test_damaged_cifar10_is_refused(tmp_path: Path, files: Callable[[], dict[str, bytes]]) -> None:
    inside, url = files(), tmp_path / "d"
    archive = write_tar(tmp_path / "whole.tar.gz", inside).read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive[: len(archive) // 2])
    refused(cut, url, "truncated or damaged.*download it again", format="cifar10-binary")
    refused(cut, url, "truncated or damaged.*download it again")
    first = next(iter(inside))
    refused(write_folder(tmp_path / "short", inside | {first: inside[first][:-9]}), url, "truncated")
    del inside[first]
    refused(write_tar(tmp_path / "five.tar", inside), url, f"lacks {first}")


def test_binary_labels_are_checked(tmp_path: Path) -> None:
    files = cifar_binary()
    files["data_batch_3.bin"] = b"\x0a" + files["data_batch_3.bin"][1:]
    refused(write_folder(tmp_path / "c", files), tmp_path / "d", "label 10")


class Malicious:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (lambda mark: Malicious(os.system, f"touch {mark}"), "system"),
        (lambda mark: Malicious(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (lambda mark: Malicious(getattr, "a", "upper"), "getattr"),
        (lambda mark: {b"data": np.array([Malicious(os.mkdir, str(mark))], object), b"labels": [1]}, "mkdir"),
        (lambda mark: Malicious(np.load, str(mark)), "load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickles_do_nothing(tmp_path: Path, payload, named: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    files = cifar_python() | {"data_batch_1": pickle.dumps(payload(mark), protocol=protocol)}
    refused(write_tar(tmp_path / "c.tar.gz", files), tmp_path / "d", f"asks for .*{named}.*Do not trust")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({b"data": np.zeros((2, 3072))}, protocol=2)]
    + [pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": bad}, protocol=2) for bad in ([1], [1, 10], 3)],
)
def test_pickles_of_another_content_are_refused(tmp_path: Path, content: bytes) -> None:
    files = cifar_python() | {"data_batch_2": content}
    refused(write_folder(tmp_path / "c", files), tmp_path / "d", "data_batch_2")


def cifar100(form: str) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    draw = generator(3)
    arrays = {
        name: (draw.integers(0, 256, (n, 3072), dtype=np.uint8), draw.integers(0, 20, n), draw.integers(0, 100, n))
        for name, n in (("train", 9), ("test", 4))
    }
    if form == "binary":
        stack = {n: np.concatenate([c[:, None], f[:, None], x], axis=1) for n, (x, c, f) in arrays.items()}
        return {f"{n}.bin": a.astype(np.uint8).tobytes() for n, a in stack.items()}, arrays
    tables = {
        n: {b"coarse_labels": c.tolist(), b"fine_labels": f.tolist(), b"data": x} for n, (x, c, f) in arrays.items()
    }
    return {n: pickle.dumps(t, protocol=2) for n, t in tables.items()}, arrays


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar100(tmp_path: Path, form: str, packed: bool) -> None:
    files, arrays = cifar100(form)
    inside = {f"cifar-100/{name}": content for name, content in ({"file.txt~": b"", "meta": b"x"} | files).items()}
    source = write_tar(tmp_path / "c.tar.gz", inside) if packed else write_folder(tmp_path / "c", inside)
    for target, place in (("fine", 2), ("coarse", 1)):
        parts = import_dataset(str(source), str(tmp_path / target), target=target)
        assert list(parts) == ["train", "test"]
        for part, dataset in parts.items():
            x, targets = everything(dataset)
            np.testing.assert_array_equal(targets, arrays[part][place])
            np.testing.assert_array_equal(x, arrays[part][0].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            assert dataset.provenance["target"] == f"{target}_labels" if form == "python" else True
        assert len(dataset.class_names) == (100 if target == "fine" else 20)
    assert parts["train"].class_names[3] == "food_containers"
    assert open_parts(tmp_path / "fine")["train"].class_names[47] == "maple_tree"
    assert (
        import_dataset(str(source), str(tmp_path / "default"))["train"].digest
        == open_parts(tmp_path / "fine")["train"].digest
    )
    refused(source, tmp_path / "e", "no labels 'course'; did you mean 'coarse'", target="course")


def test_damaged_cifar100_is_refused(tmp_path: Path) -> None:
    files, _ = cifar100("binary")
    broken = files["train.bin"][:1] + b"\x64" + files["train.bin"][2:]
    refused(
        write_folder(tmp_path / "a", files | {"train.bin": broken}),
        tmp_path / "d",
        "a label 100; CIFAR-100 has 0 to 99",
    )
    refused(write_folder(tmp_path / "b", files | {"train.bin": broken[:-1]}), tmp_path / "d", "not a multiple of 3074")
    refused(write_folder(tmp_path / "c", {"train.bin": broken}), tmp_path / "d", "lacks test.bin")
