"""The contract of kernels and feature maps, over every registered class."""

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from contracts import KERNELS, LEARNED, MAPS, images, import_all, normwise, peak_bytes, rows
from sweeps import sweep

from ntkdask import registry
from ntkdask.errors import InputError, JobError
from ntkdask.features.base import FeatureMap
from ntkdask.kernels.base import Kernel

import_all("ntkdask.kernels")
import_all("ntkdask.features")

DTYPES = ["float32", "float64"]
# κ₀ turns an error ε in a cosine near ±1 into √(2ε)/π (MATH.md §1); kernels run in float64 whatever comes in.
KERNEL_TOLERANCE = {"float32": 1e-6, "float64": 1e-7}
ROUNDING = {"float32": 5e-7, "float64": 1e-14}
"""Of the diagonal, a sum of as many products in another order."""
MAP_TOLERANCE = {"float32": 1e-4, "float64": 1e-12}
SIGMAS = 4.5  # of a few hundred entries of Gaussian means, one in a thousand runs has one beyond
every_kernel = pytest.mark.parametrize("example", KERNELS, ids=str)
every_map = pytest.mark.parametrize("example", MAPS, ids=str)
every_kernel_of_vectors = pytest.mark.parametrize("example", [e for e in KERNELS if not e.takes_images], ids=str)
everything_of_vectors = pytest.mark.parametrize("example", [e for e in KERNELS + MAPS if not e.takes_images], ids=str)
everything = pytest.mark.parametrize("example", KERNELS + MAPS, ids=str)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def both_for_the_first(dtype, size):
    """Which memory is measured every day: the first size in both dtypes, the second in float32, the third in float64."""
    return size == 0 or dtype == size - 1


def slow_where_draws_are(examples):
    """The examples as parameters; those whose maps take long to draw are slow."""
    return [pytest.param(e, marks=pytest.mark.slow if e.slow_draws else ()) for e in examples]


def one_a_mechanism(examples):
    """The examples as parameters; of those that draw in the same way (class, order, sampling, method) all but the first are slow."""
    seen, found = set(), []
    for example in examples:
        drawn = (example.name, *(str(example.arguments.get(key)) for key in ("order", "sampling", "method")))
        found.append(pytest.param(example, marks=pytest.mark.slow if drawn in seen or example.slow_draws else ()))
        seen.add(drawn)
    return found


@pytest.mark.parametrize(
    ("kind", "examples"), [("kernel", KERNELS), ("feature map", MAPS + LEARNED)], ids=["kernel", "map"]
)
def test_every_class_has_examples(kind, examples):
    """Add the class to tests/contracts.py when this fails. Other tests may register classes of their own."""
    ours = {name for name in registry.names(kind) if registry.lookup(name).__module__.startswith("ntkdask.")}
    assert {e.name for e in examples} == ours


# --- inputs -------------------------------------------------------------------------------------------------------


@everything
@both_dtypes
def test_shape_and_dtype_are_kept(example, dtype):
    thing, x = example.make(), example.rows(9, dtype)
    out = thing(x)
    assert out.shape == (9, 9 if example in KERNELS else thing.n_components)
    assert out.dtype == dtype
    if example in KERNELS:
        assert thing(x, example.rows(4, dtype, seed=1)).shape == (9, 4)
        assert thing(x, example.rows(4, dtype, seed=1)).dtype == dtype
        assert thing.diagonal(x).shape == (9,)
        assert thing.diagonal(x).dtype == dtype


@everything
@pytest.mark.parametrize("dtype", ["float16", "int64", "uint8", "bool", "complex128"])
def test_other_dtypes_are_refused(example, dtype):
    x = np.ones((3, *example.row_shape)).astype(dtype)
    with pytest.raises(TypeError, match=f"{dtype}.*float32 or float64"):
        example.make()(x)
    if example in KERNELS:
        with pytest.raises(TypeError, match=dtype):
            example.make()(np.ones((3, *example.row_shape)), x)
        with pytest.raises(TypeError, match=dtype):
            example.make().diagonal(x)


