"""Exact kernels of images: against the naive twin and Arora's recursion, closed values, rounding."""

import numpy as np
import pytest
from activation_examples import ALL, ALL_IDS
from contracts import normwise
from image_examples import GAP, HARD, LAYERED, RELU, hard_images, images, plain, twin
from reference import arora_recursion, pixel_variances
from sweeps import sweep

from ntkdask import activations
from ntkdask.kernels import NNGP, NTK, both
from ntkdask.kernels.planes import reference as planes
from ntkdask.networks import (
    Activation,
    Conv,
    Dense,
    LayerNorm,
    Network,
    Residual,
    convolutional,
    fully_connected,
    myrtle,
)


def check(network, x, tolerance=1e-10):
    """NNGP and NTK, each and in one pass, of all images with themselves and of the first with the last, against the twin."""
    cut = len(x) // 2
    pair = both(network, x[:cut], x[cut:])
    for kernel, exact, together in zip((NNGP(network), NTK(network)), twin(network, x), pair, strict=True):
        own, symmetric = np.diag(exact), kernel(x)
        np.testing.assert_array_equal(symmetric, symmetric.T)
        assert normwise(symmetric, exact, own, own) <= tolerance
        assert normwise(kernel(x[:cut], x[cut:]), exact[:cut, cut:], own[:cut], own[cut:]) <= tolerance
        np.testing.assert_array_equal(kernel(x[:cut], x[cut:]), together)
        np.testing.assert_array_equal(kernel.diagonal(x), np.diag(symmetric))


# --- against the twin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize("readout", ["gap", "flatten"])
def test_depths_and_readouts(depth, readout):
    check(convolutional(depth, readout=readout), images(3, (5, 4, 3)))


@pytest.mark.parametrize(
    ("padding", "stride", "filter_size"), sweep(["same", "valid", "circular"], [1, 2, 3, (1, 2)], [1, 2, 3, 5, (3, 1)])
)
def test_filters(padding, stride, filter_size):
    """A geometry of every kind, then one that reads its planes."""
    first = Conv(filter_size, padding, stride)
    layers = (Conv(2, "same", weight_variance=1.3), RELU, first, RELU, Conv(2, "circular"), RELU, GAP, Dense())
    check(Network(layers), images(2, (6, 5, 2)))


@pytest.mark.parametrize("name", LAYERED)
def test_layers(name):
    check(Network(LAYERED[name]), images(3, (6, 6, 2)))


@pytest.mark.parametrize("name", ["pool 3", "projection", "tail of residuals", "pool in a residual"])
def test_scaled_inputs_of_images_that_are_not_square(name):
    check(Network(LAYERED[name], scale_inputs=True), images(2, (6, 4, 3)))


EXPANSIONS = {"tanh", "sigmoid", "silu", "softplus"}


