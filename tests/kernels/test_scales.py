"""Kernels of rows of extreme sizes: equal to the float64 values wherever these fit, on every path."""

import numpy as np
import pytest

from ntkdask.kernels import NNGP, NTK, ArcCosine
from ntkdask.kernels.scales import power
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Network,
    Residual,
    convolutional,
    fully_connected,
)

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
NORMALISED = Network(
    (
        Conv(3),
        LayerNorm(),
        Activation("relu"),
        AvgPool(2),
        Conv(3, bias_variance=0.1),
        Activation("relu"),
        Flatten(),
        Dense(),
    )
)
LATE = Network(
    (Conv(3), Activation("relu"), AvgPool(2), Conv(3), LayerNorm(), Activation("erf"), GlobalAvgPool(), Dense())
)
RESIDUAL = Network(
    (Conv(3), Residual((Activation("relu"), Conv(3)), (Conv(1),)), Activation("abs"), GlobalAvgPool(), Dense(2.0))
)
VECTORS = Network((Dense(), LayerNorm(), Dense(1.0, 0.1), Activation("gelu"), Dense()))


def images(n, seed):
    """Images with a black pixel and one black image."""
    x = np.random.default_rng(seed).standard_normal((n, 4, 4, 2))
    x[0, 1, 2] = 0
    x[-1] = 0
    return x


def rows_for(network, n, seed):
    x = images(n, seed)
    return x if network.takes_images else x.reshape(n, -1)


@pytest.mark.parametrize(
    ("layers", "p"),
    [
        (convolutional(2).layers, 1),
        (convolutional(1, bias_variance=0.1).layers, None),
        (NORMALISED.layers, 0),
        (LATE.layers, 0),
        (RESIDUAL.layers, 1),
        (VECTORS.layers, 0),
        (fully_connected(1, "erf").layers, None),
        (fully_connected(2, "normalized_gaussian").layers, 1),
        ((Dense(), Activation("step"), Dense(1.0, 0.2)), 0),
        ((Dense(), Activation("monomial"), Dense(), Activation("relu"), Dense()), 2),
        ((Dense(1.0, 0.1), LayerNorm(), Dense()), None),
        ((Dense(), Residual((Activation("sign"), Dense())), Dense()), None),
    ],
)
def test_powers_are_those_of_the_kernels(layers, p):
    assert power(layers) == p
    network = Network(layers)
    x, y = rows_for(network, 4, 0), rows_for(network, 3, 1)
    for kernel in (NTK(network), NNGP(network)):
        base, scaled = kernel(x, y), kernel(4.0 * x, 0.5 * y)
        same = np.allclose(scaled, 2.0 ** (p or 0) * base, rtol=1e-7, atol=1e-12 * np.abs(base).max())
        assert same == (p is not None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "kernel", [NTK(NORMALISED), NNGP(NORMALISED), NTK(LATE), NTK(VECTORS)], ids=["ntk", "nngp", "late", "vectors"]
)
def test_behind_a_layer_norm_size_does_not_matter(kernel, dtype):
    x, y = (rows_for(kernel.network, n, n).astype(dtype) for n in (4, 3))
    tiny, large = (1e-38, 1e30) if dtype == "float32" else (1e-300, 1e300)
    expected, own = kernel(x, y), kernel.diagonal(x)
    for s, t in ((1e-20, 1e-20), (1e18, 1e18), (tiny, 1.0), (large, tiny)):
        left, right = x * np.dtype(dtype).type(s), y * np.dtype(dtype).type(t)
        # as many digits as a subnormal has
        tolerance = 1e-3 if dtype == "float32" and tiny in (s, t) else TOLERANCE[dtype]
        np.testing.assert_allclose(kernel(left, right), expected, rtol=0, atol=tolerance * own.max())
        np.testing.assert_allclose(kernel.diagonal(left), own, rtol=0, atol=tolerance * own.max())
    np.testing.assert_allclose(kernel(x * x.dtype.type(large)), kernel(x), rtol=0, atol=TOLERANCE[dtype] * own.max())


BIASED = convolutional(2, bias_variance=0.2, readout="flatten")
BIASED_NORMALISED = Network(
    (Conv(3, bias_variance=0.2), LayerNorm(), Activation("relu"), AvgPool(2), Conv(3), GlobalAvgPool(), Dense())
)
WIDE = Network(
    (Conv(3, weight_variance=1e20), Activation("relu"), Conv(3, weight_variance=1e20), LayerNorm(), Flatten(), Dense())
)


@pytest.mark.parametrize(
    "network",
    [convolutional(2), NORMALISED, RESIDUAL, BIASED, BIASED_NORMALISED, WIDE],
    ids=["plain", "normalised", "residual", "biased", "biased normalised", "wide"],
)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_float32_images_give_the_float64_values_that_fit(network, scale):
    x, y = (images(n, n) for n in (3, 4))
    x *= scale
    y[:2] *= scale  # and others of ordinary size beside them
    x, y = x.astype("float32"), y.astype("float32")
    for kernel in (NTK(network), NNGP(network)):
        for got, expected in (
            (kernel(x), kernel(x.astype("float64"))),
            (kernel(x, y), kernel(x.astype("float64"), y.astype("float64"))),
        ):
            fits = np.abs(expected) < np.finfo("float32").max
            error = np.abs(got - expected)[fits]
            # a subnormal keeps steps of 1.4e-45
            assert (error <= TOLERANCE["float32"] * np.abs(expected[fits]).max(initial=0.0) + 2e-45).all()
            assert np.isinf(got[~fits]).all()


def test_pixels_of_very_different_sizes_in_one_image():
    x = images(3, 0)
    x[:, :2] *= 1e-22
    x[:, 2:] *= 1e18
    kernel, single = NTK(NORMALISED), x.astype("float32")
    expected = kernel(single.astype("float64"))
    np.testing.assert_allclose(kernel(single), expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize("order", [0, 1, 3])
def test_arc_cosine_of_any_size(order):
    x, y = (rows_for(fully_connected(1), n, n) for n in (3, 4))
    kernel = ArcCosine(order)
    expected, large, tiny = kernel(x, y), 2.0**600, 2.0**-600
    np.testing.assert_array_equal(kernel(x * large, y * tiny), expected)
    np.testing.assert_array_equal(kernel(x * tiny, y * tiny), np.ldexp(expected, -1200 * order))
    np.testing.assert_array_equal(kernel.diagonal(x * tiny), np.ldexp(kernel.diagonal(x), -1200 * order))


def test_powers_of_two_keep_the_bits_of_each_row():
    """A row has the values that it has beside rows of other sizes."""
    x = images(4, 0).astype("float32")
    kernel, scaled = NTK(convolutional(2)), x.copy()
    scaled[1] *= np.float32(2.0**45)
    base, other = kernel(x), kernel(scaled)
    factor = np.where(np.arange(4) == 1, 2.0**45, 1.0)
    np.testing.assert_array_equal(other, (base * np.outer(factor, factor)).astype("float32"))
