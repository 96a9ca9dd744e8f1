"""Ridge at one alpha by a Cholesky factorisation of the Gram matrix, a twentieth of an eigendecomposition, where that is safe.

Where rows do not outnumber features the Gram is singular: Cholesky then sees α on top of rounding, which float32 products make
1e-7 of the largest eigenvalue, while `EighRidge` cuts the rank. A pivot that is rounding tells the other cases.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import blas, cho_factor, cho_solve

from ntkdask.errors import InputError
from ntkdask.solvers.gram import triangle_panels
from ntkdask.solvers.ridge import Centred, EighRidge, Solution

PIVOT_ROUNDINGS = 1e3
"""A pivot below this many m·ε of its diagonal entry has lost its digits; so told, the features' scales do not matter."""
ALPHA_ROUNDINGS = 256.0
"""With fewer rows than features predictions are off by up to ε·λ_max/(4α) of the targets: 1e-3 at α = 256·ε·λ_max."""


def solve_cholesky(centred: Centred, alpha: float, rounding: float = float(np.finfo(float).eps)) -> Solution:
    """One alpha by a Cholesky factorisation, m³/3 flops, in place.

    Parameters
    ----------
    centred : Centred
        The centred sums, whose Gram matrix is destroyed.
    alpha : float
        The ridge.
    rounding : float
        ε of the products in the Gram matrix.

    Raises
    ------
    InputError
        When G + αI is not positive definite to rounding, and when rows do not outnumber features and α is near the rounding of G.
    """
    if not _outnumber(centred):
        least = ALPHA_ROUNDINGS * rounding * _largest_eigenvalue(centred.gram)
        if alpha < least:
            raise _advice(
                alpha,
                f"is too near the rounding of the Gram matrix of {centred.rows} rows and {centred.gram.shape[0]} features; "
                f"Cholesky would be right from alpha={least:.1g} on",
            )
    try:
        return _factorised(centred, alpha)
    except np.linalg.LinAlgError as error:
        raise _advice(alpha, f"is not positive definite to rounding ({error})") from error


def solve_one(centred: Centred, alpha: float) -> Solution:
    """One alpha by Cholesky where rows outnumber features and no pivot is rounding, else by the whole spectrum; in place."""
    if not _outnumber(centred):
        return EighRidge.factorise(centred).solve(alpha)
    gram, diagonal = centred.gram, np.diag(centred.gram).copy()
    # the upper triangle, which nobody reads, keeps the matrix that the factorisation destroys
    for rows, columns in triangle_panels(diagonal.size):
        gram[columns, rows] = _both_triangles(gram, rows, columns)
    try:
        return _factorised(centred, alpha, PIVOT_ROUNDINGS * diagonal.size * np.finfo(float).eps)
    except np.linalg.LinAlgError:
        for rows, columns in triangle_panels(diagonal.size):
            gram[rows, columns] = gram[columns, rows].T
        gram[np.diag_indices(diagonal.size)] = diagonal
        return EighRidge.factorise(centred).solve(alpha)


def _factorised(centred: Centred, alpha: float, least_pivot: float = 0.0) -> Solution:
    """The solution; LinAlgError when a pivot is not above least_pivot of its diagonal entry, or far below α, the least possible."""
    gram = centred.gram
    diagonal = np.arange(gram.shape[0])
    gram[diagonal, diagonal] += alpha
    entries = gram[diagonal, diagonal]
    factor = cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
    pivots = factor[0][diagonal, diagonal] ** 2
    if least_pivot and not (pivots > np.maximum(least_pivot * entries, alpha / 2)).all():
        raise np.linalg.LinAlgError("a pivot is rounding")
    return centred.solution(cho_solve(factor, centred.cross, check_finite=False), alpha)


def _outnumber(centred: Centred) -> bool:
    return centred.rows - centred.has_intercept > centred.gram.shape[0]


def _both_triangles(gram: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """The transpose of a panel of the lower triangle, its square on the diagonal made symmetric."""
    panel = gram[rows, columns].T.copy()
    size = panel.shape[0]
    square = panel[:, :size]
    panel[:, :size] = np.triu(square) + np.triu(square, 1).T
    return panel


def _largest_eigenvalue(gram: np.ndarray) -> float:
    """λ_max from the lower triangle by a few power iterations; at most the trace."""
    vector = np.sqrt(np.maximum(np.diag(gram), 0.0)) + np.finfo(float).tiny
    value = 0.0
    for _ in range(8):
        vector = vector / max(np.linalg.norm(vector), np.finfo(float).tiny)
        product = blas.dsymv(1.0, gram, vector, lower=1)
        value, vector = float(vector @ product), product
    return value


def _advice(alpha: float, found: str) -> InputError:
    return InputError(
        f"ridge: the Gram matrix plus alpha={alpha:g} {found}. "
        'Use a larger alpha, or solver="eigh" (or "auto"), which drops the directions without data.'
    )
