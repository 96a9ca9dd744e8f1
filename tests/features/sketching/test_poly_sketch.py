"""PolySketch: against its explicit matrix on tensor products, its statistics over seeds, batching, sparse rows, memory."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse
from contracts import peak_bytes
from scipy.linalg import hadamard

from ntkdask import arrays, seeds, threads
from ntkdask.errors import DtypeError, InputError
from ntkdask.features.sketching.operands import padded_size
from ntkdask.features.sketching.poly_program import JOIN_CONSTANT, LEAF, program
from ntkdask.features.sketching.poly_sketch import LEAVES, PolySketch
from ntkdask.features.sketching.sparse_rows import sparse_rows

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
both_leaves = pytest.mark.parametrize("leaves", LEAVES)


def matrix(n, d, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def pair(cosine, d, rng):
    """Two unit vectors of R^d with the given inner product."""
    basis, _ = np.linalg.qr(rng.standard_normal((d, 2)))
    return np.stack([basis[:, 0], cosine * basis[:, 0] + np.sqrt(1 - cosine**2) * basis[:, 1]])


def naive_leaf(sketch, i, vector):
    """(H D_i v) or (H C_i v) of leaf i, all entries, from dense matrices."""
    d = len(vector)
    if sketch.leaves == "srht":
        size = padded_size(d)
        padded = np.zeros(size)
        padded[:d] = vector
        return hadamard(size) @ (padded * seeds.signs(sketch.seed, (*sketch.path, "signs", i, i + 1), size))
    w = padded_size(sketch.n_components)
    bits = seeds.raw_bits(sketch.seed, (*sketch.path, "leaf", i, "buckets"), d)
    counted = np.zeros(w)
    for bit, value in zip(bits.tolist(), vector, strict=True):
        counted[(bit >> 1) % w] += (1 - 2 * (bit & 1)) * value
    return hadamard(w) @ counted


def naive_sketch(sketch, vectors):
    """Sketch of v_0 ⊗ … ⊗ v_{p−1} from the tree of the docstring, float64."""
    p, m, w = sketch.degree, sketch.n_components, padded_size(sketch.n_components)

    def samples(first, end):
        value = naive_leaf(sketch, first, vectors[first]) if end - first == 1 else None
        if value is None:
            signs = seeds.signs(sketch.seed, (*sketch.path, "signs", first, end), w)
            value = hadamard(w) @ (signs * product(first, end) / math.sqrt(w))
        path = (*sketch.path, "rows", first, end)
        return value[seeds.balanced_integers(sketch.seed, path, len(value), w)]

    def product(first, end):
        middle = first + (end - first + 1) // 2
        return samples(first, middle) * samples(middle, end)

    root = samples(0, 1) if p == 1 else product(0, p)
    return root[:m] / math.sqrt(m)


def tensor(vectors):
    out = np.ones(1)
    for vector in vectors:
        out = np.kron(out, vector)
    return out


@both_leaves
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("p", "d", "m"), [(1, 5, 7), (2, 3, 1), (3, 3, 6), (4, 2, 8), (5, 2, 5), (6, 2, 16), (7, 2, 3)]
)
def test_is_the_explicit_matrix_times_the_tensor_products(p, d, m, dtype, leaves):
    sketch, x = PolySketch(p, m, 5, ("a",), leaves), matrix(3, d, dtype, 1)
    basis = np.eye(d)
    columns = [naive_sketch(sketch, [basis[i] for i in word]) for word in itertools.product(range(d), repeat=p)]
    explicit = np.stack(columns, axis=1)  # (m, d^p)
    found = sketch(x)
    assert found.shape == (p + 1, 3, m)
    assert found.dtype == dtype
    for k in range(p + 1):
        for i, row in enumerate(x.astype("float64")):
            expected = explicit @ tensor([row] * k + [basis[0]] * (p - k))
            scale = np.linalg.norm(row) ** k * np.linalg.norm(explicit, axis=0).max()
            assert np.abs(found[k, i] - expected).max() <= TOLERANCE[dtype] * scale * d**p


@both_leaves
@pytest.mark.parametrize("p", [2, 3, 6])
def test_every_power_is_unbiased(p, leaves):
    x, count = pair(0.6, 9, np.random.default_rng(3)), 600
    gram = np.zeros((count, p + 1, 2, 2))
    for seed in range(count):
        sketches = PolySketch(p, 24, seed, (), leaves)(x)
        gram[seed] = sketches @ sketches.transpose(0, 2, 1)
    error = gram.std(axis=0, ddof=1) / math.sqrt(count)
    exact = np.stack([(x @ x.T) ** k for k in range(p + 1)])
    assert (np.abs(gram.mean(axis=0) - exact) <= 4.5 * error + 1e-12).all()
    assert (error <= 0.1).all()


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
def test_variance_of_the_second_power_falls_as_the_formula(cosine):
    count, x = 1500, pair(cosine, 50, np.random.default_rng(17))
    bound = (1 + 2 * cosine**2) ** 2 - cosine**4  # MATH.md §4, times 1/m
    for m in (16, 64):
        sketches = (PolySketch(2, m, seed, ("v",))(x, degrees=[2])[0] for seed in range(count))
        products = np.array([a @ b for a, b in sketches])
        spread = products.var()
        assert abs(products.mean() - cosine**2) <= 4 * math.sqrt(spread / count)
        # Slack: four standard errors of a sample variance, from the sample's own fourth moment.
        error = math.sqrt(((products - products.mean()) ** 4).mean() - spread**2) / math.sqrt(count)
        assert m * spread <= bound + 4 * m * error
        if m == 16:  # 64 samples take each of the 64 entries once, which lowers it
            assert m * spread >= 0.5 * bound


@pytest.mark.parametrize("p", [4, 8])
def test_variance_of_higher_powers_stays_below_that_of_a_product_of_nodes(p):
    """A tree of p − 1 nodes: 1 + variance <= (1 + 8/m)^(p−1) for a unit vector, not 3^p."""
    count, m, x = 800, 64, pair(1.0, 30, np.random.default_rng(2))[:1]
    products = np.array([(PolySketch(p, m, seed)(x, degrees=[p]) ** 2).sum() for seed in range(count)])
    error = math.sqrt(((products - 1) ** 4).mean()) / math.sqrt(count)
    assert products.var() <= (1 + 8 / m) ** (p - 1) - 1 + 4 * error


def test_the_power_zero_is_one_constant_vector():
    x, sketch = matrix(4, 6), PolySketch(3, 50, 1)
    zero = sketch(x)[0]
    assert (zero == zero[0]).all()
    np.testing.assert_array_equal(zero, sketch(matrix(4, 6, seed=9))[0])
    squares = [(PolySketch(3, 50, seed)(x[:1], degrees=[0]) ** 2).sum() for seed in range(400)]
    assert abs(np.mean(squares) - 1) <= 4 * np.std(squares) / 20


@both_leaves
@pytest.mark.parametrize("p", [1, 2, 5, 8])
def test_some_degrees_are_those_of_all(p, leaves):
    x, sketch = matrix(6, 10), PolySketch(p, 20, 3, (), leaves)
    whole = sketch(x)
    for asked in ([p], [0], [p, 0, p], range(0, p + 1, 2), [max(1, p // 2)]):
        np.testing.assert_array_equal(sketch(x, degrees=asked), whole[list(asked)])
    assert sketch(x, degrees=[]).shape == (0, 6, 20)


def test_transforms_are_as_many_as_promised():
    for p in range(1, 40):
        kinds = program(p, tuple(range(p + 1))).steps[:, 0]
        assert (kinds == LEAF).sum() == p
        assert (kinds <= JOIN_CONSTANT).sum() <= p * (math.ceil(math.log2(p)) + 1)
        single = program(p, (p,))
        assert (single.steps[:, 0] <= JOIN_CONSTANT).sum() == max(1, 2 * (p - 1))
        assert single.n_slots <= math.ceil(math.log2(p)) + 2  # depth first: one vector a level


@both_leaves
def test_out_may_be_a_direct_sum_and_scale_multiplies(leaves):
    x, sketch = matrix(6, 11), PolySketch(3, 20, 1, (), leaves)
    wide = np.full((6, 90), 7.0)
    view = np.lib.stride_tricks.as_strided(wide[:, 5:], (6, 4, 20), (720, 160, 8))
    result = sketch(x, out=view.transpose(1, 0, 2), scale=4.0)
    np.testing.assert_array_equal(wide[:, 5:85], 4 * sketch(x).transpose(1, 0, 2).reshape(6, 80))
    np.testing.assert_array_equal(result[2], wide[:, 45:65])
    assert (wide[:, :5] == 7).all()
    assert (wide[:, 85:] == 7).all()


@both_leaves
def test_rows_do_not_depend_on_their_batch_or_threads(leaves):
    x, sketch = matrix(300, 70, "float32"), PolySketch(5, 500, 1, (), leaves)
    with threads.limited(1):
        whole = sketch(x)
    with threads.limited(2):
        np.testing.assert_array_equal(whole, sketch(x))
    parts = [sketch(x[start : start + 77]) for start in range(0, 300, 77)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(whole, sketch(np.asfortranarray(x)))
    np.testing.assert_array_equal(whole, sketch(x.reshape(300, 7, 2, 5)))
    np.testing.assert_array_equal(whole[:, 3:4], sketch(x[3:4]))


@both_leaves
@pytest.mark.parametrize("p", [1, 2, 5])
def test_steps_for_devices_give_the_same(p, leaves):
    """The array code of GPUs, run on NumPy arrays."""
    x, sketch = matrix(9, 14), PolySketch(p, 30, 2, (), leaves)
    expected = sketch(x)
    found = np.empty_like(expected)
    found[0] = expected[0]
    sketch._on_device(program(p, tuple(range(p + 1))), sketch._tables(14, x), x, found, 1 / math.sqrt(30))
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_zero_rows_and_no_rows():
    x, sketch = matrix(3, 12), PolySketch(4, 20, 0)
    x[1] = 0
    found = sketch(x)
    assert (found[1:, 1] == 0).all()
    assert np.isfinite(found).all()
    assert sketch(x[:0]).shape == (5, 0, 20)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.csr_matrix, scipy.sparse.coo_array])
def test_sparse_rows_give_the_bits_of_dense_ones(make, dtype):
    x = matrix(20, 300, dtype) * (np.random.default_rng(1).random((20, 300)) < 0.05)
    x[7] = 0
    sketch = PolySketch(3, 40, 2, (), "count")
    expected = sketch(x)
    np.testing.assert_array_equal(sketch(make(x)), expected)
    np.testing.assert_array_equal(sketch(sparse_rows(make(x)).rows(3, 9)), expected[:, 3:9])


def test_sparse_rows_in_any_order_and_with_repetitions():
    columns, values = np.array([4, 1, 4, 0]), np.array([1.0, 2.0, 0.5, 3.0])
    x = scipy.sparse.csr_array((values, columns, np.array([0, 3, 4])), shape=(2, 6))
    sketch = PolySketch(2, 16, 0, (), "count")
    np.testing.assert_array_equal(sketch(x), sketch(x.toarray()))
    assert not x.has_canonical_format  # the caller's matrix is left as it was
    rows = sparse_rows(x)
    lengths = np.linalg.norm(x.toarray(), axis=1)
    np.testing.assert_allclose(rows.squares(), lengths**2)
    np.testing.assert_array_equal(rows.dense(), x.toarray())
    np.testing.assert_allclose(sketch(rows.scaled(1 / lengths)), sketch(x.toarray() / lengths[:, None]))


@both_leaves
@pytest.mark.parametrize(("n", "d", "p", "m"), [(500, 300, 4, 1024), (3, 9, 8, 600), (200, 5000, 2, 64), (1, 1, 1, 1)])
def test_workspace_is_declared(n, d, p, m, leaves):
    x = matrix(n, d, "float32")
    sketch = PolySketch(p, m, 11, ("memory",), leaves)
    for degrees in (None, [p]):
        planned = sketch.workspace_bytes(n, d, 4, degrees)
        peak = peak_bytes(lambda degrees=degrees: sketch(x, degrees=degrees), planned)
        assert peak <= planned
        assert planned <= 3 * peak + 2**18


def test_other_inputs_are_refused():
    x = matrix(4, 8)
    for degree in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="degree is"):
            PolySketch(degree, 8, 0)
    with pytest.raises(InputError, match="n_components is 0"):
        PolySketch(2, 0, 0)
    with pytest.raises(InputError, match=r"leaves is 'osnap'.*'count'"):
        PolySketch(2, 8, 0, (), "osnap")
    with pytest.raises(InputError, match=r"degrees has 3.*0 to 2"):
        PolySketch(2, 8, 0)(x, degrees=[3])
    with pytest.raises(InputError, match="leaves='count'"):
        PolySketch(2, 8, 0)(scipy.sparse.csr_array(x))
    with pytest.raises(DtypeError, match=r"sparse.*int64"):
        PolySketch(2, 8, 0, (), "count")(scipy.sparse.csr_array(x.astype("int64")))
    with pytest.raises(DtypeError, match="int64"):
        PolySketch(2, 8, 0)(x.astype("int64"))
    with pytest.raises(InputError, match="at least one column"):
        PolySketch(2, 8, 0)(x[:, :0])
    with pytest.raises(InputError, match="out is"):
        PolySketch(2, 8, 0)(x, out=np.empty((2, 4, 8)))
    with pytest.raises(InputError, match="contiguous"):
        PolySketch(2, 8, 0)(x, out=np.empty((3, 4, 16))[:, :, ::2])
    broken = scipy.sparse.csr_array(x)
    broken.indices[0] = 99
    with pytest.raises(InputError, match=r"from 1 to 99|from 0 to 99"):
        PolySketch(2, 8, 0, (), "count")(broken)


@pytest.mark.gpu
@both_leaves
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("d", "p", "m"), [(9, 5, 700), (3000, 3, 4096)])
def test_gpu_matches_cpu(d, p, m, dtype, leaves):
    x = matrix(40, d, dtype)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    sketch = PolySketch(p, m, 3, (), leaves)
    found = arrays.to_host(sketch(arrays.to_device(x)))
    np.testing.assert_allclose(found, sketch(x), atol=TOLERANCE[dtype], rtol=0)
