"""What torch sees of this machine, in words: for `ntkdask doctor`."""

from __future__ import annotations

import torch


def cuda_words() -> str:
    """Whether torch can use a GPU: its build, and how many devices of which name it sees."""
    if torch.version.cuda is None:
        return "a build without CUDA: modules run on the CPU"
    if not torch.cuda.is_available():
        return f"built for CUDA {torch.version.cuda}, sees no device: modules run on the CPU"
    return f"built for CUDA {torch.version.cuda}, sees {torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
