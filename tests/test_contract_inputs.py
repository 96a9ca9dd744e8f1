"""Arrays of every kind where they enter: byte order, masks, two dtypes; over every registered class and every workflow."""

import dask.array as da
import numpy as np
import pytest
from contracts import KERNELS, LEARNED, MAPS, import_all
from module_examples import AnyRows

import ntkdask as nd
from ntkdask import activations, arrays, modules
from ntkdask.errors import InputError
from ntkdask.features import ArcCosineFeatures, NTKSketch, Nystrom
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.kernels import NTK, RBF, ArcCosine, PseudoNTK
from ntkdask.preprocessing import fit_in_memory
from ntkdask.solvers.dual import DualEigh

import_all("ntkdask.kernels")
import_all("ntkdask.features")

everything = pytest.mark.parametrize("example", KERNELS + MAPS + LEARNED, ids=str)
every_kernel = pytest.mark.parametrize("example", KERNELS, ids=str)


def made(example):
    """The kernel, or the map, fitted where it learns."""
    thing = example.make()
    return thing.fit(example.rows(7), np.arange(7.0)) if example in LEARNED else thing


def foreign(x):
    """The same numbers in the other byte order."""
    return x.astype(x.dtype.newbyteorder(">"))


def masked(x, entry=3):
    return np.ma.array(x, mask=np.arange(x.size).reshape(x.shape) == entry)


@everything
def test_byte_order_does_not_matter(example):
    thing, x = made(example), example.rows(6)
    expected, got = thing(x), thing(foreign(x))
    assert got.dtype.isnative
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, expected)


@everything
def test_masked_entries_are_refused_and_others_are_numbers(example):
    thing, x = made(example), example.rows(6, "float32")
    with pytest.raises(InputError, match=r"x is a masked array with 1 masked entry.*filled"):
        thing(masked(x))
    got = thing(np.ma.array(x, mask=False))
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, thing(x))


@every_kernel
def test_two_dtypes_give_the_wider_one_in_either_order(example):
    kernel = example.make()
    x, y = example.rows(6, "float32"), example.rows(5, "float32", seed=1)
    expected = kernel(x.astype("float64"), y.astype("float64"))
    for left, right in (("float32", ">f8"), ("float64", "float32")):
        got = kernel(x.astype(left), y.astype(right))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_a_sketch_of_two_dtypes_gives_the_wider_one():
    sketch = TensorSRHT(16, seed=0)
    x = np.random.default_rng(0).standard_normal((4, 5))
    expected = sketch(x, x.astype("float32").astype("float64"))
    got, other = sketch(x, x.astype("float32")), sketch(x.astype("float32"), x)
    assert got.dtype == other.dtype == np.float64
    np.testing.assert_array_equal(got, expected)


def test_matrices_and_lists_of_masked_rows():
    x = np.random.default_rng(0).standard_normal((4, 3))
    np.testing.assert_array_equal(ArcCosine(1)(x.view(np.matrix)), ArcCosine(1)(x))
    with pytest.raises(InputError, match="2 masked entries"):
        arrays.as_array([np.ma.array(x[0], mask=[True, False, True]), x[1]])
    with pytest.raises(InputError, match="masked"):
        activations.get("relu").dual(masked(x), 1.0, 0.5)


@pytest.mark.parametrize("lazy", [False, True], ids=["memory", "dask"])
def test_workflows_keep_float64_of_either_byte_order(lazy, tmp_path):
    x = np.random.default_rng(0).standard_normal((6, 4))
    given = da.from_array(foreign(x), chunks=(3, 4)) if lazy else foreign(x)
    kernel, features = NTK(nd.fully_connected(1)), ArcCosineFeatures(8)
    for url in (None, tmp_path / "k"):
        got = nd.kernel_matrix(kernel, given, url=url)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got.compute(), kernel(x), rtol=0, atol=1e-13 * 8)
    for url in (None, tmp_path / "f"):
        got = nd.featurize(features, given, url=url)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got.compute(), features(x), rtol=0, atol=1e-13)
    assert nd.approximation_error(features, given) == nd.approximation_error(features, x)
    stored = nd.write_dataset(tmp_path / "d", given, foreign(np.arange(6.0)))
    assert stored.digest == nd.write_dataset(tmp_path / "same", x, np.arange(6.0)).digest


