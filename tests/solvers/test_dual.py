"""Kernel ridge in the dual on dense matrices: against primal ridge, scikit-learn, and fits that never saw a row."""

import numpy as np
import pytest
import reference
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from ntkdask import arrays
from ntkdask.errors import InputError, UserError
from ntkdask.kernels import NTK
from ntkdask.networks import fully_connected
from ntkdask.solvers import dense
from ntkdask.solvers.dual import (
    DualCholesky,
    DualEigh,
    DualProblem,
    cholesky_bytes,
    dual_cholesky,
    eigh_bytes,
    held_out_error,
)
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge

ALPHAS = [1e-6, 1e-3, 1.0, 1e3]


def rbf(x, gamma=0.1):
    squares = (x**2).sum(axis=1)
    return np.exp(-gamma * np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0))


def case(n=40, m=7, k=3, seed=0, left_out=True):
    """Features (n, m), targets (n, k), weights (n,) with zeros."""
    rng = np.random.default_rng(seed)
    phi, y = rng.normal(size=(n, m)) + 0.5, rng.normal(size=(n, k))
    weights = rng.uniform(0.2, 2.0, size=n)
    if left_out:
        weights[[0, 5, n - 1]] = 0.0
    return phi, y, weights


def naive_dual(kernel, y, alpha, weights, fit_intercept):
    """(coefficients, intercept) from the bordered system in β and b, solved as one dense matrix."""
    s, n = np.sqrt(weights), len(kernel)
    matrix = np.zeros((n + 1, n + 1))
    matrix[:n, :n] = s[:, None] * kernel * s + alpha * np.eye(n)
    matrix[:n, n] = matrix[n, :n] = s
    right = np.concatenate([s[:, None] * y, np.zeros((1, y.shape[1]))])
    if not fit_intercept:
        matrix, right = matrix[:n, :n], right[:n]
    solved = np.linalg.solve(matrix, right)
    return s[:, None] * solved[:n], solved[n] if fit_intercept else np.zeros(y.shape[1])


def as_weights(weights, n):
    return np.ones(n) if weights is None else weights


every_case = pytest.mark.parametrize(
    ("fit_intercept", "weighted"), [(True, False), (False, False), (True, True), (False, True)]
)


@every_case
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_against_the_bordered_system(solver, alpha, fit_intercept, weighted):
    phi, y, weights = case()
    weights = weights if weighted else None
    kernel = rbf(phi, 0.05)
    if solver == "eigh":
        found = DualEigh.factorise(kernel, y, weights, fit_intercept).solve(alpha)
    else:
        found = dual_cholesky(kernel, y, alpha, weights, fit_intercept)
    coefficients, intercept = naive_dual(kernel, y, alpha, as_weights(weights, len(y)), fit_intercept)
    scale = np.abs(coefficients).max()
    np.testing.assert_allclose(found.coefficients, coefficients, rtol=1e-8, atol=1e-8 * scale)
    np.testing.assert_allclose(found.intercept, intercept, rtol=1e-8, atol=1e-8)
    assert found.alpha == alpha


@every_case
@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_equals_primal_ridge_in_everything(shape, fit_intercept, weighted):
    """Predictions, effective dimension, GCV and leave-one-out, for more rows than features and fewer."""
    phi, y, weights = case(*shape)
    weights = weights if weighted else None
    sums = GramSums.zeros(shape[1], 3)
    sums.add(phi.copy(), y, weights)
    primal = EighRidge.factorise(Centred.of(sums, fit_intercept))
    dual = DualEigh.factorise(phi @ phi.T, y, weights, fit_intercept)
    probe = np.random.default_rng(3).normal(size=(5, shape[1]))
    alphas = [1e-3, 1.0, 1e3]
    total = as_weights(weights, len(y)).sum() * y.shape[1]
    for alpha, score in zip(alphas, primal.leave_one_out_squares(phi, y, weights, alphas) / total, strict=True):
        expected = primal.solve(alpha)
        np.testing.assert_allclose(
            dual.solve(alpha).predict(probe @ phi.T),
            probe @ expected.weights + expected.intercept,
            rtol=1e-8,
            atol=1e-9,
        )
        np.testing.assert_allclose(dual.effective_dimension(alpha), primal.effective_dimension(alpha), rtol=1e-9)
        np.testing.assert_allclose(dual.gcv(alpha), primal.gcv(alpha), rtol=1e-6)
        np.testing.assert_allclose(dual.leave_one_out(alpha), score, rtol=1e-6)
        cholesky = DualCholesky.factorise(phi @ phi.T, y, alpha, weights, fit_intercept)
        np.testing.assert_allclose(cholesky.scores(), [primal.gcv(alpha), score], rtol=1e-6)


