"""GradientFeatures: finite networks against plain loops, gradients against finite differences, their kernel against the exact NTK."""

import itertools
import math

import numpy as np
import pytest
from contracts import (
    GENERAL,
    IMAGE_POOLED,
    IMAGE_RESIDUAL,
    IMAGE_SHORTCUT,
    IMAGE_STRIDED,
    IMAGE_THEN_DENSE,
    RESIDUAL,
    images,
    rows,
)

from ntkdask import activations, arrays
from ntkdask.activations.derivatives import derivative
from ntkdask.errors import DtypeError, InputError
from ntkdask.features import GradientFeatures
from ntkdask.features.finite.network import FiniteNetwork
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Network,
    convolutional,
    fully_connected,
    myrtle,
)

WIDE_FILTER = Network(
    (Conv((5, 7), "circular"), Activation("erf"), AvgPool((1, 2)), Flatten(), Dense(bias_variance=0.3))
)
NETWORKS = {
    "depth 0": (fully_connected(0, bias_variance=0.2), (4,)),
    "depth 1": (fully_connected(1, "gelu"), (4,)),
    "depth 3": (fully_connected(3, "erf", bias_variance=0.3, weight_variance=1.4), (3,)),
    "general": (GENERAL, (4,)),
    "residual": (RESIDUAL, (4,)),
    "ends in an activation": (Network((Dense(), Activation("tanh"))), (3,)),
    "convolutional": (convolutional(2, activation="erf", trainable_ends=False), (3, 4, 2)),
    "strided": (IMAGE_STRIDED, (7, 6, 2)),
    "wide filter": (WIDE_FILTER, (3, 4, 2)),
    "myrtle": (myrtle(5, activation="tanh"), (4, 4, 1)),
    "image residual": (IMAGE_RESIDUAL, (3, 4, 2)),
    "pooled": (IMAGE_POOLED, (2, 3, 2)),
    "after flatten": (IMAGE_THEN_DENSE, (2, 4, 2)),
    "input shortcut": (IMAGE_SHORTCUT, (4, 2, 3)),
}
every_network = pytest.mark.parametrize(("network", "shape"), NETWORKS.values(), ids=NETWORKS)


# --- twins --------------------------------------------------------------------------------------------------------


def plain_output(network, x, parameters):
    """f(x) of one row by loops over units, pixels and filters; every signal carries the factor with which S = scale·⟨h, h'⟩."""
    ends_dense = isinstance(network.layers[-1], Dense)
    layers = network.layers if ends_dense else (*network.layers, Dense(trainable=False))
    scale = 1 / x.shape[-1] if network.scale_inputs else 1.0
    return float(plain_layers(layers, x.astype(float), scale, parameters, ())[0][0])


def plain_layers(layers, h, scale, parameters, where):
    for position, layer in enumerate(layers):
        h, scale = plain_layer(layer, h, scale, parameters, (*where, position))
    return h, scale


