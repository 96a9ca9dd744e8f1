"""CountSketch and TensorSketch: against explicit matrices and convolutions, their statistics, sparse rows, CUDA source on the host."""

import ctypes
import itertools
import math
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
import scipy.sparse
from contracts import peak_bytes

import ntkdask
from ntkdask import arrays, seeds, threads
from ntkdask.errors import DtypeError, InputError
from ntkdask.features.sketching.count_sketch import CountSketch, TensorSketch

TOLERANCE = {"float32": 1e-5, "float64": 1e-13}
SKETCHES = [CountSketch(40, 2, ("a",)), TensorSketch(1, 33, 2), TensorSketch(3, 40, 2, ("b",))]
every_sketch = pytest.mark.parametrize("sketch", SKETCHES, ids=str)


def matrix(n, d, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def pair(cosine, d, rng):
    """Two unit vectors of R^d with the given inner product."""
    basis, _ = np.linalg.qr(rng.standard_normal((d, 2)))
    return np.stack([basis[:, 0], cosine * basis[:, 0] + np.sqrt(1 - cosine**2) * basis[:, 1]])


def explicit(m, d, seed, path):
    """(m, d) matrix of a CountSketch: one random sign a column."""
    out = np.zeros((m, d))
    for i, word in enumerate(seeds.raw_bits(seed, (*path, "buckets"), d).tolist()):
        out[(word >> 1) % m, i] = -1 if word & 1 else 1
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (3, 50, 8), (4, 7, 100)])
def test_count_sketch_is_the_explicit_matrix(n, d, m, dtype):
    x = matrix(n, d, dtype)
    found = CountSketch(m, 5, ("p",))(x, scale=0.5)
    assert found.dtype == dtype
    expected = 0.5 * x @ explicit(m, d, 5, ("p",)).T
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * np.linalg.norm(x), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("p", "m"), [(1, 5), (2, 8), (3, 6), (4, 1)])
def test_tensor_sketch_is_a_circular_convolution(p, m, dtype):
    x, d = matrix(3, 4, dtype), 4
    factors = [explicit(m, d, 5, ("factor", i)) for i in range(p)]
    whole = np.zeros((m, d**p))  # column of e_i ⊗ e_j ⊗ ...: buckets add up modulo m, signs multiply
    for column, word in enumerate(itertools.product(range(d), repeat=p)):
        hits = [(int(np.abs(f[:, i]).argmax()), f[:, i].sum()) for f, i in zip(factors, word, strict=True)]
        whole[sum(bucket for bucket, _ in hits) % m, column] = math.prod(sign for _, sign in hits)
    found = TensorSketch(p, m, 5)(x)
    assert found.dtype == dtype
    for row, sketch in zip(x.astype("float64"), found, strict=True):
        tensor = np.ones(1)
        for _ in range(p):
            tensor = np.kron(tensor, row)
        np.testing.assert_allclose(
            sketch, whole @ tensor, atol=10 * TOLERANCE[dtype] * np.linalg.norm(row) ** p, rtol=0
        )


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("p", [1, 2])
def test_unbiased_and_variance_of_the_formulas(p, alpha):
    """CountSketch: at most (1 + α²)/m. TensorSketch at p = 2: (1 + α²)² + 2α⁴ over m, MATH.md §4."""
    count, x = 1500, pair(alpha, 60, np.random.default_rng(1))
    bound = 1 + alpha**2 if p == 1 else (1 + alpha**2) ** 2 + 2 * alpha**4
    for m in (16, 64):
        sketches = (CountSketch(m, s)(x) if p == 1 else TensorSketch(2, m, s)(x) for s in range(count))
        products = np.array([a @ b for a, b in sketches])
        spread = products.var()
        assert abs(products.mean() - alpha**p) <= 4 * math.sqrt(spread / count) + 1e-12
        error = math.sqrt(max(0.0, ((products - products.mean()) ** 4).mean() - spread**2)) / math.sqrt(count)
        assert m * spread <= 1.15 * bound + 4 * m * error  # "about": terms of the order of 1/m² and Σx⁴ beside
        assert m * spread >= 0.6 * bound


def test_tensor_sketch_of_higher_degrees_is_unbiased():
    x, count = pair(0.8, 20, np.random.default_rng(4)), 1200
    for p in (3, 5):
        products = np.array([np.prod(TensorSketch(p, 64, s)(x), axis=0).sum() for s in range(count)])
        assert abs(products.mean() - 0.8**p) <= 4 * products.std() / math.sqrt(count)


@every_sketch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.csc_matrix])
def test_sparse_rows_give_the_bits_of_dense_ones(sketch, dtype, make):
    x = matrix(70, 500, dtype) * (np.random.default_rng(1).random((70, 500)) < 0.02)
    x[5] = 0
    np.testing.assert_array_equal(sketch(make(x)), sketch(x))
    assert sketch(make(x)).dtype == dtype


