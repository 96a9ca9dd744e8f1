"""Gram sums over slabs and batches: the naive sums, from any address of rows, resumed to the same bits."""

import numpy as np
import pytest
from job_examples import (
    Counter,
    Killed,
    class_data,
    damage,
    feature_map,
    naive_sums,
    regression_data,
    ridge_plan,
    site_of,
    stored,
)

from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import FingerprintError, InputError
from ntkdask.execution.progress import Record
from ntkdask.execution.tree import tree_nodes
from ntkdask.preprocessing import FittedPreprocessor, fit_in_memory, parse_steps
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.solvers.gram import GramSums
from ntkdask.states import save_state
from ntkdask.store import RECEIPTS, TileStore
from ntkdask.workflows.preprocess import fit_preprocessing
from ntkdask.workflows.ridge.gram import SumsAddress, gram
from ntkdask.workflows.split import state_of
from ntkdask.workflows.stream import FeatureStream

# of the largest entry; float32: products of a batch are rounded once
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


def stream_of(rows, map=None, dtype="float64", n_classes=None, batch_rows=32, fitted=None):
    fitted = fitted or FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    return FeatureStream(rows, fitted, map, n_classes, batch_rows)


def assert_close(sums: GramSums, expected: dict, tolerance: float) -> None:
    for name, value in expected.items():
        found = np.tril(sums.gram) if name == "gram" else getattr(sums, name)
        value = np.tril(value) if name == "gram" else value
        assert np.abs(found - value).max() <= tolerance * max(1.0, np.abs(value).max()), name
    assert sums.rows == expected["rows"]


def equal(a: GramSums, b: GramSums) -> bool:
    return a.pack().tobytes() == b.pack().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("slab_rows", "batch_rows"), [(150, 150), (64, 32), (37, 10), (1, 1), (500, 499)])
def test_any_slab_and_batch(dtype, slab_rows, batch_rows):
    x, y = regression_data(k=2)
    map = feature_map()
    plan = ridge_plan(dtype, slab_rows, batch_rows)
    sums = gram(stream_of(MemoryRows(x, y), map, dtype, batch_rows=batch_rows), 2, plan.slab_rows, site_of())
    assert_close(sums, naive_sums(map(x.astype(dtype)), y), TOLERANCE[dtype])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("where", ["memory", "dataset"])
@pytest.mark.parametrize("parts", [None, (1,), (0, 2)])
def test_addresses_parts_and_weights(tmp_path, where, parts, weighted):
    x, y = regression_data()
    rng = np.random.default_rng(5)
    part = rng.integers(0, 3, len(x)).astype(np.int16)
    part[64:128] = 1  # a slab without rows of the others
    weights = rng.integers(0, 3, len(x)) * 0.5 if weighted else None
    if where == "memory":
        rows = MemoryRows(x, y, weights, None if parts is None else part, parts or ())
    else:
        url = stored(tmp_path, x, y, weights=weights).url
        rows = DatasetRows(url, None if parts is None else save_state(tmp_path / "state", state_of(part)), parts or ())
    chosen = np.ones(len(x), bool) if parts is None else np.isin(part, parts)
    before = x.copy()
    map = feature_map()
    sums = gram(stream_of(rows, map), 1, 64, site_of())
    expected = naive_sums(map(x[chosen]), y[chosen], None if weights is None else weights[chosen])
    assert_close(sums, expected, TOLERANCE["float64"])
    assert np.array_equal(x, before)


@pytest.mark.parametrize("parts", [None, np.zeros(150, np.int16)])
def test_the_users_array_is_not_scaled_by_weights(parts):
    """Features None and nothing to cast: the batch is a view of the user's x."""
    x, y = regression_data()
    before = x.copy()
    rows = MemoryRows(x, y, np.full(len(x), 4.0), parts, (0,))
    for _ in range(2):
        assert_close(gram(stream_of(rows), 1, 64, site_of()), naive_sums(x, y, np.full(len(x), 4.0)), 1e-13)
    assert np.array_equal(x, before)


def test_a_read_only_array_is_read(tmp_path):
    x, y = regression_data()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    sums = gram(stream_of(MemoryRows(mapped, y, np.ones(len(x)))), 1, 64, site_of())
    assert_close(sums, naive_sums(x, y), 1e-13)


def test_labels_become_zero_mean_one_hot_targets():
    x, labels = class_data()
    map = feature_map()
    sums = gram(stream_of(MemoryRows(x, labels), map, n_classes=3), 3, 64, site_of())
    assert_close(sums, naive_sums(map(x.astype("float64")), encode_targets(labels, 3, "float64")), 1e-13)