def plain_layer(layer, h, scale, parameters, where):
    if isinstance(layer, Dense):
        w, b = parameters[where]
        z = [
            math.sqrt(layer.weight_variance * scale) * sum(h[i] * w[i, u] for i in range(len(h)))
            + (math.sqrt(layer.bias_variance) * b[u] if b is not None else 0)
            for u in range(w.shape[1])
        ]
        return np.array(z), 1 / w.shape[1]
    if isinstance(layer, Conv):
        return plain_conv(layer, h, scale, *parameters[where])
    if isinstance(layer, Activation):
        return layer.sigma(h) / math.sqrt(layer.sigma.second_moment() if layer.normalize else 1), scale
    if isinstance(layer, LayerNorm):
        centred = h - h.mean(axis=-1, keepdims=True)
        return centred / centred.std(axis=-1, keepdims=True), scale
    if isinstance(layer, AvgPool):
        a, b = layer.window
        out = np.zeros((h.shape[0] // a, h.shape[1] // b, h.shape[2]))
        for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
            out[i, j] = h[i * a : i * a + a, j * b : j * b + b].mean(axis=(0, 1))
        return out, scale
    if isinstance(layer, GlobalAvgPool):
        return h.mean(axis=(0, 1)), scale
    if isinstance(layer, Flatten):
        return h.reshape(-1), scale / (h.shape[0] * h.shape[1])
    left, left_scale = plain_layers(layer.branch, h, scale, parameters, (*where, "branch"))
    right, right_scale = plain_layers(layer.shortcut, h, scale, parameters, (*where, "shortcut"))
    if left.shape == right.shape and left_scale == right_scale:
        return left + right, left_scale
    return np.concatenate([left * math.sqrt(left_scale), right * math.sqrt(right_scale)], axis=-1), 1.0


def plain_conv(layer, h, scale, w, b):
    (height, width, channels), (q, r), (s, t) = h.shape, layer.filter, layer.strides
    w = w.reshape(q, r, channels, -1)
    (rows_out, columns_out), (up, left) = layer.output_shape((height, width)), layer.before((height, width))
    out = np.zeros((rows_out, columns_out, w.shape[-1]))
    for p, o, i, j in itertools.product(range(rows_out), range(columns_out), range(q), range(r)):
        y, x = p * s + i - up, o * t + j - left
        if layer.padding == "circular":
            y, x = y % height, x % width
        if 0 <= y < height and 0 <= x < width:
            out[p, o] += math.sqrt(layer.weight_variance * scale / (q * r)) * (h[y, x] @ w[i, j])
    if b is not None:
        out += math.sqrt(layer.bias_variance) * b
    return out, 1 / w.shape[-1]


def finite_differences(finite, x, parameters, step=1e-5):
    """(n, n_parameters): (f(θ + h) − f(θ − h))/2h for each trainable parameter, in the order of the gradient."""
    columns = []
    for where, weights in finite.weights.items():
        if weights.start is None:
            continue
        for k, array in enumerate(parameters[where]):
            for index in np.ndindex(array.shape) if array is not None else ():
                ends = []
                for h in (step, -step):
                    moved = [None if a is None else a.copy() for a in parameters[where]]
                    moved[k][index] += h
                    ends.append(finite(x, {**parameters, where: tuple(moved)}))
                columns.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(columns, axis=1)


# --- finite networks ----------------------------------------------------------------------------------------------


@every_network
def test_forward_pass_is_the_loops(network, shape):
    finite = FiniteNetwork(network, 3, shape)
    x = np.random.default_rng(1).standard_normal((3, *shape))
    parameters = finite.draw(0, x)
    np.testing.assert_allclose(
        finite(x, parameters), [plain_output(network, row, parameters) for row in x], rtol=0, atol=1e-12
    )


@every_network
def test_gradients_are_finite_differences(network, shape):
    finite = FiniteNetwork(network, 3, shape)
    x = np.random.default_rng(1).standard_normal((3, *shape))
    parameters = finite.draw(0, x)
    out = np.full((3, finite.n_parameters), np.nan)
    finite.gradients(x, parameters, out)
    expected = finite_differences(finite, x, parameters)
    assert expected.shape == out.shape
    # kinks of relu and abs lie further than the step from every preactivation of these seeds
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-8 * max(1, np.abs(expected).max()))


def test_layer_norm_of_equal_channels_is_zero():
    network = Network((Dense(), LayerNorm(), Activation("relu"), Dense()))
    features = GradientFeatures(network, GradientFeatures.n_parameters(network, 5, (3,)))(np.zeros((2, 3)))
    np.testing.assert_array_equal(features, 0)


# --- the map ------------------------------------------------------------------------------------------------------


def mean_kernel(network, width, x, count):
    """(mean, its standard error) of ⟨∇f(x_i), ∇f(x_j)⟩ over `count` networks."""
    feature_map = GradientFeatures(network, GradientFeatures.n_parameters(network, width, x.shape[1:]))
    assert feature_map.width(x.shape[1:]) == width
    features = (feature_map.replace(seed=seed)(x) for seed in range(count))
    found = np.array([phi @ phi.T for phi in features])
    return found.mean(axis=0), found.std(axis=0, ddof=1) / math.sqrt(count)


UNBIASED = {
    "depth 1 with biases": (fully_connected(1, "gelu", weight_variance=1.2, bias_variance=0.3), rows(6)),
    "scaled inputs": (fully_connected(1, normalize=False, weight_variance=2.0, scale_inputs=True), rows(6)),
    "frozen first": (Network((Dense(trainable=False), Activation("relu"), Dense())), rows(6)),
    "frozen readout": (Network((Dense(), Activation("relu"), Dense(1.5, trainable=False))), rows(6)),
    "ends in an activation": (Network((Dense(1.2, 0.1), Activation("erf"))), rows(6)),
    "convolutional": (convolutional(1, bias_variance=0.1), images(6)),
    "flatten": (Network((Conv(2, "circular"), Activation("erf"), Flatten(), Dense())), images(6)),
    "pooled": (Network((Conv((2, 1)), Activation("relu"), AvgPool((2, 1)), Flatten(), Dense())), images(6)),
}


@pytest.mark.parametrize(("network", "x"), UNBIASED.values(), ids=UNBIASED)
def test_one_hidden_layer_is_unbiased(network, x):
    mean, error = mean_kernel(network, 40, x, 300)
    exact = GradientFeatures(network, 10_000).target(x)
    assert (np.abs(mean - exact) <= 4.5 * error + 1e-12).all()
    assert (4.5 * error <= 0.15 * exact.max()).all()


BIASED = {
    "depth 2": (fully_connected(2), rows(6)),
    "depth 3 erf": (fully_connected(3, "erf", bias_variance=0.1), rows(6)),
    "general": (GENERAL, rows(6)),
    "residual": (RESIDUAL, rows(6)),
    "convolutional": (convolutional(2), images(6)),
    "image residual": (IMAGE_RESIDUAL, images(6)),
    "after flatten": (IMAGE_THEN_DENSE, np.random.default_rng(0).standard_normal((4, 2, 2, 3))),
    "input shortcut": (IMAGE_SHORTCUT, np.random.default_rng(0).standard_normal((4, 4, 2, 3))),
}


@pytest.mark.parametrize(("network", "x"), BIASED.values(), ids=BIASED)
def test_bias_of_deeper_networks_is_below_one_over_width(network, x):
    width = 60
    mean, error = mean_kernel(network, width, x, 150)
    exact = GradientFeatures(network, 1_000_000).target(x)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(mean - exact) <= 4.5 * error + 3 / width * scale).all()
    assert (4.5 * error <= 0.25 * exact.max()).all()


