"""ResNet18 and WideResNet: parameters counted by formula, shapes, seeded weights, and a forward pass written with arrays."""

import math

import numpy as np
import pytest

from ntkdask import registry, seeds
from ntkdask.errors import InputError
from ntkdask.modules.descriptions import ResNet18, WideResNet

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def resnet_parameters(w, outputs, channels=3):
    """Convolutions 9·in·out (shortcuts in·out), two numbers a channel for each BatchNorm, the readout."""
    total, inputs = 9 * channels * w + 2 * w, w
    for group in range(4):
        c = w * 2**group
        total += 9 * inputs * c + 9 * c * c + 4 * c + 2 * (9 * c * c + 2 * c)
        total += (inputs * c + 2 * c) if group else 0
        inputs = c
    return total + inputs * outputs + outputs


def wide_parameters(depth, k, outputs, channels=3, groups=3, stem=16):
    total, inputs = 9 * channels * stem, stem
    for group in range(groups):
        c = 16 * k * 2**group
        shortcut = inputs * c if group or inputs != c else 0
        total += 2 * inputs + 9 * inputs * c + 2 * c + 9 * c * c + shortcut
        total += ((depth - 4) // 6 - 1) * (18 * c * c + 4 * c)
        inputs = c
    return total + 2 * inputs + inputs * outputs + outputs


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("width", "outputs", "channels"), [(64, 10, 3), (16, 10, 3), (4, 7, 1)])
def test_parameters_of_resnet18(width, outputs, channels):
    module = ResNet18(width, outputs, channels=channels).build()
    assert count(module) == resnet_parameters(width, outputs, channels)


def test_the_published_counts():
    assert resnet_parameters(64, 10) == 11_173_962
    assert resnet_parameters(16, 10) == 701_466
    assert wide_parameters(16, 4, 10) == 2_748_890


@pytest.mark.parametrize(
    ("depth", "widening", "groups", "stem"),
    [(16, 4, 3, 16), (16, 1, 3, 16), (10, 2, 3, 16), (28, 1, 3, 16), (16, 2, 2, 32), (16, 2, 2, 16)],
)
def test_parameters_of_wide_resnets(depth, widening, groups, stem):
    module = WideResNet(depth, widening, 10, groups=groups, stem_width=stem).build()
    assert count(module) == wide_parameters(depth, widening, 10, 3, groups, stem)


@pytest.mark.parametrize("description", [ResNet18(4, 5), WideResNet(10, 1, 5), WideResNet(16, 1, 5, groups=2)], ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (7, 10)])
def test_shapes_and_modes(description, shape):
    module = description.build()
    assert not any(part.training for part in module.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in module.parameters())
    out = module(torch.ones(3, 3, *shape))
    assert out.shape == (3, 5)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_widths_of_the_paper():
    """Mohamadi and Sutherland, Appendix A: WF = 16 has a stem of 256 channels and groups of 256 and 512."""
    module = WideResNet(16, 16, groups=2, stem_width=256).build()
    assert module.conv1.weight.shape == (256, 3, 3, 3)
    assert [group[0].conv1.weight.shape[0] for group in module.groups] == [256, 512]
    assert module.linear.weight.shape == (10, 512)


@pytest.mark.parametrize("description", [ResNet18(4, 5, 3), WideResNet(10, 1, 5, 3)], ids=str)
def test_weights_come_from_the_seed_and_torchs_random_state_is_left_alone(description):
    before = torch.get_rng_state()
    module, again = description.build(), description.build()
    other = type(description)(**{**vars(description), "seed": 4}).build()
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(module.conv1.weight, other.conv1.weight)
    expected = seeds.normals(3, ("residual", "conv1"), 27, len(module.conv1.weight), "float32", math.sqrt(2 / 27)).T
    np.testing.assert_array_equal(module.conv1.weight.detach().numpy().reshape(-1, 27), expected)


