"""Gradient flow of infinitely wide networks against matrix exponentials, explicit inverses, an ODE solver and trained ensembles."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from ntkdask import arrays
from ntkdask.errors import DtypeError, InputError
from ntkdask.kernels import both
from ntkdask.networks import fully_connected
from ntkdask.solvers.gradient_flow import GradientFlow, check_times, covariance_block, factorise_bytes, mean_loss_time

TIMES = (0.0, 1e-3, 0.1, 1.0, 30.0, math.inf)
REG = pytest.mark.parametrize("reg", [0.0, 0.3])
PRIOR = pytest.mark.parametrize("kind", ["ntk", "nngp"])


class Problem:
    """Kernels of `n` training and `m` test rows by name, float64: k_dd, k_td, k_tt, theta_dd, theta_td; targets y (n, 2)."""

    def __init__(self, n=12, m=5, d=4, seed=0, depth=2, repeat=0):
        rng = np.random.default_rng(seed)
        train, test = rng.standard_normal((n, d)) / 2, rng.standard_normal((m, d)) / 2
        train[n - repeat :] = train[:repeat]
        self.y = rng.standard_normal((n, 2))
        network = fully_connected(depth, bias_variance=0.1)
        self.k_dd, self.theta_dd = both(network, train)
        self.k_td, self.theta_td = both(network, test, train)
        self.k_tt, self.theta_tt = both(network, test)

    def of(self, kind):
        """(kernel of the flow on train-train, on test-train)."""
        return (self.theta_dd, self.theta_td) if kind == "ntk" else (self.k_dd, self.k_td)

    def flow(self, kind, reg=0.0):
        k_dd = self.k_dd if kind == "ntk" else None
        return GradientFlow.factorise(self.of(kind)[0], k_dd).regularised(reg)

    def predicted(self, kind, reg, times=TIMES):
        """(mean, variance, covariance) of the package."""
        flow, theta_td = self.flow(kind, reg), self.of(kind)[1]
        k_td = self.k_td if kind == "ntk" else None
        return (
            flow.mean(theta_td, self.y, times),
            flow.variance(theta_td, k_td, np.diag(self.k_tt), times),
            flow.covariance(theta_td, k_td, self.k_tt, times),
        )

    def evolved(self, kind, reg, t):
        """(mean (n+m, k), covariance) of (outputs with their trainable number on training rows, outputs on test rows) at time t, by
        the propagator of the linear system d(g − Y)/dt = −(Θ+r)(g − Y), df/dt = −Θ_TD (g − Y): no inverse, no eigenvalue."""
        theta_dd, theta_td = self.of(kind)
        n, m = len(theta_dd), len(theta_td)
        generator = np.zeros((n + m, n + m))
        generator[:n, :n], generator[n:, :n] = theta_dd + reg * np.eye(n), theta_td
        start = np.block([[self.k_dd, self.k_td.T], [self.k_td, self.k_tt]])
        if kind == "nngp":
            start[:n, :n] += reg * np.eye(n)
        propagator = expm(-generator * t)
        mean = propagator @ np.concatenate([-self.y, np.zeros((m, 2))])
        mean[:n] += self.y
        return mean, propagator @ start @ propagator.T


def assert_close(found, expected, tolerance, scale=1.0):
    __tracebackhide__ = True
    assert found.shape == expected.shape
    error = np.abs(found - expected).max()
    assert error <= tolerance * scale, f"{error:.3g} > {tolerance * scale:.3g}"


# --- against other ways to the same numbers -----------------------------------------------------------------------


@REG
@PRIOR
def test_every_time_against_the_propagator(kind, reg):
    problem = Problem()
    times = TIMES[:-1]
    mean, variance, covariance = problem.predicted(kind, reg, times)
    for i, t in enumerate(times):
        expected_mean, expected = problem.evolved(kind, reg, t)
        assert_close(mean[i], expected_mean[12:], 1e-11)
        assert_close(covariance[i], expected[12:, 12:], 1e-11)
        assert_close(variance[i], np.diag(expected)[12:], 1e-11)


@REG
@PRIOR
def test_convergence_against_explicit_inverses(kind, reg):
    """Rasmussen & Williams 2006, eqs. 2.23 and 2.24; Lee et al. 2019, §2.3 at t = ∞."""
    problem = Problem()
    mean, variance, covariance = problem.predicted(kind, reg, math.inf)
    theta_dd, theta_td = problem.of(kind)
    gain = theta_td @ np.linalg.inv(theta_dd + reg * np.eye(12))
    k_td, k_tt = problem.k_td, problem.k_tt
    expected = k_tt - gain @ k_td.T
    if kind == "ntk":
        expected += gain @ problem.k_dd @ gain.T - k_td @ gain.T
    assert_close(mean[0], gain @ problem.y, 1e-10)
    assert_close(covariance[0], expected, 1e-10)
    assert_close(variance[0], np.diag(expected), 1e-10)


def test_the_mean_solves_the_differential_equation():
    problem, t = Problem(), 1.7
    n = 12

    def rate(_, state):
        residual = state.reshape(n + 5, 2)[:n] - problem.y
        return -np.concatenate([problem.theta_dd @ residual, problem.theta_td @ residual]).ravel()

    solved = solve_ivp(rate, (0, t), np.zeros((n + 5) * 2), rtol=1e-9, atol=1e-11).y[:, -1].reshape(n + 5, 2)
    flow = problem.flow("ntk")
    assert_close(flow.mean(problem.theta_td, problem.y, t)[0], solved[n:], 1e-7)
    assert_close(flow.training_mean(slice(None), flow.coefficients(problem.y), [t])[0], solved[:n], 1e-7)


@PRIOR
@REG
def test_an_ensemble_trained_by_gradient_descent(kind, reg):
    """Linear models f = Jθ with random θ₀, trained in their parameters by small steps: sample mean and covariance within 4 sigma."""
    rng = np.random.default_rng(3)
    n, m, k, first, second, members, step, t = 6, 3, 1, 8, 7, 4000, 2e-3, 0.8
    random_part, zero_part = rng.standard_normal((n + m, first)) / 3, rng.standard_normal((n + m, second)) / 3
    y = rng.standard_normal((n, k))
    if kind == "nngp":  # only the random part is trained
        zero_part[:] = 0.0
    noise = math.sqrt(reg) * np.eye(n + m)[:, :n]
    features = np.concatenate([random_part, zero_part, noise], axis=1)
    theta = np.zeros((members, features.shape[1]))
    theta[:, :first] = rng.standard_normal((members, first))
    if kind == "nngp":
        theta[:, -n:] = rng.standard_normal((members, n))
    for _ in range(round(t / step)):
        # Heun's rule: its error, of the order of step², is far below the sampling error
        slope = (theta @ features[:n].T - y[:, 0]) @ features[:n]
        ahead = ((theta - step * slope) @ features[:n].T - y[:, 0]) @ features[:n]
        theta -= step * (slope + ahead) / 2
    found = theta @ features[n:].T
    kernel = random_part @ random_part.T
    tangent = kernel + zero_part @ zero_part.T
    flow = GradientFlow.factorise(tangent[:n, :n], kernel[:n, :n] if kind == "ntk" else None).regularised(reg)
    mean = flow.mean(tangent[n:, :n], y, t)[0, :, 0]
    covariance = flow.covariance(tangent[n:, :n], kernel[n:, :n] if kind == "ntk" else None, kernel[n:, n:], t)[0]
    assert (np.abs(found.mean(axis=0) - mean) <= 4 * found.std(axis=0) / math.sqrt(members)).all()
    products = np.einsum("si,sj->sij", found - mean, found - mean)
    assert (np.abs(products.mean(axis=0) - covariance) <= 4 * products.std(axis=0) / math.sqrt(members)).all()
    assert np.abs(covariance).max() > 0.05  # there was something to compare


@pytest.mark.parametrize("absolute", [True, False])
@PRIOR
def test_neural_tangents_numbers(kind, absolute):
    """Its formulas, with the loss divided by n·k, its learning rate and its relative regularisation, written out anew."""
    problem, t, learning_rate, diag_reg = Problem(), 700.0, 0.3, 1e-2
    theta_dd, theta_td = problem.of(kind)
    reg = diag_reg if absolute else diag_reg * np.trace(theta_dd) / 12
    values, vectors = np.linalg.eigh(theta_dd + reg * np.eye(12))
    decay = np.exp(-values * learning_rate * t / problem.y.size)
    gain = theta_td @ vectors @ np.diag((1 - decay) / values) @ vectors.T
    if kind == "nngp":
        expected = problem.k_tt - theta_td @ vectors @ np.diag((1 - decay**2) / values) @ vectors.T @ theta_td.T
    else:
        cross = gain @ problem.k_td.T
        expected = problem.k_tt + gain @ problem.k_dd @ gain.T - cross - cross.T
    flow = problem.flow(kind).regularised(diag_reg, absolute)
    ours = mean_loss_time(t, 12, 2, learning_rate)
    assert_close(flow.mean(theta_td, problem.y, ours)[0], gain @ problem.y, 1e-11)
    k_td = problem.k_td if kind == "ntk" else None
    assert_close(flow.covariance(theta_td, k_td, problem.k_tt, ours)[0], expected, 1e-11)


# --- limits and properties ----------------------------------------------------------------------------------------


@REG
@PRIOR
def test_before_training_there_is_the_prior(kind, reg):
    problem = Problem()
    mean, variance, covariance = problem.predicted(kind, reg, 0.0)
    assert not mean.any()
    assert np.array_equal(covariance[0], problem.k_tt)
    assert np.array_equal(variance[0], np.diag(problem.k_tt))


@PRIOR
def test_a_long_time_is_convergence(kind):
    problem = Problem()
    for late, last in zip(problem.predicted(kind, 0.2, 1e4), problem.predicted(kind, 0.2, math.inf), strict=True):
        assert_close(late, last, 1e-12)


@REG
@PRIOR
def test_covariances_are_positive_and_uncertainty_shrinks_for_the_posterior(kind, reg):
    _, variance, covariance = Problem(n=30, m=8).predicted(kind, reg)
    for matrix in covariance:
        assert np.allclose(matrix, matrix.T, rtol=0, atol=1e-12)
        assert np.linalg.eigvalsh(matrix).min() >= -1e-10
    assert_close(variance, np.einsum("tii->ti", covariance), 1e-12)
    if kind == "nngp":
        assert (np.diff(variance, axis=0) <= 1e-12).all()


@REG
@PRIOR
def test_training_rows_are_test_rows(kind, reg):
    """Where r > 0 too: the outputs without the trainable number."""
    problem = Problem()
    flow, theta_dd = problem.flow(kind, reg), problem.of(kind)[0]
    k_dd = problem.k_dd if kind == "ntk" else None
    q, rows = flow.coefficients(problem.y), slice(3, 9)
    mean = flow.training_mean(rows, q, TIMES)
    pairs = [flow.training_factors(rows, t) for t in TIMES]
    covariance = np.stack([covariance_block(0.0, pair, pair) for pair in pairs])
    assert_close(mean, flow.mean(theta_dd, problem.y, TIMES)[:, rows], 1e-11)
    assert_close(covariance, flow.covariance(theta_dd, k_dd, problem.k_dd, TIMES)[:, rows, rows], 1e-11)
    assert_close(flow.variance_of(pairs, 0.0), np.einsum("tii->ti", covariance), 1e-12)
    if reg == 0.0:
        assert_close(mean[-1], problem.y[rows], 1e-11)
        assert_close(covariance[-1], np.zeros((6, 6)), 1e-14)


def test_any_blocks_of_training_rows():
    problem = Problem()
    flow = problem.flow("ntk")
    whole = flow.project(problem.theta_td)
    parts = sum(flow.project(problem.theta_td[:, s : s + 5], s) for s in range(0, 12, 5))
    assert_close(parts, whole, 1e-13)


def test_covariance_blocks_make_the_covariance():
    problem = Problem(m=7)
    flow = problem.flow("ntk", 0.1)
    z, w = flow.project(problem.theta_td), flow.project(problem.k_td)
    whole = flow.covariance(problem.theta_td, problem.k_td, problem.k_tt, 0.7)[0]
    left, right = flow.factors(z[:4], w[:4], 0.7), flow.factors(z[4:], w[4:], 0.7)
    assert_close(covariance_block(problem.k_tt[:4, 4:], left, right), whole[:4, 4:], 1e-13)


@PRIOR
def test_one_row(kind):
    problem = Problem(n=1, m=1)
    mean, variance, _ = problem.predicted(kind, 0.0, (0.5, math.inf))
    theta_dd, theta_td = (float(a[0, 0]) for a in problem.of(kind))
    gains = theta_td * np.array([(1 - math.exp(-theta_dd / 2)) / theta_dd, 1 / theta_dd])
    assert_close(mean[:, 0], gains[:, None] * problem.y[0], 1e-13)
    rate = np.array([1 - math.exp(-theta_dd), 1.0]) if kind == "nngp" else None
    k, c = float(problem.k_dd[0, 0]), float(problem.k_td[0, 0])
    expected = c**2 * rate / k if rate is not None else 2 * gains * c - gains**2 * k
    assert_close(variance[:, 0], problem.k_tt[0, 0] - expected, 1e-13)


@pytest.mark.parametrize("y", [np.arange(12.0), np.arange(12)])
def test_targets_of_one_axis_and_integers(y):
    problem = Problem()
    mean = problem.flow("ntk").mean(problem.theta_td, y, 1.0)
    assert mean.shape == (1, 5, 1)
    assert_close(mean, problem.flow("ntk").mean(problem.theta_td, y[:, None].astype(float), 1.0), 0.0)


@PRIOR
def test_float32_in_float32_out(kind):
    problem, single = Problem(n=40), Problem(n=40)
    for name in ("k_dd", "k_td", "k_tt", "theta_dd", "theta_td"):
        setattr(single, name, getattr(problem, name).astype(np.float32))
    for found, expected in zip(single.predicted(kind, 0.01), problem.predicted(kind, 0.01), strict=True):
        assert found.dtype == np.float32
        # entries rounded by 6e-8 of about 1, divided by the regularisation 0.01
        assert_close(found, expected, 1e-4)


# --- singular kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_duplicates_with_different_targets_settle_on_their_mean(dtype):
    """The flow's limit for a network: duplicate rows move together; nothing is amplified, whatever the rounding."""
    problem, plain = Problem(n=12, repeat=3), Problem(n=12, repeat=3)
    for name in ("k_dd", "theta_dd", "theta_td", "k_td"):
        setattr(problem, name, getattr(problem, name).astype(dtype))
    flow = problem.flow("ntk")
    assert int(flow.null.sum()) == 3
    merged = plain.y[:9].copy()
    merged[:3] = (plain.y[:3] + plain.y[9:]) / 2
    # three rows carry double weight, which at convergence does not matter
    expected = plain.theta_td[:, :9] @ np.linalg.solve(plain.theta_dd[:9, :9], merged)
    mean = flow.mean(problem.theta_td, problem.y, (1e5, 1e12, math.inf))
    tolerance = {"float64": 1e-9, "float32": 2e-3}[dtype]
    assert_close(mean[2], expected, tolerance)
    assert_close(mean[1], expected, tolerance)
    trained = flow.training_mean(slice(None), flow.coefficients(problem.y), [math.inf])[0]
    assert_close(trained[:9], merged, tolerance)
    assert_close(trained[9:], merged[:3], tolerance)
    share = ((plain.y[:3] - plain.y[9:]) ** 2).sum() / 2 / (plain.y**2).sum()
    assert flow.unlearned(flow.coefficients(problem.y)) == pytest.approx(share, rel=1e-2)


