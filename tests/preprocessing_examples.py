"""Rows of every kind, the steps, and their naive twins in float64."""

import numpy as np

from ntkdask.preprocessing import ZCA, Center, Standardize, UnitNorm

RELATIVE = {"float32": 2e-6, "float64": 1e-12}
STEPS = [Center(), Center("channel"), Standardize(), Standardize("channel"), UnitNorm(), ZCA(), ZCA(variant="shankar")]


def images(n, seed=0, shape=(4, 3, 3), dtype="float64"):
    """Correlated positive rows, of different means and scales per channel."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    x = rng.standard_normal((n, d)) @ np.linalg.qr(rng.standard_normal((d, d)))[0] * np.geomspace(1, 0.05, d)
    return (x.reshape(n, *shape) * [1.0, 2.0, 5.0] + [3.0, 0.0, -7.0]).astype(dtype)


def naive(step, train, x):
    """The step fitted on train and applied to x, straight from its definition, float64."""
    train, x = train.astype("float64"), x.astype("float64")
    flat, flat_train = x.reshape(len(x), -1), train.reshape(len(train), -1)
    if isinstance(step, (Center, Standardize)):
        axes = tuple(range(train.ndim - 1)) if step.per == "channel" else 0
        std = train.std(axis=axes)
        scale = np.where(std == 0, 1, std) if isinstance(step, Standardize) else 1
        return (x - train.mean(axis=axes)) / scale
    if isinstance(step, UnitNorm):
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        return (flat / np.where(norms == 0, 1, norms)).reshape(x.shape)
    r_train, r = naive_row_part(flat_train), naive_row_part(flat)
    covariance = r_train.T @ r_train / len(train)
    values, vectors = np.linalg.eigh(covariance)
    epsilon = 0.1 * np.trace(covariance) / len(values) if step.variant == "han" else 1e-4
    return (r @ vectors @ np.diag(1 / np.sqrt(np.abs(values) + epsilon)) @ vectors.T).reshape(x.shape)


def naive_row_part(flat):
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(norms < 1e-8, 1, norms)


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