@pytest.mark.parametrize(
    ("steps", "shape", "dtype"),
    [
        (["standardize"], (6,), "float64"),
        (["zca"], (4, 4, 3), "uint8"),
        (["standardize_channels", "unit_norm"], (4, 4, 3), "uint8"),
    ],
)
def test_preprocessed_images_and_tables(tmp_path, client, steps, shape, dtype):
    """Fitted over slabs of the selected rows, in this process and on workers, against one fit of the rows in memory."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 256, (120, *shape)).astype(dtype)
    part = (np.arange(120) % 3 == 0).astype(np.int16)
    parts_url = save_state(tmp_path / "state", state_of(part))
    rows = DatasetRows(stored(tmp_path, x, np.zeros(120)).url, parts_url, (0,))
    expected = fit_in_memory(steps, x[part == 0], "float64")
    map, plan = feature_map(), ridge_plan(slab_rows=50, batch_rows=16)
    for runner in (None, client):
        fitted = fit_preprocessing(rows, parse_steps(steps), plan, site_of(client=runner, url=tmp_path))
        assert np.allclose(fitted(x), expected(x), rtol=1e-9, atol=1e-9)
        sums = gram(stream_of(rows, map, fitted=fitted), 1, plan.slab_rows, site_of())
        assert_close(sums, naive_sums(map(expected(x[part == 0])), np.zeros(80)), 1e-9)


def test_overflow_is_named_by_row(tmp_path, client):
    x, y = regression_data()
    x[[77, 140], 2] = 1e300  # finite in the store, infinite in float32
    rows = DatasetRows(stored(tmp_path, x, y).url)
    plan = ridge_plan("float32")
    with pytest.raises(InputError, match=r"NaN or infinite values in row"):
        gram(stream_of(rows, feature_map(), "float32"), 1, plan.slab_rows, site_of(tmp_path, client), name="g")
    with pytest.raises(InputError, match=r"row 77\b"), np.errstate(over="ignore"):
        gram(stream_of(rows, feature_map(), "float32"), 1, plan.slab_rows, site_of())


# stored sums, resumed


def stored_gram(folder, rows, client=None, listener=None, seed=0):
    record = Record(fingerprint={"seed": seed})
    return gram(stream_of(rows, feature_map(), "float32"), 1, 16, site_of(folder, client, listener, record))


@pytest.fixture
def rows(tmp_path):
    return DatasetRows(stored(tmp_path, *regression_data()).url)  # 150 rows: 10 slabs of 16, 19 nodes


def test_stored_sums_are_those_in_memory(tmp_path, rows, client):
    plain = stored_gram(None, rows)
    for name, runner in (("loop", None), ("cluster", client)):
        address = stored_gram(tmp_path / name, rows, runner)
        assert isinstance(address, SumsAddress)
        assert equal(address.load(), plain)
        # partial sums are given up as soon as their parent is there
        chunks = [p for p in (tmp_path / name / "gram" / "c").rglob("*") if p.is_file()]
        assert chunks == [TileStore.open(address.url).chunk_path((18, 0))]


def test_one_worker_and_two_give_equal_bits(tmp_path, rows, one_worker, two_workers):
    two = stored_gram(tmp_path / "two", rows, two_workers).load()
    assert equal(stored_gram(tmp_path / "one", rows, one_worker).load(), two)


def test_finished_sums_are_not_computed_again(tmp_path, rows):
    first = stored_gram(tmp_path, rows).load()
    listener = Counter()
    assert equal(stored_gram(tmp_path, rows, listener=listener).load(), first)
    assert listener.labels == []


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 11, 18, 19])
def test_resume_goes_on_where_it_stopped(tmp_path, rows, stop_at):
    whole = stored_gram(tmp_path / "whole", rows).load()
    with pytest.raises(Killed):
        stored_gram(tmp_path, rows, listener=Counter(stop_at))
    listener = Counter()
    assert equal(stored_gram(tmp_path, rows, listener=listener).load(), whole)
    assert len(listener.labels) == len(tree_nodes(10)) - stop_at


def test_resume_on_a_cluster(tmp_path, rows, client):
    whole = stored_gram(tmp_path / "whole", rows).load()
    with pytest.raises(Killed):
        stored_gram(tmp_path, rows, client, Counter(7))
    listener = Counter()
    assert equal(stored_gram(tmp_path, rows, client, listener).load(), whole)
    assert len(listener.labels) == 19 - 7


def test_a_lost_root_is_computed_again(tmp_path, rows):
    address = stored_gram(tmp_path, rows)
    first = address.load()
    TileStore.open(address.url).chunk_path((address.index, 0)).unlink()
    assert equal(stored_gram(tmp_path, rows).load(), first)


def test_a_lost_partial_sum_costs_its_own_slabs_alone(tmp_path, rows):
    whole = stored_gram(tmp_path / "whole", rows).load()
    with pytest.raises(Killed):
        stored_gram(tmp_path, rows, listener=Counter(14))
    store = TileStore.open(tmp_path / "gram")
    there = [i for i in store.receipts if store.chunk_path(i).exists()]
    store.chunk_path(there[0]).unlink()
    listener = Counter()
    assert equal(stored_gram(tmp_path, rows, listener=listener).load(), whole)
    assert 19 - 14 < len(listener.labels) < 19


def test_a_damaged_partial_sum_is_refused(tmp_path, rows):
    with pytest.raises(Killed):
        stored_gram(tmp_path, rows, listener=Counter(2))
    damage(tmp_path / "gram", (1, 0))
    with pytest.raises(Exception, match=r"tile \(1, 0\) .* is damaged"):
        stored_gram(tmp_path, rows)


def test_sums_of_another_run_are_refused(tmp_path, rows):
    stored_gram(tmp_path, rows)
    with pytest.raises(FingerprintError, match="seed: stored 0, asked 1"):
        stored_gram(tmp_path, rows, seed=1)


def test_receipts_tell_what_slabs_took(tmp_path, rows, client):
    stored_gram(tmp_path, rows, client)
    lines = (tmp_path / "gram" / RECEIPTS).read_text().splitlines()
    assert sum("discarded" in line for line in lines) == 18
    assert sum("checksum" in line for line in lines) == 19
    assert sum("tcp://127.0.0.1" in line for line in lines) == 19
