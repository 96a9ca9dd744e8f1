"""The Gibbs sampler of Zandieh et al. 2021 for p(w) ∝ ‖w‖² exp(−‖w‖²/2), coordinate by coordinate. Kept as a comparison.

p is isotropic and only w/‖w‖ enters the features, which is uniform on the sphere: `seeds.sphere` draws it exactly and at once.
A finite number of sweeps draws it approximately: after one sweep the diagonal of the kernel is off by 10 % at d = 2 (MATH.md
§4).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

from ntkdask import seeds
from ntkdask.compiled import compiled_as_written

STEPS = 60
"""Most steps of a root search: Newton's, or a bisection where that would leave the bracket."""


def gibbs_directions(
    seed: int, path: seeds.Path, d: int, m: int, sweeps: int, dtype: str = "float64", scale: float = 1.0
) -> np.ndarray:
    """Directions (d, m) with columns scale·w/‖w‖, w the state after `sweeps` Gibbs sweeps that began at N(0, I).

    One sweep draws w_1, …, w_d in turn, each given the others: its CDF is Φ(t) − t·φ(t)/(1+s), s = Σ_{j≠i} w_j². Column j does
    not depend on m.

    Parameters
    ----------
    seed : int
        Seed of the random numbers.
    path : tuple
        Place of these directions in the map, which with the seed fixes the numbers.
    d : int
        Entries of a direction.
    m : int
        Number of directions.
    sweeps : int
        Number of sweeps.
    dtype : str
        "float32" or "float64", of the result; the sweeps are in float64.
    scale : float
        Length of every direction.

    Returns
    -------
    array (d, m) of dtype
        The directions, as columns.

    References
    ----------
    Zandieh et al. 2021, §3.3; MATH.md §4.
    """
    out = np.empty((d, m), dtype)
    for block, start in enumerate(range(0, m, seeds.COLUMN_BLOCK)):
        width = min(seeds.COLUMN_BLOCK, m - start)
        w = ndtri(seeds.uniforms(seed, path, width * d, block)).reshape(width, d)
        for sweep in range(sweeps):
            u = seeds.uniforms(seed, (*path, "gibbs", sweep), width * d, block).reshape(width, d)
            _sweep(w, u, ndtri(np.minimum(u, 1.0 - u)))
        w *= (scale / np.sqrt(np.einsum("ij,ij->i", w, w)))[:, None]
        out[:, start : start + width] = w.T
    return out


@compiled_as_written
def _sweep(w, u, starts):
    """One sweep over every row of w (width, d) in place; u: uniforms, starts: normal quantiles of min(u, 1 − u)."""
    for row in range(w.shape[0]):
        squares = 0.0
        for i in range(w.shape[1]):
            squares += w[row, i] * w[row, i]
        for i in range(w.shape[1]):
            others = max(squares - w[row, i] * w[row, i], 0.0)
            # the law is symmetric, and small tails keep their digits
            lower, low, high, t = min(u[row, i], 1.0 - u[row, i]), -10.0, 0.0, starts[row, i]
            for _ in range(STEPS):
                density = math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
                excess = 0.5 * math.erfc(-t / math.sqrt(2.0)) - t * density / (1.0 + others) - lower
                if excess < 0.0:
                    low = t
                else:
                    high = t
                slope = (t * t + others) / (1.0 + others) * density
                step = t - excess / slope if slope > 0.0 else 0.5 * (low + high)
                if not low < step < high:
                    step = 0.5 * (low + high)
                moved = abs(step - t)
                t = step
                if moved <= 1e-13:
                    break
            w[row, i] = t if u[row, i] < 0.5 else -t
            squares = others + w[row, i] * w[row, i]
