"""NNGP and NTK of fully connected networks of any activations, by the recursion of MATH.md §1 through their dual activations.

In float64 whatever the input's dtype, block by block, so that no more than a few temporaries of a block are alive. Called by
`neural` for networks that the one pass of `rectified` cannot take, and for every diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ntkdask.activations import ELU, FromFunction
from ntkdask.activations.logistic import Logistic
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.kernels.blocks import Block, cut, over_blocks, put, workers
from ntkdask.kernels.correlations import UnitRows, correlations, half_deficits, product_bytes, unit_rows
from ntkdask.networks import Activation, Dense, Network

BLOCK_ROWS, BLOCK_COLUMNS = 64, 512
DEVICE_ROWS, DEVICE_COLUMNS = 1024, 1024
NEAR = 1e-6
CLOSED_ARRAYS, EXPANDED_ARRAYS, EXPANDED_LEVELS = 14, 26, 1024
"""Float64 arrays of a block that are alive at once (v, c, S, T, and what a dual activation makes) for closed forms and for series
and quadrature; of the latter also the Hermite coefficients of every row, up to this degree."""


def matrices(network: Network, x: Array, y: Array | None, parts: Sequence[str]) -> list[Array]:
    """The `parts` ("nngp", "ntk") of (n, d), (m, d) → (n, m) each, x's dtype; the diagonal of a symmetric one only to rounding."""
    divisor = x.shape[1] if network.scale_inputs else 1.0
    left = unit_rows(x, None)
    right = left if y is None else unit_rows(y, None)
    variances = layer_variances(network, left.squares / divisor), layer_variances(network, right.squares / divisor)

    def entries(c: Array, block: Block) -> list[Array]:
        sides = variances[0][:, block.rows], variances[1][:, block.columns]
        found = dict(zip(("nngp", "ntk"), _recursion(network, c, *sides, "ntk" in parts), strict=True))
        return [found[part] for part in parts]

    return over_correlations(entries, left, right, y is None, x.dtype, len(parts))


def over_correlations(
    entries: Callable[[Array, Block], list[Array]],
    left: UnitRows,
    right: UnitRows,
    symmetric: bool,
    dtype: np.dtype,
    parts: int = 1,
) -> list[Array]:
    """`parts` matrices (n, m) of `dtype` that are functions of float64 correlations c (R, C) and their block's rows and columns.

    c may be overwritten. A symmetric matrix is computed on and below its diagonal.
    """

    def block_entries(block: Block) -> list[Array]:
        v = namespace(left.squares).empty(block.shape)
        half_deficits(v, left, right, block, NEAR)
        return entries(correlations(v), block)

    return by_blocks(block_entries, left.rows, right.rows, symmetric, dtype, parts)


def by_blocks(
    entries: Callable[[Block], list[Array]], x: Array, y: Array, symmetric: bool, dtype: np.dtype, parts: int = 1
) -> list[Array]:
    """`parts` matrices (len(x), len(y)) of `dtype`, on x's device, from float64 blocks (R, C)."""
    xp, n, m = namespace(x), x.shape[0], y.shape[0]
    out = [xp.empty((n, m), dtype) for _ in range(parts)]
    rows, columns = (DEVICE_ROWS, DEVICE_COLUMNS) if is_device_array(x) else (BLOCK_ROWS, BLOCK_COLUMNS)

    def start() -> Callable[[Block], None]:
        def fill(block: Block) -> None:
            for matrix, values in zip(out, entries(block), strict=True):
                put(values, matrix, block)

        return fill

    over_blocks(cut(n, None if symmetric else m, rows, columns), start, is_device_array(x))
    return out


def workers_of(n: int, m: int) -> int:
    """Threads that share the blocks of an (n, m) matrix on the CPU."""
    return workers(len(cut(n, m, BLOCK_ROWS, BLOCK_COLUMNS)))


