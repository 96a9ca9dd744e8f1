"""Linearised prediction against explicit inverses, primal regression on Jacobians, and a linearised network's own training."""

import numpy as np
import pytest

from ntkdask.errors import InputError
from ntkdask.solvers.kernel_measures import stacked
from ntkdask.solvers.linearized import Linearized, is_full, one_hot, safe_alpha

N, M, K = 6, 4, 3
SOLVERS = pytest.mark.parametrize("solver", ["cholesky", "eigh"])
ALPHAS = pytest.mark.parametrize("alpha", [0.0, 0.7])


class Problem:
    """Jacobians of N training and M test rows, their kernels by name, targets and prior means."""

    def __init__(self, parameters=60, seed=0):
        rng = np.random.default_rng(seed)
        self.train, self.test = (rng.standard_normal((rows, K, parameters)) for rows in (N, M))
        self.theta = np.einsum("nap,mbp->nmab", self.train, self.train)
        self.theta_td = np.einsum("nap,mbp->nmab", self.test, self.train)
        sums, test_sums = (side.sum(axis=1) / np.sqrt(K) for side in (self.train, self.test))
        self.pseudo, self.pseudo_td = sums @ sums.T, test_sums @ sums.T
        self.y, self.f0 = rng.standard_normal((2, N, K))
        self.f0_test = rng.standard_normal((M, K))

    def naive(self, alpha, full):
        """Eqs. 5 and 6 with the inverse; order i·O + o."""
        residual = self.y - self.f0
        if not full:
            gain = self.pseudo_td @ np.linalg.inv(self.pseudo + alpha * np.eye(N))
            return self.f0_test + gain @ residual
        dd, td = (k.transpose(0, 2, 1, 3).reshape(-1, N * K) for k in (self.theta, self.theta_td))
        gain = td @ np.linalg.inv(dd + alpha * np.eye(N * K))
        return self.f0_test + (gain @ residual.reshape(-1)).reshape(M, K)


@SOLVERS
@ALPHAS
def test_pseudo_against_the_inverse(solver, alpha):
    p = Problem()
    fit = Linearized.fit(p.pseudo, p.y - p.f0, alpha, solver=solver)
    assert (fit.full, fit.coefficients.shape) == (False, (N, K))
    np.testing.assert_allclose(fit.predict(p.pseudo_td, p.f0_test), p.naive(alpha, False), atol=1e-10)


@SOLVERS
@ALPHAS
@pytest.mark.parametrize("layout", ["blocks", "matrix"])
def test_full_against_the_inverse(solver, alpha, layout):
    p = Problem()
    dd, td = (p.theta, p.theta_td) if layout == "blocks" else (stacked(p.theta), stacked(p.theta_td))
    kept = dd.copy()
    fit = Linearized.fit(dd, p.y - p.f0, alpha, solver=solver)
    assert fit.full
    np.testing.assert_allclose(fit.predict(td, p.f0_test), p.naive(alpha, True), atol=1e-10)
    np.testing.assert_array_equal(dd, kept)


def test_full_is_the_least_change_of_parameters():
    """Primal: the θ of least norm with J_D θ = Y − f₀(D) moves the test outputs by J_T θ."""
    p = Problem()
    jacobian, residual = p.train.reshape(N * K, -1), (p.y - p.f0).reshape(-1)
    theta = np.linalg.lstsq(jacobian, residual, rcond=None)[0]
    expected = p.f0_test + (p.test.reshape(M * K, -1) @ theta).reshape(M, K)
    fit = Linearized.fit(p.theta, p.y - p.f0)
    np.testing.assert_allclose(fit.predict(p.theta_td, p.f0_test), expected, atol=1e-10)


def test_a_separable_kernel_makes_both_agree():
    """Θ = Θ̂ ⊗ I: eq. 5 is eq. 6."""
    p = Problem()
    dd, td = (k[..., None, None] * np.eye(K) for k in (p.pseudo, p.pseudo_td))
    full = Linearized.fit(dd, p.y - p.f0, 0.2).predict(td, p.f0_test)
    np.testing.assert_allclose(full, p.naive(0.2, False), atol=1e-11)


def test_without_a_ridge_training_rows_are_fitted_and_kernels_have_no_scale():
    p = Problem()
    for dd in (p.pseudo, p.theta):
        fit, scaled = Linearized.fit(dd, p.y - p.f0), Linearized.fit(7.0 * dd, p.y - p.f0)
        np.testing.assert_allclose(fit.predict(dd, p.f0), p.y, atol=1e-10)
        np.testing.assert_allclose(7.0 * scaled.coefficients, fit.coefficients, atol=1e-10)


