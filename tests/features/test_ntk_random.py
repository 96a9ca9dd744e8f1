"""NTKRandomFeatures against a dense float64 twin with the same weights; its errors; spherical against Gaussian sampling."""

import dataclasses
import math

import numpy as np
import pytest
from contracts import BIASED, FROZEN_ENDS, FROZEN_READOUT, GENERAL, rows
from reference import dense_tensor_srht, ntk_random_features
from scipy.optimize import brentq
from scipy.special import ndtr

from ntkdask import seeds
from ntkdask.activations import ActivationFunction, ReLU
from ntkdask.errors import InputError
from ntkdask.features import ArcCosineFeatures, NTKRandomFeatures
from ntkdask.features.gibbs import gibbs_directions
from ntkdask.features.ntk_random import default_widths
from ntkdask.features.quality import map_error
from ntkdask.features.sketching.operands import padded_size
from ntkdask.kernels import NNGP, NTK
from ntkdask.networks import Activation, Dense, Network, fully_connected

TOLERANCE = {"float32": 3e-6, "float64": 1e-12}
FROZEN_MIDDLE = Network(
    (
        Dense(),
        Activation(),
        Dense(1.3, 0.2, trainable=False),
        Activation(),
        Dense(0.5, 0.1, trainable=False),
        Activation(),
        Dense(2.0, 0.3),
    )
)
FROZEN_START = Network(
    (Dense(2.0, 0.1, trainable=False), Activation(), Dense(0.3, 0.0, trainable=False), Activation(), Dense())
)
NETWORKS = {
    "depth 1": fully_connected(1),
    "depth 2": fully_connected(2),
    "depth 3": fully_connected(3),
    "biases": BIASED,
    "depth 3 with biases": fully_connected(3, weight_variance=1.4, bias_variance=0.2),
    "raw": fully_connected(2, normalize=False, weight_variance=2.0, scale_inputs=True),
    "frozen ends": FROZEN_ENDS,
    "frozen readout": FROZEN_READOUT,
    "frozen middle": FROZEN_MIDDLE,
    "frozen start": FROZEN_START,
    "general": GENERAL,
}


def plain(network):
    """The layers as `reference` takes them."""
    return [
        ("dense", layer.weight_variance, layer.bias_variance, layer.trainable)
        if isinstance(layer, Dense)
        else ("relu", layer.normalize)
        for layer in network.layers
    ]


def twin(feature_map, x):
    """The same map from dense matrices, with the streams that the map documents."""
    seed, widths, last = feature_map.seed, feature_map.widths, feature_map.network.layers[-1]
    depth = feature_map.network.depth

    def step_weights(h, d):
        return seeds.normals(seed, ("ntk", h, "step"), d, widths.step)

    def relu_weights(h, d):
        path = ("ntk", h, "relu")
        if feature_map.sampling == "spherical":
            return math.sqrt(2 * d / widths.relu) * seeds.sphere(seed, path, d, widths.relu)
        return math.sqrt(2 / widths.relu) * seeds.normals(seed, path, d, widths.relu)

    def sketch(h, step, psi):
        m = feature_map.n_components if h + 1 == depth and not last.trainable else widths.sketch
        path, signs, picked = ("ntk", h, "sketch"), [], []
        for k, part in enumerate((step, psi)):
            size = padded_size(part.shape[1])
            signs.append(seeds.signs(seed, (*path, "signs", k), size))
            picked.append(seeds.balanced_integers(seed, (*path, "rows", k), size, m))
        return dense_tensor_srht(step, psi, signs, picked)

    network = feature_map.network
    return ntk_random_features(plain(network), x, network.scale_inputs, step_weights, relu_weights, sketch)


@pytest.mark.parametrize("sampling", ["gaussian", "spherical"])
@pytest.mark.parametrize("name", NETWORKS)
def test_against_the_dense_twin(name, sampling):
    feature_map = NTKRandomFeatures(NETWORKS[name], n_components=50, seed=3, sampling=sampling)
    x = rows(12)
    expected = twin(feature_map, x)
    assert expected.shape == (12, 50)
    for dtype, tolerance in TOLERANCE.items():
        out = feature_map(x.astype(dtype))
        assert np.abs(out - expected).max() <= tolerance * np.abs(expected).max()


def test_against_the_dense_twin_with_chosen_widths():
    feature_map = NTKRandomFeatures(fully_connected(2, bias_variance=0.1), 70, seed=1, n_step=37, n_relu=20)
    assert (feature_map.widths.step, feature_map.widths.relu, feature_map.widths.sketch) == (37, 20, 49)
    x = rows(6)
    expected = twin(feature_map, x)
    assert np.abs(feature_map(x) - expected).max() <= TOLERANCE["float64"] * np.abs(expected).max()


