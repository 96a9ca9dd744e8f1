"""Random Fourier features of the Gaussian kernel, the comparator of Table 2 of Zandieh et al. 2021.

The directions of the frequencies are independent, orthogonal or structured; their random numbers come from `seeds`. Called by
workflows on tiles of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds, threads
from ntkdask.arrays import Array, is_device_array, namespace, to_device
from ntkdask.cache import shared
from ntkdask.errors import InputError, nearest
from ntkdask.features.arccosine import drawing_bytes, product_bytes, weights_bytes
from ntkdask.features.base import FeatureMapBase, require_components
from ntkdask.features.sketching.structured import structured_directions
from ntkdask.kernels.base import flat_rows
from ntkdask.kernels.rbf import RBF
from ntkdask.registry import register

SAMPLINGS = ("gaussian", "orthogonal", "structured")


@register("feature map")
@dataclass(frozen=True)
class FourierFeatures(FeatureMapBase):
    """Random features of RBF(gamma) = exp(−γ‖x − y‖²): √(2/m)·[cos(Wᵀx), sin(Wᵀx)], W (d, m/2) with columns N(0, 2γI).

    Unbiased. The products of a cosine and a sine give cos(wᵀ(x − y)), so ⟨φ(x), φ(x)⟩ = 1 for every draw. An odd m ends with
    √(2/m)·cos(wᵀx + b), b uniform on [0, 2π).

    Parameters
    ----------
    n_components : int
        Number of features m >= 1.
    gamma : float
        γ > 0.
    seed : int
        Seed of the frequencies.
    sampling : {"gaussian", "orthogonal", "structured"}
        "gaussian": independent frequencies. "orthogonal": each d frequencies have orthogonal directions and independent lengths
        of the same law; unbiased too, and of no larger variance for rows that are close to each other. "structured": products
        by Walsh–Hadamard transforms; unbiased, and several times faster when rows have some hundred features or more.

    Raises
    ------
    InputError
        For n_components < 1, gamma <= 0, an unknown sampling and rows without features.

    References
    ----------
    Rahimi & Recht 2007; Yu et al. 2016 (orthogonal); Le et al. 2013 (structured).
    """

    n_components: int
    gamma: float = 1.0
    seed: int = 0
    sampling: str = "gaussian"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        if self.sampling not in SAMPLINGS:
            raise InputError(f"unknown sampling {self.sampling!r}{nearest(str(self.sampling), SAMPLINGS)}")
        _ = self.target

    @property
    def target(self) -> RBF:
        """The Gaussian kernel with this gamma."""
        return RBF(self.gamma)

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""
        x, pairs = flat_rows(x), self.n_components // 2
        xp = namespace(x)
        out = xp.empty((x.shape[0], self.n_components), x.dtype)
        cosines, sines, last = out[:, :pairs], out[:, pairs : 2 * pairs], out[:, 2 * pairs :]
        self._products_into(x, out[:, : pairs + last.shape[1]])
        if last.shape[1]:
            last[:] = out[:, pairs : pairs + 1]
            last += x.dtype.type(2 * math.pi * seeds.uniforms(self.seed, ("fourier", "phase"), 1)[0])
            xp.cos(last, out=last)
        xp.sin(cosines, out=sines)
        xp.cos(cosines, out=cosines)
        out *= x.dtype.type(math.sqrt(2.0 / self.n_components))
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: the result and, when the shape of a row is given, the frequencies and their drawing."""
        d, m = math.prod(row_shape or (0,)), -(-self.n_components // 2)
        drawing = drawing_bytes(d, m, self.sampling)
        if self.sampling == "orthogonal":
            # a block, its factor and LAPACK's copies of both
            drawing += 4 * 8 * d * min(d, m)
        held = weights_bytes(d, m, itemsize, self.sampling) + product_bytes(n, d, itemsize, self.sampling)
        # NumPy's sines of strided columns go through buffers of 8 192 numbers
        return n * self.n_components * itemsize + held + drawing + 2 * 8192 * itemsize

    def _products_into(self, x: Array, out: Array) -> None:
        """Write xᵀw for every frequency w to `out` (n, ⌈m/2⌉)."""
        if self.sampling == "structured":
            scale, path = math.sqrt(2.0 * self.gamma), ("fourier", "frequencies")
            structured_directions(self.seed, path, x.shape[1], out.shape[1], x, scale, "gaussian").into(x, out)
        else:
            namespace(x).matmul(x, self._frequencies(x), out=out)

    def _frequencies(self, x: Array) -> Array:
        """The frequencies (d, ⌈m/2⌉) in x's dtype and on its device, drawn once per process."""
        d, m, device = x.shape[1], -(-self.n_components // 2), is_device_array(x)
        draw = _orthogonal if self.sampling == "orthogonal" else _independent
        key = ("fourier", self.sampling, self.gamma, self.seed, d, m, x.dtype.name, device and x.device.id)
        scale = math.sqrt(2.0 * self.gamma)
        return shared.get(key, lambda: to_device(draw(self.seed, d, m, x.dtype.name, scale), device))


def _independent(seed: int, d: int, m: int, dtype: str, scale: float) -> np.ndarray:
    return seeds.normals(seed, ("fourier", "frequencies"), d, m, dtype, scale)


def _orthogonal(seed: int, d: int, m: int, dtype: str, scale: float) -> np.ndarray:
    """Frequencies (d, m) in blocks of d columns: a Haar-distributed orthogonal matrix times independent lengths of law χ_d."""
    out = np.empty((d, m), dtype)
    for block, start in enumerate(range(0, m, d)):
        width = min(d, m - start)
        gaussian = seeds.normals(seed, ("fourier", "directions", block), d, width)
        # one thread: the bits of the features do not depend on how many there are
        with threads.limited(1):
            q, r = np.linalg.qr(gaussian)
        # LAPACK fixes signs by the first entries: R's diagonal made positive leaves Q uniform
        q *= scale * np.sign(np.diag(r)) * _lengths(seed, block, d, width)
        out[:, start : start + width] = q
    return out


def _lengths(seed: int, block: int, d: int, width: int) -> np.ndarray:
    """Lengths (width,) of standard normal vectors of d entries, independent of the directions."""
    path = ("fourier", "lengths", block)
    return np.concatenate(
        [
            np.linalg.norm(seeds.normals(seed, (*path, start), d, min(seeds.COLUMN_BLOCK, width - start)), axis=0)
            for start in range(0, width, seeds.COLUMN_BLOCK)
        ]
    )
