"""Naive float64 twins, written from the formulas of MATH.md with plain loops; nothing here calls the package's numerics."""

import math
from itertools import pairwise

import numpy as np
from scipy.linalg import hadamard

# --- arc-cosine functions and Gaussian expectations ---------------------------------------------------------------


def kappa(order, cosine):
    """κ₀ and κ₁ by Cho & Saul's angle formulas J₀ = π − θ, J₁ = sin θ + (π − θ) cos θ, divided by π."""
    theta = math.acos(min(1.0, max(-1.0, cosine)))
    return (math.pi - theta if order == 0 else math.sin(theta) + (math.pi - theta) * math.cos(theta)) / math.pi


def gaussian_expectation(f, g, a, b, c, nodes=60):
    """E[f(u)g(v)], (u, v) ~ N(0, [[a², abc], [abc, b²]]), in polar coordinates.

    Gauss–Legendre in the angle, between the angles where u or v change sign, so kinks at 0 cost nothing;
    Gauss–Laguerre in r²/2.
    """
    theta = math.acos(c)
    kinks = sorted(
        {t % (2 * math.pi) for t in (math.pi / 2, 3 * math.pi / 2, theta + math.pi / 2, theta - math.pi / 2)}
    )
    edges = [*kinks, kinks[0] + 2 * math.pi]
    points, weights = np.polynomial.legendre.leggauss(nodes)
    half_squares, radial = np.polynomial.laguerre.laggauss(nodes // 2)
    radius = np.sqrt(2 * half_squares)
    total = 0.0
    for low, high in pairwise(edges):
        angles = low + (high - low) * (points + 1) / 2
        u = a * radius * np.cos(angles)[:, None]
        v = b * radius * np.cos(angles - theta)[:, None]
        total += (high - low) / 2 * float(weights @ (f(u) * g(v)) @ radial)
    return total / (2 * math.pi)


# --- kernels of fully connected ReLU networks ---------------------------------------------------------------------


def network_kernels(layers, x, y, scale_inputs=False):
    """(NNGP, NTK), (n, m) each, by the two-quantity rules of MATH.md §1, one pair of rows at a time.

    layers: ("dense", weight_variance, bias_variance, trainable) or ("relu", normalize).
    """
    nngp, ntk = np.zeros((len(x), len(y))), np.zeros((len(x), len(y)))
    for i, row in enumerate(np.asarray(x, float)):
        for j, column in enumerate(np.asarray(y, float)):
            nngp[i, j], ntk[i, j] = _pair(layers, row, column, len(row) if scale_inputs else 1)
    return nngp, ntk


def _pair(layers, row, column, divisor):
    xx, yy, xy = row @ row / divisor, column @ column / divisor, row @ column / divisor
    tangent = 0.0
    for kind, *rest in layers:
        if kind == "dense":
            weight, bias, trainable = rest
            xx, yy, xy = (weight * s + bias for s in (xx, yy, xy))
            tangent = weight * tangent + (xy if trainable else 0.0)
        else:
            gain = 2.0 if rest[0] else 1.0  # E relu(t)² = ½
            size = math.sqrt(xx * yy)
            cosine = xy / size if size else 0.0
            tangent *= gain * kappa(0, cosine) / 2
            xy = gain * size * kappa(1, cosine) / 2
            xx, yy = gain * xx / 2, gain * yy / 2
    return xy, tangent


def papers_recursion(depth, x, y):
    """Θ⁽ʰ⁾ = Θ⁽ʰ⁻¹⁾·κ₀ + K⁽ʰ⁾ of normalised ReLU, Zandieh et al. 2021, Definition 1."""
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    cosine, theta = (x @ y.T) / norms, x @ y.T
    for _ in range(depth):
        derivative = np.vectorize(lambda c: kappa(0, c))(cosine)
        cosine = np.vectorize(lambda c: kappa(1, c))(cosine)
        theta = theta * derivative + norms * cosine
    return theta


# --- random features ----------------------------------------------------------------------------------------------


def dense_tensor_srht(x, y, signs, rows):
    """(1/√m)·(H D₁ x)[p₁] ⊙ (H D₂ y)[p₂] with dense Hadamard matrices; signs, rows: one pair for x, one for y."""
    out = 1.0
    for part, diagonal, picked in zip((x, y), signs, rows, strict=True):
        size = len(diagonal)
        padded = np.zeros((len(part), size))
        padded[:, : part.shape[1]] = part
        out = out * ((padded * diagonal) @ hadamard(size))[:, picked]
    return out / math.sqrt(len(rows[0]))


def ntk_random_features(layers, x, scale_inputs, step_weights, relu_weights, sketch):
    """Zandieh et al. 2021, Algorithm 2, with MATH.md's σ_w, σ_b and frozen layers; concatenation in the same order.

    step_weights(h, d), relu_weights(h, d): (d, m) matrices of layer h; relu_weights carry √(2/m). sketch(h, φ̇, ψ).
    ψ of an input or of a network in which nothing trained yet is None.
    """
    x = np.asarray(x, float)
    dense = [rest for kind, *rest in layers if kind == "dense"]
    relu = [rest for kind, *rest in layers if kind == "relu"]

    def weighted(features, layer):
        """Features of Λ = σ_w²·S + σ_b²."""
        weight, bias, _ = layer
        columns = [math.sqrt(weight) * features]
        if bias:
            columns.append(np.full((len(x), 1), math.sqrt(bias)))
        return np.concatenate(columns, axis=1)

    phi = weighted(x / math.sqrt(x.shape[1]) if scale_inputs else x, dense[0])
    psi = phi if dense[0][2] else None
    for h, layer in enumerate(dense[1:]):
        gain = 1.0 if relu[h][0] else 0.5
        if psi is not None:
            w = step_weights(h, phi.shape[1])
            step = math.sqrt(2 / w.shape[1] * gain) * (phi @ w > 0)
            psi = math.sqrt(layer[0]) * sketch(h, step, psi)
        phi = weighted(math.sqrt(gain) * np.maximum(phi @ relu_weights(h, phi.shape[1]), 0), layer)
        if layer[2]:
            psi = phi if psi is None else np.concatenate([phi, psi], axis=1)
    return psi


# --- ridge regression ---------------------------------------------------------------------------------------------


def ridge(phi, y, alpha, fit_intercept=True, weights=None):
    """(weights (m, k), intercept (k,)) by least squares on the rows stacked over √α·I; the intercept is free."""
    phi, y = np.asarray(phi, float), np.asarray(y, float)
    root = np.sqrt(np.ones(len(phi)) if weights is None else weights)[:, None]
    m = phi.shape[1]
    columns = np.concatenate([phi, np.full((len(phi), 1), float(fit_intercept))], axis=1)
    penalty = np.concatenate([math.sqrt(alpha) * np.eye(m), np.zeros((m, 1))], axis=1)
    left = np.concatenate([root * columns, penalty])
    right = np.concatenate([root * y, np.zeros((m, y.shape[1]))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution[:-1], solution[-1]


def hat_matrix(phi, alpha, fit_intercept=True, weights=None):
    """(n, n) matrix that takes targets to fitted values: the fit of every unit vector."""
    w, b = ridge(phi, np.eye(len(phi)), alpha, fit_intercept, weights)
    return phi @ w + b


def gcv(phi, y, alpha, fit_intercept=True, weights=None):
    """n·Σ w(y − Hy)²/(n − tr H)², mean over targets."""
    hat = hat_matrix(phi, alpha, fit_intercept, weights)
    weights = np.ones(len(phi)) if weights is None else weights
    residual = float((weights[:, None] * (y - hat @ y) ** 2).sum(axis=0).mean())
    return len(phi) * residual / (len(phi) - np.trace(hat)) ** 2


def leave_one_out_squares(phi, y, alpha, fit_intercept=True, weights=None):
    """Σ over rows and targets of w·(y_i − ŷ_i)², ŷ_i from a fit that never saw row i."""
    weights = np.ones(len(phi)) if weights is None else weights
    total = 0.0
    for i in range(len(phi)):
        rest = np.arange(len(phi)) != i
        w, b = ridge(phi[rest], y[rest], alpha, fit_intercept, weights[rest])
        total += float(weights[i] * ((y[i] - phi[i] @ w - b) ** 2).sum())
    return total