def test_bias_and_variance_fall_as_one_over_width():
    network, x, spread, bias = fully_connected(2, "abs"), rows(3), {}, {}
    exact = GradientFeatures(network, 10_000).target(x)
    for width in (2, 16):
        mean, error = mean_kernel(network, width, x, 3000)
        spread[width] = float((error**2).sum())
        bias[width] = np.abs(mean - exact), error
    assert 4 <= spread[2] / spread[16] <= 16
    worst = np.unravel_index(np.argmax(bias[2][0] / bias[2][1]), exact.shape)
    assert bias[2][0][worst] > 4.5 * bias[2][1][worst]  # it is there
    assert bias[16][0][worst] < 0.35 * bias[2][0][worst]  # and falls: 1/√8 = 0.35, 1/8 = 0.13


def test_width_is_the_largest_that_fits_and_the_rest_is_zero():
    network = fully_connected(2, bias_variance=0.1)
    count = GradientFeatures.n_parameters(network, 7, (5,))
    assert count == 7 * 5 + 7 + 7 * 7 + 7 + 7 + 1
    feature_map = GradientFeatures(network, count + 3, seed=2)
    assert feature_map.width((5,)) == 7
    assert GradientFeatures(network, count - 1).width((5,)) == 6
    phi = feature_map(rows(4)[:, :5])
    np.testing.assert_array_equal(phi[:, count:], 0)
    np.testing.assert_array_equal(phi[:, :count], feature_map.replace(n_components=count)(rows(4)[:, :5]))
    assert (phi[:, :count] != 0).any(axis=0).sum() > count / 2
    assert GradientFeatures(fully_connected(0), 100).width((5,)) == 1


