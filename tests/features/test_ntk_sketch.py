"""NTKSketch: against the truncated kernels it is unbiased for, written out again here; scalings, options, sparse rows, errors."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import scipy.sparse

from ntkdask import activations, arrays
from ntkdask.errors import InputError
from ntkdask.features import NTKRandomFeatures, NTKSketch
from ntkdask.features.ntk_sketch import DERIVATIVES
from ntkdask.features.sketching.polynomial_fits import (
    activation_coefficients,
    homogeneous_coefficients,
    taylor_coefficients,
)
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.networks import (
    Activation,
    Conv,
    Dense,
    Flatten,
    LayerNorm,
    Network,
    Residual,
    convolutional,
    fully_connected,
)

ABRELU = activations.get("abrelu", A=0.5, B=1.5)
GAUSSIAN = activations.get("normalized_gaussian", scale=0.7)
MIXED = Network(
    (Dense(1.5), Activation("relu"), Dense(0.7, trainable=False), Activation(ABRELU, normalize=False), Dense(2.0)),
    scale_inputs=True,
)
FROZEN_FIRST = Network((Dense(1.3, trainable=False), Activation("relu"), Dense(0.5)))
FROZEN_LAST = Network((Dense(1.3), Activation("relu", normalize=False), Dense(0.5, trainable=False)))
ONE_LAYER = [fully_connected(1), fully_connected(1, GAUSSIAN), fully_connected(1, ABRELU), FROZEN_FIRST, FROZEN_LAST]
METHODS = [{}, {"method": "algorithm1"}, {"method": "algorithm1", "derivative": "random"}]
every_method = pytest.mark.parametrize("options", METHODS, ids=str)


def rows(n=6, d=7, dtype="float64", seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d))
    if n >= 6:
        x[1], x[3], x[4] = 0, x[2], -x[0]
    return x.astype(dtype)


def evaluate(coefficients, t):
    return sum(c * t**j for j, c in enumerate(coefficients))


def truncated_kernel(network, x, degree, expansion, derivative):
    """The two-quantity rules of MATH.md §1 with polynomials for κ and κ', pair by pair of rows; hidden cosines divided by P(1)."""
    layers, out = network.layers, np.zeros((len(x), len(x)))
    divisor = x.shape[1] if network.scale_inputs else 1
    for i, left in enumerate(x):
        for j, right in enumerate(x):
            size = np.linalg.norm(left) * np.linalg.norm(right)
            if not size:
                continue
            c, s = left @ right / size, layers[0].weight_variance
            t = s * c if layers[0].trainable else 0.0
            for h in range(network.depth):
                layer, dense = layers[2 * h + 1], layers[2 * h + 2]
                value, slope = activation_coefficients(layer, degree, expansion)
                low, high = layer.sigma.slopes if derivative == "random" else (0, 0)
                k0 = (low + high) ** 2 / 2 * reference.kappa(0, c) - low * high
                t *= layer.gain * k0 if derivative == "random" else evaluate(slope, c)
                moment = layer.gain * layer.sigma.second_moment()
                s *= moment * dense.weight_variance
                c = evaluate(value, c) / (moment if h + 1 == network.depth else sum(value))
                t = dense.weight_variance * t + (s * c if dense.trainable else 0.0)
            out[i, j] = size / divisor * t
    return out


def mean_and_error(feature_map, x, count):
    grams = np.array([(lambda phi: phi @ phi.T)(feature_map.replace(seed=seed)(x)) for seed in range(count)])
    return grams.mean(axis=0), grams.std(axis=0, ddof=1) / math.sqrt(count)


@pytest.mark.parametrize("expansion", ["fit", "taylor"])
@pytest.mark.parametrize("network", ONE_LAYER, ids=str)
def test_one_layer_of_algorithm1_is_unbiased_for_the_truncated_kernel(network, expansion):
    x = rows()
    sketch = NTKSketch(network, 128, degree=3, method="algorithm1", expansion=expansion)
    mean, error = mean_and_error(sketch, x, 300)
    expected = truncated_kernel(network, x, 3, expansion, "sketch")
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(mean - expected) <= 4.5 * error + 1e-12 * scale).all()
    exact = sketch.target(x)
    bias = np.abs(expected - exact)[scale > 0] / np.sqrt(np.outer(np.diag(exact), np.diag(exact)))[scale > 0]
    assert bias.max() <= sketch.truncation_error * (1 + 1e-9)
    if expansion == "taylor" and sketch.truncation_error > 0.02:
        assert (np.abs(mean - exact) > 4.5 * error)[scale > 0].any()  # the truncation would be seen


