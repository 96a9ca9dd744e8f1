"""Block conjugate gradients against LAPACK: alphas, preconditioners, dependent columns, interruptions, and what cannot be solved."""

import json

import numpy as np
import pytest

from ntkdask import arrays
from ntkdask.errors import InputError
from ntkdask.kernels import NTK
from ntkdask.networks import fully_connected
from ntkdask.solvers.block_krylov import orthonormalise
from ntkdask.solvers.conjugate_gradients import Stopping, conjugate_gradients, conjugate_gradients_bytes
from ntkdask.solvers.conjugate_gradients_state import State
from ntkdask.solvers.dual import DualEigh, DualProblem
from ntkdask.solvers.preconditioners import LowRankPreconditioner, pivoted_cholesky

ALPHAS = [1e-6, 1e-3, 1e-1, 1.0, 1e3]


def rng(seed):
    return np.random.default_rng(seed)


def rbf(x, gamma=0.1):
    squares = (x**2).sum(axis=1)
    return np.exp(-gamma * np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0))


def matrices():
    """Symmetric positive definite, of a kernel with fast decay, of a network, with duplicate rows."""
    x = rng(0).normal(size=(150, 5))
    spd = rng(1).normal(size=(150, 150))
    twice = np.concatenate([x[:120], x[:30]])
    return {"random": spd @ spd.T / 150, "rbf": rbf(x), "ntk": NTK(fully_connected(2))(x), "duplicates": rbf(twice)}


@pytest.fixture(scope="module")
def cases():
    return matrices()


