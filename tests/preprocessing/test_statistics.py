"""Statistics of rows against NumPy: blocks in any order, cancellation, float64 for any dtype."""

import pickle

import numpy as np
import pytest
from preprocessing_examples import assert_near, images

from ntkdask.errors import InputError
from ntkdask.preprocessing import Moments, SecondMoments, rows
from ntkdask.preprocessing.rows import row_blocks


def assert_same_moments(a, b):
    assert a.n == b.n
    # 1e-13: reordered float64 sums of at most a few hundred terms, means relative to the spread.
    assert_near(a.m2, b.m2, 1e-13)
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-13 * (1 + np.abs(b.mean).max()))


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_moments_match_numpy(n):
    x = images(n)
    moments = Moments.of(x)
    flat = x.reshape(n, -1)
    assert moments.n == n
    assert_same_moments(moments, Moments(n, flat.mean(axis=0), n * flat.var(axis=0)))


@pytest.mark.parametrize("cuts", [[1], [50], [99], [3, 4, 60], list(range(1, 100))])
def test_blockwise_and_merged_in_any_order_is_whole(cuts):
    x = images(100)
    blocks = np.split(x, cuts)
    order = np.random.default_rng(len(cuts)).permutation(len(blocks))
    for cls in (Moments, SecondMoments):
        walked, merged = cls.empty(36), cls.empty(36)
        for block in blocks:
            walked = walked.update(block)
        for i in order:
            merged = merged.merge(cls.of(blocks[i]))
        if cls is Moments:
            assert_same_moments(walked, cls.of(x))
            assert_same_moments(merged, cls.of(x))
        else:
            assert walked.n == merged.n == 100
            assert_near(walked.xtx, x.reshape(100, -1).T @ x.reshape(100, -1), 1e-13)
            assert_near(merged.xtx, walked.xtx, 1e-13)


def test_row_blocks_cover_every_row_once_and_results_do_not_depend_on_them(monkeypatch):
    whole, x = Moments.of(images(50)), images(50)
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 36 * 7 + 5)
    assert [row for block in row_blocks(50, 36) for row in range(50)[block]] == list(range(50))
    assert max(block.stop - block.start for block in row_blocks(50, 36)) == 7
    assert list(row_blocks(3, 10_000)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(row_blocks(0, 3)) == []
    assert_same_moments(Moments.of(x), whole)


def test_moments_survive_catastrophic_cancellation():
    x = np.random.default_rng(1).standard_normal((4000, 3)) + np.array([1e6, -1e6, 1e8])
    moments = Moments.empty(3)
    for block in np.array_split(x, 7):
        moments = moments.update(block)
    exact = x.astype(np.longdouble).var(axis=0)
    # E[x²] − mean² would be off by 1e-4 at mean 1e6 and worthless at 1e8.
    np.testing.assert_allclose(moments.m2 / 4000, exact.astype("float64"), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int64", "bool"])
def test_statistics_are_float64_for_any_dtype(dtype):
    x = np.random.default_rng(0).integers(0, 2, (30, 4)).astype(dtype)
    moments, second = Moments.of(x), SecondMoments.of(x)
    assert moments.mean.dtype == moments.m2.dtype == second.xtx.dtype == np.float64
    assert_same_moments(moments, Moments.of(x.astype("float64")))
    np.testing.assert_array_equal(second.xtx, x.astype("float64").T @ x.astype("float64"))


def test_second_moments_update_in_place_but_merge_does_not():
    x = images(20)
    a, b = SecondMoments.of(x[:5]), SecondMoments.of(x[5:])
    before, buffer = a.xtx.copy(), a.xtx
    merged = a.merge(b)
    np.testing.assert_array_equal(a.xtx, before)
    assert a.update(x[5:]) is a
    assert a.xtx is buffer
    assert_near(a.xtx, merged.xtx, 1e-13)


def test_statistics_of_other_widths_are_refused_and_pickle():
    with pytest.raises(InputError, match="4 features, the statistics 3"):
        Moments.empty(3).update(np.zeros((2, 4)))
    with pytest.raises(InputError, match="4 features, the statistics 3"):
        SecondMoments.empty(3).merge(SecondMoments.empty(4))
    x = images(5)
    assert_same_moments(pickle.loads(pickle.dumps(Moments.of(x))), Moments.of(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(SecondMoments.of(x))).xtx, SecondMoments.of(x).xtx)