def test_a_posterior_with_contradictory_targets_is_refused_and_names_the_rows():
    problem = Problem(n=12, repeat=2)
    flow = problem.flow("nngp")
    with pytest.raises(InputError, match=r"singular to rounding \(2 of 12.*rows 0,.* 10;.*diag_reg >= ") as caught:
        flow.mean(problem.k_td, problem.y, (1.0, math.inf))
    advised = float(str(caught.value).split("diag_reg >= ")[1].split(",")[0])
    assert np.isfinite(flow.regularised(advised).mean(problem.k_td, problem.y, math.inf)).all()
    assert np.isfinite(flow.mean(problem.k_td, problem.y, 10.0)).all()


@PRIOR
def test_duplicates_with_equal_targets_change_nothing(kind):
    problem = Problem(n=12, repeat=3)
    problem.y[9:] = problem.y[:3]
    mean, variance, _ = problem.predicted(kind, 0.0, math.inf)
    for name in ("k_dd", "theta_dd"):
        setattr(problem, name, getattr(problem, name)[:9, :9])
    problem.k_td, problem.theta_td, problem.y = problem.k_td[:, :9], problem.theta_td[:, :9], problem.y[:9]
    expected_mean, expected_variance, _ = problem.predicted(kind, 0.0, math.inf)
    assert_close(mean, expected_mean, 1e-9)
    assert_close(variance, expected_variance, 1e-9)


