"""Singular and indefinite systems, gradients that do not converge, and the solutions and checkpoints that are kept on the way."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from job_examples import Counter, Killed, site_of
from kernel_fit_examples import (
    ALPHAS,
    GROUPS,
    KERNEL,
    RNG,
    WEIGHTS,
    N,
    X,
    Y,
    assert_equals_naive,
    fitted,
    options,
    plan_of,
)

from ntkdask.datasets.rows import MemoryRows
from ntkdask.errors import InputError
from ntkdask.execution.progress import Record
from ntkdask.kernels import RBF
from ntkdask.matrices.operator import StoredKernel
from ntkdask.solvers.conjugate_gradients import Solved
from ntkdask.states import load_state
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_ridge import systems as dual_systems
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.predict import predict

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
        # the weighted mean of the targets is left to the intercept
        right = np.column_stack([s[:, None] * (Y - np.average(Y, axis=0, weights=WEIGHTS)), s])
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
