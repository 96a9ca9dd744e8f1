"""Training rows gathered for a kernel matrix: their order, what belongs to them, what is refused."""

import numpy as np
import pytest
from job_examples import stored

from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import InputError
from ntkdask.execution.site import Site
from ntkdask.preprocessing import FittedPreprocessor, fit_in_memory
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.states import save_state
from ntkdask.workflows.kernel_ridge.gather import Labels, gather, gather_in_memory
from ntkdask.workflows.split import state_of
from ntkdask.workflows.stream import ROWWISE, FeatureStream

N = 41
RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(N, 3)), RNG.normal(size=(N, 2))
WEIGHTS = RNG.uniform(0.5, 2.0, N)
PARTS = RNG.integers(0, 4, N).astype(np.int16)


def stream_of(rows, n_classes=None, batch_rows=7, dtype="float64", steps=()):
    fitted = (
        fit_in_memory(list(steps), X, dtype)
        if steps
        else FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    )
    return FeatureStream(rows, fitted, ROWWISE, n_classes, batch_rows)


def dataset_rows(folder, x=X, y=Y, weights=None, parts=None):
    data = stored(folder, x, y, weights=weights)
    url = None if parts is None else save_state(folder / "state", state_of(parts))
    return DatasetRows(data.url, url, digest=data.digest)


def test_groups_stand_side_by_side(tmp_path, client):
    """Groups in their order, rows within a group in theirs; parts that no group names are left out."""
    groups = [(2,), (0, 3)]
    order = np.concatenate([np.flatnonzero(PARTS == 2), np.flatnonzero(np.isin(PARTS, (0, 3)))])
    in_memory = gather_in_memory(stream_of(MemoryRows(X, Y, WEIGHTS, PARTS)), groups)
    rows = dataset_rows(tmp_path, weights=WEIGHTS, parts=PARTS)
    for name, where in (("here", None), ("there", client)):
        (tmp_path / name).mkdir()
        gathered = gather(stream_of(rows), groups, Site(tmp_path / name, where))
        labels = gathered.load()
        np.testing.assert_array_equal(gathered.dataset.rows(0, gathered.dataset.n), X[order])
        np.testing.assert_array_equal(labels.targets, Y[order])
        np.testing.assert_array_equal(labels.weights, WEIGHTS[order])
        assert labels.bounds == (0, int((PARTS == 2).sum()), len(order))
        assert gathered.dataset.kind == "unlabelled"
    points, labels = in_memory
    np.testing.assert_array_equal(points, X[order])
    assert labels.bounds == (0, int((PARTS == 2).sum()), len(order))


def test_one_group_of_all_without_groups(tmp_path):
    points, labels = gather_in_memory(stream_of(MemoryRows(X, Y)), ())
    np.testing.assert_array_equal(points, X)
    assert (labels.bounds, labels.weights, labels.n) == ((0, N), None, N)
    gathered = gather(stream_of(dataset_rows(tmp_path)), (), Site(tmp_path / "run"))
    np.testing.assert_array_equal(gathered.dataset.rows(0, N), X)
    assert gathered.load().weights is None


def test_points_are_the_fits_own_copy():
    x = X.copy()
    points, _ = gather_in_memory(stream_of(MemoryRows(x, Y), batch_rows=1000), ())
    points[:] = 0
    np.testing.assert_array_equal(x, X)


def test_rows_are_preprocessed_once_in_their_own_shape(tmp_path):
    images = RNG.integers(0, 256, (9, 2, 3, 1)).astype(np.uint8)
    labels = np.arange(9) % 3
    data = stored(tmp_path, images, labels)
    gathered = gather(
        stream_of(DatasetRows(data.url, digest=data.digest), 3, dtype="float32"), (), Site(tmp_path / "run")
    )
    assert gathered.dataset.row_shape == (2, 3, 1)
    assert gathered.dataset.dtype == "float32"
    np.testing.assert_allclose(gathered.dataset.rows(0, 9), images / np.float32(255))
    np.testing.assert_array_equal(gathered.load().targets, encode_targets(labels, 3, "float64"))
    points, _ = gather_in_memory(stream_of(MemoryRows(X, Y), steps=["standardize"]), ())
    np.testing.assert_allclose(points, (X - X.mean(axis=0)) / X.std(axis=0), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "int32", "bool", "uint8", "float32", "float64"])
