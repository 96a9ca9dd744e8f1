"""PolynomialSketch: unbiased for dense and sparse rows, with the constant as one more feature."""

import numpy as np
import pytest
from scipy import sparse

import ntkdask as nd
from ntkdask.errors import InputError
from ntkdask.features import PolynomialSketch
from ntkdask.features.sketching.poly_sketch import PolySketch

X = np.random.default_rng(3).standard_normal((4, 6))
X[1, 2:] = 0
X[3] = 0


@pytest.mark.parametrize("leaves", ["srht", "count"])
@pytest.mark.parametrize(("degree", "coef0"), [(1, 0.0), (2, 0.0), (3, 0.5)])
def test_is_unbiased(leaves, degree, coef0):
    feature_map, count = PolynomialSketch(64, degree, 0.3, coef0, leaves=leaves), 400
    products = np.array([(phi := feature_map.replace(seed=seed)(X)) @ phi.T for seed in range(count)])
    exact, error = feature_map.target(X), products.std(axis=0, ddof=1) / np.sqrt(count)
    assert (np.abs(products.mean(axis=0) - exact) <= 4.5 * error + 1e-9 * exact.max()).all()
    assert (error <= 0.05 * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))).all()


def test_the_constant_is_one_more_feature():
    wide = np.hstack([np.sqrt(0.3) * X, np.full((4, 1), np.sqrt(0.5))])
    expected = PolySketch(3, 40, 7, ("polynomial",))(wide, degrees=(3,))[0]
    np.testing.assert_allclose(PolynomialSketch(40, 3, 0.3, 0.5, seed=7)(X), expected, rtol=1e-12)


def test_sparse_rows_have_the_features_of_dense_ones(tmp_path):
    feature_map = PolynomialSketch(32, 2, coef0=1.0, leaves="count")
    expected = feature_map(X)
    for make in (sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix):
        np.testing.assert_allclose(feature_map(make(X)), expected, rtol=1e-12, atol=1e-12)
    found = nd.featurize(feature_map, sparse.csr_matrix(X), url=tmp_path / "features")
    np.testing.assert_allclose(found.compute(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="leaves='count'"):
        PolynomialSketch(32)(sparse.csr_matrix(X))


def test_parameters_out_of_range():
    for arguments in ({"n_components": 0}, {"degree": 0}, {"gamma": -1.0}, {"coef0": -1.0}, {"leaves": "fft"}):
        with pytest.raises(InputError, match=next(iter(arguments))):
            PolynomialSketch(**{"n_components": 8, **arguments})
