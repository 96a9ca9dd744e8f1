"""The spectrum of a stored symmetric matrix: its ends, its largest eigenvalues, its trace, its statistical dimensions.

Exact by LAPACK, as one task, where the matrix fits one memory; else from products with the operator over its tiles: the
largest eigenvalues by implicitly restarted Lanczos (ARPACK), the smallest by LOBPCG, whose last iterate is returned with its
residual whether it converged or not, statistical dimensions by stochastic Lanczos quadrature. The iterations run here, the
products on the workers.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ntkdask import lapack, seeds, threads
from ntkdask.arrays import FLOAT_DTYPES, as_array, is_dask, to_host
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.site import Site
from ntkdask.matrices.operator import StoredKernel
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.resources import BASE_BYTES, Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.solvers.traces import statistical_dimensions
from ntkdask.wording import format_bytes

DENSE_ROWS = 8192
"""Rows up to which `method="auto"` decomposes without being told of a memory budget: 512 MiB, half a minute on two cores."""

SKEW = 1e-5
"""Difference of mirrored entries, relative to the largest entry, that may be rounding of float32 products."""

METHODS = ("auto", "dense", "lanczos")


@dataclass(frozen=True)
class StatisticalDimension:
    """s(alpha) = tr K(K + alpha)⁻¹ and the standard error of its estimate, 0 when it is exact."""

    alpha: float
    value: float
    standard_error: float


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` found of a symmetric (n, n) matrix.

    Parameters
    ----------
    n : int
        Rows of the matrix.
    method : str
        "dense" or "lanczos".
    eigenvalues : tuple of float
        The k largest, descending.
    residuals : tuple of float
        ‖K v − λ v‖ of each of them; 0 when exact.
    lambda_max, lambda_min : float
        The ends of the spectrum. The smallest eigenvalue is not above lambda_min.
    lambda_min_residual : float
        An eigenvalue lies within this of lambda_min.
    lambda_min_converged : bool
        Whether that residual is at most tolerance·lambda_max.
    condition : float
        lambda_max / lambda_min; infinite where lambda_min is not above rounding, and a lower bound where it did not converge.
    trace : float
        Sum of the diagonal.
    statistical_dimension : tuple of StatisticalDimension
        One for each alpha that was asked for.
    products : int
        With how many vectors the matrix was multiplied.
    seconds : float
        What all took.
    """

    n: int
    method: str
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    lambda_max: float
    lambda_min: float
    lambda_min_residual: float
    lambda_min_converged: bool
    condition: float
    trace: float
    statistical_dimension: tuple[StatisticalDimension, ...]
    products: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As a table; an infinite condition number is None, since JSON has no infinity."""
        return {**asdict(self), "condition": self.condition if math.isfinite(self.condition) else None}


def spectrum(
    matrix: Any,
    k: int = 20,
    *,
    statistical_dimension: Sequence[float] = (),
    method: str = "auto",
    client: Any = None,
    plan: Plan | None = None,
    cache_bytes: int = 0,
    tolerance: float = 1e-6,
    max_products: int = 500,
    n_probes: int = 16,
    n_steps: int = 50,
    seed: int = 0,
    threads: int | None = None,
    listener: Listener | None = None,
) -> Spectrum:
    """Eigenvalues, trace and statistical dimensions of a symmetric matrix.

    Parameters
    ----------
    matrix : url of a stored matrix, array (n, n) or dask array
        Symmetric and finite, float32 or float64. Arrays are decomposed in this process.
    k : int
        How many of the largest eigenvalues.
    statistical_dimension : sequence of float
        Alphas > 0 whose tr K(K + alpha)⁻¹ is wanted.
    method : str
        "dense" decomposes (n² float64 in one process); "lanczos" multiplies, for stored matrices alone. "auto" decomposes when that
        fits plan.memory_bytes, or else the smallest worker's share; where neither is known, up to 8 192 rows.
    client : distributed.Client or None
        The decomposition is one task there, products are one task a panel; None: in this process.
    plan : Plan or None
        Its memory_bytes bound the decomposition.
    cache_bytes : int
        What each worker may keep of the matrix between products.
    tolerance : float
        Of eigenvalues, relative to lambda_max.
    max_products : int
        Of the search for the smallest eigenvalue.
    n_probes, n_steps, seed : int
        Probes, Lanczos steps and seed of the stochastic quadrature.
    threads : int or None
        Of each task; None leaves them.
    listener : Listener or None
        Hears of the decomposition.

    Returns
    -------
    Spectrum

    Raises
    ------
    InputError
        For what is not symmetric or not finite, and for parameters out of range.
    MemoryBudgetError
        With the numbers, before anything runs: for a decomposition that was asked for and does not fit, and for products that do
        not fit the smallest worker's share.

    References
    ----------
    Lehoucq, Sorensen & Yang 1998 (ARPACK); Knyazev 2001 (LOBPCG); Ubaru, Chen & Saad 2017 (quadrature).

    Examples
    --------
    >>> found = spectrum(np.diag([1.0, 2.0, 4.0]), statistical_dimension=[2.0])
    >>> found.eigenvalues, found.condition, round(found.statistical_dimension[0].value, 3)
    ((4.0, 2.0, 1.0), 4.0, 1.5)
    """
    started = time.perf_counter()
    alphas = [float(a) for a in statistical_dimension]
    _check(k, alphas, method, tolerance, max_products)
    operand, site = _operand(matrix), Site(client=client, listener=listener or Silent(), threads=threads)
    n, stored = operand.shape[0], isinstance(operand, StoredMatrix)
    budget = plan.memory_bytes if plan is not None else None
    offered = site.resources() if stored and budget is None else Resources()
    if _is_dense(operand, method, budget or offered.memory_bytes):
        found = _from_eigenvalues(_eigenvalues(operand, site), k, alphas)
    else:
        stored_kernel = StoredKernel.at(site, operand.url, cache_bytes=cache_bytes)
        _require_products(stored_kernel, max(k, n_probes if alphas else 1), cache_bytes, offered)
        operator = _Counted(stored_kernel)
        found = _from_products(operator, min(k, n - 2), tolerance, max_products, seed)
        if alphas:
            values, errors = statistical_dimensions(operator, alphas, n_probes, n_steps, seed)
            found["statistical_dimension"] = tuple(map(StatisticalDimension, alphas, values.tolist(), errors.tolist()))
        found["products"] = operator.products
    floor = found["lambda_max"] * n * np.finfo(float).eps
    condition = found["lambda_max"] / found["lambda_min"] if found["lambda_min"] > floor else math.inf
    return Spectrum(n=n, condition=condition, seconds=time.perf_counter() - started, **found)


def _check(k: int, alphas: list[float], method: str, tolerance: float, max_products: int) -> None:
    if method not in METHODS:
        raise InputError(f"spectrum: method is {method!r}; use one of {', '.join(METHODS)}.")
    if k < 1 or max_products < 1 or not 0 < tolerance < 1:
        raise InputError(
            f"spectrum: k={k}, max_products={max_products} and tolerance={tolerance:g}; use at least 1, 1, and 0 < tolerance < 1."
        )
    bad = [a for a in alphas if not 0 < a < math.inf]
    if bad:
        raise InputError(
            f"spectrum: the statistical dimension is asked for alpha={bad[0]:g}; it needs 0 < alpha < inf."
        )


def _operand(matrix: Any) -> Any:
    """A StoredMatrix, or a symmetric float32 or float64 array in memory."""
    if isinstance(matrix, (str, os.PathLike)):
        stored = StoredMatrix.open(matrix)
        if not stored.is_symmetric:
            raise InputError(
                f"{stored.url} is {stored.shape} and not stored as symmetric; the spectrum is for kernel_matrix(kernel, x)."
            )
        return stored
    array = to_host(as_array(matrix.compute() if is_dask(matrix) else matrix))
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not len(array):
        raise InputError(f"spectrum: the matrix has shape {array.shape}; give a symmetric one, (n, n) with n >= 1.")
    if array.dtype.name not in FLOAT_DTYPES:
        raise InputError(f"spectrum: the matrix has dtype {array.dtype}; give float32 or float64.")
    check_finite_rows(array, name="the matrix")
    skew = float(np.abs(array - array.T).max())
    if skew > SKEW * float(np.abs(array).max()):
        raise InputError(f"spectrum: the matrix is not symmetric: two mirrored entries differ by {skew:g}.")
    return array


def _is_dense(operand: Any, method: str, budget: int | None) -> bool:
    """Whether to decompose; MemoryBudgetError when that is asked for, or the only way, and does not fit `budget` bytes."""
    n, stored = operand.shape[0], isinstance(operand, StoredMatrix)
    needed = BASE_BYTES + 8 * n * n + 2**28  # LAPACK's blocks, tiles on their way
    if budget is not None and needed > budget and (method == "dense" or not stored):
        advice = (
            'Use method="lanczos",'
            if stored
            else 'Store the matrix (kernel_matrix with a url) and use method="lanczos",'
        )
        raise MemoryBudgetError(
            f"the decomposition of a {n} x {n} matrix needs {format_bytes(needed)} (the process itself {format_bytes(BASE_BYTES)}) "
            f"but a task has {format_bytes(budget)}. {advice} or give the task more memory."
        )
    if not stored and method == "lanczos":
        raise InputError('spectrum: method="lanczos" is for stored matrices. Give the url of one, or method="dense".')
    if method != "auto" or not stored:
        return method != "lanczos"
    return n <= DENSE_ROWS if budget is None else needed <= budget


def _require_products(operator: StoredKernel, columns: int, cache_bytes: int, offered: Resources) -> None:
    """MemoryBudgetError when a product with so many vectors does not fit the smallest worker's share, if it is known."""
    share = offered.memory_bytes
    if share is None:
        return
    needed = BASE_BYTES + cache_bytes + operator.task_bytes(columns, operator.threads or offered.threads)
    if needed > share:
        rows, width = operator.matrix.tile_shape
        raise MemoryBudgetError(
            f"spectrum: kernel-product needs {format_bytes(needed)} (the process itself {format_bytes(BASE_BYTES)}, cache "
            f"{format_bytes(cache_bytes)}, tiles of {rows} x {width}, {columns} vectors) but a worker has {format_bytes(share)}. Use "
            "a smaller cache_bytes, k or n_probes, store the matrix in smaller tiles (Plan.tile_rows), or give workers more memory."
        )


