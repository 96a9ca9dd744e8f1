"""Stochastic traces against exact ones: over seeds, and exactly where enough steps or probes make them so."""

import numpy as np
import pytest
from scipy.linalg import hadamard

from ntkdask import arrays
from ntkdask.errors import InputError
from ntkdask.solvers.conjugate_gradients import Stopping, conjugate_gradients
from ntkdask.solvers.dual import DualEigh, DualProblem
from ntkdask.solvers.traces import (
    inverse_trace,
    lanczos_quadrature,
    quadrature_bytes,
    sign_probes,
    statistical_dimensions,
    stochastic_scores,
)

ALPHAS = [1e-2, 1.0, 1e2]


def rng(seed):
    return np.random.default_rng(seed)


def rbf(x, gamma=0.1):
    squares = (x**2).sum(axis=1)
    return np.exp(-gamma * np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0))


@pytest.fixture(scope="module")
def matrix():
    return rbf(rng(0).normal(size=(120, 4)))


def exact(matrix, alpha):
    e = np.linalg.eigvalsh(matrix)
    return float(np.sum(e / (e + alpha)))


def test_quadratic_forms_are_exact_with_enough_steps(matrix):
    """Both rules, for functions of the matrix that are known from its spectrum; more steps than rows are no harm."""
    values, vectors = np.linalg.eigh(matrix)
    quadrature = lanczos_quadrature(matrix, n_probes=5, n_steps=500, seed=3)
    squares = (vectors.T @ sign_probes(120, 5, 3)) ** 2
    np.testing.assert_allclose(quadrature.weights.sum(axis=1), 120)
    np.testing.assert_allclose(quadrature.radau_weights.sum(axis=1), 120)
    for function in (np.abs, lambda e: np.maximum(e, 0) / (np.maximum(e, 0) + 0.1), lambda e: np.exp(-e)):
        forms = squares.T @ function(values)
        np.testing.assert_allclose((quadrature.weights * function(quadrature.nodes)).sum(axis=1), forms, rtol=1e-6)
        np.testing.assert_allclose(
            (quadrature.radau_weights * function(quadrature.radau_nodes)).sum(axis=1), forms, rtol=1e-6
        )


@pytest.mark.parametrize("n_steps", [2, 4, 8])
def test_the_rules_lie_on_either_side(matrix, n_steps):
    values, vectors = np.linalg.eigh(matrix)
    quadrature = lanczos_quadrature(matrix, n_probes=6, n_steps=n_steps, seed=1)
    squares = (vectors.T @ sign_probes(120, 6, 1)) ** 2

    def share(e):
        return np.maximum(e, 0) / (np.maximum(e, 0) + 0.1)

    forms = squares.T @ share(values)
    assert ((quadrature.weights * share(quadrature.nodes)).sum(axis=1) > forms).all()
    assert ((quadrature.radau_weights * share(quadrature.radau_nodes)).sum(axis=1) < forms).all()


def test_statistical_dimensions_over_seeds(matrix):
    """The mean over seeds is the exact value, and the spread is what each run says of itself."""
    runs = [statistical_dimensions(matrix, ALPHAS, n_probes=8, n_steps=40, seed=s) for s in range(30)]
    values, errors = (np.array([run[i] for run in runs]) for i in (0, 1))
    truth = np.array([exact(matrix, a) for a in ALPHAS])
    spread = values.std(axis=0, ddof=1)
    assert (np.abs(values.mean(axis=0) - truth) <= 4 * spread / np.sqrt(30) + 1e-6).all()
    assert (np.abs(np.log(errors.mean(axis=0) / spread)) < np.log(2)).all()


def test_an_error_covers_too_few_steps(matrix):
    """At alphas far below λ_max and five steps the rules are far apart, and the error says so."""
    values, errors = statistical_dimensions(matrix, [1e-4, 1e-2], n_probes=16, n_steps=5)
    truth = np.array([exact(matrix, a) for a in (1e-4, 1e-2)])
    assert (np.abs(values - truth) <= 3 * errors).all()
    assert (errors > 1).all()