@every_case
def test_equals_scikit_learn(fit_intercept, weighted):
    phi, y, weights = case(k=2)
    weights = weights if weighted else None
    model = Ridge(alpha=0.3, fit_intercept=fit_intercept, solver="cholesky").fit(phi, y, sample_weight=weights)
    found = DualEigh.factorise(phi @ phi.T, y, weights, fit_intercept).solve(0.3)
    np.testing.assert_allclose(found.predict(phi @ phi.T), model.predict(phi), atol=1e-9)
    if not fit_intercept:
        kernel = KernelRidge(alpha=0.3, kernel="rbf", gamma=0.1).fit(phi, y, sample_weight=weights)
        twin = dual_cholesky(rbf(phi), y, 0.3, weights, False)
        np.testing.assert_allclose(twin.predict(rbf(phi)), kernel.predict(phi), atol=1e-9)


@every_case
def test_leave_one_out_is_brute_force(fit_intercept, weighted):
    phi, y, weights = case(n=15)
    weights = weights if weighted else None
    w = as_weights(weights, len(y))
    dual = DualEigh.factorise(phi @ phi.T, y, weights, fit_intercept)
    path = dual.leave_one_out_path([0.01, 1.0])
    for alpha, score in zip([0.01, 1.0], path, strict=True):
        expected = reference.leave_one_out_squares(phi, y, alpha, fit_intercept, w) / (w.sum() * 3)
        assert score == pytest.approx(expected, rel=1e-7)
        assert score == dual.leave_one_out(alpha)


@every_case
def test_held_out_rows_are_never_seen(fit_intercept, weighted):
    """Block formula against fits with weights 0 there, and k-fold against their mean."""
    phi, y, weights = case()
    w = weights if weighted else np.ones(len(y))
    kernel, groups = rbf(phi), np.random.default_rng(4).integers(0, 4, len(y))
    dual = DualEigh.factorise(kernel, y, w, fit_intercept)
    total = 0.0
    for group in range(4):
        held = np.flatnonzero((groups == group) & (w > 0))
        rest = np.where(groups == group, 0.0, w)
        solution = dual_cholesky(kernel, y, 0.1, rest, fit_intercept)
        error = y[held] - solution.predict(kernel[held])
        np.testing.assert_allclose(dual.held_out_errors(held, 0.1), error, atol=1e-9)
        score = held_out_error(solution, kernel[held], y[held], w[held])
        assert dual.held_out_error(groups, 0.1, held=[group]) == pytest.approx(score, rel=1e-8)
        total += score * w[held].sum()
    assert dual.held_out_error(groups, 0.1) == pytest.approx(total / w.sum(), rel=1e-8)


def test_held_out_rows_are_checked():
    phi, y, weights = case()
    dual = DualEigh.factorise(rbf(phi), y, weights)
    for rows in ([0, 1], [1, 1], np.flatnonzero(weights)):  # row 0 has weight 0
        with pytest.raises(InputError, match="held out"):
            dual.held_out_errors(np.array(rows), 1.0)


def test_ntk_of_a_depth_three_network():
    x = np.random.default_rng(5).normal(size=(60, 10))
    kernel = NTK(fully_connected(3))(x)
    y = np.random.default_rng(6).normal(size=(60, 2))
    dual = DualEigh.factorise(kernel, y)
    for alpha in ALPHAS:
        coefficients, intercept = naive_dual(kernel, y, alpha, np.ones(60), True)
        np.testing.assert_allclose(dual.solve(alpha).coefficients, coefficients, atol=1e-8 * np.abs(coefficients).max())
        np.testing.assert_allclose(dual.solve(alpha).intercept, intercept, atol=1e-8)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("weighted", [True, False])
