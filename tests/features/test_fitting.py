"""Fitted maps: scores and features against dense float64 twins, refusals, memory."""

import math

import numpy as np
import pytest
from contracts import BIASED, FROZEN_ENDS, peak_bytes, rows
from reference import dense_tensor_srht, ntk_random_features

from ntkdask import RidgeRegressor, seeds
from ntkdask.arrays import to_device, to_host
from ntkdask.errors import InputError
from ntkdask.features import NTKRandomFeatures
from ntkdask.features.alignment import Alignment, add_scores
from ntkdask.features.fitting import FittedMap, Learned, Training, TrainingBatch
from ntkdask.features.gibbs import gibbs_directions
from ntkdask.features.sketching.operands import padded_size
from ntkdask.kernels import NNGP, NTK
from ntkdask.networks import Dense, fully_connected

# --- scores and fitted maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(("n", "count"), [(1, 3), (700, 2500), (1025, 40)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_are_the_naive_ones(n, count, step, dtype):
    rng = np.random.default_rng(0)
    x, w, y = rng.normal(size=(n, 5)).astype(dtype), rng.normal(size=(5, count)).astype(dtype), rng.normal(size=(n, 3))
    z = x.astype(float) @ w.astype(float)
    expected = ((z > 0) if step else np.maximum(z, 0)).T.astype(float) @ y
    sums = np.ones((count, 3))
    add_scores(x, w, y, sums, step)
    tolerance = {"float32": 2e-5, "float64": 1e-12}[dtype]
    assert np.abs(sums - 1 - expected).max() <= tolerance * np.sqrt(n)


def candidates(feature_map, h, kind, d):
    """All candidates of a layer in float64, by the streams that the map documents."""
    seed, path, a = feature_map.seed, ("ntk", h, kind), feature_map.alignment
    if kind == "step":
        return seeds.normals(seed, path, d, a.n_candidates)
    if a.sampling == "gaussian":
        return math.sqrt(2) * seeds.normals(seed, path, d, a.n_candidates)
    if a.sampling == "spherical":
        return math.sqrt(2 * d) * seeds.sphere(seed, path, d, a.n_candidates)
    return math.sqrt(2 * d) * gibbs_directions(seed, path, d, a.n_candidates, 1)


def twin(feature_map, x, y, at, weights=None):
    """Features of the rows `at` of a map fitted to x and y: dense, in float64, layer by layer."""
    network, alignment = feature_map.network, feature_map.alignment
    denses = [layer for layer in network.layers if isinstance(layer, Dense)]
    w = np.ones(len(x)) if weights is None else weights
    centred = (y - w @ y / w.sum()) * w[:, None]
    chosen, phi = {}, x * math.sqrt(denses[0].weight_variance)
    for h in range(network.depth):
        if denses[h].bias_variance:
            phi = np.concatenate([phi, np.full((len(x), 1), math.sqrt(denses[h].bias_variance))], axis=1)
        for kind in ("relu", "step"):
            every = candidates(feature_map, h, kind, phi.shape[1])
            features = np.maximum(phi @ every, 0) if kind == "relu" else (phi @ every > 0) * 1.0
            scores = ((features.T @ centred) ** 2).sum(axis=1)
            most = feature_map.widths.relu if kind == "relu" else feature_map.widths.step
            columns, factors = alignment.choose(scores, most, feature_map.seed, ("ntk", h, kind, "draws"))
            chosen[h, kind] = every[:, columns], factors
        phi = np.maximum(phi @ (chosen[h, "relu"][0] * chosen[h, "relu"][1]), 0) * math.sqrt(
            denses[h + 1].weight_variance
        )

    def sketch(h, step, psi):
        m = feature_map.n_components - chosen[h, "relu"][0].shape[1] - int(denses[-1].bias_variance > 0)
        # the twin's steps carry √(2/m₀), the map's √2 times their own factors
        step = step * math.sqrt(step.shape[1]) * chosen[h, "step"][1]
        path, signs, picked = ("ntk", h, "sketch"), [], []
        for k, part in enumerate((step, psi)):
            size = padded_size(part.shape[1])
            signs.append(seeds.signs(feature_map.seed, (*path, "signs", k), size))
            picked.append(seeds.balanced_integers(feature_map.seed, (*path, "rows", k), size, m))
        return dense_tensor_srht(step, psi, signs, picked)

    plain = [
        ("dense", layer.weight_variance, layer.bias_variance, layer.trainable)
        if isinstance(layer, Dense)
        else ("relu", layer.normalize)
        for layer in network.layers
    ]
    return ntk_random_features(
        plain,
        at,
        network.scale_inputs,
        lambda h, d: chosen[h, "step"][0],
        lambda h, d: chosen[h, "relu"][0] * chosen[h, "relu"][1],
        sketch,
    )