class Counting:
    """A dense operator that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.products = matrix, matrix.shape, 0

    def __matmul__(self, v):
        self.products += 1
        return self.matrix @ v


def solve(matrix, alpha, b):
    return np.linalg.solve(matrix + alpha * np.eye(len(matrix)), b)


def assert_close(found, expected, tolerance=1e-8):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def low_rank(matrix, rank=60, seed=0):
    return LowRankPreconditioner.of(pivoted_cholesky(matrix, rank, seed=seed, block=16))


@pytest.mark.parametrize("name", ["random", "rbf", "ntk", "duplicates"])
@pytest.mark.parametrize("preconditioned", [True, False])
def test_all_alphas_at_once_are_lapack(cases, name, preconditioned):
    """To 1e-8 of LAPACK where the preconditioner makes it well-posed; unaided, and on a singular matrix, down to alpha = 1e-3."""
    matrix, b = cases[name], rng(2).normal(size=(150, 4))
    # at the least alpha of a singular matrix rounding, and so the processor, decides whether 2e-9 is reached
    alphas = ALPHAS if preconditioned and name != "duplicates" else ALPHAS[1:]
    found = conjugate_gradients(
        matrix,
        b,
        alphas,
        preconditioner=low_rank(matrix) if preconditioned else None,
        stopping=Stopping(tolerance=2e-9, max_iterations=2000),
    )
    assert set(found.reasons) == {"converged"}
    assert found.converged.all()
    assert found.solution.shape == (len(alphas), 150, 4)
    for x, alpha, residuals in zip(found.solution, alphas, found.residuals, strict=True):
        assert_close(x, solve(matrix, alpha, b))
        true = np.linalg.norm(b - matrix @ x - alpha * x, axis=0) / np.linalg.norm(b, axis=0)
        np.testing.assert_allclose(residuals, true, rtol=1e-3, atol=1e-11)
        assert (true <= 2e-9).all()


def test_one_product_an_iteration_for_every_alpha_and_column(cases):
    """Shifts share the process: the alphas together take no more products than the hardest of them alone."""
    b = rng(3).normal(size=(150, 4))
    alone = [conjugate_gradients(cases["rbf"], b, a).iterations for a in ALPHAS[1:]]
    operator = Counting(cases["rbf"])
    together = conjugate_gradients(operator, b, ALPHAS[1:])
    assert operator.products == together.iterations
    # another check or two: alphas that finish earlier are checked then, riding along
    assert together.iterations <= max(alone) + 2
    assert together.iterations < sum(alone)


def test_blocks_take_fewer_products_than_columns():
    """RBF, n = 600, 8 columns: 901 products for the slowest column alone against 141 at alpha 1e-3, 113 against 31 at 0.1."""
    x = rng(0).normal(size=(200, 5))
    matrix, b = rbf(x), rng(4).normal(size=(200, 8))
    block = conjugate_gradients(matrix, b, 0.1).iterations
    columns = [conjugate_gradients(matrix, b[:, j], 0.1).iterations for j in range(8)]
    assert block < min(columns) / 2


@pytest.mark.parametrize("alpha", [1e-3, 1e-1, 1.0])
def test_a_preconditioner_reduces_iterations(cases, alpha):
    b = rng(5).normal(size=(150, 2))
    for name in ("rbf", "ntk"):
        bare = conjugate_gradients(cases[name], b, alpha)
        for rank, least in ((20, 1.0), (100, 0.5)):
            helped = conjugate_gradients(cases[name], b, alpha, preconditioner=low_rank(cases[name], rank))
            assert helped.iterations < least * bare.iterations
            assert_close(helped.solution, solve(cases[name], alpha, b), 1e-7)


def test_preconditioned_alphas_share_products(cases):
    b, preconditioner = rng(6).normal(size=(150, 2)), low_rank(cases["rbf"])
    operator = Counting(cases["rbf"])
    together = conjugate_gradients(operator, b, ALPHAS, preconditioner=preconditioner)
    alone = [conjugate_gradients(cases["rbf"], b, a, preconditioner=preconditioner).iterations for a in ALPHAS]
    assert operator.products == together.iterations <= max(alone) + 1


def test_a_start_nearby_saves_iterations(cases):
    b, preconditioner = rng(7).normal(size=(150, 2)), low_rank(cases["rbf"], 30)
    cold = conjugate_gradients(cases["rbf"], b, 0.010, preconditioner=preconditioner)
    near = conjugate_gradients(cases["rbf"], b, 0.0101, preconditioner=preconditioner)
    warm = conjugate_gradients(cases["rbf"], b, 0.010, preconditioner=preconditioner, start=near.solution)
    assert warm.iterations < cold.iterations
    assert_close(warm.solution, cold.solution, 1e-7)
    again = conjugate_gradients(cases["rbf"], b, [0.010, 1.0], start=np.stack([cold.solution, cold.solution]))
    assert_close(again.solution[1], solve(cases["rbf"], 1.0, b), 1e-7)
    done = conjugate_gradients(cases["rbf"], b, 0.010, start=cold.solution)
    assert done.iterations == 1
    np.testing.assert_array_equal(done.solution, cold.solution)


@pytest.mark.parametrize("preconditioned", [True, False])
def test_dependent_zero_and_uneven_columns(cases, preconditioned):
    """One-hot targets sum to the intercept's column; a zero column; a copy; columns of sizes 1e-8 to 1e8."""
    classes = rng(8).integers(0, 3, 150)
    one_hot = np.eye(3)[classes]
    b = np.concatenate(
        [one_hot, np.ones((150, 1)), np.zeros((150, 1)), one_hot[:, :1] * 1e8, one_hot[:, 1:2] * 1e-8], axis=1
    )
    found = conjugate_gradients(
        cases["rbf"],
        b,
        [0.1, 1.0],
        preconditioner=low_rank(cases["rbf"]) if preconditioned else None,
        stopping=Stopping(tolerance=1e-10),
    )
    assert found.converged.all()
    assert not found.solution[:, :, 4].any()
    for x, alpha in zip(found.solution, (0.1, 1.0), strict=True):
        expected = solve(cases["rbf"], alpha, b)
        for j in range(b.shape[1]):
            assert_close(x[:, j], expected[:, j], 1e-8)


def test_all_zero_right_hand_sides(cases):
    found = conjugate_gradients(cases["rbf"], np.zeros((150, 2)), [0.0, 1.0])
    assert found.reasons == ("converged", "converged")
    assert found.iterations == 0
    assert not found.solution.any()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_more_columns_than_rows(n):
    x = rng(9).normal(size=(n, 3))
    b = rng(10).normal(size=(n, 8))
    found = conjugate_gradients(rbf(x), b, [0.0, 0.1, 10.0])
    assert found.converged.all()
    for solution, alpha in zip(found.solution, [0.0, 0.1, 10.0], strict=True):
        assert_close(solution, solve(rbf(x), alpha, b), 1e-7)


def test_shapes_follow_the_request(cases):
    b = rng(11).normal(size=150)
    assert conjugate_gradients(cases["rbf"], b, 1.0).solution.shape == (150,)
    assert conjugate_gradients(cases["rbf"], b[:, None], 1.0).solution.shape == (150, 1)
    assert conjugate_gradients(cases["rbf"], b, [1.0]).solution.shape == (1, 150)
    assert conjugate_gradients(cases["rbf"], b.astype(np.float32), 1.0).solution.dtype == np.float64