@everything
def test_one_dimension_is_refused(example):
    with pytest.raises(InputError, match=r"\(6,\)"):
        example.make()(np.ones(6))


@every_kernel_of_vectors
def test_rows_of_other_widths_are_refused(example):
    with pytest.raises(InputError, match=r"6 features.*5"):
        example.make()(np.ones((3, 6)), np.ones((2, 5)))


@everything_of_vectors
@both_dtypes
def test_images_are_their_flattened_rows(example, dtype):
    thing = example.make()
    np.testing.assert_array_equal(thing(images(7, dtype)), thing(rows(7, dtype)))


@everything
def test_memory_order_does_not_matter(example):
    thing, x = example.make(), example.rows(8)
    wide = np.zeros((16, *x.shape[1:-1], 2 * x.shape[-1]))
    wide[::2, ..., ::2] = x
    expected = thing(x)
    scale = np.abs(expected).max()
    for other in (np.asfortranarray(x), wide[::2, ..., ::2], np.ascontiguousarray(x[::-1])[::-1]):
        np.testing.assert_allclose(thing(other), expected, rtol=0, atol=1e-12 * scale)


@everything
def test_inputs_are_not_written_to(example):
    x = example.rows(8)
    x.flags.writeable = False
    example.make()(x)


@everything
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_float32_stays_finite(example, scale):
    """Zero rows, duplicate rows, opposite rows, tiny and large ones; n = 1."""
    thing, x = example.make(), (example.rows(9) * scale).astype("float32")
    for part in (x, x[:1], x[1:2]):
        assert np.isfinite(thing(part)).all()
    if example in KERNELS:
        assert np.isfinite(thing(x, x)).all()
        assert np.isfinite(thing.diagonal(x)).all()


@everything
def test_no_rows_give_an_empty_result(example):
    thing = example.make()
    assert thing(example.rows(3)[:0]).shape == ((0, 0) if example in KERNELS else (0, thing.n_components))


# --- kernels ------------------------------------------------------------------------------------------------------


@every_kernel
@both_dtypes
def test_symmetric_call_equals_the_call_with_x_twice(example, dtype):
    kernel, x = example.make(), example.rows(20, dtype)
    k = kernel(x)
    np.testing.assert_array_equal(k, k.T)
    diagonal = kernel.diagonal(x)
    assert normwise(kernel(x, x.copy()), k, diagonal, diagonal) <= KERNEL_TOLERANCE[dtype]


@every_kernel
@both_dtypes
def test_diagonal_agrees(example, dtype):
    kernel, x = example.make(), example.rows(20, dtype)
    np.testing.assert_allclose(kernel.diagonal(x), np.diag(kernel(x)), rtol=ROUNDING[dtype], atol=0)
    assert (kernel.diagonal(x) >= 0).all()


@every_kernel
def test_kernels_are_positive_semi_definite(example):
    values = np.linalg.eigvalsh(example.make()(example.rows(40)))
    assert values[0] >= -1e-12 * values[-1]
    assert values[-1] > 0


@every_kernel
@both_dtypes
def test_kernel_does_not_depend_on_tiles(example, dtype):
    kernel, x, y = example.make(), example.rows(31, dtype), example.rows(17, dtype, seed=1)
    y[:6] = x[:6]
    whole = kernel(x, y)
    tiles = [[kernel(x[i : i + 10], y[j : j + 7]) for j in range(0, 17, 7)] for i in range(0, 31, 10)]
    error = normwise(np.block(tiles), whole, kernel.diagonal(x), kernel.diagonal(y))
    assert error <= KERNEL_TOLERANCE[dtype]
    diagonal, few = kernel.diagonal(x), kernel.diagonal(x[:5])
    np.testing.assert_allclose(few, diagonal[:5], rtol=ROUNDING[dtype], atol=0)
    assert not example.rows_stand_alone or (few == diagonal[:5]).all()


