"""Exact kernels: against the naive twin, closed values, equivalences of conventions."""

import math

import numpy as np
import pytest
from contracts import BIASED, FROZEN_ENDS, FROZEN_READOUT, GENERAL, normwise, rows
from reference import kappa, network_kernels, papers_recursion

from ntkdask.errors import InputError
from ntkdask.kernels import NNGP, NTK, ArcCosine, both
from ntkdask.networks import Dense, Network, fully_connected

TOLERANCE = {"float32": 1e-6, "float64": 1e-10}
# κ₀ turns an error ε in a cosine near ±1 into √(2ε)/π, once per layer (MATH.md §1)
NEAR_ONE = 1e-7
NETWORKS = {
    "linear": fully_connected(0),
    "depth 1": fully_connected(1),
    "depth 4": fully_connected(4),
    "raw": fully_connected(2, normalize=False, weight_variance=1.7),
    "biases": BIASED,
    "scaled": fully_connected(2, bias_variance=0.2, scale_inputs=True, readout_weight_variance=0.4),
    "frozen ends": FROZEN_ENDS,
    "frozen readout": FROZEN_READOUT,
    "general": GENERAL,
    "two dense": Network((Dense(0.5, 0.1), Dense(2.0, 0.3, trainable=False), *fully_connected(1).layers)),
}


def plain(network):
    """The layers as `reference` takes them."""
    return [
        ("dense", layer.weight_variance, layer.bias_variance, layer.trainable)
        if isinstance(layer, Dense)
        else ("relu", layer.normalize)
        for layer in network.layers
    ]


