"""Ridge by a tridiagonal form against the eigendecomposition."""

import numpy as np
import pytest

import ntkdask as nd
from ntkdask.errors import InputError
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge
from ntkdask.solvers.tridiagonal import TridiagonalRidge


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("n", "m"), [(60, 1), (60, 2), (80, 37), (300, 130)])
def test_tridiagonal_is_the_eigendecomposition_without_vectors(n, m, fit_intercept):
    rng = np.random.default_rng(n + m)
    phi, y = rng.standard_normal((n, m)) + 0.3, rng.standard_normal((n, 3)) + 5.0

    def centred():
        sums = GramSums.zeros(m, 3)
        sums.add(phi.copy(), y)
        return Centred.of(sums, fit_intercept)

    spectral, tridiagonal = EighRidge.factorise(centred()), TridiagonalRidge.factorise(centred())
    for alpha in (1e-8, 1e-2, 1.0, 1e4):
        a, b = spectral.solve(alpha), tridiagonal.solve(alpha)
        np.testing.assert_allclose(b.weights, a.weights, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(b.intercept, a.intercept, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(tridiagonal.gcv(alpha), spectral.gcv(alpha), rtol=1e-9)
        np.testing.assert_allclose(tridiagonal.residual_squares(alpha), spectral.residual_squares(alpha), rtol=1e-9)
        np.testing.assert_allclose(
            tridiagonal.effective_dimension(alpha), spectral.effective_dimension(alpha), rtol=1e-9
        )


def test_tridiagonal_refuses_what_is_not_positive_definite():
    sums = GramSums.zeros(3, 1)
    sums.add(np.eye(3)[[0, 1, 2, 0, 1]], np.ones((5, 1)))
    sums.gram[2, 2] = -1.0
    ridge = TridiagonalRidge.factorise(Centred.of(sums, fit_intercept=False))
    with pytest.raises(InputError, match="not positive definite"):
        ridge.solve(0.5)
    assert ridge.gcv(0.5) == float("inf")
    assert np.isfinite(ridge.solve(2.0).weights).all()


def far_problem(n, m, seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    phi = (rng.standard_normal((n, m)) + 10.0).astype(dtype)
    return phi, phi[:, :5].sum(axis=1) + rng.standard_normal(n)


@pytest.mark.parametrize(
    ("n", "m", "dtype"), [(201, 200, "float32"), (202, 200, "float32"), (215, 200, "float32"), (40, 60, "float64")]
)
@pytest.mark.parametrize("solver", ["auto", "tridiagonal"])
def test_scores_are_those_of_eigh_where_rows_hardly_outnumber_features(n, m, dtype, solver):
    """GCV there is a quotient of two numbers near 0: none is clipped to 0, and the same alpha is chosen for every seed."""
    for seed in range(8):
        x, y = far_problem(n, m, seed, dtype)
        ours, theirs = (nd.RidgeRegressor(alphas=np.logspace(-6, 3, 10), solver=s).fit(x, y) for s in (solver, "eigh"))
        assert ours.alpha_ == theirs.alpha_
        found, expected = ([row["score"] for row in fit.alpha_path_] for fit in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_features_that_repeat_and_constant_ones():
    """Directions without data: in float64 T serves; in float32 rounding may make their eigenvalues negative."""
    for dtype in ("float64", "float32"):
        for seed in range(4):
            x, y = far_problem(300, 140, seed, dtype)
            x[:, 3], x[:, 8], x[:, 9] = x[:, 4], 2 * x[:, 5] + x[:, 6], 7.0
            alphas = np.logspace(-4, 3, 8)
            ours, theirs = (nd.RidgeRegressor(alphas=alphas, solver=s).fit(x, y) for s in ("tridiagonal", "eigh"))
            assert ours.alpha_ == theirs.alpha_
            np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-6)


def test_the_whole_spectrum_from_the_reduction():
    phi, y = far_problem(150, 70, 0, "float64")

    def centred():
        sums = GramSums.zeros(70, 1)
        sums.add(phi.copy(), y[:, None])
        return Centred.of(sums)

    expected, found = EighRidge.factorise(centred()), TridiagonalRidge.factorise(centred()).spectral()
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(found.solve(0.1).weights, expected.solve(0.1).weights, rtol=1e-8, atol=1e-12)
    assert found.gcv(0.1) == pytest.approx(expected.gcv(0.1), rel=1e-9)
