"""One tile's Cholesky numerics and the refinement of float32 solutions, against SciPy and plain formulas in float64."""

import numpy as np
import pytest
import scipy.linalg

from ntkdask.errors import InputError
from ntkdask.solvers.cholesky import (
    factor_lower,
    first_lost_pivot,
    pivot_floor,
    ridge_tile,
    smallest_eigenvalue,
    solve_lower,
    solve_right,
    subtract_product,
    subtract_square,
)
from ntkdask.solvers.refinement import refine

TOLERANCE = {"float32": 2e-5, "float64": 1e-13}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
SHAPES = pytest.mark.parametrize(("p", "q", "r"), [(1, 1, 1), (5, 5, 5), (3, 8, 8), (40, 17, 23)])


def positive(n, dtype="float64", seed=0, noise=1.0):
    x = np.random.default_rng(seed).standard_normal((n, n))
    return (x @ x.T / n + noise * np.eye(n)).astype(dtype)


def random(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(found, expected, dtype):
    assert found.dtype == dtype
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


# --- tiles --------------------------------------------------------------------------------------------------------


@DTYPES
@SHAPES
def test_products_are_subtracted_in_place(dtype, p, q, r):
    c, a, b = random(p, q, dtype=dtype), random(p, r, dtype=dtype, seed=1), random(q, r, dtype=dtype, seed=2)
    expected = c.astype(float) - a.astype(float) @ b.astype(float).T
    assert subtract_product(c, a, b) is None
    close(c, expected, dtype)


@DTYPES
@SHAPES
def test_squares_are_subtracted_from_the_lower_triangle(dtype, p, q, r):
    a, c = random(p, r, dtype=dtype, seed=1), positive(p, dtype)
    expected = np.tril(c.astype(float) - a.astype(float) @ a.astype(float).T)
    subtract_square(c, a)
    close(np.tril(c), expected, dtype)


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 33, 130])
def test_factor_of_a_tile_reads_its_lower_triangle_and_clears_the_upper(dtype, n):
    c = positive(n, dtype)
    expected = scipy.linalg.cholesky(c.astype(float), lower=True)
    c[np.triu_indices(n, 1)] = np.nan
    assert factor_lower(c) == n
    close(c, expected, dtype)
    assert (c[np.triu_indices(n, 1)] == 0).all()


@pytest.mark.parametrize(("diagonal", "expected"), [([1, 2, 3], 3), ([1, -2, 3], 1), ([0, 1, 1], 0)])
def test_the_first_pivot_that_is_not_positive(diagonal, expected):
    assert factor_lower(np.diag(np.array(diagonal, float))) == expected


def test_a_pivot_that_is_no_number_is_lost():
    assert first_lost_pivot(np.diag([1.0, np.nan, 1.0]), np.ones(3), 1e-15) == 1


@DTYPES
@pytest.mark.parametrize(("p", "q"), [(1, 1), (9, 4), (3, 50)])
def test_triangular_solves_in_place(dtype, p, q):
    factor = np.linalg.cholesky(positive(q)).astype(dtype)
    inverse = np.linalg.inv(factor.astype(float))
    c, b = random(p, q, dtype=dtype), random(q, p, dtype=dtype)
    for transposed in (False, True):
        x = b.copy()
        solve_lower(factor, x, transposed)
        close(x, (inverse.T if transposed else inverse) @ b, dtype)
    expected = c @ inverse.T
    solve_right(c, factor)
    close(c, expected, dtype)


@DTYPES
@pytest.mark.parametrize("on_diagonal", [True, False])
def test_ridge_tile(dtype, on_diagonal):
    tile = positive(6, "float32")
    before, rows, columns = tile.copy(), random(6) ** 2, random(6, seed=3) ** 2
    found = ridge_tile(tile, rows, columns, dtype, 0.5, on_diagonal)
    close(found, rows[:, None] * before * columns + 0.5 * on_diagonal * np.eye(6), dtype)
    close(ridge_tile(tile.T, None, None, dtype, 0.0, False), before.T, dtype)
    assert found.flags.c_contiguous
    assert (tile == before).all()


@DTYPES
@pytest.mark.parametrize("n", [2, 20, 300])
def test_repeated_rows_leave_a_lost_pivot(dtype, n):
    """Over seeds: the pivot of a row that is there already is rounding, of either sign, and is always seen."""
    floor = pivot_floor(n, dtype, dtype)
    for seed in range(20):
        x = random(n, n + 20, seed=seed)
        first, second = sorted(np.random.default_rng(seed).choice(n, 2, replace=False))
        x[second] = x[first]
        c = (x @ x.T).astype(dtype)
        c[second], c[:, second] = c[first], c[:, first]
        c[second, second] = c[first, first]
        diagonal = c.diagonal().copy()
        count = factor_lower(c)
        lost = count if count < n else first_lost_pivot(c, diagonal, floor)
        assert lost == second


@DTYPES
def test_pivots_of_a_ridge_are_kept(dtype):
    """The smallest pivot of K + αI is at least α: with α ten times the floor nothing is lost, however singular K."""
    n = 200
    floor = pivot_floor(n, dtype, dtype)
    c = ridge_tile(np.ones((n, n), dtype), None, None, dtype, 10 * floor, True)
    diagonal = c.diagonal().copy()
    assert factor_lower(c) == n
    assert first_lost_pivot(c, diagonal, floor) is None


