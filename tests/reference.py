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


# --- kernels of convolutional networks ----------------------------------------------------------------------------


def image_kernels(layers, x, y=None, divisor=1.0):
    """(NNGP, NTK), (n, m) each, or of x with itself, by MATH.md §1 on whole arrays S[h, w, h', w'], one pair of images at a time.

    layers: ("conv", filter, padding, strides, weight_variance, bias_variance, trainable), ("dense", weight_variance, bias_variance,
    trainable), ("activation", k, k') with functions of (a, b, c), ("norm",), ("pool", window), ("gap",), ("flatten",),
    ("residual", branch, shortcut). x, y: (n, H, W, C).
    """
    symmetric, y = y is None, x if y is None else y
    nngp, ntk = np.zeros((len(x), len(y))), np.zeros((len(x), len(y)))
    for i, left in enumerate(np.asarray(x, float)):
        for j, right in enumerate(np.asarray(y[: i + 1] if symmetric else y, float)):
            pairs = [(left, right), (left, left), (right, right)]
            s, xx, yy = (np.einsum("hwc,HWc->hwHW", a, b) / divisor for a, b in pairs)
            s, t, _, _ = _through(layers, s, np.zeros_like(s), xx, yy)
            nngp[i, j], ntk[i, j] = s, t
            if symmetric:
                nngp[j, i], ntk[j, i] = s, t
    return nngp, ntk


def pixel_variances(layers, x):
    """(H', W'): S(p, p) of an image (H, W, C) with itself after the layers of images."""
    s = np.einsum("hwc,HWc->hwHW", x, x)
    return _own_pixels(_through(layers, s, np.zeros_like(s), s, s)[2])


def slopes_dual(low, high, gain=1.0):
    """k and k' of σ(t) = −low·min(t, 0) + high·max(t, 0), times `gain`, by the angle between u and v."""

    def angle(c):
        return np.arccos(np.clip(c, -1, 1))

    def k(a, b, c):
        kappa1 = (np.sin(angle(c)) + (np.pi - angle(c)) * np.cos(angle(c))) / np.pi
        return gain * a * b * ((low + high) ** 2 / 2 * kappa1 - low * high * c)

    def slope(a, b, c):
        return gain * ((low + high) ** 2 / 2 * (1 - angle(c) / np.pi) - low * high)

    return k, slope


def _through(layers, s, t, xx, yy):
    """S and T of a pair, and S of each image with itself, after the layers."""
    for kind, *rest in layers:
        if kind in ("conv", "dense"):
            *geometry, weight, bias, trainable = rest
            s, t, xx, yy = (weight * (_boxed(v, *geometry) if geometry else v) for v in (s, t, xx, yy))
            s, xx, yy = s + bias, xx + bias, yy + bias
            t = t + s if trainable else t
        elif kind == "activation":
            k, slope = rest
            t = t * slope(*_sizes_and_cosine(s, xx, yy))
            s, xx, yy = (k(*_sizes_and_cosine(*v)) for v in ((s, xx, yy), (xx, xx, xx), (yy, yy, yy)))
        elif kind == "norm":
            sizes = [np.multiply(*_deviations(*v)) for v in ((xx, yy), (xx, xx), (yy, yy))]
            s, t, xx, yy = (
                np.where(size > 0, v / np.where(size > 0, size, 1.0), 0.0)
                for v, size in zip((s, t, xx, yy), (sizes[0], *sizes), strict=True)
            )
        elif kind == "residual":
            paths = [_through(path, s, t, xx, yy) for path in rest]
            s, t, xx, yy = (a + b for a, b in zip(*paths, strict=True))
        elif kind == "pool":
            s, t, xx, yy = (_windows_mean(v, *rest) for v in (s, t, xx, yy))
        elif kind == "gap":
            s, t, xx, yy = (np.asarray(v.mean()) for v in (s, t, xx, yy))
        else:
            s, t, xx, yy = (np.asarray(_own_pixels(v).mean()) for v in (s, t, xx, yy))
    return s, t, xx, yy


