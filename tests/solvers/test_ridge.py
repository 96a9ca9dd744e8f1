"""Ridge regression against least squares, hat matrices and refits."""

import numpy as np
import pytest
from reference import gcv, hat_matrix, leave_one_out_squares, ridge
from solver_examples import WEIGHTED, problem, sums_of

from ntkdask.errors import InputError
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge, Solution, held_out_squares, solve_cholesky, solve_one

ALPHAS = (1e-3, 0.1, 1.0, 30.0, 1e4)


INTERCEPT = pytest.mark.parametrize("fit_intercept", [True, False], ids=["intercept", "origin"])


SHAPES = {"tall": (40, 7), "square": (9, 9), "wide": (8, 20), "one feature": (12, 1), "one column more": (10, 9)}


def shaped(name):
    """(phi, y, weights) of one of SHAPES, or with two equal columns."""
    if name == "duplicated columns":
        phi, y, weights = problem(40, 7)
        phi[:, 3] = phi[:, 5]
        return phi, y, weights
    return problem(*SHAPES[name])


EVERY_SHAPE = pytest.mark.parametrize("shape", [*SHAPES, "duplicated columns"])


def factorise(phi, y, weights=None, fit_intercept=True):
    return EighRidge.factorise(Centred.of(sums_of(phi, y, weights), fit_intercept))


# --- ridge --------------------------------------------------------------------------------------------------------


@EVERY_SHAPE
@INTERCEPT
@WEIGHTED
def test_eigh_against_least_squares_for_every_alpha(shape, fit_intercept, weighted):
    phi, y, weights = shaped(shape)
    weights = weights if weighted else None
    fit = factorise(phi, y, weights, fit_intercept)
    for alpha in ALPHAS:
        solution = fit.solve(alpha)
        w, b = ridge(phi, y, alpha, fit_intercept, weights)
        assert solution.alpha == alpha
        np.testing.assert_allclose(solution.weights, w, rtol=0, atol=1e-9 * np.abs(w).max())
        np.testing.assert_allclose(solution.intercept, b, rtol=0, atol=1e-9 * np.abs(y).max())


@EVERY_SHAPE
@INTERCEPT
@WEIGHTED
def test_residuals_degrees_of_freedom_and_gcv_against_the_hat_matrix(shape, fit_intercept, weighted):
    phi, y, weights = shaped(shape)
    weights = weights if weighted else None
    w = np.ones(len(phi)) if weights is None else weights
    fit = factorise(phi, y, weights, fit_intercept)
    for alpha in ALPHAS:
        hat = hat_matrix(phi, alpha, fit_intercept, weights)
        residual = (w[:, None] * (y - hat @ y) ** 2).sum(axis=0)
        np.testing.assert_allclose(fit.residual_squares(alpha), residual, rtol=1e-6)
        assert fit.effective_dimension(alpha) == pytest.approx(np.trace(hat), rel=1e-8)
        assert fit.gcv(alpha) == pytest.approx(gcv(phi, y, alpha, fit_intercept, weights), rel=1e-6)


@EVERY_SHAPE
@INTERCEPT
@WEIGHTED
def test_leave_one_out_against_really_leaving_one_out(shape, fit_intercept, weighted):
    phi, y, weights = shaped(shape)
    weights = weights if weighted else None
    fit, half = factorise(phi, y, weights, fit_intercept), len(phi) // 2
    alphas = (0.1, 1.0, 30.0)
    total = sum(
        fit.leave_one_out_squares(phi[rows], y[rows], None if weights is None else weights[rows], alphas)
        for rows in (slice(0, half), slice(half, None))
    )
    expected = [leave_one_out_squares(phi, y, alpha, fit_intercept, weights) for alpha in alphas]
    np.testing.assert_allclose(total, expected, rtol=1e-8)


@INTERCEPT
def test_interpolation_at_tiny_alpha(fit_intercept):
    """More features than rows: residuals vanish, GCV stays finite and tends to that of the ridgeless limit."""
    phi, y, _ = problem(8, 20)
    fit = factorise(phi, y, fit_intercept=fit_intercept)
    assert (fit.residual_squares(1e-9) <= 1e-12).all()
    assert fit.gcv(1e-6) == pytest.approx(fit.gcv(1e-9), rel=1e-3)
    solution = fit.solve(1e-9)
    np.testing.assert_allclose(phi @ solution.weights + solution.intercept, y, atol=1e-6)