@every_kernel
def test_kernel_of_y_and_x_is_the_transpose(example):
    kernel, x, y = example.make(), example.rows(8), example.rows(5, seed=1)
    assert normwise(kernel(y, x).T, kernel(x, y), kernel.diagonal(x), kernel.diagonal(y)) <= 1e-14


@every_kernel_of_vectors
@pytest.mark.parametrize(
    ("dtype", "size"), sweep(DTYPES, [(300, 200, 20), (250, None, 20), (40, 30, 2000)], fast=both_for_the_first)
)
def test_kernel_workspace_is_declared(example, dtype, size):
    n, m, width = size
    kernel, x = example.make(), rows(n, dtype, width=width)
    y = None if m is None else rows(m, dtype, seed=1, width=width)
    planned = kernel.workspace_bytes(n, m or n, x.itemsize, (width,))
    peak = peak_bytes(lambda: kernel(x, y), planned)
    assert peak <= planned + 2**14  # small vectors: norms, variances, Python objects
    assert planned <= 4 * peak


# --- feature maps -------------------------------------------------------------------------------------------------


@every_map
def test_protocols(example):
    feature_map = example.make()
    assert isinstance(feature_map, FeatureMap)
    assert isinstance(feature_map.target, Kernel)


@every_kernel
def test_kernel_protocol(example):
    assert isinstance(example.make(), Kernel)


@every_map
@both_dtypes
def test_features_do_not_depend_on_tiles(example, dtype):
    """Weights do not depend on n: pieces agree to rounding. 1100 rows are more than a block of any map."""
    feature_map, x = example.make(), example.rows(1100, dtype)
    whole = feature_map(x)
    edges = [0, 1, 14, 46, 300, 1099, 1100]
    pieces = np.concatenate([feature_map(x[a:b]) for a, b in pairwise(edges)])
    far = np.abs(whole - pieces) > MAP_TOLERANCE[dtype] * np.abs(whole).max()
    # a step may flip where x·w is 0 to rounding: in float32 about one entry in a million, and a sketch spreads it over a row
    assert far.any(axis=1).sum() <= {"float32": 2, "float64": 0}[dtype]


@every_map
def test_float32_features_are_the_float64_ones_rounded(example):
    x = example.rows(200)
    wide, narrow = example.make()(x), example.make()(x.astype("float32"))
    far = np.abs(wide - narrow) > MAP_TOLERANCE["float32"] * np.abs(wide).max()
    assert far.any(axis=1).sum() <= 1


@every_map
def test_same_seed_same_bits_and_another_seed_another_map(example):
    x = example.rows(9)
    np.testing.assert_array_equal(example.make(seed=3)(x), example.make(seed=3)(x))
    assert not np.allclose(example.make(seed=3)(x), example.make(seed=4)(x))


@every_map
def test_parameters(example):
    feature_map = example.make()
    parameters = feature_map.get_params()
    assert example.arguments.items() <= parameters.items()
    assert type(feature_map)(**parameters) == feature_map
    changed = feature_map.replace(seed=17)
    assert changed.get_params() == {**parameters, "seed": 17}
    assert feature_map.seed == 0
    with pytest.raises(InputError, match="no parameter 'n_component'; did you mean 'n_components'"):
        feature_map.replace(n_component=8)


@every_map
@pytest.mark.parametrize("n_components", [0, -3, 2.5, "8", True, None])
def test_bad_component_counts_are_refused(example, n_components):
    with pytest.raises(InputError, match="n_components is"):
        example.make().replace(n_components=n_components)


@every_map
def test_fit_of_a_data_independent_map_gives_the_map(example):
    feature_map = example.make()
    assert feature_map.fit(example.rows(9), np.zeros((9, 1))) is feature_map


