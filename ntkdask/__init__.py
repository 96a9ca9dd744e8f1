"""ntkdask: neural tangent kernels at any scale, out of core, on CPUs and GPUs.

Importing this starts nothing and loads nothing: each public name is imported when it is first used, so that a script which
needs a kernel does not pay for Zarr, Dask and (through Zarr, where it is installed) CuPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkdask.lazy import lazy_names

if TYPE_CHECKING:
    from ntkdask import activations, features, kernels, modules
    from ntkdask.cluster import connect
    from ntkdask.datasets import import_dataset, open_dataset, write_dataset
    from ntkdask.estimators import (
        FeatureTransformer,
        KernelRidgeClassifier,
        KernelRidgeRegressor,
        RidgeClassifier,
        RidgeRegressor,
    )
    from ntkdask.networks import (
        Activation,
        AvgPool,
        Conv,
        Dense,
        Flatten,
        GlobalAvgPool,
        LayerNorm,
        Network,
        Residual,
        convolutional,
        fully_connected,
        myrtle,
    )
    from ntkdask.tiles import Plan
    from ntkdask.workflows.approximation import approximation_error
    from ntkdask.workflows.ensemble import EnsembleMatrices, predict_ensemble, predict_stored_ensemble
    from ntkdask.workflows.ensemble_converged import predict_converged
    from ntkdask.workflows.featurize import featurize
    from ntkdask.workflows.kernel_comparison import compare_kernels
    from ntkdask.workflows.kernel_matrix import kernel_matrix, open_matrix, plan_kernel_matrix
    from ntkdask.workflows.linearized import predict_linearized, predict_stored_linearized
    from ntkdask.workflows.spectrum import spectrum
    from ntkdask.workflows.train import train

__version__ = "0.1.0"

_HOMES = {
    "networks": (
        "Activation",
        "AvgPool",
        "Conv",
        "Dense",
        "Flatten",
        "GlobalAvgPool",
        "LayerNorm",
        "Network",
        "Residual",
        "convolutional",
        "fully_connected",
        "myrtle",
    ),
    "tiles": ("Plan",),
    "datasets": ("import_dataset", "open_dataset", "write_dataset"),
    "cluster": ("connect",),
    "workflows.approximation": ("approximation_error",),
    "workflows.ensemble": ("EnsembleMatrices", "predict_ensemble", "predict_stored_ensemble"),
    "workflows.ensemble_converged": ("predict_converged",),
    "workflows.featurize": ("featurize",),
    "workflows.kernel_comparison": ("compare_kernels",),
    "workflows.linearized": ("predict_linearized", "predict_stored_linearized"),
    "workflows.kernel_matrix": ("kernel_matrix", "open_matrix", "plan_kernel_matrix"),
    "workflows.spectrum": ("spectrum",),
    "workflows.train": ("train",),
    "estimators": (
        "FeatureTransformer",
        "KernelRidgeClassifier",
        "KernelRidgeRegressor",
        "RidgeClassifier",
        "RidgeRegressor",
    ),
}
_MODULES = ("activations", "features", "kernels", "modules")

__all__ = [
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "EnsembleMatrices",
    "FeatureTransformer",
    "Flatten",
    "GlobalAvgPool",
    "KernelRidgeClassifier",
    "KernelRidgeRegressor",
    "LayerNorm",
    "Network",
    "Plan",
    "Residual",
    "RidgeClassifier",
    "RidgeRegressor",
    "activations",
    "approximation_error",
    "compare_kernels",
    "connect",
    "convolutional",
    "features",
    "featurize",
    "fully_connected",
    "import_dataset",
    "kernel_matrix",
    "kernels",
    "modules",
    "myrtle",
    "open_dataset",
    "open_matrix",
    "plan_kernel_matrix",
    "predict_converged",
    "predict_ensemble",
    "predict_linearized",
    "predict_stored_ensemble",
    "predict_stored_linearized",
    "spectrum",
    "train",
    "write_dataset",
]

__getattr__, __dir__ = lazy_names("ntkdask", _HOMES, _MODULES)
