"""RBF far from the origin, in float32 and float64; what it refuses."""

import math

import numpy as np
import pytest

from ntkdask.errors import InputError
from ntkdask.kernels import RBF


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("gamma", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rbf_far_from_the_origin(offset, gamma, dtype):
    rng = np.random.default_rng(0)
    x = (0.3 * rng.standard_normal((90, 12)) + offset).astype(dtype)
    y = (x[:70] + rng.standard_normal((70, 12)) * 10.0 ** -rng.uniform(0, 8, (70, 1))).astype(dtype)
    y[:5] = x[:5]
    exact = np.exp(-gamma * ((x[:, None].astype(np.longdouble) - y) ** 2).sum(-1))
    k = RBF(gamma)(x, y)
    assert np.abs(k - exact).max() <= {"float32": 1e-7, "float64": 1e-12}[dtype]
    assert (np.diag(k)[:5] == 1).all()
    assert (np.diag(RBF(gamma)(x)) == 1).all()


@pytest.mark.parametrize("gamma", [0, -1.0, math.inf, math.nan, "1", None])
def test_rbf_refuses_other_gammas(gamma):
    with pytest.raises(InputError, match="RBF: gamma is"):
        RBF(gamma)
