"""ResNet18 and WideResNet for small images (CIFAR-10), in plain PyTorch and standard parameterisation, with seeded weights.

Weights are drawn by `seeds`, by the name of their layer: equal on every machine, and torch's random state is not touched.
Convolutions are N(0, 2/fan-in), the readout N(0, 1/fan-in) with zero biases, BatchNorm the identity. Images are NCHW, of any sides.
Sources: He et al. 2016; Zagoruyko and Komodakis 2016; widths as in Mohamadi and Sutherland 2022, Appendix A.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ntkdask import seeds


def resnet18(width: int = 64, n_outputs: int = 10, seed: int = 0, channels: int = 3) -> nn.Module:
    """ResNet18 for small images: a 3×3 stem without pooling, four groups of two blocks with w, 2w, 4w, 8w channels, w = `width`.

    width 64 is the classical one: 11 173 962 parameters with 10 outputs; 16: 701 466. Returns a module in eval mode on the CPU,
    float32, that takes (n, channels, H, W) to (n, n_outputs); its names are those of the usual CIFAR implementations
    ("layer1.0.conv1.weight"). Sizes are checked by `descriptions.ResNet18`. Source: He et al. 2016.
    """
    with torch.device("meta"):
        module = ResNet(width, n_outputs, channels)
    return initialised(module, seed)


def wide_resnet(
    depth: int = 16,
    widening: int = 1,
    n_outputs: int = 10,
    seed: int = 0,
    channels: int = 3,
    groups: int = 3,
    stem_width: int = 16,
) -> nn.Module:
    """WideResNet-depth-widening: (depth − 4)/6 pre-activation blocks in each group, of 16k, 32k, 64k channels, k = `widening`.

    Parameters
    ----------
    depth : int, optional
        Number of layers, 6n + 4.
    widening : int, optional
        k.
    n_outputs : int, optional
        Number of outputs.
    seed : int, optional
        Of the weights.
    channels : int, optional
        Channels of an image.
    groups : int, optional
        Number of groups. Mohamadi and Sutherland have two, and a stem of 16k channels.
    stem_width : int, optional
        Channels of the first convolution.

    Returns
    -------
    torch.nn.Module
        As of `resnet18`. WRN-16-4 has 2 748 890 parameters with 10 outputs. Sizes are checked by `descriptions.WideResNet`.

    References
    ----------
    Zagoruyko and Komodakis 2016.
    """
    with torch.device("meta"):
        widths = [stem_width, *(16 * widening * 2**group for group in range(groups))]
        module = WideResNet(widths, (depth - 4) // 6, n_outputs, channels)
    return initialised(module, seed)


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), the shortcut a 1×1 convolution where the shape changes."""

    recorded_as = "ntkdask.modules.residual.Block"

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            shrink = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shrink, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) → (n, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        h = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four groups of two `Block`s, the mean over pixels, a linear readout."""

    recorded_as = "ntkdask.modules.residual.ResNet"

    def __init__(self, width: int, n_outputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(Block(4 * width, 8 * width, 2), Block(8 * width, 8 * width, 1))
        self.linear = nn.Linear(8 * width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) → (n, n_outputs)."""
        h = relu(self.bn1(self.conv1(x)))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.linear(h.mean((2, 3)))


class PreActivationBlock(nn.Module):
    """conv(relu(bn(conv(r)))) + shortcut, r = relu(bn(x)): x itself, or a 1×1 convolution of r where the shape changes."""

    recorded_as = "ntkdask.modules.residual.PreActivationBlock"

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) → (n, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        r = relu(self.bn1(x))
        h = self.conv2(relu(self.bn2(self.conv1(r))))
        return h + (x if self.shortcut is None else self.shortcut(r))


class WideResNet(nn.Module):
    """Stem of widths[0] channels, a group of `PreActivationBlock`s for each further width, the mean over pixels, a linear readout."""

    recorded_as = "ntkdask.modules.residual.WideResNet"

    def __init__(self, widths: list[int], blocks: int, n_outputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        groups = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            first = PreActivationBlock(inputs, outputs, 1 if number == 0 else 2)
            groups.append(nn.Sequential(first, *(PreActivationBlock(outputs, outputs, 1) for _ in range(blocks - 1))))
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) → (n, n_outputs)."""
        return self.linear(relu(self.bn(self.groups(self.conv1(x)))).mean((2, 3)))


def initialised(module: nn.Module, seed: int) -> nn.Module:
    """`module`, on the meta device, with memory and seeded weights, in eval mode on the CPU; see the top of this file."""
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
            elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                units, fan_in = layer.weight.shape[0], layer.weight[0].numel()
                scale = math.sqrt((1 if isinstance(layer, nn.Linear) else 2) / fan_in)
                drawn = seeds.normals(seed, ("residual", name), fan_in, units, "float32", scale)
                layer.weight.copy_(torch.from_numpy(drawn.T).reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.zero_()
    return module.eval()