def test_duplicated_columns_share_their_weight_and_count_once():
    phi, y, _ = shaped("duplicated columns")
    fit = factorise(phi, y)
    assert (fit.eigenvalues > 0).sum() == 6
    weights = fit.solve(1e-6).weights
    np.testing.assert_allclose(weights[3], weights[5], rtol=1e-6)
    assert fit.effective_dimension(1e-9) == pytest.approx(7, rel=1e-6)


def test_constant_features_are_taken_by_the_intercept():
    phi, y, _ = problem(30, 4)
    phi[:, 2] = 3.0
    solution = factorise(phi, y).solve(0.5)
    w, b = ridge(phi, y, 0.5)
    assert np.abs(solution.weights[2]).max() <= 1e-12
    np.testing.assert_allclose(solution.weights, w, atol=1e-10)
    np.testing.assert_allclose(solution.intercept, b, atol=1e-10)


def test_float32_features_solve_to_float32():
    phi, y, weights = problem(200, 30)
    fit = factorise(phi.astype("float32"), y, weights)
    for alpha in (1.0, 30.0):
        w, b = ridge(phi, y, alpha, True, weights)
        solution = fit.solve(alpha)
        np.testing.assert_allclose(solution.weights, w, rtol=0, atol=1e-4 * np.abs(w).max())
        np.testing.assert_allclose(solution.intercept, b, rtol=0, atol=1e-4 * np.abs(b).max())
        exact = gcv(phi, y, alpha, True, weights)
        assert fit.gcv(alpha) == pytest.approx(exact, rel=1e-4)
        squares = fit.leave_one_out_squares(phi.astype("float32"), y, weights, (alpha,))[0]
        assert squares == pytest.approx(leave_one_out_squares(phi, y, alpha, True, weights), rel=1e-4)


@INTERCEPT
def test_rounding_beyond_the_rank_of_float32_rows_is_not_data(fit_intercept):
    """n = 30 rows of 60 features: 30 − 1 (intercept) directions have data, the other eigenvalues are float32 rounding."""
    phi, y, _ = problem(30, 60)
    narrow, wide = (factorise(phi.astype(t), y, fit_intercept=fit_intercept) for t in ("float32", "float64"))
    for fit in (narrow, wide):
        assert (fit.eigenvalues > 0).sum() == 30 - fit_intercept
    for alpha in (1e-5, 1e-3, 1.0):
        assert narrow.gcv(alpha) == pytest.approx(wide.gcv(alpha), rel=1e-3)
        assert narrow.effective_dimension(alpha) == pytest.approx(wide.effective_dimension(alpha), rel=1e-5)


def test_gcv_is_infinite_where_nothing_is_left():
    """alpha = 0 with as many features as rows leaves no degree of freedom."""
    phi, y, _ = problem(8, 8)
    assert factorise(phi, y, fit_intercept=False).gcv(0.0) == float("inf")


@EVERY_SHAPE
@INTERCEPT
@WEIGHTED
def test_cholesky_against_least_squares(shape, fit_intercept, weighted):
    phi, y, weights = shaped(shape)
    weights = weights if weighted else None
    for alpha in (0.1, 30.0):
        solution = solve_cholesky(Centred.of(sums_of(phi, y, weights), fit_intercept), alpha)
        w, b = ridge(phi, y, alpha, fit_intercept, weights)
        np.testing.assert_allclose(solution.weights, w, rtol=0, atol=1e-9 * np.abs(w).max())
        np.testing.assert_allclose(solution.intercept, b, rtol=0, atol=1e-9 * np.abs(y).max())


def test_cholesky_of_a_singular_gram_gives_advice():
    phi, y, _ = problem(40, 5)
    phi[:, 1] = 0
    with pytest.raises(InputError, match=r'alpha=0 is not positive definite.*larger alpha, or solver="eigh"'):
        solve_cholesky(Centred.of(sums_of(phi, y), False), 0.0)


