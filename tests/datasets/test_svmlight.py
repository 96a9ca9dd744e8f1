"""svmlight files: indices from 0 and from 1, regression, damage."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from import_examples import everything, generator, refused

from ntkdask.datasets import import_dataset


@pytest.mark.parametrize("first", [0, 1])
def test_svmlight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr("ntkdask.datasets.svmlight._TEXT_BYTES", 200)
    monkeypatch.setattr("ntkdask.datasets.svmlight._DENSE_BYTES", 100)
    draw = generator(12)
    x = np.where(draw.random((40, 6)) < 0.4, draw.integers(1, 9, (40, 6)) / 4, 0)
    x[3, 0] = 1.25
    targets = draw.choice([-1, 1], 40)
    lines = ["# a comment"]
    for row, t in zip(x, targets, strict=True):
        lines.append(f"{t:+d} " + " ".join(f"{j + first}:{row[j]}" for j in np.flatnonzero(row)))
    path = tmp_path / "a.svm.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    assert dataset.dtype == "float32"
    assert dataset.class_names == ("-1", "1")
    np.testing.assert_array_equal(everything(dataset)[0], x[:, : np.flatnonzero(x.any(axis=0)).max() + 1])
    np.testing.assert_array_equal(everything(dataset)[1], (targets + 1) // 2)


def test_svmlight_regression_and_damage(tmp_path: Path) -> None:
    path, url = tmp_path / "a.libsvm", tmp_path / "d"
    path.write_text("0.5 1:2 2:3\n1.5 2:1\n")
    dataset = import_dataset(str(path), str(tmp_path / "r"))["all"]
    assert (dataset.kind, dataset.targets(0, 2).tolist()) == ("regression", [0.5, 1.5])
    for text, words in (("1 1:2\n1 a:3\n", "lines 1 to 2"), ("", "no rows"), ("1\n2\n", "no rows with features")):
        path.write_text(text)
        refused(path, url, words)


def test_labels_that_float64_merges_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.svm"
    path.write_text(f"{2**53 + 1} 1:2\n{2**53} 1:3\n")
    refused(path, tmp_path / "d", "read with other integers as one.*--kind regression")
    numbers = import_dataset(str(path), str(tmp_path / "d"), kind="regression")["all"]
    assert numbers.targets(0, 2).tolist() == [2.0**53, 2.0**53]
