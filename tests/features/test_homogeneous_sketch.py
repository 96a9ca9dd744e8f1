"""HomogeneousSketch against its formula, the polynomial kernel it is unbiased for, and the exact kernels; bad input."""

import math

import numpy as np
import pytest
from contracts import rows
from sklearn.datasets import load_digits

from ntkdask import activations
from ntkdask.activations import NormalizedGaussian
from ntkdask.arrays import to_device, to_host
from ntkdask.errors import InputError
from ntkdask.features import HomogeneousSketch
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.kernels import NNGP, NTK
from ntkdask.networks import Activation, Dense, Network, convolutional, fully_connected

NETWORKS = {
    "relu 1": fully_connected(1),
    "relu 2": fully_connected(2, weight_variance=1.4, normalize=False),
    "relu 3": fully_connected(3, scale_inputs=True),
    "abrelu 2": fully_connected(2, activations.get("abrelu", A=0.5, B=1.5)),
    "leaky 1": fully_connected(1, activations.get("leaky_relu", slope=0.2), weight_variance=0.7),
    "abs 1": fully_connected(1, "abs"),
    "gaussian dual 1": fully_connected(1, NormalizedGaussian(1.0)),
    "gaussian dual 3": fully_connected(3, NormalizedGaussian(0.5)),
    "frozen ends": Network((Dense(trainable=False), Activation(), Dense(1.3), Activation(), Dense(trainable=False))),
}
ROWS = rows(6) * np.array([1.0, 1.0, 0.5, 3.0, 1.0, 2.0])[:, None]
"""A zero row, two parallel ones, two opposite ones."""


def lengths_and_cosines(x):
    size = np.linalg.norm(x, axis=1)
    unit = x / np.where(size > 0, size, 1)[:, None]
    return size, unit, unit @ unit.T


def polynomial_kernel(feature_map, x):
    """‖x‖‖y‖·Σ_j c_j cos^j, each power of the cosine by an explicit tensor power of the rows."""
    size, unit, _ = lengths_and_cosines(x)
    total, power = np.zeros((len(x), len(x))), np.where(size > 0, 1.0, 0.0)[:, None]
    for c in feature_map.polynomial:
        total += c * power @ power.T
        power = np.einsum("ni,nj->nij", power, unit).reshape(len(x), -1)
    divisor = x.shape[1] if feature_map.network.scale_inputs else 1
    return np.outer(size, size) * total / divisor