def workspace_bytes(
    n: int,
    m: int,
    itemsize: int,
    row_shape: tuple[int, ...] | None,
    parts: int,
    layers: int,
    arrays: int,
    row_values: int = 0,
) -> int:
    """Results, vectors of rows (one a layer), and for each thread `arrays` float64 blocks and `row_values` values a row of one.

    See `Kernel.workspace_bytes`.
    """
    d = 0 if row_shape is None else math.prod(row_shape)
    rows, columns = min(BLOCK_ROWS, n), min(BLOCK_COLUMNS, m)
    block = max(arrays * 8 * rows * columns, product_bytes(rows, columns, d) + 8 * rows * columns)
    block += 8 * row_values * (rows + columns)
    return parts * n * m * itemsize + 8 * (n + m) * (layers + 4) + workers_of(n, m) * block


def network_bytes(
    network: Network, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None, parts: int
) -> int:
    """`workspace_bytes` of `matrices`."""
    sigmas = [layer.sigma for layer in network.layers if isinstance(layer, Activation)]
    expanded = any(isinstance(sigma, (ELU, FromFunction, Logistic)) for sigma in sigmas)
    arrays, row_values = (EXPANDED_ARRAYS, 2 * EXPANDED_LEVELS) if expanded else (CLOSED_ARRAYS, 0)
    return workspace_bytes(n, m, itemsize, row_shape, parts, len(network.layers), arrays, row_values)


def layer_variances(network: Network, variances: Array) -> Array:
    """(layers + 1, n): S(x_i, x_i) of the input, (n,) float64, and after every layer."""
    xp = namespace(variances)
    found = [variances]
    for layer in network.layers:
        if isinstance(layer, Activation):
            a = xp.sqrt(found[-1])
            found.append(layer.gain * layer.sigma.dual(a, a, xp.ones_like(a)))
        elif isinstance(layer, Dense):
            found.append(layer.weight_variance * found[-1] + layer.bias_variance)
    return xp.stack(found)


def diagonals(network: Network, squares: Array) -> tuple[Array, Array]:
    """(S(x_i, x_i), T(x_i, x_i)) float64 from ‖x_i‖²/divisor, (n,).

    A zero row has no direction: its correlation with itself is 0, as with every other row.
    """
    xp = namespace(squares)
    s, t = squares, xp.zeros_like(squares)
    for layer in network.layers:
        if isinstance(layer, Activation):
            a = xp.sqrt(s)
            t = t * layer.gain * layer.sigma.dual_derivative(a, a, xp.where(a > 0, 1.0, 0.0))
            s = layer.gain * layer.sigma.dual(a, a, xp.ones_like(a))
        elif isinstance(layer, Dense):
            s = layer.weight_variance * s + layer.bias_variance
            t = layer.weight_variance * t + (s if layer.trainable else 0.0)
    return s, t


def _recursion(network: Network, c: Array, rows: Array, columns: Array, tangent: bool) -> tuple[Array, Array | None]:
    """(S, T) of one block from its input correlations (R, C) and variances (layers + 1, R), (layers + 1, C); T when `tangent`."""
    xp = namespace(c)
    s, t = c, xp.zeros_like(c) if tangent else None
    s *= _sizes(rows[0], columns[0])
    for layer, v, w in zip(network.layers, rows, columns, strict=False):
        if isinstance(layer, Activation):
            s /= xp.maximum(_sizes(v, w), np.finfo(np.float64).tiny)
            xp.clip(s, -1.0, 1.0, out=s)
            a, b = xp.sqrt(v)[:, None], xp.sqrt(w)
            if t is not None:
                t *= layer.gain * layer.sigma.dual_derivative(a, b, s)
            s = layer.gain * layer.sigma.dual(a, b, s)
        elif isinstance(layer, Dense):
            s *= layer.weight_variance
            s += layer.bias_variance
            if t is not None:
                t *= layer.weight_variance
                t += s if layer.trainable else 0.0
    return s, t


def _sizes(v: Array, w: Array) -> Array:
    """√(v_i·w_j), (R, C). Of equal variances the root of their product is the variance itself, so duplicate rows keep c = 1."""
    return namespace(v).sqrt(v[:, None] * w)
