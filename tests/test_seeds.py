"""Random streams: golden values, independence of sizes and blocks, statistics."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from ntkdask import seeds
from ntkdask.seeds import COLUMN_BLOCK

CONFIDENCE = 1e-4  # of one fixed draw per test: a failure means that the stream changed and is wrong


def test_golden_values():
    """Changing any of these changes every result ever computed with a seed."""
    assert COLUMN_BLOCK == 256
    assert seeds.raw_bits(0, (), 2).tolist() == [2748127362102375290, 9674695825801782634]
    assert seeds.raw_bits(7, ("w", 1), 3, block=2).tolist() == [
        18435548642511509158,
        12483310937559794304,
        15877485873866974406,
    ]
    np.testing.assert_allclose(seeds.uniforms(7, ("w", 1), 2), [0.67490963, 0.6174188], rtol=1e-7)
    golden = [
        [1.156034873922776, -1.2875753302222488, 2.454953821582773, 1.8012460580166447, -0.19040480335391685],
        [0.5408010622515197, -0.5154665790423666, -0.5189105521105135, -0.8677119701537145, -1.2259728842726794],
    ]
    drawn = seeds.normals(7, ("w",), 2, 300)[:, [0, 1, 255, 256, 299]]
    np.testing.assert_allclose(drawn, golden, rtol=1e-14)
    golden = [
        [0.6376593704664606, -0.39863185816046054],
        [0.2983014376830411, -0.8355992454911865],
        [-0.7102160090652335, 0.3779769074878762],
    ]
    np.testing.assert_allclose(seeds.sphere(7, ("w",), 3, 2), golden, rtol=1e-14)
    assert seeds.signs(7, ("s",), 8).tolist() == [1, 1, 1, 1, -1, -1, -1, 1]
    assert seeds.permutation(7, ("p",), 10).tolist() == [2, 1, 8, 4, 9, 5, 6, 7, 0, 3]
    assert seeds.balanced_integers(7, ("p",), 4, 10).tolist() == [2, 1, 0, 3, 0, 1, 3, 2, 0, 2]


def test_another_process_draws_the_same():
    """String hashes differ from process to process; keys must not."""
    code = "from ntkdask import seeds; print(seeds.normals(3, ('a', 2), 4, 5).tobytes().hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == seeds.normals(3, ("a", 2), 4, 5).tobytes().hex()


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
def test_columns_do_not_depend_on_how_many_are_asked_for(columns):
    whole = seeds.normals(1, ("w",), 5, 1000)
    np.testing.assert_array_equal(seeds.normals(1, ("w",), 5, columns), whole[:, :columns])
    np.testing.assert_array_equal(seeds.sphere(1, ("w",), 5, columns), seeds.sphere(1, ("w",), 5, 1000)[:, :columns])


def test_a_column_block_comes_from_its_own_counter():
    whole = seeds.normals(1, ("w",), 5, 3 * COLUMN_BLOCK)
    block = stats.norm.ppf(seeds.uniforms(1, ("w",), 5 * COLUMN_BLOCK, block=2)).reshape(COLUMN_BLOCK, 5).T
    np.testing.assert_allclose(whole[:, 2 * COLUMN_BLOCK :], block, rtol=1e-13)


@pytest.mark.parametrize("draw", [seeds.normals, seeds.sphere])
def test_float32_weights_are_the_float64_ones_rounded(draw):
    narrow = draw(1, ("w",), 5, 300, "float32")
    assert narrow.dtype == "float32"
    np.testing.assert_array_equal(narrow, draw(1, ("w",), 5, 300).astype("float32"))
    assert draw(1, ("w",), 5, 300).flags.c_contiguous


def test_prefixes_of_signs_and_balanced_integers():
    np.testing.assert_array_equal(seeds.signs(1, ("s",), 1000)[:77], seeds.signs(1, ("s",), 77))
    long = seeds.balanced_integers(1, ("p",), 16, 100)
    np.testing.assert_array_equal(long[:37], seeds.balanced_integers(1, ("p",), 16, 37))
    assert seeds.balanced_integers(1, ("p",), 16, 0).shape == (0,)


def test_uniforms_and_normals_follow_their_laws():
    u = seeds.uniforms(5, ("u",), 100_000)
    assert 0 < u.min() < u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > CONFIDENCE
    z = seeds.normals(5, ("z",), 100, 1000)
    assert stats.kstest(z.ravel(), "norm").pvalue > CONFIDENCE
    assert abs(z.mean()) <= 4 / np.sqrt(z.size)
    assert abs(z.var() - 1) <= 4 * np.sqrt(2 / z.size)


def test_columns_are_uncorrelated_within_and_across_blocks():
    z = seeds.normals(5, ("c",), 20_000, 260)
    correlation = np.corrcoef(z[:, [0, 1, 2, 254, 255, 256, 257]].T)
    off = correlation[np.tril_indices(7, -1)]
    assert np.abs(off).max() <= 4.5 / np.sqrt(len(z))


def test_sphere_has_unit_columns_of_uniform_direction():
    u = seeds.sphere(5, ("s",), 3, 20_000)
    np.testing.assert_allclose(np.linalg.norm(u, axis=0), 1, rtol=1e-14)
    # Archimedes: a coordinate of a uniform point on the sphere of R³ is uniform on [-1, 1]
    for coordinate in u:
        assert stats.kstest(coordinate, stats.uniform(-1, 2).cdf).pvalue > CONFIDENCE


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8"])
def test_signs_are_balanced_and_uncorrelated(dtype):
    s = seeds.signs(5, ("s",), 100_000, dtype)
    assert s.dtype == dtype
    assert set(np.unique(s)) == {-1, 1}
    s = s.astype(float)
    assert abs(s.sum()) <= 4 * np.sqrt(s.size)
    for lag in (1, 2, 63, 64, 65):
        assert abs(s[:-lag] @ s[lag:]) <= 4.5 * np.sqrt(s.size)


@pytest.mark.parametrize(("high", "count"), [(8, 3), (8, 8), (8, 29), (1, 5), (1000, 1500)])
def test_balanced_integers_take_each_value_equally_often(high, count):
    drawn = seeds.balanced_integers(2, ("b",), high, count)
    assert drawn.shape == (count,)
    times = np.bincount(drawn, minlength=high)
    assert len(times) == high
    assert times.min() >= count // high
    assert times.max() <= -(-count // high)


def test_permutations_are_uniform():
    seen = [tuple(seeds.permutation(seed, ("p",), 3)) for seed in range(3000)]
    counts = np.array([seen.count(p) for p in sorted(set(seen))])
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > CONFIDENCE
    assert sorted(seeds.permutation(1, ("p",), 500)) == list(range(500))
    assert not np.array_equal(seeds.permutation(1, ("p",), 50, block=0), seeds.permutation(1, ("p",), 50, block=1))


def test_paths_are_unambiguous_and_independent():
    paths = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), ("a", 1, 0), (1, "a"), (1,)]
    draws = [seeds.normals(root, path, 1, 256)[0] for root in (0, 1, -1) for path in paths]
    correlation = np.corrcoef(draws)[np.tril_indices(len(draws), -1)]
    assert np.abs(correlation).max() <= 5 / np.sqrt(256)


def test_numpy_integers_are_seeds_too():
    np.testing.assert_array_equal(seeds.normals(np.int64(3), ("a",), 2, 2), seeds.normals(3, ("a",), 2, 2))
