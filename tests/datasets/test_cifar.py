"""CIFAR-10 as binary files and as pickles: what is read, what is damaged, and that a pickle runs no code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from import_examples import cifar_arrays, cifar_binary, cifar_python, everything, refused, write_folder, write_tar

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