def test_one_layer_with_random_derivatives_is_unbiased():
    x = rows()
    for network in (fully_connected(1), FROZEN_LAST, fully_connected(1, ABRELU)):
        sketch = NTKSketch(network, 128, degree=4, method="algorithm1", derivative="random")
        mean, error = mean_and_error(sketch, x, 300)
        expected = truncated_kernel(network, x, 4, "fit", "random")
        assert (np.abs(mean - expected) <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("network", [fully_connected(2), MIXED], ids=["depth 2", "mixed"])
def test_two_layers_of_algorithm1_approach_the_truncated_kernel(network):
    """The bias that features of the first layer leave in the second falls with n_components."""
    x = rows()[[0, 2, 5]]
    expected = truncated_kernel(network, x, 6, "fit", "sketch")
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    mean, error = mean_and_error(NTKSketch(network, 1024, degree=6, method="algorithm1"), x, 60)
    assert (np.abs(mean - expected) <= 4.5 * error + 8 / 1024 * scale).all()
    assert (error <= 0.02 * scale).all()


@pytest.mark.parametrize("network", [fully_connected(3), MIXED], ids=["depth 3", "mixed"])
def test_the_polynomial_is_unbiased_for_its_kernel(network):
    x = rows()
    sketch = NTKSketch(network, 256, degree=6)
    c = homogeneous_coefficients(network, 6)
    lengths = np.linalg.norm(x, axis=1)
    sizes = np.outer(lengths, lengths)
    cosines = np.divide(x @ x.T, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    expected = sizes * evaluate(c, cosines) / (x.shape[1] if network.scale_inputs else 1)
    mean, error = mean_and_error(sketch, x, 300)
    assert (np.abs(mean - expected) <= 4.5 * error + 1e-12).all()
    exact = sketch.target(x)
    np.testing.assert_allclose(np.diag(expected), np.diag(exact), rtol=1e-9, atol=1e-12)
    assert (
        np.abs(expected - exact) <= (sketch.truncation_error + 1e-9) * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    ).all()


def test_algorithm1_at_depth_one_is_its_formula():
    """ψ = ‖x‖·[Q²(φ̇ ⊗ x̂), φ] from the parts of the map, put together by hand."""
    x, m = rows(), 64
    sketch = NTKSketch(fully_connected(1), m, seed=5, degree=3, method="algorithm1", expansion="taylor")
    stage = sketch._stages[0]
    lengths = np.linalg.norm(x, axis=1)
    unit = x / np.where(lengths > 0, lengths, 1)[:, None]

    def features(part, coefficients):
        powers, start = part.powers(unit), 0
        for degree, width in zip(part.degrees, part.widths(7), strict=True):
            powers[:, start : start + width] *= math.sqrt(coefficients[degree])
            start += width
        return powers

    phi = features(stage.covariance, taylor_coefficients(1, 3))
    slope = features(stage.slope.polynomial, taylor_coefficients(0, 3))
    tensor = TensorSRHT(m - m // 2, 5, ("ntk-sketch", 0, "tensor"))(slope, unit)
    expected = lengths[:, None] * np.concatenate([tensor, phi], axis=1)
    np.testing.assert_allclose(sketch(x), expected, rtol=1e-12, atol=1e-12)


def test_truncation_errors_of_the_series():
    """At depth 1 both tails of MATH.md §4 add up at α = 1, over Θ(1) = 2."""
    taylor = NTKSketch(fully_connected(1), 64, method="algorithm1", expansion="taylor")
    assert abs(taylor.truncation_error - (0.0906 + 0.0035) / 2) < 1e-4
    errors = [NTKSketch(fully_connected(3), 64, degree=degree).truncation_error for degree in (2, 8, 32)]
    assert errors[0] > 2 * errors[1] > 3 * errors[2] > 0
    random = NTKSketch(fully_connected(1), 64, method="algorithm1", derivative="random")
    assert random.truncation_error < 1e-3


@every_method
def test_errors_fall_with_components(options):
    x = rows(40, 20)
    errors = []
    for m in (256, 4096):
        phi = NTKSketch(fully_connected(1), m, degree=12, **options)(x)
        exact = NTKSketch(fully_connected(1), 64).target(x)
        errors.append(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))
    assert errors[0] < 0.4
    assert errors[1] < 0.45 * errors[0]


@every_method
def test_rows_enter_by_their_length_and_direction(options):
    x, sketch = rows(), NTKSketch(MIXED, 100, seed=3, **options)
    phi = sketch(x)
    np.testing.assert_allclose(sketch(2.5 * x), 2.5 * phi, rtol=1e-10)
    assert (phi[1] == 0).all()
    np.testing.assert_array_equal(phi[3], phi[2])
    unscaled = NTKSketch(dataclasses.replace(MIXED, scale_inputs=False), 100, seed=3, **options)(x)
    np.testing.assert_allclose(unscaled, math.sqrt(7) * phi, rtol=1e-10)


@every_method
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_lengths_stay_finite(options, dtype):
    sketch = NTKSketch(fully_connected(2), 64, **options)
    for scale in (1e-15, 1e15):
        phi = sketch((rows() * scale).astype(dtype))
        assert np.isfinite(phi).all()
        assert phi.dtype == dtype
        assert np.abs(phi[0]).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sparse_rows_are_dense_ones(dtype):
    x = rows(60, 400, dtype) * (np.random.default_rng(1).random((60, 400)) < 0.05)
    x[7] = 0
    sketch = NTKSketch(fully_connected(2), 300, degree=5, leaves="count")
    found = sketch(scipy.sparse.csr_array(x))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, sketch(x), atol={"float32": 1e-5, "float64": 1e-12}[dtype] * np.abs(found).max())
    assert (found[7] == 0).all()
    np.testing.assert_array_equal(found[:20], sketch(scipy.sparse.csr_array(x)[:20]))


def test_sparse_rows_are_unbiased():
    x = rows(4, 30) * (np.random.default_rng(1).random((4, 30)) < 0.3)
    sketch = NTKSketch(fully_connected(2), 256, degree=6, leaves="count")
    mean, error = mean_and_error(sketch, scipy.sparse.csr_array(x), 300)
    exact = sketch.target(x)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(mean - exact) <= 4.5 * error + sketch.truncation_error * scale).all()
    own = np.diag_indices(4)
    assert (np.abs(mean - exact) <= 4.5 * error + 1e-9 * scale)[own].all()  # the diagonal has no bias
    assert (error[own] <= 0.05 * scale[own]).all()


