"""Exact kernels: functions of two sets of rows. Each is a frozen dataclass that keeps the `Kernel` protocol."""

from ntkdask.kernels.arccosine import ArcCosine
from ntkdask.kernels.base import Kernel
from ntkdask.kernels.empirical import EmpiricalNTK, PseudoNTK
from ntkdask.kernels.flips import FlipAveraged
from ntkdask.kernels.neural import NNGP, NTK, NNGPAndNTK, both
from ntkdask.kernels.polynomial import PolynomialKernel
from ntkdask.kernels.rbf import RBF

__all__ = [
    "NNGP",
    "NTK",
    "RBF",
    "ArcCosine",
    "EmpiricalNTK",
    "FlipAveraged",
    "Kernel",
    "NNGPAndNTK",
    "PolynomialKernel",
    "PseudoNTK",
    "both",
]


def __dir__() -> list[str]:
    return sorted(__all__)
