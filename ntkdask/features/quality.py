"""How well the inner products of a feature map approximate a kernel, on rows that fit in memory.

Frobenius and spectral error, and the constants of spectral approximation. `workflows.approximation` samples the rows from
datasets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.linalg import LinAlgError

from ntkdask import lapack
from ntkdask.arrays import Array, namespace, require_float, require_rows, to_host
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMap

COLUMNS = 4096
"""Features that are summed at a time, in float64."""


@dataclass(frozen=True)
class ApproximationError:
    """Errors of the Gram matrix K̂ = ΦΦᵀ as an approximation of the kernel matrix K on n rows.

    Parameters
    ----------
    n : int
        Number of rows.
    n_components : int
        Number of features; 0 where only matrices were compared.
    lam : float
        λ > 0, of the unnormalised matrices.
    frobenius : float
        ‖K̂ − K‖_F/‖K‖_F.
    spectral : float
        ‖K̂ − K‖₂/‖K‖₂.
    diagonal : float
        Largest |K̂_ii − K_ii| over the mean of K_ii.
    smallest, largest : float
        The extreme generalised eigenvalues of K̂ + λI with respect to K + λI:
        smallest·(K + λI) ⪯ K̂ + λI ⪯ largest·(K + λI), both tight.

    References
    ----------
    Zandieh et al. 2021, eq. 13.
    """

    n: int
    n_components: int
    lam: float
    frobenius: float
    spectral: float
    diagonal: float
    smallest: float
    largest: float

    @property
    def epsilon(self) -> float:
        """The least ε with (1 − ε)(K + λI) ⪯ K̂ + λI ⪯ (1 + ε)(K + λI), eq. 13."""
        return max(1 - self.smallest, self.largest - 1)


def gram_error(approximate: np.ndarray, exact: np.ndarray, lam: float | None = None) -> ApproximationError:
    """The errors of an approximate (n, n) kernel matrix; the result's n_components is 0.

    O(n³) on the host, in float64, with 4·n² numbers held.

    Parameters
    ----------
    approximate, exact : array (n, n)
        K̂ and K, symmetric.
    lam : float, optional
        λ > 0, of the unnormalised matrices; None: the mean of K's diagonal.

    Returns
    -------
    ApproximationError
        The errors.

    Raises
    ------
    InputError
        For matrices of other shapes, a zero kernel, and a λ for which K + λI is not positive definite.
    """
    if approximate.shape != exact.shape or exact.ndim != 2 or exact.shape[0] != exact.shape[1] or not exact.size:
        raise InputError(f"expected two (n, n) matrices with n >= 1, found {approximate.shape} and {exact.shape}.")
    approximate, exact = (np.asarray(to_host(k), np.float64) for k in (approximate, exact))
    own = np.diag(exact).copy()
    if not own.mean() > 0:
        raise InputError("the exact kernel is zero on these rows, so errors relative to it mean nothing. Use others.")
    lam = float(own.mean()) if lam is None else lam
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 < lam < math.inf:
        raise InputError(f"lam is {lam!r}, expected a positive number: the ridge of eq. 13, on unnormalised matrices.")
    difference = approximate - exact
    smallest, largest = _generalised_ends(approximate, exact, lam)
    return ApproximationError(
        n=len(own),
        n_components=0,
        lam=float(lam),
        frobenius=float(np.linalg.norm(difference) / np.linalg.norm(exact)),
        spectral=_spectral_norm(difference) / _spectral_norm(exact),
        diagonal=float(np.abs(np.diag(difference)).max() / own.mean()),
        smallest=smallest,
        largest=largest,
    )


def map_error(feature_map: FeatureMap, x: Array, lam: float | None = None) -> ApproximationError:
    """The errors of a map as an approximation of its `target` on rows x (n, *s), NumPy or CuPy, float32 or float64.

    Holds φ(x), (n, n_components), and matrices of n² float64; products are summed in float64. Raises InputError for no rows,
    and what `gram_error`, the map and the kernel raise.
    """
    x = require_rows(require_float(x))
    if not x.shape[0]:
        raise InputError(f"x has shape {x.shape}: no rows to compare on.")
    phi = feature_map(x)
    xp = namespace(phi)
    gram = xp.zeros((x.shape[0],) * 2, xp.float64)
    for start in range(0, phi.shape[1], COLUMNS):
        block = phi[:, start : start + COLUMNS].astype(xp.float64, copy=False)
        gram += block @ block.T
    error = gram_error(to_host(gram), to_host(feature_map.target(x)), lam)
    return ApproximationError(**{**vars(error), "n_components": phi.shape[1]})


def _spectral_norm(symmetric: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvalsh(symmetric)[[0, -1]]).max())


def _generalised_ends(approximate: np.ndarray, exact: np.ndarray, lam: float) -> tuple[float, float]:
    """The smallest and the largest μ with (K̂ + λI)v = μ(K + λI)v."""
    ridge = lam * np.eye(len(exact))
    try:
        values = lapack.eigvalsh(np.asfortranarray(approximate + ridge), np.asfortranarray(exact + ridge))
    except LinAlgError as error:
        least = float(np.linalg.eigvalsh(exact)[0])
        raise InputError(
            f"K + {lam:.3g}·I is not positive definite: rounding leaves K with an eigenvalue of {least:.3g}. Use lam > "
            f"{-least:.3g}, or float64 rows."
        ) from error
    return float(values[0]), float(values[-1])