@pytest.mark.parametrize(("name", "parameters"), ALL, ids=ALL_IDS)
def test_activations(name, parameters):
    """Unit norms per pixel: monomials of degree 20 grow fast."""
    x = images(2, (3, 2, 2))
    x /= np.linalg.norm(x, axis=3, keepdims=True)
    sigma = activations.get(name, **parameters)
    tail = (GAP, Dense()) if name in EXPANSIONS else (Conv(1), Activation(sigma), GAP, Dense())
    check(Network((Conv((2, 1), bias_variance=0.1), Activation(sigma), *tail)), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_presets(channels):
    check(convolutional(2, (3, 1), "valid", bias_variance=0.1, scale_inputs=True), images(2, (6, 3, channels)))
    check(myrtle(5, scale_inputs=True), images(2, (8, 4, channels)))


@pytest.mark.parametrize(
    "name", ["projection", "tail of residuals", "pools around a residual", "nested", "circular residual"]
)
def test_variance_maps_are_those_of_the_nodes(name):
    """S(p, p) before every Activation and LayerNorm, branches before shortcuts."""
    network, x = Network(LAYERED[name]), images(3, (6, 6, 2))
    maps, seen = planes.variance_maps(network, x), []

    def watch(layers, before):
        """Twins of what stands before every node, in order."""
        for position, layer in enumerate(layers):
            head = (*before, *layers[:position])
            if isinstance(layer, (Activation, LayerNorm)):
                seen.append(image_variances(head, x))
            elif isinstance(layer, Residual):
                watch(layer.branch, head)
                watch(layer.shortcut, head)

    watch(network.layers[: network.readout_position], ())
    assert len(maps) == len(seen)
    for ours, exact in zip(maps, seen, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-14)


def image_variances(layers, x):
    """(n, H', W'): S(p, p) of every image after the layers."""
    return np.array([pixel_variances(plain(layers), row) for row in x])


# --- other recursions, closed values ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 4])
def test_the_recursion_of_arora(depth):
    x = images(3, (6, 5, 3))
    exact = np.array([[arora_recursion(depth, a, b) for b in x] for a in x])
    network = convolutional(depth - 1, trainable_ends=False)
    own = np.diag(exact)
    assert normwise(NTK(network)(x, x[1:]), exact[:, 1:], own, own[1:]) <= 1e-10
    assert normwise(NTK(network)(x), exact, own, own) <= 1e-10
    scaled = convolutional(depth - 1, trainable_ends=False, scale_inputs=True)
    np.testing.assert_allclose(NTK(scaled)(x, x[1:]), exact[:, 1:] / 3, rtol=1e-10)


@pytest.mark.parametrize("readout", ["gap", "flatten"])
def test_neural_tangents_convention(readout):
    """W_std = √2, raw ReLU, inputs divided by C: 2·relu at every layer is the normalised one, the readout doubles."""
    x, y = images(3), images(2, seed=1)
    theirs = convolutional(2, readout=readout, weight_variance=2, normalize=False, scale_inputs=True)
    for kernel in (NTK, NNGP):
        ours = kernel(convolutional(2, readout=readout))(x, y)
        np.testing.assert_allclose(kernel(theirs)(x, y), 2 / 3 * ours, rtol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_images_of_one_pixel_are_vectors(depth):
    """A 3×3 filter on one pixel sees it and zeros: S/9 at every convolution."""
    x, y = images(4, (1, 1, 5)), images(3, (1, 1, 5), seed=1)
    for network in (convolutional(depth, 1), convolutional(depth, 3, weight_variance=9, readout_weight_variance=1)):
        for kernel in (NTK, NNGP):
            exact = kernel(fully_connected(depth))(x, y)
            np.testing.assert_allclose(kernel(network)(x, y), exact, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(
                kernel(network).diagonal(x), kernel(fully_connected(depth)).diagonal(x), rtol=1e-12
            )


def test_linear_networks_in_closed_form():
    x, y = images(3, (5, 4, 3)), images(2, (5, 4, 3), seed=1)
    gap = x.mean(axis=(1, 2)) @ y.mean(axis=(1, 2)).T
    flat = x.reshape(3, -1) @ y.reshape(2, -1).T / 20
    np.testing.assert_allclose(NTK(convolutional(0))(x, y), gap, atol=1e-14)
    np.testing.assert_allclose(NTK(convolutional(0, readout="flatten"))(x, y), flat, atol=1e-14)
    # a circular filter moves means nowhere: q⁻²·Σ_a of one plane is that plane's mean again
    circular = Network((Conv(3, "circular"), Conv(2, "circular"), GAP, Dense()))
    np.testing.assert_allclose(NTK(circular)(x, y), 3 * gap, atol=1e-14)


def test_circular_networks_do_not_see_where_an_image_begins():
    x = images(2, (5, 4, 3))
    moved = np.roll(x[1:], (2, 3), axis=(1, 2))
    network = Network((Conv(3, "circular"), RELU, Conv((2, 3), "circular"), RELU, GAP, Dense()))
    np.testing.assert_allclose(NTK(network)(x[:1], moved), NTK(network)(x[:1], x[1:]), rtol=1e-12)


def test_networks_of_vectors_with_norms_and_residuals():
    """The layers after the readout, on images of one pixel, against the same network of vectors."""
    tail = (
        LayerNorm(),
        Residual((RELU, Dense(0.7, 0.2), Activation("erf"), Dense())),
        RELU,
        Residual((Dense(),), (Dense(), RELU)),
        Dense(),
    )
    vectors, x = Network((Dense(1.0, 0.1), *tail)), images(5, (1, 1, 6))
    x[1], x[3] = 0, x[2]
    of_pixels = Network((GAP, Dense(1.0, 0.1), *tail))
    exact = twin(of_pixels, x)
    flat = x.reshape(5, 6)
    for kernel, matrix in zip((NNGP, NTK), exact, strict=True):
        own = np.diag(matrix)
        for network, rows in ((vectors, flat), (of_pixels, x)):
            assert normwise(kernel(network)(rows), matrix, own, own) <= 1e-10
            assert normwise(kernel(network)(rows[:2], rows[2:]), matrix[:2, 2:], own[:2], own[2:]) <= 1e-10
            np.testing.assert_allclose(kernel(network).diagonal(rows), own, rtol=1e-12)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rounding(name, dtype):
    network, x = HARD[name], hard_images(dtype)
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    if name == "tail" and dtype == "float64":
        tolerance = (
            1e-7  # c = 1 of equal and of constant images only to the rounding of a mean, which κ₀ turns into this
        )
    for kernel, exact in zip((NNGP(network), NTK(network)), twin(network, x), strict=True):
        own = np.diag(exact)
        found = [(kernel(x), exact), (kernel(x[:5], x), exact[:5]), (kernel(x, x[:2].copy()), exact[:, :2])]
        for k, matrix in found:
            assert k.dtype == dtype
            assert np.isfinite(k).all()
            assert normwise(k, matrix, own[: len(k)], own[: k.shape[1]]) <= tolerance
        np.testing.assert_allclose(kernel.diagonal(x), own, rtol={"float64": 1e-10, "float32": 1e-6}[dtype])


@pytest.mark.parametrize("activation", ["step", "sign", "erf", "gelu", "gaussian"])
def test_zero_images_of_other_activations(activation):
    x = hard_images()[5:]
    network = Network((Conv(), Activation(activation), GAP, Dense()))
    for kernel, exact in zip((NNGP(network), NTK(network)), twin(network, x), strict=True):
        assert np.isfinite(kernel(x)).all()
        np.testing.assert_allclose(kernel(x), exact, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_scale(scale):
    x = images(3, dtype="float32")
    for kernel in (NTK(convolutional(2)), NTK(Network(LAYERED["pool"]))):
        np.testing.assert_allclose(kernel(np.float32(scale) * x), scale**2 * kernel(x), rtol=1e-5)


def test_networks_of_vectors_take_images_as_rows():
    x = images(3)
    np.testing.assert_array_equal(NTK(fully_connected(2))(x), NTK(fully_connected(2))(x.reshape(3, -1)))
