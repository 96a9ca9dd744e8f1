"""NNGP and NTK of networks of vectors with any layers, by the recursion of MATH.md §1 through their dual activations.

In float64 whatever the dtype of the inputs, block by block, so that only a few temporaries of a block are alive. Called by `neural`
for networks that the one pass of `rectified` cannot run, and for every diagonal; by `convolutional` for the layers after the
readout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ntkdask.activations import ELU, FromFunction
from ntkdask.activations.logistic import Logistic
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.kernels.blocks import Block, cut, over_blocks, put, workers
from ntkdask.kernels.correlations import UnitRows, correlations, half_deficits, product_bytes, unit_rows
from ntkdask.networks import Activation, Dense, Layer, LayerNorm, Network, Residual
from ntkdask.networks.network import every_layer

BLOCK_ROWS, BLOCK_COLUMNS = 64, 512
DEVICE_ROWS, DEVICE_COLUMNS = 1024, 1024
NEAR = 1e-6
"""Half deficits below this are computed from differences of rows."""
CLOSED_ARRAYS, EXPANDED_ARRAYS, EXPANDED_LEVELS = 14, 26, 1024
"""Float64 arrays of a block that are alive at once (v, c, S, T and temporaries of a dual activation): with closed duals, and with
series or quadrature, which also hold the Hermite coefficients of every row up to the degree EXPANDED_LEVELS."""


def matrices(network: Network, x: Array, y: Array | None, parts: Sequence[str]) -> list[Array]:
    """The `parts` ("nngp", "ntk") of rows (n, d), (m, d): (n, m) each, of x's dtype.

    The diagonal of a symmetric matrix is good to rounding only.
    """
    divisor = x.shape[1] if network.scale_inputs else 1.0
    left = unit_rows(x, None)
    right = left if y is None else unit_rows(y, None)
    inputs = left.squares / divisor, right.squares / divisor
    nodes = [node_variances(network.layers, squares) for squares in inputs]

    def entries(c: Array, block: Block) -> list[Array]:
        c *= _sizes(inputs[0][block.rows], inputs[1][block.columns])
        results = _block_recursion(network.layers, c, None, nodes, block, "ntk" in parts)
        return [results[part] for part in parts]

    return over_correlations(entries, left, right, y is None, x.dtype, len(parts))


def over_correlations(
    entries: Callable[[Array, Block], list[Array]],
    left: UnitRows,
    right: UnitRows,
    symmetric: bool,
    dtype: np.dtype,
    parts: int = 1,
) -> list[Array]:
    """Matrices that are functions of correlations, block by block.

    Parameters
    ----------
    entries : callable
        (c, block) → one array (R, C) for each matrix, from float64 correlations c (R, C), which it may overwrite.
    left, right : UnitRows
        Both sides.
    symmetric : bool
        Whether the matrices are symmetric; then they are computed on and below the diagonal.
    dtype : dtype
        Of the matrices.
    parts : int
        Number of matrices.

    Returns
    -------
    list of arrays (n, m)
    """

    def block_entries(block: Block) -> list[Array]:
        v = namespace(left.squares).empty(block.shape)
        half_deficits(v, left, right, block, NEAR)
        return entries(correlations(v), block)

    return by_blocks(block_entries, left.rows, right.rows, symmetric, dtype, parts)


def by_blocks(
    entries: Callable[[Block], list[Array]], x: Array, y: Array, symmetric: bool, dtype: np.dtype, parts: int = 1
) -> list[Array]:
    """Matrices from float64 blocks, on x's device.

    Parameters
    ----------
    entries : callable
        block → one array (R, C), float64, for each matrix.
    x, y : array
        Their lengths are the sides of the matrices.
    symmetric : bool
        Whether the matrices are symmetric; then they are computed on and below the diagonal.
    dtype : dtype
        Of the matrices.
    parts : int
        Number of matrices.

    Returns
    -------
    list of arrays (len(x), len(y))
    """
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
    """Number of threads that share the blocks of an (n, m) matrix on the CPU."""
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
    """Bytes of results, vectors of rows and each thread's blocks; see `Kernel.workspace_bytes`.

    Parameters
    ----------
    n, m : int
        Rows on either side.
    itemsize : int
        4 for float32, 8 for float64.
    row_shape : tuple of int or None
        Of a row; None leaves out products.
    parts : int
        Number of matrices.
    layers : int
        Vectors of n + m float64 that are kept, about one for each layer.
    arrays : int
        Float64 blocks that a thread holds.
    row_values : int
        Float64 values that a thread holds for each row and each column of a block.

    Returns
    -------
    int
    """
    d = 0 if row_shape is None else math.prod(row_shape)
    rows, columns = min(BLOCK_ROWS, n), min(BLOCK_COLUMNS, m)
    block = max(arrays * 8 * rows * columns, product_bytes(rows, columns, d) + 8 * rows * columns)
    block += 8 * row_values * (rows + columns)
    return parts * n * m * itemsize + 8 * (n + m) * (layers + 4) + workers_of(n, m) * block


def network_bytes(
    network: Network, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None, parts: int
) -> int:
    """`workspace_bytes` of `matrices`.

    Parameters
    ----------
    network : Network
        One of vectors.
    n, m : int
        Rows on either side.
    itemsize : int
        4 for float32, 8 for float64.
    row_shape : tuple of int or None
        Of a row; None leaves out products.
    parts : int
        Number of matrices.

    Returns
    -------
    int
    """
    layers = list(every_layer(network.layers))
    arrays, row_values = block_arrays(layers)
    return workspace_bytes(n, m, itemsize, row_shape, parts, len(layers), arrays, row_values)


def block_arrays(layers: Sequence[Layer]) -> tuple[int, int]:
    """(float64 arrays of a block, values for each of its rows and columns) alive at once, for the layers and all within them."""
    layers = list(every_layer(layers))
    sigmas = [layer.sigma for layer in layers if isinstance(layer, Activation)]
    series = any(isinstance(sigma, (FromFunction, Logistic)) for sigma in sigmas)
    arrays = EXPANDED_ARRAYS if series or any(isinstance(sigma, ELU) for sigma in sigmas) else CLOSED_ARRAYS
    # the branch of a Residual leaves S and T of the shortcut as they are
    held = 2 * sum(isinstance(layer, Residual) for layer in layers)
    return arrays + held, 2 * EXPANDED_LEVELS if series else 0


def continued(
    layers: tuple[Layer, ...],
    s: Array,
    t: Array | None,
    nodes: list[list[Array]],
    symmetric: bool,
    dtype: np.dtype,
    parts: Sequence[str],
) -> list[Array]:
    """Matrices after layers of vectors, from S and T before them.

    Parameters
    ----------
    layers : tuple of layers
        The layers.
    s, t : array (n, m), float64
        S and T before the layers; t None for T = 0.
    nodes : list of two lists of arrays
        `node_variances` of both sides.
    symmetric : bool
        Whether the matrices are symmetric; then they are computed on and below the diagonal.
    dtype : dtype
        Of the matrices.
    parts : sequence of {"nngp", "ntk"}
        Which matrices.

    Returns
    -------
    list of arrays (n, m)
    """

    def entries(block: Block) -> list[Array]:
        start = s[block.rows, block.columns].copy()
        tangents = None if t is None else t[block.rows, block.columns].copy()
        results = _block_recursion(layers, start, tangents, nodes, block, "ntk" in parts)
        return [results[part] for part in parts]

    return by_blocks(entries, s, s.T, symmetric, dtype, len(parts))


def node_variances(layers: Sequence[Layer], variances: Array) -> list[Array]:
    """S(x_i, x_i), (n,) float64, before every Activation and LayerNorm, branches before shortcuts. variances: before all layers."""
    results: list[Array] = []
    _follow(layers, variances, None, results)
    return results


def diagonals(layers: Sequence[Layer], s: Array, t: Array | None = None) -> tuple[Array, Array]:
    """(S(x_i, x_i), T(x_i, x_i)) after the layers, (n,) float64, from those before; t None: zeros.

    A zero row has no direction: its correlation with itself is 0, as with every other row.
    """
    s, t = _follow(layers, s, namespace(s).zeros_like(s) if t is None else t, [])
    assert t is not None
    return s, t


def _follow(layers: Sequence[Layer], s: Array, t: Array | None, nodes: list[Array]) -> tuple[Array, Array | None]:
    """Variances s and tangents t (n,) of rows with themselves after the layers; t may be None. `nodes` gets the variances at nodes."""
    xp = namespace(s)
    for layer in layers:
        if isinstance(layer, Activation):
            nodes.append(s)
            a = xp.sqrt(s)
            if t is not None:
                t = t * layer.gain * layer.sigma.dual_derivative(a, a, xp.where(a > 0, 1.0, 0.0))
            s = layer.gain * layer.sigma.dual(a, a, xp.ones_like(a))
        elif isinstance(layer, Dense):
            s = layer.weight_variance * s + layer.bias_variance
            if t is not None:
                t = layer.weight_variance * t + (s if layer.trainable else 0.0)
        elif isinstance(layer, LayerNorm):
            nodes.append(s)
            size = xp.where(s > 0, s, 1.0)
            if t is not None:
                t = xp.where(s > 0, t / size, 0.0)
            s = xp.where(s > 0, 1.0, 0.0)
        elif isinstance(layer, Residual):
            branch_s, branch_t = _follow(layer.branch, s, t, nodes)
            s, t = _follow(layer.shortcut, s, t, nodes)
            s = branch_s + s
            t = None if t is None else branch_t + t
    return s, t


def _block_recursion(
    layers: Sequence[Layer], s: Array, t: Array | None, nodes: list[list[Array]], block: Block, tangent: bool
) -> dict[str, Array | None]:
    """{"nngp": S, "ntk": T} of a block, from S and T (R, C) before the layers, which are overwritten; t None: 0. T when `tangent`."""
    if tangent and t is None:
        t = namespace(s).zeros_like(s)
    pairs = ((v[block.rows], w[block.columns]) for v, w in zip(*nodes, strict=True))
    s, t = _recursion(layers, s, t if tangent else None, pairs)
    return {"nngp": s, "ntk": t}


def _recursion(
    layers: Sequence[Layer], s: Array, t: Array | None, nodes: Iterator[tuple[Array, Array]]
) -> tuple[Array, Array | None]:
    """(S, T) (R, C) after the layers, from those before, which are overwritten.

    nodes: for each node the variances (R,) and (C,) of both sides, in the order of `node_variances`.
    """
    xp = namespace(s)
    for layer in layers:
        if isinstance(layer, Activation):
            v, w = next(nodes)
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
        elif isinstance(layer, LayerNorm):
            size = _sizes(*next(nodes))
            inside = size > 0
            size[~inside] = 1.0
            for matrix in (s, t):
                if matrix is not None:
                    matrix /= size
                    matrix *= inside
            del size, inside
        elif isinstance(layer, Residual):
            s, t = _residual(layer, s, t, nodes)
    return s, t


def _residual(
    layer: Residual, s: Array, t: Array | None, nodes: Iterator[tuple[Array, Array]]
) -> tuple[Array, Array | None]:
    """S and T of both paths, added; s and t are overwritten."""
    branch_s, branch_t = _recursion(layer.branch, s.copy(), None if t is None else t.copy(), nodes)
    s, t = _recursion(layer.shortcut, s, t, nodes)
    s += branch_s
    if t is not None:
        t += branch_t
    return s, t


def _sizes(v: Array, w: Array) -> Array:
    """√(v_i·w_j), (R, C). Of equal variances the root of their product is the variance itself, so duplicate rows keep c = 1."""
    return namespace(v).sqrt(v[:, None] * w)
