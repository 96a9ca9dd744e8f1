"""The linearised network f_lin, trained to convergence: kernel regression with the network's own output f₀ as prior mean.

    eq. 5, full eNTK:   f_lin(x) = f₀(x) + Θ(x, D) (Θ(D, D) + αI)⁻¹ (Y − f₀(D)),   Θ(D, D) (n·O, n·O), rows in order i·O + o
    eq. 6, pseudo-NTK:  f_lin(x) = f₀(x) + Θ̂(x, D) (Θ̂(D, D) + αI)⁻¹ (Y − f₀(D)),  Θ̂(D, D) (n, n), every output alike

α = 0 in the paper. There is no intercept: the prior mean takes its place. Dense matrices, by the solvers of kernel ridge
(`dual_cholesky`, or `dual` for a singular matrix); stored ones: `workflows.empirical.linearized`. NumPy or CuPy.
Source: Mohamadi & Sutherland 2023, eqs. 5 and 6; MATH.md §5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, is_device_array, require_float, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.solvers.dual import DualEigh
from ntkdask.solvers.dual_cholesky import DualCholesky
from ntkdask.solvers.kernel_measures import stacked
from ntkdask.solvers.products import tile_product

SOLVERS = ("cholesky", "eigh")


@dataclass(frozen=True, eq=False)
class Linearized:
    """A fitted linearised network.

    coefficients: (n, O) float64 on the host, (Θ + αI)⁻¹(Y − f₀(D)). full: whether Θ is the full eNTK, whose blocks mix the
    outputs.
    """

    coefficients: np.ndarray
    alpha: float
    full: bool

    @classmethod
    def fit(
        cls, kernel: Array, residual: Array, alpha: float = 0.0, *, solver: str = "cholesky", overwrite: bool = False
    ) -> Linearized:
        """Fit the residuals Y − f₀(D), in float64.

        Parameters
        ----------
        kernel : array, float32 or float64
            Θ̂ (n, n), or Θ as (n, n, O, O) or (n·O, n·O).
        residual : array (n, O)
            Y − f₀(D).
        alpha : float
            α.
        solver : {"cholesky", "eigh"}
            "cholesky": n³/3 flops. "eigh": 9 n³; at α = 0 it takes the solution of minimum norm of a singular kernel where
            there is one.
        overwrite : bool
            Whether a float64 matrix may be destroyed.

        Raises
        ------
        InputError
            For other shapes, NaN, and kernels that are not positive definite at alpha: by how much, and what to use.
        """
        if solver not in SOLVERS:
            raise InputError(f"linearised prediction: solver is {solver!r}; use {' or '.join(map(repr, SOLVERS))}.")
        y = np.asarray(to_host(residual), np.float64)
        if y.ndim != 2:
            raise InputError(f"linearised prediction: residuals have shape {y.shape}; give (n, O).")
        kernel = require_float(kernel, "kernel")
        given = kernel.dtype
        if kernel.ndim == 4:
            kernel, overwrite = stacked(kernel), True
        full = is_full(kernel.shape, y.shape, square=True)
        right = y.reshape(-1, 1) if full else y
        if solver == "cholesky":
            solution = DualCholesky.factorise(
                kernel, right, alpha, fit_intercept=False, overwrite=overwrite, data_dtype=given
            ).solution()
        else:
            solution = DualEigh.factorise(
                kernel, right, fit_intercept=False, overwrite=overwrite, data_dtype=given
            ).solve(alpha)
        return cls(solution.coefficients.reshape(y.shape), alpha, full)

    def predict(self, rows: Array, prior: Array) -> np.ndarray:
        """f_lin (m, O) float64 on the host, for prior f₀(x) (m, O).

        rows: Θ̂(x, D) (m, n), or Θ(x, D) as (m, n, O, O) or (m·O, n·O).
        """
        prior = np.asarray(to_host(prior), np.float64)
        rows = require_float(rows, "rows")
        if rows.ndim == 4:
            rows = stacked(rows)
        n, outputs = self.coefficients.shape
        wanted = (len(prior) * outputs, n * outputs) if self.full else (len(prior), n)
        if prior.shape != (len(prior), outputs) or rows.shape != wanted:
            raise InputError(
                f"linearised prediction: the kernel with the training rows has shape {rows.shape}, expected {wanted} for prior "
                f"means of shape {prior.shape} and {n} training rows of {outputs} outputs."
            )
        coefficients = self.coefficients.reshape(-1, 1) if self.full else self.coefficients
        right = to_device(coefficients, is_device_array(rows))
        return prior + to_host(tile_product(rows, right)).reshape(prior.shape)


def is_full(shape: tuple[int, ...], residual: tuple[int, ...], *, square: bool = False) -> bool:
    """Whether a matrix beside residuals (n, O) is a full eNTK, by its columns; InputError when it is neither of the two.

    With one output the two are the same, and this is False. square: whether it must have as many rows.

    >>> is_full((6, 6), (3, 2)), is_full((3, 3), (3, 2))
    (True, False)
    """
    n, outputs = residual
    if len(shape) != 2 or shape[1] not in (n, n * outputs) or (square and shape[0] != shape[1]):
        raise InputError(
            f"linearised prediction: the kernel has shape {shape}; for {n} training rows of {outputs} outputs a pseudo-NTK has {n} "
            f"columns, a full empirical NTK {n * outputs}."
        )
    return shape[1] != n


def one_hot(labels: Array, n_classes: int) -> np.ndarray:
    """(n, n_classes) float64 of zeros and ones, the paper's targets; labels (n,) integers. InputError for labels out of range.

    >>> one_hot(np.array([1, 0]), 2)
    array([[0., 1.],
           [1., 0.]])
    """
    # the checks, and the messages, of zero-mean targets
    return (to_host(encode_targets(labels, n_classes, "float64")) > 0).astype(np.float64)


def safe_alpha(lowest: float, highest: float, eps: float) -> float:
    """0 for a kernel that is positive definite beyond rounding, else an α that makes it so: max(−2·λ_min, 10·ε·λ_max).

    lowest, highest: the ends of its spectrum. eps: rounding of the dtype in which its entries were computed. ε is that, and at
    least what a factorisation of some ten thousand rows in float64 loses (`cholesky.pivot_floor`).
    """
    rounding = max(eps, 1000 * float(np.finfo(np.float64).eps))
    return 0.0 if lowest > rounding * highest else max(-2.0 * lowest, 10 * rounding * highest)