@every_map
@pytest.mark.parametrize(
    ("dtype", "size"), sweep(DTYPES, [(500, 20), (100, 8, 8, 3), (20, 2000)], fast=both_for_the_first), ids=str
)
def test_map_workspace_is_declared(example, dtype, size):
    n, *shape = size
    parts = {name: 300 for name in ("n_relu", "n_step") if name in example.arguments}
    feature_map = example.make(n_components=example.workspace_components, **parts)
    shape = example.shaped(tuple(shape))
    x = np.random.default_rng(0).standard_normal((n, *shape)).astype(dtype)
    planned = feature_map.workspace_bytes(n, x.itemsize, shape)
    peak = peak_bytes(lambda: feature_map(x), planned)
    assert peak <= planned
    assert planned <= 4 * peak


# --- maps that must be fitted -------------------------------------------------------------------------------------


every_learned = pytest.mark.parametrize("example", LEARNED, ids=str)


def two_targets(x):
    """(n, 2) numbers to learn from."""
    return np.abs(x.reshape(len(x), -1)[:, :2]).astype("float64")


@every_learned
@both_dtypes
def test_fitted_maps_keep_shapes_dtypes_and_tiles(example, dtype):
    x = example.rows(60, dtype)
    fitted = example.make().fit(x, two_targets(x))
    assert isinstance(fitted, FeatureMap)
    assert isinstance(fitted.target, Kernel)
    assert fitted.n_components <= example.make().n_components
    whole = fitted(x)
    assert whole.shape == (60, fitted.n_components)
    assert whole.dtype == dtype
    pieces = np.concatenate([fitted(x[a:b]) for a, b in pairwise([0, 1, 20, 60])])
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=MAP_TOLERANCE[dtype] * np.abs(whole).max())
    assert fitted(x[:0]).shape == (0, fitted.n_components)
    assert fitted.fit(x) is fitted


@every_learned
def test_fitted_maps_follow_seed_and_rows_alone(example):
    x = example.rows(60)
    y = two_targets(x)
    fitted = example.make(seed=3).fit(x, y)
    assert example.make(seed=3).fit(x.copy(), y) == fitted
    assert example.make(seed=4).fit(x, y) != fitted
    again = pickle.loads(pickle.dumps(fitted))
    assert again == fitted
    np.testing.assert_array_equal(again(x), fitted(x))
    table = json.loads(json.dumps(registry.to_config(example.make())))
    assert registry.from_config(table, "feature map") == example.make()


@every_learned
def test_a_call_before_fit_is_refused(example):
    with pytest.raises(InputError, match=f"{example.name}.* is not fitted: call the map that fit"):
        example.make()(example.rows(9))


@every_learned
@pytest.mark.parametrize("n_components", [0, 2.5, None])
def test_bad_component_counts_of_learned_maps_are_refused(example, n_components):
    with pytest.raises(InputError, match="n_components is"):
        example.make().replace(n_components=n_components)


# --- configuration ------------------------------------------------------------------------------------------------


@everything
def test_configuration_round_trip(example):
    thing = example.make()
    kind = "kernel" if example in KERNELS else "feature map"
    table = json.loads(json.dumps(registry.to_config(thing)))
    again = registry.from_config(table, kind)
    assert again == thing
    assert type(again) is type(thing)
    assert hash(again) == hash(thing)
    assert registry.digest(again) == registry.digest(thing)
    key = next(k for k in table if k != "type")
    with pytest.raises(JobError, match=f"unknown key '{key}s' .*did you mean '{key}'"):
        registry.from_config({**table, f"{key}s": 1}, kind)


@everything
def test_pickling(example):
    thing, x = example.make(), example.rows(9)
    expected = thing(x)  # filled caches must not change what is pickled
    again = pickle.loads(pickle.dumps(thing))
    assert again == thing
    np.testing.assert_array_equal(again(x), expected)


# --- statistics ---------------------------------------------------------------------------------------------------


def products_over_seeds(feature_map, x, count):
    """(count, pairs): ⟨φ(x_i), φ(x_j)⟩, i >= j, under `count` seeds."""
    pairs = np.tril_indices(len(x))
    features = (feature_map.replace(seed=seed)(x) for seed in range(count))
    return np.array([(phi @ phi.T)[pairs] for phi in features])


