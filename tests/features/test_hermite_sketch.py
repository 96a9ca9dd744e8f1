"""HermiteSketch against a twin from its building blocks, truncated kernels from Gauss–Hermite quadrature, and exact kernels."""

import math

import numpy as np
import pytest
from contracts import DEEP_GELU, rows

from ntkdask import activations
from ntkdask.arrays import to_device, to_host
from ntkdask.errors import InputError
from ntkdask.features import HermiteSketch
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.features.sketching.polynomial_fits import taylor_coefficients, taylor_tail
from ntkdask.features.sketching.radial_functions import radial_functions
from ntkdask.features.sketching.sketches import SRHT, TensorSRHT
from ntkdask.kernels import NNGP, NTK
from ntkdask.networks import Activation, Dense, LayerNorm, Network, convolutional, fully_connected

ROWS = rows(6, width=4) * np.array([0.4, 1.0, 0.2, 1.0, 1.0, 0.6])[:, None]
"""A zero row, two parallel ones, two that point apart."""
NETWORKS = {
    "gelu": fully_connected(1, "gelu"),
    "erf with biases": fully_connected(1, "erf", weight_variance=1.3, bias_variance=0.2),
    "sin, raw, scaled": fully_connected(1, "sin", normalize=False, scale_inputs=True),
    "cos, frozen readout": Network((Dense(0.7, 0.1), Activation("cos"), Dense(1.2, 0.3, trainable=False))),
    "softplus, frozen start": Network((Dense(0.7, 0.1, trainable=False), Activation("softplus"), Dense(1.2, 0.3))),
    "gaussian": fully_connected(1, "gaussian", weight_variance=0.5),
}
DEEP = {
    "gelu, erf": Network((Dense(0.5, 0.1), Activation("gelu"), Dense(0.8, 0.2), Activation("erf"), Dense(1.1, 0.1))),
    "frozen start": Network(
        (Dense(0.5, trainable=False), Activation("tanh"), Dense(0.8, 0.2), Activation("gelu"), Dense())
    ),
    "frozen readout": Network(
        (Dense(0.5), Activation("gelu"), Dense(0.8), Activation("erf"), Dense(1.1, trainable=False))
    ),
    "depth 3": fully_connected(3, "erf", weight_variance=0.6, bias_variance=0.1),
    "frozen middle": Network(
        (
            Dense(0.5),
            Activation("gelu"),
            Dense(0.8, 0.1, trainable=False),
            Activation("erf"),
            Dense(),
            Activation("sin"),
            Dense(),
        )
    ),
    "only the readout": Network(
        (Dense(0.5, trainable=False), Activation("gelu"), Dense(0.8, trainable=False), Activation("erf"), Dense(1.2))
    ),
}
both_kernels = pytest.mark.parametrize("kernel", ["ntk", "nngp"])


NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(120)


def hermite_coefficients(layer, a, degree):
    """(degree + 1,): √gain·E[σ(at)He_ℓ(t)]/√ℓ! by Gauss–Hermite quadrature."""
    t, weights = NODES, NODE_WEIGHTS
    values = (
        layer.sigma(a * t) * weights / math.sqrt(2 * math.pi * layer.sigma.second_moment() ** bool(layer.normalize))
    )
    found, before, now = [], np.zeros_like(t), np.ones_like(t)
    for order in range(degree + 1):
        found.append(float(values @ now))
        before, now = now, (t * now - math.sqrt(order) * before) / math.sqrt(order + 1)
    return np.array(found)


def truncated_kernel(feature_map, x):
    """σ_w²·Σ_{ℓ<=degree} f_ℓ·r_ℓ(a)r_ℓ(b)c^ℓ + σ_b² of a network of one hidden layer, entry by entry."""
    first, layer, last = feature_map.network.layers
    divisor = x.shape[1] if feature_map.network.scale_inputs else 1
    s = first.weight_variance * (x @ x.T) / divisor + first.bias_variance
    low, ntk = np.arange(feature_map.degree + 1), feature_map.kernel == "ntk"
    factors = low * first.trainable + last.trainable if ntk else np.ones(low.size)
    a, out = np.sqrt(np.diag(s)), np.empty_like(s)
    r = [hermite_coefficients(layer, length, feature_map.degree) for length in a]
    for i in range(len(x)):
        for j in range(len(x)):
            c = s[i, j] / (a[i] * a[j]) if a[i] * a[j] else 0.0
            out[i, j] = last.weight_variance * float(np.sum(factors * r[i] * r[j] * c**low))
    return out + last.bias_variance * (last.trainable or not ntk)