@dataclass(frozen=True)
class _EigenvaluesTask:
    """All eigenvalues of a stored matrix, ascending, float64, in its own memory."""

    def __call__(self, matrix: StoredMatrix) -> np.ndarray:
        return lapack.eigvalsh(matrix.read("float64"))


def _eigenvalues(operand: Any, site: Site) -> np.ndarray:
    """All eigenvalues, ascending, float64: of a stored matrix as a task, of an array in this process."""
    if isinstance(operand, StoredMatrix):
        return site.alone(_EigenvaluesTask(), "spectrum", operand)
    with threads.limited(site.threads or threads.ambient()):
        return lapack.eigvalsh(operand.astype(np.float64, order="F"))


def _from_eigenvalues(values: np.ndarray, k: int, alphas: list[float]) -> dict[str, Any]:
    positive = np.maximum(values, 0.0)
    top = tuple(float(v) for v in values[::-1][:k])
    return {
        "method": "dense",
        "eigenvalues": top,
        "residuals": (0.0,) * len(top),
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        "lambda_min_residual": 0.0,
        "lambda_min_converged": True,
        "trace": float(values.sum()),
        "statistical_dimension": tuple(
            StatisticalDimension(a, float((positive / (positive + a)).sum()), 0.0) for a in alphas
        ),
        "products": 0,
    }


