"""The path over alphas: every score against fits that never saw the rows."""

import numpy as np
import pytest
from kernel_fit_examples import (
    ALPHAS,
    GROUPS,
    KERNEL,
    SOLVERS,
    WEIGHTS,
    N,
    X,
    Y,
    assert_equals_naive,
    fitted,
    naive,
    options,
)

from ntkdask.errors import InputError
from ntkdask.solvers.traces import inverse_trace, sign_probes
from ntkdask.workflows.kernel_ridge.options import PROBES
from ntkdask.workflows.selection import SELECTION_SCORES


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
