"""What infinitely wide networks predict after training for a time t: ensemble mean and covariance from one eigendecomposition.

Convention. An untrained network is f₀ ~ GP(0, K), K the NNGP. Training is gradient flow on ½‖f(D) − Y‖², summed over rows and
targets, so df(D)/dt = −Θ_DD (f(D) − Y); every target is an independent output. A training set D of n rows, test rows T, and
regularisation r ≥ 0 give, with M = Θ_DD + rI and A_t = M⁻¹(I − e^{−Mt}),

    mean_t       = Θ_TD A_t Y
    covariance_t = K_TT + Θ_TD A_t K_DD A_t Θ_DT − Θ_TD A_t K_DT − (Θ_TD A_t K_DT)ᵀ        (Lee et al. 2019, §2.3)

r is that of a trainable number √r·b_i added to the output of training row i alone (Hu, Li & Yu 2020, §3): at t = ∞ it is kernel
ridge, that is ½‖f − Y‖² + (r/2)·‖θ − θ₀‖². With K itself in place of Θ (the last layer alone is trained; b_i starts at N(0, 1))
the covariance becomes K_TT − K_TD M⁻¹(I − e^{−2Mt})K_DT, at t = ∞ the Gaussian process posterior with noise variance r.

M = U(Λ + r)Uᵀ is decomposed once, for every t and r; no inverse is formed. Arrays in, arrays out, NumPy or CuPy; the workflows of
`workflows.ensemble` map this over stored tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ntkdask import lapack
from ntkdask.arrays import Array, namespace, require_float, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.preprocessing.rows import check_finite_rows, name_rows

NOT_A_KERNEL = 1e-3
"""A negative eigenvalue beyond this share of the largest is no rounding: float32 kernels stay below 1e-4."""
INCONSISTENT = 1e-6
"""Share of ‖Y‖² outside the span of a singular kernel above which the targets contradict each other."""


def check_times(times: float | Sequence[float]) -> tuple[float, ...]:
    """Times as floats, each at least 0; inf is convergence. InputError for negative ones, NaN, and when there are none."""
    listed = np.atleast_1d(np.asarray(times, np.float64)).ravel()
    if not listed.size or np.isnan(listed).any() or (listed < 0).any():
        raise InputError(f"times are {times!r}; give at least one number >= 0, math.inf for convergence.")
    return tuple(float(t) for t in listed)


def mean_loss_time(t: float, n: int, k: int, learning_rate: float = 1.0) -> float:
    """The time here that equals time t of neural-tangents: learning_rate·t/(n·k).

    neural-tangents (`gradient_descent_mse_ensemble`) trains on the loss ½‖f − Y‖²/(n·k), the mean over n rows and k targets.

    >>> mean_loss_time(100.0, n=10, k=2)
    5.0
    """
    return learning_rate * t / (n * k)


def factorise_bytes(n: int, with_prior: bool) -> int:
    """Peak bytes of `GradientFlow.factorise` on n rows, its inputs included when it may overwrite them.

    LAPACK's evd holds 2 n² float64 of workspace beside the matrix; K_DD is held meanwhile, and becomes UᵀK_DD U afterwards.
    """
    return 8 * n * n * (4 if with_prior else 3)


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The eigendecomposition Θ_DD = UΛUᵀ, ready for any time and regularisation; float64.

    Parameters
    ----------
    eigenvalues : array (n,)
        Λ, ascending; negative ones are set to 0.
    modes : array (n, n)
        Row i is uᵢ.
    prior : array (n, n), optional
        UᵀK_DD U; None when the kernel that trains is the prior's own, K.
    noise : float
        What rounding alone makes of a zero eigenvalue; at least −λ_min before that was set to 0.
    reg : float
        r.

    Notes
    -----
    Directions with Λ + r <= noise are null: the network does not move in them, or so slowly that the matrix does not say. They
    count as unmoved at t > 1/noise, which for an exactly singular kernel (duplicate rows) is the limit.
    """

    eigenvalues: Array
    modes: Array
    prior: Array | None
    noise: float
    reg: float = 0.0

    @classmethod
    def factorise(cls, theta_dd: Array, k_dd: Array | None = None, *, overwrite: bool = False) -> GradientFlow:
        """Decompose Θ_DD in float64: about 9 n³ flops, 4 n³ more with k_dd.

        Parameters
        ----------
        theta_dd : array (n, n), float32 or float64
            Θ_DD; its lower triangle is read.
        k_dd : array (n, n), optional
            The NNGP K_DD; None: theta_dd is K_DD itself (last-layer training, the NNGP posterior).
        overwrite : bool
            Whether float64 inputs may be destroyed.

        Raises
        ------
        InputError
            For matrices that are not square, differ in shape, contain NaN, or are no kernel.
        """
        theta = _square(theta_dd, "theta_dd")
        xp, n = namespace(theta), theta.shape[0]
        if k_dd is not None and _square(k_dd, "k_dd").shape != theta.shape:
            raise InputError(f"theta_dd has shape {theta.shape} and k_dd {k_dd.shape}; both are (n, n).")
        rounding = n * np.finfo(np.float64).eps + (np.finfo(np.float32).eps if theta.dtype == np.float32 else 0.0)
        values, modes = _eigh(theta.astype(xp.float64, copy=not overwrite))
        largest, smallest = float(values[-1]), float(values[0])
        if -smallest > NOT_A_KERNEL * max(largest, 0.0):
            raise InputError(
                f"theta_dd is not positive semi-definite: its eigenvalues reach from {smallest:.3g} to {largest:.3g}, which no "
                "rounding explains. Check that it is the kernel of the training rows with themselves."
            )
        prior = None
        if k_dd is not None:
            prior = modes @ k_dd.astype(xp.float64, copy=False)
            prior = prior @ modes.T
            prior += prior.T.copy()
            prior *= 0.5
        return cls(xp.maximum(values, 0.0), modes, prior, max(rounding * largest, -smallest))

    @property
    def n(self) -> int:
        """The number of training rows."""
        return int(self.modes.shape[0])

    @property
    def null(self) -> Array:
        """(n,) bool: directions in which the kernel, regularised, is zero to rounding."""
        return self.eigenvalues + self.reg <= self.noise

    def regularised(self, diag_reg: float, absolute: bool = True) -> GradientFlow:
        """The same flow with r = diag_reg, or (absolute=False) r = diag_reg·tr(Θ_DD)/n, which is neural-tangents' default."""
        if not (math.isfinite(diag_reg) and diag_reg >= 0):
            raise InputError(
                f"diag_reg is {diag_reg!r}; it is added to the diagonal of the kernel: give a number >= 0."
            )
        return replace(self, reg=diag_reg if absolute else diag_reg * float(self.eigenvalues.mean()))

    # --- through arrays as a user has them ------------------------------------------------------------------------

    def mean(self, theta_td: Array, y: Array, times: float | Sequence[float]) -> Array:
        """The mean Θ_TD A_t Y: theta_td (m, n), y (n, k) or (n,), times → (len(times), m, k) of theta_td's dtype.

        InputError when the prior is the kernel's own, a time is infinite, and a singular kernel contradicts the targets: then
        there is no posterior.
        """
        times, q = check_times(times), self.coefficients(y)
        self.require_consistent(q, times)
        z = self.project(self._whole(theta_td))
        return self.mean_of(z, q, times).astype(theta_td.dtype, copy=False)

    def variance(self, theta_td: Array, k_td: Array | None, k_tt: Array, times: float | Sequence[float]) -> Array:
        """The diagonal of the covariance: theta_td (m, n), k_td (m, n), k_tt (m,) → (len(times), m) of theta_td's dtype; at least 0.

        k_td: K_TD; None when theta_td is K_TD itself. Costs 2 m n² flops a time with a prior and 4 m n² for the projections.
        """
        z, w = self._projections(theta_td, k_td)
        pairs = [self.factors(z, w, t) for t in check_times(times)]
        return self.variance_of(pairs, k_tt).astype(theta_td.dtype, copy=False)

    def covariance(self, theta_td: Array, k_td: Array | None, k_tt: Array, times: float | Sequence[float]) -> Array:
        """The covariance: theta_td (m, n), k_td (m, n), k_tt (m, m) → (len(times), m, m), symmetric, of theta_td's dtype.

        k_td: as in `variance`.
        """
        z, w = self._projections(theta_td, k_td)
        pairs = [self.factors(z, w, t) for t in check_times(times)]
        xp = namespace(z)
        return xp.stack([covariance_block(k_tt, pair, pair) for pair in pairs]).astype(theta_td.dtype, copy=False)

    def _projections(self, theta_td: Array, k_td: Array | None) -> tuple[Array, Array]:
        if (k_td is None) != (self.prior is None):
            raise InputError(
                "k_td is the NNGP of test with training rows: give it exactly when k_dd was given to GradientFlow.factorise."
            )
        if k_td is not None and k_td.shape != theta_td.shape:
            raise InputError(f"theta_td has shape {theta_td.shape} and k_td {k_td.shape}; both are (m, n).")
        z = self.project(self._whole(theta_td))
        return z, z if k_td is None else self.project(k_td)

    def _whole(self, theta_td: Array) -> Array:
        if theta_td.ndim != 2 or theta_td.shape[1] != self.n:
            raise InputError(
                f"a test-train kernel has shape {theta_td.shape}; expected (m, {self.n}), a column per training row."
            )
        return theta_td

    # --- in the eigenbasis: what the tasks of a workflow call ----------------------------------------------------

    def project(self, block: Array, start: int = 0) -> Array:
        """The part of (m, n)·U that the kernel of m rows with training rows start … start + b gives, float64; add the parts up.

        block: (m, b).
        """
        block = require_float(block, "a kernel block")
        if block.ndim != 2 or start + block.shape[1] > self.n:
            raise InputError(
                f"a kernel block has shape {block.shape} from training row {start} on, but the flow has {self.n} training rows."
            )
        return block.astype(np.float64, copy=False) @ self.modes[:, start : start + block.shape[1]].T

    def coefficients(self, y: Array) -> Array:
        """UᵀY: (n,) or (n, k) → (n, k) float64; InputError for other numbers of rows and NaN."""
        y = y[:, None] if y.ndim == 1 else y
        if y.ndim != 2 or y.shape[0] != self.n:
            raise InputError(
                f"targets have shape {y.shape} and the kernel is of {self.n} training rows; give (n,) or (n, k)."
            )
        check_finite_rows(y, name="targets")
        return self.modes @ y.astype(np.float64, copy=False)

    def mean_of(self, z: Array, q: Array, times: Sequence[float]) -> Array:
        """Σᵢ zᵢ φ(λᵢ, t) qᵢ: projections z (m, n), coefficients q (n, k) → (len(times), m, k)."""
        z = self._audible(z)
        return namespace(z).stack([z @ (self._gain(t)[:, None] * q) for t in times])

    def factors(self, z: Array, w: Array, t: float) -> tuple[Array, Array]:
        """a, b (m, n) with covariance_t = K_TT − abᵀ − baᵀ, from z and w, the projections of Θ_TD and K_TD.

        With the prior P = UᵀKU: a = zφ, b = w − aP/2; without: a = wφ(·, 2t), b = w/2.
        """
        if self.prior is None:
            return self._audible(w) * self._gain(2 * t), 0.5 * w
        a = self._audible(z) * self._gain(t)
        b = a @ self.prior
        b *= -0.5
        b += w
        return a, b

    def training_mean(self, rows: slice, q: Array, times: Sequence[float]) -> Array:
        """The mean on training rows, without their numbers √r·b_i: (len(times), b, k); (I − e^{−Θt})Y where r = 0."""
        u = self.modes[:, rows].T
        return namespace(u).stack([u @ ((1.0 - self._rest(t))[:, None] * q) for t in times])

    def training_factors(self, rows: slice, t: float) -> tuple[Array, Array]:
        """a, b (b, n) with covariance_t = −abᵀ − baᵀ on training rows: e^{−Θt} K e^{−Θt} where r = 0, without cancellation."""
        u = self.modes[:, rows].T
        if self.prior is None:
            return -u, u * (0.5 * self.eigenvalues * self._rest(2 * t))
        e = u * self._rest(t)
        return -e, 0.5 * (e @ self.prior)

    @staticmethod
    def variance_of(pairs: Sequence[tuple[Array, Array]], k_tt: Array | float) -> Array:
        """k_tt − 2·Σ a∘b by row, from the factors of every time and the diagonal (m,) → (len(pairs), m).

        Rounding below 0 is set to 0.
        """
        xp = namespace(pairs[0][0])
        return xp.stack([xp.maximum(k_tt - 2.0 * xp.einsum("ij,ij->i", a, b), 0.0) for a, b in pairs])

    def unlearned(self, q: Array) -> float:
        """The share of ‖Y‖² in null directions, which training never reaches: above all contradictory targets of duplicate rows."""
        q, null = to_host(q), to_host(self.null)
        total = float((q**2).sum())
        return float((q[null] ** 2).sum()) / total if total > 0 else 0.0

    def require_consistent(self, q: Array, times: Sequence[float]) -> None:
        """InputError when a posterior at t = ∞ is asked for that a singular kernel and these targets rule out.

        That can only be where the prior is the kernel's own.
        """
        share = self.unlearned(q)
        if self.prior is not None or math.inf not in times or share <= INCONSISTENT:
            return
        null = self.null
        left = to_host(abs(self.modes[null].T @ q[null]).max(axis=1))
        raise InputError(
            f"the kernel of the training rows is singular to rounding ({int(null.sum())} of {self.n} eigenvalues are below "
            f"{self.noise:.2g}; the largest is {float(self.eigenvalues[-1]):.3g}) and {share:.2g} of the targets' squares lie outside "
            f"its span: no posterior without noise exists. Most affected: {name_rows(np.flatnonzero(left > 0.3 * left.max()))}; "
            f"look for duplicate rows with different targets. Give diag_reg >= {1e3 * self.noise or 1e-6:.1g}, or a finite time."
        )

    def _audible(self, z: Array) -> Array:
        """z with 0 in null directions where it does not rise above the noise, which φ = t would blow up."""
        null = namespace(z).flatnonzero(self.null)
        if not null.size:
            return z
        z = z.copy()
        quiet = z[:, null]
        quiet[abs(quiet) <= self.noise] = 0.0
        z[:, null] = quiet
        return z

    def _gain(self, t: float) -> Array:
        """φ(λ, t) = (1 − e^{−(λ+r)t})/(λ+r), t where λ + r = 0; 0 in null directions at t > 1/noise."""
        rate, moving = self._moving(t)
        safe = namespace(rate).where(rate > 0, rate, 1.0)
        gain = namespace(rate).where(rate > 0, -namespace(rate).expm1(-safe * t) / safe, t)
        return namespace(rate).where(moving, gain, 0.0)

    def _rest(self, t: float) -> Array:
        """1 − λφ(λ, t) = (r + λe^{−(λ+r)t})/(λ+r), without cancellation: what is left of a training residual."""
        rate, moving = self._moving(t)
        xp = namespace(rate)
        moving &= rate > 0
        safe = xp.where(moving, rate, 1.0)
        return xp.where(moving, (self.reg + self.eigenvalues * xp.exp(-safe * t)) / safe, 1.0)

    def _moving(self, t: float) -> tuple[Array, Array]:
        """(λ + r, whether the matrix determines how each direction moves until t)."""
        rate = self.eigenvalues + self.reg
        resolved = math.isfinite(t) and t * self.noise <= 1.0
        return rate, (rate > self.noise) | resolved

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, attributes) for the store; reg is left out, since one state serves every regularisation."""
        arrays = {"eigenvalues": to_host(self.eigenvalues), "modes": to_host(self.modes)}
        if self.prior is not None:
            arrays["prior"] = to_host(self.prior)
        return arrays, {"noise": self.noise}

    @classmethod
    def from_state(
        cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], device: bool = False
    ) -> GradientFlow:
        """The flow that `to_state` described, on this process's GPU when `device`."""
        values, modes = (to_device(arrays[name], device) for name in ("eigenvalues", "modes"))
        prior = to_device(arrays["prior"], device) if "prior" in arrays else None
        return cls(values, modes, prior, float(attributes["noise"]))


