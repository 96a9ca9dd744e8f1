"""Every dual activation: against quadrature, against 60 digits, on edges, in both dtypes."""

import math

import cloudpickle
import mpmath
import numpy as np
import pytest
from activation_examples import ALL, ALL_IDS, EXAMPLES, IDS, NOT_WEAKLY_DIFFERENTIABLE, TWINS, polar_expectation

from ntkdask import activations, registry
from ntkdask.activations import Logistic, derivative_from_dual
from ntkdask.errors import DtypeError

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
every_function = pytest.mark.parametrize(("name", "parameters", "function", "derivative"), EXAMPLES, ids=IDS)
every_activation = pytest.mark.parametrize(("name", "parameters"), ALL, ids=ALL_IDS)


def sizes(dual, a, b):
    """√(k(a, a, 1)·k(b, b, 1))."""
    return np.sqrt(dual(a, a, np.ones_like(a)) * dual(b, b, np.ones_like(b)))


def sample(seed, count=4, low=0.05, high=4.0):
    """Random (a, b, c) with the ends: c = ±1, 0 and almost ±1."""
    rng = np.random.default_rng(seed)
    a, b = np.exp(rng.uniform(math.log(low), math.log(high), (2, count + 5)))
    c = np.concatenate([rng.uniform(-1, 1, count), [1.0, -1.0, 0.0, 1 - 1e-7, -1 + 1e-5]])
    a[count], b[count] = high, high
    return a, b, c


def test_every_activation_has_an_example():
    classes = [registry.lookup(name) for name in registry.names("activation")]
    assert {cls.name for cls in classes} == {name for name, _ in ALL}


def test_every_name_of_the_design_is_there():
    names = """relu rectified_monomial step sign abrelu leaky_relu abs erf exp hermite sin cos gaussian gelu elu
    normalized_gaussian rbf gabor monomial polynomial tanh sigmoid silu softplus identity"""
    assert set(names.split()) == {name for name, _ in ALL}


@every_function
def test_duals_are_gaussian_expectations(name, parameters, function, derivative):
    sigma = activations.get(name, **parameters)
    a, b, c = sample(seed=len(name) + len(parameters))
    for dual, f in ((sigma.dual, function), (sigma.dual_derivative, derivative)):
        expected = [polar_expectation(f, f, *abc) for abc in zip(a, b, c, strict=True)]
        error = np.abs(dual(a, b, c) - expected)
        assert (error <= TOLERANCE["float64"] * sizes(dual, a, b)).all(), error / sizes(dual, a, b)


@every_function
def test_sigma_is_the_function(name, parameters, function, derivative):
    t = np.array([-3.0, -0.5, 0.25, 2.0])
    sigma = activations.get(name, **parameters)
    np.testing.assert_allclose(sigma(t), function(t), rtol=1e-13, atol=1e-15)
    if isinstance(sigma, Logistic):
        np.testing.assert_allclose(sigma.derivative(t), derivative(t), rtol=1e-13)


EXTREMES = [
    # a, b, c
    *(
        (1e-7, 1e-7, 0.3),
        (1e-7, 2.0, -0.6),
        (3e-4, 3e-4, 0.999),
        (0.04, 0.03, -0.9),
        (3.0, 3.5, 1 - 1e-9),
        (7.0, 0.2, -0.7),
    ),
    *((2e-3, 40.0, 0.4), (35.0, 35.0, 0.9), (35.0, 34.0, 1 - 1e-9), (250.0, 100.0, -1 + 1e-6), (3e3, 2e3, 0.7)),
]


@pytest.mark.parametrize("name", TWINS)
def test_closed_forms_hold_their_digits(name):
    """From 1e-7 to 3e3, where formulas that cancel or overflow would fail; expected values in 60 digits.

    MATH.md's form of ELU needs e^{a²/2}: 60 digits do not hold it beyond a = 7, where the next test takes over.
    """
    a, b, c = np.array([abc for abc in EXTREMES if name != "elu" or max(abc) <= 7]).T
    sigma = activations.get(name)
    for which, dual in enumerate((sigma.dual, sigma.dual_derivative)):
        exact = [TWINS[name](*map(mpmath.mpf, abc))[which] for abc in zip(a, b, c, strict=True)]
        error = np.abs(np.array([float(mpmath.mpf(v) - e) for v, e in zip(dual(a, b, c), exact, strict=True)]))
        assert (error <= TOLERANCE["float64"] * sizes(dual, a, b)).all(), error / sizes(dual, a, b)


@pytest.mark.parametrize("name", ["elu", "sigmoid", "tanh", "silu", "softplus"])
def test_large_standard_deviations(name):
    """Beyond the reach of the Hermite expansion, up to 90."""
    function, derivative = next((f, slope) for n, _, f, slope in EXAMPLES if n == name)
    sigma = activations.get(name)
    a, b, c = np.array([6.0, 90.0, 35.0]), np.array([0.5, 60.0, 34.0]), np.array([-0.4, -1 + 1e-6, 1 - 1e-9])
    for dual, f in ((sigma.dual, function), (sigma.dual_derivative, derivative)):
        expected = [
            polar_expectation(f, f, *abc, angles=200, panels=40, reach=12.0) for abc in zip(a, b, c, strict=True)
        ]
        error = np.abs(dual(a, b, c) - expected)
        assert (error <= TOLERANCE["float64"] * sizes(dual, a, b)).all(), error / sizes(dual, a, b)


