"""ntkdask: neural tangent kernels at any scale, out of core, on CPUs and GPUs.

Importing this package starts nothing and loads little: each public name is imported when it is first used, so that a script
which needs a kernel alone does not load Zarr, Dask and (through Zarr, where it is installed) CuPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkdask.lazy import lazy_names

if TYPE_CHECKING:
    from ntkdask import activations, features, kernels, modules
    from ntkdask.datasets import import_dataset, open_dataset, write_dataset
    from ntkdask.estimators import (
        FeatureTransformer,
        KernelRidgeClassifier,
        KernelRidgeRegressor,
        RidgeClassifier,
        RidgeRegressor,
    )
    from ntkdask.execution.cluster import connect
    from ntkdask.matrices.spectrum import spectrum
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
    from ntkdask.planning.tiles import Plan
    from ntkdask.workflows.approximation import approximation_error
    from ntkdask.workflows.empirical.comparison import compare_kernels
    from ntkdask.workflows.empirical.linearized import predict_linearized, predict_stored_linearized
    from ntkdask.workflows.empirical.train import train
    from ntkdask.workflows.ensemble.converged import predict_converged
    from ntkdask.workflows.ensemble.kernels import EnsembleMatrices
    from ntkdask.workflows.ensemble.predict import predict_ensemble, predict_stored_ensemble
    from ntkdask.workflows.featurize import featurize
    from ntkdask.workflows.kernel_matrix.build import kernel_matrix, open_matrix, plan_kernel_matrix
    from ntkdask.workflows.kernel_matrix.export import export_matrix

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
    "planning.tiles": ("Plan",),
    "datasets": ("import_dataset", "open_dataset", "write_dataset"),
    "execution.cluster": ("connect",),
    "workflows.approximation": ("approximation_error",),
    "workflows.ensemble.predict": ("EnsembleMatrices", "predict_ensemble", "predict_stored_ensemble"),
    "workflows.ensemble.converged": ("predict_converged",),
    "workflows.featurize": ("featurize",),
    "workflows.empirical.comparison": ("compare_kernels",),
    "workflows.empirical.linearized": ("predict_linearized", "predict_stored_linearized"),
    "workflows.kernel_matrix.build": ("kernel_matrix", "open_matrix", "plan_kernel_matrix"),
    "workflows.kernel_matrix.export": ("export_matrix",),
    "matrices.spectrum": ("spectrum",),
    "workflows.empirical.train": ("train",),
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
    "export_matrix",
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
