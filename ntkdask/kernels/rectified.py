"""NNGP and NTK of networks of activations with one kink at 0, as one pass over the correlations of the inputs.

For σ(t) = −A·min(t, 0) + B·max(t, 0) every variance is known layer by layer from the row alone, and S = a·a'·c, T = a·a'·t with
a, a' the standard deviations of the two rows. With P = (A+B)²/(A²+B²), Q = 2AB/(A²+B²), P − Q = 1, an Activation and the Dense
after it are
    f = P·κ₁(c) − Q·c,   g = P·κ₀(c) − Q,   c ← αα'·f + ββ',   t ← αα'·g·t + τ·c,
where α² + β² = 1 split the row's new variance into weights and bias, and τ is 1 for a trainable Dense. c is carried as its signed
half deficit v = ±u, u = (1 − |c|)/2 (`correlations`), for which nothing cancels near ±1, at any depth:
    arccos(1 − 2u)/π = √u·angle(u),   κ₁(1 − 2u) = 1 − 2u + 2u·√u·excess(u),   so (1 − f)/2 = u·(1 − P·√u·excess(u)) for c ≥ 0.
angle and excess are analytic on 0 ≤ u ≤ ½ and become short polynomials. Called by `neural`.

Sources: MATH.md §1, §2; Cho & Saul 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.compiled import compiled, inlined, polynomial
from ntkdask.kernels import rectified_device as device
from ntkdask.kernels.blocks import Block, cut, over_blocks, place, workers
from ntkdask.kernels.correlations import half_deficits, refining_bytes, unit_rows
from ntkdask.networks import Activation, Dense, Network

LINEAR, POSITIVE, GENERAL = 0, 1, 2

BLOCK_ROWS, BLOCK_COLUMNS = 256, 512
"""Rows and columns of a block on the CPU: two blocks of float32 fit a core's L2 cache beside the product's panels."""

# Chebyshev interpolation on [0, ½] of 2·asin(√u)/(π√u) and of [√(1−u) − (1−2u)·asin(√u)/√u]/(πu), from their series
ANGLE = {
    "float32": (0.63661975, 0.10610513, 0.04767082, 0.029590627, 0.010651533, 0.0480901, -0.057350665, 0.06982063),
    "float64": (
        0.6366197723675813,
        0.10610329539465757,
        0.04774648291454946,
        0.028420526655701855,
        0.019341697383177887,
        0.01424388721307388,
        0.011023453040310762,
        0.00918336661030528,
        0.004739397713978679,
        0.023401135798025028,
        -0.07899325324799172,
        0.3151309812596417,
        -0.8506118806027071,
        1.7400906292496103,
        -2.5300746753939136,
        2.5243030920944345,
        -1.5414694256632964,
        0.4489910596897837,
    ),
}
EXCESS = {
    "float32": (0.42441317, 0.042440366, 0.013671694, 0.005971923, 0.0053461646, -0.002538177, 0.0067551485),
    "float64": (
        0.42441318157838753,
        0.0424413181578411,
        0.013641852264516096,
        0.0063156723876073755,
        0.0035166792891146046,
        0.002191214329823703,
        0.0014720317120508653,
        0.0010572811700541385,
        0.00067262746036401,
        0.0012597601736624407,
        -0.0028177961739383954,
        0.012477810365699157,
        -0.03309506816247499,
        0.06829298424981407,
        -0.09940641606716766,
        0.09978982784741613,
        -0.06125749471144344,
        0.018089761859256853,
    ),
}
_angle = polynomial(ANGLE["float32"], ANGLE["float64"])
_excess = polynomial(EXCESS["float32"], EXCESS["float64"])


@dataclass(frozen=True)
class Step:
    """An activation and the Dense after it. Without the activation P = 0, Q = −1; at the end of a network there may be no Dense.

    Parameters
    ----------
    kind : {LINEAR, POSITIVE, GENERAL}
        LINEAR for no activation and no bias, POSITIVE where no correlation can be negative and there is no bias, GENERAL otherwise.
    p, q : float
        P and Q.
    variance_gain : float
        The activation takes a variance v to variance_gain·v.
    weight : float
        σ_w²: the Dense takes a variance v to weight·v + bias.
    bias : float
        σ_b².
    trainable : bool
        Whether τ is 1.
    """

    kind: int
    p: float
    q: float
    variance_gain: float
    weight: float
    bias: float
    trainable: bool


def steps(network: Network) -> tuple[Step, ...] | None:
    """The network as steps; None where a layer is neither Dense nor an Activation with slopes, which this pass cannot run."""
    network_steps: list[Step] = []
    pending, signed = (0.0, -1.0, 1.0), True

    def add(weight: float, bias: float, trainable: bool) -> None:
        nonlocal pending, signed
        p, q, gain = pending
        kind = LINEAR if p == 0 and bias == 0 else (POSITIVE if not signed and q >= 0 and bias == 0 else GENERAL)
        network_steps.append(Step(kind, p, q, gain, weight, bias, trainable))
        # f(c) >= 0 for every c when Q >= 0, and a bias is not negative
        pending, signed = (0.0, -1.0, 1.0), signed if p == 0 else q < 0

    for layer in network.layers:
        if isinstance(layer, Dense):
            add(layer.weight_variance, layer.bias_variance, layer.trainable)
        elif isinstance(layer, Activation) and (slopes := layer.sigma.slopes) and any(slopes):
            a, b = slopes
            squares = a * a + b * b
            pending = ((a + b) ** 2 / squares, 2 * a * b / squares, layer.gain * squares / 2)
        else:
            return None
    if isinstance(network.layers[-1], Activation):
        add(1.0, 0.0, False)
    return tuple(network_steps)


class RowConstants(NamedTuple):
    """What the pass needs of each of n rows.

    Parameters
    ----------
    deviations : array (n,)
        Standard deviations a after the last layer.
    alpha, beta : array (GENERAL steps, n)
        α and β of each row.
    """

    deviations: Array
    alpha: Array
    beta: Array


def row_constants(network_steps: tuple[Step, ...], variances: Array, dtype: np.dtype) -> RowConstants:
    """Follow the variances (n,) float64 of the rows through the steps; constants in `dtype`. A variance of 0 has α = 1, β = 0."""
    xp = namespace(variances)
    alpha, beta = [], []
    for step in network_steps:
        weights = step.weight * step.variance_gain * variances
        variances = weights + step.bias
        if step.kind == GENERAL:
            total = xp.where(variances > 0, variances, 1.0)
            share = xp.where(variances > 0, weights / total, 1.0)
            alpha.append(xp.sqrt(share))
            beta.append(xp.sqrt(step.bias / total))
    shape = (len(alpha), len(variances))
    stacked = [xp.stack(part) if part else xp.empty(shape) for part in (alpha, beta)]
    return RowConstants(
        xp.sqrt(variances).astype(dtype), *(xp.ascontiguousarray(part.astype(dtype)) for part in stacked)
    )


def threshold(depth: int, dtype: np.dtype) -> float:
    """Half deficits below which a product of unit rows is not enough: its error ε in c becomes ε/√u in every layer's κ₀.

    In float32 that is |c| > 0.992 for shallow networks, and less the deeper the network is; errors stay below 3e-6 of the diagonal.
    """
    return 1e-6 if dtype == np.float64 else min(4e-3 * max(1.0, depth / 4) ** 2, 0.05)


def table(network_steps: tuple[Step, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(kinds (steps,) int64, constants (steps, 5): P, Q, (1−Q)/2, (1+Q)/2, τ), for the compiled pass and the CUDA kernel."""
    kinds = np.array([step.kind for step in network_steps], np.int64)
    rows = [(s.p, s.q, (1 - s.q) / 2, (1 + s.q) / 2, float(s.trainable)) for s in network_steps]
    return kinds, np.array(rows, dtype)