class _Counted:
    """An operator that counts the vectors with which it was multiplied."""

    def __init__(self, operator: StoredKernel) -> None:
        self.operator, self.shape, self.products = operator, operator.shape, 0

    def __matmul__(self, v: np.ndarray) -> np.ndarray:
        self.products += 1 if v.ndim == 1 else v.shape[1]
        return self.operator @ v

    def to_scipy(self) -> Any:
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(self.shape, dtype=np.dtype(np.float64), matvec=self.__matmul__, matmat=self.__matmul__)


def _from_products(operator: _Counted, k: int, tolerance: float, max_products: int, seed: int) -> dict[str, Any]:
    """The ends of the spectrum and the trace; InputError when the matrix is too small for iterations."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    n = operator.shape[0]
    if n < 8:
        raise InputError(f'spectrum: the matrix has {n} rows; method="lanczos" needs at least 8. Use method="dense".')
    start = seeds.normals(seed, ("spectrum", "start"), n, 2)
    try:
        values, vectors = eigsh(operator.to_scipy(), k=k, which="LA", tol=tolerance, v0=start[:, 0])
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
        if not len(values):
            raise InputError(
                f"spectrum: none of the {k} largest eigenvalues converged to {tolerance:g}. Ask for fewer or a larger tolerance."
            ) from error
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    residuals = np.linalg.norm(operator @ vectors - vectors * values, axis=0)
    lowest, residual = _smallest(operator, start[:, 1:], tolerance * values[0], max_products)
    return {
        "method": "lanczos",
        "eigenvalues": tuple(values.tolist()),
        "residuals": tuple(residuals.tolist()),
        "lambda_max": float(values[0]),
        "lambda_min": lowest,
        "lambda_min_residual": residual,
        "lambda_min_converged": residual <= tolerance * values[0],
        "trace": operator.operator.trace(),
        "statistical_dimension": (),
    }


def _smallest(operator: _Counted, start: np.ndarray, tolerance: float, max_products: int) -> tuple[float, float]:
    """(Rayleigh quotient, its residual) of LOBPCG's last vector for the smallest eigenvalue, converged or not."""
    from scipy.sparse.linalg import lobpcg

    with warnings.catch_warnings():
        # that it did not converge is said by the residual
        warnings.simplefilter("ignore", UserWarning)
        _, vectors = lobpcg(operator.to_scipy(), start, largest=False, tol=tolerance, maxiter=max_products)
    vector = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
    image = operator @ vector
    quotient = float(vector @ image)
    return quotient, float(np.linalg.norm(image - quotient * vector))
