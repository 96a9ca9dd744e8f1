"""FeatureTransformer and maps that depend on data."""

import dask.array as da
import numpy as np
from estimator_examples import MAP, X, Y
from sklearn import linear_model

from ntkdask.estimators import FeatureTransformer, RidgeRegressor


def test_transformer():
    transformer = FeatureTransformer(MAP).fit(X)
    assert transformer.map_ is MAP
    np.testing.assert_array_equal(transformer.transform(X), MAP(X))
    assert transformer.transform(X.astype(np.float32)).dtype == np.float32
    assert transformer.get_feature_names_out()[:2].tolist() == ["featuretransformer0", "featuretransformer1"]
    assert transformer.set_output(transform="pandas").transform(X).shape == (90, 32)
    lazy = FeatureTransformer(MAP).fit(X).transform(da.from_array(X, chunks=(40, 6)))
    assert isinstance(lazy, da.Array)
    np.testing.assert_allclose(lazy.compute(), MAP(X), rtol=1e-10)
    np.testing.assert_array_equal(FeatureTransformer().fit_transform(X), X)
    integers = da.from_array(np.arange(6).reshape(3, 2), chunks=2)
    assert FeatureTransformer().fit(integers).transform(integers).dtype == "float64"


def test_a_map_that_depends_on_data_is_fitted():
    class Centred:
        n_components = 6
        mean = 0.0

        def fit(self, x, targets=None):
            fitted = Centred()
            fitted.mean = x.mean(axis=0)
            return fitted

        def __call__(self, x):
            return x - self.mean

        def workspace_bytes(self, n, itemsize, row_shape=None):
            return n * 6 * itemsize

    ours = RidgeRegressor(Centred(), fit_intercept=False).fit(X, Y - Y.mean())
    theirs = linear_model.Ridge().fit(X, Y - Y.mean())
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), atol=1e-8)
    np.testing.assert_allclose(FeatureTransformer(Centred()).fit_transform(X).mean(axis=0), 0, atol=1e-12)