def test_one_output_is_the_same_either_way():
    p = Problem()
    dd, td = p.theta[:, :, :1, :1], p.theta_td[:, :, :1, :1]
    kept = dd.copy()
    residual, prior = (p.y - p.f0)[:, :1], p.f0_test[:, :1]
    first = Linearized.fit(dd, residual).predict(td, prior)
    np.testing.assert_array_equal(dd, kept)
    second = Linearized.fit(dd[..., 0, 0], residual).predict(td[..., 0, 0], prior)
    np.testing.assert_allclose(first, second, atol=1e-12)
    assert not is_full((N, N), (N, 1))


def test_float32_kernels_are_solved_in_float64():
    p = Problem()
    single = p.pseudo.astype("float32"), p.pseudo_td.astype("float32")
    expected = Linearized.fit(single[0].astype("float64"), p.y).predict(single[1].astype("float64"), p.f0_test)
    np.testing.assert_allclose(Linearized.fit(single[0], p.y).predict(single[1], p.f0_test), expected, rtol=1e-12)


def test_a_singular_kernel_says_which_alpha_would_do():
    """Fewer parameters than rows; "eigh" fits targets that lie in its range."""
    p = Problem(parameters=4)
    with pytest.raises(InputError, match=r"singular to rounding.*Use alpha="):
        Linearized.fit(p.pseudo, p.y)
    with pytest.raises(InputError, match="lie outside its range"):
        Linearized.fit(p.pseudo, p.y, solver="eigh")
    reachable = p.pseudo @ p.y
    fit = Linearized.fit(p.pseudo, reachable, solver="eigh")
    np.testing.assert_allclose(fit.predict(p.pseudo, np.zeros((N, K))), reachable, atol=1e-8)


def test_a_kernel_that_is_none():
    p = Problem()
    with pytest.raises(InputError, match="not positive definite"):
        Linearized.fit(p.pseudo - 50 * np.eye(N), p.y)
    bad = p.pseudo.copy()
    bad[2, 3] = np.nan
    with pytest.raises(InputError, match="row 2 of the kernel matrix has NaN"):
        Linearized.fit(bad, p.y)


def test_shapes_that_do_not_belong_together():
    p = Problem()
    for wrong in (p.pseudo[:, :4], p.pseudo[:5, :5], p.pseudo_td, stacked(p.theta)[:12, :12]):
        with pytest.raises(
            InputError, match="6 training rows of 3 outputs a pseudo-NTK has 6 columns, a full empirical NTK 18"
        ):
            Linearized.fit(wrong, p.y)
    with pytest.raises(InputError, match="residuals have shape"):
        Linearized.fit(p.pseudo, p.y[:, 0])
    with pytest.raises(InputError, match="'cholesky' or 'eigh'"):
        Linearized.fit(p.pseudo, p.y, solver="cg")
    fit = Linearized.fit(p.pseudo, p.y)
    for rows, prior in ((p.pseudo_td[:, :5], p.f0_test), (p.pseudo_td, p.f0_test[:2]), (p.pseudo_td, p.f0_test[:, :2])):
        with pytest.raises(InputError, match=r"expected \(\d, 6\)"):
            fit.predict(rows, prior)


def test_targets_of_zeros_and_ones():
    assert one_hot(np.array([2, 0]), 3).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    with pytest.raises(InputError, match=r"outside 0\.\.2"):
        one_hot(np.array([3]), 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_safe_alphas_are_safe(dtype):
    """Kernels that rounding made singular or indefinite can be solved at the alpha that is given."""
    eps = float(np.finfo(dtype).eps)
    rng = np.random.default_rng(0)
    for rank in (3, 20, 60):
        factor = rng.standard_normal((40, rank))
        kernel = (factor @ factor.T).astype(dtype)
        values = np.linalg.eigvalsh(kernel.astype("float64"))
        alpha = safe_alpha(values[0], values[-1], eps)
        assert (alpha == 0) == (rank == 60)
        assert np.isfinite(Linearized.fit(kernel, rng.standard_normal((40, 2)), alpha).coefficients).all()
    assert safe_alpha(-3.0, 10.0, eps) == 6.0
    # an eigenvalue that stands above rounding is not covered up
    assert (safe_alpha(2e-7, 1.0, eps), safe_alpha(5e-8, 1.0, eps) > 0) == (0.0, dtype == "float32")