def matrices(
    network_steps: tuple[Step, ...], divisor: float, x: Array, y: Array | None, parts: Sequence[str]
) -> list[Array]:
    """The `parts` ("nngp", "ntk") of rows (n, d), (m, d): (n, m) each, of x's dtype.

    One product, and one pass over each block, in x's dtype. divisor: what inner products of inputs are divided by. The diagonal of a
    symmetric matrix is good to rounding only.
    """
    xp, dtype, depth = namespace(x), x.dtype, sum(step.p != 0 for step in network_steps)
    left = unit_rows(x, dtype)
    right = left if y is None else unit_rows(y, dtype)
    rows = row_constants(network_steps, left.squares / divisor, dtype)
    columns = rows if y is None else row_constants(network_steps, right.squares / divisor, dtype)
    n, m = x.shape[0], right.rows.shape[0]
    out = [xp.empty((n, m), dtype) for _ in parts]
    kinds, constants = table(network_steps, dtype)
    if is_device_array(x):
        named = dict(zip(parts, out, strict=True))
        device.fill((left, right), (rows, columns), (kinds, constants), threshold(depth, dtype), y is None, named)
        return out

    def start() -> Callable[[Block], None]:
        scratch = [np.empty(min(BLOCK_ROWS, n) * min(BLOCK_COLUMNS, m), dtype) for _ in range(2)]

        def fill(block: Block) -> None:
            n_rows, n_columns = block.shape
            v, t = (part[: n_rows * n_columns].reshape(block.shape) for part in scratch)
            half_deficits(v, left, right, block, threshold(depth, dtype))
            recursion(v, t, kinds, constants, rows, columns, block.top, block.left)
            scales = rows.deviations[block.rows], columns.deviations[block.columns]
            for part, matrix in zip(parts, out, strict=True):
                if part == "nngp":
                    to_correlations(v)
                place(v if part == "nngp" else t, *scales, matrix, block.top, block.left, block.mirrored)

        return fill

    over_blocks(cut(n, None if y is None else m, BLOCK_ROWS, BLOCK_COLUMNS), start)
    return out


