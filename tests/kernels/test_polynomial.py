"""The polynomial kernel: scikit-learn's values, refusals; the protocol is tested by the contracts."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from ntkdask.errors import InputError
from ntkdask.kernels import PolynomialKernel


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-13)])
@pytest.mark.parametrize(("degree", "gamma", "coef0"), [(1, 2.0, 0.0), (2, 0.5, 1.0), (5, 0.1, 3.0)])
def test_scikit_learns_values(dtype, tolerance, degree, gamma, coef0):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)).astype(dtype), rng.standard_normal((3, 5)).astype(dtype)
    kernel = PolynomialKernel(degree, gamma, coef0)
    expected = polynomial_kernel(x.astype("float64"), y.astype("float64"), degree, gamma, coef0)
    assert np.abs(kernel(x, y) - expected).max() <= tolerance * np.abs(expected).max()
    np.testing.assert_allclose(kernel.diagonal(x), np.diag(kernel(x)), rtol=10 * tolerance)


@pytest.mark.parametrize(
    "arguments",
    [{"degree": 0}, {"degree": 2.0}, {"degree": True}, {"gamma": 0.0}, {"gamma": float("inf")}, {"coef0": -0.1}],
)
def test_parameters_out_of_range(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        PolynomialKernel(**arguments)