def data(n=60, k=2):
    x = rows(n)
    return x, np.stack([np.sin(x[:, 0] + j) + x[:, j] ** 2 for j in range(k)], axis=1)


@pytest.mark.parametrize("sampling", ["gaussian", "spherical", "gibbs"])
@pytest.mark.parametrize("weighting", ["sqrt", "sample", "uniform"])
@pytest.mark.parametrize(
    "network", [fully_connected(1), fully_connected(2, weight_variance=1.3), BIASED], ids=["1", "2", "biases"]
)
def test_a_fitted_map_against_its_dense_twin(network, weighting, sampling):
    x, y = data()
    alignment = Alignment(150, 6.0, weighting, sampling)
    feature_map = NTKRandomFeatures(network, 60, seed=2, sampling="optimized", alignment=alignment)
    new = np.random.default_rng(9).normal(size=(7, 6))
    expected = twin(feature_map, x, y, new)
    fitted = feature_map.fit(x, y)
    assert fitted.n_components == expected.shape[1] == 60
    np.testing.assert_allclose(fitted(new), expected, atol=1e-9 * np.abs(expected).max())


def test_weights_of_rows_count():
    x, y = data()
    weights = np.random.default_rng(0).integers(0, 3, len(x)).astype(float)
    feature_map = NTKRandomFeatures(fully_connected(1), 60, sampling="optimized", alignment=Alignment(150, 6.0))
    fitted = feature_map.fit(x, y, weights)
    np.testing.assert_allclose(fitted(x), twin(feature_map, x, y, x, weights), atol=1e-9)
    repeated = feature_map.fit(np.repeat(x, weights.astype(int), axis=0), np.repeat(y, weights.astype(int), axis=0))
    np.testing.assert_allclose(repeated(x), fitted(x), atol=1e-9)


def test_uniform_weights_over_all_candidates_are_the_plain_features():
    """ρ = 0 keeps everything with the weight 1/N: the map that is not optimised, with as many features."""
    x, y = data()
    plain = NTKRandomFeatures(fully_connected(2), 60, sampling="spherical")
    alignment = Alignment(30, 0.0, sampling="spherical")
    fitted = plain.replace(sampling="optimized", alignment=alignment).fit(x, y)
    np.testing.assert_allclose(fitted(x), plain(x), atol=1e-12)


def test_the_mean_kernel_of_draws_from_q_is_that_of_root_q():
    x, y = data(20)
    base = NTKRandomFeatures(fully_connected(1), 400, kernel="nngp", sampling="optimized")
    exact = base.replace(alignment=Alignment(300, 5.0)).fit(x, y)(x)
    fitted = [base.replace(alignment=Alignment(300, 5.0, "sample")).fit(x, y)(x)]
    assert fitted[0].shape[1] < exact.shape[1] or fitted[0].shape[1] <= 400
    # 400 draws: a relative error of about 1/√400 in norm
    assert np.linalg.norm(fitted[0] @ fitted[0].T - exact @ exact.T) < 0.15 * np.linalg.norm(exact @ exact.T)


def test_optimised_features_agree_better_with_the_targets():
    """Alignment ‖Φᵀ(Y − Ȳ)‖² of the ReLU features, against plain ones of the same number, on the rows it was fitted to."""
    x, y = data(200)
    plain = NTKRandomFeatures(fully_connected(1), 40, kernel="nngp", sampling="spherical")
    fitted = plain.replace(sampling="optimized", alignment=Alignment(4000, 100.0)).fit(x, y)
    assert fitted.n_components <= 40
    scores = [(np.square(phi.T @ (y - y.mean(axis=0)))).sum() for phi in (plain(x), fitted(x))]
    assert scores[1] > 1.3 * scores[0]


