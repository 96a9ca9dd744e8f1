"""Optimised features: the χ² weights against generic solvers."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from ntkdask import approximation_error
from ntkdask.errors import InputError
from ntkdask.features import NTKRandomFeatures
from ntkdask.features.alignment import Alignment, chi_square_weights
from ntkdask.networks import fully_connected

# --- χ² weights -----------------------------------------------------------------------------------------------------


def divergence(q):
    return q.size * ((q - 1 / q.size) ** 2).sum()


def generic(v, rho):
    """The same maximum by sequential quadratic programming from several starts."""
    n = v.size
    constraints = [
        {"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones(n)},
        {"type": "ineq", "fun": lambda q: rho - divergence(q), "jac": lambda q: -2 * n * (q - 1 / n)},
    ]
    starts = [np.full(n, 1 / n), np.random.default_rng(0).dirichlet(np.ones(n))]
    found = [
        minimize(
            lambda q: -v @ q,
            start,
            jac=lambda q: -v,
            bounds=[(0, 1)] * n,
            constraints=constraints,
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-13},
        )
        for start in starts
    ]
    feasible = [r.x for r in found if divergence(r.x) <= rho + 1e-7 and abs(r.x.sum() - 1) < 1e-7]
    return max((v @ q for q in feasible), default=-math.inf)


@pytest.mark.parametrize("seed", range(25))
def test_weights_are_the_generic_optimum(seed):
    rng = np.random.default_rng(seed)
    v = rng.exponential(size=rng.integers(2, 9))
    if seed % 3 == 0:
        v = np.round(v)  # ties
    rho = float(rng.uniform(0, v.size))
    q = chi_square_weights(v, rho)
    assert (q >= 0).all()
    assert q.sum() == pytest.approx(1, abs=1e-12)
    assert divergence(q) <= rho * (1 + 1e-9) + 1e-12
    assert v @ q == pytest.approx(generic(v, rho), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_weights_satisfy_the_optimality_conditions(seed):
    """q = max(0, a + b·v) with b > 0 and the whole radius used: sufficient for the maximum of a concave problem."""
    v = np.random.default_rng(seed).chisquare(1, 3000)
    q = chi_square_weights(v, 20.0)
    inside = q > 0
    slope, constant = np.polyfit(v[inside], q[inside], 1)
    assert slope > 0
    np.testing.assert_allclose(q, np.maximum(constant + slope * v, 0), atol=1e-10)
    assert divergence(q) == pytest.approx(20.0, rel=1e-9)


def test_weights_do_not_depend_on_order_origin_or_unit():
    v = np.random.default_rng(3).exponential(size=200)
    q = chi_square_weights(v, 7.0)
    shuffle = np.random.default_rng(4).permutation(200)
    np.testing.assert_allclose(chi_square_weights(v[shuffle], 7.0), q[shuffle], rtol=1e-12)
    np.testing.assert_allclose(chi_square_weights(1e6 * v + 1e3, 7.0), q, rtol=1e-8, atol=1e-15)
    np.testing.assert_allclose(chi_square_weights(1e-200 * v, 7.0), q, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize(
    ("v", "rho", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.0, [1 / 3, 1 / 3, 1 / 3]),
        ([3.0, 1.0, 2.0], 2.0, [1, 0, 0]),  # 1/(1+ρ) of three rows is one: all on the largest
        ([3.0, 1.0, 2.0], 1e9, [1, 0, 0]),
        ([2.0, 2.0, 2.0, 2.0], 0.5, [0.25] * 4),
        ([0.0, 0.0, 0.0], 1.0, [1 / 3] * 3),  # constant targets: nothing to prefer
        ([5.0, 1.0, 5.0, 0.0], 1.0, [0.5, 0, 0.5, 0]),  # as many ties as N/(1+ρ)
        ([5.0, 1.0, 5.0, 0.0], 3.0, [0.5, 0, 0.5, 0]),
        ([7.0], 3.0, [1.0]),
    ],
)
def test_edge_cases(v, rho, expected):
    np.testing.assert_allclose(chi_square_weights(np.array(v), rho), expected, atol=1e-12)


def test_the_support_of_the_paper():
    """N = 20 000 and ρ = 100: the paper keeps 350 to 422 of the candidates; scores of one target are close to squares of normals."""
    sizes = [
        np.count_nonzero(chi_square_weights(np.random.default_rng(s).chisquare(1, 20_000), 100.0)) for s in range(3)
    ]
    assert all(350 <= size <= 450 for size in sizes)


@pytest.mark.parametrize("weighting", ["sqrt", "uniform"])
@pytest.mark.parametrize("rho", [0.0, 0.1, 10.0])
def test_fewer_features_than_weights_are_drawn_from_them(weighting, rho):
    """On average they weigh as much as the candidates do, so that the radius keeps its meaning."""
    v, most, draws = np.random.default_rng(0).exponential(size=120), 7, 600
    q = chi_square_weights(v, rho)
    if weighting == "uniform":
        q = (q > 0) / np.count_nonzero(q)
    alignment, counts = Alignment(120, rho, weighting), np.zeros((draws, 120))
    for seed in range(draws):
        chosen = alignment.choose(v, most, seed, ("draws",))
        counts[seed, chosen.columns] = most * chosen.factors**2
    np.testing.assert_allclose(counts.sum(axis=1), most, rtol=1e-12)
    assert (np.abs(counts - most * q) < 1 + 1e-9).all()
    error = np.abs(counts.mean(axis=0) - most * q)
    assert (error <= 5 * np.sqrt(np.maximum(most * q, 1 / draws) / draws)).all()


def test_radius_zero_is_the_plain_map():
    """ρ = 0 keeps every candidate alike: the kernel is the network's own, however strongly the targets agree with some."""
    x = np.random.default_rng(0).standard_normal((60, 4))
    network, errors = fully_connected(1), {}
    for rho in (0.0, 50.0):
        alignment = Alignment(2000, rho, sampling="gaussian")
        features = NTKRandomFeatures(network, n_components=1200, sampling="optimized", alignment=alignment)
        errors[rho] = approximation_error(features.fit(x, x[:, 0]), x).frobenius
    plain = approximation_error(NTKRandomFeatures(network, n_components=1200), x).frobenius
    assert errors[0.0] < 2 * plain < errors[50.0] / 2