def test_kernel_ridge_with_an_intercept(cases):
    """Through `DualProblem`, rows of weight 0 included, against the dense solver."""
    weights = rng(12).uniform(0.5, 2.0, 150) * (rng(13).uniform(size=150) > 0.2)
    y = np.eye(3)[rng(14).integers(0, 3, 150)]
    problem = DualProblem.of(y, weights)
    matrix = problem.scale[:, None] * cases["ntk"] * problem.scale
    found = conjugate_gradients(matrix, problem.right_hand_sides(), 0.1, stopping=Stopping(tolerance=1e-11))
    expected = DualEigh.factorise(cases["ntk"], y, weights).solve(0.1)
    solution = problem.solution(found.solution, 0.1)
    assert_close(solution.coefficients, expected.coefficients)
    np.testing.assert_allclose(solution.intercept, expected.intercept, atol=1e-8)


# --- interruptions ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("at", [1, 7, 12])
def test_resumes_to_the_last_bit(cases, preconditioned, at):
    """Interrupted after a product, written as plain arrays and JSON, read, resumed; checks and restarts fall before and after."""
    b = rng(15).normal(size=(150, 3))
    given = {
        "preconditioner": low_rank(cases["rbf"], 20) if preconditioned else None,
        "stopping": Stopping(tolerance=1e-9, check_every=5),
    }
    expected = conjugate_gradients(cases["rbf"], b, [1e-2, 1.0], **given)
    kept = []

    def keep_and_die(iteration, state):
        if iteration == at:
            arrays, attributes = state.to_state()
            kept.append((arrays, json.dumps(attributes, allow_nan=False)))
        if iteration == at + 2:
            raise Killed

    with pytest.raises(Killed):
        conjugate_gradients(cases["rbf"], b, [1e-2, 1.0], **given, callback=keep_and_die)
    ((arrays, text),) = kept
    operator = Counting(cases["rbf"])
    found = conjugate_gradients(operator, b, [1e-2, 1.0], **given, state=State.from_state(arrays, json.loads(text)))
    assert operator.products == expected.iterations - at
    np.testing.assert_array_equal(found.solution, expected.solution)
    np.testing.assert_array_equal(found.history, expected.history)
    np.testing.assert_array_equal(found.residuals, expected.residuals)
    assert found.reasons == expected.reasons


def test_a_state_of_another_problem_is_refused(cases):
    states = []
    conjugate_gradients(cases["rbf"], np.ones((150, 2)), [1.0], callback=lambda _, s: states.append(s))
    with pytest.raises(InputError, match="Start afresh"):
        conjugate_gradients(cases["rbf"], np.ones((150, 2)), [2.0], state=states[0])
    with pytest.raises(InputError, match="Start afresh"):
        conjugate_gradients(cases["rbf"], np.ones((150, 3)), [1.0], state=states[0])


# --- what does not converge says so -------------------------------------------------------------------------------