def test_auto_goes_from_cholesky_to_the_spectrum_in_place():
    """A feature that repeats: Cholesky's pivot is rounding at a tiny alpha, so the spectrum answers, from the same matrix."""
    phi, y, weights = shaped("duplicated columns")
    for alpha in (1e-14, 1e-2):
        found = solve_one(Centred.of(sums_of(phi, y, weights)), alpha)
        expected = factorise(phi, y, weights).solve(alpha)
        np.testing.assert_allclose(found.weights, expected.weights, rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.intercept, expected.intercept, rtol=0, atol=1e-7)


def test_auto_keeps_the_features_of_small_scale():
    """Pivots are told from rounding beside their own diagonal entry: a column of scale 1 beside one of scale 1e9."""
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((50, 2)) * [1e9, 1.0]
    y = phi @ np.array([[1e-9], [1.0]])
    found = solve_one(Centred.of(sums_of(phi, y)), 1e-3)
    np.testing.assert_allclose(found.weights.T * [1e9, 1.0], [[1.0, 1.0]], rtol=1e-3)


def test_cholesky_refuses_what_float32_products_cannot_tell():
    phi, y, _ = problem(20, 200)
    narrow = phi.astype("float32")
    eps = float(np.finfo("float32").eps)
    with pytest.raises(InputError, match=r'near the rounding.*20 rows and 200 features.*"eigh"'):
        solve_cholesky(Centred.of(sums_of(narrow, y)), 1e-4, eps)
    solution = solve_cholesky(Centred.of(sums_of(narrow, y)), 1.0, eps)
    w, _ = ridge(phi, y, 1.0)
    np.testing.assert_allclose(solution.weights, w, rtol=0, atol=1e-3 * np.abs(w).max())


def test_held_out_errors_below_rounding_are_not_zero():
    """Targets that are the features exactly: what float32 products leave of the difference has either sign."""
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((300, 200)).astype("float32")
    y = phi.astype("float64") @ rng.standard_normal((200, 1))
    solution = factorise(phi.astype("float64"), y).solve(1e-12)
    eps = float(np.finfo("float32").eps)
    assert held_out_squares(solution, sums_of(phi, y), eps) >= 0.1 * eps * y.var()


@pytest.mark.parametrize("weights", [None, np.zeros(4)])
def test_nothing_to_fit_is_refused(weights):
    phi, y, _ = problem(4, 3)
    sums = GramSums.zeros(3, 2) if weights is None else sums_of(phi, y, weights)
    with pytest.raises(InputError, match="no rows with positive weight"):
        Centred.of(sums)


@INTERCEPT
@WEIGHTED
def test_held_out_error_from_sums_alone(fit_intercept, weighted):
    phi, y, weights = problem(60, 7)
    weights = weights if weighted else None
    rest = None if weights is None else weights[40:]
    solution = factorise(phi[:40], y[:40], None if weights is None else weights[:40], fit_intercept).solve(0.5)
    error = (y[40:] - phi[40:] @ solution.weights - solution.intercept) ** 2
    expected = np.average(error.mean(axis=1), weights=rest)
    assert held_out_squares(solution, sums_of(phi[40:], y[40:], rest)) == pytest.approx(expected, rel=1e-10)


def test_held_out_error_reads_the_lower_triangle_alone():
    phi, y, _ = problem(30, 6)
    sums, solution = sums_of(phi, y), Solution(np.ones((6, 2)), np.array([1.0, -2.0]), 1.0)
    expected = held_out_squares(solution, sums)
    sums.gram[np.triu_indices(6, 1)] = np.nan
    assert held_out_squares(solution, sums) == expected


@INTERCEPT
def test_state_round_trip(fit_intercept):
    phi, y, weights = problem(40, 7)
    fit = factorise(phi, y, weights, fit_intercept)
    arrays, attributes = fit.to_state()
    again = EighRidge.from_state({k: v.copy() for k, v in arrays.items()}, dict(attributes))
    for alpha in ALPHAS:
        np.testing.assert_array_equal(again.solve(alpha).weights, fit.solve(alpha).weights)
        np.testing.assert_array_equal(again.solve(alpha).intercept, fit.solve(alpha).intercept)
        assert again.gcv(alpha) == fit.gcv(alpha)
        assert again.effective_dimension(alpha) == fit.effective_dimension(alpha)
    squares = again.leave_one_out_squares(phi, y, weights, ALPHAS)
    np.testing.assert_array_equal(squares, fit.leave_one_out_squares(phi, y, weights, ALPHAS))