def covariance_block(base: Array | float, left: tuple[Array, Array], right: tuple[Array, Array]) -> Array:
    """base − a_i b_jᵀ − b_i a_jᵀ from the `factors` of two sets of rows; base: their kernel K, or 0 for training rows."""
    a, b = left
    product = a @ right[1].T
    product += b @ right[0].T if left is not right else product.T.copy()
    return base - product


def _square(matrix: Array, name: str) -> Array:
    matrix = require_float(matrix, name)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise InputError(f"{name} has shape {matrix.shape}; expected (n, n) with n >= 1 training rows.")
    check_finite_rows(matrix, name=name)
    return matrix


def _eigh(matrix: Array) -> tuple[Array, Array]:
    """Ascending eigenvalues, and the eigenvectors as C-ordered rows; `matrix`, float64, is destroyed."""
    xp = namespace(matrix)
    if xp is np:
        # LAPACK overwrites Fortran order: the transpose of a C-ordered matrix is that without a copy, its upper triangle our lower one
        turned = not matrix.flags.f_contiguous
        ordered = np.ascontiguousarray(matrix).T if turned else matrix
        values, vectors = lapack.eigh(ordered, lower=not turned)
        return values, np.ascontiguousarray(vectors.T)
    values, vectors = xp.linalg.eigh(matrix, UPLO="L")
    return values, xp.ascontiguousarray(vectors.T)
