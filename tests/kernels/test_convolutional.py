"""Exact kernels of images: against the naive twin and Arora's recursion, closed values, rounding, bad input."""

import itertools

import numpy as np
import pytest
from activation_examples import ALL, ALL_IDS
from contracts import normwise, peak_bytes
from reference import arora_recursion, image_kernels, pixel_variances, slopes_dual

from ntkdask import activations, threads
from ntkdask.errors import DtypeError, InputError
from ntkdask.kernels import NNGP, NTK, both
from ntkdask.kernels.planes import reference as planes
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
    myrtle,
)

RELU = Activation("relu")
GAP = GlobalAvgPool()


def plain(layers):
    """Layers as `reference.image_kernels` takes them; duals of activations with slopes are the twin's own."""
    found = []
    for layer in layers:
        if isinstance(layer, Conv):
            found.append(
                (
                    "conv",
                    layer.filter,
                    layer.padding,
                    layer.strides,
                    layer.weight_variance,
                    layer.bias_variance,
                    layer.trainable,
                )
            )
        elif isinstance(layer, Dense):
            found.append(("dense", layer.weight_variance, layer.bias_variance, layer.trainable))
        elif isinstance(layer, Activation):
            found.append(("activation", *duals(layer)))
        elif isinstance(layer, Residual):
            found.append(("residual", plain(layer.branch), plain(layer.shortcut)))
        elif isinstance(layer, AvgPool):
            found.append(("pool", layer.window))
        else:
            found.append(({LayerNorm: "norm", GlobalAvgPool: "gap", Flatten: "flatten"}[type(layer)],))
    return found


def duals(layer):
    """k and k' of an Activation, as functions of (a, b, c)."""
    sigma, gain = layer.sigma, layer.gain
    if sigma.slopes:
        return slopes_dual(*sigma.slopes, gain)
    return lambda a, b, c: gain * sigma.dual(a, b, c), lambda a, b, c: gain * sigma.dual_derivative(a, b, c)


def twin(network, x, y=None):
    return image_kernels(plain(network.layers), x, y, x.shape[3] if network.scale_inputs else 1.0)


