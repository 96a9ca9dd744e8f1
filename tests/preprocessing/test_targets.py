"""Targets: zero-mean one-hot codes of labels, and back."""

import numpy as np
import pytest
from preprocessing_examples import RELATIVE, assert_near

from ntkdask import arrays
from ntkdask.errors import DtypeError, InputError
from ntkdask.preprocessing import check_finite_rows, targets


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("labels_dtype", ["uint8", "int32", "int64", "uint64"])
def test_targets_are_zero_mean_one_hot_and_decode_back(dtype, labels_dtype):
    labels = np.random.default_rng(8).integers(0, 7, 50).astype(labels_dtype)
    encoded = targets.encode_targets(labels, 7, dtype)
    assert encoded.dtype == dtype
    assert_near(encoded, np.eye(7)[labels] - 1 / 7, RELATIVE[dtype])
    assert np.abs(encoded.sum(axis=1)).max() <= 7 * np.finfo(dtype).eps
    decoded = targets.decode(encoded)
    assert decoded.dtype == np.int64
    np.testing.assert_array_equal(decoded, labels)
    assert targets.encode_targets(labels[:0], 300).shape == (0, 300)


def test_labels_out_of_range_are_named():
    with pytest.raises(InputError, match=r"outside 0\.\.2 in rows 1, 3: found 3"):
        targets.encode_targets(np.array([0, 3, 2, -1]), 3)
    with pytest.raises(InputError, match=r"in rows 0, 1, 2, 3, 4 and 95 more"):
        targets.encode_targets(np.full(100, 200, dtype="uint8"), 10)
    for labels in (np.array([0.0, 1.0]), np.array([[0, 1]]), np.array(["cat", "dog"])):
        with pytest.raises(InputError, match="expected \\(n,\\) integers"):
            targets.encode_targets(labels, 3)
    with pytest.raises(InputError, match="at least 2"):
        targets.encode_targets(np.array([0]), 1)
    with pytest.raises(DtypeError, match="float16"):
        targets.encode_targets(np.array([0]), 2, "float16")
    with pytest.raises(InputError, match="n_classes"):
        targets.decode(np.zeros(3))


@pytest.mark.gpu
def test_gpu_targets_and_row_checks():
    labels = arrays.to_device(np.array([2, 0, 1], dtype="uint8"))
    encoded = targets.encode_targets(labels, 3)
    np.testing.assert_array_equal(arrays.to_host(targets.decode(encoded)), [2, 0, 1])
    with pytest.raises(InputError, match="row 0: found 2"):
        targets.encode_targets(labels, 2)
    with pytest.raises(InputError, match=r"row 11\."):
        check_finite_rows(arrays.to_device(np.array([[0.0], [np.nan]])), first_row=10)