def generic(n, dtype="float64", seed=0):
    """Rows of which no two are parallel, and a zero row."""
    x = np.random.default_rng(seed).standard_normal((n, 6))
    x[1] = 0
    return x.astype(dtype)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_the_naive_twin(name, dtype):
    network, x = NETWORKS[name], generic(9, dtype)
    y = generic(9, dtype, seed=1)[2:]  # with biases, two zero rows would be parallel
    nngp, ntk = network_kernels(plain(network), x, y, network.scale_inputs)
    for kernel, expected in ((NNGP(network), nngp), (NTK(network), ntk)):
        error = normwise(kernel(x, y), expected, kernel.diagonal(x), kernel.diagonal(y))
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_symmetric_calls_and_diagonals_against_the_naive_twin(name):
    """With duplicate, opposite and zero rows."""
    network, x = NETWORKS[name], rows(9)
    exact = network_kernels(plain(network), x, x, network.scale_inputs)
    for kernel, expected in zip((NNGP(network), NTK(network)), exact, strict=True):
        diagonal = kernel.diagonal(x)
        np.testing.assert_allclose(diagonal, np.diag(expected), rtol=NEAR_ONE)
        assert normwise(kernel(x), expected, diagonal, diagonal) <= NEAR_ONE


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_papers_recursion(depth):
    x, y = generic(8)[2:], generic(8, seed=1)[2:]
    np.testing.assert_allclose(NTK(fully_connected(depth))(x, y), papers_recursion(depth, x, y), atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_diagonal_of_normalised_relu(depth, dtype):
    """Θ(x, x) = (L + 1)‖x‖², Σ(x, x) = ‖x‖²."""
    x, network = rows(9, dtype), fully_connected(depth)
    squares = (x.astype("float64") ** 2).sum(axis=1)
    rtol = {"float32": 1e-6, "float64": 1e-13}[dtype]
    for kernel, factor in ((NTK(network), depth + 1), (NNGP(network), 1)):
        np.testing.assert_allclose(kernel.diagonal(x), factor * squares, rtol=rtol)
        np.testing.assert_allclose(np.diag(kernel(x)), factor * squares, rtol=rtol)


def test_raw_relu_of_depth_one():
    """The lecture's ‖x‖‖z‖/2π·[sin φ + 2(π − φ) cos φ]."""
    x, z = generic(6)[2:], generic(6, seed=1)[2:]
    norms = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(z, axis=1))
    angle = np.arccos(x @ z.T / norms)
    expected = norms / (2 * np.pi) * (np.sin(angle) + 2 * (np.pi - angle) * np.cos(angle))
    np.testing.assert_allclose(NTK(fully_connected(1, normalize=False))(x, z), expected, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
def test_neural_tangents_convention(depth):
    """W_std = √2, raw ReLU, inputs divided by d: each layer's 2·relu is the normalised one, the readout doubles."""
    x, y = generic(6), generic(5, seed=1)
    theirs = fully_connected(depth, weight_variance=2, normalize=False, scale_inputs=True)
    ours = fully_connected(depth)
    # σ_w² = 2 at L + 1 layers against the gain 2 at L activations, and 1/d
    np.testing.assert_allclose(NTK(theirs)(x, y), 2 / 6 * NTK(ours)(x, y), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(NNGP(theirs)(x, y), 2 / 6 * NNGP(ours)(x, y), rtol=1e-12, atol=1e-15)
    nngp, ntk = network_kernels(plain(theirs), x, y, scale_inputs=True)
    np.testing.assert_allclose(NTK(theirs)(x, y), ntk, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(NNGP(theirs)(x, y), nngp, rtol=1e-12, atol=1e-15)


def test_zero_rows_give_zero_without_biases_and_the_constant_with_them():
    x = rows(6)
    assert (NTK(fully_connected(3))(x)[1] == 0).all()
    assert (NNGP(fully_connected(3))(x)[1] == 0).all()
    zero = np.zeros((1, 6))
    _, expected = network_kernels(plain(BIASED), zero, x)
    np.testing.assert_allclose(NTK(BIASED)(zero, x), expected, rtol=1e-12)
    assert (expected != 0).all()


def test_orthogonal_and_opposite_unit_rows():
    x = np.eye(3)
    assert ArcCosine(1)(x[:1], x[1:2])[0, 0] == pytest.approx(1 / math.pi, rel=1e-15)
    assert ArcCosine(0)(x[:1], x[1:2])[0, 0] == 0.5
    assert ArcCosine(1)(x[:1], -x[:1])[0, 0] == pytest.approx(0, abs=1e-15)
    assert NTK(fully_connected(1))(x[:1], -x[:1])[0, 0] == pytest.approx(0, abs=1e-15)
    assert NTK(fully_connected(1))(x[:1], x[1:2])[0, 0] == pytest.approx(1 / math.pi, rel=1e-15)


@pytest.mark.parametrize("order", [0, 1])
def test_arc_cosine_against_its_formula(order):
    x, y = generic(7), generic(5, seed=1)
    for i, row in enumerate(x):
        for j, column in enumerate(y):
            size = np.linalg.norm(row) * np.linalg.norm(column)
            expected = (size if order else 1) * kappa(order, row @ column / size if size else 0)
            assert ArcCosine(order)(x, y)[i, j] == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_kernels_of_relu_are_homogeneous(scale):
    x, y, kernel = generic(6), generic(5, seed=1), NTK(fully_connected(2))
    np.testing.assert_allclose(kernel(scale * x, y), scale * kernel(x, y), rtol=1e-12, atol=1e-13 * scale)


def test_near_duplicates_in_float32_lose_nothing_to_the_cosine():
    """Rows one float32 rounding apart: κ₀ of a float32 cosine would be wrong by 1.5e-4."""
    x = generic(30, "float32")[2:]
    y = np.nextafter(x, np.float32(np.inf))
    kernel = NTK(fully_connected(3))
    _, expected = network_kernels(plain(kernel.network), x, y)
    assert normwise(kernel(x, y), expected, kernel.diagonal(x), kernel.diagonal(y)) <= TOLERANCE["float32"]


def test_both_gives_both():
    x, y = generic(5), generic(4, seed=1)
    for pair in (both(GENERAL, x, y), both(GENERAL)(x, y)):
        np.testing.assert_array_equal(pair[0], NNGP(GENERAL)(x, y))
        np.testing.assert_array_equal(pair[1], NTK(GENERAL)(x, y))
    np.testing.assert_array_equal(both(GENERAL)(x)[1], NTK(GENERAL)(x))


@pytest.mark.parametrize("order", [-1, 151, 1.5, True, "1", None])
def test_other_orders_are_refused(order):
    with pytest.raises(InputError, match="ArcCosine: order is"):
        ArcCosine(order)


@pytest.mark.parametrize("kernel", [NTK, NNGP])
def test_a_kernel_is_of_a_network(kernel):
    with pytest.raises(InputError, match="network is 'relu'; give a Network"):
        kernel("relu")
