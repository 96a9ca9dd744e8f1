"""Low-rank factors F Fᵀ of a kernel matrix: what they reach for their rank, what they do with matrices that have less."""

import numpy as np
import pytest

from ntkdask import arrays
from ntkdask.errors import InputError
from ntkdask.kernels import NTK
from ntkdask.networks import fully_connected
from ntkdask.solvers.conjugate_gradients import conjugate_gradients
from ntkdask.solvers.preconditioners import (
    LowRankPreconditioner,
    landmark_factor,
    pivoted_cholesky,
    preconditioner_bytes,
    rank_for_bytes,
    sketch_factor,
)


def rng(seed):
    return np.random.default_rng(seed)


def rbf(x, gamma=0.1):
    squares = (x**2).sum(axis=1)
    return np.exp(-gamma * np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0))


def greedy(matrix, rank, seed=0):
    return pivoted_cholesky(matrix, rank, block=16)


def random_pivots(matrix, rank, seed=0):
    return pivoted_cholesky(matrix, rank, seed=seed, block=16)


FACTORS = {"landmarks": landmark_factor, "sketch": sketch_factor, "greedy": greedy, "random": random_pivots}
every_factor = pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS.keys())


class Stored:
    """What `operators.StoredKernel` offers: products, columns, diagonal; counts the columns that were read."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.read = matrix, matrix.shape, []

    def __matmul__(self, v):
        return self.matrix @ v

    def columns(self, indices):
        self.read.append(len(indices))
        return self.matrix[:, indices].astype(float)

    def diagonal(self):
        return np.diagonal(self.matrix).astype(float)


def naive_pivoted_cholesky(matrix, rank):
    """One pivot at a time, the largest of what is left; all in the open."""
    left, columns = matrix.copy(), []
    for _ in range(rank):
        p = int(np.argmax(np.diagonal(left)))
        columns.append(left[:, p] / np.sqrt(left[p, p]))
        left = left - np.outer(columns[-1], columns[-1])
    return np.stack(columns, axis=1)


def naive_random_pivots(matrix, pivots):
    """K_:J K_JJ⁻¹ K_J: what every choice of columns J amounts to."""
    return matrix[:, pivots] @ np.linalg.solve(matrix[np.ix_(pivots, pivots)], matrix[pivots])


@every_factor
@pytest.mark.parametrize("kind", ["rbf", "ntk"])
def test_is_below_the_matrix_and_near_the_best_of_its_rank(factor, kind):
    x = rng(0).normal(size=(150, 4))
    matrix = rbf(x) if kind == "rbf" else NTK(fully_connected(2))(x)
    f = factor(matrix, 50)
    assert f.shape == (150, 50)
    left = matrix - f @ f.T
    assert np.linalg.eigvalsh(left)[0] > -1e-9 * np.trace(matrix)
    best = np.linalg.eigvalsh(matrix)[:-50].sum()
    assert best <= np.trace(left) < 20 * best


@every_factor
def test_full_rank_is_the_matrix(factor):
    matrix = rbf(rng(1).normal(size=(40, 8)), 0.5)
    for rank in (40, 400):
        f = factor(matrix, rank)
        assert f.shape == (40, 40)
        np.testing.assert_allclose(f @ f.T, matrix, atol=1e-9)


@every_factor
def test_duplicates_have_less_rank(factor):
    x = rng(2).normal(size=(20, 5))
    matrix = rbf(np.concatenate([x, x, x]), 0.5)
    f = factor(matrix, 60)
    assert f.shape[1] == 20
    np.testing.assert_allclose(f @ f.T, matrix, atol=1e-8)


@every_factor
def test_rows_scaled_to_zero_stay_zero(factor):
    matrix = rbf(rng(3).normal(size=(50, 3)))
    scale = np.where(np.arange(50) % 3 == 0, 0.0, 1.5)
    matrix = scale[:, None] * matrix * scale
    f = factor(matrix, 25)
    assert np.abs(f[scale == 0]).max() <= 1e-7
    assert np.trace(matrix - f @ f.T) < 0.1 * np.trace(matrix)


@every_factor
def test_zero_matrix_and_one_row(factor):
    f = factor(np.zeros((6, 6)), 3)
    assert f.shape == (6, 0)
    preconditioner = LowRankPreconditioner.of(f)
    np.testing.assert_allclose(preconditioner.solve(np.ones((6, 2)), 2.0), 0.5)
    np.testing.assert_allclose(preconditioner.inverse_root(np.ones((6, 2)), 0.0), 1.0)
    np.testing.assert_allclose(factor(np.array([[4.0]]), 5) ** 2, [[4.0]])


@every_factor
def test_float32_noise_is_no_rank(factor):
    """A matrix of rank 5 in float32: what lies beyond is rounding, and must not blow up."""
    phi = rng(4).normal(size=(60, 5))
    matrix = (phi @ phi.T).astype(np.float32)
    f = factor(matrix, 30)
    assert f.dtype == np.float64
    assert np.abs(matrix - f @ f.T).max() < 1e-4
    found = conjugate_gradients(matrix.astype(float), np.ones((60, 1)), 0.1, preconditioner=LowRankPreconditioner.of(f))
    assert found.reasons == ("converged",)
    assert found.iterations < 15


@every_factor
def test_equal_seeds_equal_bits(factor):
    matrix = rbf(rng(5).normal(size=(50, 3)))
    np.testing.assert_array_equal(factor(matrix, 10, seed=3), factor(matrix, 10, seed=3))
    if factor is not greedy:
        assert not np.array_equal(factor(matrix, 10, seed=3), factor(matrix, 10, seed=4))


def test_greedy_pivots_one_at_a_time_are_the_textbooks():
    matrix = rbf(rng(6).normal(size=(40, 4)))
    matrix *= np.linspace(1, 2, 40)[:, None] * np.linspace(1, 2, 40)  # no ties
    np.testing.assert_allclose(pivoted_cholesky(matrix, 12, block=1), naive_pivoted_cholesky(matrix, 12), atol=1e-10)


def test_random_pivots_span_their_columns():
    """F Fᵀ is the projection onto the columns that were read."""
    matrix = rbf(rng(7).normal(size=(40, 4)))
    operator = Stored(matrix)
    chosen = []
    operator.columns = lambda indices: chosen.extend(indices) or matrix[:, indices].astype(float)
    f = pivoted_cholesky(operator, 12, seed=0, block=5)
    assert len(set(chosen)) == len(chosen) == 12
    np.testing.assert_allclose(f @ f.T, naive_random_pivots(matrix, np.array(chosen)), atol=1e-8)


def test_first_pivot_follows_the_diagonal():
    """Probability ∝ K_ii over seeds: frequencies within four standard deviations."""
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    counts, trials = np.zeros(4), 400
    for seed in range(trials):
        f = pivoted_cholesky(np.diag(weights), 1, seed=seed)
        counts[int(np.argmax(f[:, 0]))] += 1
    p = weights / weights.sum()
    assert counts[3] == 0
    assert (np.abs(counts - trials * p) <= 4 * np.sqrt(trials * p * (1 - p)) + 1e-9).all()


def test_random_pivots_beat_uniform_ones_on_clusters():
    """Many near copies and few others: over seeds, RPCholesky leaves less than uniform landmarks (Chen et al. 2023, §2.5)."""
    x = np.concatenate([rng(8).normal(size=(180, 3)) * 0.01, 4 * rng(9).normal(size=(20, 3))])
    matrix = rbf(x, 0.5)
    left = {
        name: np.mean([np.trace(matrix - f @ f.T) for f in (FACTORS[name](matrix, 20, seed=s) for s in range(8))])
        for name in ("landmarks", "random")
    }
    assert left["random"] < 0.5 * left["landmarks"]


def test_columns_are_fetched_many_at_a_time():
    operator = Stored(rbf(rng(10).normal(size=(100, 6))))
    pivoted_cholesky(operator, 48, seed=0, block=16)
    # a fourth round for what near copies left open
    assert operator.read[:3] == [16, 16, 16]
    assert len(operator.read) <= 5
    operator.read.clear()
    landmark_factor(operator, 30)
    assert operator.read == [30]


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 1.0, 1e3])
def test_powers_of_the_preconditioner(alpha):
    f = rng(11).normal(size=(30, 6)) * np.logspace(0, -3, 6)
    f = np.concatenate([f, f[:, :1]], axis=1)  # a dependent column
    preconditioner = LowRankPreconditioner.of(f)
    assert preconditioner.eigenvalues.shape == (6,)
    x = rng(12).normal(size=(30, 3))
    ridge = alpha or preconditioner.eigenvalues[-1]
    m = f @ f.T + ridge * np.eye(30)
    np.testing.assert_allclose(m @ preconditioner.solve(x, alpha), x, atol=1e-7)
    np.testing.assert_allclose(preconditioner.solve(x[:, 0], alpha), preconditioner.solve(x, alpha)[:, 0], rtol=1e-10)
    np.testing.assert_allclose(preconditioner.inverse_root(preconditioner.root(x, alpha), alpha), x, atol=1e-9)
    np.testing.assert_allclose(preconditioner.root(preconditioner.root(x, alpha), alpha), m @ x, rtol=1e-9, atol=1e-9)


def test_rank_from_a_budget_of_bytes():
    for n_bytes in (0, 100, 10**5, 10**7, 10**12):
        rank = rank_for_bytes(1000, n_bytes)
        assert rank == 0 or preconditioner_bytes(1000, rank) <= n_bytes
        assert rank == 1000 or preconditioner_bytes(1000, rank + 1) > n_bytes
    assert rank_for_bytes(1000, 10**12, most=64) == 64


@every_factor
def test_bad_input(factor):
    with pytest.raises(InputError, match="rank 0"):
        factor(np.eye(3), 0)
    with pytest.raises(InputError, match="shape"):
        factor(np.ones((3, 4)), 2)


@pytest.mark.gpu
@every_factor
def test_on_a_gpu_as_on_the_host(factor):
    matrix = rbf(rng(13).normal(size=(60, 3)))
    here, there = factor(matrix, 20), arrays.to_host(factor(arrays.to_device(matrix), 20))
    np.testing.assert_allclose(there @ there.T, here @ here.T, atol=1e-8)
    assert factor(arrays.to_device(np.zeros((6, 6))), 3).shape == (6, 0)
