"""Feature maps: functions of rows whose inner products approximate a kernel. One file each."""

from ntkdask.features.alignment import Alignment
from ntkdask.features.arccosine import ArcCosineFeatures
from ntkdask.features.base import FeatureMap
from ntkdask.features.cntk_sketch import CNTKSketch
from ntkdask.features.fourier import FourierFeatures
from ntkdask.features.gradient import GradientFeatures
from ntkdask.features.hermite_sketch import HermiteSketch
from ntkdask.features.homogeneous_sketch import HomogeneousSketch
from ntkdask.features.ntk_random import NTKRandomFeatures
from ntkdask.features.ntk_sketch import NTKSketch
from ntkdask.features.nystrom import Nystrom
from ntkdask.features.polynomial_sketch import PolynomialSketch
from ntkdask.features.projected import ProjectedGradients

__all__ = [
    "Alignment",
    "ArcCosineFeatures",
    "CNTKSketch",
    "FeatureMap",
    "FourierFeatures",
    "GradientFeatures",
    "HermiteSketch",
    "HomogeneousSketch",
    "NTKRandomFeatures",
    "NTKSketch",
    "Nystrom",
    "PolynomialSketch",
    "ProjectedGradients",
]


def __dir__() -> list[str]:
    return sorted(__all__)
