"""FourierFeatures against plain sums of cosines, orthogonal against independent directions; errors."""

import numpy as np
import pytest
from contracts import rows

from ntkdask import arrays, seeds
from ntkdask.errors import InputError
from ntkdask.features import FourierFeatures
from ntkdask.kernels import RBF


def products(feature_map, x, count):
    """(count, n, n): ⟨φ(x_i), φ(x_j)⟩ under `count` seeds."""
    features = (feature_map.replace(seed=seed)(x) for seed in range(count))
    return np.array([phi @ phi.T for phi in features])


@pytest.mark.parametrize("m", [1, 2, 7, 64, 601])
def test_products_are_means_of_cosines_of_differences(m):
    x, gamma = rows(7), 0.3
    phi = FourierFeatures(m, gamma, seed=5)(x)
    w = np.sqrt(2 * gamma) * seeds.normals(5, ("fourier", "frequencies"), 6, (m + 1) // 2)
    phase = 2 * np.pi * seeds.uniforms(5, ("fourier", "phase"), 1)[0]
    expected = np.zeros((7, 7))
    for i in range(7):
        for j in range(7):
            expected[i, j] = 2 / m * sum(np.cos(w[:, k] @ (x[i] - x[j])) for k in range(m // 2))
            if m % 2:
                expected[i, j] += 2 / m * np.cos(w[:, -1] @ x[i] + phase) * np.cos(w[:, -1] @ x[j] + phase)
    np.testing.assert_allclose(phi @ phi.T, expected, rtol=0, atol=1e-13)


def test_own_products_are_one_for_every_draw():
    phi = FourierFeatures(10, 2.0, seed=1)(rows(20))
    np.testing.assert_allclose((phi * phi).sum(axis=1), 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sampling", ["gaussian", "orthogonal"])
def test_variance_is_that_of_a_cosine(sampling):
    """Var cos(wᵀδ) = (1 − e^{−2γδ²})²/2 for independent w (Rahimi & Recht, Sutherland & Schneider 2015); m/2 of them."""
    x, gamma, m, count = np.random.default_rng(0).standard_normal((5, 20)) / 4, 0.5, 40, 1500
    found = products(FourierFeatures(m, gamma, sampling=sampling), x, count)
    exact = RBF(gamma)(x)
    pairs = np.tril_indices(5, -1)
    deviation = found.std(axis=0, ddof=1)[pairs]
    assert (np.abs(found.mean(axis=0) - exact)[pairs] <= 4.5 * deviation / np.sqrt(count)).all()
    independent = (1 - exact[pairs] ** 2) ** 2 / m
    ratio = deviation**2 / independent
    if sampling == "gaussian":
        assert (
            np.abs(ratio - 1) < 0.25
        ).all()  # 4.5 deviations of a variance from 1 500 draws are 0.16 for normal ones
    else:
        assert (ratio < 0.75).all()  # one block of 20 orthogonal directions: 0.2 to 0.6, near rows gain most


@pytest.mark.parametrize(("d", "m"), [(6, 12), (6, 64), (6, 7), (20, 10), (300, 1200)])
def test_orthogonal_frequencies(d, m):
    feature_map = FourierFeatures(m, 0.5, seed=2, sampling="orthogonal")
    w = feature_map._frequencies(np.zeros((1, d)))
    assert w.shape == (d, (m + 1) // 2)
    for start in range(0, w.shape[1], d):
        gram = w[:, start : start + d].T @ w[:, start : start + d]
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), rtol=0, atol=1e-12 * gram.max())
    # lengths of standard normal vectors: E‖w‖² = d, Var = 2d
    squares = (w * w).sum(axis=0)
    assert abs(squares.mean() - d) <= 4.5 * np.sqrt(2 * d / w.shape[1])
    assert w.shape[1] == 1 or squares.std() > 0


def test_orthogonal_directions_are_uniform():
    """Haar, signs included: without them LAPACK's first column has a negative first entry."""
    first = [
        FourierFeatures(8, 0.5, seed=seed, sampling="orthogonal")._frequencies(np.zeros((1, 4))) for seed in range(300)
    ]
    share = np.mean([w > 0 for w in first], axis=0)
    assert (np.abs(share - 0.5) <= 4.5 * 0.5 / np.sqrt(300)).all()


def test_columns_of_blocks_do_not_depend_on_how_many_there_are():
    x = np.zeros((1, 3))
    few, many = (FourierFeatures(m, 0.5, sampling="orthogonal")._frequencies(x) for m in (8, 3000))
    np.testing.assert_allclose(many[:, :3], few[:, :3], rtol=0, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", ["gaussian", "orthogonal"])
def test_device_agrees_with_host(sampling):
    x, feature_map = rows(30), FourierFeatures(101, 0.2, sampling=sampling)
    device = feature_map(arrays.to_device(x))
    assert arrays.is_device_array(device)
    np.testing.assert_allclose(arrays.to_host(device), feature_map(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, "gamma is 0.0, expected a positive number"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": "scale"}, "gamma is 'scale'"),
        ({"sampling": "orthogonl"}, "unknown sampling 'orthogonl'; did you mean 'orthogonal'"),
        ({"n_components": 0}, "n_components is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        FourierFeatures(**{"n_components": 8, **arguments})


def test_rows_without_features_are_refused():
    with pytest.raises(InputError, match="rows without features"):
        FourierFeatures(8)(np.zeros((3, 0)))
