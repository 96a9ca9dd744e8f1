"""Layers, kernels and solvers in words."""

from __future__ import annotations

from typing import Any

import pytest
from report_examples import activation, dense, solver

from ntkdask import registry
from ntkdask.kernels import NTK
from ntkdask.networks import fully_connected
from ntkdask.report import job_words


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (activation(type="ABReLU", A=0.5, B=1.5), "abrelu (A 0.5, B 1.5)"),
        (activation(type="RBFActivation", A=1.0), "rbf (A 1)"),
        (activation(type="Polynomial", coefficients=[0.0, 1.0, -0.5]), "polynomial (coefficients 0, 1, −0.5)"),
        (activation(name="abrelu", A=2), "abrelu (A 2)"),
        (activation(type="Swoosh", k=2), "Swoosh (k 2)"),
        ({"type": "Activation", "function": "relu", "normalize": False}, "relu (not normalised)"),
        (dense(), "Dense"),
        (
            dense(weight_variance=2.0, bias_variance=0.1, trainable=False),
            "Dense (weight variance 2, bias variance 0.1, not trained)",
        ),
    ],
)
def test_layers_in_words(layer: dict[str, Any], words: str) -> None:
    assert job_words.chain([layer]) == words


def test_what_repeats_is_said_once() -> None:
    assert job_words.chain([dense(), activation(type="ReLU")] * 2 + [dense()]) == "Dense → relu → Dense → relu → Dense"
    network = registry.to_config(fully_connected(3))
    assert job_words.kernel_words({"kernel": {"type": "NTK"}, "network": network}) == [
        "NTK",
        "of 3 × (Dense → relu) → Dense",
    ]
    assert job_words.chain([dense()] * 4) == "4 × Dense"


def test_kernels_in_words() -> None:
    own = registry.to_config(NTK(fully_connected(1, "gelu", scale_inputs=True)))
    assert dict(job_words.describe_job({"kernel": own})) == {"kernel": "NTK of Dense → gelu → Dense, inputs scaled"}
    assert job_words.kernel_words({"kernel": {"type": "ArcCosine", "order": 2}}) == ["ArcCosine", "with order 2"]
    assert job_words.kernel_words({}) == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            solver(alphas=[0.5]),
            "kernel ridge, α = 0.5; solver auto, fit intercept yes, tolerance 10⁻⁶, max iterations 1 000",
        ),
        (
            solver(selection="kfold", solver="tiled_cholesky"),
            "kernel ridge, 4 values of α from 0 to 10, chosen by k-fold cross-validation on training rows; "
            "solver tiled Cholesky factorisation, fit intercept yes, folds 5",
        ),
        (
            solver(solver="cholesky"),
            "kernel ridge, 4 values of α from 0 to 10, chosen on training rows; "
            "solver Cholesky factorisation, fit intercept yes, holdout 0.2",
        ),
    ],
)
def test_solvers_in_words(table: dict[str, Any], words: str) -> None:
    (described,) = [w for part, w in job_words.describe_job({"kernel": {}, "solver": table}) if part == "solver"]
    assert described.replace("\u202f", " ") == words
