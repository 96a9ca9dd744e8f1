"""Gram sums against their definition: dtypes, weights, folds, packing."""

import numpy as np
import pytest
from solver_examples import WEIGHTED, problem, sums_of

from ntkdask.solvers.gram import Centre, GramSums, packed_length, packed_size, triangle_panels


def assert_sums(sums, phi, y, weights=None, tolerance=1e-12):
    """Against the definitions, in float64."""
    phi, w = phi.astype("float64"), np.ones(len(y)) if weights is None else weights
    lower = np.tril_indices(phi.shape[1])
    naive = {
        "gram": ((phi * w[:, None]).T @ phi)[lower],
        "cross": (phi * w[:, None]).T @ y,
        "features": w @ phi,
        "targets": w @ y,
        "squares": w @ y**2,
        "weight": w.sum(),
        "rows": (w > 0).sum(),
    }
    for name, expected in naive.items():
        found = sums.gram[lower] if name == "gram" else getattr(sums, name)
        scale = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("m", [1, 7, 255, 256, 257, 600])
def test_panels_cover_the_lower_triangle_once(m):
    count = np.zeros((m, m), int)
    for rows, columns in triangle_panels(m):
        count[rows, columns] += 1
    assert (count[np.tril_indices(m)] == 1).all()
    assert count.max() == 1
    assert packed_size(m) == count.sum()
    assert packed_length(m, 3) == count.sum() + 3 * m + m + 3 + 3 + 2


@WEIGHTED
@pytest.mark.parametrize(("n", "m", "batch"), [(50, 7, 50), (50, 7, 13), (300, 270, 128), (1, 3, 1)])
def test_float64_sums_against_their_definition(n, m, batch, weighted):
    phi, y, weights = problem(n, m)
    weights = weights if weighted else None
    assert_sums(sums_of(phi, y, weights, batch), phi, y, weights)


@WEIGHTED
def test_float32_sums_lose_only_one_batch_of_rounding(weighted):
    phi, y, weights = problem(4000, 20)
    phi, weights = phi.astype("float32"), weights if weighted else None
    product = np.zeros((20, 20), "float32", order="F")
    sums = GramSums.zeros(20, 2)
    for start in range(0, 4000, 250):
        rows = slice(start, start + 250)
        sums.add(phi[rows].copy(), y[rows], None if weights is None else weights[rows], product)
    # the Gram of a batch is a float32 product of 250 rows; everything else is summed in float64
    assert_sums(sums, phi, y, weights, tolerance=1e-6)
    assert sums.gram.dtype == sums.cross.dtype == "float64"
    if not weighted:
        np.testing.assert_allclose(sums.cross, phi.astype("float64").T @ y, rtol=1e-12)
        np.testing.assert_allclose(sums.features, phi.astype("float64").sum(axis=0), rtol=1e-12)


def test_rows_of_weight_zero_do_not_count():
    phi, y, weights = problem(30, 5)
    weights[::3] = 0
    kept = weights > 0
    sums = sums_of(phi, y, weights)
    assert sums.rows == kept.sum()
    assert_sums(sums, phi[kept], y[kept], weights[kept])


def test_sums_of_disjoint_rows_add_and_folds_subtract():
    phi, y, weights = problem(60, 300)
    total = sums_of(phi[:20], y[:20], weights[:20])
    total += sums_of(phi[20:], y[20:], weights[20:])
    assert_sums(total, phi, y, weights)
    rest = total.minus(sums_of(phi[20:45], y[20:45], weights[20:45]))
    keep = np.r_[0:20, 45:60]
    assert_sums(rest, phi[keep], y[keep], weights[keep], tolerance=1e-11)
    assert_sums(total, phi, y, weights)  # untouched


@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 3), (256, 1), (300, 2)])
def test_pack_and_unpack(m, k):
    phi, y, weights = problem(40, m, k)
    sums = sums_of(phi, y, weights)
    packed = sums.pack()
    assert packed.shape == (packed_length(m, k),)
    assert packed.dtype == "float64"
    again = GramSums.unpack(packed, m, k)
    assert_sums(again, phi, y, weights)
    np.testing.assert_array_equal(np.tril(again.gram), np.tril(sums.gram))
    assert (again.weight, again.rows) == (sums.weight, sums.rows)
    assert isinstance(again.rows, int)
    np.testing.assert_array_equal(again.pack(), packed)
    both = GramSums.unpack(packed + packed, m, k)  # the reduction adds packed vectors
    assert_sums(both, np.tile(phi, (2, 1)), np.tile(y, (2, 1)), np.tile(weights, 2))


@WEIGHTED
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_about_a_centre_move_add_and_subtract(dtype, weighted):
    """About one point, moved to another; sums about different points are brought to the left one's."""
    phi, y, weights = problem(60, 300)
    phi, y = (phi + 100).astype(dtype), y + 1000
    weights = weights if weighted else None
    first = Centre(np.full(300, 100.0), np.full(2, 1000.0))
    second = Centre(np.linspace(90, 110, 300).astype(dtype).astype(float), np.array([3.0, -5.0]))

    def sums_about(centre, rows):
        sums = GramSums.zeros(300, 2, centre=centre)
        sums.add(phi[rows].copy(), y[rows], None if weights is None else weights[rows])
        return sums

    tolerance = 1e-12 if dtype == "float64" else 1e-6
    about = lambda centre: (phi.astype(float) - centre.features, y - centre.targets)  # noqa: E731
    everything = slice(0, 60)
    sums = sums_about(first, everything)
    assert_sums(sums, *about(first), weights, tolerance)
    sums.move(second)
    assert_sums(sums, *about(second), weights, tolerance)
    sums.move(None)
    assert_sums(sums, phi, y, weights, 1e-9)
    total = sums_about(first, slice(0, 25))
    total += sums_about(second, slice(25, 60))
    assert_sums(total, *about(first), weights, 20 * tolerance)
    rest = total.minus(sums_about(second, slice(25, 60)))
    assert_sums(rest, *(a[:25] for a in about(first)), None if weights is None else weights[:25], 50 * tolerance)


def test_a_centre_is_near_the_mean_and_leaves_small_means_alone():
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((128, 5)) * [1.0, 1e-3, 1.0, 0.0, 20.0] + [1000.0, 5.0, 0.0, 0.1, 1990.0]
    phi = phi.astype("float32")
    centre = Centre.of_sample(phi, phi[:, :2].astype(float), np.ones(128)).features
    exact = phi.astype(float)
    assert (np.abs(centre - exact.mean(axis=0)) <= exact.std(axis=0) / 8).all()
    assert centre[2] == 0
    assert centre[3] == np.float32(0.1)
    np.testing.assert_array_equal(centre, centre.astype("float32"))
    # integers stay integers: their products are as exact as before
    assert centre[4] == round(centre[4])
