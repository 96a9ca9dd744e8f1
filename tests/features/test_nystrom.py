"""Nystrom: exact on its landmarks, choices of landmarks against their laws, streams against memory, ranks, errors."""

import numpy as np
import pytest
from contracts import IMAGE, images, peak_bytes, rows
from scipy.linalg import pinvh

import ntkdask as nd
from ntkdask import arrays
from ntkdask.errors import InputError
from ntkdask.features import Nystrom
from ntkdask.features.fitting import (
    FittedMap,
    Learned,
    Training,
    TrainingBatch,
    from_state,
    pack_sums,
    to_host_sums,
    to_state,
    unpack_sums,
)
from ntkdask.features.nystrom import CANDIDATES, LANDMARKS
from ntkdask.jobs.spec import build_job
from ntkdask.kernels import NTK, RBF, ArcCosine
from ntkdask.networks import convolutional, fully_connected

every_choice = pytest.mark.parametrize("landmarks", LANDMARKS)


def points(n, width=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width))


def positions(fitted, x):
    """Which rows of x the landmarks are."""
    found = [
        np.flatnonzero((x == landmark).all(axis=tuple(range(1, x.ndim)))) for landmark in fitted.learned["landmarks"]
    ]
    assert all(len(f) == 1 for f in found)
    return np.array([f[0] for f in found])


# --- features -----------------------------------------------------------------------------------------------------


@every_choice
@pytest.mark.parametrize("kernel", [RBF(0.2), ArcCosine(1), NTK(fully_connected(2))], ids=lambda k: type(k).__name__)
def test_products_are_the_kernel_through_the_landmarks(kernel, landmarks):
    x, y = points(80), points(30, seed=1)
    fitted = Nystrom(kernel, 12, landmarks=landmarks).fit(x)
    s = positions(fitted, x)
    assert len(set(s)) == len(s) == fitted.n_components == 12
    expected = kernel(x, x[s]) @ pinvh(kernel(x[s])) @ kernel(x[s], y)
    np.testing.assert_allclose(fitted(x) @ fitted(y).T, expected, rtol=0, atol=1e-9 * expected.max())
    own = fitted(x[s])
    np.testing.assert_allclose(own @ own.T, kernel(x[s]), rtol=0, atol=1e-9 * expected.max())
    rest = kernel(x) - fitted(x) @ fitted(x).T
    assert np.linalg.eigvalsh(rest)[0] >= -1e-9 * expected.max()


@every_choice
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_rows_as_landmarks_give_the_kernel(landmarks, dtype):
    x = points(40).astype(dtype)
    for count in (40, 100):
        fitted = Nystrom(NTK(fully_connected(1)), count, landmarks=landmarks).fit(x)
        assert fitted.n_components == 40
        phi = fitted(x).astype("float64")
        exact = fitted.target(x.astype("float64"))
        np.testing.assert_allclose(
            phi @ phi.T, exact, rtol=0, atol={"float32": 1e-4, "float64": 1e-10}[dtype] * exact.max()
        )


def test_images():
    x = images(30)
    kernel = NTK(convolutional(2))
    fitted = Nystrom(kernel, 100).fit(x)
    phi = fitted(x)
    np.testing.assert_allclose(phi @ phi.T, kernel(x), rtol=0, atol=1e-8 * kernel.diagonal(x).max())
    assert fitted.learned["landmarks"].shape == (30, *IMAGE)
    with pytest.raises(InputError, match="images"):
        fitted(rows(3))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_directions_of_no_variance_are_dropped(dtype):
    """10 distinct rows three times, a zero row: the rank of the kernel is 10, or 3 in three dimensions."""
    x = np.concatenate([points(10), points(10), points(10), np.zeros((1, 6))]).astype(dtype)
    for landmarks in LANDMARKS:
        fitted = Nystrom(ArcCosine(1), 31, landmarks=landmarks).fit(x)
        assert fitted.n_components == 10
        phi = fitted(x).astype("float64")
        exact = ArcCosine(1)(x.astype("float64"))
        np.testing.assert_allclose(
            phi @ phi.T, exact, rtol=0, atol={"float32": 1e-4, "float64": 1e-9}[dtype] * exact.max()
        )
    linear = Nystrom(NTK(fully_connected(0)), 20).fit(points(50, 3).astype(dtype))
    assert linear.n_components == 3


