"""The careful path of fully connected kernels: near ±1, deep, in float32, for every kind of activation; blocks and threads."""

import math
import pickle

import numpy as np
import pytest
from contracts import FROZEN_ENDS, GENERAL, normwise, peak_bytes, rows
from reference import gaussian_expectation

from ntkdask import activations, registry, threads
from ntkdask.errors import InputError
from ntkdask.kernels import NNGP, NTK, RBF, ArcCosine, NNGPAndNTK, both, general, rectified
from ntkdask.networks import Activation, Dense, Network, fully_connected

# float64: of the twin, whose angles after a bias come from long double cosines, good to √1e-19
TOLERANCE = {"float32": 5e-6, "float64": 1e-8}


DEEP_FLOAT32 = 1e-5


PI = np.arccos(np.longdouble(-1))


def twin(network, x, y):
    """(NNGP, NTK) of networks of activations with slopes, in long double; angles of the inputs from differences and sums of unit rows.

    One float64 rounding away from |c| = 1 a float64 recursion has no digits left in its angles.
    """
    x, y = (np.asarray(part, np.longdouble) for part in (x, y))
    v, w = (x**2).sum(axis=1), (y**2).sum(axis=1)
    unit, other = x / np.sqrt(v)[:, None], y / np.sqrt(w)[:, None]
    apart = np.sqrt(((unit[:, None] - other) ** 2).sum(-1))
    together = np.sqrt(((unit[:, None] + other) ** 2).sum(-1))
    angle, fresh = 2 * np.arctan2(apart, together), True
    s, t = x @ y.T, np.zeros((len(x), len(y)), np.longdouble)
    for layer in network.layers:
        if isinstance(layer, Dense):
            s = layer.weight_variance * s + layer.bias_variance
            t = layer.weight_variance * t + (s if layer.trainable else 0)
            v, w = (layer.weight_variance * part + layer.bias_variance for part in (v, w))
            fresh = fresh and layer.bias_variance == 0
            continue
        size = np.sqrt(v[:, None] * w)
        theta = angle if fresh else np.arccos(np.clip(s / size, -1, 1))
        a, b = layer.sigma.slopes
        t = t * layer.gain * ((a + b) ** 2 / 2 * (1 - theta / PI) - a * b)
        kappa = (np.sin(theta) + (PI - theta) * np.cos(theta)) / PI
        s = layer.gain * size * ((a + b) ** 2 / 2 * kappa - a * b * np.cos(theta))
        v, w = (layer.gain * (a * a + b * b) / 2 * part for part in (v, w))
        fresh = False
    return s, t


def pairs(kind, width, n=60, seed=0):
    """Two sets of float32 rows: generic, or each of y next to its own or its opposite row of x, from 1/3 to 1e-8 away."""
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, n, width))
    if kind == "generic":
        return x.astype("float32"), noise.astype("float32")
    if kind == "clustered":
        return (1 + 0.05 * x).astype("float32"), (1 + 0.05 * noise).astype("float32")
    y = x + noise * 10.0 ** -rng.uniform(0.5, 8, (n, 1))
    y[:5] = x[:5]
    return x.astype("float32"), (y if kind == "near" else -y).astype("float32")


SLOPED = {
    "relu": fully_connected(3),
    "biases": fully_connected(3, bias_variance=0.3),
    "abrelu": fully_connected(3, activations.get("abrelu", A=0.5, B=1.5), bias_variance=0.1),
    "negative A": fully_connected(2, activations.get("abrelu", A=-0.5, B=1.5), weight_variance=1.4, normalize=False),
    "abs": fully_connected(3, "abs"),
    "nearly linear": fully_connected(3, activations.get("leaky_relu", slope=0.99)),
    "identity": fully_connected(2, "identity", bias_variance=0.2),
    "mixed": Network((Dense(), Activation("relu"), Dense(1.5, 0.2), Activation("abs"), Dense(0.5, trainable=False))),
    "ends in an activation": Network((Dense(1.3, 0.1), Activation("relu"), Dense(), Activation("relu"))),
}


@pytest.mark.parametrize("name", SLOPED)
@pytest.mark.parametrize("kind", ["generic", "near", "opposite", "clustered"])
@pytest.mark.parametrize("width", [3, 300])
def test_float32_near_one_and_away_from_it(name, kind, width):
    network, (x, y) = SLOPED[name], pairs(kind, width)
    for kernel, expected in zip((NNGP(network), NTK(network)), twin(network, x, y), strict=True):
        for dtype in ("float32", "float64"):
            a, b = x.astype(dtype), y.astype(dtype)
            error = normwise(kernel(a, b), expected.astype(float), kernel.diagonal(a), kernel.diagonal(b))
            assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["generic", "near", "opposite", "clustered"])
