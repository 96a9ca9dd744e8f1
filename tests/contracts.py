"""What the contract tests run over: every registered kernel and feature map, with example arguments for each class.

A class without an example fails `test_every_class_has_examples`: add a line here when you add a kernel or a map.
"""

import importlib
import pkgutil
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ntkdask import activations, cache, registry
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
)

WIDTH = 6
"""Features of a row in the contract tests."""


@dataclass(frozen=True)
class Example:
    """Constructor arguments of one class. bias_order: p in bias = O(m^−p) of a map; None: unbiased. row_shape: of its rows."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    bias_order: float | None = None
    row_shape: tuple[int, ...] = (WIDTH,)

    @property
    def takes_images(self) -> bool:
        return len(self.row_shape) == 3

    def rows(self, n: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
        """(n, *row_shape): `rows`, as images where the class takes those."""
        return rows(n, dtype, seed).reshape(n, *self.row_shape)

    def __str__(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name

    def make(self, **changes: Any) -> Any:
        return registry.lookup(self.name)(**{**self.arguments, **changes})


GENERAL = Network(
    (
        Dense(1.5, 0.1),
        Activation("relu"),
        Dense(0.7, 0.2, trainable=False),
        Activation("relu", normalize=False),
        Dense(2.0, 0.0),
    ),
    scale_inputs=True,
)
BIASED = fully_connected(1, weight_variance=1.5, bias_variance=0.3)
FROZEN_ENDS = Network((Dense(trainable=False), Activation("relu"), Dense(), Activation("relu"), Dense(trainable=False)))
FROZEN_READOUT = Network((Dense(), Activation("relu"), Dense(trainable=False)))
RESIDUAL = Network(
    (Dense(1.2, 0.1), LayerNorm(), Residual((Activation("relu"), Dense(0.8, 0.1))), Activation("gelu"), Dense())
)
IMAGE = (2, 1, 3)
IMAGE_RESIDUAL = Network(
    (
        Conv(3, bias_variance=0.1),
        Residual((Activation("relu"), Conv(2)), (Conv(1),)),
        Activation("abs"),
        GlobalAvgPool(),
        Dense(trainable=False),
        Activation("relu"),
        Dense(),
    ),
    scale_inputs=True,
)
IMAGE_POOLED = Network((Conv((2, 1)), Activation("relu"), AvgPool((2, 1)), Conv(1), Activation("relu"), Flatten()))

KERNELS = [
    Example("ArcCosine", {"order": 0}, "0"),
    Example("ArcCosine", {"order": 1}, "1"),
    Example("ArcCosine", {"order": 2}, "2"),
    Example("RBF", {"gamma": 0.2}),
    Example("NTK", {"network": fully_connected(1)}, "depth 1"),
    Example("NTK", {"network": fully_connected(3)}, "depth 3"),
    Example(
        "NTK", {"network": fully_connected(2, activations.get("abrelu", A=0.3, B=1.2), bias_variance=0.1)}, "abrelu"
    ),
    Example("NTK", {"network": fully_connected(3, activations.get("leaky_relu", slope=0.9))}, "leaky relu"),
    Example("NTK", {"network": fully_connected(2, "abs")}, "abs"),
    Example("NTK", {"network": fully_connected(2, "erf", bias_variance=0.1)}, "erf"),
    Example("NNGP", {"network": fully_connected(1, "gelu")}, "gelu"),
    Example("NTK", {"network": GENERAL}, "general"),
    Example("NNGP", {"network": fully_connected(2)}, "depth 2"),
    Example("NNGP", {"network": GENERAL}, "general"),
    Example("NTK", {"network": RESIDUAL}, "residual"),
    Example("NTK", {"network": convolutional(2)}, "convolutional", row_shape=IMAGE),
    Example(
        "NTK",
        {"network": convolutional(1, 3, "circular", "flatten", "erf", bias_variance=0.1)},
        "circular erf",
        row_shape=IMAGE,
    ),
    Example("NTK", {"network": IMAGE_RESIDUAL}, "image residual", row_shape=IMAGE),
    Example("NNGP", {"network": IMAGE_POOLED}, "pooled", row_shape=IMAGE),
    Example("FlipAveraged", {"kernel": NTK(convolutional(1))}, row_shape=(1, 2, 3)),
]

MAPS = [
    Example("ArcCosineFeatures", {"n_components": 64, "order": 0}, "0"),
    Example("ArcCosineFeatures", {"n_components": 64, "order": 1}, "1"),
    Example("ArcCosineFeatures", {"n_components": 64, "order": 1, "sampling": "spherical"}, "spherical"),
    Example("NTKRandomFeatures", {"network": fully_connected(1), "n_components": 64}, "depth 1"),
    Example(
        "NTKRandomFeatures", {"network": fully_connected(1), "n_components": 64, "sampling": "spherical"}, "spherical"
    ),
    Example("NTKRandomFeatures", {"network": BIASED, "n_components": 65, "n_relu": 20, "n_step": 50}, "biases"),
    Example("NTKRandomFeatures", {"network": FROZEN_READOUT, "n_components": 64}, "frozen readout"),
    # From depth 2 on, features of one layer enter the non-linear functions of the next: a bias of order 1/m remains.
    Example("NTKRandomFeatures", {"network": fully_connected(2), "n_components": 64}, "depth 2", bias_order=1.0),
    Example("NTKRandomFeatures", {"network": fully_connected(3), "n_components": 64}, "depth 3", bias_order=1.0),
    Example("NTKRandomFeatures", {"network": GENERAL, "n_components": 64}, "general", bias_order=1.0),
    Example("NTKRandomFeatures", {"network": FROZEN_ENDS, "n_components": 64}, "frozen ends", bias_order=1.0),
]


def import_all(package: str) -> None:
    """Import every module of a package, so that what registers itself is there."""
    home = importlib.import_module(package)
    for module in pkgutil.walk_packages(home.__path__, f"{package}."):
        importlib.import_module(module.name)


def rows(n: int, dtype: str = "float64", seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """(n, width) Gaussian rows; from n = 6 on with a zero row, two equal rows and two opposite ones."""
    x = np.random.default_rng(seed).standard_normal((n, width))
    if n >= 6:
        x[1] = 0
        x[3] = x[2]
        x[4] = -x[0]
    return x.astype(dtype)


def images(n: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    """(n, 2, 1, 3): `rows` in the shape of images."""
    return rows(n, dtype, seed).reshape(n, *IMAGE)


def peak_bytes(call: Any) -> int:
    """Most bytes that Python and NumPy held at once during `call()`, weights included; compiled code is warm.

    The least of three calls: what other threads of the process hold meanwhile, as those of an earlier test's client, only adds.
    """
    call()
    peaks = []
    for _ in range(3):
        cache.shared.clear()
        tracemalloc.start()
        try:
            call()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    cache.shared.clear()
    return min(peaks)


def normwise(k: np.ndarray, exact: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """max |k − exact|/√(exact_ii·exact_jj), MATH.md §1; where a variance is 0 both must be 0."""
    scale = np.sqrt(np.outer(left, right).astype("float64"))
    error = np.abs(k.astype("float64") - exact)
    assert (error[scale == 0] == 0).all()
    return float((error[scale > 0] / scale[scale > 0]).max(initial=0.0))