def test_a_zero_kernel_never_learns():
    flow = GradientFlow.factorise(np.zeros((3, 3)), np.zeros((3, 3)))
    y = np.ones((3, 1))
    assert not flow.mean(np.zeros((2, 3)), y, (0.0, 1.0, math.inf)).any()
    assert np.array_equal(flow.variance(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2), math.inf), np.ones((1, 2)))
    assert flow.unlearned(flow.coefficients(y)) == 1.0
    assert flow.unlearned(np.zeros((3, 1))) == 0.0
    with pytest.raises(InputError, match="diag_reg >= 1e-06"):
        GradientFlow.factorise(np.zeros((3, 3))).mean(np.zeros((2, 3)), y, math.inf)


def test_negative_eigenvalues_of_rounding_are_noise():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    flow = GradientFlow.factorise(u * [-2e-6, -1e-9, 1e-6, 1e-3, 1.0, 2.0] @ u.T)
    assert flow.noise == pytest.approx(2e-6)
    assert (flow.eigenvalues >= 0).all()
    # 1e-6 lies below what is known to be noise
    assert flow.null.tolist() == [True, True, True, False, False, False]
    assert not flow.regularised(1e-5).null.any()


# --- storage, memory, errors --------------------------------------------------------------------------------------


@PRIOR
def test_a_state_brings_the_flow_back(kind):
    problem = Problem()
    flow = problem.flow(kind)
    arrays, attributes = flow.to_state()
    again = GradientFlow.from_state(arrays, attributes).regularised(0.2)
    theta_td = problem.of(kind)[1]
    expected = flow.regularised(0.2).mean(theta_td, problem.y, TIMES)
    assert again.mean(theta_td, problem.y, TIMES).tobytes() == expected.tobytes()


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_memory_is_what_was_planned(with_prior, overwrite):
    n = 500
    x = np.random.default_rng(0).standard_normal((n, 20))
    k, theta = both(fully_connected(1), x)
    kept = theta.copy()
    tracemalloc.start()
    theta = theta.copy()
    prior = k.copy() if with_prior else None
    try:
        flow = GradientFlow.factorise(theta, prior, overwrite=overwrite)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= factorise_bytes(n, with_prior) + (0 if overwrite else 8 * n * n) + 2**20
    assert_close(flow.modes.T * flow.eigenvalues @ flow.modes, kept, 1e-10)
    assert overwrite or np.array_equal(theta, kept)
    assert prior is None or np.array_equal(prior, k)


