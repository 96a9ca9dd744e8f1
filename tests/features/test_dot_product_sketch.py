"""The direct sum of powers: its pieces one by one, the components it gives each, its expectation against explicit tensor powers."""

import numpy as np
import pytest

from ntkdask.errors import InputError
from ntkdask.features.dot_product_sketch import DotProductSketch, allocate, scaled_rows
from ntkdask.features.sketching.poly_sketch import PolySketch
from ntkdask.features.sketching.sketches import SRHT


def units(n, d, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1)[:, None]


def tensor_power(x, degree):
    """(n, d^degree): x_i ⊗ … ⊗ x_i, explicitly."""
    out = np.ones((len(x), 1))
    for _ in range(degree):
        out = np.einsum("ni,nj->nij", out, x).reshape(len(x), -1)
    return out


def test_is_the_direct_sum_of_its_sketches():
    x, sketch = units(5, 7), DotProductSketch((0, 1, 2, 5), (1.0, 1.0, 2.0, 1.0), 41, 3, ("path",))
    # a constant needs one component; the others have a third, 1 + 36·(1/4, 1/2, 1/4) of which the linear term takes the row's 7
    assert sketch.widths(7) == (1, 7, 22, 11)
    out = sketch.powers(x)
    expected = [np.ones((5, 1)), x]
    expected += [PolySketch(k, width, 3, ("path", k))(x, degrees=(k,))[0] for k, width in ((2, 22), (5, 11))]
    np.testing.assert_array_equal(out, np.concatenate(expected, axis=1))
    wide = units(5, 30)
    widths = sketch.widths(30)
    np.testing.assert_array_equal(sketch.powers(wide)[:, 1 : 1 + widths[1]], SRHT(widths[1], 3, ("path", 1))(wide))
    weights = np.arange(1.0, 21.0).reshape(4, 5)
    weighed = sketch.weigh(out, weights, 7, np.empty_like(out))
    np.testing.assert_array_equal(weighed, out * np.repeat(weights, sketch.widths(7), axis=0).T)
    into = np.full((5, 50), np.nan)
    np.testing.assert_array_equal(sketch.powers(x, into[:, 4:45]), out)
    assert np.isnan(into[:, :4]).all()
    assert np.isnan(into[:, 45:]).all()


def test_expectation_is_the_sum_of_explicit_tensor_powers():
    x, y, degrees, count = units(2, 4), units(3, 4, 1), (0, 1, 2, 3), 600
    w = np.array([0.5, 1.0, 0.7, 0.3])
    exact = sum(w[k] ** 2 * tensor_power(x, k) @ tensor_power(y, k).T for k in degrees)
    products = []
    for seed in range(count):
        sketch = DotProductSketch(degrees, tuple(w**2), 40, seed)
        left, right = (sketch.weigh(p, w[:, None], 4, p) for p in (sketch.powers(x), sketch.powers(y)))
        products.append(left @ right.T)
    error = np.std(products, axis=0, ddof=1) / np.sqrt(count)
    assert (np.abs(np.mean(products, axis=0) - exact) <= 4.5 * error).all()
    assert (error < 0.02).all()


def test_what_no_degree_needs_is_zero():
    sketch = DotProductSketch((0, 1), (1.0, 1.0), 20, 0)
    x = units(3, 5)
    out = np.full((3, 20), np.nan)
    sketch.powers(x, out)
    assert (out[:, 6:] == 0).all()
    other = np.full((3, 20), np.nan)
    sketch.weigh(out, np.ones((2, 1)), 5, other)
    np.testing.assert_array_equal(other, out)
    assert DotProductSketch((), (), 0, 0).powers(x).shape == (3, 0)


def test_fewer_components_than_powers_are_refused():
    with pytest.raises(InputError, match=r"n_components=2 .*3 powers .*degrees 1, 2, 4.*n_components >= 3"):
        DotProductSketch((1, 2, 4), (1.0, 1.0, 1.0), 2, 0)


@pytest.mark.parametrize("seed", range(40))
def test_allocation_keeps_its_limits_and_its_sum(seed):
    rng = np.random.default_rng(seed)
    count, spare = int(rng.integers(1, 9)), int(rng.integers(0, 200))
    shares = rng.exponential(size=count) * (rng.random(count) < 0.8)
    limits = rng.integers(1, 41, count).tolist()
    widths = allocate(shares, limits, count + spare)
    assert all(1 <= width <= limit for width, limit in zip(widths, limits, strict=True))
    assert sum(widths) == min(count + spare, sum(limits))


def test_allocation_follows_the_shares():
    assert allocate([1.0, 3.0], [100, 100], 42) == (11, 31)
    assert allocate([0.0, 0.0], [100, 100], 7) == (4, 3)
    assert allocate([5.0, 1.0, 1.0], [1, 100, 100], 21) == (1, 10, 10)
    assert allocate([1.0, 0.0], [3, 100], 20) == (3, 17)


def test_scaled_rows():
    x = np.arange(6, dtype="float32").reshape(3, 2)
    out = scaled_rows(x, np.array([1.0, 2.0, 0.5]), np.array([0.1, 0.2, 0.3]))
    assert out.dtype == "float32"
    np.testing.assert_allclose(out, [[0, 1, 0.1], [4, 6, 0.2], [2, 2.5, 0.3]], rtol=1e-7)
    assert scaled_rows(x, np.ones(3)).shape == (3, 2)