def test_works_in_the_memory_of_the_kernel(order, weighted):
    """overwrite=False leaves the kernel alone; overwrite=True gives the same bits in its memory."""
    phi, y, weights = case()
    weights = weights if weighted else None
    kernel = np.array(rbf(phi), order=order)
    before = kernel.copy()
    kept = DualEigh.factorise(kernel, y, weights)
    np.testing.assert_array_equal(kernel, before)
    consumed = DualEigh.factorise(kernel, y, weights, overwrite=True)
    assert np.shares_memory(consumed.vectors, kernel)
    np.testing.assert_array_equal(consumed.solve(1.0).coefficients, kept.solve(1.0).coefficients)
    again = before.copy(order=order)
    factor = DualCholesky.factorise(again, y, 1.0, weights, overwrite=True)
    assert np.shares_memory(factor.factor, again)
    np.testing.assert_array_equal(factor.solution().coefficients, dual_cholesky(before, y, 1.0, weights).coefficients)


def test_other_lapack_driver_beyond_its_limit(monkeypatch):
    phi, y, weights = case()
    expected = DualEigh.factorise(rbf(phi), y, weights)
    monkeypatch.setattr(dense, "EVD_ROWS", 5)
    found = DualEigh.factorise(rbf(phi), y, weights)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, atol=1e-12)
    np.testing.assert_allclose(found.solve(0.1).coefficients, expected.solve(0.1).coefficients, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_few_rows(n, fit_intercept):
    phi, y, _ = case(n=n, left_out=False)
    for found in (
        DualEigh.factorise(phi @ phi.T, y, None, fit_intercept).solve(0.5),
        dual_cholesky(phi @ phi.T, y, 0.5, None, fit_intercept),
    ):
        weights, intercept = reference.ridge(phi, y, 0.5, fit_intercept)
        np.testing.assert_allclose(found.predict(phi @ phi.T), phi @ weights + intercept, atol=1e-10)


def test_one_row_left_is_its_own_intercept():
    phi, y, _ = case(n=6, left_out=False)
    weights = np.array([0, 0, 2.0, 0, 0, 0])
    dual = DualEigh.factorise(phi @ phi.T, y, weights)
    np.testing.assert_allclose(dual.solve(0.1).intercept, y[2])
    assert dual.gcv(0.1) == np.inf
    assert dual.effective_dimension(0.1) == 1.0


def test_left_out_rows_may_hold_anything():
    phi, y, weights = case()
    kernel = rbf(phi)
    expected = DualEigh.factorise(kernel, y, weights).solve(0.1)
    y[weights == 0] = np.nan
    kernel[0] = kernel[:, 0] = np.nan
    found = DualEigh.factorise(kernel, y, weights).solve(0.1)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    assert not found.coefficients[weights == 0].any()


def test_one_dimensional_targets_and_a_row_weighted_two():
    """Weight 2 is the row twice."""
    phi, y, _ = case(k=1, left_out=False)
    weights = np.ones(len(y))
    weights[3] = 2.0
    twice = np.concatenate([phi, phi[3:4]])
    once = DualEigh.factorise(phi @ phi.T, y[:, 0], weights).solve(0.2)
    again = DualEigh.factorise(twice @ twice.T, np.concatenate([y, y[3:4]])).solve(0.2)
    np.testing.assert_allclose(once.predict(phi @ phi.T), again.predict(phi @ twice.T), atol=1e-10)


# --- singular and indefinite matrices -----------------------------------------------------------------------------


def duplicated(differ):
    x = np.random.default_rng(7).normal(size=(20, 3))
    y = np.random.default_rng(8).normal(size=(20, 2))
    x[11] = x[4]
    y[11] = y[4] + differ
    return rbf(x, 1.0), y


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_duplicates_that_agree_have_a_solution_of_minimum_norm(fit_intercept):
    kernel, y = duplicated(0.0)
    dual = DualEigh.factorise(kernel, y, None, fit_intercept)
    found = dual.solve(0.0)
    np.testing.assert_allclose(found.predict(kernel), y, atol=1e-7)
    np.testing.assert_allclose(found.coefficients[4], found.coefficients[11], atol=1e-7)
    np.testing.assert_allclose(found.coefficients, dual.solve(1e-9).coefficients, rtol=1e-4, atol=1e-4)
    # scores at 0 are the limit of those at alpha → 0
    assert dual.leave_one_out(0.0) == pytest.approx(dual.leave_one_out(1e-9), rel=1e-5)
    assert dual.effective_dimension(0.0) == pytest.approx(19)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_duplicates_that_differ_are_named(fit_intercept):
    kernel, y = duplicated(1.0)
    dual = DualEigh.factorise(kernel, y, None, fit_intercept)
    with pytest.raises(InputError, match=r"rows 4 and 11: duplicate rows with different targets.*alpha >"):
        dual.solve(0.0)
    assert dual.gcv(0.0) == pytest.approx(dual.gcv(1e-10), rel=1e-4)
    with pytest.raises(InputError, match="duplicate rows"):
        dual_cholesky(kernel, y, 0.0, None, fit_intercept)
    assert np.isfinite(dual.solve(1e-3).coefficients).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interpolation_at_zero(dtype):
    x = np.random.default_rng(9).normal(size=(15, 4))
    y = np.random.default_rng(10).normal(size=(15, 1))
    kernel = rbf(x, 1.0).astype(dtype)
    dual = DualEigh.factorise(kernel, y)
    np.testing.assert_allclose(dual.solve(0.0).predict(kernel), y, atol=1e-5)
    assert dual.gcv(0.0) == np.inf
    assert np.isfinite(dual.leave_one_out(0.0))


def test_negative_eigenvalues_say_by_how_much():
    """A float32 kernel of a smooth function: rounding of 1e-7·λ_max below zero."""
    kernel = rbf(np.linspace(0, 1, 200)[:, None], 1.0).astype(np.float32)
    y = np.random.default_rng(11).normal(size=(200, 1))
    lowest = np.linalg.eigvalsh(kernel.astype(float))[0]
    assert lowest < -1e-7
    dual = DualEigh.factorise(kernel, y, fit_intercept=False)
    with pytest.raises(InputError, match=rf"smallest eigenvalue is {lowest:.3g}.*float32 kernels.*use alpha="):
        dual.solve(-lowest / 2)
    with pytest.raises(InputError, match=rf"smallest eigenvalue is {lowest:.3g}.*float32 kernels.*use alpha="):
        dual_cholesky(kernel, y, -lowest / 2, fit_intercept=False)
    assert dual.gcv(-lowest / 2) == dual.leave_one_out(-lowest / 2) == np.inf
    safe = dual.smallest_alpha
    expected = np.linalg.solve(kernel + safe * np.eye(200), y)
    np.testing.assert_allclose(dual.solve(safe).coefficients, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(
        dual_cholesky(kernel, y, safe, fit_intercept=False).coefficients,
        expected,
        rtol=1e-6,
        atol=1e-6 * np.abs(expected).max(),
    )


def test_what_is_no_kernel_is_refused():
    matrix = np.diag([1.0, -0.5, 2.0])
    dual = DualEigh.factorise(matrix, np.ones((3, 1)), fit_intercept=False)
    for alpha in (0.0, 0.4):
        with pytest.raises(InputError, match=r"smallest eigenvalue is -0.5.*is it a kernel matrix"):
            dual.solve(alpha)
        with pytest.raises(InputError, match=r"smallest eigenvalue is -0.5.*is it a kernel matrix"):
            dual_cholesky(matrix, np.ones((3, 1)), alpha, fit_intercept=False)
    np.testing.assert_allclose(dual.solve(1.0).coefficients[:, 0], [1 / 2, 2.0, 1 / 3])


def test_half_the_memory_in_float32():
    phi, y, _ = case()
    kernel = rbf(phi).astype(np.float32)
    exact = DualEigh.factorise(kernel, y)
    for found in (
        DualEigh.factorise(kernel, y, dtype="float32").solve(0.1),
        dual_cholesky(kernel, y, 0.1, dtype="float32"),
    ):
        np.testing.assert_allclose(found.coefficients, exact.solve(0.1).coefficients, atol=2e-4)
    assert DualEigh.factorise(kernel, y, dtype="float32").vectors.dtype == np.float32
    assert eigh_bytes(20_000, "float32") < 0.51 * eigh_bytes(20_000)
    assert cholesky_bytes(20_000, "float32") < 0.53 * cholesky_bytes(20_000)


def test_state_round_trip():
    phi, y, weights = case()
    dual = DualEigh.factorise(rbf(phi), y, weights)
    twin = DualEigh.from_state(*dual.to_state())
    np.testing.assert_array_equal(twin.solve(0.1).coefficients, dual.solve(0.1).coefficients)
    assert twin.leave_one_out(0.1) == dual.leave_one_out(0.1)
    assert twin.gcv(0.1) == dual.gcv(0.1)


def test_gcv_from_any_solver():
    """`DualProblem.gcv` from solved right-hand sides and a trace equals the spectrum's."""
    phi, y, weights = case()
    kernel = rbf(phi)
    for fit_intercept in (True, False):
        problem = DualProblem.of(y, weights, fit_intercept)
        c = problem.scale[:, None] * kernel * problem.scale + 0.1 * np.eye(len(y))
        solved = np.linalg.solve(c, problem.right_hand_sides())
        trace = float(np.trace(np.linalg.inv(c)[np.ix_(problem.kept, problem.kept)]))
        dual = DualEigh.factorise(kernel, y, weights, fit_intercept)
        assert problem.gcv(solved, trace, 0.1) == pytest.approx(dual.gcv(0.1), rel=1e-9)
        np.testing.assert_allclose(problem.solution(solved, 0.1).coefficients, dual.solve(0.1).coefficients, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": -np.ones(4)}, "weights"),
        ({"weights": np.zeros(4)}, "weights"),
        ({"weights": np.ones(5)}, "must agree"),
        ({"targets": np.ones((3, 1))}, "must agree"),
        ({"targets": np.array([[1.0], [np.nan], [0.0], [0.0]])}, "row 1"),
        ({"kernel": np.full((4, 4), np.nan)}, "row 0 of the kernel matrix has NaN"),
        ({"kernel": np.ones((4, 3))}, "shape"),
        ({"kernel": np.ones((4, 4), np.float16)}, "float32 or float64"),
        ({"dtype": "float16"}, "dtype"),
        ({"alpha": -1.0}, "at least 0"),
        ({"alpha": np.nan}, "alpha"),
    ],
)
def test_bad_input(change, words):
    given = {
        "kernel": np.eye(4),
        "targets": np.ones((4, 1)),
        "alpha": 1.0,
        "weights": None,
        "dtype": "float64",
    } | change
    with pytest.raises(UserError, match=words):
        DualEigh.factorise(given["kernel"], given["targets"], given["weights"], dtype=given["dtype"]).solve(
            given["alpha"]
        )
    with pytest.raises(UserError, match=words):
        dual_cholesky(given["kernel"], given["targets"], given["alpha"], given["weights"], dtype=given["dtype"])


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [True, False])
def test_on_a_gpu_as_on_the_host(weighted):
    phi, y, weights = case()
    weights = weights if weighted else None
    kernel = rbf(phi)
    here, there = (DualEigh.factorise(k, y, weights) for k in (kernel, arrays.to_device(kernel)))
    np.testing.assert_allclose(there.eigenvalues, here.eigenvalues, atol=1e-12)
    np.testing.assert_allclose(there.solve(0.1).coefficients, here.solve(0.1).coefficients, atol=1e-9)
    assert there.leave_one_out(0.1) == pytest.approx(here.leave_one_out(0.1))
    rows = np.flatnonzero(here.problem.scale)[:5]
    np.testing.assert_allclose(there.held_out_errors(rows, 0.1), here.held_out_errors(rows, 0.1), atol=1e-9)
    factor = DualCholesky.factorise(arrays.to_device(kernel), y, 0.1, weights)
    np.testing.assert_allclose(factor.solution().coefficients, here.solve(0.1).coefficients, atol=1e-9)
    np.testing.assert_allclose(factor.scores(), [here.gcv(0.1), here.leave_one_out(0.1)], rtol=1e-8)
    with pytest.raises(InputError, match="not positive definite"):
        dual_cholesky(arrays.to_device(np.diag([1.0, -0.5])), np.ones((2, 1)), 0.1)