def images(n, shape=(6, 6, 3), seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(dtype)


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


@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("filter_size", [1, 2, 3, 5, (3, 1)])
def test_filters(padding, stride, filter_size):
    """A geometry of every kind, then one that reads its planes."""
    first = Conv(filter_size, padding, stride)
    layers = (Conv(2, "same", weight_variance=1.3), RELU, first, RELU, Conv(2, "circular"), RELU, GAP, Dense())
    check(Network(layers), images(2, (6, 5, 2)))


LAYERED = {
    "pool": (Conv(), RELU, AvgPool(2), Conv(), RELU, GAP, Dense()),
    "pool columns": (Conv(), RELU, AvgPool((2, 1)), Conv(), RELU, Flatten(), Dense()),
    "pool 3": (Conv(2), RELU, AvgPool((3, 2)), Conv(), RELU, GAP, Dense()),
    "pool twice": (Conv(), RELU, AvgPool((3, 1)), Conv(), RELU, AvgPool(2), Conv(), RELU, Flatten(), Dense()),
    "pool of a convolution": (Conv(), AvgPool(2), RELU, Conv(), RELU, GAP, Dense()),
    "pool of circular": (Conv(3, "circular"), RELU, AvgPool(2), Conv(2, "circular"), RELU, GAP, Dense()),
    "pool first": (AvgPool(2), Conv(), RELU, GAP, Dense()),
    "biases": (Conv(3, "same", 1, 1.5, 0.2), RELU, Conv(3, "valid", 1, 0.7, 0.1), RELU, GAP, Dense(2.0, 0.3)),
    "frozen": (
        Conv(trainable=False),
        RELU,
        Conv(3, "same", 1, 1.2, 0.1, trainable=False),
        RELU,
        Conv(),
        RELU,
        GAP,
        Dense(),
    ),
    "all frozen": (Conv(trainable=False), RELU, GAP, Dense(trainable=False)),
    "two convolutions": (Conv(), Conv(2, "same", 2), RELU, Flatten()),
    "norm": (Conv(), LayerNorm(), RELU, Conv(3, "same", 1, 1.0, 0.3), LayerNorm(), RELU, GAP, Dense()),
    "norm of biases": (Conv(3, "same", 1, 1.0, 0.3), LayerNorm(), RELU, Conv(), LayerNorm(), Flatten(), Dense()),
    "residual": (Conv(), Residual((RELU, Conv(), RELU, Conv())), RELU, GAP, Dense()),
    "projection": (
        Conv(),
        Residual((RELU, Conv(3, "same", 2), RELU, Conv(3, "same", 1, 0.5)), (Conv(1, "same", 2),)),
        RELU,
        Residual((Conv(), LayerNorm(), RELU, Conv())),
        GAP,
        Dense(),
    ),
    "circular residual": (
        Conv(3, "circular"),
        Residual((RELU, Conv(3, "circular"))),
        RELU,
        Conv(2, "circular", 2),
        RELU,
        GAP,
    ),
    "nested": (
        Conv(),
        Residual((Residual((RELU, Conv(2)), (Conv(1), LayerNorm())), RELU, Conv()), (Residual((RELU, Conv())),)),
        RELU,
        Flatten(),
        Dense(),
    ),
    "pool in a residual": (
        Conv(),
        Residual((RELU, Conv(), AvgPool(2)), (RELU, AvgPool(2), Conv())),
        RELU,
        GAP,
        Dense(),
    ),
    "pools around a residual": (
        Conv(),
        RELU,
        AvgPool(2),
        Conv(),
        Residual((RELU, Conv(), RELU, Conv())),
        AvgPool(3),
        RELU,
        GAP,
        Dense(),
    ),
    "tail": (Conv(), RELU, GAP, Dense(1.2, 0.1), RELU, Dense(0.8, trainable=False), Activation("erf"), Dense()),
    "tail of residuals": (
        Conv(),
        RELU,
        Flatten(),
        Dense(),
        LayerNorm(),
        Residual((RELU, Dense())),
        RELU,
        Residual((Dense(),), (Dense(), RELU)),
        Dense(),
    ),
}


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


# --- rounding, variances of 0 -------------------------------------------------------------------------------------


def hard_images(dtype="float64"):
    """Two that are equal, one opposite, one saturated in part, two constant, one of zeros in part, one of zeros."""
    x = images(8, (6, 6, 3), dtype=dtype)
    x[1] = x[0]
    x[2] = -x[0]
    x[3, :4] = 1.0
    x[4], x[5] = 0.7, 0.3
    x[6, :, 3:] = 0
    x[7] = 0
    return x


HARD = {
    "gap": convolutional(3),
    "flatten": convolutional(2, readout="flatten"),
    "pooled": Network(LAYERED["pool"]),
    "circular": convolutional(2, padding="circular"),
    "biases": convolutional(2, bias_variance=0.3),
    "residual": Network(LAYERED["projection"]),
    "norm": Network(LAYERED["norm"]),
    "tail": Network((Conv(), RELU, GAP, Dense(), RELU, Dense())),
}


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


# --- one result, however it is cut --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pool", "projection", "tail"])
def test_batches_and_threads_change_no_bit(name, monkeypatch):
    network, x = Network(LAYERED[name]), images(7, (6, 6, 2))
    whole, own, pairs = NTK(network)(x), NTK(network).diagonal(x), by_planes(network, x)
    with threads.limited(1):
        np.testing.assert_array_equal(NTK(network)(x), whole)
        np.testing.assert_array_equal(by_planes(network, x), pairs)
    np.testing.assert_array_equal(NTK(network).diagonal(x[3:5]), own[3:5])
    np.testing.assert_allclose(NTK(network)(x[3:5], x[:3]), whole[3:5, :3], rtol=1e-12)
    np.testing.assert_array_equal(by_planes(network, x[3:5], x[:3]), pairs[:, 3:5, :3])
    monkeypatch.setattr(planes, "BATCH_ENTRIES", 36)
    np.testing.assert_array_equal(by_planes(network, x), pairs)
    np.testing.assert_array_equal(NTK(network).diagonal(x), own)


def by_planes(network, x, y=None):
    """(2, n, m): S and T at the readout by the general path."""
    maps = [planes.variance_maps(network, side) for side in (x, x if y is None else y)]
    return np.stack(planes.readout_pairs(network, x, y, *maps, True))


GENERAL = {**{name: Network(layers) for name, layers in LAYERED.items()}, **HARD, "myrtle": myrtle(5)}


@pytest.mark.parametrize("name", GENERAL)
def test_planes_without_a_fused_pass(name):
    """What the readout gives to the layers after it, by the general path, for pairs that are equal, constant and zero too."""
    network, x = GENERAL[name], hard_images()[..., :2]
    upto = Network(network.layers[: network.readout_position + 1])
    if name == "myrtle":
        x = x[:, :4, :4]
    exact = twin(upto, x)
    for found in (by_planes(upto, x), by_planes(upto, x, x.copy())):
        for k, matrix in zip(found, exact, strict=True):
            assert normwise(k, matrix, np.diag(matrix), np.diag(matrix)) <= 1e-10


@pytest.mark.parametrize("readout", ["gap", "flatten"])
def test_no_planes_are_computed_that_are_not_read(readout, monkeypatch):
    """Flatten reads plane 0 alone, and through a pooling by 2 the planes −1, 0, 1."""
    read, get = [], planes.Inputs.get
    monkeypatch.setattr(planes.Inputs, "get", lambda self, delta: read.append(delta) or get(self, delta))
    x = images(1, (4, 4, 3))
    layers = (Conv(), RELU, AvgPool(2), Conv(), RELU, Flatten() if readout == "flatten" else GAP)
    s, _ = planes.readout_pairs(Network(layers), x, x, *[planes.variance_maps(Network(layers), x)] * 2, False)
    assert s.shape == (1, 1)
    reach = (-1, 0, 1)
    assert set(read) == set(
        itertools.product(reach, reach) if readout == "flatten" else itertools.product(range(-3, 4), repeat=2)
    )
    # the variance maps: plane 0, and what the pooling mixes of it
    count = 49 if readout == "gap" else 9
    assert len(read) == count + 9


@pytest.mark.parametrize(
    "network", [convolutional(2), Network(LAYERED["tail"]), Network(LAYERED["pool in a residual"])]
)
def test_no_images_give_an_empty_matrix(network):
    none = images(0)
    assert NTK(network)(none).shape == (0, 0)
    assert NTK(network)(none, images(2)).shape == (0, 2)
    assert NTK(network).diagonal(none).shape == (0,)


MEMORY = {
    "gap": (convolutional(2), (6, 5, 3)),
    "flatten": (convolutional(6, readout="flatten"), (16, 16, 3)),
    "circular": (convolutional(1, padding="circular"), (5, 5, 3)),
    "gelu": (convolutional(1, activation="gelu"), (5, 5, 1)),
    "pooled": (Network(LAYERED["pool twice"]), (6, 6, 2)),
    "residual": (Network(LAYERED["projection"]), (6, 6, 3)),
    "tail": (Network(LAYERED["tail"]), (5, 5, 2)),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("m", [None, 20])
def test_workspace_is_declared(name, m):
    network, shape = MEMORY[name]
    x = images(40, shape)
    y = None if m is None else images(m, shape, seed=1)
    for kernel in (NTK(network), both(network)):
        planned = kernel.workspace_bytes(40, m or 40, 8, shape)
        peak = peak_bytes(lambda kernel=kernel: kernel(x, y), planned)
        assert peak <= planned + 2**14
        assert planned <= 5 * peak


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 768), r"rows of shape \(768,\), but the network takes images, \(n, H, W, C\).*reshape"),
        ((3, 16, 16), r"rows of shape \(16, 16\).*Add the axis of channels to grey images"),
        ((3, 2, 16, 16, 3), r"rows of shape \(2, 16, 16, 3\).*reshape"),
        ((5,), r"x has shape \(5,\), but the network takes images"),
        ((3, 0, 16, 3), "at least one row, one column and one channel"),
        ((3, 16, 16, 0), "at least one row, one column and one channel"),
        ((3, 3, 32, 32), r"looks like \(C, H, W\), channels first \(NCHW\): give x.transpose\(0, 2, 3, 1\)"),
        ((3, 1, 28, 28), "NCHW"),
        ((3, 4, 24, 32), "NCHW"),
    ],
)
def test_rows_that_are_no_images_are_refused(shape, message):
    x, kernel = np.ones(shape), NTK(convolutional(1))
    for call in (lambda: kernel(x), lambda: kernel(images(2), x), lambda: kernel.diagonal(x)):
        with pytest.raises(InputError, match=message.replace("x has", ". has")):
            call()
    if len(shape) > 1:
        with pytest.raises(InputError, match=message):
            kernel.workspace_bytes(3, 3, 8, shape[1:])


