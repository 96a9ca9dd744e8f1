"""What tests of torch modules share: a registered network that takes rows of any shape, for the contract tests, and one thread."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ntkdask import threads
from ntkdask.registry import register


@register("module")
@dataclass(frozen=True)
class AnyRows:
    """`inputs` means of neighbouring numbers of a row, a hidden layer, `outputs` logits; float64 weights, seeded normals."""

    inputs: int = 6
    width: int = 8
    outputs: int = 2
    seed: int = 0

    def build(self):
        import torch
        from torch import nn

        generator = torch.Generator().manual_seed(self.seed)
        layers = (nn.Linear(self.inputs, self.width), nn.ReLU(), nn.Linear(self.width, self.outputs))
        module = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(self.inputs), *layers).double().eval()
        for p in module.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return module


@contextlib.contextmanager
def one_thread():
    """torch, BLAS and Numba in one thread: where matrices are small, two would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threads.limited(1):
            yield
    finally:
        torch.set_num_threads(before)
