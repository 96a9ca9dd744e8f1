"""Rows of extreme sizes: what scaling a row does to a network's kernel, and rows scaled by powers of two, which round nothing.

Products of rows of 1e-25 or 1e20 leave float32, and squares of 1e160 leave float64, where the kernel itself need not: behind a
LayerNorm it does not depend on the size of a row at all. Where S(λx, μy) = (λμ)^p·S(x, y), and T alike, such rows are scaled first,
and the matrix afterwards. Networks that are not homogeneous (a bias before the first LayerNorm, tanh) get rows as they are. Called by
`neural`, `arccosine` and sketches of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkdask.activations import Monomial, RectifiedMonomial, Sign, Step
from ntkdask.activations.base import ActivationFunction
from ntkdask.arrays import Array, namespace
from ntkdask.networks import Activation, Conv, Dense, Layer, LayerNorm, Residual

ORDINARY = 30
"""Rows whose largest entry is between 2^−ORDINARY and 2^ORDINARY stay as they are: their products fit float32 by far."""

BLOCK_ENTRIES = 2**18
"""Entries of a matrix that are scaled at a time."""


class Balanced(NamedTuple):
    """Rows whose largest entries are of ordinary size.

    Parameters
    ----------
    rows : array (n, *s)
        The rows as given, where all are of ordinary size.
    exponents : array (n,) of int64, or None
        p·e of each row, which was divided by 2^e; None where no row was.
    """

    rows: Array
    exponents: Array | None


def power(layers: Sequence[Layer], before: int | None = 1) -> int | None:
    """p where scaling a row by λ > 0 scales its S and T with every other row by λ^p; None where no power does.

    before: p of what the layers get. p = 0 behind a LayerNorm, whatever follows.
    """
    p = before
    for layer in layers:
        if p is None or isinstance(layer, LayerNorm):
            p = None if p is None else 0
        elif isinstance(layer, (Dense, Conv)):
            p = None if p and layer.bias_variance else p
        elif isinstance(layer, Activation):
            degree = _degree(layer.sigma) if p else 0
            p = None if degree is None else p * degree
        elif isinstance(layer, Residual):
            branch, shortcut = power(layer.branch, p), power(layer.shortcut, p)
            p = branch if branch == shortcut else None
    return p


def _degree(sigma: ActivationFunction) -> int | None:
    """q where σ(λt) = λ^q·σ(t) for λ > 0; None where no power does."""
    if isinstance(sigma, (Step, Sign)):
        return 0
    if isinstance(sigma, (Monomial, RectifiedMonomial)):
        return sigma.q
    return 1 if sigma.homogeneous else None


def balanced(x: Array, p: int | None) -> Balanced:
    """Rows (n, *s) with those beyond ordinary size divided by powers of two; p: of `power`, None leaves all as they are."""
    exponents = None if p is None else extreme_exponents(x)
    if p is None or exponents is None:
        return Balanced(x, None)
    xp = namespace(x)
    return Balanced(xp.ldexp(x, -exponents.reshape(-1, *(1,) * (x.ndim - 1))), p * exponents.astype(xp.int64))


def extreme_exponents(x: Array) -> Array | None:
    """(n,) e of each row (n, *s) whose largest entry, about 2^e, is not of ordinary size, and 0 of others; None where all are 0."""
    if not x.size:
        return None
    xp, axes = namespace(x), tuple(range(1, x.ndim))
    largest = xp.maximum(x.max(axis=axes), -x.min(axis=axes))
    # zeros, NaN and infinities stay: frexp gives them no exponent
    usable = xp.isfinite(largest) & (largest > 0)
    exponents = xp.frexp(xp.where(usable, largest, 1.0).astype(x.dtype))[1]
    exponents = xp.where(xp.abs(exponents) > ORDINARY, exponents, 0)
    return exponents if bool(exponents.any()) else None


def restored(k: Array, left: Balanced, right: Balanced) -> Array:
    """The matrix (n, m) of balanced rows as that of the rows themselves, in place; where it exceeds its dtype it is inf."""
    if left.exponents is None and right.exponents is None:
        return k
    xp = namespace(k)
    rows, columns = (_exponents(side) for side in (left, right))
    step = max(1, BLOCK_ENTRIES // max(1, k.shape[1]))
    for first in range(0, k.shape[0], step):
        part = slice(first, first + step)
        with np.errstate(over="ignore", under="ignore"):
            k[part] = xp.ldexp(k[part], (rows[part, None] + columns).astype(xp.int32))
    return k


def restored_features(features: Array, rows: Balanced) -> Array:
    """Features (n, m) of balanced rows, whose products are a kernel of power p, as those of the rows themselves, in place."""
    if rows.exponents is None:
        return features
    with np.errstate(over="ignore", under="ignore"):
        return namespace(features).ldexp(features, rows.exponents.astype("int32")[:, None], out=features)


def restored_diagonal(d: Array, rows: Balanced) -> Array:
    """The diagonal (n,) of balanced rows as that of the rows themselves."""
    if rows.exponents is None:
        return d
    with np.errstate(over="ignore", under="ignore"):
        return namespace(d).ldexp(d, (2 * rows.exponents).astype("int32"))


def _exponents(side: Balanced) -> Array:
    """The exponents of a side, zeros where no row was scaled."""
    return namespace(side.rows).zeros(len(side.rows), "int64") if side.exponents is None else side.exponents