def test_networks_it_cannot_sketch_are_refused():
    cases = {
        r"layer 0 is Dense.*bias": fully_connected(1, bias_variance=0.1),
        "not homogeneous": fully_connected(1, "erf"),
        "CNTKSketch": convolutional(1),
        "takes images": Network((Conv(), Flatten())),
        "LayerNorm": Network((Dense(), LayerNorm(), Activation("relu"), Dense())),
        "give a Network": None,
        "is zero": Network((Dense(trainable=False), Activation("relu"), Dense(trainable=False))),
    }
    for message, network in cases.items():
        for options in METHODS:
            with pytest.raises(InputError, match=message):
                NTKSketch(network, 64, **options)


def test_algorithm1_needs_layers_in_turn_and_the_polynomial_does_not():
    residual = Network((Dense(), Residual((Activation("relu"), Dense(0.5))), Activation("abs"), Dense()))
    for network, message in ((residual, "method='polynomial'"), (Network((Dense(),)), "at least one activation")):
        with pytest.raises(InputError, match=message):
            NTKSketch(network, 64, method="algorithm1")
    sketch, x = NTKSketch(residual, 2048), rows()
    exact = sketch.target(x)
    assert np.linalg.norm(sketch(x) @ sketch(x).T - exact) <= 0.15 * np.linalg.norm(exact)


def test_other_arguments_are_refused():
    network = fully_connected(1)
    for degree in (0, -1, 1.5, True):
        for options in METHODS:
            with pytest.raises(InputError, match="degree is"):
                NTKSketch(network, 64, degree=degree, **options)
    with pytest.raises(InputError, match=r"unknown method 'algorithm'.*'algorithm1'"):
        NTKSketch(network, 64, method="algorithm")
    with pytest.raises(InputError, match="unknown derivative 'step'"):
        NTKSketch(network, 64, method="algorithm1", derivative="step")
    with pytest.raises(InputError, match="options of method='algorithm1'"):
        NTKSketch(network, 64, derivative="random")
    with pytest.raises(InputError, match="option of method='polynomial'"):
        NTKSketch(network, 64, method="algorithm1", leaves="count")
    with pytest.raises(InputError, match="leaves is 'csr'"):
        NTKSketch(network, 64, leaves="csr")
    with pytest.raises(InputError, match="one kink at 0"):
        NTKSketch(fully_connected(1, GAUSSIAN), 64, method="algorithm1", derivative="random")
    with pytest.raises(InputError, match=r"n_components=4 leaves none.*smaller degree"):
        NTKSketch(fully_connected(3), 4)
    for options in METHODS[1:]:
        with pytest.raises(InputError, match=r"n_components.*Use n_components >="):
            NTKSketch(fully_connected(3), 4, **options)
    with pytest.raises(InputError, match=r"sparse.*leaves='count'"):
        NTKSketch(network, 64)(scipy.sparse.csr_array(rows()))
    with pytest.raises(InputError, match=r"sparse csr_array.*toarray"):
        NTKRandomFeatures(network, 64)(scipy.sparse.csr_array(rows()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_gpu_matches_cpu(dtype, derivative):
    x = rows(300, 20, dtype)
    for options in ({}, {"method": "algorithm1", "derivative": derivative}):
        sketch = NTKSketch(fully_connected(2), 700, **options)
        here, there = sketch(x), arrays.to_host(sketch(arrays.to_device(x)))
        scale = np.abs(here @ here.T).max()
        assert np.abs(there @ there.T - here @ here.T).max() <= {"float32": 1e-3, "float64": 1e-10}[dtype] * scale