@pytest.mark.parametrize("kernel", ["ntk", pytest.param("nngp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "softplus, frozen start" else ()) for n in NETWORKS]
)
def test_is_unbiased_for_the_truncated_kernel(name, kernel):
    feature_map, count = HermiteSketch(NETWORKS[name], 60, degree=4, kernel=kernel), 150
    products = np.array([(phi := feature_map.replace(seed=seed)(ROWS)) @ phi.T for seed in range(count)])
    exact = truncated_kernel(feature_map, ROWS)
    diagonal = np.diag(exact)
    size = np.sqrt(np.outer(diagonal, diagonal))
    error = products.std(axis=0, ddof=1) / math.sqrt(count)
    assert (np.abs(products.mean(axis=0) - exact) <= 4.5 * error + 1e-9 * size).all()
    assert (error <= 0.03 * size).all()


@both_kernels
@pytest.mark.parametrize("name", NETWORKS)
def test_the_truncated_kernel_is_within_the_stated_error(name, kernel):
    """Of every entry, by Cauchy–Schwarz; the diagonal lacks what the higher degrees hold and never exceeds the exact one."""
    worst = []
    for degree in (2, 6, 12):
        feature_map = HermiteSketch(NETWORKS[name], 60, degree=degree, kernel=kernel)
        exact, truncated = feature_map.target(ROWS), truncated_kernel(feature_map, ROWS)
        error = feature_map.truncation_errors(ROWS)
        size = np.sqrt(np.outer(error * np.diag(exact), error * np.diag(exact)))
        assert (np.abs(exact - truncated) <= size + 1e-9).all()
        assert (np.diag(truncated) <= np.diag(exact) + 1e-9).all()
        assert (feature_map.truncation_errors(ROWS.astype("float32")) - error <= 1e-5).all()
        worst.append(error.max())
    assert worst[0] > worst[1] > worst[2]
    assert worst[2] < 0.08


def test_polynomial_activations_are_exact_from_their_degree_on():
    sigma = activations.get("polynomial", coefficients=(0.3, 0.5, -0.2, 0.1))
    assert HermiteSketch(fully_connected(2, sigma), 64, degree=3).truncation_errors(ROWS).max() <= 1e-12
    assert HermiteSketch(fully_connected(2, sigma), 64, degree=2).truncation_errors(ROWS).max() > 1e-3


def powers_twin(sketch, unit):
    """(n, n_components): the direct sum of a `DotProductSketch`, degree by degree, and the degree of each column."""
    parts, column_degrees = [], []
    for degree, width in zip(sketch.degrees, sketch.widths(unit.shape[1]), strict=True):
        path = (*sketch.path, degree)
        if degree == 0:
            parts.append(np.ones((len(unit), 1)))
        elif degree == 1:
            parts.append(unit if width == unit.shape[1] else SRHT(width, sketch.seed, path)(unit))
        else:
            parts.append(PolySketch(degree, width, sketch.seed, path)(unit, degrees=(degree,))[0])
        column_degrees += [degree] * width
    pad = sketch.n_components - len(column_degrees)
    parts.append(np.zeros((len(unit), pad)))
    return np.concatenate(parts, axis=1), np.array(column_degrees + [0] * pad)


def twin(feature_map, x):
    """The features layer by layer in float64: rows [σ_w·φ, σ_b] of the exact lengths, T = rest + Λ, both as lists of columns."""
    layers, degree, ntk = feature_map.network.layers, feature_map.degree, feature_map.kernel == "ntk"
    low = np.arange(degree + 1)
    divisor = x.shape[1] if feature_map.network.scale_inputs else 1
    first = layers[0]
    constant = np.full((len(x), int(first.bias_variance > 0)), math.sqrt(first.bias_variance))
    u = np.concatenate([math.sqrt(first.weight_variance / divisor) * x, constant], axis=1)
    rest = None
    for h, stage in enumerate(feature_map._stages):
        before, layer, after = layers[2 * h : 2 * h + 3]
        a = np.linalg.norm(u, axis=1)
        unit = u / a[:, None]
        r = np.array([hermite_coefficients(layer, s, degree) for s in a])
        slopes = np.sqrt(low[1:]) * r[:, 1:] / a[:, None]
        powers, columns = powers_twin(stage.covariance, unit)
        w, is_last = math.sqrt(after.weight_variance), 2 * h + 3 == len(layers)
        parts = []
        if ntk and rest is not None and stage.product is not None:
            dots, dot_columns = powers_twin(stage.product.slope, unit)
            tensor = stage.product.tensor
            parts.append(
                w * TensorSRHT(tensor.n_components, tensor.seed, tensor.path)(rest, dots * slopes[:, dot_columns])
            )
        if is_last:
            factors = low * before.trainable + after.trainable if ntk else np.ones(degree + 1)
            parts.append(w * powers * (np.sqrt(factors) * r)[:, columns])
            constant = after.bias_variance > 0 and (after.trainable or not ntk)
            parts.append(np.full((len(x), int(constant)), math.sqrt(after.bias_variance)))
            return np.concatenate(parts, axis=1)
        if before.trainable:
            parts.append(w * powers * (np.sqrt(low) * r)[:, columns])
        rest = np.concatenate(parts, axis=1) if parts else None
        phi = powers * r[:, columns]
        exact = np.array([float(layer.gain * layer.sigma.dual(s, s, 1.0)) for s in a])
        phi *= (np.sqrt(exact) / np.linalg.norm(phi, axis=1))[:, None]
        u = np.concatenate(
            [w * phi, np.full((len(x), int(after.bias_variance > 0)), math.sqrt(after.bias_variance))], axis=1
        )
    raise AssertionError("a network ends in a Dense layer")


@both_kernels
@pytest.mark.parametrize("name", {**NETWORKS, **DEEP})
def test_against_the_twin(name, kernel):
    feature_map = HermiteSketch({**NETWORKS, **DEEP}[name], 50, degree=5, seed=4, kernel=kernel)
    x = ROWS[[0, 2, 4, 5]]
    expected = twin(feature_map, x)
    assert expected.shape == (4, 50)
    scale = np.abs(expected).max()
    assert np.abs(feature_map(x) - expected).max() <= 1e-8 * scale
    assert np.abs(feature_map(x.astype("float32")) - expected).max() <= 2e-5 * scale


@pytest.mark.parametrize("kernel", ["ntk", pytest.param("nngp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DEEP)
def test_deep_maps_approach_their_kernel(name, kernel):
    feature_map, x, count = HermiteSketch(DEEP[name], 400, degree=9, kernel=kernel), ROWS / 2, 30
    exact = feature_map.target(x)
    products = np.array([(phi := feature_map.replace(seed=seed)(x)) @ phi.T for seed in range(count)])
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    error = products.std(axis=0, ddof=1) / math.sqrt(count)
    allowed = 1 / 400 + len(feature_map._stages) * feature_map.truncation_errors(x).max()
    assert (np.abs(products.mean(axis=0) - exact) <= 4.5 * error + allowed * size).all()
    assert (error <= 0.03 * size).all()
    assert allowed < 0.05


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_relative_error_falls_as_one_over_root_m(depth):
    x, error = np.random.default_rng(0).standard_normal((40, 30)) / 6 + 0.1, {}
    for m in (256, 4096):
        feature_map = HermiteSketch(fully_connected(depth, "gelu", bias_variance=0.1), m)
        exact = feature_map.target(x)
        phis = (feature_map.replace(seed=seed)(x) for seed in range(4))
        error[m] = np.mean([np.linalg.norm(phi @ phi.T - exact) for phi in phis]) / np.linalg.norm(exact)
    assert error[256] <= 0.25
    assert error[4096] <= 0.4 * error[256]


def test_targets_and_order_of_layers():
    assert HermiteSketch(DEEP_GELU, 64).target == NTK(DEEP_GELU)
    assert HermiteSketch(DEEP_GELU, 64, kernel="nngp").target == NNGP(DEEP_GELU)


def test_zero_rows_have_the_constant_of_their_activation():
    x = np.zeros((2, 5))
    assert (HermiteSketch(fully_connected(1, "gelu"), 32)(x) == 0).all()
    for name in ("cos", "step", "softplus"):
        feature_map = HermiteSketch(fully_connected(1, name), 32, kernel="nngp")
        phi = feature_map(x)
        # off the diagonal, where the exact kernel too gives rows of length 0 no direction
        np.testing.assert_allclose((phi @ phi.T)[0, 1], feature_map.target(x)[0, 1], rtol=1e-12)
        assert (phi[:, 1:] == 0).all()


def test_growing_activations_are_sketched_for_the_rows_that_allow_it():
    """exp(6t) has no expansion at a standard deviation of 4; the components are then shared out for rows of length 1."""
    sigma = activations.get("exp", A=6.0)
    feature_map = HermiteSketch(fully_connected(1, sigma, normalize=False), 64, kernel="nngp")
    x = np.array([[0.05, 0.0], [0.0, 0.1]])
    phi = feature_map(x)
    np.testing.assert_allclose(phi @ phi.T, feature_map.target(x), rtol=0.3)
    with pytest.raises(InputError, match="grows too fast"):
        feature_map(40 * x)


def test_a_users_function_has_the_features_of_the_activation_that_it_is():
    swish = activations.from_function(lambda t: t / (1 + np.exp(-t)))
    named, own = (HermiteSketch(fully_connected(2, sigma, bias_variance=0.1), 80) for sigma in ("silu", swish))
    np.testing.assert_allclose(own(ROWS), named(ROWS), rtol=0, atol=1e-8)


def test_a_dual_without_a_known_activation_is_expanded_from_the_dual():
    """The normalised Gaussian with biases, which `HomogeneousSketch` cannot take: nothing is left above degree 14."""
    network = fully_connected(1, activations.get("normalized_gaussian", scale=1.5), bias_variance=0.2)
    feature_map, count = HermiteSketch(network, 80, degree=16), 50
    assert feature_map.truncation_errors(ROWS).max() <= 1e-8
    products = np.array([(phi := feature_map.replace(seed=seed)(ROWS)) @ phi.T for seed in range(count)])
    exact, error = feature_map.target(ROWS), products.std(axis=0, ddof=1) / math.sqrt(count)
    assert (np.abs(products.mean(axis=0) - exact) <= 4.5 * error + 1e-7).all()
    assert (error <= 0.08 * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))).all()


@pytest.mark.parametrize("name", ["rbf", "sin", "gabor"])
def test_activations_whose_low_degrees_vanish_for_long_rows(name):
    """Of e^{-(Aa)²}-like radial functions nothing is left at the longer of the lengths for which components are shared out."""
    sigma = activations.get(name) if name == "gabor" else activations.get(name, A=12.0)
    feature_map = HermiteSketch(fully_connected(2, sigma), 80)
    assert np.isfinite(feature_map(ROWS)).all()
    assert feature_map.truncation_errors(ROWS).max() > 0.3  # and the map says so


def test_relu_keeps_the_taylor_series_of_its_kernel():
    """Σ_ℓ (1 + ℓ)·2r_ℓ(1)²·c^ℓ = κ₁(c) + c·κ₀(c), degree by degree, so what is left out are the tails of these series."""
    low, r = np.arange(7), radial_functions(activations.get("relu"), np.ones(1), 6)[:, 0]
    expected = taylor_coefficients(1, 6) + np.concatenate([[0.0], taylor_coefficients(0, 5)])
    np.testing.assert_allclose((1 + low) * 2 * r**2, expected, rtol=1e-12, atol=1e-15)
    error = HermiteSketch(fully_connected(1), 64, degree=6).truncation_errors(ROWS[[0, 2]])
    np.testing.assert_allclose(error, max(taylor_tail(1, 6), taylor_tail(0, 5)), rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gelu, erf", "depth 3"])
def test_on_a_gpu(name):
    feature_map, x = HermiteSketch(DEEP[name], 300), rows(50, width=20) / 3
    here, there = feature_map(x), to_host(feature_map(to_device(x)))
    assert np.abs(here - there).max() <= 1e-9 * np.abs(here).max()


SKETCHED = fully_connected(2, "gelu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 0}, "degree is 0"),
        ({"degree": 65}, "degree is 65, expected at most 64"),
        ({"degree": "8"}, "degree is '8'"),
        ({"kernel": "nngq"}, "unknown kernel 'nngq'; did you mean 'nngp'"),
        ({"n_components": 3}, "n_components=.* leaves none for some of the"),
        ({"network": "gelu"}, "network is 'gelu'; give a Network"),
        ({"network": fully_connected(0)}, "0 activations and 1 layers"),
        ({"network": convolutional(1, activation="erf")}, "layer 0 is Conv.*Dense and Activation in turn"),
        ({"network": Network((Dense(), LayerNorm(), Activation("erf"), Dense()))}, "layer 1 is LayerNorm"),
        ({"network": fully_connected(1, "sign")}, "layer 1 is Sign.*jumps.*kernel='nngp'"),
        (
            {"network": Network((Dense(trainable=False), Activation("erf"), Dense(trainable=False)))},
            "no layer .* is trainable",
        ),
        (
            {"network": fully_connected(1, activations.from_function(lambda t: np.abs(t - 1.0), tolerance=1e-2))},
            "no usable Hermite expansion.*kinks",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        HermiteSketch(**{"network": SKETCHED, "n_components": 64, **arguments})


def test_rows_that_are_too_long_for_an_oscillating_activation_are_refused():
    feature_map = HermiteSketch(fully_connected(1, "sin"), 32)
    with pytest.raises(InputError, match=r"oscillates too fast there\. Scale the inputs down"):
        feature_map(np.full((1, 2), 1e6))


def test_rows_of_any_length_where_the_activation_has_an_expansion():
    """Beyond the lengths that components are shared out for; where σ oscillates too fast there, the call says so."""
    x = np.random.default_rng(0).standard_normal((4, 3))
    bounded = HermiteSketch(fully_connected(1, "erf"), 64, degree=4)
    assert np.isfinite(bounded(1e3 * x)).all()
    assert np.isfinite(bounded(1e-6 * x)).all()
    with pytest.raises(InputError, match="no usable Hermite expansion at a standard deviation of"):
        HermiteSketch(fully_connected(1, "sin"), 64, degree=4)(1e3 * x)
