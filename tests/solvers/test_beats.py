"""Another thread runs while a solver decomposes: a worker that computes answers its scheduler."""

import numpy as np
import pytest
from beats import assert_beats

from ntkdask.features.quality import gram_error
from ntkdask.matrices import spectrum
from ntkdask.solvers import cholesky, dense, gradient_flow, preconditioners
from ntkdask.solvers.dual import DualEigh
from ntkdask.solvers.dual_cholesky import DualCholesky
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge, solve_cholesky
from ntkdask.solvers.tridiagonal import TridiagonalRidge

SIZES = (300, 600, 1200, 2400)


def definite(n, dtype="float64"):
    x = np.random.default_rng(n).standard_normal((n, n), dtype=dtype)
    return x @ x.T / np.dtype(dtype).type(n) + np.eye(n, dtype=dtype)


def sums(n, dtype="float64"):
    """(sums, rows, targets) of n features."""
    rng = np.random.default_rng(n)
    return GramSums.zeros(n, 1), rng.standard_normal((2 * n, n), dtype=dtype), rng.standard_normal((2 * n, 1))


def centred(n):
    total, phi, y = sums(n)
    total.add(phi, y)
    return Centred.of(total)


def targets(n):
    return np.random.default_rng(n).standard_normal((n, 1))


def added(dtype):
    def prepare(n):
        total, phi, y = sums(n, dtype)
        product = np.zeros((n, n), dtype, order="F")
        return lambda: total.add(phi, y, product=product)

    return prepare


def with_kernel(call):
    return lambda n: (lambda k, y: lambda: call(k, y))(definite(n), targets(n))


def with_sums(call):
    return lambda n: (lambda c: lambda: call(c))(centred(n))


def scores(n):
    fit = DualCholesky.factorise(definite(n), targets(n), 0.1)
    return fit.scores


SOLVERS = {
    "gram sums, float64": added("float64"),
    "gram sums, float32": added("float32"),
    "ridge, eigh": with_sums(EighRidge.factorise),
    "ridge, tridiagonal": with_sums(TridiagonalRidge.factorise),
    "ridge, cholesky": with_sums(lambda c: solve_cholesky(c, 0.1)),
    "kernel ridge, eigh": with_kernel(lambda k, y: DualEigh.factorise(k, y, overwrite=True)),
    "kernel ridge, cholesky": with_kernel(lambda k, y: DualCholesky.factorise(k, y, 0.1, overwrite=True)),
    "kernel ridge, scores": scores,
    "tile of a factorisation": with_kernel(lambda k, y: cholesky.factor_lower(k)),
    "pivot of a factorisation": with_kernel(lambda k, y: cholesky.smallest_eigenvalue(k)),
    "eigenpairs in 2 n²": with_kernel(lambda k, y: dense.eigenpairs(k)),
    "gradient flow": with_kernel(lambda k, y: gradient_flow._eigh(k)),
    "spectrum": with_kernel(lambda k, y: spectrum._eigenvalues(k, spectrum.Site())),
    "errors of features": with_kernel(lambda k, y: gram_error(k, k)),
    "preconditioner": with_kernel(lambda k, y: preconditioners.pivoted_cholesky(k, len(k), block=len(k), seed=0)),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_thread_runs_during(solver):
    assert_beats(SOLVERS[solver], SIZES)
