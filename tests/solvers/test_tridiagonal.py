"""Ridge by a tridiagonal form against the eigendecomposition."""

import numpy as np
import pytest

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