@pytest.mark.parametrize("n_components", [2, 3, 17, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_widths_fill_the_components(name, n_components):
    """m₁ + m_s (+ 1 for a bias of the last layer) = n_components, at every depth."""
    network = NETWORKS[name]
    bias = int(network.layers[-1].bias_variance > 0)
    feature_map = NTKRandomFeatures(network, n_components + bias)
    widths = feature_map.widths
    if network.layers[-1].trainable:
        assert widths.relu + widths.sketch + bias == n_components + bias
    assert feature_map(rows(3)).shape == (3, n_components + bias)


def test_default_widths():
    assert default_widths(8192) == (4096, 4096)
    assert default_widths(1) == (1, 1)


def test_a_frozen_start_is_the_last_layers_arc_cosine_features():
    """Only the readout trains: the NTK is the covariance of the last layer, no sketch is drawn."""
    network = Network((Dense(trainable=False), Activation(), Dense()))
    feature_map = NTKRandomFeatures(network, 40, sampling="spherical")
    assert feature_map.widths.sketch == 0
    x = rows(6)
    np.testing.assert_allclose(feature_map.target(x), ArcCosineFeatures(1).target(x), atol=1e-12)
    np.testing.assert_allclose(feature_map(x), twin(feature_map, x), atol=1e-12)


@pytest.mark.parametrize(
    "feature_map",
    [
        ArcCosineFeatures(64),
        NTKRandomFeatures(fully_connected(1), 400, n_relu=20),
    ],  # ReLU features dominate the variance
    ids=["arc-cosine", "ntk"],
)
def test_spherical_sampling_has_the_smaller_variance(feature_map):
    """At d = 6; Gaussian directions add the spread of ‖w‖², which leverage-score sampling takes out."""
    x, variance = rows(6)[[0, 2, 5]], {}
    for sampling in ("gaussian", "spherical"):
        features = (feature_map.replace(sampling=sampling, seed=seed)(x) for seed in range(600))
        variance[sampling] = np.var([np.diag(phi @ phi.T) for phi in features], axis=0, ddof=1).sum()
    # a ratio of sample variances of 600 has a standard error of about 8 %; four of them below 1
    assert variance["spherical"] < 0.75 * variance["gaussian"]


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_features_are_homogeneous_without_biases(scale):
    feature_map, x = NTKRandomFeatures(fully_connected(2), 40), rows(6)
    np.testing.assert_allclose(feature_map(scale * x), scale * feature_map(x), rtol=1e-12, atol=1e-13 * scale)


def test_a_bias_is_a_constant_component():
    phi = NTKRandomFeatures(BIASED, 41)(rows(6))
    constant = (phi == math.sqrt(0.3)).all(axis=0)
    assert constant.sum() == 1


def test_zero_rows_have_zero_features_without_biases():
    phi = NTKRandomFeatures(fully_connected(2), 40)(rows(6))
    assert (phi[1] == 0).all()
    assert (np.abs(phi[0]) > 0).any()


class Square(ActivationFunction):
    """σ(t) = t², not a ReLU."""

    def dual(self, a, b, c):
        return a * a * b * b * (1 + 2 * c * c)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("relu", "network is 'relu'; give a Network"),
        (fully_connected(0), "0 activations and 1 layers"),
        (Network((Dense(), Activation())), "1 activations and 2 layers"),
        (Network((Dense(), Dense(), Activation(), Dense())), "layer 1 is Dense.*Dense and Activation in turn"),
        (Network((Dense(), Activation(Square()), Dense())), "layer 1 is .*Square.*are for relu"),
        (Network((Dense(trainable=False), Activation(ReLU()), Dense(trainable=False))), "no layer .* is trainable"),
    ],
)
def test_other_networks_are_refused(network, message):
    with pytest.raises(InputError, match=message):
        NTKRandomFeatures(network, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 1}, "leaves 0 sketched components beside n_relu=1.*n_components >= 2"),
        ({"n_components": 8, "n_relu": 8}, "leaves 0 sketched components"),
        ({"n_components": 8, "n_relu": 0}, "n_relu is 0"),
        ({"n_components": 8, "n_step": -1}, "n_step is -1"),
        ({"n_components": 8, "n_step": 2.5}, "n_step is 2.5"),
        ({"n_components": 8, "sampling": "sphericle"}, "unknown sampling 'sphericle'; did you mean 'spherical'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        NTKRandomFeatures(fully_connected(1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"order": 2}, "order is 2"), ({"sampling": "x"}, "unknown sampling"), ({"n_components": 0}, "n_components is 0")],
)
def test_bad_arguments_of_arc_cosine_features_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ArcCosineFeatures(**{"n_components": 8, **arguments})


