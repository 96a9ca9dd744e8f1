"""Gram sums and ridge regression against least squares, hat matrices and refits."""

import numpy as np
import pytest
from reference import gcv, hat_matrix, leave_one_out_squares, ridge

from ntkdask.errors import InputError
from ntkdask.solvers.gram import GramSums, packed_length, packed_size, triangle_panels
from ntkdask.solvers.ridge import Centred, EighRidge, Solution, held_out_squares, solve_cholesky
from ntkdask.solvers.tridiagonal import TridiagonalRidge

ALPHAS = (1e-3, 0.1, 1.0, 30.0, 1e4)
INTERCEPT = pytest.mark.parametrize("fit_intercept", [True, False], ids=["intercept", "origin"])
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def problem(n, m, k=2, seed=0, noise=0.3):
    """Features with an offset and unequal scales, targets that depend on them, positive weights."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((n, m)) * np.geomspace(1, 0.2, m) + rng.standard_normal(m)
    y = phi @ rng.standard_normal((m, k)) / np.sqrt(m) + noise * rng.standard_normal((n, k)) + 5
    return phi, y, rng.uniform(0.2, 3, n)


SHAPES = {"tall": (40, 7), "square": (9, 9), "wide": (8, 20), "one feature": (12, 1), "one column more": (10, 9)}


def shaped(name):
    """(phi, y, weights) of one of SHAPES, or with two equal columns."""
    if name == "duplicated columns":
        phi, y, weights = problem(40, 7)
        phi[:, 3] = phi[:, 5]
        return phi, y, weights
    return problem(*SHAPES[name])


EVERY_SHAPE = pytest.mark.parametrize("shape", [*SHAPES, "duplicated columns"])


def sums_of(phi, y, weights=None, batch=None):
    sums = GramSums.zeros(phi.shape[1], y.shape[1])
    step = batch or len(phi)
    for start in range(0, len(phi), step):
        rows = slice(start, start + step)
        sums.add(phi[rows].copy(), y[rows], None if weights is None else weights[rows])
    return sums


def factorise(phi, y, weights=None, fit_intercept=True):
    return EighRidge.factorise(Centred.of(sums_of(phi, y, weights), fit_intercept))


def assert_sums(sums, phi, y, weights=None, tolerance=1e-12):
    """Against the definitions, in float64."""
    phi, w = phi.astype("float64"), np.ones(len(y)) if weights is None else weights
    lower = np.tril_indices(phi.shape[1])
    naive = {
        "gram": ((phi * w[:, None]).T @ phi)[lower],
        "cross": (phi * w[:, None]).T @ y,
        "features": w @ phi,
        "targets": w @ y,
        "squares": w @ y**2,
        "weight": w.sum(),
        "rows": (w > 0).sum(),
    }
    for name, expected in naive.items():
        found = sums.gram[lower] if name == "gram" else getattr(sums, name)
        scale = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=name)


# --- Gram sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 7, 255, 256, 257, 600])
def test_panels_cover_the_lower_triangle_once(m):
    count = np.zeros((m, m), int)
    for rows, columns in triangle_panels(m):
        count[rows, columns] += 1
    assert (count[np.tril_indices(m)] == 1).all()
    assert count.max() == 1
    assert packed_size(m) == count.sum()
    assert packed_length(m, 3) == count.sum() + 3 * m + m + 3 + 3 + 2


@WEIGHTED
@pytest.mark.parametrize(("n", "m", "batch"), [(50, 7, 50), (50, 7, 13), (300, 270, 128), (1, 3, 1)])
def test_float64_sums_against_their_definition(n, m, batch, weighted):
    phi, y, weights = problem(n, m)
    weights = weights if weighted else None
    assert_sums(sums_of(phi, y, weights, batch), phi, y, weights)


@WEIGHTED
def test_float32_sums_lose_only_one_batch_of_rounding(weighted):
    phi, y, weights = problem(4000, 20)
    phi, weights = phi.astype("float32"), weights if weighted else None
    product = np.zeros((20, 20), "float32", order="F")
    sums = GramSums.zeros(20, 2)
    for start in range(0, 4000, 250):
        rows = slice(start, start + 250)
        sums.add(phi[rows].copy(), y[rows], None if weights is None else weights[rows], product)
    # the Gram of a batch is a float32 product of 250 rows; everything else is summed in float64
    assert_sums(sums, phi, y, weights, tolerance=1e-6)
    assert sums.gram.dtype == sums.cross.dtype == "float64"
    if not weighted:
        np.testing.assert_allclose(sums.cross, phi.astype("float64").T @ y, rtol=1e-12)
        np.testing.assert_allclose(sums.features, phi.astype("float64").sum(axis=0), rtol=1e-12)


def test_rows_of_weight_zero_do_not_count():
    phi, y, weights = problem(30, 5)
    weights[::3] = 0
    kept = weights > 0
    sums = sums_of(phi, y, weights)
    assert sums.rows == kept.sum()
    assert_sums(sums, phi[kept], y[kept], weights[kept])


def test_sums_of_disjoint_rows_add_and_folds_subtract():
    phi, y, weights = problem(60, 300)
    total = sums_of(phi[:20], y[:20], weights[:20])
    total += sums_of(phi[20:], y[20:], weights[20:])
    assert_sums(total, phi, y, weights)
    rest = total.minus(sums_of(phi[20:45], y[20:45], weights[20:45]))
    keep = np.r_[0:20, 45:60]
    assert_sums(rest, phi[keep], y[keep], weights[keep], tolerance=1e-11)
    assert_sums(total, phi, y, weights)  # untouched


@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 3), (256, 1), (300, 2)])
def test_pack_and_unpack(m, k):
    phi, y, weights = problem(40, m, k)
    sums = sums_of(phi, y, weights)
    packed = sums.pack()
    assert packed.shape == (packed_length(m, k),)
    assert packed.dtype == "float64"
    again = GramSums.unpack(packed, m, k)
    assert_sums(again, phi, y, weights)
    np.testing.assert_array_equal(np.tril(again.gram), np.tril(sums.gram))
    assert (again.weight, again.rows) == (sums.weight, sums.rows)
    assert isinstance(again.rows, int)
    np.testing.assert_array_equal(again.pack(), packed)
    both = GramSums.unpack(packed + packed, m, k)  # the reduction adds packed vectors
    assert_sums(both, np.tile(phi, (2, 1)), np.tile(y, (2, 1)), np.tile(weights, 2))


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
    phi, y, weights = problem(500, 30)
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
