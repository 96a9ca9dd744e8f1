"""Problems of ridge regression of every shape, and their sums."""

import numpy as np
import pytest

from ntkdask.solvers.gram import GramSums

WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def problem(n, m, k=2, seed=0, noise=0.3):
    """Features with an offset and unequal scales, targets that depend on them, positive weights."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((n, m)) * np.geomspace(1, 0.2, m) + rng.standard_normal(m)
    y = phi @ rng.standard_normal((m, k)) / np.sqrt(m) + noise * rng.standard_normal((n, k)) + 5
    return phi, y, rng.uniform(0.2, 3, n)


def sums_of(phi, y, weights=None, batch=None):
    sums = GramSums.zeros(phi.shape[1], y.shape[1])
    step = batch or len(phi)
    for start in range(0, len(phi), step):
        rows = slice(start, start + step)
        sums.add(phi[rows].copy(), y[rows], None if weights is None else weights[rows])
    return sums