def test_matrices_of_one_eigenvalue_and_low_rank():
    for matrix, alpha, truth in ((np.eye(9), 1.0, 4.5), (np.zeros((9, 9)), 1.0, 0.0), (np.ones((1, 1)), 3.0, 0.25)):
        values, errors = statistical_dimensions(matrix, [alpha], n_probes=3)
        np.testing.assert_allclose(values, truth, atol=1e-12)
        np.testing.assert_allclose(errors, 0.0, atol=1e-12)
    phi = rng(1).normal(size=(64, 3))
    values, errors = statistical_dimensions(phi @ phi.T, [1e-3], n_probes=64)
    assert abs(values[0] - exact(phi @ phi.T, 1e-3)) <= 4 * errors[0]


def test_float32_noise_below_zero(matrix):
    smooth = rbf(np.linspace(0, 1, 150)[:, None], 1.0).astype(np.float32)
    assert np.linalg.eigvalsh(smooth.astype(float))[0] < 0
    values, errors = statistical_dimensions(smooth, [1e-3, 1.0], n_probes=64)
    for value, error, alpha in zip(values, errors, (1e-3, 1.0), strict=True):
        assert abs(value - exact(smooth.astype(float), alpha)) <= 4 * error + 1e-2


def test_equal_seeds_equal_bits(matrix):
    first, again, other = (statistical_dimensions(matrix, ALPHAS, 4, 10, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    np.testing.assert_array_equal(sign_probes(30, 3, 5), sign_probes(30, 8, 5)[:, :3])


def test_bytes_are_those_of_the_basis():
    assert quadrature_bytes(1000, 4, 30) > 8 * 1000 * 4 * 30
    assert quadrature_bytes(10, 4, 30) == quadrature_bytes(10, 4, 10)


# --- traces of inverses, and GCV ----------------------------------------------------------------------------------


def test_inverse_trace_with_a_complete_set_of_probes():
    """The columns of a Hadamard matrix are signs whose mean is the trace itself."""
    matrix = rbf(rng(2).normal(size=(64, 3))) + 0.5 * np.eye(64)
    probes = hadamard(64).astype(float)
    value, error = inverse_trace(probes, np.linalg.solve(matrix, probes))
    assert value == pytest.approx(np.trace(np.linalg.inv(matrix)), rel=1e-10)
    assert error > 0


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_scores_from_solves(matrix, fit_intercept, weighted):
    """GCV and effective dimension from one block of conjugate gradients, against the eigendecomposition's, over seeds."""
    weights = rng(3).uniform(0.5, 2.0, 120) * (rng(4).uniform(size=120) > 0.25) if weighted else None
    y = rng(5).normal(size=(120, 2))
    dual = DualEigh.factorise(matrix, y, weights, fit_intercept)
    problem = DualProblem.of(y, weights, fit_intercept)
    operator, right = problem.scale[:, None] * matrix * problem.scale, problem.right_hand_sides()
    gcv, dimension = [], []
    for seed in range(12):
        probes = sign_probes(120, 6, seed, weights)
        both = np.concatenate([right, probes], axis=1)
        solved = conjugate_gradients(operator, both, 0.3, stopping=Stopping(tolerance=1e-10)).solution
        scores = stochastic_scores(problem, solved[:, : right.shape[1]], probes, solved[:, right.shape[1] :], 0.3)
        gcv.append((scores.gcv - dual.gcv(0.3)) / scores.gcv_error)
        dimension.append(
            (scores.effective_dimension - dual.effective_dimension(0.3)) / scores.effective_dimension_error
        )
    for standardised in (gcv, dimension):
        # means of 12 draws of a t with 5 degrees of freedom, of variance 5/3
        assert abs(np.mean(standardised)) < 4 * np.sqrt(5 / 3 / 12)
        assert np.std(standardised) > 0.3


def test_bad_input():
    with pytest.raises(InputError, match="n_probes is 1"):
        sign_probes(10, 1)
    with pytest.raises(InputError, match="alpha > 0"):
        statistical_dimensions(np.eye(3), [1.0, 0.0])
    with pytest.raises(InputError, match="shape"):
        statistical_dimensions(np.ones((3, 2)), [1.0])
    with pytest.raises(InputError, match="n_steps"):
        lanczos_quadrature(np.eye(3), n_steps=0)
    with pytest.raises(InputError, match="NaN"):
        statistical_dimensions(np.full((3, 3), np.nan), [1.0])


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_host(matrix):
    here, there = (statistical_dimensions(m, ALPHAS, 4, 30) for m in (matrix, arrays.to_device(matrix)))
    np.testing.assert_allclose(there, here, rtol=1e-6)