def test_iterations_run_out(cases):
    b = rng(16).normal(size=(150, 2))
    found = conjugate_gradients(cases["rbf"], b, [1e-4, 1e3], stopping=Stopping(max_iterations=12))
    assert found.reasons == ("max_iterations=12 reached", "converged")
    assert found.converged.tolist() == [[False, False], [True, True]]
    x = found.solution[0]
    true = np.linalg.norm(b - cases["rbf"] @ x - 1e-4 * x, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(found.residuals[0], true, rtol=1e-6)
    assert found.history.shape == (12, 2)


def test_a_stall_is_reported_and_the_iterate_kept():
    """alpha = 0, two equal rows with different targets: no solution; the residual stays at that of least squares."""
    x = rng(17).normal(size=(40, 3))
    x[5] = x[9]
    b = rng(18).normal(size=(40, 1))
    found = conjugate_gradients(rbf(x, 1.0), b, 0.0, stopping=Stopping(max_iterations=500, check_every=4))
    assert found.reasons[0].startswith("stalled")
    assert found.iterations < 500
    least = abs(b[5, 0] - b[9, 0]) / np.sqrt(2) / np.linalg.norm(b)
    assert least * (1 - 1e-9) <= found.residuals[0, 0] < 1.0
    assert np.isfinite(found.solution).all()


def test_a_tolerance_beyond_rounding_stalls(cases):
    found = conjugate_gradients(
        cases["rbf"],
        rng(19).normal(size=(150, 2)),
        1e-7,
        preconditioner=low_rank(cases["rbf"]),
        stopping=Stopping(tolerance=1e-15, max_iterations=3000),
    )
    assert found.reasons[0].startswith("stalled")
    assert found.iterations < 3000
    assert 1e-15 < found.residuals.max() < 1e-6


def test_not_positive_definite_says_by_how_much():
    values = np.concatenate([[-0.5], np.linspace(0.1, 2.0, 49)])
    q = np.linalg.qr(rng(20).normal(size=(50, 50)))[0]
    matrix = q * values @ q.T
    b = rng(21).normal(size=(50, 2))
    found = conjugate_gradients(matrix, b, [0.3, 1.0], stopping=Stopping(tolerance=1e-10))
    assert found.reasons[1] == "converged"
    assert_close(found.solution[1], solve(matrix, 1.0, b))
    # a Rayleigh quotient lies above the smallest eigenvalue
    assert -0.5 + 0.3 - 1e-9 <= found.curvatures[0] <= 0
    assert np.isnan(found.curvatures[1])
    if found.reasons[0] != "converged":
        assert "not positive definite" in found.reasons[0]
        assert "alpha must exceed" in found.reasons[0]


def test_nan_from_the_operator_keeps_the_iterate(cases):
    class Breaking(Counting):
        def __matmul__(self, v):
            return super().__matmul__(v) * (np.nan if self.products > 60 else 1.0)

    b = rng(22).normal(size=(150, 2))
    found = conjugate_gradients(Breaking(cases["rbf"]), b, 1e-3, stopping=Stopping(check_every=4))
    assert "NaN" in found.reasons[0]
    assert not found.converged.any()
    x = found.solution
    true = np.linalg.norm(b - cases["rbf"] @ x - 1e-3 * x, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(found.residuals[0], true, rtol=1e-3)
    assert (true < 0.1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operator": np.eye(3)}, "do not match"),
        ({"rhs": np.full((4, 1), np.nan)}, "column 0"),
        ({"alphas": [-1.0]}, "alphas"),
        ({"alphas": []}, "alphas"),
        ({"alphas": np.inf}, "alphas"),
        ({"start": np.zeros((3, 1))}, "start"),
        ({"rhs": np.ones((4, 1), np.int64)}, "float32 or float64"),
    ],
)
def test_bad_input(change, words):
    given = {"operator": np.eye(4), "rhs": np.ones((4, 1)), "alphas": 1.0} | change
    with pytest.raises((InputError, TypeError), match=words):
        conjugate_gradients(given.pop("operator"), given.pop("rhs"), given.pop("alphas"), **given)


@pytest.mark.parametrize("change", [{"tolerance": 0.0}, {"max_iterations": 0}, {"patience": 0}, {"check_every": 0}])
def test_bad_stopping(change):
    with pytest.raises(InputError, match=next(iter(change))):
        Stopping(**change)


def test_rank_is_revealed():
    block = rng(23).normal(size=(30, 3)) @ rng(24).normal(size=(3, 6))
    q, factor = orthonormalise(block, 1e-12)
    assert q.shape == (30, 3)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-13)
    np.testing.assert_allclose(q @ factor, block, atol=1e-12)
    assert orthonormalise(np.zeros((5, 2)), 1e-12)[0].shape == (5, 0)


def test_bytes_grow_with_what_is_held():
    shared, apart = (conjugate_gradients_bytes(1000, 3, 4, p) for p in (False, True))
    assert 8 * 1000 * 3 * 4 * 3 < shared < apart


@pytest.mark.gpu
@pytest.mark.parametrize("preconditioned", [True, False])
def test_on_a_gpu_as_on_the_host(cases, preconditioned):
    """Dependent columns included; interrupted and resumed on the device."""
    b = np.concatenate([np.eye(3)[rng(8).integers(0, 3, 150)], np.ones((150, 1))], axis=1)
    matrix, right = arrays.to_device(cases["rbf"]), arrays.to_device(b)
    preconditioner = LowRankPreconditioner.of(pivoted_cholesky(matrix, 40, seed=0)) if preconditioned else None
    states = []
    found = conjugate_gradients(
        matrix, right, [0.01, 1.0], preconditioner=preconditioner, callback=lambda _, s: states.append(s.to_state())
    )
    for x, alpha in zip(arrays.to_host(found.solution), (0.01, 1.0), strict=True):
        assert_close(x, solve(cases["rbf"], alpha, b), 1e-6)
    state = State.from_state(*states[3], device=True)
    again = conjugate_gradients(matrix, right, [0.01, 1.0], preconditioner=preconditioner, state=state)
    assert_close(arrays.to_host(again.solution), arrays.to_host(found.solution), 1e-7)
