"""A small torch network, images for it, and its empirical kernels."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

OUTPUTS = 3


def network(seed=0):
    """A small network of images in eval mode, its weights seeded normals."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, OUTPUTS),
        )
    return module.eval()


def images(n=24, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=(n, 6, 6, 3)).astype(dtype)


def classes(n):
    return np.arange(n) % 3
