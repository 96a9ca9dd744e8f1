"""The registry: round trips, unknown keys, digests, differences."""

import dataclasses
import json

import numpy as np
import pytest

from ntkdask import registry
from ntkdask.errors import InputError, JobError
from ntkdask.kernels import NTK
from ntkdask.networks import Activation, Dense, Network, fully_connected


def test_defaults_are_spelled_out_and_types_named():
    assert registry.to_config(Dense(2)) == {
        "type": "Dense",
        "weight_variance": 2,
        "bias_variance": 0.0,
        "trainable": True,
    }
    assert registry.to_config(Activation()) == {"type": "Activation", "function": {"type": "ReLU"}, "normalize": True}


def test_scalars_lists_and_tables():
    given = {"a": (1, 2.5), 3: None, "b": [True, "x"], "c": np.float32(0.5), "d": np.array(7)}
    config = registry.to_config(given)
    assert config == {"a": [1, 2.5], "3": None, "b": [True, "x"], "c": 0.5, "d": 7}
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize("value", [np.zeros(3), object(), {1, 2}, lambda: 0])
def test_what_cannot_be_described_is_refused(value):
    with pytest.raises(TypeError, match="cannot describe"):
        registry.to_config({"key": value})


def test_a_name_stands_for_one_class():
    """Descriptions know classes by their name: a second one would take the place of the first without a word."""
    with pytest.raises(InputError, match=r"a layer of ntkdask.networks.layers is called 'Dense'.*another name"):

        @registry.register("kernel")
        @dataclasses.dataclass(frozen=True)
        class Dense:
            pass

    assert registry.lookup("Dense").__module__ == "ntkdask.networks.layers"


def test_unregistered_dataclasses_have_no_type():
    @dataclasses.dataclass
    class Dense:  # same name as a registered class, but another one
        width: int

    assert registry.to_config(Dense(3)) == {"width": 3}


def test_nested_round_trip():
    network = fully_connected(2, bias_variance=0.1, scale_inputs=True)
    kernel = registry.from_config(json.loads(json.dumps(registry.to_config(NTK(network)))), "kernel")
    assert kernel == NTK(network)
    assert isinstance(kernel.network, Network)
    assert isinstance(kernel.network.layers, tuple)


def test_given_arguments_come_from_elsewhere():
    network = fully_connected(1)
    assert registry.from_config({"type": "NTK"}, "kernel", network=network) == NTK(network)


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        ({"type": "Dens"}, "layer", "unknown layer 'Dens'; did you mean 'Dense'"),
        ({"type": "NTK"}, "layer", "unknown layer 'NTK'; there are: Activation, AvgPool, Conv, Dense, Flatten"),
        ({"type": "Qwxyz"}, None, "unknown type 'Qwxyz'; there are: .*NTK"),
        (
            {"type": "Dense", "weight_varianc": 1},
            "layer",
            "unknown key 'weight_varianc' for Dense; did you mean 'weight_v",
        ),
        ({"weight_variance": 1}, "layer", "a table with a `type` key for a layer"),
        ([1], None, "a table with a `type` key for a object"),
        ({"type": "NTK"}, "kernel", "cannot build NTK: .*network"),
        ({"type": "Network", "layers": [{"type": "Dense", "bias": 1}]}, None, "unknown key 'bias' for Dense"),
    ],
)
def test_bad_tables_are_job_errors(table, kind, message):
    with pytest.raises(JobError, match=message):
        registry.from_config(table, kind)


def test_values_that_a_class_refuses_are_its_own_errors():
    with pytest.raises(InputError, match="weight_variance is -1"):
        registry.from_config({"type": "Dense", "weight_variance": -1})


def test_lookup_and_names():
    assert registry.lookup("Dense") is Dense
    assert registry.lookup("Dense", "layer") is Dense
    assert registry.names("layer") == sorted(registry.names("layer"))
    assert {"Activation", "Dense"} <= set(registry.names("layer"))
    assert "NTK" in registry.names()
    assert "NTK" not in registry.names("layer")


def test_digest_follows_content_not_order():
    a = registry.digest({"x": 1, "y": Dense()})
    assert a == registry.digest({"y": Dense(), "x": 1})
    assert len(a) == 16
    assert int(a, 16) >= 0
    assert a != registry.digest({"x": 1, "y": Dense(trainable=False)})


def test_differences_name_every_leaf():
    stored = {"seed": 1, "map": {"n": 8, "type": "A"}, "only": 2}
    asked = {"seed": 2, "map": {"n": 9, "type": "A"}}
    assert registry.differences(stored, asked) == [
        "map.n: stored 8, asked 9",
        "only: stored 2, asked None",
        "seed: stored 1, asked 2",
    ]
    assert registry.differences(stored, stored) == []