def workspace_bytes(
    network_steps: tuple[Step, ...], n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None, parts: int
) -> int:
    """Bytes of results, unit rows, constants of rows, and each thread's blocks; see `Kernel.workspace_bytes`.

    Parameters
    ----------
    network_steps : tuple of Step
        The network.
    n, m : int
        Rows on either side.
    itemsize : int
        4 for float32, 8 for float64.
    row_shape : tuple of int or None
        Of a row; None leaves out unit rows and products.
    parts : int
        Number of matrices.

    Returns
    -------
    int
    """
    d = 0 if row_shape is None else math.prod(row_shape)
    rows, columns = min(BLOCK_ROWS, n), min(BLOCK_COLUMNS, m)
    general = sum(step.kind == GENERAL for step in network_steps)
    block = 2 * rows * columns * itemsize + refining_bytes(rows, columns, d)
    vectors = (n + m) * (3 * 8 + 4 * 8 + 2 * general * (8 + itemsize))
    shared = parts * n * m * itemsize + (n + m) * d * itemsize + vectors
    return shared + workers(len(cut(n, m, BLOCK_ROWS, BLOCK_COLUMNS))) * block


@compiled
def recursion(v, t, kinds, constants, rows, columns, top, left):
    """Run all steps on a block.

    Parameters
    ----------
    v : array (R, C), float32 or float64
        Signed half deficits of the inputs; becomes those of the last layer.
    t : array (R, C) of v's dtype
        Becomes T/(aa').
    kinds, constants : array (steps,), (steps, 5)
        Of `table`.
    rows, columns : RowConstants
        Of all rows of the matrix and of all its columns.
    top, left : int
        Where the block begins among them.
    """
    right = left + v.shape[1]
    for i in range(v.shape[0]):
        row, tangent = v[i], t[i]
        tangent[:] = 0
        general = 0
        for h in range(kinds.size):
            step = constants[h]
            if kinds[h] == LINEAR:
                _linear(row, tangent, step[4])
            elif kinds[h] == POSITIVE:
                _positive(row, tangent, step[0], step[4])
            else:
                _general(
                    row,
                    tangent,
                    step,
                    rows.alpha[general, top + i],
                    rows.beta[general, top + i],
                    columns.alpha[general, left:right],
                    columns.beta[general, left:right],
                )
                general += 1


@inlined
def _linear(v, t, trainable):
    """A LINEAR step on a row of the block."""
    one, two = v.dtype.type(1), v.dtype.type(2)
    for j in range(v.size):
        t[j] += trainable * math.copysign(one - two * abs(v[j]), v[j])


@inlined
def _positive(v, t, p, trainable):
    """A POSITIVE step on a row of the block."""
    one, two = v.dtype.type(1), v.dtype.type(2)
    for j in range(v.size):
        u = v[j]
        root = p * math.sqrt(u)
        new = u * (one - root * _excess(u))
        t[j] = (one - root * _angle(u)) * t[j] + trainable * (one - two * new)
        v[j] = new


@inlined
def _general(v, t, step, alpha, beta, alphas, betas):
    """A GENERAL step on a row of the block; alpha, beta: of its row, alphas, betas: of its columns."""
    zero, quarter, one, two = v.dtype.type(0), v.dtype.type(0.25), v.dtype.type(1), v.dtype.type(2)
    p, q, less, more, trainable = step[0], step[1], step[2], step[3], step[4]
    for j in range(v.size):
        u = abs(v[j])
        root = p * math.sqrt(u)
        angle, excess = root * _angle(u), u * (root * _excess(u))
        positive = math.copysign(one, v[j]) > zero
        # (1 − f)/2 and (1 + f)/2, each without cancellation where it is small
        minus = u - excess if positive else less + q * u - excess
        plus = one - minus if positive else more - q * u + excess
        slope = one - angle if positive else angle - q
        product, apart = alpha * alphas[j], alpha - alphas[j]
        difference, total = beta - betas[j], beta + betas[j]
        minus = product * minus + quarter * (apart * apart + difference * difference)
        plus = product * plus + quarter * (apart * apart + total * total)
        new = minus if minus <= plus else plus
        new = zero if new < zero else new
        c = one - two * new
        c = c if minus <= plus else -c
        t[j] = product * slope * t[j] + trainable * c
        v[j] = math.copysign(new, one if minus <= plus else -one)


@compiled
def to_correlations(v):
    """c = ±(1 − 2|v|) in place."""
    one, two = v.dtype.type(1), v.dtype.type(2)
    for i in range(v.shape[0]):
        row = v[i]
        for j in range(row.size):
            row[j] = math.copysign(one - two * abs(row[j]), row[j])
