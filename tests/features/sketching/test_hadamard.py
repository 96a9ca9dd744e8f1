"""walsh_hadamard against scipy.linalg.hadamard in float64."""

import numpy as np
import pytest
from scipy.linalg import hadamard

from ntkdask import arrays, threads
from ntkdask.errors import DtypeError, InputError
from ntkdask.features.sketching.hadamard import walsh_hadamard
from ntkdask.features.sketching.operands import padded_size

# Normwise: |error| <= tolerance * sqrt(p) * ||row||, the largest an entry can be.
TOLERANCE = {"float32": 1e-6, "float64": 1e-15}


def matrix(n, p, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal((n, p)).astype(dtype)


def assert_transforms(out, x):
    exact = x.astype(np.float64) @ hadamard(x.shape[1])
    bound = TOLERANCE[x.dtype.name] * np.sqrt(x.shape[1]) * np.linalg.norm(x, axis=1, keepdims=True)
    assert out.dtype == x.dtype
    assert (np.abs(out - exact) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "power", [*range(12), pytest.param(12, marks=pytest.mark.slow), pytest.param(13, marks=pytest.mark.slow)]
)
def test_every_size_matches_the_matrix(power, dtype):
    x = matrix(3, 2**power, dtype)
    assert_transforms(walsh_hadamard(x), x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_twice_is_p_times_the_identity_for_long_rows(dtype):
    x = matrix(1, 2**17, dtype)
    twice = walsh_hadamard(walsh_hadamard(x)) / x.shape[1]
    assert np.abs(twice - x).max() <= 10 * TOLERANCE[dtype] * np.abs(x).max()


def test_one_row_a_zero_row_and_no_rows():
    x = np.zeros((1, 64))
    assert (walsh_hadamard(x) == 0).all()
    x[0, 0] = 2.0
    assert (walsh_hadamard(x) == 2.0).all()
    assert walsh_hadamard(np.empty((0, 64))).shape == (0, 64)


def test_in_place_and_column_slices():
    x = matrix(5, 96, "float32")
    expected = walsh_hadamard(np.ascontiguousarray(x[:, 32:]))
    wide = np.zeros((5, 100), np.float32)
    assert walsh_hadamard(x[:, 32:], out=wide[:, 7:71]).base is wide
    np.testing.assert_array_equal(wide[:, 7:71], expected)
    assert (wide[:, :7] == 0).all()
    assert (wide[:, 71:] == 0).all()
    walsh_hadamard(x[:, 32:], out=x[:, 32:])
    np.testing.assert_array_equal(x[:, 32:], expected)
    np.testing.assert_array_equal(
        walsh_hadamard(np.asfortranarray(matrix(5, 64, "float32"))), walsh_hadamard(matrix(5, 64, "float32"))
    )


def test_threads_and_batches_give_the_same_bits():
    x = matrix(900, 4096, "float32")
    with threads.limited(1):
        alone = walsh_hadamard(x)
    with threads.limited(3):
        together = walsh_hadamard(x)
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(alone[100:107], walsh_hadamard(x[100:107]))


@pytest.mark.parametrize(("d", "size"), [(1, 1), (2, 2), (3, 4), (9, 16), (784, 1024), (1024, 1024)])
def test_padded_size(d, size):
    assert padded_size(d) == size


def test_other_inputs_are_refused():
    with pytest.raises(InputError, match="power of two"):
        walsh_hadamard(np.ones((2, 12)))
    with pytest.raises(InputError, match="power of two"):
        walsh_hadamard(np.ones((2, 4, 4)))
    with pytest.raises(DtypeError, match="int64"):
        walsh_hadamard(np.ones((2, 4), np.int64))
    with pytest.raises(InputError, match="float64"):
        walsh_hadamard(np.ones((2, 4), np.float32), out=np.ones((2, 4)))
    with pytest.raises(InputError, match="contiguous"):
        walsh_hadamard(np.ones((2, 4)), out=np.ones((4, 2)).T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [1, 16, 4096, 2**17])
def test_gpu_matches_cpu(p, dtype):
    x = matrix(5, p, dtype)
    out = walsh_hadamard(arrays.to_device(x))
    np.testing.assert_allclose(arrays.to_host(out), walsh_hadamard(x), atol=TOLERANCE[dtype] * 4 * p, rtol=0)