def exact_and_scale(feature_map, x):
    """Target and √(K_ii·K_jj) of the same pairs."""
    pairs = np.tril_indices(len(x))
    diagonal = feature_map.target.diagonal(x)
    return feature_map.target(x)[pairs], np.sqrt(np.outer(diagonal, diagonal))[pairs]


def stated_bias(feature_map, x):
    """Bias of each pair, in parts of √(K_ii·K_jj), that a map states itself: what a truncated series lacks at any n_components."""
    stated = getattr(feature_map, "truncation_error", 0.0)
    of_rows = stated(x) if callable(stated) else np.full(len(x), stated)
    return np.sqrt(np.outer(of_rows, of_rows))[np.tril_indices(len(x))]


@pytest.mark.parametrize("example", slow_where_draws_are(e for e in MAPS if e.bias_order is None), ids=str)
def test_map_is_unbiased(example):
    """Up to what the map states."""
    feature_map, x, count = example.make(), example.rows(6), 500
    products = products_over_seeds(feature_map, x, count)
    exact, scale = exact_and_scale(feature_map, x)
    error = products.std(axis=0, ddof=1) / np.sqrt(count)
    allowed = (1e-12 + stated_bias(feature_map, x)) * scale
    assert (np.abs(products.mean(axis=0) - exact) <= SIGMAS * error + allowed).all()
    # the test has power: a factor of 1.06 on the diagonal would be seen
    own = exact[exact == scale]
    assert (SIGMAS * error[exact == scale][own > 0] <= 0.06 * own[own > 0]).all()


@pytest.mark.parametrize("example", slow_where_draws_are(e for e in MAPS if e.bias_order is not None), ids=str)
def test_bias_of_deep_maps_is_small(example):
    """Features of layer 1 are random when layer 2 bends them: E f(K̂) − f(K) ≈ ½f''(K)·Var K̂ = O(1/m), here <= K/m."""
    feature_map, x, count = example.make(n_components=200), example.rows(6), 300
    products = products_over_seeds(feature_map, x, count)
    exact, scale = exact_and_scale(feature_map, x)
    error = products.std(axis=0, ddof=1) / np.sqrt(count)
    allowed = scale * (feature_map.n_components**-example.bias_order + stated_bias(feature_map, x))
    assert (np.abs(products.mean(axis=0) - exact) <= SIGMAS * error + allowed).all()


@pytest.mark.slow
def test_bias_of_deep_maps_shrinks():
    example, count = next(e for e in MAPS if e.label == "frozen ends"), 2500
    x, bias, error = example.rows(6)[[0, 2, 5]], {}, {}
    for m in (4, 32):
        feature_map = example.make(n_components=m)
        products = products_over_seeds(feature_map, x, count)
        exact, scale = exact_and_scale(feature_map, x)
        bias[m] = (products.mean(axis=0) - exact) / scale
        error[m] = products.std(axis=0, ddof=1) / scale / np.sqrt(count)
    worst = np.argmax(np.abs(bias[4]) / error[4])
    assert abs(bias[4][worst]) > 4 * error[4][worst]  # it is there
    assert abs(bias[32][worst]) < 0.4 * abs(bias[4][worst])  # and falls: 1/√8 = 0.35, 1/8 = 0.13


@pytest.mark.parametrize("example", one_a_mechanism(MAPS), ids=str)
def test_variance_falls_as_one_over_m(example):
    x, count = example.rows(6)[[0, 2, 5]], 150
    variance = []
    for m in (48, 192):
        parts = {name: m // 3 for name in ("n_relu", "n_step") if name in example.arguments}
        products = products_over_seeds(example.make(n_components=m, **parts), x, count)
        variance.append(products.var(axis=0, ddof=1).sum())
    assert 2.5 <= variance[0] / variance[1] <= 6