@pytest.mark.parametrize(
    ("v", "rho", "message"),
    [
        (np.ones((2, 2)), 1.0, r"scores have shape \(2, 2\)"),
        (np.empty(0), 1.0, r"scores have shape \(0,\)"),
        (np.array([1.0, np.nan]), 1.0, "1 of 2 alignment scores are not finite"),
        (np.ones(3), -1.0, "rho is -1.0"),
        (np.ones(3), math.inf, "rho is inf"),
    ],
)
def test_bad_scores_are_refused(v, rho, message):
    with pytest.raises(InputError, match=message):
        chi_square_weights(v, rho)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_candidates": 0}, "n_candidates is 0"),
        ({"rho": -2}, "rho is -2"),
        ({"weighting": "sqr"}, "unknown weighting 'sqr'; did you mean 'sqrt'"),
        ({"sampling": "spheric"}, "unknown sampling 'spheric'; did you mean 'spherical'"),
    ],
)
def test_bad_alignments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Alignment(**arguments)


@pytest.mark.parametrize("weighting", ["sqrt", "sample", "uniform"])
def test_what_is_chosen(weighting):
    scores = np.random.default_rng(1).exponential(size=400)
    q = chi_square_weights(scores, 10.0)
    chosen = Alignment(400, 10.0, weighting).choose(scores, 100, 5, ("x",))
    assert (chosen.factors**2).sum() == pytest.approx(1)
    assert (q[chosen.columns] > 0).all()
    assert (np.diff(chosen.columns) > 0).all()
    if weighting == "sqrt":
        np.testing.assert_allclose(chosen.factors**2, q[q > 0], rtol=1e-12)
    elif weighting == "uniform":
        assert len(set(chosen.factors)) == 1
        assert len(chosen.columns) == np.count_nonzero(q)
    else:
        counts = np.zeros(400)
        for seed in range(300):
            drawn = Alignment(400, 10.0, "sample").choose(scores, 100, seed, ("x",))
            counts[drawn.columns] += drawn.factors**2
        error = np.sqrt(q * (1 - q) / (100 * 300))
        assert (np.abs(counts / 300 - q) <= 4.5 * error + 1e-12).all()
