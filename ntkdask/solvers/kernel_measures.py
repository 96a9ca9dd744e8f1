"""How far the pseudo-NTK Θ̂ is from the empirical NTK Θ: the measures of Mohamadi & Sutherland, from tiles.

Θ (n, m, O, O), Θ̂ (n, m) = Σ_ab Θ_ab/O. Everything comes from sums over pairs of rows, which add up over tiles: nothing of size
(n·O)² need be held, and Θ̂ ⊗ I_O is never formed:

    ‖Θ − Θ̂⊗I‖_F² = Σ_{x,x'} [ Σ_{a≠b} Θ_ab² + Σ_a (Θ_aa − Θ̂)² ]

summed as it stands, so that a small difference does not drown in the rounding of large norms. Arrays in, numbers out, NumPy or
CuPy; sums are float64. Spectra are in `matrices.spectrum`. Called by `workflows.empirical.comparison`. MATH.md §5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, namespace, require_float, to_host
from ntkdask.errors import InputError

STRIP_BYTES = 16 * 2**20
"""Bytes of a strip of Θ in float64."""


@dataclass(frozen=True)
class KernelSums:
    """Sums over pairs of rows, of one tile or (+) of many.

    Parameters
    ----------
    pairs : int
        How many pairs.
    outputs : int
        O.
    diagonal : float
        Σ_a Θ_aa².
    off_diagonal : float
        Σ_{a≠b} Θ_ab².
    pseudo : float
        O·ΣΘ̂² = ‖Θ̂⊗I‖².
    difference : float
        ‖Θ − Θ̂⊗I‖².
    ratios : float
        The sum over pairs of √(Σ_{a≠b} Θ_ab² / Σ_a Θ_aa²).
    """

    pairs: int
    outputs: int
    diagonal: float
    off_diagonal: float
    pseudo: float
    difference: float
    ratios: float

    def __add__(self, other: KernelSums) -> KernelSums:
        if self.outputs != other.outputs:
            raise InputError(f"kernel measures: sums of {self.outputs} and of {other.outputs} outputs do not add up.")
        return KernelSums(
            self.pairs + other.pairs,
            self.outputs,
            self.diagonal + other.diagonal,
            self.off_diagonal + other.off_diagonal,
            self.pseudo + other.pseudo,
            self.difference + other.difference,
            self.ratios + other.ratios,
        )

    def times(self, count: int) -> KernelSums:
        """The sums of `count` equal tiles: a tile of a symmetric matrix counts for its mirror image."""
        return KernelSums(
            count * self.pairs,
            self.outputs,
            count * self.diagonal,
            count * self.off_diagonal,
            count * self.pseudo,
            count * self.difference,
            count * self.ratios,
        )

    @property
    def full(self) -> float:
        """ΣΘ² = ‖Θ‖_F²."""
        return self.diagonal + self.off_diagonal

    @property
    def off_diagonal_ratio(self) -> float:
        """Mean over pairs (x, x') of ‖off-diagonal part of Θ(x, x')‖_F / ‖its diagonal‖_F; ∝ width^{-1/2} at initialisation.

        The paper reports "the average of 1000×1000 kernels each having a shape of 10×10" (its Figure 2) and leaves open what is
        averaged; infinite where a pair has a zero diagonal beside other entries.
        """
        return self.ratios / self.pairs

    @property
    def pooled_off_diagonal_ratio(self) -> float:
        """‖off-diagonal entries of all pairs‖_F / ‖diagonal entries of all pairs‖_F: no pair can dominate it by a small diagonal."""
        return _quotient(self.off_diagonal, self.diagonal)

    @property
    def frobenius(self) -> float:
        """‖Θ − Θ̂⊗I‖_F / ‖Θ‖_F: Theorem 1 (eq. 3) says O(width^{-1/2}) at initialisation."""
        return _quotient(self.difference, self.full)

    @property
    def norm_difference(self) -> float:
        """|‖Θ̂⊗I‖_F − ‖Θ‖_F| / ‖Θ‖_F, the other reading of the paper's Figure 3; at most `frobenius`."""
        return abs(_quotient(self.pseudo, self.full) - 1.0)


def _quotient(above: float, below: float) -> float:
    if below > 0:
        return math.sqrt(above / below)
    return 0.0 if above == 0 else math.inf