def test_datasets_of_float64_are_computed_in_float64(tmp_path):
    """Their dtype is a name, which is not equal to a NumPy type."""
    x = np.random.default_rng(0).standard_normal((6, 4))
    y, z = np.arange(6.0)[:, None], nd.write_dataset(tmp_path / "z", x[:2].astype("float32"))
    stored = nd.write_dataset(tmp_path / "x", x, y[:, 0])
    kernel, features = RBF(0.2), ArcCosineFeatures(8)
    for url in (None, tmp_path / "k"):
        assert nd.kernel_matrix(kernel, stored, url=url).dtype == np.float64
    assert nd.kernel_matrix(kernel, z, stored).dtype == np.float64
    assert nd.kernel_matrix(kernel, z).dtype == np.float32
    assert nd.featurize(features, stored).dtype == np.float64
    assert nd.approximation_error(features, stored) == nd.approximation_error(features, x)
    module = modules.finite_module(nd.fully_connected(1), 4, (4,), dtype="float64")
    linear = {
        of: nd.predict_linearized(module, given, y, kernel="pntk") for of, given in (("x", x), ("url", stored.url))
    }
    np.testing.assert_allclose(linear["url"].predictions, linear["x"].predictions, rtol=1e-10)


CALLS = {
    "kernel_matrix": lambda x, y, url: nd.kernel_matrix(RBF(1.0), x),
    "kernel_matrix y": lambda x, y, url: nd.kernel_matrix(RBF(1.0), np.ones((2, 4)), x),
    "featurize": lambda x, y, url: nd.featurize(ArcCosineFeatures(8), x, url=url),
    "approximation_error": lambda x, y, url: nd.approximation_error(ArcCosineFeatures(8), x),
    "write_dataset": lambda x, y, url: nd.write_dataset(url, x),
    "write_dataset dask": lambda x, y, url: nd.write_dataset(url, da.from_array(x, chunks=(3, 4))),
    "PseudoNTK": lambda x, y, url: PseudoNTK(AnyRows(), input_layout=None)(np.ones((2, 4)), x),
    "RidgeRegressor": lambda x, y, url: nd.RidgeRegressor().fit(x, y),
    "KernelRidgeRegressor": lambda x, y, url: nd.KernelRidgeRegressor().fit(x, y),
    "predict": lambda x, y, url: nd.RidgeRegressor().fit(np.eye(6, 4), y).predict(x),
    "FeatureTransformer": lambda x, y, url: nd.FeatureTransformer(ArcCosineFeatures(8)).fit_transform(x),
    "preprocessing": lambda x, y, url: fit_in_memory(["standardize"], x),
    "fit": lambda x, y, url: Nystrom(RBF(1.0), n_components=3).fit(x),
    "spectrum": lambda x, y, url: nd.spectrum(x[:4]),
    "solver": lambda x, y, url: DualEigh.factorise(x[:4], y[:4]),
    "linearized": lambda x, y, url: nd.predict_stored_linearized(x[:4], None, y[:4], np.ones((4, 1)), np.ones((4, 1))),
    "train": lambda x, y, url: nd.train(AnyRows().build(), x, np.ones((6, 1)), url),
    "ensemble": lambda x, y, url: nd.predict_ensemble(nd.fully_connected(1), x, y),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_masked_rows_are_refused_everywhere(call, tmp_path):
    x, y = np.random.default_rng(0).standard_normal((6, 4)), np.arange(6.0)
    with pytest.raises(InputError, match="masked array with 1 masked entry"):
        call(masked(x), y, tmp_path / "new")
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").glob("*.json"))


def test_masked_targets_and_weights_are_refused(tmp_path):
    x, y = np.eye(6, 4), np.arange(6.0)
    hidden = masked(y)
    for call in (
        lambda: nd.write_dataset(tmp_path / "a", x, hidden),
        lambda: nd.write_dataset(tmp_path / "b", x, y, weights=hidden),
        lambda: nd.RidgeRegressor().fit(x, hidden),
        lambda: nd.RidgeRegressor().fit(x, y, hidden),
        lambda: nd.RidgeRegressor().fit(x, y).score(x, hidden),
        lambda: DualEigh.factorise(np.eye(6), hidden),
        lambda: nd.predict_ensemble(nd.fully_connected(1), x, hidden),
    ):
        with pytest.raises(InputError, match="masked array with 1 masked entry"):
            call()


def test_sparse_rows_of_foreign_byte_order():
    from scipy import sparse

    sketch = NTKSketch(nd.fully_connected(1), 96, leaves="count")
    x = sparse.random_array((6, 40), density=0.2, rng=np.random.default_rng(0)).tocsr()
    other = x.copy()
    other.data = foreign(x.data)
    np.testing.assert_array_equal(sketch(other), sketch(x))


@pytest.mark.parametrize("example", [e for e in MAPS if e.name == "CNTKSketch" or e.label == "exact norms"], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_float32_rows_of_any_size_have_the_features_of_float64(example, scale):
    """Maps that divide by lengths of features, whose squares leave float32."""
    features, x = example.make(), (example.rows(6) * scale).astype("float32")
    expected = features(x.astype("float64"))
    np.testing.assert_allclose(features(x), expected, rtol=0, atol=3e-5 * np.abs(expected).max())