def test_mpmath_quadrature_agrees():
    """An expectation by mpmath's own adaptive quadrature, conditioned on u: E[σ(u)·E[σ(v) | u]]."""
    a, b, c = 0.8, 0.9, 0.6
    panels, rule = [-8, -5, -2.5, 0, 2.5, 5, 8], {"maxdegree": 3, "method": "gauss-legendre"}

    def inner(x):
        return mpmath.quad(lambda y: mpmath.tanh(b * (c * x + 0.8 * y)) * mpmath.npdf(y), panels, **rule)

    with mpmath.workdps(15):
        exact = mpmath.quad(lambda x: mpmath.tanh(a * x) * inner(x) * mpmath.npdf(x), panels, **rule)
    assert float(activations.get("tanh").dual(a, b, c)) == pytest.approx(float(exact), rel=1e-10)


@every_activation
def test_theorem_3(name, parameters):
    """k_σ' = (1/ab)·∂k_σ/∂c, Han et al. 2022, for every weakly differentiable σ; k_σ' = 0 for step and sign."""
    sigma = activations.get(name, **parameters)
    c = np.linspace(-0.95, 0.95, 15)
    a, b = np.full(15, 0.7), np.full(15, 1.3)
    if name in NOT_WEAKLY_DIFFERENTIABLE or parameters == {"q": 0}:
        assert (sigma.dual_derivative(a, b, c) == 0).all()
        return
    error = np.abs(derivative_from_dual(sigma.dual, a, b, c) - sigma.dual_derivative(a, b, c))
    assert (error <= 1e-9 * np.maximum(sizes(sigma.dual_derivative, a, b), sizes(sigma.dual, a, b))).all(), error.max()
    ends = np.array([-1.0, -1 + 1e-9, -0.9999, 0.9999, 1 - 1e-9, 1.0])
    a, b = a[:6], b[:6]
    error = np.abs(derivative_from_dual(sigma.dual, a, b, ends) - sigma.dual_derivative(a, b, ends))
    assert (error <= 2e-7 * np.maximum(sizes(sigma.dual_derivative, a, b), sizes(sigma.dual, a, b))).all(), error


@every_activation
@both_dtypes
def test_nothing_is_nan(name, parameters, dtype):
    """On a grid with c = ±1, just past it, zero, tiny and large standard deviations, wherever k is finite."""
    sigma = activations.get(name, **parameters)
    a = np.array([0, 1e-30, 1e-8, 1e-3, 0.5, 1, 3, 12], dtype)
    c = np.array([-1.0001, -1, -1 + 1e-7, -0.5, 0, 1e-20, 0.5, 1 - 1e-7, 1, 1.0001], dtype)
    for dual in (sigma.dual, sigma.dual_derivative):
        value = dual(a[:, None, None], a[:, None], c)
        assert value.dtype == dtype
        one = np.ones(a.size)
        diagonal = dual(a.astype(float), a.astype(float), one)
        finite = np.isfinite(diagonal) & (diagonal <= np.finfo(dtype).max)
        value, diagonal = value[np.ix_(finite, finite)], diagonal[finite]
        assert np.isfinite(value).all()
        # Cauchy–Schwarz, where nothing underflows
        normal = (diagonal > 1e-30) | (a[finite] == 0)
        bound = np.sqrt(np.outer(diagonal, diagonal))[:, :, None]
        within = np.abs(value) <= bound * (1 + 20 * np.finfo(dtype).eps)
        assert within[np.ix_(normal, normal)].all()


LARGE = np.array([1e2, 1e4, 1e6])


@pytest.mark.parametrize(
    ("name", "limit", "scale"),
    [
        ("erf", "sign", 0),
        ("tanh", "sign", 0),
        ("sigmoid", "step", 0),
        ("gelu", "relu", 1),
        ("elu", "relu", 1),
        ("silu", "relu", 1),
        ("softplus", "relu", 1),
    ],
)
def test_large_inputs_see_the_limit(name, limit, scale):
    """σ(at)/a^scale → its piecewise limit; k follows with an error O(1/a), and k' where the limit has one."""
    sigma, other = activations.get(name), activations.get(limit)
    c = np.linspace(-0.9, 0.9, 7)
    for a in LARGE:
        error = np.abs(sigma.dual(a, 2 * a, c) / (2 * a * a) ** scale - other.dual(1.0, 1.0, c))
        assert error.max() <= 3 / a
        if scale:
            assert np.abs(sigma.dual_derivative(a, 2 * a, c) - other.dual_derivative(1.0, 1.0, c)).max() <= 3 / a