@every_sketch
def test_rows_do_not_depend_on_their_batch_or_threads(sketch):
    x = matrix(400, 3000, "float32")
    with threads.limited(1):
        whole = sketch(x)
    with threads.limited(2):
        np.testing.assert_array_equal(whole, sketch(x))
    np.testing.assert_array_equal(whole, np.concatenate([sketch(x[i : i + 130]) for i in range(0, 400, 130)]))
    np.testing.assert_array_equal(whole, sketch(np.asfortranarray(x)))


def test_many_blocks_of_rows_are_those_of_one():
    x, sketch = matrix(200, 5), TensorSketch(2, 8192, 0)
    assert sketch._block_rows(8) < 100
    np.testing.assert_array_equal(sketch(x), np.concatenate([sketch(row[None]) for row in x]))


@every_sketch
def test_out_may_be_columns_and_scale_multiplies(sketch):
    x, m = matrix(6, 30), sketch.n_components
    wide = np.full((6, m + 10), 7.0)
    result = sketch(x, out=wide[:, 4 : 4 + m], scale=4.0)
    np.testing.assert_array_equal(result, 4 * sketch(x))
    assert (wide[:, :4] == 7).all()
    assert (wide[:, 4 + m :] == 7).all()


@every_sketch
def test_columns_do_not_depend_on_how_many_there_are(sketch):
    x = matrix(3, 40)
    padded = np.zeros((3, 90))
    padded[:, :40] = x
    np.testing.assert_array_equal(sketch(x), sketch(padded))


@every_sketch
def test_workspace_is_declared(sketch):
    for n, d in ((3000, 400), (2, 20_000), (1, 1)):
        x = matrix(n, d, "float32")
        planned = sketch.workspace_bytes(n, d, 4)
        peak = peak_bytes(lambda x=x: sketch(x), planned)
        assert peak <= planned
        assert planned <= 3 * peak + 2**17


@every_sketch
def test_zero_rows_and_no_rows(sketch):
    x = matrix(3, 12)
    x[1] = 0
    assert (sketch(x)[1] == 0).all()
    assert sketch(x[:0]).shape == (0, sketch.n_components)


def test_other_inputs_are_refused():
    x = matrix(4, 8)
    with pytest.raises(InputError, match="n_components is 0"):
        CountSketch(0, 0)
    with pytest.raises(InputError, match="degree is 0"):
        TensorSketch(0, 8, 0)
    for sketch in SKETCHES:
        with pytest.raises(DtypeError, match="int64"):
            sketch(x.astype("int64"))
        with pytest.raises(DtypeError, match=r"sparse.*bool"):
            sketch(scipy.sparse.csr_array(x > 0))
        with pytest.raises(InputError, match="at least one column"):
            sketch(x[:, :0])
        with pytest.raises(InputError, match="out is"):
            sketch(x, out=np.empty((4, 5)))


SHIM = """
#define COUNT_SKETCH_HOST
#define __device__
static struct { int x; } blockIdx;
static int thread, threads;
#define THREAD thread
#define THREADS threads
#define ENTRY static void
#include "count_sketch.cu"
#define HOST(T, NAME)                                                                                                   \\
    extern "C" void NAME(const T* x, long long stride, const int* columns, const T* signs, const int* starts, int m,    \\
                         T scale, T* out, long long stride_out, int n, int block) {                                     \\
        threads = block;                                                                                                \\
        for (blockIdx.x = 0; blockIdx.x < n; ++blockIdx.x)                                                              \\
            for (thread = 0; thread < block; ++thread)                                                                  \\
                count_rows_##NAME(x, stride, columns, signs, starts, m, scale, out, stride_out);                        \\
    }
HOST(float, float32)
HOST(double, float64)
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cuda_source_as_host_code(tmp_path, dtype):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = resources.files(ntkdask) / "features" / "sketching"
    (tmp_path / "shim.cpp").write_text(SHIM)
    library = tmp_path / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", f"-I{folder}", str(tmp_path / "shim.cpp"), "-o", str(library)], check=True
    )
    x, sketch, m = matrix(5, 70, dtype), CountSketch(17, 3), 17
    buckets = sketch.buckets(70, x.dtype)
    columns = np.argsort(buckets.bucket, kind="stable").astype(np.int32)
    starts = np.searchsorted(buckets.bucket[columns], np.arange(m + 1)).astype(np.int32)
    signs, out = buckets.sign[columns], np.full((5, 20), 7, dtype)
    scalar = {"float32": ctypes.c_float, "float64": ctypes.c_double}[dtype]

    def address(array):
        return ctypes.c_void_p(array.ctypes.data)

    ctypes.CDLL(str(library))[dtype](
        address(x),
        ctypes.c_longlong(70),
        address(columns),
        address(signs),
        address(starts),
        m,
        scalar(0.5),
        address(out),
        ctypes.c_longlong(20),
        5,
        4,
    )
    np.testing.assert_allclose(out[:, :m], 0.5 * sketch(x), atol=TOLERANCE[dtype] * 10, rtol=0)
    assert (out[:, m:] == 7).all()


@pytest.mark.gpu
@every_sketch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gpu_matches_cpu(sketch, dtype):
    x = matrix(40, 300, dtype)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(arrays.to_host(sketch(arrays.to_device(x))), sketch(x), atol=TOLERANCE[dtype], rtol=0)
