"""Another thread runs while a solver decomposes: a worker that computes answers its scheduler.

Here are those whose time is one LAPACK call; tests/test_lapack.py has every routine alone.
"""

import numpy as np
import pytest
from beats import assert_beats

from ntkdask.solvers import cholesky, dense, gradient_flow
from ntkdask.solvers.dual_cholesky import DualCholesky
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge, solve_cholesky

SIZES = (300, 600, 1200, 2400)


def definite(n):
    x = np.random.default_rng(n).standard_normal((n, n))
    return x @ x.T / n + np.eye(n)


def centred(n):
    total, rng = GramSums.zeros(n, 1), np.random.default_rng(n)
    total.add(rng.standard_normal((2 * n, n)), rng.standard_normal((2 * n, 1)))
    return Centred.of(total)


def targets(n):
    return np.random.default_rng(n).standard_normal((n, 1))


def with_kernel(call):
    return lambda n: (lambda k, y: lambda: call(k, y))(definite(n), targets(n))


def with_sums(call):
    return lambda n: (lambda c: lambda: call(c))(centred(n))


def scores(n):
    fit = DualCholesky.factorise(definite(n), targets(n), 0.1)
    return fit.scores


SOLVERS = {
    "ridge, eigh": with_sums(EighRidge.factorise),
    "ridge, cholesky": with_sums(lambda c: solve_cholesky(c, 0.1)),
    "kernel ridge, cholesky": with_kernel(lambda k, y: DualCholesky.factorise(k, y, 0.1, overwrite=True)),
    "kernel ridge, scores": scores,
    "tile of a factorisation": with_kernel(lambda k, y: cholesky.factor_lower(k)),
    "eigenpairs in 2 n²": with_kernel(lambda k, y: dense.eigenpairs(k)),
    "gradient flow": with_kernel(lambda k, y: gradient_flow._eigh(k)),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_thread_runs_during(solver):
    assert_beats(SOLVERS[solver], SIZES)
