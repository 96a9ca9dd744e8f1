"""Predictions of infinitely wide networks: ensembles under gradient flow, and the NNGP posterior."""

from ntkdask.workflows.ensemble.kernels import EnsembleMatrices
from ntkdask.workflows.ensemble.predict import predict_ensemble, predict_stored_ensemble

__all__ = ["EnsembleMatrices", "predict_ensemble", "predict_stored_ensemble"]
