"""SciPy sparse rows through featurize, FeatureTransformer and the ridge estimators, for maps with leaves="count"."""

import numpy as np
import pytest
from scipy import sparse

import ntkdask as nd
from ntkdask.errors import InputError
from ntkdask.estimators import FeatureTransformer, KernelRidgeRegressor, RidgeClassifier, RidgeRegressor
from ntkdask.features import HomogeneousSketch, NTKRandomFeatures, NTKSketch
from ntkdask.networks import fully_connected
from ntkdask.workflows.sparse import SparseState, csr_rows

NETWORK = fully_connected(1)
RNG = np.random.default_rng(0)
DENSE = RNG.standard_normal((60, 40)) * (RNG.random((60, 40)) < 0.15)
Y = DENSE[:, 0] - DENSE[:, 1] + 0.1 * RNG.standard_normal(60)
LABELS = np.where(Y > 0, "above", "below")
MAPS = [NTKSketch(NETWORK, 64, leaves="count"), HomogeneousSketch(NETWORK, 64, leaves="count")]
ROWS = sparse.csr_array(DENSE)


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix])
def test_sparse_rows_have_the_features_of_dense_ones(feature_map, form, tmp_path):
    x, expected = form(DENSE), feature_map(DENSE)
    np.testing.assert_allclose(FeatureTransformer(feature_map).fit_transform(x), expected, atol=1e-12)
    lazy = nd.featurize(feature_map, x, plan=nd.Plan(tile_rows=25))
    assert lazy.chunks[0] == (25, 25, 10)
    np.testing.assert_allclose(lazy.compute(), expected, atol=1e-12)
    stored = nd.featurize(feature_map, x, url=tmp_path / "phi", plan=nd.Plan(tile_rows=25))
    np.testing.assert_allclose(stored.compute(), expected, atol=1e-12)


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold", "holdout"])
def test_ridge_on_sparse_rows_is_ridge_on_dense_ones(selection, tmp_path):
    weights = 1.0 + (np.arange(60) % 3)
    for url in (None, tmp_path / "fit"):
        fit = RidgeRegressor(MAPS[0], alphas=(0.1, 10.0), selection=selection, url=url).fit(ROWS, Y, weights)
        if selection in ("gcv", "loo"):  # equal rows are hashed by their non-zeros: folds are other ones
            dense = RidgeRegressor(MAPS[0], alphas=(0.1, 10.0), selection=selection).fit(DENSE, Y, weights)
            assert fit.alpha_ == dense.alpha_
            np.testing.assert_allclose(fit.predict(ROWS), dense.predict(DENSE), atol=1e-9)
        np.testing.assert_allclose(fit.predict(ROWS), fit.predict(DENSE), atol=1e-9)


def test_integers_lists_of_rows_and_classes():
    counts = sparse.csr_array((DENSE * 3).astype(np.int64))
    model = RidgeClassifier(MAPS[0]).fit(counts, LABELS)
    assert model.n_features_in_ == 40
    assert model.score(counts, LABELS) == model.score(counts.toarray(), LABELS) > 0.6


def test_workers_read_sparse_rows_from_a_state(two_workers, tmp_path):
    phi = nd.featurize(MAPS[0], ROWS, url=tmp_path / "phi", client=two_workers, plan=nd.Plan(tile_rows=25))
    np.testing.assert_allclose(phi.compute(scheduler="sync"), MAPS[0](DENSE), atol=1e-12)


@pytest.mark.slow
def test_a_cluster_fits_to_sparse_rows(two_workers):
    here = RidgeRegressor(MAPS[0], alphas=(0.1, 10.0), selection="kfold").fit(ROWS, Y)
    there = RidgeRegressor(MAPS[0], alphas=(0.1, 10.0), selection="kfold", client=two_workers).fit(ROWS, Y)
    assert there.alpha_ == here.alpha_
    np.testing.assert_allclose(there.predict(ROWS), here.predict(ROWS), atol=1e-9)


def test_a_state_holds_the_rows_that_it_was_made_of(tmp_path):
    weights = np.arange(60.0)
    rows = SparseState.of(tmp_path, csr_rows(sparse.coo_array(DENSE)), Y, weights)
    assert (rows.n_total, rows.row_shape, rows.dtype) == (60, (40,), "float64")
    assert rows == SparseState.of(tmp_path, csr_rows(sparse.csc_array(DENSE)), Y, weights)
    batches = list(rows.batches(5, 30, 20))
    np.testing.assert_array_equal(np.concatenate([b.x.toarray() for b in batches]), DENSE[5:30])
    np.testing.assert_array_equal(np.concatenate([b.weights for b in batches]), weights[5:30])
    np.testing.assert_array_equal(rows.row_weights(), weights)


@pytest.mark.parametrize(
    "call",
    [
        lambda: RidgeRegressor(NTKRandomFeatures(NETWORK, 16)).fit(ROWS, Y),
        lambda: RidgeRegressor().fit(ROWS, Y),
        lambda: KernelRidgeRegressor().fit(ROWS, Y),
        lambda: FeatureTransformer(NTKSketch(NETWORK, 64)).fit(ROWS),
        lambda: nd.featurize(NTKRandomFeatures(NETWORK, 16), ROWS),
        lambda: nd.kernel_matrix(nd.kernels.NTK(NETWORK), ROWS),
        lambda: nd.predict_ensemble(NETWORK, ROWS, Y, ROWS),
        lambda: nd.write_dataset("unused", ROWS, Y),
        lambda: nd.spectrum(ROWS),
    ],
)
def test_where_rows_must_be_dense_a_sparse_matrix_is_named(call):
    with pytest.raises(InputError, match=r"is a sparse csr_array.*toarray\(\).*leaves='count'"):
        call()


def test_values_that_are_not_finite_are_named_by_row():
    wrong = DENSE.copy()
    wrong[7, 3] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        RidgeRegressor(MAPS[0]).fit(sparse.csr_array(wrong), Y)
    with pytest.raises(InputError, match="row 7"):
        nd.featurize(MAPS[0], sparse.csr_array(wrong)).compute(scheduler="sync")
