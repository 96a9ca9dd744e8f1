"""Job files of networks of images: presets, nested layers, and mistakes in them."""

import json

import pytest

from ntkdask import activations, networks, registry
from ntkdask.errors import UserError
from ntkdask.jobs.spec import build_job, load_job
from ntkdask.kernels import NTK
from ntkdask.networks import Activation, AvgPool, Conv, Dense, GlobalAvgPool, LayerNorm, Network, Residual
from ntkdask.report.job_words import describe_job


def image_job(network, **sections):
    """A kernel job on a network of images."""
    return build_job(
        {"name": "images", "data": {"url": "d.zarr"}, "network": network, "kernel": {"type": "NTK"}, **sections}
    )


@pytest.mark.parametrize(
    ("table", "network"),
    [
        ({"preset": "convolutional", "depth": 3}, networks.convolutional(3)),
        (
            {
                "preset": "convolutional",
                "depth": 1,
                "filter_size": [3, 5],
                "padding": "circular",
                "readout": "flatten",
                "activation": {"name": "leaky_relu", "slope": 0.1},
                "weight_variance": 2.0,
                "bias_variance": 0.1,
                "normalize": False,
                "scale_inputs": True,
                "readout_weight_variance": 3.0,
                "trainable_ends": False,
            },
            networks.convolutional(
                1, (3, 5), "circular", "flatten", activations.LeakyReLU(0.1), 2.0, 0.1, False, True, 3.0, False
            ),
        ),
        ({"preset": "myrtle", "depth": 5}, networks.myrtle(5)),
        (
            {"preset": "myrtle", "depth": 10, "readout_weight_variance": 2.0},
            networks.myrtle(10, readout_weight_variance=2.0),
        ),
    ],
)
def test_presets_of_images(table, network):
    job = image_job(table)
    assert job.kernel == NTK(network)
    resolved = job.to_config()
    again = build_job({k: resolved[k] for k in ("name", "data", "kernel")} | {"network": untyped(resolved["network"])})
    assert again.kernel == job.kernel


def untyped(network):
    """A resolved network as [network] takes it: its type is known."""
    return {key: value for key, value in network.items() if key != "type"}


RESIDUAL = """
name = "residual"
data = { url = "d.zarr" }
kernel = { type = "NTK" }
[[network.layers]]
type = "Conv"
[[network.layers]]
type = "Residual"
branch = [{ type = "Activation" }, { type = "Conv", filter_size = [3, 3], stride = 2 }, { type = "LayerNorm" },
          { type = "Activation", function = "erf" }, { type = "Conv", weight_variance = 2.0 }]
shortcut = [{ type = "Conv", filter_size = 1, stride = 2 }]
[[network.layers]]
type = "Residual"
[[network.layers.branch]]
type = "Activation"
[[network.layers.branch]]
type = "Conv"
[[network.layers]]
type = "AvgPool"
size = [2, 1]
[[network.layers]]
type = "GlobalAvgPool"
[[network.layers]]
type = "Dense"
trainable = false
"""


def test_layers_of_images_nest(tmp_path):
    """Tables in lists and lists of tables; residual paths within."""
    (tmp_path / "job.toml").write_text(RESIDUAL)
    job = load_job(tmp_path / "job.toml")
    first = Residual(
        (Activation(), Conv((3, 3), stride=2), LayerNorm(), Activation("erf"), Conv(weight_variance=2.0)),
        (Conv(1, stride=2),),
    )
    second = Residual((Activation(), Conv()))
    expected = (Conv(), first, second, AvgPool((2, 1)), GlobalAvgPool(), Dense(trainable=False))
    assert job.kernel.network == Network(expected)
    assert registry.from_config(json.loads(json.dumps(registry.to_config(job.kernel)))) == job.kernel
    words = dict(describe_job(job.to_config()))["kernel"]
    assert "(relu → Conv 3 × 3 → LayerNorm → erf → Conv 3 × 3 (weight variance 2) + Conv 1 × 1)" in words
    assert "+ identity) → AvgPool 2 × 1 → GlobalAvgPool → Dense (not trained)" in words


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"preset": "myrtle", "depth": 6}, "myrtle: depth is 6, expected 5, 7 or 10"),
        ({"preset": "myrtl", "depth": 5}, "unknown network preset 'myrtl'; did you mean 'myrtle'"),
        ({"preset": "convolutional", "depth": 2, "filter": 3}, "unknown key 'filter' for preset convolutional"),
        ({"preset": "convolutional", "depth": 2, "readout": "mean"}, "readout is 'mean', expected 'gap' or 'flatten'"),
        (
            {"preset": "convolutional", "depth": 2, "padding": "zero"},
            "padding is 'zero', expected one of 'same', 'valid'",
        ),
        ({"preset": "convolutional", "depth": 2, "filter_size": "3"}, "filter_size is '3', expected an integer >= 1"),
        ({"preset": "convolutional"}, "network preset convolutional: .*depth"),
        (
            {"preset": "fully_connected", "depth": 1, "padding": "same"},
            "unknown key 'padding' for preset fully_connected",
        ),
        (
            {"layers": [{"type": "Conv", "filtersize": 3}]},
            "unknown key 'filtersize' for Conv; did you mean 'filter_size'",
        ),
        ({"layers": [{"type": "Convolution"}]}, "unknown type 'Convolution'"),
        ({"layers": [{"type": "Conv"}, {"type": "Dense"}]}, "layer 1 has a Dense where pixels are still apart"),
        ({"layers": [{"type": "Conv"}]}, "pixels are still apart. End with GlobalAvgPool"),
        ({"layers": [{"type": "Residual", "branch": []}]}, "the branch has no layers"),
        (
            {"layers": [{"type": "Residual", "branches": []}]},
            "unknown key 'branches' for Residual; did you mean 'branch'",
        ),
    ],
)
def test_mistakes_in_networks_of_images(network, words):
    with pytest.raises(UserError, match=words) as found:
        image_job(network)
    assert found.value.exit_code == 2


def test_flips_in_words():
    job = image_job({"preset": "myrtle", "depth": 5}, kernel={"type": "FlipAveraged", "kernel": {"type": "NNGP"}})
    words = dict(describe_job(job.to_config()))["kernel"]
    assert words.startswith("NNGP of Conv 3 × 3 → relu → Conv 3 × 3 → relu → AvgPool 2 × 2")
    assert words.endswith("→ GlobalAvgPool → Dense, averaged over flips")
    other = describe_job({"kernel": {"type": "Scaled", "kernel": {"type": "RBF", "gamma": 0.1}}})
    assert dict(other)["kernel"] == "Scaled of RBF with γ 0.1"
