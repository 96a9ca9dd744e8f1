"""Splits: equal rows stay together, parts of the asked size, the same for the same seed on any cluster."""

import numpy as np
import pytest
from job_examples import stored

from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import InputError
from ntkdask.workflows.split import LEFT_OUT, deal, group_rows, hold_out, keep, state_of

PATH = ("split", "outer")


def with_duplicates(n: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(n // 2, 3))
    return distinct[rng.integers(0, len(distinct), n)]


def parts_of(kind, groups, shuffle=True, seed=0, **changes):
    if kind == "deal":
        return deal(groups, changes.get("n_parts", 4), shuffle=shuffle, seed=seed, path=PATH)
    return hold_out(groups, changes.get("fraction", 0.25), shuffle=shuffle, seed=seed, path=PATH)


def test_groups_are_equal_rows():
    x = with_duplicates()
    groups = group_rows(MemoryRows(x))
    _, expected = np.unique(x, axis=0, return_inverse=True)
    assert len(np.unique(groups)) == len(np.unique(expected))
    assert len(np.unique(np.stack([groups, expected.ravel()]), axis=1).T) == len(np.unique(groups))
    assert (groups <= np.arange(len(x))).all()  # a group is named by its first row
    assert (x[groups] == x).all()


def test_groups_of_a_dataset_on_a_cluster(tmp_path, client):
    x = with_duplicates()
    rows = DatasetRows(stored(tmp_path, x, np.zeros(len(x))).url)
    assert np.array_equal(group_rows(rows, client), group_rows(MemoryRows(x)))


def test_a_bit_makes_another_group():
    x = np.zeros((3, 2))
    x[1, 1] = np.nextafter(0, 1)
    assert group_rows(MemoryRows(x)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["deal", "hold_out"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_duplicates_stay_in_one_part(kind, shuffle):
    groups = group_rows(MemoryRows(with_duplicates()))
    parts = parts_of(kind, groups, shuffle)
    assert parts.dtype == np.int16
    for group in np.unique(groups):
        assert len(set(parts[groups == group])) == 1


@pytest.mark.parametrize("n", [7, 100, 101])
@pytest.mark.parametrize("n_parts", [2, 3, 7])
def test_folds_have_equal_sizes(n, n_parts):
    sizes = np.bincount(deal(np.arange(n), n_parts, shuffle=True, seed=1, path=PATH), minlength=n_parts)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


def test_folds_of_groups_are_off_by_a_group_at_most():
    groups = group_rows(MemoryRows(with_duplicates()))
    largest = np.bincount(groups).max()
    sizes = np.bincount(parts_of("deal", groups), minlength=4)
    assert np.abs(sizes - len(groups) / 4).max() <= largest


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_held_out_fraction(fraction, shuffle):
    parts = hold_out(np.arange(1000), fraction, shuffle=shuffle, seed=3, path=PATH)
    assert parts.sum() == round(1000 * fraction)
    if not shuffle:
        assert (np.diff(parts) >= 0).all()  # the last rows


def test_a_fraction_of_few_rows_is_one_row():
    assert hold_out(np.arange(3), 0.1, shuffle=True, seed=0, path=PATH).sum() == 1


def test_folds_without_shuffle_are_stretches():
    assert deal(np.arange(6), 3, shuffle=False, seed=0, path=PATH).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["deal", "hold_out"])
def test_the_seed_decides(kind):
    groups = np.arange(200)
    assert np.array_equal(parts_of(kind, groups), parts_of(kind, groups))
    assert not np.array_equal(parts_of(kind, groups), parts_of(kind, groups, seed=1))
    inner = deal(groups, 4, shuffle=True, seed=0, path=("split", "inner"))
    assert not np.array_equal(inner, deal(groups, 4, shuffle=True, seed=0, path=PATH))


def test_shuffled_folds_are_independent_of_the_order_of_rows():
    """Every fold holds rows from everywhere: |mean − exact| ≤ 4·std/√k over k seeds."""
    means = [np.flatnonzero(deal(np.arange(100), 4, shuffle=True, seed=s, path=PATH) == 0).mean() for s in range(60)]
    assert abs(np.mean(means) - 49.5) <= 4 * np.std(means) / 60**0.5
    assert np.std(means) > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parts_of("deal", np.zeros(9, int), n_parts=2), "2 folds of 1 distinct rows: use at most 1"),
        (lambda: parts_of("deal", np.arange(3), n_parts=4), "use at most 3 folds"),
        (lambda: parts_of("hold_out", np.arange(9), fraction=0.0), "between 0 and 1"),
        (lambda: parts_of("hold_out", np.arange(9), fraction=1.0), "between 0 and 1"),
        (lambda: parts_of("hold_out", np.arange(9), fraction=float("nan")), "between 0 and 1"),
        (lambda: parts_of("hold_out", np.zeros(9, int)), "leaves one side of 1 distinct rows empty"),
    ],
)
def test_splits_that_cannot_be(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_parts_are_stored_as_rows_read_them():
    assert state_of(np.array([0, 2, 1]))["part"].dtype == np.int16


# part of the rows


@pytest.mark.parametrize("count", [1, 7, 50])
def test_keeping_some_rows_of_a_part(count):
    parts = np.tile(np.array([0, 1], np.int16), 50)
    found = keep(parts, 1, count, seed=0)
    assert found.dtype == np.int16
    assert (found == 1).sum() == count
    assert (found[parts == 0] == 0).all()
    assert set(found[parts == 1]) <= {1, LEFT_OUT}
    assert (parts == np.tile([0, 1], 50)).all()
    assert np.array_equal(found, keep(parts, 1, count, seed=0))


def test_fewer_rows_are_among_more():
    parts = np.zeros(60, np.int16)
    few, many = (keep(parts, 0, count, seed=3) == 0 for count in (10, 25))
    assert many[few].all()
    assert not np.array_equal(few, keep(parts, 0, 10, seed=4) == 0)
    assert keep(parts, 0, None, seed=3) is parts


def test_more_rows_than_there_are():
    with pytest.raises(InputError, match=r"61 rows are to be kept of 60\. Leave the number out"):
        keep(np.zeros(60, np.int16), 0, 61, seed=0)