@pytest.mark.parametrize("times", [-1.0, math.nan, (), (1.0, -1e-9), [[1.0, math.nan]]])
def test_times_that_are_none(times):
    with pytest.raises(InputError, match=r"times are .*math\.inf"):
        check_times(times)


@pytest.mark.parametrize("reg", [-1e-3, math.nan, math.inf])
def test_a_regularisation_that_is_none(reg):
    with pytest.raises(InputError, match="diag_reg is"):
        Problem().flow("ntk").regularised(reg)


def with_nan(a):
    a = np.array(a, float)
    a[2] = np.nan
    return a


@pytest.mark.parametrize(
    ("theta_dd", "k_dd", "words"),
    [
        (np.ones((3, 2)), None, r"theta_dd has shape \(3, 2\); expected \(n, n\)"),
        (np.ones((0, 0)), None, "n >= 1"),
        (with_nan(np.eye(4)), None, "theta_dd has NaN or infinite values in row 2"),
        (np.eye(4), with_nan(np.eye(4)), "k_dd has NaN or infinite values in row 2"),
        (np.eye(4), np.eye(3), r"theta_dd has shape \(4, 4\) and k_dd \(3, 3\)"),
        (np.diag([1.0, -0.1]), None, "not positive semi-definite.*-0.1 to 1"),
        (-np.eye(2), None, "not positive semi-definite"),
    ],
)
def test_matrices_that_are_no_kernels(theta_dd, k_dd, words):
    with pytest.raises(InputError, match=words):
        GradientFlow.factorise(theta_dd, k_dd)


