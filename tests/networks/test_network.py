"""Networks: what they refuse and what the presets build."""

import math
import pickle

import numpy as np
import pytest

from ntkdask import registry
from ntkdask.activations import ReLU
from ntkdask.errors import InputError
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

RELU, GAP = Activation("relu"), GlobalAvgPool()


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
        ((Conv(), RELU, AvgPool(2), RELU, GAP), r"layer 3 \(relu\) is an Activation without a Dense or Conv"),
        ((AvgPool(2), RELU, GAP), r"layer 1 \(relu\) is an Activation without"),
        ((Conv(), RELU, GAP, RELU, Dense()), r"layer 3 \(relu\) is an Activation without"),
        ((Conv(), GAP, RELU), r"layer 2 \(relu\) is an Activation without"),
        ((LayerNorm(), Dense()), "layer 0 is a LayerNorm that does not stand right after a Dense or Conv"),
        ((Dense(), RELU, LayerNorm(), Dense()), "layer 2 is a LayerNorm that does not stand"),
        ((Conv(), AvgPool(2), LayerNorm(), GAP), "layer 2 is a LayerNorm that does not stand"),
        ((Dense(), Residual((RELU, Dense())), LayerNorm()), "layer 2 is a LayerNorm that does not stand"),
        ((Residual((Dense(),)), Dense()), "layer 0 is a Residual whose identity shortcut adds the input itself"),
        ((Dense(), Residual((RELU,)), Dense()), "layer 1 is a Residual of which neither path ends in a Dense or Conv"),
        (
            (Dense(), Residual((RELU, Dense(), RELU), (Dense(), RELU))),
            "layer 1 is a Residual of which neither path ends",
        ),
        ((Dense(), Residual((Dense(), RELU, RELU, Dense()))), r"layer 1.branch.2 \(relu\) is an Activation without"),
        ((Dense(), Residual((Dense(),), (RELU, LayerNorm()))), r"layer 1.shortcut.1 is a LayerNorm"),
        ((Dense(), RELU, Residual((Dense(),)), RELU), r"layer 3 \(relu\) is an Activation without"),
        ((Dense(), Residual((Residual((RELU,)), Dense()))), r"layer 1.branch.0 is a Residual of which neither path"),
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


@pytest.mark.parametrize(
    "layers",
    [
        (Conv(), AvgPool(2), RELU, GAP),
        (Conv(), LayerNorm(), AvgPool(2), RELU, GAP, Dense()),
        (Conv(), Residual((RELU, Conv())), RELU, Flatten()),
        (Conv(), Residual((RELU, Conv())), AvgPool(2), RELU, GAP),
        (Conv(), RELU, Residual((Conv(), RELU, Conv())), Conv(), RELU, GAP),
        (Residual((Conv(),), (Conv(1),)), RELU, GAP),
        (Dense(), Residual((Dense(), RELU), (Dense(),)), Dense()),
        (Dense(), Residual((Dense(), LayerNorm(), RELU, Dense())), RELU, Dense()),
        (AvgPool(2), Conv(), RELU, Flatten(), Dense(), RELU, Dense()),
    ],
    ids=str,
)
def test_networks_whose_limit_is_gaussian_are_taken(layers):
    assert Network(layers).layers == layers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Conv(), RELU, Dense()), "layer 2 has a Dense where pixels are still apart. Put GlobalAvgPool"),
        ((Conv(), Residual((Dense(),)), GAP), "layer 1 has a Dense where pixels are still apart"),
        ((Conv(), RELU), "after its last layer, Activation, pixels are still apart. End with GlobalAvgPool"),
        ((Conv(), GAP, Conv()), r"layer 2 \(Conv\) takes images, but layer 1 \(GlobalAvgPool\) has made them vectors"),
        ((Conv(), GAP, Flatten()), r"layer 2 \(Flatten\) takes images"),
        (
            (Conv(), Residual((Conv(), GAP, Dense())), Dense()),
            "GlobalAvgPool or Flatten within a Residual. Put it after the sum",
        ),
    ],
)
def test_images_become_vectors_once(layers, message):
    with pytest.raises(InputError, match=message):
        Network(layers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(0), "Conv: filter_size is 0, expected an integer >= 1"),
        (lambda: Conv((3, 3, 3)), r"Conv: filter_size is \(3, 3, 3\)"),
        (lambda: Conv(stride=1.5), "Conv: stride is 1.5"),
        (lambda: Conv(padding="reflect"), "Conv: padding is 'reflect', expected one of 'same', 'valid', 'circular'"),
        (lambda: Conv(weight_variance=0), "Conv: weight_variance is 0"),
        (lambda: AvgPool(True), "AvgPool: size is True"),
        (lambda: Residual(()), "Residual: the branch has no layers"),
        (lambda: Residual("relu"), "Residual: branch is 'relu'"),
        (lambda: convolutional(1, readout="max"), "convolutional: readout is 'max', expected 'gap' or 'flatten'"),
        (lambda: convolutional(-1), "convolutional: depth is -1"),
        (lambda: myrtle(6), "myrtle: depth is 6, expected 5, 7 or 10"),
    ],
)
def test_bad_layers_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("conv", "shape", "out", "before"),
    [
        (Conv(3), (5, 4), (5, 4), (1, 1)),
        (Conv(2), (5, 4), (5, 4), (0, 0)),
        (Conv(3, stride=2), (5, 4), (3, 2), (1, 0)),  # t = 2 and 1: as JAX and TensorFlow, not as torch's padding=1
        (Conv((5, 1), stride=(3, 1)), (7, 4), (3, 4), (2, 0)),
        (Conv(1, stride=3), (7, 4), (3, 2), (0, 0)),
        (Conv(3, "valid", 2), (7, 6), (3, 2), (0, 0)),
        (Conv(4, "circular", 2), (7, 6), (4, 3), (1, 1)),
    ],
)
def test_geometry_of_convolutions(conv, shape, out, before):
    assert conv.output_shape(shape) == out
    assert conv.before(shape) == before


