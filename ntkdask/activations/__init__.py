"""Activations σ with their dual activations; `get` finds one by its name."""

from ntkdask.activations.base import ActivationFunction, get
from ntkdask.activations.rectified import ReLU, kappa0, kappa1

__all__ = ["ActivationFunction", "ReLU", "get", "kappa0", "kappa1"]