@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_depth_twenty_in_float32(kind, bias):
    """Every correlation tends to 1; nothing is lost to it."""
    network, (x, y) = fully_connected(20, bias_variance=bias), pairs(kind, 30)
    for kernel, expected in zip((NNGP(network), NTK(network)), twin(network, x, y), strict=True):
        assert normwise(kernel(x, y), expected.astype(float), kernel.diagonal(x), kernel.diagonal(y)) <= DEEP_FLOAT32


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_duplicates_across_x_and_y_equal_the_diagonal(dtype):
    x = rows(40, dtype, width=50)
    for network in (
        fully_connected(3),
        fully_connected(5, bias_variance=0.2),
        fully_connected(2, "erf", bias_variance=0.1),
    ):
        kernel = NTK(network)
        rounding = {"float32": 2e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(np.diag(kernel(x, x.copy())), kernel.diagonal(x), rtol=rounding)


def test_polynomials_of_the_angle():
    """arccos(1 − 2u)/π = √u·angle(u) and κ₁(1 − 2u) − (1 − 2u) = 2u√u·excess(u), from their power series."""
    u = np.linspace(0, 0.5, 501)
    k = np.arange(120)
    arcsine = np.cumprod(np.concatenate([[1.0], (2 * k[1:] - 1) / (2 * k[1:])])) / (2 * k + 1)
    root = np.cumprod(np.concatenate([[1.0], (k[1:] - 1.5) / k[1:]]))
    bulge = root[1:] - arcsine[1:] + 2 * arcsine[:-1]
    angle = 2 / math.pi * np.polynomial.polynomial.polyval(u, arcsine)
    excess = np.polynomial.polynomial.polyval(u, bulge) / math.pi
    for dtype, rtol in (("float32", 1e-7), ("float64", 1e-15)):
        for table, exact in ((rectified.ANGLE, angle), (rectified.EXCESS, excess)):
            np.testing.assert_allclose(np.polynomial.polynomial.polyval(u, table[dtype]), exact, rtol=rtol)


DERIVATIVES = {
    "erf": lambda t: 2 / math.sqrt(math.pi) * np.exp(-(t**2)),
    "sin": np.cos,
    "gelu": lambda t: (
        np.vectorize(lambda s: (1 + math.erf(s / math.sqrt(2))) / 2)(t)
        + t * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    ),
    "gaussian": lambda t: -2 * t * np.exp(-(t**2)),
    "relu": lambda t: (t > 0) * 1.0,
}


def expectations(layer, a, b, c):
    """(k_σ, k_σ') by quadrature."""
    derivative = DERIVATIVES[type(layer.sigma).name]
    return (
        layer.gain * gaussian_expectation(layer.sigma, layer.sigma, a, b, c, nodes=120),
        layer.gain * gaussian_expectation(derivative, derivative, a, b, c, nodes=120),
    )


def pair_twin(network, row, column):
    """(NNGP, NTK) of one pair of rows through quadrature."""
    xx, yy, xy, tangent = row @ row, column @ column, row @ column, 0.0
    for layer in network.layers:
        if isinstance(layer, Dense):
            xx, yy, xy = (layer.weight_variance * s + layer.bias_variance for s in (xx, yy, xy))
            tangent = layer.weight_variance * tangent + (xy if layer.trainable else 0.0)
        else:
            a, b = math.sqrt(xx), math.sqrt(yy)
            xy, slope = expectations(layer, a, b, xy / (a * b))
            tangent *= slope
            xx, yy = expectations(layer, a, a, 1.0)[0], expectations(layer, b, b, 1.0)[0]
    return xy, tangent


@pytest.mark.parametrize(
    "network",
    [
        fully_connected(2, "erf", bias_variance=0.1),
        fully_connected(1, "sin", weight_variance=0.8),
        Network((Dense(1.2, 0.1), Activation("gelu"), Dense(trainable=False), Activation("relu"), Dense(0.7))),
        Network((Dense(0.5), Activation("gaussian", normalize=False), Dense(1.0, 0.1), Activation("erf"))),
    ],
    ids=["erf", "sin", "gelu and relu", "gaussian and erf"],
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_other_activations_against_quadrature(network, dtype):
    rng = np.random.default_rng(0)
    x, y = (0.6 * rng.standard_normal((n, 4)).astype(dtype) for n in (3, 2))
    expected = np.array([[pair_twin(network, a, b) for b in y.astype("float64")] for a in x.astype("float64")])
    rtol = {"float32": 1e-6, "float64": 1e-7}[dtype]  # of the quadrature in float64
    np.testing.assert_allclose(NNGP(network)(x, y), expected[..., 0], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(NTK(network)(x, y), expected[..., 1], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("network", [GENERAL, FROZEN_ENDS, fully_connected(3, "abs")], ids=["general", "frozen", "abs"])
def test_both_ways_agree(network):
    """The one pass and the duals are two programs for the same numbers."""
    x, y = (rows(n, "float64", seed) for n, seed in ((30, 0), (20, 1)))
    parts = ("nngp", "ntk")
    for kernel, ours, theirs in zip(
        (NNGP(network), NTK(network)), both(network, x, y), general.matrices(network, x, y, parts), strict=True
    ):
        assert normwise(ours, theirs, kernel.diagonal(x), kernel.diagonal(y)) <= 1e-7


# --- blocks and threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel", [NTK(fully_connected(3)), NTK(GENERAL), NNGP(fully_connected(1, "erf")), ArcCosine(0), RBF(0.1)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bits_do_not_depend_on_threads(kernel, dtype):
    x, y = rows(700, dtype, width=20), rows(530, dtype, seed=1, width=20)
    results = []
    for count in (1, 2, 3):
        with threads.limited(count):
            results.append((kernel(x), kernel(x, y), kernel.diagonal(x)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(results[0][0], results[0][0].T)


@pytest.mark.parametrize(
    "kernel", [NTK(fully_connected(2)), NTK(fully_connected(1, "erf")), ArcCosine(2), RBF(0.1)], ids=str
)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_ragged_blocks_cover_the_matrix(kernel, n):
    x = rows(n, width=5)
    whole, parts = kernel(x), np.concatenate([kernel(x[i : i + 100], x) for i in range(0, n, 100)])
    diagonal = kernel.diagonal(x)
    assert normwise(parts, whole, diagonal, diagonal) <= 1e-13


def test_many_near_rows_in_float32():
    """More than one entry in eight is near: a float64 product takes their place."""
    rng = np.random.default_rng(0)
    x = (1 + 1e-3 * rng.standard_normal((300, 20))).astype("float32")
    kernel = NTK(fully_connected(3))
    _, expected = twin(kernel.network, x, x)
    diagonal = kernel.diagonal(x)
    assert normwise(kernel(x), expected.astype(float), diagonal, diagonal) <= TOLERANCE["float32"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_spoils_its_own_entries_only(bad):
    x, kernel = rows(20, "float32"), NTK(fully_connected(2))
    x[7, 2] = bad
    with np.errstate(invalid="ignore"):
        k = kernel(x)
    assert np.isnan(k[7, 8:]).all()
    assert np.isfinite(np.delete(np.delete(k, 7, axis=0), 7, axis=1)).all()


# --- the pair -----------------------------------------------------------------------------------------------------


def test_the_pair_is_an_object():
    pair, x, y = both(GENERAL), rows(9), rows(5, seed=1)
    assert pair == NNGPAndNTK(GENERAL)
    assert pair.parts == ("nngp", "ntk")
    assert pickle.loads(pickle.dumps(pair)) == pair
    assert registry.from_config(registry.to_config(pair)) == pair
    for ours, single in zip(pair(x, y), (NNGP(GENERAL)(x, y), NTK(GENERAL)(x, y)), strict=True):
        np.testing.assert_array_equal(ours, single)
    for ours, single in zip(pair.diagonal(x), (NNGP(GENERAL).diagonal(x), NTK(GENERAL).diagonal(x)), strict=True):
        np.testing.assert_array_equal(ours, single)


@pytest.mark.parametrize("network", [fully_connected(2), fully_connected(1, "erf")], ids=["relu", "erf"])
def test_workspace_of_the_pair(network):
    pair, x = both(network), rows(600, width=30)
    planned = pair.workspace_bytes(600, 600, 8, (30,))
    peak = peak_bytes(lambda: pair(x), planned)
    assert peak <= planned + 2**14
    assert planned <= 4 * peak


@pytest.mark.parametrize("order", [0, 1, 2, 3, 6])
def test_arc_cosine_is_the_nngp_of_a_rectified_monomial(order):
    x, y = (0.5 * np.random.default_rng(seed).standard_normal((5, 3)) for seed in (0, 1))
    network = Network((Dense(), Activation(activations.get("rectified_monomial", q=order))))
    np.testing.assert_allclose(ArcCosine(order)(x, y), NNGP(network)(x, y), rtol=1e-11, atol=1e-14)
    monomial = activations.get("rectified_monomial", q=order)
    a, b = np.linalg.norm(x[0]), np.linalg.norm(y[0])
    moment = gaussian_expectation(monomial, monomial, a, b, x[0] @ y[0] / (a * b)) / monomial.second_moment()
    assert ArcCosine(order)(x, y)[0, 0] == pytest.approx(moment, rel=1e-9)


def test_rows_without_features_are_refused():
    for kernel in (NTK(fully_connected(1)), RBF(1.0), ArcCosine(1)):
        with pytest.raises(InputError, match="without features"):
            kernel(np.ones((3, 0)))