def test_blocks_of_rows_agree():
    network = convolutional(2, activation="gelu")
    feature_map = GradientFeatures(network, GradientFeatures.n_parameters(network, 40, (12, 12, 3)))
    x = np.random.default_rng(0).standard_normal((40, 12, 12, 3))
    whole = feature_map(x)
    single = np.concatenate([feature_map(row[None]) for row in x])
    np.testing.assert_allclose(whole, single, rtol=0, atol=1e-12 * np.abs(whole).max())
    narrow = feature_map(x.astype("float32"))
    np.testing.assert_allclose(narrow, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.gpu
def test_device_agrees_with_host():
    x = np.random.default_rng(0).standard_normal((9, 7, 6, 2))
    feature_map = GradientFeatures(IMAGE_STRIDED, GradientFeatures.n_parameters(IMAGE_STRIDED, 8, (7, 6, 2)))
    host, device = feature_map(x), feature_map(arrays.to_device(x))
    assert arrays.is_device_array(device)
    np.testing.assert_allclose(arrays.to_host(device), host, rtol=0, atol=1e-11 * np.abs(host).max())


def test_too_few_components_for_the_rows():
    with pytest.raises(
        InputError, match=r"n_components=5.*shape \(6,\).*width 1 has 8 parameters\. Use n_components >= 8"
    ):
        GradientFeatures(fully_connected(2), 5)(rows(2))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            Network((Dense(trainable=False), Activation(), Dense(trainable=False))),
            "no layer of the network is trainable",
        ),
        (fully_connected(1, activations.get("normalized_gaussian")), "known by its dual alone"),
        ("relu", "network is 'relu'; give a Network"),
    ],
)
def test_networks_without_gradients_are_refused(network, message):
    with pytest.raises(InputError, match=message):
        GradientFeatures(network, 100)
    with pytest.raises(InputError, match=message):
        GradientFeatures.n_parameters(network, 10, (3,))


def test_rows_that_are_no_images_are_refused():
    feature_map = GradientFeatures(convolutional(1), 1000)
    with pytest.raises(InputError, match="the network takes images"):
        feature_map(rows(3))
    with pytest.raises(InputError, match="the network takes images"):
        feature_map.workspace_bytes(3, 8, (6,))
    with pytest.raises(DtypeError, match="int64"):
        feature_map(np.ones((2, 4, 4, 1), "int64"))


# --- derivatives --------------------------------------------------------------------------------------------------


SIGMAS = [
    "relu",
    "abs",
    "identity",
    "step",
    "sign",
    "erf",
    "gelu",
    "elu",
    "gabor",
    "tanh",
    "sigmoid",
    "silu",
    "softplus",
    *(
        activations.get(name, **parameters)
        for name, parameters in [
            ("abrelu", {"A": 0.5, "B": 1.5}),
            ("leaky_relu", {"slope": 0.2}),
            ("rectified_monomial", {"q": 0}),
            ("rectified_monomial", {"q": 3}),
            ("exp", {"A": 0.7}),
            ("hermite", {"q": 0}),
            ("hermite", {"q": 4}),
            ("sin", {"A": 1.3, "B": 0.4}),
            ("cos", {"A": 1.3, "B": 0.4}),
            ("gaussian", {"A": 0.8}),
            ("rbf", {"A": 0.6}),
            ("monomial", {"q": 0}),
            ("monomial", {"q": 3}),
            ("polynomial", {"coefficients": (1.0, -2.0, 0.5, 0.1)}),
            ("polynomial", {"coefficients": (2.0,)}),
        ]
    ),
    activations.from_function(np.arctan),
    activations.from_function(np.arctan, derivative=lambda t: 1 / (1 + t * t)),
]


@pytest.mark.parametrize(
    "sigma", [activations.get(sigma) for sigma in SIGMAS], ids=lambda value: str(value).split(" at 0x")[0]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivatives_are_difference_quotients(sigma, dtype):
    t = np.concatenate([np.linspace(-3, 3, 40), [1e-3, -1e-3]]).astype(dtype)
    wide, step = t.astype("float64"), 1e-5
    expected = (sigma(wide + step) - sigma(wide - step)) / (2 * step)
    found = derivative(sigma, t)
    assert found.dtype == dtype
    assert found.shape == t.shape
    tolerance = {"float32": 1e-5, "float64": 1e-8}[dtype]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


def test_every_activation_by_name_is_covered():
    from ntkdask.activations.base import _by_name

    tested = {type(activations.get(sigma)).name for sigma in SIGMAS}
    assert set(_by_name) - tested == {"normalized_gaussian"}