def test_optimised_features_find_the_few_directions_that_matter():
    """100 features of a row, targets of two of them: 200 optimised features err on new rows about as 600 plain ones do. Where every
    direction matters, as with the 9 of UCI Protein, they err more than as many plain ones: they crowd in a few directions."""
    x = np.random.default_rng(0).standard_normal((3000, 100)).astype(np.float32)
    y = np.abs(x[:, 0]) + x[:, 1] + 0.1 * np.random.default_rng(1).standard_normal(3000)
    plain = NTKRandomFeatures(fully_connected(1), 200, sampling="spherical")

    def unexplained(feature_map):
        fitted = RidgeRegressor(feature_map, np.logspace(-1, 4, 6)).fit(x[:1500], y[:1500])
        return 1 - fitted.score(x[1500:], y[1500:])

    optimised = unexplained(plain.replace(sampling="optimized", alignment=Alignment(10_000)))
    assert optimised < 0.8 * unexplained(plain)
    assert optimised < 1.15 * unexplained(plain.replace(n_components=600))


def test_nngp_features_have_only_what_was_chosen():
    x, y = data()
    fitted = NTKRandomFeatures(
        FROZEN_ENDS, 300, kernel="nngp", sampling="optimized", alignment=Alignment(500, 20.0)
    ).fit(x, y)
    assert isinstance(fitted.target, NNGP)
    assert 0 < fitted.n_components < 300
    assert fitted(x).shape == (60, fitted.n_components)


def test_labels_are_one_hot_targets():
    x, _ = data(90)
    names = np.array(["a", "b", "c"])[np.arange(90) % 3]
    one_hot = (np.arange(90)[:, None] % 3 == np.arange(3)) - 1 / 3
    feature_map = NTKRandomFeatures(fully_connected(1), 40, sampling="optimized", alignment=Alignment(200, 5.0))
    assert feature_map.fit(x, names) == feature_map.fit(x, np.arange(90) % 3) == feature_map.fit(x, one_hot)


def test_targets_of_one_axis_are_one_column():
    x, y = data()
    feature_map = NTKRandomFeatures(fully_connected(1), 40, sampling="optimized", alignment=Alignment(200, 5.0))
    assert feature_map.fit(x, y[:, 0]) == feature_map.fit(x, y[:, :1])


def test_constant_targets_give_plain_features():
    x, _ = data()
    fitted = NTKRandomFeatures(fully_connected(1), 40, sampling="optimized", alignment=Alignment(200, 5.0)).fit(
        x, np.ones(60)
    )
    assert np.isfinite(fitted(x)).all()
    np.testing.assert_allclose(fitted.learned["0.factors"], math.sqrt(1 / 20))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_candidates_are_never_held_for_all_rows(dtype):
    """The declared bytes of a batch are far below (n, N) features."""
    feature_map = NTKRandomFeatures(fully_connected(1), 100, sampling="optimized")
    declared = feature_map.fit_bytes(4096, np.dtype(dtype).itemsize, (6,), 1)
    assert declared < 4096 * 20_000 * np.dtype(dtype).itemsize / 4


# --- errors -----------------------------------------------------------------------------------------------------------


def optimized(**changes):
    return NTKRandomFeatures(fully_connected(1), 40, sampling="optimized", alignment=Alignment(100, 5.0), **changes)


def test_calls_before_fit_and_missing_targets_are_refused():
    x, y = data()
    with pytest.raises(
        InputError, match=r"NTKRandomFeatures learns from training rows and is not fitted.*fit\(x, targets\)"
    ):
        optimized()(x)
    with pytest.raises(InputError, match="targets are missing"):
        optimized().fit(x)
    with pytest.raises(InputError, match="x has 60 rows and targets has 59"):
        optimized().fit(x, y[:59])
    with pytest.raises(InputError, match="weights has 2"):
        optimized().fit(x, y, np.ones(2))
    with pytest.raises(InputError, match="have no weight"):
        optimized().fit(x, y, np.zeros(60))
    with pytest.raises(InputError, match="no rows to learn from"):
        optimized().fit(x[:0], y[:0])
    with pytest.raises(InputError, match="NaN or infinite"):
        optimized().fit(x, np.full(60, np.nan))
    with pytest.raises(InputError, match="labels of 1 class"):
        optimized().fit(x, np.zeros(60, int))
    with pytest.raises(InputError, match="fitted to rows of 6 features; these have 5"):
        optimized().fit(x, y)(x[:, :5])


