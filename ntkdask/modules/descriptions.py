"""PyTorch networks by name and arguments, which job files and fingerprints hold in the place of a module; torch is loaded by `build`.

kernel = { type = "PseudoNTK", module = { type = "ResNet18", width = 64, weights = "checkpoint.safetensors" } }
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ntkdask.errors import DataError, InputError
from ntkdask.modules.optional import require_torch
from ntkdask.modules.state.weight_files import file_digest, require_digest
from ntkdask.networks import Network, convolutional, fully_connected
from ntkdask.networks.finite import FinitePlan, finite_rows
from ntkdask.registry import register, to_config

if TYPE_CHECKING:
    from torch import nn

CIFAR_ROWS = (32, 32, 3)


class _Weighted:
    """A description with a file of weights: its configuration holds the path of the file and the digest of its content."""

    weights: str | None
    weights_digest: str | None

    def to_config(self) -> dict[str, Any]:
        """The configuration for fingerprints and saved models; DataError where the file of weights cannot be read."""
        arguments = {f.name: to_config(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        digest = self.weights_digest if self.weights is None else file_digest(self.weights)
        return {"type": type(self).__name__, **arguments, "weights_digest": digest}


@register("module")
@dataclass(frozen=True)
class FiniteNetwork(_Weighted):
    """A `Network` of finite width, in NTK parameterisation; see `finite_module`.

    Parameters
    ----------
    network : Network
        The architecture.
    width : int
        Units or channels of every hidden layer.
    n_outputs : int
        Number of outputs.
    row_shape : tuple of int
        Shape of a row: (d,) or (H, W, C).
    seed : int, optional
        Of the random weights.
    weights : str, optional
        Path of a file of weights (.safetensors, .pt or .pth) that `build` reads in the place of those of `seed`.
    weights_digest : str, optional
        Digest of that file, as a stored model keeps it: `build` refuses a file of other content.

    Raises
    ------
    InputError
        For sizes that cannot be, and rows that do not fit the network.
    """

    network: Network
    width: int
    n_outputs: int
    row_shape: tuple[int, ...]
    seed: int = 0
    weights: str | None = None
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        row_shape = finite_rows(self.network, self.width, self.row_shape, self.n_outputs)
        object.__setattr__(self, "row_shape", row_shape)
        _set_weights(self)
        if self.network.takes_images:
            FinitePlan(self.network, 1, row_shape)  # raises where an image does not fit a layer

    def build(self) -> nn.Module:
        """The module, float32, in eval mode on the CPU; a new one each time. Errors of its weights: `load_weights`."""

        def make() -> nn.Module:
            from ntkdask.modules.finite import finite_module

            return finite_module(self.network, self.width, self.row_shape, self.n_outputs, self.seed)

        return _built(self, make)


@register("module")
@dataclass(frozen=True)
class ResNet18(_Weighted):
    """ResNet18 for small images, in standard parameterisation; see `residual.resnet18`.

    Parameters
    ----------
    width : int, optional
        Channels of the first group; 64 is the classical network. Mohamadi and Sutherland's widening factor WF is width 16·WF.
    n_outputs : int, optional
        Number of outputs.
    seed : int, optional
        Of the random weights.
    channels : int, optional
        Channels of an image.
    weights : str, optional
        Path of a file of weights (.safetensors, .pt or .pth) that `build` reads in the place of those of `seed`.
    weights_digest : str, optional
        Digest of that file, as a stored model keeps it: `build` refuses a file of other content.

    Raises
    ------
    InputError
        For sizes that cannot be.

    References
    ----------
    He et al. 2016; Mohamadi and Sutherland 2022, Appendix A.
    """

    width: int = 64
    n_outputs: int = 10
    seed: int = 0
    channels: int = 3
    weights: str | None = None
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        _require_sizes(self, "width", "n_outputs", "channels")
        _set_weights(self)

    def build(self) -> nn.Module:
        """The module, float32, in eval mode on the CPU; a new one each time. Errors of its weights: `load_weights`."""

        def make() -> nn.Module:
            from ntkdask.modules.residual import resnet18

            return resnet18(self.width, self.n_outputs, self.seed, self.channels)

        return _built(self, make)


@register("module")
@dataclass(frozen=True)
class WideResNet(_Weighted):
    """WideResNet-depth-widening, in standard parameterisation; see `residual.wide_resnet`.

    Parameters
    ----------
    depth : int, optional
        Number of layers, 6n + 4.
    widening : int, optional
        k: the groups have 16k, 32k, 64k, … channels.
    n_outputs : int, optional
        Number of outputs.
    seed : int, optional
        Of the random weights.
    channels : int, optional
        Channels of an image.
    groups : int, optional
        Number of groups; 2, with stem_width=16·widening, is the network of Mohamadi and Sutherland.
    stem_width : int, optional
        Channels of the first convolution.
    weights : str, optional
        Path of a file of weights (.safetensors, .pt or .pth) that `build` reads in the place of those of `seed`.
    weights_digest : str, optional
        Digest of that file, as a stored model keeps it: `build` refuses a file of other content.

    Raises
    ------
    InputError
        For sizes that cannot be.

    References
    ----------
    Zagoruyko and Komodakis 2016; Mohamadi and Sutherland 2022, Appendix A.
    """

    depth: int = 16
    widening: int = 1
    n_outputs: int = 10
    seed: int = 0
    channels: int = 3
    groups: int = 3
    stem_width: int = 16
    weights: str | None = None
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        _require_sizes(self, "depth", "widening", "n_outputs", "channels", "groups", "stem_width")
        if self.depth < 10 or (self.depth - 4) % 6:
            raise InputError(f"WideResNet: depth is {self.depth}, expected 6n + 4: 10, 16, 22, 28, …")
        _set_weights(self)

    def build(self) -> nn.Module:
        """The module, float32, in eval mode on the CPU; a new one each time. Errors of its weights: `load_weights`."""

        def make() -> nn.Module:
            from ntkdask.modules.residual import wide_resnet

            sizes = (self.channels, self.groups, self.stem_width)
            return wide_resnet(self.depth, self.widening, self.n_outputs, self.seed, *sizes)

        return _built(self, make)


def fcn3(width: int, n_outputs: int = 10, row_shape: tuple[int, ...] = CIFAR_ROWS, seed: int = 0) -> FiniteNetwork:
    """The FCN of Mohamadi and Sutherland: three hidden layers of normalised ReLU, inputs divided by √d.

    Parameters
    ----------
    width : int
        Units of every hidden layer.
    n_outputs : int, optional
        Number of outputs.
    row_shape : tuple of int, optional
        Shape of a row.
    seed : int, optional
        Of the random weights.

    Returns
    -------
    FiniteNetwork
        A description; its `build` makes the module.

    References
    ----------
    Mohamadi and Sutherland 2022.
    """
    return FiniteNetwork(fully_connected(3, scale_inputs=True), width, n_outputs, row_shape, seed)


def convnet8(width: int, n_outputs: int = 10, row_shape: tuple[int, ...] = CIFAR_ROWS, seed: int = 0) -> FiniteNetwork:
    """The ConvNet of Mohamadi and Sutherland: eight 3×3 convolutions with normalised ReLU, GAP, Dense, inputs divided by √C.

    Parameters
    ----------
    width : int
        Channels of every convolution.
    n_outputs : int, optional
        Number of outputs.
    row_shape : tuple of int, optional
        Shape of an image, (H, W, C).
    seed : int, optional
        Of the random weights.

    Returns
    -------
    FiniteNetwork
        A description; its `build` makes the module.

    References
    ----------
    Mohamadi and Sutherland 2022.
    """
    return FiniteNetwork(convolutional(8, scale_inputs=True), width, n_outputs, row_shape, seed)


def _built(description: FiniteNetwork | ResNet18 | WideResNet, make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` gives, with the weights of the description's file where it has one."""
    require_torch(type(description).__name__)
    if description.weights is None and description.weights_digest is not None:
        raise DataError(
            f"the file of weights {description.weights_digest} of {type(description).__name__} is not known: give its path as weights."
        )
    module = make()
    if description.weights is not None:
        from ntkdask.modules.state.weights import load_weights

        if description.weights_digest is not None:
            require_digest(description.weights, description.weights_digest)
        load_weights(module, description.weights)
    return module


def _require_sizes(description: ResNet18 | WideResNet, *keys: str) -> None:
    """InputError where one of these fields is no integer >= 1."""
    for key in keys:
        value = getattr(description, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{type(description).__name__}: {key} is {value!r}, expected an integer >= 1.")


def _set_weights(description: FiniteNetwork | ResNet18 | WideResNet) -> None:
    """Make the path of weights a text, for fingerprints; InputError where it is no path, or the seed no integer."""
    name, weights, seed = type(description).__name__, description.weights, description.seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"{name}: seed is {seed!r}, expected an integer.")
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise InputError(f"{name}: weights is a {type(weights).__name__}, expected the path of a file, or None.")
    object.__setattr__(description, "weights", None if weights is None else os.fspath(weights))
