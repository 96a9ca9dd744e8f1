"""Feature maps: functions of rows whose inner products approximate a kernel. One file each."""

from ntkdask.features.arccosine import ArcCosineFeatures
from ntkdask.features.base import FeatureMap
from ntkdask.features.ntk_random import NTKRandomFeatures

__all__ = ["ArcCosineFeatures", "FeatureMap", "NTKRandomFeatures"]
