"""Jobs of kernel ridge on small data, and what their models hold."""

import numpy as np

from ntkdask.jobs.training import SplitRule, TrainingJob
from ntkdask.kernels import RBF
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import parse_steps
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.recipe import KernelRidgeRecipe
from ntkdask.workflows.model import load_model

ALPHAS = (1e-3, 0.1, 10.0)
TILES = Plan(tile_rows=None, tile_cols=30, dtype="float64")


def job_of(data, test=None, solver="eigh", alphas=ALPHAS, selection="auto", **changes):
    """RBF on standardised rows, a quarter of them for testing, tiles of 30, unless `changes` say otherwise."""
    given = {
        "split": None if test else SplitRule(test=0.25),
        "steps": parse_steps(["standardize"]),
        "kernel": RBF(0.2),
        "options": KernelRidgeOptions(alphas, selection=selection, solver=solver, tolerance=1e-9),
        "inner_folds": 3,
        "plan": TILES,
    }
    given |= changes
    recipe = KernelRidgeRecipe(given.pop("kernel"), given.pop("options"))
    return TrainingJob("tiny", data, test, recipe=recipe, **given)


def model(metrics, fold=0) -> dict[str, np.ndarray]:
    found = load_model(metrics["folds"][fold]["model"])
    return {
        "coefficients": found.coefficients,
        "intercept": found.intercept,
        "points": found.points.rows(0, found.points.n),
    }


def assert_equal_models(one, two):
    for fold in range(len(one["folds"])):
        a, b = model(one, fold), model(two, fold)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
        assert one["folds"][fold]["alpha_path"] == two["folds"][fold]["alpha_path"]
        assert one["folds"][fold]["test"] == two["folds"][fold]["test"]