def test_scales_of_the_weights():
    module = ResNet18(16).build()
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            values = layer.weight.detach().numpy()
            deviation = math.sqrt((2 if values.ndim == 4 else 1) / values[0].size)
            assert abs(values.std() / deviation - 1) < 5 / math.sqrt(2 * values.size)
    assert not module.linear.bias.any()
    assert (module.bn1.weight == 1).all()
    assert (module.bn1.running_var == 1).all()
    assert int(module.bn1.num_batches_tracked) == 0


def convolve(x, weight, stride):
    """Plain loops over the filter, padding (q − 1)/2, in float64; x (n, C, H, W)."""
    q = weight.shape[2]
    pad = (q - 1) // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = (-(-side // stride) for side in x.shape[2:])
    out = np.zeros((len(x), len(weight), height, width))
    for a in range(q):
        for b in range(q):
            seen = padded[:, :, a : a + stride * (height - 1) + 1 : stride, b : b + stride * (width - 1) + 1 : stride]
            out += np.einsum("nchw,oc->nohw", seen, weight[:, :, a, b])
    return out


def normalise(x, state, name):
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale = state[f"{name}.weight"] / np.sqrt(variance + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]


def shaken(module):
    """float64, with BatchNorm as after training: nothing of it is the identity."""
    rng = np.random.default_rng(0)
    module = module.double()
    for name, tensor in module.state_dict().items():
        if ("bn" in name or "shortcut.1" in name) and tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tuple(tensor.shape))))
    return module, {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def test_resnet18_against_arrays():
    module, state = shaken(ResNet18(3, 4, seed=1).build())
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 8))
    h = np.maximum(normalise(convolve(x, state["conv1.weight"], 1), state, "bn1"), 0)
    for group in range(1, 5):
        for block in range(2):
            here, stride = f"layer{group}.{block}", 2 if group > 1 and block == 0 else 1
            z = np.maximum(normalise(convolve(h, state[f"{here}.conv1.weight"], stride), state, f"{here}.bn1"), 0)
            z = normalise(convolve(z, state[f"{here}.conv2.weight"], 1), state, f"{here}.bn2")
            if stride == 2:
                h = normalise(convolve(h, state[f"{here}.shortcut.0.weight"], 2), state, f"{here}.shortcut.1")
            h = np.maximum(z + h, 0)
    expected = h.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-11)


def test_wide_resnet_against_arrays():
    module, state = shaken(WideResNet(16, 1, 4, seed=1, stem_width=4).build())
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 8))
    h = convolve(x, state["conv1.weight"], 1)
    for group in range(3):
        for block in range(2):
            here, stride = f"groups.{group}.{block}", 2 if group and block == 0 else 1
            r = np.maximum(normalise(h, state, f"{here}.bn1"), 0)
            z = np.maximum(normalise(convolve(r, state[f"{here}.conv1.weight"], stride), state, f"{here}.bn2"), 0)
            if block == 0:
                h = convolve(r, state[f"{here}.shortcut.weight"], stride)
            h = h + convolve(z, state[f"{here}.conv2.weight"], 1)
    h = np.maximum(normalise(h, state, "bn"), 0)
    expected = h.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ResNet18(0), "width is 0"),
        (lambda: ResNet18(64.0), "width is 64.0"),
        (lambda: ResNet18(n_outputs=True), "n_outputs is True"),
        (lambda: ResNet18(seed=0.5), "seed is 0.5"),
        (lambda: ResNet18(weights=3), "weights is a int, expected the path"),
        (lambda: WideResNet(15), "6n \\+ 4"),
        (lambda: WideResNet(4), "6n \\+ 4"),
        (lambda: WideResNet(16, 0), "widening is 0"),
        (lambda: WideResNet(16, groups=0), "groups is 0"),
    ],
)
def test_bad_sizes(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("description", [ResNet18(8), WideResNet(16, 2, groups=2, stem_width=32)], ids=str)
def test_descriptions_are_tables(description):
    table = registry.to_config(description)
    assert registry.from_config(table, "module") == description
