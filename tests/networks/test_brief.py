"""Texts of networks: short, and the call that makes the same network."""

import pytest

import ntkdask as nd
from ntkdask.activations import ReLU
from ntkdask.kernels import NTK
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

NAMES = {
    c.__name__: c
    for c in (Activation, AvgPool, Conv, Dense, Flatten, GlobalAvgPool, LayerNorm, Network, Residual, ReLU)
}
BLOCK = (Conv(), Activation(), Conv(5, stride=2))


@pytest.mark.parametrize(
    "network",
    [
        fully_connected(0),
        fully_connected(3, bias_variance=0.1),
        fully_connected(200, scale_inputs=True),
        convolutional(4, layout="nhwc"),
        myrtle(10),
        Network((Conv(), *(Residual(BLOCK, (Conv(1, stride=2),)),) * 9, GlobalAvgPool(), Dense())),
    ],
)
def test_a_network_is_written_as_the_call_that_makes_it(network):
    assert eval(repr(network), NAMES) == network
    assert len(repr(network)) < 24 * 80


def test_texts():
    assert repr(Dense()) == "Dense()"
    assert repr(Conv(5, bias_variance=0.1)) == "Conv(filter_size=5, bias_variance=0.1)"
    repeated = "*(Dense(), Activation(function=ReLU())) * 3"
    assert repr(fully_connected(3)) == f"Network(layers=({repeated}, Dense()))"
    assert repr(NTK(fully_connected(3))) == f"NTK(network={fully_connected(3)!r})"


def test_networks_in_which_nothing_repeats_are_cut():
    layers = [layer for i in range(60) for layer in (Dense(1.0 + i), Activation())]
    text = repr(Network((*layers, Dense())))
    assert len(text) < 24 * 80
    assert "weight_variance=2.0" in text
    assert "... 109 more ..." in text


def test_estimators_fit_a_screen():
    deep = fully_connected(100)
    for thing in (nd.RidgeClassifier(nd.features.NTKRandomFeatures(deep, 64)), nd.KernelRidgeRegressor(NTK(deep))):
        assert len(repr(thing).splitlines()) < 24
        assert "* 100" in repr(thing)
