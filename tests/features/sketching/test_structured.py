"""Structured directions against the matrix that they stand for, and what features of them keep."""

import math

import numpy as np
import pytest
from contracts import FROZEN_ENDS, FROZEN_READOUT, GENERAL
from scipy.linalg import hadamard

from ntkdask import seeds, threads
from ntkdask.errors import InputError
from ntkdask.features import ArcCosineFeatures, FourierFeatures, NTKRandomFeatures, ntk_layers
from ntkdask.features.sketching.structured import PRODUCT, RELU, STEP, structured_bytes, structured_directions
from ntkdask.networks import fully_connected

SIZES = [(1, 5), (3, 4), (8, 8), (9, 40), (20, 17), (64, 200), (100, 128), (130, 700)]


def matrix(seed, path, d, m, scale, law):
    """W (d, m) by the formula: D H/√p, then a diagonal and H for every p columns."""
    p = 1 << max(0, math.ceil(math.log2(d)))
    h, blocks = hadamard(p).astype(float), -(-m // p)
    rotation = h * np.pad(seeds.signs(seed, (*path, "rotation"), d), (0, p - d)) / math.sqrt(p)
    if law == "spherical":
        diagonals = seeds.sphere(seed, (*path, "diagonals"), p, blocks, scale=scale * math.sqrt(p))
    else:
        diagonals = seeds.normals(seed, (*path, "diagonals"), p, blocks, scale=scale)
    whole = np.concatenate([(h * diagonals[:, b] @ rotation).T for b in range(blocks)], axis=1)
    return whole[:d, :m]


@pytest.mark.parametrize("law", ["spherical", "gaussian"])
@pytest.mark.parametrize(("d", "m"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_products_are_those_of_the_matrix(d, m, law, dtype, tolerance):
    x = np.random.default_rng(d).standard_normal((7, d)).astype(dtype)
    directions = structured_directions(3, ("a", 1), d, m, x, 0.7, law)
    exact = x.astype("float64") @ matrix(3, ("a", 1), d, m, 0.7, law)
    assert directions.shape == (d, m)
    assert directions.nbytes == structured_bytes(d, m, x.itemsize)
    for kind, expected in ((PRODUCT, exact), (RELU, np.maximum(exact, 0))):
        out = directions.into(x, np.full((7, m), np.nan, dtype), kind)
        np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(exact).max())
    steps = directions.into(x, np.empty((7, m), dtype), STEP)
    clear = np.abs(exact) > tolerance * np.abs(exact).max()
    np.testing.assert_array_equal(steps[clear], exact[clear] > 0)


@pytest.mark.parametrize("law", ["spherical", "gaussian"])
def test_directions_have_their_lengths(law):
    """The rows of an identity give the directions themselves."""
    like = np.eye(64)
    w = structured_directions(0, (), 64, 640, like, 1.0, law).into(like, np.empty((64, 640)))
    lengths = np.linalg.norm(w, axis=0).reshape(10, 64)
    if law == "spherical":
        np.testing.assert_allclose(lengths, 8.0, rtol=1e-12)
    else:
        # every block has one length, that of 64 normals
        np.testing.assert_allclose(lengths, lengths[:, :1] + np.zeros((1, 64)), rtol=1e-12)
        assert 0.5 < np.std(lengths[:, 0]) * math.sqrt(2) < 1.7
    assert np.abs(w.mean()) < 4 / math.sqrt(64 * 640)


@pytest.mark.parametrize("kind", [PRODUCT, RELU, STEP])
@pytest.mark.parametrize(("d", "m"), SIZES)
def test_the_path_of_devices_on_the_host(d, m, kind):
    """What a GPU computes, step by step, with NumPy's functions."""
    x = np.random.default_rng(d).standard_normal((7, d))
    directions = structured_directions(3, (), d, m, x)
    here, there = directions.into(x, np.empty((7, m)), kind), directions._device_into(x, np.empty((7, m)), kind)
    np.testing.assert_allclose(there, here, atol=1e-12 * np.abs(here).max(initial=1.0))


def test_exact_norms_of_devices_on_the_host(monkeypatch):
    x, features = np.random.default_rng(0).standard_normal((9, 12)), NTKRandomFeatures(GENERAL, 200, exact_norms=True)
    x[3] = 0
    here = features(x)
    monkeypatch.setattr(ntk_layers, "is_device_array", lambda a: True)
    np.testing.assert_allclose(features(x), here, rtol=1e-12)


def test_rows_do_not_depend_on_their_batch_nor_on_threads():
    x = np.random.default_rng(0).standard_normal((300, 700)).astype("float32")
    directions = structured_directions(1, (), 700, 5000, x)
    with threads.limited(1):
        one = directions.into(x, np.empty((300, 5000), "float32"), RELU)
        parts = np.concatenate(
            [
                directions.into(x[i : i + 77], np.empty((min(77, 300 - i), 5000), "float32"), RELU)
                for i in range(0, 300, 77)
            ]
        )
    with threads.limited(2):
        two = directions.into(x, np.empty((300, 5000), "float32"), RELU)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, parts)


def test_column_slices_and_strided_rows():
    x = np.random.default_rng(0).standard_normal((6, 40))
    directions = structured_directions(1, (), 20, 50, x)
    wide = np.full((6, 80), 7.0)
    directions.into(x[:, ::2], wide[:, 11:61])
    expected = directions.into(np.ascontiguousarray(x[:, ::2]), np.empty((6, 50)))
    np.testing.assert_array_equal(wide[:, 11:61], expected)
    assert (np.delete(wide, np.s_[11:61], axis=1) == 7).all()


def test_what_is_no_number_stays_so():
    x = np.ones((3, 5))
    x[1, 2] = np.nan
    out = ArcCosineFeatures(12, sampling="structured")(x)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("arguments", [{"exact_norms": 1}, {"exact_norms": True, "sampling": "optimized"}])
def test_exact_norms_that_cannot_be(arguments):
    with pytest.raises(InputError, match="exact_norms"):
        NTKRandomFeatures(fully_connected(1), 8, **arguments)


def test_no_rows():
    assert ArcCosineFeatures(12, sampling="structured")(np.ones((0, 5))).shape == (0, 12)
    assert FourierFeatures(13, sampling="structured")(np.ones((0, 5))).shape == (0, 13)


NETWORKS = [
    fully_connected(1),
    fully_connected(3),
    fully_connected(2, weight_variance=1.3, bias_variance=0.2),
    fully_connected(2, weight_variance=1.7, normalize=False, scale_inputs=True),
]


@pytest.mark.parametrize("sampling", ["gaussian", "spherical", "structured"])
@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
def test_exact_norms_are_those_of_the_kernel(network, kernel, sampling, dtype, tolerance):
    x = np.random.default_rng(0).standard_normal((9, 12)).astype(dtype) * np.logspace(-3, 3, 9, dtype=dtype)[:, None]
    x[4] = 0
    features = NTKRandomFeatures(network, 200, sampling=sampling, kernel=kernel, exact_norms=True)
    phi = features(x).astype("float64")
    np.testing.assert_allclose((phi * phi).sum(axis=1), features.target.diagonal(x.astype("float64")), rtol=tolerance)


def test_exact_norms_of_frozen_layers():
    x = np.random.default_rng(0).standard_normal((9, 12))
    for network in (FROZEN_ENDS, FROZEN_READOUT, GENERAL):
        features = NTKRandomFeatures(network, 200, exact_norms=True)
        phi = features(x)
        np.testing.assert_allclose((phi * phi).sum(axis=1), features.target.diagonal(x), rtol=1e-12)


@pytest.mark.parametrize(("d", "depth"), [(6, 1), (784, 1), (784, 3)])
def test_exact_norms_lessen_the_error(d, depth):
    x, network = np.random.default_rng(0).standard_normal((60, d)), fully_connected(depth)
    exact = NTKRandomFeatures(network, 8).target(x)

    def error(**changes):
        found = []
        for seed in range(12):
            phi = NTKRandomFeatures(network, 512, seed=seed, **changes)(x)
            found.append(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))
        return np.mean(found)

    plain = error()
    assert error(exact_norms=True) < 0.95 * plain
    assert error(exact_norms=True, sampling="structured") < plain
