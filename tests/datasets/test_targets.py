"""Targets: labels keep all their digits, names that look alike are one class, floats that stand for several labels are refused."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from ntkdask.datasets import write_dataset
from ntkdask.datasets.targets import EXACT, LabelEncoder, convert_targets
from ntkdask.errors import InputError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


def test_composed_and_decomposed_names_are_one_class(tmp_path) -> None:
    labels = np.array([DECOMPOSED, "Bar", COMPOSED, DECOMPOSED])
    dataset = write_dataset(tmp_path / "d", np.eye(4), labels)
    assert dataset.class_names == ("Bar", COMPOSED)
    assert dataset.targets(0, 4).tolist() == [1, 0, 1, 1]
    named = write_dataset(tmp_path / "n", np.eye(4), labels, class_names=[DECOMPOSED, "Bar"])
    assert named.class_names == (COMPOSED, "Bar")
    assert named.targets(0, 4).tolist() == [0, 1, 0, 0]
    with pytest.raises(InputError, match="name a class twice"):
        LabelEncoder([COMPOSED, DECOMPOSED])


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_large_integers_stay_apart(tmp_path, dtype) -> None:
    top = np.iinfo(dtype).max
    labels = np.array([top, top - 1, EXACT + 1, EXACT, top], dtype)
    dataset = write_dataset(tmp_path / "d", np.eye(5), labels)
    assert dataset.class_names == (str(EXACT), str(EXACT + 1), str(top - 1), str(top))
    assert dataset.targets(0, 5).tolist() == [3, 2, 1, 0, 3]


def test_floats_that_stand_for_several_labels_are_refused() -> None:
    encoder = LabelEncoder()
    assert convert_targets(np.array([EXACT - 1.0, 2.0]), "classification", encoder).tolist() == [1, 0]
    for large in (float(EXACT), 1e300):
        with pytest.raises(InputError, match=r"row 8 has the label .*more than one integer"):
            convert_targets(np.array([1.0, large]), "classification", encoder, first_row=7)


def test_labels_of_bytes_are_utf8() -> None:
    encoder = LabelEncoder()
    convert_targets(np.array(["b", "é"]).astype("U").astype(object), "classification", encoder)
    assert encoder.encode(np.char.encode(["é", "b"], "utf-8")).tolist() == [1, 0]
    with pytest.raises(InputError, match="no UTF-8"):
        encoder.encode(np.array([b"\xff"]))