def test_floor_knows_the_dtype_of_the_matrix():
    assert pivot_floor(100, "float64", "float64") == 80 * np.finfo("float64").eps
    assert pivot_floor(100, "float64", "float32") == np.finfo("float32").eps
    assert pivot_floor(100, "float32", "float64") == 80 * np.finfo("float32").eps


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 50])
def test_smallest_eigenvalue_of_the_lower_triangle(dtype, n):
    c = positive(n, dtype, noise=-0.5)
    expected = np.linalg.eigvalsh(c.astype(float))[0]
    c[np.triu_indices(n, 1)] = 1e30
    assert smallest_eigenvalue(c) == pytest.approx(expected, abs=1e-12)


# --- refinement ---------------------------------------------------------------------------------------------------


def ill_conditioned(n=120, condition=1e5, seed=0):
    """Symmetric, eigenvalues from 1 down to 1/condition, spread over the decades."""
    q = np.linalg.qr(random(n, n, seed=seed))[0]
    matrix = (q * np.geomspace(1, 1 / condition, n)) @ q.T
    return (matrix + matrix.T) / 2


def float32_solve(matrix, alpha=0.0, shift=0.0):
    """The solve of a float32 factor of matrix + (alpha + shift)·I."""
    c = (matrix + (alpha + shift) * np.eye(len(matrix))).astype("float32")
    assert factor_lower(c) == len(c)

    def solve(rhs):
        x = np.ascontiguousarray(rhs, dtype="float32")
        solve_lower(c, x)
        solve_lower(c, x, transposed=True)
        return x.astype(float)

    return solve


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def __matmul__(self, v):
        assert v.dtype == np.float64
        self.products += 1
        return self.matrix @ v


@pytest.mark.parametrize("shape", [(120,), (120, 1), (120, 4)])
def test_refinement_reaches_float64(shape):
    matrix, alpha = ill_conditioned(), 1e-5
    rhs = random(*shape)
    operator = Counted(matrix)
    solve = float32_solve(matrix, alpha)
    # a residual that rounding lets every processor's BLAS reach: at 1e-12 one in three did not
    found = refine(operator, solve, rhs, alpha=alpha, tolerance=1e-11)
    exact = np.linalg.solve(matrix + alpha * np.eye(120), rhs)
    rough = np.linalg.norm(solve(rhs.reshape(120, -1)).reshape(shape) - exact) / np.linalg.norm(exact)
    assert found.solution.shape == shape
    assert found.converged
    assert (found.residuals <= 1e-11).all()
    assert np.linalg.norm(found.solution - exact) <= 1e-4 * rough * np.linalg.norm(exact)
    assert rough > 1e-5, "the float32 solution is good already: a weak test"
    true = np.linalg.norm(rhs - matrix @ found.solution - alpha * found.solution, axis=0) / np.linalg.norm(rhs, axis=0)
    np.testing.assert_allclose(found.residuals, np.atleast_1d(true), rtol=0.5)
    assert operator.products <= 12


def test_refinement_with_a_factor_of_another_alpha():
    """Where κ·ε passes 1 the matrix itself has no float32 factor: that of a larger alpha preconditions."""
    matrix = ill_conditioned(condition=1e9)
    rhs = matrix @ random(120, 2)
    found = refine(matrix, float32_solve(matrix, shift=1e-5), rhs, alpha=1e-7, tolerance=1e-10, max_iterations=200)
    assert found.converged
    exact = np.linalg.solve(matrix + 1e-7 * np.eye(120), rhs)
    np.testing.assert_allclose(found.solution, exact, atol=1e-3 * np.abs(exact).max())


def test_zero_columns_and_unequal_columns():
    matrix, rhs = ill_conditioned(), random(120, 3) * [1.0, 0.0, 1e-60]
    found = refine(matrix, lambda b: np.linalg.solve(matrix, b) * (1 + 1e-4), rhs, tolerance=1e-11)
    assert found.converged
    assert (found.solution[:, 1] == 0).all()
    np.testing.assert_allclose(found.solution[:, 2] * 1e60, np.linalg.solve(matrix, rhs[:, 2] * 1e60), rtol=1e-5)


def test_what_cannot_converge_says_so():
    matrix, rhs = ill_conditioned(), random(120)
    few = refine(matrix, float32_solve(matrix, shift=1e-2), rhs, tolerance=1e-13, max_iterations=2)
    assert not few.converged
    assert few.iterations == 2
    assert np.isfinite(few.solution).all()
    # below what products in float64 can show: it stops, well before the limit, with what it has
    lowest = refine(matrix, float32_solve(matrix), rhs, tolerance=1e-30, max_iterations=10_000)
    assert not lowest.converged
    assert lowest.iterations < 10_000
    assert lowest.residuals[0] < 1e-10
    useless = refine(matrix, np.zeros_like, rhs)
    assert not useless.converged
    assert useless.residuals[0] == pytest.approx(1.0)


def test_an_exact_factor_needs_no_steps():
    matrix, rhs = ill_conditioned(condition=10), random(120, 2)
    found = refine(matrix, lambda b: np.linalg.solve(matrix, b), rhs)
    assert (found.iterations, found.converged) == (0, True)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, 1.0, np.nan])
def test_tolerances_that_make_no_sense(tolerance):
    with pytest.raises(InputError, match="tolerance"):
        refine(np.eye(2), lambda b: b, np.ones(2), tolerance=tolerance)
