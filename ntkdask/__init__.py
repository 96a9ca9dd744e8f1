"""ntkdask: neural tangent kernels at any scale, out of core, on CPUs and GPUs. Importing it starts nothing."""

from ntkdask import activations, features, kernels
from ntkdask.cluster import connect
from ntkdask.datasets import import_dataset, open_dataset, write_dataset
from ntkdask.networks import Activation, Dense, Network, fully_connected
from ntkdask.tiles import Plan
from ntkdask.workflows.featurize import featurize

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Dense",
    "Network",
    "Plan",
    "activations",
    "connect",
    "features",
    "featurize",
    "fully_connected",
    "import_dataset",
    "kernels",
    "open_dataset",
    "write_dataset",
]