def test_integers_are_no_kernel():
    with pytest.raises(DtypeError, match="float32 or float64"):
        GradientFlow.factorise(np.eye(2, dtype=int))


def test_test_blocks_that_do_not_fit():
    problem = Problem()
    flow = problem.flow("ntk")
    with pytest.raises(InputError, match=r"shape \(5, 11\); expected \(m, 12\)"):
        flow.mean(problem.theta_td[:, :11], problem.y, 1.0)
    with pytest.raises(InputError, match=r"shape \(5, 12\) from training row 3"):
        flow.project(problem.theta_td, 3)
    with pytest.raises(InputError, match=r"targets have shape \(11, 2\)"):
        flow.mean(problem.theta_td, problem.y[:11], 1.0)
    with pytest.raises(InputError, match="targets has NaN or infinite values in row 2"):
        flow.mean(problem.theta_td, with_nan(problem.y), 1.0)
    with pytest.raises(InputError, match="k_td is the NNGP"):
        flow.variance(problem.theta_td, None, np.diag(problem.k_tt), 1.0)
    with pytest.raises(InputError, match="k_td is the NNGP"):
        problem.flow("nngp").covariance(problem.k_td, problem.k_td, problem.k_tt, 1.0)
    with pytest.raises(InputError, match=r"theta_td has shape \(5, 12\) and k_td \(4, 12\)"):
        flow.variance(problem.theta_td, problem.k_td[:4], np.diag(problem.k_tt), 1.0)


@pytest.mark.gpu
@REG
@PRIOR
def test_on_a_gpu_as_on_the_host(kind, reg):
    problem, there = Problem(n=30, repeat=2), Problem(n=30, repeat=2)
    for name in ("k_dd", "k_td", "k_tt", "theta_dd", "theta_td", "y"):
        setattr(there, name, arrays.to_device(getattr(problem, name)))
    flow, theta_td = there.flow(kind, reg), there.of(kind)[1]
    k_td, times = there.k_td if kind == "ntk" else None, TIMES[:-1]
    assert_close(arrays.to_host(flow.mean(theta_td, there.y, times)), problem.predicted(kind, reg, times)[0], 1e-10)
    covariance = arrays.to_host(flow.covariance(theta_td, k_td, there.k_tt, times))
    assert_close(covariance, problem.predicted(kind, reg, times)[2], 1e-10)
    again = GradientFlow.from_state(*flow.to_state(), device=True).regularised(reg)
    trained = arrays.to_host(again.training_mean(slice(2, 9), again.coefficients(there.y), times))
    here = problem.flow(kind, reg)
    assert_close(trained, here.training_mean(slice(2, 9), here.coefficients(problem.y), times), 1e-10)