def _own_pixels(s):
    """(H, W): the entries p = p' of S[h, w, h', w']; S itself after a readout."""
    return np.einsum("hwhw->hw", s) if s.ndim else s


def _deviations(xx, yy):
    """√S_xx(p, p) and √S_yy(p', p') as they broadcast with S."""
    a, b = (np.sqrt(np.maximum(_own_pixels(v), 0)) for v in (xx, yy))
    return (a[:, :, None, None], b[None, None]) if a.ndim else (a, b)


def _sizes_and_cosine(s, xx, yy):
    a, b = _deviations(xx, yy)
    size = a * b
    c = np.clip(np.divide(s, size, out=np.zeros_like(s), where=size > 0), -1, 1)
    # what is ±1 but for rounding: κ₀ turns 1e-16 there into 5e-9
    return a, b, np.where(np.abs(c) > 1 - 1e-14, np.sign(c), c)


def filter_pixels(length, q, stride, padding):
    """For every position a in the filter, the input pixels that it sees from every output pixel; `length` for outside."""
    if padding == "valid":
        count, before = (length - q) // stride + 1, 0
    else:
        count = math.ceil(length / stride)
        before = max((count - 1) * stride + q - length, 0) // 2 if padding == "same" else (q - 1) // 2
    seen = []
    for a in range(q):
        pixels = [stride * p + a - before for p in range(count)]
        if padding == "circular":
            seen.append([pixel % length for pixel in pixels])
        else:
            seen.append([pixel if 0 <= pixel < length else length for pixel in pixels])
    return seen


def _boxed(s, sizes, padding, strides):
    """q⁻²·Σ_a S(sp + a − l, sp' + a − l)."""
    outside = np.pad(s, [(0, 1)] * 4)
    rows, columns = (filter_pixels(*axis, padding) for axis in zip(s.shape[:2], sizes, strides, strict=True))
    total = 0.0
    for i in rows:
        for j in columns:
            total = total + outside[np.ix_(i, j, i, j)]
    return total / (sizes[0] * sizes[1])


def _windows_mean(s, window):
    (h, w), (a, b) = s.shape[:2], window
    return s.reshape(h // a, a, w // b, b, h // a, a, w // b, b).mean(axis=(1, 3, 5, 7))


def arora_recursion(depth, x, y, q=3):
    """Θ of two images (H, W, C) by Arora et al. 2019, "depth d, fix=yes, GAP" with L = depth − 1 >= 1, as MATH.md §1 writes it."""
    (h, w), half = x.shape[:2], q // 2

    def box(s):
        wide = np.pad(s, half)
        if s.ndim == 2:
            return sum(wide[i : i + h, j : j + w] for i in range(q) for j in range(q))
        return sum(wide[i : i + h, j : j + w, i : i + h, j : j + w] for i in range(q) for j in range(q))

    gamma = np.einsum("hwc,HWc->hwHW", x, y)
    own = [(z**2).sum(axis=2) for z in (x, y)]  # Γ of each image with itself, p = p'
    pi = np.zeros_like(gamma)
    for layer in range(1, depth):
        norms = [box(v) for v in own]
        size = np.sqrt(norms[0][:, :, None, None] * norms[1])
        c = np.clip(box(gamma) / size, -1, 1)
        c = np.where(np.abs(c) > 1 - 1e-14, np.sign(c), c)  # as in `_sizes_and_cosine`
        gamma = size / q**2 * (np.sqrt(1 - c * c) + c * (np.pi - np.arccos(c))) / np.pi
        pi = pi * (np.pi - np.arccos(c)) / np.pi / q**2
        if layer < depth - 1:
            pi = box(pi + gamma)
        own = [v / q**2 for v in norms]
    return pi.mean()


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
