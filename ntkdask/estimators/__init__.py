"""scikit-learn estimators over the workflows: ridge on features, ridge on kernels, features as a transformer."""

from ntkdask.estimators.kernel_ridge import KernelRidgeClassifier, KernelRidgeRegressor
from ntkdask.estimators.ridge import RidgeClassifier, RidgeRegressor
from ntkdask.estimators.transformer import FeatureTransformer

__all__ = ["FeatureTransformer", "KernelRidgeClassifier", "KernelRidgeRegressor", "RidgeClassifier", "RidgeRegressor"]
