"""Networks: what they refuse and what the presets build."""

import math
import pickle

import numpy as np
import pytest

from ntkdask import registry
from ntkdask.activations import ReLU
from ntkdask.errors import InputError
from ntkdask.networks import Activation, Dense, Network, fully_connected


def test_fully_connected():
    assert fully_connected(0).layers == (Dense(),)
    network = fully_connected(2, weight_variance=2.0, bias_variance=0.1, normalize=False, scale_inputs=True)
    hidden = (Dense(2.0, 0.1), Activation("relu", normalize=False))
    assert network.layers == (*hidden, *hidden, Dense(2.0, 0.1))
    assert network.scale_inputs
    assert network.depth == 2
    assert fully_connected(1, readout_weight_variance=3.0, weight_variance=2.0).layers[-1] == Dense(3.0)
    assert fully_connected(1, ReLU()) == fully_connected(1, "relu")


@pytest.mark.parametrize("depth", [-1, 1.5, "2", None])
def test_bad_depths_are_refused(depth):
    with pytest.raises(InputError, match="depth is"):
        fully_connected(depth)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_weight_variance_is_positive(value):
    with pytest.raises(InputError, match="Dense: weight_variance is"):
        Dense(weight_variance=value)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_bias_variance_is_not_negative(value):
    with pytest.raises(InputError, match="Dense: bias_variance is"):
        Dense(bias_variance=value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "no layers"),
        ((Activation("relu"), Dense()), r"layer 0 \(relu\) is an Activation without a Dense"),
        ((Dense(), Activation("relu"), Activation("relu"), Dense()), r"layer 2 \(relu\) is an Activation without"),
        ((Dense(), "relu"), "layer 1 is 'relu', expected Dense, Conv, Activation"),
        (Dense(), "expected a sequence of layers"),
    ],
)
def test_networks_whose_limit_is_not_gaussian_are_refused(layers, message):
    with pytest.raises(InputError, match=message):
        Network(layers)


def test_layers_may_be_any_iterable_and_become_a_tuple():
    layers = [Dense(), Activation("relu"), Dense()]
    assert Network(layers) == Network(iter(layers)) == fully_connected(1)
    assert isinstance(Network(layers).layers, tuple)
    assert hash(Network(layers)) == hash(fully_connected(1))
    assert Network((Dense(), Dense(), Activation("relu"))).depth == 1


def test_gain_normalises_the_second_moment():
    assert Activation("relu").gain == 2
    assert Activation("relu", normalize=False).gain == 1
    assert Activation("relu").sigma == ReLU()
    assert isinstance(Activation(ReLU()).function, ReLU)


def test_an_activation_without_a_second_moment_is_not_normalised():
    class Nothing(ReLU):
        name = ""

        def dual(self, a, b, c):
            return 0 * np.asarray(c)

    with pytest.raises(InputError, match="cannot be normalised"):
        Activation(Nothing())
    assert Activation(Nothing(), normalize=False).gain == 1


def test_round_trips():
    network = Network(
        (Dense(2.0, 0.1, trainable=False), Activation("relu", normalize=False), Dense()), scale_inputs=True
    )
    assert registry.from_config(registry.to_config(network), "network") == network
    assert pickle.loads(pickle.dumps(network)) == network
