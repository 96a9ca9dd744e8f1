"""What the contract tests run over: every registered kernel and feature map, with example arguments for each class.

A class without an example fails `test_every_class_has_examples`: add a line here when you add a kernel or a map.
"""

import contextlib
import gc
import importlib
import pkgutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from module_examples import AnyRows

from ntkdask import activations, cache, registry
from ntkdask.features.alignment import Alignment
from ntkdask.kernels import NTK, RBF
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
    """Constructor arguments of one class. bias_order: p in bias = O(m^−p) of a map; None: unbiased. row_shape: of its rows.
    workspace_components: n_components where memory is measured, on rows of up to 2 000 features."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    bias_order: float | None = None
    row_shape: tuple[int, ...] = (WIDTH,)
    workspace_components: int = 600

    @property
    def slow_draws(self) -> bool:
        """Whether hundreds of maps take seconds: their statistics here are slow tests, and daily ones are in files of their own."""
        return self.name in ("NTKSketch", "HomogeneousSketch", "HermiteSketch", "ProjectedGradients")

    @property
    def rows_stand_alone(self) -> bool:
        """Whether a row has equal bits in any batch: compiled loops promise it, products in torch and BLAS do not (DESIGN.md)."""
        return "module" not in self.arguments

    @property
    def takes_images(self) -> bool:
        return len(self.row_shape) == 3

    def rows(self, n: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
        """(n, *row_shape): `rows`, as images where the class takes those."""
        return rows(n, dtype, seed).reshape(n, *self.row_shape)

    def shaped(self, row_shape: tuple[int, ...]) -> tuple[int, ...]:
        """A row's shape as the class takes it: vectors become images of 4×5."""
        return (4, 5, row_shape[0] // 20) if self.takes_images and len(row_shape) == 1 else row_shape

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
BIASED_ERF = fully_connected(1, "erf", weight_variance=1.5, bias_variance=0.3)
FROZEN_ENDS = Network((Dense(trainable=False), Activation("relu"), Dense(), Activation("relu"), Dense(trainable=False)))
FROZEN_READOUT = Network((Dense(), Activation("relu"), Dense(trainable=False)))
RESIDUAL = Network(
    (Dense(1.2, 0.1), LayerNorm(), Residual((Activation("relu"), Dense(0.8, 0.1))), Activation("gelu"), Dense())
)
NORMALIZED_GAUSSIAN = fully_connected(2, activations.get("normalized_gaussian", scale=0.5), scale_inputs=True)
# rows this short leave nothing above degree 12: their sketch is unbiased to 1e-9
SHORT_ROWS = fully_connected(1, "erf", weight_variance=0.03, bias_variance=0.02)
CUBIC = fully_connected(1, activations.get("polynomial", coefficients=(0.3, 0.5, -0.2, 0.1)), bias_variance=0.2)
DEEP_GELU = Network(
    (Dense(0.1, 0.1), Activation("gelu"), Dense(0.4, trainable=False), Activation("gelu"), Dense(1.2, 0.3))
)
LEAKY = fully_connected(2, activations.get("abrelu", A=0.5, B=1.5), normalize=False, scale_inputs=True)
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
IMAGE_FROZEN = Network(
    (
        Conv(trainable=False),
        Activation("relu"),
        AvgPool((2, 1)),
        Conv(1),
        Activation("abs"),
        Flatten(),
        Dense(trainable=False),
    )
)
IMAGE_GAUSSIAN = convolutional(1, 1, activation=activations.get("normalized_gaussian", scale=0.5))
IMAGE_BIASED = convolutional(1, 2, "circular", "flatten", "erf", weight_variance=1.2, bias_variance=0.1)
IMAGE_POOLED = Network((Conv((2, 1)), Activation("relu"), AvgPool((2, 1)), Conv(1), Activation("relu"), Flatten()))
IMAGE_STRIDED = Network(
    (
        Conv((2, 3), "circular", 2, bias_variance=0.2),
        Activation("tanh"),
        Conv(5, "same", (2, 1), weight_variance=1.3),
        LayerNorm(),
        Activation("gelu"),
        Conv(2, "valid", trainable=False),
        Activation("abs"),
        GlobalAvgPool(),
        Dense(0.7, 0.1),
    ),
    scale_inputs=True,
)
IMAGE_THEN_DENSE = Network(
    (
        Conv(2),
        Activation("tanh"),
        AvgPool((1, 2)),
        Flatten(),
        Residual((Dense(1.2), Activation("erf"), Dense(0.5, 0.2))),
        Dense(),
        Activation("erf"),
        Dense(),
    )
)
IMAGE_SHORTCUT = Network(
    (Residual((AvgPool(2), Conv(3, bias_variance=0.1)), (AvgPool(2),)), Conv(1), Activation("sin"), Flatten())
)

KERNELS = [
    Example("ArcCosine", {"order": 0}, "0"),
    Example("ArcCosine", {"order": 1}, "1"),
    Example("ArcCosine", {"order": 2}, "2"),
    Example("RBF", {"gamma": 0.2}),
    Example("PolynomialKernel", {"degree": 2, "gamma": 0.3, "coef0": 0.7}),
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
    Example("PseudoNTK", {"module": AnyRows(), "input_layout": None}),
    Example("EmpiricalNTK", {"module": AnyRows(), "input_layout": None, "output": "trace"}, "trace"),
    Example("EmpiricalNTK", {"module": AnyRows(), "input_layout": None, "output": 1}, "logit"),
]

MAPS = [
    Example("ArcCosineFeatures", {"n_components": 64, "order": 0}, "0"),
    Example("ArcCosineFeatures", {"n_components": 64, "order": 1}, "1"),
    Example("ArcCosineFeatures", {"n_components": 64, "order": 1, "sampling": "spherical"}, "spherical"),
    Example("ArcCosineFeatures", {"n_components": 64, "order": 0, "sampling": "structured"}, "structured step"),
    Example("ArcCosineFeatures", {"n_components": 65, "order": 1, "sampling": "structured"}, "structured"),
    Example("NTKRandomFeatures", {"network": fully_connected(1), "n_components": 64}, "depth 1"),
    Example("NTKRandomFeatures", {"network": BIASED, "n_components": 65, "sampling": "structured"}, "structured"),
    Example(
        "NTKRandomFeatures",
        {"network": GENERAL, "n_components": 64, "sampling": "structured", "exact_norms": True},
        "exact norms",
        bias_order=1.0,
    ),
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
    Example(
        "NTKRandomFeatures", {"network": FROZEN_ENDS, "n_components": 64, "kernel": "nngp"}, "nngp", bias_order=1.0
    ),
    Example("NTKRandomFeatures", {"network": BIASED, "n_components": 64, "kernel": "nngp"}, "nngp depth 1"),
    Example(
        "NTKRandomFeatures",
        {"network": fully_connected(1), "n_components": 64, "sampling": "gibbs", "n_sweeps": 3},
        "gibbs",
        workspace_components=200,
    ),
    *(
        Example("CNTKSketch", arguments, label, bias_order=order, row_shape=IMAGE, workspace_components=120)
        for label, order, arguments in (
            ("depth 1", None, {"network": convolutional(1), "n_components": 256, "exact_norms": False}),
            ("depth 2", 1.0, {"network": convolutional(2), "n_components": 64}),
            ("frozen ends", 1.0, {"network": IMAGE_FROZEN, "n_components": 100}),
            ("gaussian", 1.0, {"network": IMAGE_GAUSSIAN, "n_components": 64}),
            ("sketch", 1.0, {"network": IMAGE_GAUSSIAN, "n_components": 64, "method": "sketch", "degree": 3}),
            ("mixed", 1.0, {"network": IMAGE_BIASED, "n_components": 64, "method": "mixed"}),
        )
    ),
    Example("FourierFeatures", {"n_components": 64, "gamma": 0.2}),
    Example("FourierFeatures", {"n_components": 65, "gamma": 0.2}, "odd"),
    Example("FourierFeatures", {"n_components": 64, "gamma": 0.2, "sampling": "orthogonal"}, "orthogonal"),
    Example("FourierFeatures", {"n_components": 65, "gamma": 0.2, "sampling": "structured"}, "structured"),
    # 64 units of 7 parameters, 80 of 8 and two columns left over
    Example(
        "GradientFeatures", {"network": fully_connected(1), "n_components": 448}, "relu", workspace_components=2100
    ),
    Example("GradientFeatures", {"network": BIASED_ERF, "n_components": 642}, "biased erf", workspace_components=2100),
    Example(
        "GradientFeatures",
        {"network": convolutional(1, (2, 1)), "n_components": 563},
        "convolutional",
        row_shape=IMAGE,
        workspace_components=2100,
    ),
    Example("NTKSketch", {"network": fully_connected(1), "n_components": 96}, "depth 1"),
    Example(
        "NTKSketch",
        {"network": FROZEN_READOUT, "n_components": 96, "degree": 4, "method": "algorithm1"},
        "frozen readout",
    ),
    Example(
        "NTKSketch",
        {
            "network": fully_connected(1),
            "n_components": 96,
            "degree": 4,
            "method": "algorithm1",
            "derivative": "random",
        },
        "random derivative",
    ),
    Example(
        "NTKSketch",
        {"network": LEAKY, "n_components": 96, "degree": 4, "method": "algorithm1", "expansion": "taylor"},
        "depth 2 taylor",
        bias_order=1.0,
    ),
    Example(
        "NTKSketch",
        {"network": FROZEN_ENDS, "n_components": 96, "degree": 4, "method": "algorithm1"},
        "frozen ends",
        bias_order=1.0,
    ),
    Example("HomogeneousSketch", {"network": fully_connected(1), "n_components": 64}, "depth 1"),
    Example("HomogeneousSketch", {"network": fully_connected(3), "n_components": 64, "kernel": "nngp"}, "nngp"),
    Example("HomogeneousSketch", {"network": NORMALIZED_GAUSSIAN, "n_components": 64, "degree": 12}, "gaussian dual"),
    Example("HermiteSketch", {"network": SHORT_ROWS, "n_components": 64, "degree": 12}, "erf"),
    Example("HermiteSketch", {"network": CUBIC, "n_components": 65, "degree": 3, "kernel": "nngp"}, "cubic nngp"),
    Example("HermiteSketch", {"network": DEEP_GELU, "n_components": 64, "degree": 10}, "deep", bias_order=1.0),
    Example("PolynomialSketch", {"n_components": 64, "degree": 3, "gamma": 0.1, "coef0": 0.7}),
    Example("ProjectedGradients", {"module": AnyRows(), "n_components": 64, "input_layout": None}),
]

LEARNED = [
    Example("NTKRandomFeatures", {"network": BIASED, "n_components": 40, "sampling": "optimized"}, "optimized"),
    Example(
        "NTKRandomFeatures",
        {
            "network": GENERAL,
            "n_components": 50,
            "sampling": "optimized",
            "alignment": Alignment(3000, 50.0, "sample", "gibbs"),
        },
        "optimized sample",
    ),
    Example(
        "NTKRandomFeatures",
        {
            "network": FROZEN_ENDS,
            "n_components": 30,
            "sampling": "optimized",
            "kernel": "nngp",
            "alignment": Alignment(500, 40.0),
        },
        "optimized nngp",
    ),
    Example("Nystrom", {"kernel": RBF(0.2), "n_components": 20}, "uniform"),
    Example("Nystrom", {"kernel": NTK(fully_connected(2)), "n_components": 20, "landmarks": "leverage"}, "leverage"),
    Example(
        "Nystrom",
        {"kernel": NTK(convolutional(1)), "n_components": 4, "landmarks": "kmeans++"},
        "images",
        row_shape=IMAGE,
    ),
]
"""Maps that must be fitted before they are called, with any arguments."""


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


def peak_bytes(call: Any, planned: int) -> int:
    """Most bytes that arrays and objects held at once during `call()`, weights included; compiled code is warm.

    The first of three calls that stays within what is planned, or the least: other threads of the process, and collections that
    happen to be due, only add. torch's tensors, which Python does not see, are added at their own peak.
    """
    call()
    peaks: list[int] = []
    while len(peaks) < 3 and not (peaks and peaks[-1] <= planned):
        if peaks:
            gc.collect()
        cache.shared.clear()
        tracemalloc.start()
        try:
            with torch_peak() as of_torch:
                call()
            peaks.append(tracemalloc.get_traced_memory()[1] + of_torch())
        finally:
            tracemalloc.stop()
    cache.shared.clear()
    return min(peaks)


@contextlib.contextmanager
def torch_peak() -> Iterator[Callable[[], int]]:
    """Gives the most bytes that torch's tensors held at once in the body; 0 where torch is not in use."""
    if "torch" not in sys.modules:
        yield lambda: 0
        return
    from ntkdask.modules.peak import PeakBytes

    with PeakBytes() as counted:
        yield lambda: counted.peak


def normwise(k: np.ndarray, exact: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """max |k − exact|/√(exact_ii·exact_jj), MATH.md §1; where a variance is 0 both must be 0."""
    scale = np.sqrt(np.outer(left, right).astype("float64"))
    error = np.abs(k.astype("float64") - exact)
    assert (error[scale == 0] == 0).all()
    return float((error[scale > 0] / scale[scale > 0]).max(initial=0.0))
