"""Finding activations: names, parameters, errors."""

import math

import numpy as np
import pytest

from ntkdask import activations, registry
from ntkdask.activations import ActivationFunction, ReLU
from ntkdask.activations.expansion import by_blocks
from ntkdask.errors import InputError, JobError
from ntkdask.networks import Activation, Network, fully_connected


def test_get():
    relu = activations.get("relu")
    assert relu == ReLU()
    assert activations.get(relu) is relu
    assert activations.get("abrelu", A=0.5, B=1.5).slopes == (0.5, 1.5)
    assert activations.get("leaky_relu").slopes == (-0.01, 1)
    assert activations.get("identity").slopes == (-1, 1)
    assert activations.get("abs").slopes == (1, 1)
    assert activations.get("gelu").slopes is None


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rellu", {}, "unknown activation 'rellu'; did you mean 'relu'"),
        (3, {}, "unknown activation 3"),
        ("", {}, "unknown activation ''"),
        ("relu", {"slope": 0.1}, "'relu' does not take 'slope'; it takes no parameters"),
        ("abrelu", {"a": 0.1}, "'abrelu' does not take 'a'; it takes A, B"),
        ("abrelu", {"A": math.inf}, "A is inf, expected a finite number"),
        ("sin", {"A": "1"}, "A is '1', expected a finite number"),
        ("exp", {"A": True}, "A is True"),
        ("exp", {"A": None}, "A is None"),
        ("leaky_relu", {"slope": math.nan}, "slope is nan"),
        ("gaussian", {"A": 0}, "A is 0, expected a positive number"),
        ("normalized_gaussian", {"scale": -1.0}, "scale is -1.0, expected a positive number"),
        ("hermite", {"q": -1}, "q is -1, expected an integer from 0 to 150"),
        ("monomial", {"q": 2.5}, "q is 2.5, expected an integer"),
        ("monomial", {"q": math.nan}, "q is nan, expected an integer"),
        ("monomial", {"q": "2"}, "q is '2', expected an integer"),
        ("rectified_monomial", {"q": 151}, "q is 151, expected an integer from 0 to 150"),
        ("polynomial", {}, "'polynomial' needs coefficients"),
        ("polynomial", {"coefficients": 3}, "coefficients is 3, expected numbers"),
        ("polynomial", {"coefficients": "12"}, "coefficients is '12', expected numbers"),
        ("polynomial", {"coefficients": ()}, "coefficients has 0 values"),
        ("polynomial", {"coefficients": (1, math.inf)}, "expected 1 to 151 finite numbers"),
        ("polynomial", {"coefficients": (1, None)}, "expected numbers"),
        ("polynomial", {"coefficients": [1.0] * 152}, "coefficients has 152 values"),
        (ReLU(), {"A": 1}, "is an object already; it does not take A"),
    ],
)
def test_bad_names_and_parameters(name, parameters, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        activations.get(name, **parameters)


def test_parameters_are_kept_as_plain_numbers():
    """So that equal activations have equal fingerprints."""
    given = activations.get("sin", A=np.float32(2), B=1)
    assert given == activations.get("sin", A=2.0, B=1.0)
    assert registry.digest(given) == registry.digest(activations.get("sin", A=2, B=1))
    assert registry.to_config(activations.get("monomial", q=np.int64(3))) == {"type": "Monomial", "q": 3}
    assert activations.get("monomial", q=3.0) == activations.get("monomial", q=3)
    polynomial = activations.get("polynomial", coefficients=np.array([1, 2]))
    assert polynomial.coefficients == (1.0, 2.0)


def test_job_files_name_what_is_wrong():
    with pytest.raises(JobError, match="unknown key 'C' for ABReLU"):
        registry.from_config({"type": "ABReLU", "C": 1}, "activation")
    with pytest.raises(InputError, match="A is -1, expected a positive number"):
        registry.from_config({"type": "Activation", "function": {"type": "Gaussian", "A": -1}}, "layer")


def test_no_function_is_known_for_the_normalized_gaussian():
    with pytest.raises(InputError, match=r"asked for σ\(t\), but only its dual activation is known"):
        activations.get("normalized_gaussian")(np.zeros(3))


def test_second_moments_that_cannot_be_divided_by():
    with pytest.raises(InputError, match=r"Polynomial\(coefficients=\(0.0,\)\) is 0.0, so it cannot be normalised"):
        Activation(activations.get("polynomial", coefficients=[0]))
    with pytest.raises(InputError, match=r"is inf, so it cannot be normalised\. Use normalize=False"):
        Activation(activations.get("exp", A=20))
    assert Activation(activations.get("exp", A=20), normalize=False).gain == 1
    with pytest.raises(InputError, match="normalize is 'yes', expected true or false"):
        Activation("relu", normalize="yes")


def test_every_degree_has_a_finite_second_moment():
    for name in ("rectified_monomial", "hermite", "monomial"):
        assert math.isfinite(activations.get(name, q=150).second_moment())


@pytest.mark.parametrize("name", ["erf", "gelu", "tanh", "hermite", "normalized_gaussian"])
def test_networks_take_every_activation(name):
    network = fully_connected(2, name)
    assert isinstance(network, Network)
    assert network.layers[1].gain * activations.get(name).second_moment() == pytest.approx(1)
    assert registry.from_config(registry.to_config(network), "network") == network


def test_unfinished_activations_say_so():
    with pytest.raises(NotImplementedError):
        ActivationFunction()(np.zeros(1))
    with pytest.raises(NotImplementedError):
        ActivationFunction().dual(1.0, 1.0, 0.5)
    with pytest.raises(NotImplementedError):
        ActivationFunction().dual_derivative(1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    "shapes", [((5, 1), (3,), (5, 3)), ((), (), ()), ((7,), (7,), (7,)), ((), (4,), (6, 4)), ((2, 1, 1), (3, 1), (4,))]
)
def test_blocks_cover_every_entry(shapes):
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape) for shape in shapes)
    for entries in (1, 4, 1000):
        np.testing.assert_array_equal(by_blocks(lambda a, b, c: a + b * c, a, b, c, entries), a + b * c)
