"""SRHT and TensorSRHT: against dense float64 twins, their statistics over seeds, batching, memory."""

import numpy as np
import pytest
from contracts import peak_bytes
from scipy.linalg import hadamard

from ntkdask import arrays, seeds, threads
from ntkdask.errors import DtypeError, InputError
from ntkdask.features.sketching.operands import padded_size
from ntkdask.features.sketching.sketches import SRHT, TensorSRHT

TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


def matrix(n, d, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def naive_samples(x, k, m, seed, path):
    """(H D x)[p] from the dense Hadamard matrix in float64."""
    size = padded_size(x.shape[1])
    padded = np.zeros((len(x), size))
    padded[:, : x.shape[1]] = x
    signed = padded * seeds.signs(seed, (*path, "signs", k), size)
    return (signed @ hadamard(size))[:, seeds.balanced_integers(seed, (*path, "rows", k), size, m)]


def pair(cosine, d, rng):
    """Two unit vectors of R^d with the given inner product."""
    basis, _ = np.linalg.qr(rng.standard_normal((d, 2)))
    return np.stack([basis[:, 0], cosine * basis[:, 0] + np.sqrt(1 - cosine**2) * basis[:, 1]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d1", "d2", "m"), [(1, 1, 1, 1), (1, 9, 784, 100), (7, 100, 5, 300), (3, 16, 16, 16)])
def test_matches_the_dense_twin(n, d1, d2, m, dtype):
    x, y = matrix(n, d1, dtype, 1), matrix(n, d2, dtype, 2)
    left, right = naive_samples(x, 0, m, 5, ("a",)), naive_samples(y, 1, m, 5, ("a",))
    tensor = TensorSRHT(m, 5, ("a",))(x, y)
    single = SRHT(m, 5, ("a",))(x)
    assert tensor.dtype == single.dtype == dtype
    scale = np.linalg.norm(x) * np.linalg.norm(y) * np.sqrt(padded_size(d1) * padded_size(d2) / m)
    assert np.abs(tensor - left * right / np.sqrt(m)).max() <= TOLERANCE[dtype] * scale
    assert np.abs(single - left / np.sqrt(m)).max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("cosine", [0.0, 0.5, 1.0])
def test_srht_is_unbiased(cosine):
    x = pair(cosine, 20, np.random.default_rng(3))
    products = np.array([np.prod(SRHT(8, seed)(x), axis=0).sum() for seed in range(1000)])
    assert abs(products.mean() - cosine) <= 4 * products.std() / np.sqrt(len(products)) + 1e-12


def test_srht_of_every_row_of_hadamard_is_an_isometry():
    x = matrix(4, 20)
    for m in (32, 64):
        sketch = SRHT(m, 0)(x)
        np.testing.assert_allclose(sketch @ sketch.T, x @ x.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.0, 0.7), (0.5, 0.5), (0.9, -0.6), (1.0, 0.3), (1.0, 1.0)])
def test_tensor_srht_is_unbiased_and_its_variance_falls_as_the_formula(alpha, beta):
    count = 1500
    rng = np.random.default_rng(17)
    x, y = pair(alpha, 50, rng), pair(beta, 33, rng)
    bound = (1 + 2 * alpha**2) * (1 + 2 * beta**2) - (alpha * beta) ** 2  # MATH.md §4, times 1/m
    for m in (16, 64):
        products = np.array([np.prod(TensorSRHT(m, seed, ("v",))(x, y), axis=0).sum() for seed in range(count)])
        spread = products.var()
        assert abs(products.mean() - alpha * beta) <= 4 * np.sqrt(spread / count)
        # Slack: four standard errors of a sample variance, from the sample's own fourth moment.
        error = np.sqrt(((products - products.mean()) ** 4).mean() - spread**2) / np.sqrt(count)
        assert m * spread <= bound + 4 * m * error


def test_rows_do_not_depend_on_their_batch_or_threads():
    x, y = matrix(257, 700, "float32", 1), matrix(257, 9, "float32", 2)
    sketch = TensorSRHT(900, 1)
    with threads.limited(1):
        whole = sketch(x, y)
    with threads.limited(2):
        np.testing.assert_array_equal(whole, sketch(x, y))
        large, small = np.tile(x, (4, 1)), np.tile(y, (4, 1))  # enough work for two threads
        np.testing.assert_array_equal(np.tile(whole, (4, 1)), sketch(large, small))
    parts = [sketch(x[start : start + 50], y[start : start + 50]) for start in range(0, 257, 50)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(whole[3:4], sketch(x[3:4], y[3:4]))


def test_out_may_be_columns_and_scale_multiplies():
    x, y = matrix(6, 40, seed=1), matrix(6, 12, seed=2)
    wide = np.full((6, 150), 7.0)
    result = TensorSRHT(100, 1)(x, y, out=wide[:, 20:120], scale=4.0)
    assert result.base is wide
    np.testing.assert_array_equal(wide[:, 20:120], 4 * TensorSRHT(100, 1)(x, y))
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 120:] == 7).all()
    np.testing.assert_array_equal(SRHT(8, 1)(wide[:, 20:120], scale=0.5), 0.5 * SRHT(8, 1)(wide[:, 20:120].copy()))


