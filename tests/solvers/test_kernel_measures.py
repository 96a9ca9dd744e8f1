"""Measures of pseudo- and empirical NTKs against what is written out with Kronecker products and loops over pairs."""

import math
import tracemalloc

import numpy as np
import pytest

from ntkdask.errors import DtypeError, InputError
from ntkdask.solvers import kernel_measures
from ntkdask.solvers.kernel_measures import (
    accuracy,
    block_view,
    kernel_sums,
    power_law,
    prediction_difference,
    pseudo_of,
    relative_difference,
    stacked,
)

TOLERANCE = {"float32": 1e-6, "float64": 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def jacobians(n, outputs, seed=0, parameters=40):
    return np.random.default_rng(seed).standard_normal((n, outputs, parameters))


def kernels(n=7, m=5, outputs=3, dtype="float64"):
    """(Θ (n, m, O, O), Θ̂ (n, m)) of random Jacobians."""
    left, right = jacobians(n, outputs), jacobians(m, outputs, 1)
    theta = np.einsum("nap,mbp->nmab", left, right)
    pseudo = left.sum(axis=1) @ right.sum(axis=1).T / outputs
    return theta.astype(dtype), pseudo.astype(dtype)


def naive(theta, pseudo):
    """Every measure as it is defined, float64, Θ̂ ⊗ I formed."""
    n, m, outputs, _ = theta.shape
    full = np.block([[theta[i, j] for j in range(m)] for i in range(n)]).astype(np.float64)
    kron = np.kron(pseudo.astype(np.float64), np.eye(outputs))
    norm, ratios, on, off = np.linalg.norm(full), [], 0.0, 0.0
    for i in range(n):
        for j in range(m):
            block = theta[i, j].astype(np.float64)
            diagonal = np.diag(np.diag(block))
            ratios.append(np.linalg.norm(block - diagonal) / np.linalg.norm(diagonal))
            on, off = on + np.sum(diagonal**2), off + np.sum((block - diagonal) ** 2)
    return {
        "off_diagonal_ratio": np.mean(ratios),
        "pooled_off_diagonal_ratio": math.sqrt(off / on),
        "frobenius": np.linalg.norm(full - kron) / norm,
        "norm_difference": abs(np.linalg.norm(kron) - norm) / norm,
    }


def assert_sums(found, theta, pseudo, tolerance):
    __tracebackhide__ = True
    for name, value in naive(theta, pseudo).items():
        assert getattr(found, name) == pytest.approx(value, rel=tolerance), name


@DTYPES
@pytest.mark.parametrize("given", [True, False])
def test_sums_against_kronecker_products(dtype, given):
    theta, pseudo = kernels(dtype=dtype)
    found = kernel_sums(theta, pseudo if given else None)
    assert (found.pairs, found.outputs) == (35, 3)
    # a pseudo-NTK that is given comes with the rounding of its own sums
    assert_sums(found, theta, pseudo if given else pseudo_of(theta.astype("float64")), TOLERANCE[dtype])


@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_any_number_of_outputs(outputs):
    theta, pseudo = kernels(4, 6, outputs)
    found = kernel_sums(theta, pseudo)
    if outputs > 1:
        assert_sums(found, theta, pseudo, 1e-12)
    else:
        assert found.off_diagonal == found.ratios == 0.0
        assert found.frobenius < 1e-15


@pytest.mark.parametrize("strip", [1, 2000, 10**6])
def test_strips_do_not_matter(monkeypatch, strip):
    monkeypatch.setattr(kernel_measures, "STRIP_BYTES", strip)
    theta, pseudo = kernels(11, 4)
    assert_sums(kernel_sums(theta, pseudo), theta, pseudo, 1e-13)


def test_sums_of_tiles_are_sums_of_the_whole():
    """Ragged tiles of a symmetric matrix: those off the diagonal count twice."""
    left = jacobians(9, 4)
    theta = np.einsum("nap,mbp->nmab", left, left)
    tiles = [slice(0, 4), slice(4, 8), slice(8, 9)]
    parts = [
        kernel_sums(theta[rows, columns]).times(1 if i == j else 2)
        for i, rows in enumerate(tiles)
        for j, columns in enumerate(tiles[: i + 1])
    ]
    total = sum(parts[1:], start=parts[0])
    assert total.pairs == 81
    assert_sums(total, theta, pseudo_of(theta), 1e-13)
    with pytest.raises(InputError, match="of 4 and of 3 outputs"):
        total + kernel_sums(kernels()[0])


@pytest.mark.parametrize("size", [1e-6, 1e-9])
def test_a_small_difference_does_not_drown(size):
    """‖Θ‖² − 2⟨Θ, Θ̂⊗I⟩ + ‖Θ̂⊗I‖² would lose everything below 1e-8."""
    rng = np.random.default_rng(3)
    pseudo = rng.random((6, 6))
    change = rng.standard_normal((6, 6, 3, 3))
    change -= (np.einsum("nmab->nm", change) / 3)[..., None, None] * np.eye(3)
    theta = pseudo[..., None, None] * np.eye(3) + size * change
    expected = size * np.linalg.norm(change) / np.linalg.norm(theta)
    assert kernel_sums(theta, pseudo).frobenius == pytest.approx(expected, rel=1e-5)


def test_a_diagonal_kernel_has_no_difference():
    pseudo = np.random.default_rng(0).standard_normal((3, 4))
    found = kernel_sums(pseudo[..., None, None] * np.eye(5), pseudo)
    assert (found.frobenius, found.off_diagonal_ratio, found.pooled_off_diagonal_ratio) == (0.0, 0.0, 0.0)
    assert found.norm_difference < 1e-15


def test_pairs_without_a_diagonal():
    theta = np.zeros((1, 2, 2, 2))
    assert kernel_sums(theta).off_diagonal_ratio == 0.0
    assert kernel_sums(theta).frobenius == 0.0
    theta[0, 1, 0, 1] = 1.0
    assert kernel_sums(theta).off_diagonal_ratio == math.inf
    assert kernel_sums(theta).pooled_off_diagonal_ratio == math.inf


def test_layouts():
    theta, pseudo = kernels(4, 5, 3)
    matrix = stacked(theta)
    assert matrix.shape == (12, 15)
    assert matrix[2 * 3 + 1, 4 * 3 + 2] == theta[2, 4, 1, 2]
    view = block_view(matrix, 3)
    np.testing.assert_array_equal(view, theta)
    assert np.shares_memory(view, matrix)
    assert not np.shares_memory(stacked(theta[:, :, :1, :1]), theta)
    np.testing.assert_allclose(pseudo_of(theta), pseudo, atol=1e-12)
    # strides of the view, and Fortran order, are taken as they are
    assert_sums(kernel_sums(view), theta, pseudo, 1e-13)
    assert_sums(kernel_sums(np.asfortranarray(theta)), theta, pseudo, 1e-13)


def test_memory_is_that_of_a_strip(monkeypatch):
    monkeypatch.setattr(kernel_measures, "STRIP_BYTES", 2**18)
    theta = np.random.default_rng(0).standard_normal((400, 50, 5, 5)).astype("float32")
    kernel_sums(theta[:2])
    tracemalloc.start()
    try:
        kernel_sums(theta)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**18 < theta.nbytes


def test_arguments_that_are_no_kernels():
    theta, pseudo = kernels()
    for wrong in (theta[0], theta[..., :2], theta[:0]):
        with pytest.raises(InputError, match="has shape"):
            kernel_sums(wrong)
    with pytest.raises(InputError, match=r"\(5, 7\) beside an empirical NTK of \(7, 5\) pairs"):
        kernel_sums(theta, pseudo.T)
    with pytest.raises(DtypeError, match="float16"):
        kernel_sums(theta.astype("float16"))
    with pytest.raises(InputError, match=r"\(n·4, m·4\), not \(21, 15\)"):
        block_view(stacked(theta), 4)
    with pytest.raises(InputError, match="shape"):
        stacked(pseudo)
    for value in (np.nan, np.inf):
        bad = theta.copy()
        bad[3, 2, 1, 1] = value
        with pytest.raises(InputError, match="NaN or infinity"):
            kernel_sums(bad)


def test_differences_of_numbers_and_predictions():
    assert relative_difference(3.0, -2.0) == 2.5
    assert math.isnan(relative_difference(1.0, 0.0))
    assert math.isnan(relative_difference(math.inf, 2.0))
    rng = np.random.default_rng(0)
    f, g = rng.standard_normal((2, 6, 3))
    expected = np.linalg.norm(f - g) / np.linalg.norm(g)
    assert prediction_difference(f, g) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(InputError, match=r"\(6, 3\) and \(6, 2\)"):
        prediction_difference(f, g[:, :2])


def test_accuracy_takes_the_first_of_equal_outputs():
    scores = np.array([[0.0, 1.0], [2.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    assert accuracy(scores, np.array([1, 1, 0, 1])) == 0.5
    with pytest.raises(InputError, match="labels of shape"):
        accuracy(scores, np.array([1, 0]))


def test_slopes():
    widths = np.array([8, 16, 32, 64])
    noise = np.random.default_rng(0).standard_normal((3, 4))
    values = 3.0 * widths**-0.7 * np.exp(0.01 * (noise - noise.mean(axis=0)))
    assert power_law(widths, values) == pytest.approx(-0.7, abs=1e-12)
    for wrong in ((widths[:1], [1.0]), (widths, values[:, :3]), (widths, -values)):
        with pytest.raises(InputError, match="a slope takes"):
            power_law(*wrong)