def test_narrow_images_are_no_channels():
    for shape in ((3, 5, 32), (1, 64, 3), (4, 4, 32), (1, 100, 12)):
        assert NNGP(convolutional(0))(np.ones((1, *shape))).shape == (1, 1)


@pytest.mark.parametrize("shape", [(6, 6, 1), (6, 5, 3), (5, 6, 3)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"x has images of 6×6 pixels with 3 channels and y of"):
        NTK(convolutional(1))(images(2), images(2, shape))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_other_dtypes_are_refused(dtype):
    x = np.ones((2, 6, 6, 3), dtype)
    for call in (lambda: NTK(convolutional(1))(x), lambda: NTK(convolutional(1)).diagonal(x)):
        with pytest.raises(DtypeError, match=f"{dtype}.*float32 or float64"):
            call()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Conv(7, "valid"), GAP), "layer 0: Conv: a filter of 7×7 with padding 'valid' does not fit an image of 6×6"),
        ((Conv(), AvgPool(4), GAP), "layer 1: AvgPool: windows of 4×4 do not divide images of 6×6"),
        (
            (Conv(), Residual((Conv(3, "same", 2),)), GAP),
            "layer 1: the branch of the Residual gives images of 3×3, its shortcut 6×6",
        ),
        (
            (Conv(), AvgPool(2), Residual((Conv(4, "valid"),), (Conv(),)), GAP),
            r"layer 2.branch.0: Conv: a filter of 4×4",
        ),
    ],
)
def test_images_that_do_not_fit_the_layers_are_refused(layers, message):
    kernel = NTK(Network((*layers, Dense())))
    for call in (
        lambda: kernel(images(2)),
        lambda: kernel.diagonal(images(2)),
        lambda: kernel(images(0)),
        lambda: kernel.workspace_bytes(2, 2, 8, (6, 6, 3)),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_networks_of_vectors_take_images_as_rows():
    x = images(3)
    np.testing.assert_array_equal(NTK(fully_connected(2))(x), NTK(fully_connected(2))(x.reshape(3, -1)))