# --- NNGP, Gibbs sampling, and Theorem 3 ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_nngp_features_are_those_of_a_network_that_trains_its_readout_alone(name):
    network = NETWORKS[name]
    denses = [layer for layer in network.layers if isinstance(layer, Dense)]
    readout = iter([dataclasses.replace(layer, trainable=layer is denses[-1]) for layer in denses])
    frozen = dataclasses.replace(
        network, layers=tuple(next(readout) if isinstance(layer, Dense) else layer for layer in network.layers)
    )
    feature_map, x = NTKRandomFeatures(network, 51, seed=3, kernel="nngp"), rows(12)
    assert feature_map.target == NNGP(network)
    np.testing.assert_allclose(feature_map.target(x), NTK(frozen)(x), atol=1e-12)
    np.testing.assert_allclose(feature_map(x), twin(NTKRandomFeatures(frozen, 51, seed=3), x), atol=1e-11)


def naive_gibbs(seed, path, d, m, sweeps):
    """The sampler by a generic root finder, in float64."""
    w = seeds.normals(seed, path, d, m)
    for sweep in range(sweeps):
        u = seeds.uniforms(seed, (*path, "gibbs", sweep), d * m).reshape(m, d).T
        for column in range(m):
            for i in range(d):
                s = (w[:, column] ** 2).sum() - w[i, column] ** 2

                def excess(t, s=s, goal=u[i, column]):
                    return ndtr(t) - t * np.exp(-t * t / 2) / np.sqrt(2 * np.pi) / (1 + s) - goal

                w[i, column] = brentq(excess, -10, 10, xtol=1e-14)
    return w / np.linalg.norm(w, axis=0)


@pytest.mark.parametrize(("d", "sweeps"), [(1, 1), (2, 1), (5, 3), (40, 1)])
def test_the_gibbs_sampler_is_the_naive_one(d, sweeps):
    expected = naive_gibbs(3, ("g",), d, 9, sweeps)
    np.testing.assert_allclose(gibbs_directions(3, ("g",), d, 9, sweeps), expected, atol=1e-8)


def test_gibbs_columns_do_not_depend_on_their_number():
    np.testing.assert_array_equal(
        gibbs_directions(0, ("g",), 7, 600, 2)[:, :100], gibbs_directions(0, ("g",), 7, 100, 2)
    )
    scaled = gibbs_directions(0, ("g",), 7, 600, 2, "float32", 3.0)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=0), 3.0, rtol=1e-6)


def test_one_sweep_is_biased_and_more_are_less_so():
    """MATH.md §4: 10 % at d = 2 after one sweep. E d·u_i² = 1 on the sphere; of 40 000 draws the standard error is 0.0035."""
    one, many = (2 * (gibbs_directions(0, ("g",), 2, 40_000, sweeps)[0] ** 2).mean() for sweeps in (1, 8))
    assert 0.08 < one - 1 < 0.12
    assert abs(many - 1) < 4 * 0.0036


def test_the_gibbs_map_is_the_dense_twin_with_its_directions():
    feature_map, x = NTKRandomFeatures(fully_connected(1), 50, seed=3, sampling="gibbs", n_sweeps=2), rows(12)
    phi = feature_map(x)
    weights = np.sqrt(2 * 6 / 25) * gibbs_directions(3, ("ntk", 0, "relu"), 6, 25, 2)
    np.testing.assert_allclose(phi[:, :25], np.maximum(x @ weights, 0), atol=1e-12)
    np.testing.assert_array_equal(phi[:, 25:], feature_map.replace(sampling="gaussian")(x)[:, 25:])


def spectral_errors(d, n_relu, sampling, count):
    """(count,): the ε of eq. 13 at λ = 1 on 60 unit rows; ReLU features dominate, the others are many."""
    x = np.random.default_rng(d).standard_normal((60, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    feature_map = NTKRandomFeatures(fully_connected(1), n_relu + 1024, n_relu=n_relu, n_step=1024, sampling=sampling)
    return np.array([map_error(feature_map.replace(seed=seed), x, lam=1.0).epsilon for seed in range(count)])


@pytest.mark.parametrize(("d", "gain"), [(6, 0.06), (20, 0.0)])
def test_the_spectral_guarantee_of_theorem_3(d, gain):
    """ε falls as 1/√m₁, and leverage-score (spherical) sampling needs fewer features than Gaussian, more so at small d."""
    found = {sampling: spectral_errors(d, 40, sampling, 24) for sampling in ("gaussian", "spherical")}
    error = np.sqrt(sum(e.var(ddof=1) for e in found.values()) / 24)
    assert found["spherical"].mean() < (1 - gain) * found["gaussian"].mean() + (0 if gain else 2 * error)
    more = spectral_errors(d, 360, "spherical", 6)
    assert more.mean() < 0.6 * found["spherical"].mean()