@pytest.mark.parametrize("kernel", ["ntk", pytest.param("nngp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_is_unbiased_for_its_polynomial(name, kernel):
    feature_map, x, count = HomogeneousSketch(NETWORKS[name], 60, degree=5, kernel=kernel), ROWS[:, :4], 150
    features = (feature_map.replace(seed=seed)(x) for seed in range(count))
    products = np.array([phi @ phi.T for phi in features])
    exact = polynomial_kernel(feature_map, x)
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    error = products.std(axis=0, ddof=1) / math.sqrt(count)
    assert (np.abs(products.mean(axis=0) - exact) <= 4.5 * error + 1e-12 * size).all()
    assert (error <= 0.04 * size).all()


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_polynomial_is_the_kernel_up_to_the_stated_error(name, kernel):
    """Each entry within truncation_error of √(K_ii·K_jj), the diagonal exact; the error falls with the degree."""
    errors, x = [], ROWS
    for degree in (4, 8, 16):
        feature_map = HomogeneousSketch(NETWORKS[name], 200, degree=degree, kernel=kernel)
        assert feature_map.target == (NTK if kernel == "ntk" else NNGP)(NETWORKS[name])
        exact, diagonal = feature_map.target(x), feature_map.target.diagonal(x)
        size, _, cosine = lengths_and_cosines(x)
        divisor = x.shape[1] if NETWORKS[name].scale_inputs else 1
        found = np.outer(size, size) / divisor * np.polynomial.polynomial.polyval(cosine, feature_map.polynomial)
        scale = np.sqrt(np.outer(diagonal, diagonal))
        assert (np.abs(found - exact) <= (feature_map.truncation_error + 1e-12) * scale).all()
        np.testing.assert_allclose(np.diag(found), diagonal, rtol=1e-9)
        errors.append(feature_map.truncation_error)
    assert errors[0] >= errors[1] >= errors[2] - 1e-9
    assert errors[2] <= 0.06


def test_the_normalised_gaussian_is_exact_to_rounding():
    """Its dual is a power series of non-negative coefficients that fall like 1/j!: NNGP e^{c−1}, NTK (1 + c)·e^{c−1}."""
    network = fully_connected(1, NormalizedGaussian(1.0))
    for kernel, factor in (("nngp", lambda j: 1.0), ("ntk", lambda j: 1.0 + j)):
        feature_map = HomogeneousSketch(network, 64, degree=14, kernel=kernel)
        expected = [factor(j) / math.factorial(j) / math.e for j in range(15)]
        np.testing.assert_allclose(feature_map.polynomial, expected, atol=1e-8)
        assert feature_map.truncation_error < 1e-9


def test_is_its_formula():
    x, feature_map = (
        rows(5)[[0, 2, 4]],
        HomogeneousSketch(fully_connected(1), 64, seed=5, coefficients=(0.3, 0.0, 0.9, 0.5)),
    )
    size, unit, _ = lengths_and_cosines(x)
    widths = (1, 40, 23)  # 1 + 61·(0.9, 0.5)/1.4
    parts = [np.full((3, 1), math.sqrt(0.3))]
    for degree, c, width in ((2, 0.9, widths[1]), (3, 0.5, widths[2])):
        sketch = PolySketch(degree, width, 5, ("homogeneous", degree))
        parts.append(math.sqrt(c) * sketch(unit, degrees=(degree,))[0])
    expected = size[:, None] * np.concatenate(parts, axis=1)
    np.testing.assert_allclose(feature_map(x), expected, rtol=1e-13)
    assert np.abs(feature_map(x.astype("float32")) - expected).max() <= 1e-5 * np.abs(expected).max()
    scaled = feature_map.replace(network=fully_connected(1, scale_inputs=True))
    np.testing.assert_allclose(scaled(x), expected / math.sqrt(6), rtol=1e-13)


def test_short_rows_enter_the_linear_term_as_they_are():
    feature_map, x = HomogeneousSketch(fully_connected(1, "identity"), 64), rows(6)
    np.testing.assert_allclose(feature_map(x)[:, :6], math.sqrt(2) * x, rtol=1e-12)  # the NTK is 2⟨x, z⟩
    assert (feature_map(x)[:, 6:] == 0).all()


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_features_are_homogeneous(factor):
    feature_map, x = HomogeneousSketch(fully_connected(2), 40), rows(6)
    np.testing.assert_allclose(feature_map(factor * x), factor * feature_map(x), rtol=1e-12, atol=1e-13 * factor)
    assert (feature_map(x)[1] == 0).all()


@pytest.mark.parametrize("source", ["random", "digits"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_relative_error_falls_as_one_over_root_m(depth, source):
    """And the mean over seeds is closer than the stated bias allows, on random and on real rows."""
    x = np.random.default_rng(0).standard_normal((60, 40)) + 0.7 if source == "random" else load_digits().data[:60] / 16
    error, mean = {}, 0.0
    for m in (256, 4096):
        feature_map = HomogeneousSketch(fully_connected(depth), m, degree=16)
        exact = feature_map.target(x)
        grams = [(phi := feature_map.replace(seed=seed)(x)) @ phi.T for seed in range(4)]
        error[m] = np.mean([np.linalg.norm(gram - exact) for gram in grams]) / np.linalg.norm(exact)
        mean = np.mean(grams, axis=0)
    assert error[256] <= 0.25
    # 1/4 of the spread is left, and the bias of the fit
    assert error[4096] <= 0.4 * error[256] + feature_map.truncation_error
    assert np.linalg.norm(mean - exact) <= (0.5 * error[256] + feature_map.truncation_error) * np.linalg.norm(exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_a_gpu(dtype):
    feature_map, x = HomogeneousSketch(fully_connected(2), 300), rows(50, dtype, width=20)
    here, there = feature_map(x), to_host(feature_map(to_device(x)))
    assert here.dtype == there.dtype
    assert np.abs(here - there).max() <= {"float32": 1e-5, "float64": 1e-13}[dtype] * np.abs(here).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 0}, "degree is 0"),
        ({"degree": 2.5}, "degree is 2.5"),
        ({"kernel": "ntkk"}, "unknown kernel 'ntkk'; did you mean 'ntk'"),
        ({"network": fully_connected(1, bias_variance=0.1)}, "with biases"),
        ({"network": fully_connected(1, "gelu")}, "not homogeneous"),
        ({"network": convolutional(1)}, "takes images"),
        ({"network": "relu"}, "network is 'relu'"),
        ({"n_components": 3}, "n_components=3 leaves none for some of the"),
        ({"coefficients": (0.5, -0.25, 1.0)}, r"coefficient of α\^1 is -0.25"),
        ({"coefficients": (0.0, 0.0)}, "all coefficients are zero"),
        ({"coefficients": (0.5, math.inf)}, "finite numbers"),
        ({"network": Network((Dense(trainable=False), Activation(), Dense(trainable=False)))}, "ntk of .* is zero"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        HomogeneousSketch(**{"network": fully_connected(1), "n_components": 64, **arguments})
