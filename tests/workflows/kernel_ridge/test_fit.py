"""Kernel ridge on the rows' own tiles: every solver against the bordered system, brute-force scores, what is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from job_examples import ONE_THREAD, Counter, Killed, regression_data, site_of, sited, stored
from sklearn.kernel_ridge import KernelRidge

from ntkdask.cache import shared
from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import InputError
from ntkdask.execution.progress import Record
from ntkdask.kernels import NTK, RBF
from ntkdask.matrices.operator import StoredKernel
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import parse_steps
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.solvers.conjugate_gradients import Solved
from ntkdask.solvers.traces import inverse_trace, sign_probes
from ntkdask.states import load_state, save_state
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_ridge import systems as dual_systems
from ntkdask.workflows.kernel_ridge.fit import fit_kernel_ridge
from ntkdask.workflows.kernel_ridge.options import PROBES, KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.kernel_ridge.plan import KernelShape, plan_kernel_ridge
from ntkdask.workflows.model import KernelRidgeModel, load_model
from ntkdask.workflows.predict import predict
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge
from ntkdask.workflows.selection import SELECTION_SCORES
from ntkdask.workflows.split import state_of

N, ALPHAS = 83, (1e-3, 0.1, 10.0)
KERNEL = RBF(0.5)
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, 3))
Y = np.sin(X @ RNG.normal(size=(3, 2))) + 0.3 * RNG.normal(size=(N, 2)) + 2.0
WEIGHTS = RNG.uniform(0.2, 2.0, N)
WEIGHTS[[0, 17, N - 1]] = 0.0
GROUPS = RNG.integers(0, 3, N).astype(np.int16)
SOLVERS = ("eigh", "cholesky", "tiled_cholesky", "cg")
STORED = [
    ("eigh", "loop"),
    ("cholesky", "loop"),
    ("tiled_cholesky", "loop"),
    ("cg", "loop"),
    ("eigh", "cluster"),
    ("cholesky", "cluster"),
    ("tiled_cholesky", "cluster"),
    ("cg", "cluster"),
]
PLACES = [("eigh", "memory"), ("cholesky", "memory"), ("cg", "memory"), *STORED]


def options(solver, alphas=(0.1,), **keywords):
    return KernelRidgeOptions(alphas, solver=solver, **{"tolerance": 1e-12, "selection": "auto", **keywords})


def plan_of(choices, n=N, k=2, tile=45, rank=20, dtype="float64", batch_rows=30, **changes):
    """Ragged tiles, and a preconditioner of so low a rank that gradients iterate."""
    plan = plan_kernel_ridge(
        KernelShape(n, n, (3,), 24, k, 1, 3),
        KERNEL,
        choices,
        (),
        plan=Plan(tile_cols=tile, dtype=dtype),
        resources=ONE_THREAD,
    )
    return replace(plan, rank=rank, batch_rows=batch_rows, tile_rows=30, **{"cache_bytes": 2**30, **changes})


def fitted(
    choices, place, folder, client, *, x=X, y=Y, weights=None, groups=None, kernel=KERNEL, plan=None, **keywords
):
    """fit_kernel_ridge here in memory, here with tiles, or with tiles on a cluster; groups: part of every row, dealt to 0, 1, ..."""
    parts = () if groups is None else tuple((int(g),) for g in np.unique(groups))
    plan = plan or plan_of(choices, len(x), y.shape[1] if y.ndim == 2 else 1)
    if place == "memory":
        rows = MemoryRows(x, y, weights, groups)
        return fit_kernel_ridge(rows, parts, choices, plan, kernel=kernel, **sited(keywords))
    data = stored(folder, x, y, f"{len(list(folder.iterdir()))}.zarr", weights=weights)
    parts_url = None if groups is None else save_state(folder / "parts", state_of(groups))
    return fit_kernel_ridge(
        DatasetRows(data.url, parts_url, digest=data.digest),
        parts,
        choices,
        plan,
        kernel=kernel,
        **sited({"url": folder / "run", "client": client if place == "cluster" else None} | keywords),
    )


def naive(kernel, y, alpha, weights=None, intercept=True):
    """(coefficients (n, k), intercept (k,)): the weighted problem with a free intercept, as one bordered dense system."""
    y = y.reshape(len(y), -1)
    s = np.sqrt(np.ones(len(y)) if weights is None else weights)
    n = len(y)
    matrix = np.zeros((n + 1, n + 1))
    matrix[:n, :n] = s[:, None] * kernel * s + alpha * np.eye(n)
    matrix[:n, n] = matrix[n, :n] = s
    right = np.concatenate([s[:, None] * y, np.zeros((1, y.shape[1]))])
    if not intercept:
        matrix, right = matrix[:n, :n], right[:n]
    solved = np.linalg.solve(matrix, right)
    return s[:, None] * solved[:n], solved[n] if intercept else np.zeros(y.shape[1])


def assert_equals_naive(model: KernelRidgeModel, kernel, y, alpha, weights=None, intercept=True, rtol=1e-8):
    coefficients, b = naive(kernel, y, alpha, weights, intercept)
    np.testing.assert_allclose(model.coefficients, coefficients, atol=rtol * np.abs(coefficients).max() + 1e-14, rtol=0)
    np.testing.assert_allclose(model.intercept, b, rtol=rtol, atol=rtol)


# every solver against one dense system


@pytest.mark.parametrize(("solver", "place"), PLACES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("intercept", [True, False])
def test_against_the_bordered_system(tmp_path, client, solver, place, weights, intercept):
    fit = fitted(options(solver, fit_intercept=intercept), place, tmp_path, client, weights=weights)
    assert_equals_naive(fit.model, KERNEL(X), Y, 0.1, weights, intercept)
    probe = X[:7] + 0.1
    found = predict(
        fit.model if place == "memory" else fit.url, MemoryRows(probe), plan_of(options(solver)), 2, site_of()
    )
    coefficients, b = naive(KERNEL(X), Y, 0.1, weights, intercept)
    np.testing.assert_allclose(found, KERNEL(probe, X) @ coefficients + b, rtol=1e-8)
    assert fit.path == []
    assert fit.facts["solver"] == solver
    if solver == "cg":
        (solve,) = fit.facts["solves"]
        assert solve["converged"]
        assert solve["residual"] <= 1e-12
        assert solve["iterations"] > 3


@pytest.mark.parametrize("solver", ["tiled_cholesky", "cg"])
def test_loop_and_cluster_give_the_same_bits(tmp_path, client, solver):
    fits = []
    for place in ("loop", "cluster"):
        (tmp_path / place).mkdir()
        fits.append(
            fitted(
                options(solver, ALPHAS, selection="holdout"),
                place,
                tmp_path / place,
                client,
                groups=GROUPS,
                weights=WEIGHTS,
            )
        )
    one, two = fits
    np.testing.assert_array_equal(one.model.coefficients, two.model.coefficients)
    np.testing.assert_array_equal(one.model.intercept, two.model.intercept)
    assert one.path == two.path


@pytest.mark.parametrize("tile", [1, 3, 9, 500])
@pytest.mark.parametrize("solver", SOLVERS)
def test_tiles_of_any_size(tmp_path, solver, tile):
    x, y = X[:10], Y[:10]
    plan = plan_of(options(solver), 10, tile=tile, rank=4)
    fit = fitted(options(solver), "loop", tmp_path, None, x=x, y=y, plan=plan)
    assert_equals_naive(fit.model, KERNEL(x), y, 0.1)
    store = TileStore.open(tmp_path / "run" / "kernel")
    assert store.tile_shape == (min(tile, 10),) * 2
    assert store.pending() == []


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_few_rows(tmp_path, solver, n):
    fit = fitted(options(solver), "loop", tmp_path, None, x=X[:n], y=Y[:n], plan=plan_of(options(solver), n, rank=1))
    assert_equals_naive(fit.model, KERNEL(X[:n]), Y[:n], 0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_classes_are_zero_mean_one_hot(tmp_path, solver):
    labels = np.arange(N) % 3
    fit = fitted(options(solver), "loop", tmp_path, None, y=labels, plan=plan_of(options(solver), k=3), n_classes=3)
    assert_equals_naive(fit.model, KERNEL(X), encode_targets(labels, 3, "float64"), 0.1)
    assert fit.model.n_classes == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_tiles(tmp_path, solver):
    """The matrix is stored in float32, everything after it is float64: the solution of the stored matrix."""
    choices = options(solver)
    fit = fitted(choices, "loop", tmp_path, None, plan=plan_of(choices, dtype="float32"))
    kernel = TileStore.open(tmp_path / "run" / "kernel")
    assert kernel.dtype == "float32"
    single = KERNEL(X.astype(np.float32)).astype(float)
    assert_equals_naive(fit.model, single, Y, 0.1, rtol=1e-5)
    assert_equals_naive(fit.model, KERNEL(X), Y, 0.1, rtol=1e-4)


def test_preprocessing_and_groups_order_the_rows(tmp_path):
    """Coefficients follow the gathered rows: group after group, standardised by the training rows."""
    fit = fitted(
        options("eigh", ALPHAS, selection="kfold"),
        "loop",
        tmp_path,
        None,
        groups=GROUPS,
        steps=parse_steps(["standardize"]),
    )
    order = np.argsort(GROUPS, kind="stable")
    x = ((X - X.mean(axis=0)) / X.std(axis=0))[order]
    np.testing.assert_allclose(fit.model.points.rows(0, N), x, rtol=1e-12, atol=1e-12)
    assert_equals_naive(fit.model, KERNEL(x), Y[order], fit.model.alpha)


# against other implementations


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_a_linear_kernel_is_ridge_on_the_rows(tmp_path, solver, weights):
    """NTK(Dense) = ⟨x, z⟩: the same predictions and scores as the primal, whatever the solver."""
    linear, selection = NTK(fully_connected(1, "identity", normalize=False)), "kfold"
    np.testing.assert_allclose(linear(X), 2 * X @ X.T, rtol=1e-12)
    alphas = tuple(2 * a for a in ALPHAS)
    groups = np.where(WEIGHTS > 0, GROUPS, 0).astype(np.int16)
    fit = fitted(
        options(solver, alphas, selection=selection),
        "loop",
        tmp_path,
        None,
        kernel=linear,
        weights=weights,
        groups=groups,
        plan=plan_of(options(solver), rank=2),
    )
    plan = plan_of(options(solver))
    primal = fit_ridge(
        MemoryRows(X, Y, weights, groups),
        [(0,), (1,), (2,)],
        RidgeOptions(ALPHAS, selection=selection),
        plan,
        features=None,
        k=2,
    )
    assert fit.model.alpha == 2 * primal.model.alpha
    np.testing.assert_allclose([row["score"] for row in fit.path], [row["score"] for row in primal.path], rtol=1e-7)
    expected = predict(primal.model, MemoryRows(X), plan, 2, site_of())
    np.testing.assert_allclose(predict(fit.url, MemoryRows(X), plan, 2, site_of()), expected, rtol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scikit_learns_kernel_ridge(tmp_path, solver):
    fit = fitted(options(solver, fit_intercept=False), "loop", tmp_path, None, weights=WEIGHTS)
    theirs = KernelRidge(alpha=0.1, kernel="precomputed").fit(KERNEL(X), Y, WEIGHTS)
    np.testing.assert_allclose(fit.model.coefficients, theirs.dual_coef_, atol=1e-8)


# scores, by fits that never saw the rows


def refits(alpha, held, weights=None):
    """Mean squared error per target and unit of weight on each group of rows in turn, from a fit without it; their mean."""
    w = np.ones(N) if weights is None else weights
    errors = []
    for rows in held:
        rest = np.setdiff1d(np.arange(N), rows)
        coefficients, b = naive(KERNEL(X[rest]), Y[rest], alpha, w[rest])
        error = Y[rows] - KERNEL(X[rows], X[rest]) @ coefficients - b
        errors.append(np.average((error**2).mean(axis=1), weights=w[rows]))
    return np.mean(errors)


def hat_matrix(alpha, weights=None):
    coefficients, b = naive(KERNEL(X), np.eye(N), alpha, weights)
    return KERNEL(X) @ coefficients + b


def exact_gcv(alpha, weights=None):
    """n·Σw(y − Hy)²/(n − tr H)² over the rows of positive weight."""
    w = np.ones(N) if weights is None else weights
    hat = hat_matrix(alpha, weights)
    residual = (w[:, None] * (Y - hat @ Y) ** 2).sum(axis=0).mean()
    n = (w > 0).sum()
    return n * residual / (n - np.trace(hat)) ** 2


def assert_path(fit, expected, rtol=1e-6):
    assert [row["alpha"] for row in fit.path] == list(ALPHAS)
    np.testing.assert_allclose([row["score"] for row in fit.path], expected, rtol=rtol)
    assert fit.model.alpha == ALPHAS[int(np.argmin(expected))]


@pytest.mark.parametrize(
    ("solver", "place", "weights"),
    [(solver, "memory", w) for solver in ("eigh", "cholesky", "cg") for w in (None, WEIGHTS)]
    + [(solver, "loop", WEIGHTS) for solver in SOLVERS],
    ids=lambda v: v if isinstance(v, str) else "unweighted" if v is None else "weighted",
)
@pytest.mark.parametrize("selection", ["kfold", "holdout"])
def test_folds_and_holdout_are_refits(tmp_path, client, solver, place, selection, weights):
    groups = GROUPS if selection == "kfold" else (GROUPS == 2).astype(np.int16)
    fit = fitted(options(solver, ALPHAS, selection=selection), place, tmp_path, client, weights=weights, groups=groups)
    held = [np.flatnonzero(groups == g) for g in ((0, 1, 2) if selection == "kfold" else (1,))]
    assert_path(fit, [refits(a, held, weights) for a in ALPHAS])
    order = np.argsort(groups, kind="stable")
    assert_equals_naive(
        fit.model, KERNEL(X[order]), Y[order], fit.model.alpha, None if weights is None else weights[order]
    )
    assert fit.score_name == SELECTION_SCORES[selection]


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_leave_one_out_and_gcv_are_exact(tmp_path, solver, weights):
    w = np.ones(N) if weights is None else weights
    fit = fitted(options(solver, ALPHAS, selection="loo"), "memory", tmp_path, None, weights=weights)
    kept = np.flatnonzero(w > 0)
    one_by_one = [sum(w[i] * refits(a, [[i]], weights) for i in kept) / w.sum() for a in ALPHAS]
    assert_path(fit, one_by_one)
    fit = fitted(options(solver, ALPHAS, selection="gcv"), "memory", tmp_path, None, weights=weights)
    assert_path(fit, [exact_gcv(a, weights) for a in ALPHAS])
    if solver == "eigh":
        np.testing.assert_allclose(
            [row["effective_dimension"] for row in fit.path],
            [np.trace(hat_matrix(a, weights)) for a in ALPHAS],
            rtol=1e-7,
        )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_stochastic_gcv(tmp_path, client, weights):
    """Equal for both out-of-core solvers, in every place; near the exact one by as much as its standard error says."""
    found = {}
    for solver, place in (("tiled_cholesky", "loop"), ("cg", "loop"), ("cg", "cluster"), ("cg", "memory")):
        folder = tmp_path / f"{solver}-{place}"
        folder.mkdir()
        fit = found[solver, place] = fitted(
            options(solver, ALPHAS, selection="gcv"), place, folder, client, weights=weights
        )
        assert fit.score_name == "GCV"
        assert_equals_naive(fit.model, KERNEL(X), Y, fit.model.alpha, weights)
    first = found["tiled_cholesky", "loop"]
    for fit in found.values():
        np.testing.assert_allclose([r["score"] for r in fit.path], [r["score"] for r in first.path], rtol=1e-7)
        assert fit.model.alpha == first.model.alpha
    s = np.sqrt(np.ones(N) if weights is None else weights)
    probes = sign_probes(N, PROBES, 0, weights)
    for alpha, solve in zip(ALPHAS, first.facts["solves"], strict=True):
        inverse = np.linalg.inv(s[:, None] * KERNEL(X) * s + alpha * np.eye(N))
        exact = np.trace(inverse[np.ix_(s > 0, s > 0)])
        assert solve["alpha"] == alpha
        assert abs(solve["inverse_trace"] - exact) <= 4 * solve["trace_error"]
        np.testing.assert_allclose(
            inverse_trace(probes, inverse @ probes), (solve["inverse_trace"], solve["trace_error"]), rtol=1e-6
        )


def test_an_infinite_score_is_never_chosen(tmp_path):
    """GCV at alpha=0 with an invertible matrix interpolates: infinite, so another alpha wins."""
    fit = fitted(options("eigh", (0.0, 0.1), selection="gcv"), "memory", tmp_path, None)
    assert fit.path[0]["score"] == np.inf
    assert fit.model.alpha == 0.1
    with pytest.raises(InputError, match="no alpha has a finite score"):
        fitted(options("eigh", (0.0, 0.0), selection="gcv"), "memory", tmp_path, None)


def test_groups_without_rows_or_weight_are_named(tmp_path):
    weights = np.where(GROUPS == 1, 0.0, 1.0)
    for solver, place in (("eigh", "memory"), ("cg", "loop")):
        with pytest.raises(InputError, match="fold 1 has no rows"):
            fitted(options(solver, ALPHAS, selection="kfold"), place, tmp_path, None, weights=weights, groups=GROUPS)


# singular, indefinite, not converging


def duplicates(differ=0.0):
    x, y = X.copy(), Y.copy()
    x[30], y[30] = x[4], y[4] + differ
    return x, y


def test_duplicates_at_alpha_zero_have_a_solution_of_minimum_norm(tmp_path):
    x, y = duplicates()
    fit = fitted(options("eigh", (0.0,)), "loop", tmp_path, None, x=x, y=y)
    scores = predict(fit.url, MemoryRows(x), plan_of(options("eigh")), 2, site_of())
    np.testing.assert_allclose(scores, y, atol=1e-6)
    np.testing.assert_allclose(fit.model.coefficients[4], fit.model.coefficients[30], atol=1e-6)
    gradients = fitted(options("cg", (0.0,), tolerance=1e-7), "memory", tmp_path, None, x=x, y=y)
    assert gradients.facts["solves"][0]["converged"]


@pytest.mark.parametrize(
    ("solver", "differ", "words"),
    [
        ("eigh", 1.0, r"rows 4 and 30: duplicate rows with different targets\? Merge them, or use alpha > "),
        ("cholesky", 1.0, r"singular to rounding.*Use alpha=\S+ or more, or solver=\"eigh\""),
        ("cholesky", 0.0, r"singular to rounding.*Use alpha=\S+ or more, or solver=\"eigh\""),
        ("tiled_cholesky", 1.0, r"first at row 30.*Repeated rows do this at alpha=0. Use alpha >= "),
    ],
)
def test_duplicates_that_differ_at_alpha_zero(tmp_path, client, solver, differ, words):
    """A clear error here and on a cluster; the matrix stays."""
    x, y = duplicates(differ)
    for place in ("loop", "cluster"):
        with pytest.raises(InputError, match=words):
            fitted(options(solver, (0.0,)), place, tmp_path, client, x=x, y=y, record=Record())
    assert TileStore.open(tmp_path / "run" / "kernel").pending() == []
    before = tiles_written(tmp_path)
    listener = Counter()
    fit = fitted(options(solver, (1e-3,)), "loop", tmp_path, None, x=x, y=y, listener=listener)
    assert_equals_naive(fit.model, KERNEL(x), y, 1e-3)
    assert listener.count("kernel-tile") == 0
    assert tiles_written(tmp_path) == before


def tiles_written(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in (folder / "run" / "kernel").rglob("*") if p.is_file()}


def test_gradients_at_alpha_zero_keep_their_iterate(tmp_path):
    x, y = duplicates(1.0)
    fit = fitted(options("cg", (0.0,)), "memory", tmp_path, None, x=x, y=y)
    (solve,) = fit.facts["solves"]
    assert not solve["converged"]
    assert 0.05 < solve["residual"] < 1
    assert np.isfinite(fit.model.coefficients).all()
    assert "use alpha > 0" in convergence_note(fit.facts)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ("eigh", r"smallest eigenvalue is -\S+ \(the largest .*float32 kernels have such.* use alpha=(\S+) or more"),
        (
            "cholesky",
            r"smallest eigenvalue is -\S+ \(the largest .*float32 kernels have such.* use alpha=(\S+) or more",
        ),
        ("tiled_cholesky", r"smallest eigenvalue -\S+, beside a trace of 200.*Use alpha >= (\S+) \("),
        ("cg", r"a direction has curvature -\S+, beside a trace of 200.*Use alpha=(\S+) or more"),
    ],
)
def test_float32_rounding_below_zero(tmp_path, client, solver, words):
    """A smooth kernel in float32 has eigenvalues near −7e-7: by how much it fails, and an alpha that does."""
    x, y = np.linspace(-1, 1, 200, dtype=np.float32)[:, None] / 2, RNG.normal(size=200)
    lowest = np.linalg.eigvalsh(RBF(1.0)(x).astype(float))[0]
    assert -1e-5 < lowest < -2e-7
    advised = 0.0
    for place in ("loop", "cluster"):
        (tmp_path / place).mkdir()
        plan = plan_of(options(solver), 200, k=1, tile=48, rank=50, dtype="float32")
        with pytest.raises(InputError, match=words) as refusal:
            fitted(options(solver, (1e-7,)), place, tmp_path / place, client, x=x, y=y, kernel=RBF(1.0), plan=plan)
        assert "alpha=1e-07" in str(refusal.value)
        assert TileStore.open(tmp_path / place / "run" / "kernel").pending() == []
        advised = float(re.search(words, str(refusal.value)).group(1))
        assert -lowest < advised < 1e-2
    choices = options(solver, (advised,), tolerance=1e-6)
    fit = fitted(choices, "loop", tmp_path / "loop", None, x=x, y=y, kernel=RBF(1.0), plan=plan)
    assert convergence_note(fit.facts) == ""


def test_gradients_that_got_nowhere():
    """No iterate is better than zero: an error, since a model of zeros has no intercept either."""
    nothing = Solved(
        np.zeros((1, 3, 2)),
        np.array([0.1]),
        np.array([[1.0, 0.5]]),
        np.zeros((1, 2), bool),
        np.ones((5, 1)),
        5,
        10,
        ("max_iterations=5 reached",),
        np.array([np.nan]),
    )
    with pytest.raises(
        InputError, match=r"got nowhere at alpha=0.1: max_iterations=5 reached. Use a larger alpha, more max_iter"
    ):
        dual_systems._checked(nothing, [0.1], np.eye(3), "float64")
    some = replace(nothing, residuals=np.array([[0.9, 0.5]]))
    assert dual_systems._checked(some, [0.1], np.eye(3), "float64")[1][0]["residual"] == 0.9


@pytest.mark.parametrize("place", ["memory", "loop"])
def test_gradients_that_run_out_of_iterations(tmp_path, place):
    choices = options("cg", ALPHAS, selection="kfold", max_iterations=3)
    fit = fitted(choices, place, tmp_path, None, groups=GROUPS, plan=plan_of(choices, rank=2))
    solves = fit.facts["solves"]
    assert len(solves) == 3 * len(ALPHAS) + 1
    short = [s for s in solves if not s["converged"]]
    assert short
    assert all(s["reason"] == "max_iterations=3 reached" and s["residual"] > 1e-12 for s in short)
    worst = max(short, key=lambda s: s["residual"])
    note = convergence_note(fit.facts)
    assert f"{len(short)} of 10 solves" in note
    assert (
        f"at alpha={worst['alpha']:g} the relative residual is {worst['residual']:.2g} (max_iterations=3 reached)"
        in note
    )
    # an iterate is better than none
    assert worst["residual"] < 1
    assert fit.model.alpha in ALPHAS


def test_residuals_are_true(tmp_path):
    """‖b − (K + αI)x‖/‖b‖, of the worst column, from the stored solution."""
    for solver in ("cg", "tiled_cholesky"):
        (tmp_path / solver).mkdir()
        record = Record()
        fit = fitted(options(solver, tolerance=1e-4), "loop", tmp_path / solver, None, weights=WEIGHTS, record=record)
        (kept,) = [v for k, v in record.stages.items() if k.startswith("solve all rows")]
        solved = load_state(kept["solved"])[0]["solved"]
        solved = solved[0] if solver == "cg" else solved
        s = np.sqrt(WEIGHTS)
        right = np.column_stack([s[:, None] * Y, s])
        left = right - (s[:, None] * KERNEL(X) * s + 0.1 * np.eye(N)) @ solved
        expected = (np.linalg.norm(left, axis=0) / np.linalg.norm(right, axis=0)).max()
        (solve,) = fit.facts["solves"]
        np.testing.assert_allclose(solve["residual"], expected, rtol=1e-2 if solver == "cg" else 1.0)


# what is kept on the way


def test_every_solution_is_kept(tmp_path):
    """A second run of an equal record computes nothing; one without its last stages solves no system again."""
    for solver in ("tiled_cholesky", "cg"):
        folder = tmp_path / solver
        folder.mkdir()
        record = Record()
        choices = options(solver, ALPHAS, selection="kfold")
        first = fitted(choices, "loop", folder, None, groups=GROUPS, record=record)
        assert not list((folder / "run").glob("factors/*"))
        again = Counter()
        repeated = fitted(choices, "loop", folder, None, groups=GROUPS, record=record, listener=again)
        assert again.labels == []
        np.testing.assert_array_equal(repeated.model.coefficients, first.model.coefficients)
        del record.stages["solve"]
        partly = Counter()
        repeated = fitted(choices, "loop", folder, None, groups=GROUPS, record=record, listener=partly)
        assert partly.count("cholesky-tile") == 0
        assert not [label for label, *_ in partly.stages if label == "cg"]
        np.testing.assert_array_equal(repeated.model.coefficients, first.model.coefficients)


def test_gradients_go_on_from_their_checkpoint(tmp_path, monkeypatch):
    """Killed in the tenth product: the state of the ninth is there, the rest gives equal bits, and no state is left over."""
    choices = options("cg", ALPHAS, selection="gcv")
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = fitted(choices, "loop", tmp_path / "whole", None, plan=plan_of(choices, rank=3))
    monkeypatch.setattr(dual_systems, "CHECKPOINT_SECONDS", 0.0)
    products = CountedProducts(monkeypatch, stop_at=10)
    record = Record()
    with pytest.raises(Killed):
        fitted(choices, "loop", tmp_path / "cut", None, plan=plan_of(choices, rank=3), record=record)
    (stage,) = [k for k in record.stages if k.startswith("checkpoint with probes")]
    assert len([k for k in record.stages if "solve" in k]) == 0
    state = Path(record.stages[stage])
    assert state.exists()
    states = set((tmp_path / "cut" / "run" / "state").iterdir())
    products.stop_at = None
    before = products.count
    found = fitted(choices, "loop", tmp_path / "cut", None, plan=plan_of(choices, rank=3), record=record)
    np.testing.assert_array_equal(found.model.coefficients, whole.model.coefficients)
    assert found.path == whole.path
    iterations = whole.facts["solves"][0]["iterations"]
    assert iterations > 12
    assert products.count - before == iterations - 9
    assert not state.exists()
    assert not [k for k in record.stages if k.startswith("checkpoint")]
    left = set((tmp_path / "cut" / "run" / "state").iterdir())
    assert len(left - states) == 2  # what was solved, and the model


class CountedProducts:
    """Counts products of a stored kernel with blocks of vectors; the `stop_at`th dies as a killed driver would."""

    def __init__(self, monkeypatch, stop_at=None):
        self.count, self.stop_at = 0, stop_at
        product = StoredKernel.__matmul__

        def counted(operator, v):
            self.count += 1
            if self.count == self.stop_at:
                raise Killed
            return product(operator, v)

        monkeypatch.setattr(StoredKernel, "__matmul__", counted)


def test_alphas_in_turns(tmp_path, monkeypatch):
    """Vectors that do not fit the driver: fewer alphas at a time, the same solutions."""
    choices = options("cg", ALPHAS, selection="kfold")
    (tmp_path / "together").mkdir()
    together = fitted(choices, "loop", tmp_path / "together", None, groups=GROUPS)
    monkeypatch.setattr(dual_systems, "GRADIENT_BYTES", 1)
    record = Record()
    found = fitted(choices, "loop", tmp_path, None, groups=GROUPS, record=record)
    assert len([k for k in record.stages if k.startswith("solve without group 0, alphas")]) == 3
    np.testing.assert_allclose([r["score"] for r in found.path], [r["score"] for r in together.path], rtol=1e-9)
    np.testing.assert_allclose(found.model.coefficients, together.model.coefficients, atol=1e-9)


def test_the_model_is_stored_with_the_address_of_its_points(tmp_path):
    fit = fitted(options("eigh"), "loop", tmp_path, None)
    back = load_model(fit.url)
    assert back.points.url == str(tmp_path / "run" / "points")
    assert (back.alpha, back.kernel, back.n_classes) == (0.1, KERNEL, None)
    in_memory = fitted(options("eigh"), "memory", tmp_path, None).model
    np.testing.assert_allclose(in_memory.scores(X), back.scores(X), rtol=1e-9)
    moved = load_model(in_memory.save(tmp_path / "states"))
    np.testing.assert_array_equal(moved.points, X)
    np.testing.assert_array_equal(moved.scores(X), in_memory.scores(X))


@pytest.mark.parametrize("block_rows", [1, 20, 83, 1000])
def test_blocks_of_training_rows_do_not_change_scores(tmp_path, block_rows):
    model = fitted(options("eigh"), "memory", tmp_path, None).model
    np.testing.assert_allclose(replace(model, block_rows=block_rows).scores(X[:9]), model.scores(X[:9]), rtol=1e-10)


def test_points_too_large_to_keep_are_read_again(tmp_path, monkeypatch):
    from ntkdask.workflows import model as models

    fit = fitted(options("eigh"), "loop", tmp_path, None)
    expected = fit.model.scores(X[:9])
    shared.clear()
    monkeypatch.setattr(models, "POINTS_BYTES", 1000)
    np.testing.assert_array_equal(fit.model.scores(X[:9]), expected)
    shutil.rmtree(tmp_path / "run" / "points")
    with pytest.raises(Exception, match="points"):
        fit.model.scores(X[:9])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_rows_with_nan_are_named(tmp_path):
    x = X.copy()
    x[[7, 40], 1] = np.nan
    for place in ("memory", "loop"):
        rows = MemoryRows(x, Y) if place == "memory" else None
        if rows is None:
            with pytest.raises(InputError, match=r"rows? .*7"):
                stored(tmp_path, x, Y)
            # finite as stored, infinite in the job's dtype
            big = np.where(np.isnan(x), 1e300, x)
            data = stored(tmp_path, big, Y)
            rows = DatasetRows(data.url, digest=data.digest)
        plan = plan_of(options("eigh"), dtype="float32")
        with pytest.raises(InputError, match="in row 7"):
            fit_kernel_ridge(
                rows,
                (),
                options("eigh"),
                plan,
                kernel=KERNEL,
                site=site_of(url=None if place == "memory" else tmp_path / "run"),
            )


def test_regression_in_one_column(tmp_path):
    x, y = regression_data(60, 4)
    fit = fitted(
        options("tiled_cholesky"),
        "loop",
        tmp_path,
        None,
        x=x,
        y=y,
        kernel=RBF(0.01),
        plan=plan_of(options("eigh"), 60, 1),
    )
    assert_equals_naive(fit.model, RBF(0.01)(x), y, 0.1)
