"""Kernel ridge of targets far from zero: their mean is the intercept's, whatever the solver and its dtype."""

import numpy as np
import pytest

from ntkdask.solvers.dual import DualEigh, DualProblem, dual_cholesky


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_targets_far_from_zero(solver, dtype):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((50, 2))
    far = y + np.array([1e8, -3e6])
    y = far - np.array([1e8, -3e6])  # as far as 1e8 leaves them
    weights = np.where(np.arange(50) < 5, 0.0, rng.uniform(0.5, 2.0, 50))
    kernel = np.exp(-0.2 * ((x[:, None] - x) ** 2).sum(axis=2))

    def fit(targets):
        if solver == "eigh":
            return DualEigh.factorise(kernel, targets, weights, dtype=dtype).solve(1e-3)
        return dual_cholesky(kernel, targets, 1e-3, weights, dtype=dtype)

    near, distant = fit(y), fit(far)
    rtol = 1e-6 if dtype == "float64" else 1e-3
    scale = np.abs(near.coefficients).max()
    np.testing.assert_allclose(distant.coefficients, near.coefficients, rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(distant.intercept - [1e8, -3e6], near.intercept, rtol=0, atol=10 * rtol)


def test_the_level_is_taken_from_the_right_hand_sides():
    """A tolerance relative to them is then one relative to what is to be explained."""
    targets = np.array([[1e9], [1e9 + 1], [1e9 + 2]])
    right = DualProblem.of(targets, np.array([1.0, 1.0, 0.0])).right_hand_sides()
    np.testing.assert_array_equal(right[:, 0], [-0.5, 0.5, 0.0])
    origin = DualProblem.of(targets, fit_intercept=False).right_hand_sides()
    np.testing.assert_array_equal(origin, targets)
