"""Networks of layers, written once and read as an exact kernel, a feature map or a finite network."""

from ntkdask.networks.layers import Activation, AvgPool, Conv, Dense, Flatten, GlobalAvgPool, Layer, LayerNorm, Residual
from ntkdask.networks.network import Network
from ntkdask.networks.presets import convolutional, fully_connected, myrtle

__all__ = [
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalAvgPool",
    "Layer",
    "LayerNorm",
    "Network",
    "Residual",
    "convolutional",
    "fully_connected",
    "myrtle",
]
