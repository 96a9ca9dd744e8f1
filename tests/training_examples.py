"""Modules and data that train in a second."""

import numpy as np
import pytest

from ntkdask.modules.descriptions import FiniteNetwork, ResNet18
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.networks import Dense, Network

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")


SHORT = TrainingProtocol(epochs=3, batch=8, learning_rate=0.05, checkpoints=(0, 2, 3))


def data(n=29, shape=(8, 8, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, *shape)).astype("float32"), rng.integers(0, classes, n)


def linear(seed=0, n_outputs=3, inputs=4, dtype="float64"):
    """f(x) = Wx, with biases."""
    module = FiniteNetwork(Network((Dense(inputs, 0.25),)), 1, n_outputs, (inputs,), seed).build()
    return module.to(getattr(torch, dtype))


def resnet(seed=0):
    return ResNet18(2, 3, seed).build()