@every_activation
def test_symmetric_to_the_last_bit(name, parameters):
    sigma = activations.get(name, **parameters)
    rng = np.random.default_rng(5)
    a = rng.uniform(0, 1.9, 20)
    c = rng.uniform(-1, 1, (20, 20))
    c = (c + c.T) / 2
    for dual in (sigma.dual, sigma.dual_derivative):
        k = dual(a[:, None], a, c)
        np.testing.assert_array_equal(k, k.T)
    k = sigma.dual(4 * a[:, None], 4 * a, c)
    np.testing.assert_array_equal(k, k.T)


@every_activation
@both_dtypes
def test_shapes_broadcast_and_dtypes_stay(name, parameters, dtype):
    sigma = activations.get(name, **parameters)
    rng = np.random.default_rng(6)
    a, b = rng.uniform(0.2, 2, (5, 1)).astype(dtype), rng.uniform(0.2, 2, 4).astype(dtype)
    c = rng.uniform(-0.9, 0.9, (5, 4)).astype(dtype)
    for dual in (sigma.dual, sigma.dual_derivative):
        value = dual(a, b, c)
        assert value.shape == (5, 4)
        assert value.dtype == dtype
        full = dual(np.broadcast_to(a, c.shape), np.broadcast_to(b, c.shape), c)
        exact = dual(a.astype(float), b.astype(float), c.astype(float))
        size = sizes(dual, a.astype(float), b.astype(float))
        tolerance = TOLERANCE[dtype] if dtype == "float32" else 1e-12
        for other in (value, full):
            assert (np.abs(other - exact) <= tolerance * size).all()
        one = dual(a[2, 0], b[1], c[2, 1])
        assert one.shape == ()
        assert one == pytest.approx(exact[2, 1], abs=tolerance * size[2, 1])
        assert dual(a[0, 0], b[0], c).shape == (5, 4)
        assert dual(a, b, np.asarray(0.5, dtype)).shape == (5, 4)
        assert dual(a[:0], b, c[:0]).shape == (0, 4)


def test_numbers_are_float64_and_other_dtypes_are_refused():
    sigma = activations.get("erf")
    assert sigma.dual(1, 2, 0.5).dtype == np.float64
    assert sigma.dual(1.0, np.ones(3, "float32"), 0.5).dtype == np.float32
    for bad in (np.ones(2, "float16"), np.ones(2, int)):
        with pytest.raises(DtypeError, match="float32 or float64"):
            sigma.dual(bad, 1.0, 0.5)


@every_activation
@both_dtypes
def test_sigma_keeps_shape_and_dtype(name, parameters, dtype):
    if name == "normalized_gaussian":
        pytest.skip("no σ is known")
    t = np.linspace(-2, 2, 12, dtype=dtype).reshape(3, 4)
    value = activations.get(name, **parameters)(t)
    assert value.shape == t.shape
    assert value.dtype == dtype
    assert np.isfinite(value).all()


@every_function
def test_second_moment(name, parameters, function, derivative):
    moment = activations.get(name, **parameters).second_moment()
    assert moment == pytest.approx(polar_expectation(function, function, 1, 1, 1), rel=1e-11)


@pytest.mark.parametrize(
    ("name", "parameters", "moment"),
    [
        ("step", {}, 1 / 2),
        ("relu", {}, 1 / 2),
        ("rectified_monomial", {"q": 3}, 15 / 2),
        ("hermite", {"q": 5}, 120),
        ("monomial", {"q": 4}, 105),
        ("exp", {"A": 1.5}, math.exp(4.5)),
    ],
)
def test_second_moments_of_math_md(name, parameters, moment):
    assert activations.get(name, **parameters).second_moment() == pytest.approx(moment, rel=1e-14)


@pytest.mark.parametrize("name", ["rbf", "normalized_gaussian", "sign", "identity"])
def test_normalisation_is_a_no_op(name):
    assert activations.get(name).second_moment() == 1.0


@every_activation
def test_configurations_and_pickles_come_back(name, parameters):
    sigma = activations.get(name, **parameters)
    assert registry.from_config(registry.to_config(sigma), "activation") == sigma
    assert cloudpickle.loads(cloudpickle.dumps(sigma)) == sigma
    assert hash(activations.get(name, **parameters)) == hash(sigma)


@every_activation
def test_slopes_and_homogeneity_mean_what_they_say(name, parameters):
    sigma = activations.get(name, **parameters)
    if sigma.slopes:
        low, high = sigma.slopes
        t = np.linspace(-2, 2, 9)
        np.testing.assert_allclose(sigma(t), -low * np.minimum(t, 0) + high * np.maximum(t, 0), rtol=1e-15)
        assert sigma.homogeneous
    if sigma.homogeneous:
        c = np.linspace(-1, 1, 9)
        np.testing.assert_allclose(sigma.dual(0.3, 5.0, c), 1.5 * sigma.dual(1.0, 1.0, c), atol=1e-14)
        np.testing.assert_allclose(sigma.dual_derivative(0.3, 5.0, c), sigma.dual_derivative(1.0, 1.0, c), atol=1e-14)