def test_arguments_that_disagree_are_refused():
    with pytest.raises(InputError, match=r"alignment is .* with sampling='gaussian'"):
        NTKRandomFeatures(fully_connected(1), 40, alignment=Alignment())
    with pytest.raises(InputError, match="unknown kernel 'ntkk'; did you mean 'ntk'"):
        NTKRandomFeatures(fully_connected(1), 40, kernel="ntkk")
    with pytest.raises(InputError, match="n_step and n_relu are for the NTK"):
        NTKRandomFeatures(fully_connected(1), 40, kernel="nngp", n_relu=3)
    with pytest.raises(InputError, match="n_sweeps is 0"):
        NTKRandomFeatures(fully_connected(1), 40, n_sweeps=0)
    with pytest.raises(InputError, match="leaves no feature beside the bias"):
        NTKRandomFeatures(BIASED, 1, kernel="nngp")


def test_a_fitted_map_shows_its_arguments():
    x, y = data()
    fitted = optimized().fit(x, y)
    assert isinstance(fitted, FittedMap)
    assert fitted.target == NTK(fully_connected(1))
    assert fitted.get_params() == optimized().get_params()
    assert fitted.replace(seed=3) == optimized(seed=3)
    assert fitted.fit(x) is fitted
    assert fitted == optimized().fit(x, y)
    assert fitted != optimized().fit(x, -(y**2))
    assert len({fitted, optimized().fit(x, y)}) == 1


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("depth", "kernel"), [(1, "ntk"), (2, "ntk"), (2, "nngp")])
def test_the_workspace_of_a_fitted_map_is_declared(depth, kernel, dtype):
    x = np.random.default_rng(0).standard_normal((500, 20)).astype(dtype)
    base = NTKRandomFeatures(
        fully_connected(depth), 600, kernel=kernel, sampling="optimized", alignment=Alignment(2000, 4.0)
    )
    fitted = base.fit(x, x[:, :2].astype(float) ** 2)
    declared = fitted.workspace_bytes(500, x.itemsize, (20,))
    peak = peak_bytes(lambda: fitted(x), declared)
    assert peak <= declared
    assert declared <= 4 * peak
    assert declared <= base.workspace_bytes(500, x.itemsize, (20,)) * 1.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d", "law"), [(700, 10, "gaussian"), (300, 400, "spherical"), (2000, 60, "gibbs")])
def test_the_memory_of_a_pass_is_declared(n, d, law, dtype):
    x = np.random.default_rng(0).standard_normal((n, d)).astype(dtype)
    base = NTKRandomFeatures(
        fully_connected(2), 200, sampling="optimized", alignment=Alignment(4000, 30.0, "sqrt", law)
    )
    training = Training((d,), dtype, 3, n)
    batch = TrainingBatch(x, x[:, :3].astype(float), None, np.arange(n))
    learned = Learned({"mean": np.zeros(3)})
    declared = base.fit_bytes(n, x.itemsize, (d,), 3)

    def first_layer():
        sums = base.begin(1, learned, training, x)
        base.accumulate(1, learned, batch, sums)
        base.finish(1, learned, sums, training)

    peak = peak_bytes(first_layer, declared)
    assert peak <= declared
    assert declared <= 4 * peak
    sums = base.begin(1, learned, training)
    assert sum(a.nbytes for a in sums.values()) <= base.sums_bytes((d,), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fit_on_the_device_is_the_one_on_the_host(dtype):
    x, y = data(300)
    x = x.astype(dtype)
    feature_map = NTKRandomFeatures(fully_connected(2), 120, sampling="optimized", alignment=Alignment(3000, 30.0))
    there, here = feature_map.fit(to_device(x), y), feature_map.fit(x, y)
    tolerance = {"float32": 1e-4, "float64": 1e-10}[dtype]
    np.testing.assert_allclose(there.learned["0.factors"], here.learned["0.factors"], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(to_host(there(to_device(x))), there(x), atol=tolerance * np.abs(there(x)).max())