@pytest.mark.parametrize("numerics", ["float32", "float64"])
def test_rows_of_any_dtype_are_cast(dtype, numerics):
    x = (10 * X).clip(0, 100).astype(dtype)
    points, _ = gather_in_memory(stream_of(MemoryRows(x, Y), dtype=numerics), ())
    np.testing.assert_array_equal(points, x.astype(numerics))
    assert points.dtype == numerics


def test_gathering_again_gives_the_new_rows(tmp_path):
    """Another fit may gather at the same place in one process: nothing of the first is taken for it."""
    first = gather(stream_of(dataset_rows(tmp_path)), (), Site(tmp_path / "run"))
    assert first.dataset.n == N
    (tmp_path / "other").mkdir()
    second = gather(stream_of(dataset_rows(tmp_path / "other", X[:5], Y[:5])), (), Site(tmp_path / "run"))
    assert second.points == first.points
    assert (second.dataset.n, second.load().n) == (5, 5)
    assert first.load().n == N


# labels


def test_labels_of_groups():
    labels = Labels(Y, WEIGHTS, (0, 10, 12, N))
    assert labels.rows(1) == slice(10, 12)
    np.testing.assert_array_equal(labels.groups(), np.repeat([0, 1, 2], [10, 2, N - 12]))
    assert list(labels.held_out("kfold")) == [0, 1, 2]
    assert list(labels.held_out("holdout")) == [2]
    without = labels.without(1)
    assert not without[10:12].any()
    np.testing.assert_array_equal(np.delete(without, [10, 11]), np.delete(WEIGHTS, [10, 11]))
    assert labels.without(None) is WEIGHTS
    plain = Labels(Y, None, (0, 10, N))
    assert plain.without(None) is None
    np.testing.assert_array_equal(plain.without(0), np.repeat([0.0, 1.0], [10, N - 10]))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_errors_are_weighted_means(weights):
    labels = Labels(Y, weights, (0, 10, N))
    predicted = RNG.normal(size=(10, 2))
    w = np.ones(10) if weights is None else weights[:10]
    naive = sum(w[i] * (predicted[i, j] - Y[i, j]) ** 2 for i in range(10) for j in range(2)) / (2 * w.sum())
    assert labels.error(0, predicted) == pytest.approx(naive, rel=1e-12)


# refusals


def test_rows_without_targets_or_rows(tmp_path):
    with pytest.raises(InputError, match="without targets"):
        gather_in_memory(stream_of(MemoryRows(X)), ())
    with pytest.raises(InputError, match="no rows to fit"):
        gather_in_memory(stream_of(MemoryRows(X[:0], Y[:0])), ())
    with pytest.raises(InputError, match="no rows with positive weight"):
        gather_in_memory(stream_of(MemoryRows(X, Y, np.zeros(N))), ())
    with pytest.raises(InputError, match=r"fold 1 has no rows .of positive weight"):
        gather_in_memory(stream_of(MemoryRows(X, Y, None, PARTS)), [(0,), (9,)])
    with pytest.raises(InputError, match=r"fold 1 has no rows .of positive weight"):
        gather_in_memory(stream_of(MemoryRows(X, Y, np.where(PARTS == 2, 0.0, 1.0), PARTS)), [(0,), (2,)])


def test_a_refusal_leaves_no_points(tmp_path):
    bare = stored(tmp_path, X, None)
    with pytest.raises(InputError, match="without targets"):
        gather(stream_of(DatasetRows(bare.url, digest=bare.digest)), (), Site(tmp_path / "run"))
    assert not (tmp_path / "run" / "points").exists()


def test_bad_rows_are_named_by_their_number():
    x = X.copy()
    x[[5, 6], 0] = np.nan
    with pytest.raises(InputError, match="rows 5, 6"):
        gather_in_memory(stream_of(MemoryRows(x, Y)), ())
    y = Y.copy()
    y[20, 1] = np.inf
    with pytest.raises(InputError, match=r"targets has NaN or infinite values in row 20"):
        gather_in_memory(stream_of(MemoryRows(X, y)), ())