def test_image_shapes():
    network = Network(
        (Conv(), RELU, AvgPool((2, 1)), Residual((Conv(3, stride=2),), (Conv(1, stride=2),)), RELU, GAP, Dense())
    )
    assert network.image_shapes((8, 6)) == ((8, 6), (8, 6), (8, 6), (4, 6), (2, 3), (2, 3))
    assert network.takes_images
    assert network.readout_position == 5
    assert not fully_connected(1).takes_images
    assert fully_connected(1).readout_position == -1
    with pytest.raises(InputError, match="layer 2: AvgPool: windows of 2×1 do not divide images of 7×6"):
        network.image_shapes((7, 6))


def test_convolutional():
    assert convolutional(0).layers == (GAP, Dense())
    network = convolutional(2, (3, 1), "circular", "flatten", "erf", 2.0, 0.1, False, True, 3.0, trainable_ends=False)
    first, middle = (Conv((3, 1), "circular", 1, 2.0, 0.1, trainable) for trainable in (False, True))
    erf = Activation("erf", normalize=False)
    assert network.layers == (first, erf, middle, erf, Flatten(), Dense(3.0, 0.1, trainable=False))
    assert network.scale_inputs
    assert network.depth == 2


@pytest.mark.parametrize(("depth", "blocks"), [(5, (2, 1, 1)), (7, (2, 2, 2)), (10, (3, 3, 3))])
def test_myrtle(depth, blocks):
    first, second, third = ((Conv(), RELU) * count for count in blocks)
    network = myrtle(depth)
    assert network.layers == (*first, AvgPool(2), *second, AvgPool(2), *third, GAP, Dense())
    assert network.image_shapes((32, 32))[-1] == (8, 8)
    frozen = myrtle(depth, trainable_ends=False).layers
    assert [layer.trainable for layer in (frozen[0], frozen[2], frozen[-1])] == [False, True, False]


def test_networks_of_images_round_trip():
    residual = Residual((LayerNorm(), RELU, Conv((3, 1), "valid", [2, 1])), (Conv(1), AvgPool([2, 1])))
    network = Network((Conv(), residual, RELU, Flatten(), Dense()))
    assert registry.from_config(registry.to_config(network), "network") == network
    assert pickle.loads(pickle.dumps(network)) == network
    assert hash(network) == hash(Network(network.layers))