def block_view(matrix: Array, outputs: int) -> Array:
    """(n·O, m·O) in order i·O + o as (n, m, O, O), without a copy. InputError when the shape is no multiple of O.

    >>> block_view(np.arange(16.0).reshape(4, 4), 2)[0, 1]
    array([[2., 3.],
           [6., 7.]])
    """
    if matrix.ndim != 2 or outputs < 1 or matrix.shape[0] % outputs or matrix.shape[1] % outputs:
        raise InputError(
            f"an empirical NTK of {outputs} outputs has shape (n·{outputs}, m·{outputs}), not {matrix.shape}. Give the number of "
            "outputs of the network."
        )
    n, m = (size // outputs for size in matrix.shape)
    return matrix.reshape(n, outputs, m, outputs).transpose(0, 2, 1, 3)


def stacked(theta: Array) -> Array:
    """(n, m, O, O) as the matrix (n·O, m·O) in order i·O + o; a copy."""
    if theta.ndim != 4 or theta.shape[2] != theta.shape[3]:
        raise InputError(f"an empirical NTK has shape (n, m, O, O), not {theta.shape}.")
    n, m, outputs, _ = theta.shape
    return namespace(theta).array(theta.transpose(0, 2, 1, 3), order="C").reshape(n * outputs, m * outputs)


def pseudo_of(theta: Array) -> Array:
    """The pseudo-NTK (n, m) of a full empirical NTK (n, m, O, O): the sum of each block over O. Eq. 2 of the paper."""
    return namespace(theta).einsum("nmab->nm", theta) / theta.shape[2]


def kernel_sums(theta: Array, pseudo: Array | None = None) -> KernelSums:
    """The sums of one tile: theta (n, m, O, O) float32 or float64, any strides; pseudo (n, m), None: that of theta.

    Holds STRIP_BYTES of theta in float64 at a time, at least a row. InputError for other shapes, NaN and infinity.
    """
    theta = require_float(theta, "theta")
    if theta.ndim != 4 or theta.shape[2] != theta.shape[3] or not theta.size:
        raise InputError(f"kernel measures: an empirical NTK has shape (n, m, O, O), not {theta.shape}.")
    n, m, outputs, _ = theta.shape
    if pseudo is not None:
        pseudo = require_float(pseudo, "pseudo")
        if pseudo.shape != (n, m):
            raise InputError(
                f"kernel measures: the pseudo-NTK has shape {pseudo.shape} beside an empirical NTK of ({n}, {m}) pairs."
            )
    rows = max(1, STRIP_BYTES // (8 * m * outputs * outputs))
    totals = np.zeros(5)
    for start in range(0, n, rows):
        own = None if pseudo is None else pseudo[start : start + rows]
        totals += _strip_sums(theta[start : start + rows], own)
    diagonal, off, pseudo_squares, difference, ratios = totals.tolist()
    return KernelSums(n * m, outputs, diagonal, off, outputs * pseudo_squares, difference, ratios)


def _strip_sums(theta: Array, pseudo: Array | None) -> np.ndarray:
    """(diagonal, off-diagonal, pseudo squares, difference, ratios) of a strip of rows."""
    xp, outputs = namespace(theta), theta.shape[2]
    flat = xp.array(theta, dtype="float64", order="C").reshape(-1, outputs * outputs)
    if not bool(xp.isfinite(flat).all()) or (pseudo is not None and not bool(xp.isfinite(pseudo).all())):
        raise InputError("kernel measures: the kernels have NaN or infinity. Check the network's weights and the rows.")
    diagonal = flat[:, :: outputs + 1].copy()
    mean = flat.sum(axis=1) / outputs if pseudo is None else pseudo.astype("float64").reshape(-1)
    flat[:, :: outputs + 1] = 0.0
    on, off = xp.einsum("pa,pa->p", diagonal, diagonal), xp.einsum("pa,pa->p", flat, flat)
    apart = diagonal - mean[:, None]
    # a pair without a diagonal has ratio 0 when it has nothing else either
    ratios = xp.sqrt(off / xp.where(on > 0, on, 1.0)) + xp.where((on == 0) & (off > 0), np.inf, 0.0)
    sums = (on.sum(), off.sum(), mean @ mean, off.sum() + xp.einsum("pa,pa->", apart, apart), ratios.sum())
    return np.array([float(s) for s in sums])


def relative_difference(value: float, reference: float) -> float:
    """|value − reference| / |reference|, as the paper compares eigenvalues and condition numbers; NaN where it is undefined.

    >>> relative_difference(1.5, 2.0)
    0.25
    """
    if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
        return math.nan
    return abs(value - reference) / abs(reference)


def prediction_difference(predicted: Array, reference: Array) -> float:
    """‖f̂ − f‖_F / ‖f‖_F of predictions (m, O): Figure 7 of the paper. InputError for shapes that differ.

    >>> prediction_difference(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])) == 0.5**0.5
    True
    """
    f, g = (np.asarray(to_host(side), np.float64) for side in (predicted, reference))
    if f.shape != g.shape:
        raise InputError(f"predictions have shapes {f.shape} and {g.shape}; they must agree.")
    return _quotient(float(np.sum((f - g) ** 2)), float(np.sum(g**2)))


def accuracy(predicted: Array, labels: Array) -> float:
    """The share of rows (m, O) whose largest output (the first among equal ones) is that of their label (m,).

    InputError for other shapes.
    """
    f, y = to_host(predicted), to_host(labels)
    if f.ndim != 2 or y.shape != f.shape[:1] or not len(f):
        raise InputError(
            f"accuracy: predictions of shape {f.shape} and labels of shape {y.shape}; use (m, O) and (m,)."
        )
    return float(np.mean(f.argmax(axis=1) == y))


def power_law(widths: Array, values: Array) -> float:
    """The slope of log values against log widths by least squares: −1/2 where Theorem 1 holds. Values (k,) or (seeds, k), k ≥ 2.

    >>> round(power_law([1, 4, 16], [1.0, 0.5, 0.25]), 12)
    -0.5
    """
    x, y = np.asarray(widths, np.float64), np.atleast_2d(np.asarray(values, np.float64))
    if x.ndim != 1 or x.size < 2 or y.shape[-1] != x.size or not ((x > 0).all() and (y > 0).all()):
        raise InputError(f"a slope takes two widths or more and positive values for each, not {x.shape} and {y.shape}.")
    return float(np.polyfit(np.log(x), np.log(y).mean(axis=0), 1)[0])