def test_small_eigenvalues_do_not_blow_up_rounding():
    """A very smooth kernel: K_SS is of full rank on paper only."""
    x = points(200)
    for dtype, tolerance in (("float32", 1e-3), ("float64", 1e-8)):
        fitted = Nystrom(RBF(1e-3), 150, seed=1).fit(x.astype(dtype))
        assert fitted.n_components < 150
        phi = fitted(x.astype(dtype)).astype("float64")
        assert np.abs(phi @ phi.T - RBF(1e-3)(x)).max() < tolerance


def test_zero_rows_only_are_refused():
    with pytest.raises(InputError, match=r"of the landmarks is zero\. Rows of zeros have no features"):
        Nystrom(ArcCosine(1), 4).fit(np.zeros((10, 3)))


# --- choosing -----------------------------------------------------------------------------------------------------


def test_uniform_landmarks_are_uniform():
    x, count = points(20), 800
    hits = np.zeros(20)
    for seed in range(count):
        hits[positions(Nystrom(RBF(0.1), 5, seed=seed).fit(x), x)] += 1
    share = hits / count
    assert (np.abs(share - 0.25) <= 4.5 * np.sqrt(0.25 * 0.75 / count)).all()


def ridge_scores(kernel, x, preliminary):
    """The scores of the docstring, with every matrix written out."""
    k = kernel(preliminary)
    values = np.linalg.eigvalsh(k)
    head = max(1, len(values) // 4)
    ridge = values[:-head].sum() / head
    cross = kernel(x, preliminary)
    return kernel.diagonal(x) - np.diag(cross @ np.linalg.inv(k + ridge * np.eye(len(k))) @ cross.T)


def test_first_leverage_landmark_follows_the_scores():
    """One sample is drawn with probability in proportion to its score; the preliminary row is uniform."""
    kernel, x, count = RBF(0.3), points(8, 2), 1200
    expected, hits = np.zeros(8), np.zeros(8)
    for i in range(8):
        # one landmark: the preliminary kernel is 1×1, its ridge the rounding of 1
        scores = np.maximum(kernel.diagonal(x) - kernel(x, x[i : i + 1])[:, 0] ** 2, 16 * np.finfo(np.float64).eps)
        expected += scores / scores.sum() / 8
    for seed in range(count):
        hits[positions(Nystrom(kernel, 1, seed=seed, landmarks="leverage").fit(x), x)] += 1
    share = hits / count
    assert (np.abs(share - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()
    assert expected.max() / expected.min() > 1.2  # uniform draws would be seen


def test_preliminary_scores_are_ridge_leverage_scores():
    kernel, x = NTK(fully_connected(1)), points(60)
    feature_map = Nystrom(kernel, 20, landmarks="leverage")
    training = Training((6,), "float64", 0, 60)
    batch = TrainingBatch(x, None, None, np.arange(60))
    learned = feature_map.fit(x).learned.__class__()
    sums = feature_map.begin(0, learned, training)
    feature_map.accumulate(0, learned, batch, sums)
    learned += feature_map.finish(0, learned, sums, training)
    expected = ridge_scores(kernel, x, learned["landmarks"])
    np.testing.assert_allclose(feature_map._leverage(x, learned), expected, rtol=1e-9)


def clustered():
    """190 rows in one small cluster, ten single rows far from it and from one another."""
    rng = np.random.default_rng(0)
    return np.concatenate([0.05 * rng.standard_normal((190, 4)), 6 * rng.standard_normal((10, 4))])


@pytest.mark.parametrize("landmarks", ["leverage", "kmeans++"])
def test_rare_rows_are_found(landmarks):
    x, kernel = clustered(), RBF(0.5)
    found = {choice: [] for choice in ("uniform", landmarks)}
    for choice, counts in found.items():
        for seed in range(10):
            counts.append((positions(Nystrom(kernel, 50, seed=seed, landmarks=choice).fit(x), x) >= 190).sum())
    assert np.mean(found["uniform"]) < 4  # 2.5 expected
    assert np.mean(found[landmarks]) > 8


def test_kmeans_draws_from_a_uniform_sample():
    x = points(300)
    fitted = Nystrom(RBF(0.1), 5, seed=3, landmarks="kmeans++").fit(x)
    candidates = Nystrom(RBF(0.1), 5 * CANDIDATES, seed=3).fit(x)
    assert set(positions(fitted, x)) <= set(positions(candidates, x))


def in_turn(squares, count):
    """Probability of each row to be among `count` chosen one at a time: D² sampling by enumeration, the first uniform."""
    share = np.zeros(len(squares))

    def follow(chosen, probability):
        if len(chosen) == count:
            share[list(chosen)] += probability
            return
        distance = squares[:, list(chosen)].min(axis=1)
        for row in np.flatnonzero(distance):
            follow((*chosen, row), probability * distance[row] / distance.sum())

    for row in range(len(squares)):
        follow((row,), 1 / len(squares))
    return share


@pytest.mark.parametrize("landmarks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_kmeans_follows_squared_distances(landmarks):
    """Proposals come in batches (1, then 2, then 4): the law must be that of one at a time."""
    kernel, count = RBF(0.3), 1200
    x = np.array([[0, 0], [0.4, 0], [0.4, 0.3], [3, 0], [3, 0.5], [0, 2], [-1, -1], [-1, -1.2]])
    squares = 2 - 2 * kernel(x)
    np.fill_diagonal(squares, 0)
    expected, hits = in_turn(squares, landmarks), np.zeros(8)
    for seed in range(count):
        hits[positions(Nystrom(kernel, landmarks, seed=seed, landmarks="kmeans++").fit(x), x)] += 1
    share = hits / count
    assert (np.abs(share - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()
    assert expected.max() - expected.min() > 0.05


@every_choice
def test_rows_without_weight_are_no_landmarks(landmarks):
    x, weights = points(30), np.ones(30)
    weights[::3] = 0
    fitted = Nystrom(RBF(0.1), 30, landmarks=landmarks).fit(x, weights=weights)
    assert set(positions(fitted, x)) == set(np.flatnonzero(weights))
    with pytest.raises(InputError, match="no training row has a positive weight"):
        Nystrom(RBF(0.1), 3, landmarks=landmarks).fit(x, weights=np.zeros(30))


# --- streams ------------------------------------------------------------------------------------------------------


@every_choice
@pytest.mark.parametrize("sizes", [(100,), (7, 50, 43), (1,) * 100], ids=lambda sizes: str(len(sizes)))
def test_streams_choose_the_landmarks_of_memory(landmarks, sizes):
    """Slabs of one batch each, merged one after the other, each through the vector that storage keeps."""
    x = points(100).astype("float32").reshape(100, 2, 3)
    feature_map = Nystrom(NTK(fully_connected(1)), 15, seed=4, landmarks=landmarks)
    training = Training((2, 3), "float32", 0, 100)
    expected = feature_map.fit(x).learned
    learned = type(expected)()
    for index in range(feature_map.n_passes):
        slabs, start = [], 0
        for size in sizes:
            sums = feature_map.begin(index, learned, training)
            numbers = np.arange(start, start + size)
            feature_map.accumulate(index, learned, TrainingBatch(x[numbers], None, None, numbers), sums)
            vector = pack_sums(to_host_sums(sums))
            assert vector.nbytes == feature_map.sums_bytes((2, 3), 0)
            slabs.append(unpack_sums(vector.copy(), feature_map.begin(index, learned, training)))
            start += size
        total = slabs[0]
        for slab in slabs[1:]:
            total = feature_map.merge(index, total, slab)
        learned += feature_map.finish(index, learned, total, training)
    np.testing.assert_array_equal(learned["landmarks"], expected["landmarks"])
    np.testing.assert_allclose(
        learned["whitening"], expected["whitening"], rtol=0, atol=1e-9 * np.abs(expected["whitening"]).max()
    )


def test_states_give_the_map_back():
    fitted = Nystrom(RBF(0.1), 9, landmarks="leverage").fit(points(40))
    assert from_state(*to_state(fitted)) == fitted


@every_choice
def test_memory_of_calls_and_of_fitting_is_declared(landmarks):
    x = points(1500, 30)
    feature_map = Nystrom(RBF(0.01), 150, landmarks=landmarks)
    fitted = feature_map.fit(x)
    planned = fitted.workspace_bytes(1500, 8, (30,))
    peak = peak_bytes(lambda: fitted(x), planned)
    assert peak <= planned
    assert planned <= feature_map.workspace_bytes(1500, 8, (30,))
    assert planned <= 4 * peak
    training, index = Training((30,), "float64", 0, 1500), feature_map.n_passes - 1

    def accumulate():
        sums = feature_map.begin(index, fitted.learned, training)
        feature_map.accumulate(index, fitted.learned, TrainingBatch(x, None, None, np.arange(1500)), sums)

    planned = feature_map.fit_bytes(1500, 8, (30,), 0)
    peak = peak_bytes(accumulate, planned)
    assert peak <= planned
    assert planned <= 4 * peak
    sums = feature_map.begin(index, fitted.learned, training)
    feature_map.accumulate(index, fitted.learned, TrainingBatch(x, None, None, np.arange(1500)), sums)
    planned = feature_map.finish_bytes(8, (30,), 0)
    peak = peak_bytes(lambda: feature_map.finish(index, fitted.learned, sums, training), planned)
    assert peak <= planned
    assert planned <= 4 * peak


def test_an_estimator_fits_it():
    x = points(200)
    y = np.sin(x[:, 0])
    model = nd.RidgeRegressor(Nystrom(RBF(0.05), 80), alphas=(1e-6,)).fit(x, y)
    assert model.score(x, y) > 0.99
    transformer = nd.FeatureTransformer(Nystrom(RBF(0.05), 8)).fit(x)
    assert transformer.transform(x[:5]).shape == (5, 8)


@every_choice
def test_out_of_core_is_in_memory(landmarks, tmp_path):
    x = points(300)
    y = np.sin(x[:, 0])
    dataset = nd.write_dataset(tmp_path / "rows.zarr", x, y)
    feature_map = Nystrom(RBF(0.05), 60, landmarks=landmarks)
    memory = nd.RidgeRegressor(feature_map, alphas=(1e-3,)).fit(x, y)
    stored = nd.RidgeRegressor(feature_map, alphas=(1e-3,), url=tmp_path / "run").fit(dataset)
    np.testing.assert_allclose(stored.predict(x), memory.predict(x), rtol=0, atol=1e-9)
    assert memory.score(x, y) > 0.9


@pytest.mark.parametrize(
    ("network", "kernel"), [(None, {"type": "RBF", "gamma": 0.1}), ({"depth": 2}, {"type": "NTK"})]
)
def test_job_files_describe_it(network, kernel):
    features = {"type": "Nystrom", "n_components": 50, "landmarks": "leverage", "kernel": kernel}
    table = {"name": "landmarks", "data": {"train": "a", "test": "b"}, "features": features, "run": {"seed": 9}}
    if network:
        table["network"] = {"preset": "fully_connected", **network}
    job = build_job(table)
    expected = NTK(fully_connected(2)) if network else RBF(0.1)
    assert job.features == Nystrom(expected, 50, seed=9, landmarks="leverage")
    assert build_job(job.to_config()).features == job.features


@pytest.mark.gpu
@every_choice
def test_device_agrees_with_host(landmarks):
    x, feature_map = points(200), Nystrom(RBF(0.1), 20, landmarks=landmarks)
    host, device = feature_map.fit(x), feature_map.fit(arrays.to_device(x))
    np.testing.assert_array_equal(device.learned["landmarks"], host.learned["landmarks"])
    phi, own = host(x), device(arrays.to_device(x))
    assert arrays.is_device_array(own)
    own = arrays.to_host(own)
    np.testing.assert_allclose(own @ own.T, phi @ phi.T, rtol=0, atol=1e-9)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "rbf"}, r"kernel is 'rbf'; give one of ntkdask.kernels"),
        ({"kernel": RBF}, "kernel is the class RBF"),
        ({"landmarks": "leverag"}, "unknown landmarks 'leverag'; did you mean 'leverage'"),
        ({"landmarks": None}, "unknown landmarks None"),
        ({"n_components": 0}, "n_components is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        Nystrom(**{"kernel": RBF(1.0), "n_components": 8, **arguments})


def test_rows_that_do_not_fit_the_landmarks():
    fitted = Nystrom(RBF(1.0), 8).fit(points(20))
    with pytest.raises(InputError, match="5 features"):
        fitted(points(3, 5))
    with pytest.raises(InputError, match="no rows"):
        Nystrom(RBF(1.0), 8).fit(points(0))
    with pytest.raises(TypeError, match="int64"):
        fitted(np.ones((2, 6), "int64"))


@pytest.mark.parametrize("landmarks", LANDMARKS)
def test_component_indices_are_the_rows_of_the_landmarks(landmarks):
    """As scikit-learn's Nystroem has them; features and fingerprints do not depend on them."""
    x = np.random.default_rng(3).standard_normal((40, 3))
    weights = np.where(np.arange(40) % 2, 1.0, 0.0)
    fitted = Nystrom(RBF(0.5), 8, landmarks=landmarks).fit(x, weights=weights)
    assert fitted.component_indices_.dtype == np.int64
    assert len(set(fitted.component_indices_.tolist())) == 8
    assert (fitted.component_indices_ % 2 == 1).all()
    np.testing.assert_array_equal(x[fitted.component_indices_], fitted.learned["landmarks"])
    without = {name: a for name, a in fitted.learned.arrays.items() if name != "component_indices"}
    older = FittedMap(fitted.map, Learned(without))
    assert older.to_config() == fitted.to_config()
    with pytest.raises(AttributeError, match="no component_indices_"):
        older.component_indices_  # noqa: B018