def test_read_only_and_broadcast_inputs_serve():
    x = matrix(3, 12)
    row = np.broadcast_to(x[:1], (3, 12))
    np.testing.assert_array_equal(TensorSRHT(20, 0)(row, x), TensorSRHT(20, 0)(np.repeat(x[:1], 3, axis=0), x))


def test_zero_rows_no_rows_and_images():
    x = matrix(3, 12)
    x[1] = 0
    sketch = TensorSRHT(20, 0)(x, x)
    assert (sketch[1] == 0).all()
    assert (np.abs(sketch[0]) > 0).any()
    assert SRHT(5, 0)(x[:0]).shape == (0, 5)
    np.testing.assert_array_equal(SRHT(5, 0)(x.reshape(3, 2, 2, 3)), SRHT(5, 0)(x))


def test_seeds_and_paths_give_other_sketches():
    x = matrix(2, 64)
    assert not np.array_equal(SRHT(32, 0)(x), SRHT(32, 1)(x))
    assert not np.array_equal(SRHT(32, 0)(x), SRHT(32, 0, ("layer", 1))(x))
    # The first components are those of a smaller sketch: permutations do not depend on their length.
    np.testing.assert_allclose(SRHT(64, 0)(x)[:, :32] * np.sqrt(2), SRHT(32, 0)(x), rtol=1e-14)


@pytest.mark.parametrize(
    ("n", "d1", "d2", "m"), [(500, 3000, 784, 4096), (3, 9, 5000, 64), (2000, 9, 9, 512), (1, 1, 1, 1)]
)
def test_workspace_is_declared(n, d1, d2, m):
    x, y = matrix(n, d1, "float32"), matrix(n, d2, "float32")
    sketch = TensorSRHT(m, 11, ("memory",))
    planned = sketch.workspace_bytes(n, d1, d2, 4)
    peak = peak_bytes(lambda: sketch(x, y), planned)
    assert peak <= planned
    assert planned <= 1.5 * n * m * 4 + 64 * (padded_size(d1) + padded_size(d2) + m) + 2**16


def test_other_inputs_are_refused():
    x = matrix(4, 8)
    with pytest.raises(InputError, match="at least 1"):
        SRHT(0, 0)
    with pytest.raises(InputError, match="same rows"):
        TensorSRHT(4, 0)(x, x[:3])
    assert TensorSRHT(4, 0)(x, x.astype("float32")).dtype == np.float64
    with pytest.raises(DtypeError, match="int64"):
        SRHT(4, 0)(x.astype("int64"))
    with pytest.raises(InputError, match="at least one column"):
        SRHT(4, 0)(x[:, :0])
    with pytest.raises(InputError, match="out is"):
        SRHT(4, 0)(x, out=np.empty((4, 5)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("d1", "d2"), [(9, 784), (3000, 2000), (100_000, 9)])
def test_gpu_matches_cpu(d1, d2, dtype):
    x, y = matrix(5, d1, dtype, 1), matrix(5, d2, dtype, 2)
    x_device, y_device = arrays.to_device(x), arrays.to_device(y)
    expected, scale = TensorSRHT(700, 3)(x, y), np.sqrt(d1 * d2)
    found = arrays.to_host(TensorSRHT(700, 3)(x_device, y_device))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * scale, rtol=0)
    found = arrays.to_host(SRHT(700, 3)(x_device))
    np.testing.assert_allclose(found, SRHT(700, 3)(x), atol=TOLERANCE[dtype] * scale, rtol=0)
