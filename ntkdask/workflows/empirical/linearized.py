"""What a network predicts that is linearised where it stands and trained to convergence, with the full eNTK or the pseudo-NTK.

    f₀(D), f₀(X)        ← the network's own outputs
    Θ(D, D), Θ(X, D)    ← kernels of the training rows, of test with training rows    (tiles on the cluster, where there is a url)
    β                   ← (Θ(D, D) + αI)⁻¹ (Y − f₀(D))                               (as kernel ridge solves it, out of core too)
    f_lin(X)            ← f₀(X) + Θ(X, D) β

`solvers/linearized.py` states eqs. 5 and 6 and their layouts. In a folder (url) every stage resumes: tiles and solutions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.arrays import as_array, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.execution.progress import Listener
from ntkdask.execution.site import Site
from ntkdask.matrices.operator import StoredKernel
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.modules.optional import require_torch
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.solvers.kernel_measures import accuracy
from ntkdask.solvers.linearized import Linearized
from ntkdask.workflows.empirical.linearized_solve import require_dense_fits, solve_linearized
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.sources import (
    as_source,
    encoded_targets,
    labels_of,
    located_rows,
    require_alike,
    targets_of,
    working_dtype,
)
from ntkdask.workflows.stream import FeatureStream

OUTPUT_ROWS = 1024
"""Rows whose outputs are computed at a time."""


@dataclass(frozen=True, eq=False)
class LinearizedPrediction:
    """What a linearised network predicts, and how it was solved.

    Parameters
    ----------
    predictions : array (m, O), float64
        f_lin(X).
    prior : array (m, O), float64
        f₀(X), what the network itself gives.
    alpha : float
        The ridge.
    full : bool
        Whether Θ is the full eNTK (eq. 5) or the pseudo-NTK (eq. 6).
    solver : str
        The solver that was used.
    accuracy : float or None
        Of the predictions; None without labels.
    prior_accuracy : float or None
        Of the prior.
    facts : dict
        How it was solved.
    """

    predictions: np.ndarray
    prior: np.ndarray
    alpha: float
    full: bool
    solver: str
    accuracy: float | None = None
    prior_accuracy: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """Says where conjugate gradients did not converge; "" where there is nothing to say."""
        return convergence_note(self.facts)


def predict_linearized(
    module: Any,
    x_train: Any,
    targets: Any = None,
    x_test: Any = None,
    *,
    kernel: Any = "pntk",
    alpha: float = 0.0,
    n_classes: int | None = None,
    test_targets: Any = None,
    solver: str = "auto",
    input_layout: str | None = "nchw",
    url: str | os.PathLike[str] | None = None,
    client: Any = None,
    plan: Plan | None = None,
    resources: Resources | None = None,
    listener: Listener | None = None,
) -> LinearizedPrediction:
    """f_lin on x_test of a network that is linearised at its weights and trained to convergence.

    Parameters
    ----------
    module : torch.nn.Module, or a description of one
        In eval mode.
    x_train : array (n, *s), dask array, Dataset or its url
        Training rows, cast as `kernel_matrix` casts them.
    targets : array (n,) or (n, O), or None
        Numbers, or labels 0..C−1 with `n_classes`. None takes the dataset's own.
    x_test : array (m, *s), dask array, Dataset, its url or None
        Rows to predict. None: the training rows.
    kernel : str or kernel
        "pntk" (eq. 6), "entk" (eq. 5, (n·O)² numbers), or a PseudoNTK or EmpiricalNTK of the module with arguments of its own,
        input_layout among them.
    alpha : float
        The ridge; 0 in the paper.
    n_classes : int or None
        C of the labels, which become zeros and ones as in the paper. None: targets are numbers.
    test_targets : array (m,), integers, or None
        Labels to score. None takes those of a dataset.
    solver : str
        "auto", "cholesky", "eigh" (which at alpha=0 takes the least solution of a singular kernel), and with a url also
        "tiled_cholesky" and "cg".
    input_layout : str or None
        "nchw": images are transposed from NHWC for the module; None passes them as they are.
    url : str, path or None
        A folder that keeps tiles and solutions, and resumes. None: everything is in this process, on its GPU where there is one.
    client : distributed.Client or None
        Whose workers compute kernels and solve; needs a url, which they share.
    plan : Plan or None
        As of `kernel_matrix`; its memory_bytes is also what a task of the solve may take.
    resources : Resources or None
        Of the solve. None: this process, or the client's workers.
    listener : Listener or None
        Hears of stages and tasks.

    Returns
    -------
    LinearizedPrediction
        Predictions (m, O), the network's own outputs, accuracies of both where there are labels.

    Raises
    ------
    MissingDependencyError
        Without torch.
    InputError
        For shapes that disagree, and for kernels that are singular or indefinite at alpha, saying which alpha would do.
    MemoryBudgetError
        When a tile, or the solve, does not fit a task.

    References
    ----------
    Mohamadi & Sutherland 2023, eqs. 5 and 6.
    """
    require_torch("predict_linearized")

    plan, site = plan or Plan(), Site.at(url, client, listener)
    # tasks elsewhere need a folder; without one everything stays here
    folder = site.folder if client is None else site.home
    train = as_source(x_train, "x_train")
    test = None if x_test is None else as_source(x_test, "x_test")
    require_alike(test, train)
    theta = _kernel(kernel, module, input_layout)
    input_layout = theta.input_layout
    y = targets_of(train, targets, n_classes, zero_mean=False)
    labels = labels_of(train if test is None else test, test_targets)
    dtype = working_dtype(plan, train)
    if folder is not None:
        resources = resources or site.resources()
        n, k = (y.size, 1) if _gives_blocks(theta) else y.shape
        require_dense_fits(n, k, solver, plan.memory_bytes or resources.memory_bytes)
    named = ((train, "x_train"), (test, "x_test"))
    streams = [_stream(source, folder, dtype, name) for source, name in named if source is not None]
    priors = [_outputs(module, stream, input_layout) for stream in streams]
    if folder is None:
        matrix, cross = _computed_matrices(theta, streams)
    else:
        matrix, cross = _stored_matrices(theta, streams, folder, plan, site)
    return predict_stored_linearized(
        matrix,
        cross,
        y,
        priors[0],
        priors[-1],
        alpha=alpha,
        test_targets=labels,
        solver=solver,
        url=folder,
        client=client,
        plan=plan,
        resources=resources,
        listener=listener,
    )


def _computed_matrices(theta: Any, streams: list[FeatureStream]) -> tuple[Any, Any]:
    """(Θ of the training rows, Θ of the test rows, where there are any, with them), in this process."""
    from ntkdask.modules.outputs import on_gpu

    rows = [to_device(stream.selected_rows(0, stream.n_selected), on_gpu()) for stream in streams]
    matrix = theta(rows[0])
    return matrix, matrix if len(rows) == 1 else theta(rows[1], rows[0])


def _stored_matrices(
    theta: Any, streams: list[FeatureStream], folder: Path, plan: Plan, site: Site
) -> tuple[Path, Path]:
    """The same in tiles under the folder: where they lie."""
    keywords: dict[str, Any] = {"client": site.client, "plan": plan, "listener": site.listener}
    rows = [_shared(stream) for stream in streams]
    kernel_matrix(theta, rows[0], url=folder / "train", **keywords)
    if len(rows) == 1:
        return folder / "train", folder / "train"
    kernel_matrix(theta, rows[1], rows[0], url=folder / "test", **keywords)
    return folder / "train", folder / "test"


def predict_stored_linearized(
    matrix: Any,
    cross: Any,
    targets: Any,
    prior: Any,
    prior_test: Any,
    *,
    alpha: float = 0.0,
    n_classes: int | None = None,
    test_targets: Any = None,
    solver: str = "auto",
    url: str | os.PathLike[str] | None = None,
    client: Any = None,
    plan: Plan | None = None,
    resources: Resources | None = None,
    listener: Listener | None = None,
) -> LinearizedPrediction:
    """`predict_linearized` from matrices that are there already: arrays, or urls of stored ones (`kernel_matrix`).

    Parameters
    ----------
    matrix : array or url
        Θ̂ (n, n), or Θ as (n, n, O, O) or (n·O, n·O). Without a url for the results a stored one is read whole into this process.
    cross : array or url
        The same kernel of test with training rows.
    targets : array (n,) or (n, O)
        Numbers, or labels 0..C−1 with `n_classes`.
    prior : array (n, O)
        f₀ of the training rows.
    prior_test : array (m, O)
        f₀ of the test rows.
    alpha, n_classes, test_targets, solver, url, client, plan, resources, listener
        As of `predict_linearized`; of the plan memory_bytes alone has an effect.

    Returns
    -------
    LinearizedPrediction
        As of `predict_linearized`.

    Raises
    ------
    InputError
        As `predict_linearized`.
    MemoryBudgetError
        Before anything runs, when no solver fits a task.
    """
    f0, f0_test = (np.asarray(to_host(as_array(p)), np.float64) for p in (prior, prior_test))
    y = encoded_targets(targets, n_classes, zero_mean=False)
    if f0.ndim != 2 or y.shape != f0.shape:
        raise InputError(
            f"predict_linearized: targets have shape {y.shape} and the network's outputs {f0.shape}; they must agree. Give labels "
            "with n_classes, or a column for each output."
        )
    check_finite_rows(f0, name="the network's outputs")
    labels = labels_of(None, test_targets)
    if labels is not None and labels.shape != (len(f0_test),):
        raise InputError(
            f"test_targets have shape {labels.shape}; give labels ({len(f0_test)},), one for each test row."
        )
    site = Site.at(url, client, listener)
    # tasks elsewhere need a folder; without one everything stays here
    folder = site.folder if client is None else site.home
    is_stored = isinstance(matrix, (str, os.PathLike))
    if is_stored and folder is not None:
        opened = StoredMatrix.open(matrix)
        fit, name, facts = solve_linearized(opened, y - f0, alpha, solver, site, plan or Plan(), resources)
    else:
        array = StoredMatrix.open(matrix).read() if is_stored else as_array(matrix)
        name = "cholesky" if solver == "auto" else solver
        fit, facts = Linearized.fit(array, y - f0, alpha, solver=name, overwrite=is_stored), {}
    predicted = _predict(fit, cross, f0_test, client)
    own, before = (None if labels is None else accuracy(f, labels) for f in (predicted, f0_test))
    return LinearizedPrediction(predicted, f0_test, alpha, fit.full, name, own, before, facts)


def _kernel(kernel: Any, module: Any, layout: str | None) -> Any:
    """The kernel that was asked for by name, or the one that was given; InputError where it is of another module."""
    from ntkdask.kernels.empirical import EmpiricalNTK, PseudoNTK

    if kernel == "pntk":
        return PseudoNTK(module, input_layout=layout)
    if kernel == "entk":
        return EmpiricalNTK(module, input_layout=layout, output="full")
    if isinstance(kernel, PseudoNTK) or (isinstance(kernel, EmpiricalNTK) and kernel.output == "full"):
        if kernel.module is not module and kernel.module != module:
            raise InputError(
                f"predict_linearized: the {type(kernel).__name__} is of another module than the one whose outputs are linearised. "
                "Make it of the same object, or of an equal description."
            )
        return kernel
    raise InputError(
        f'predict_linearized: kernel is {kernel!r}; use "pntk", "entk", a PseudoNTK, or an EmpiricalNTK with output="full".'
    )


def _gives_blocks(kernel: Any) -> bool:
    """Whether the kernel is a full eNTK, which has O rows for each row of its inputs."""
    from ntkdask.kernels.empirical import EmpiricalNTK

    return isinstance(kernel, EmpiricalNTK)


def _stream(source: Any, folder: Path | None, dtype: str, name: str) -> FeatureStream:
    """Rows as the kernel takes them, read by this process: `kernel_matrix` brings them to the workers itself."""
    rows, _ = located_rows(source, None if folder is None else folder / "inputs", False, name)
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    return FeatureStream(rows, fitted, None, None, OUTPUT_ROWS)


def _shared(stream: FeatureStream) -> Any:
    """The rows as `kernel_matrix` is given them: the array, or the url of the dataset."""
    rows: Any = stream.rows
    return rows.x if hasattr(rows, "x") else rows.url


def _outputs(module: Any, stream: FeatureStream, layout: str | None) -> np.ndarray:
    """f₀ (n, O) float64 on the host."""
    from ntkdask.modules.outputs import on_gpu, outputs

    n, device = stream.n_selected, on_gpu()
    starts = range(0, n, OUTPUT_ROWS)
    rows = (to_device(stream.selected_rows(s, min(s + OUTPUT_ROWS, n)), device) for s in starts)
    parts = [outputs(module, x, layout) for x in rows]
    return np.concatenate([to_host(p) for p in parts]).astype(np.float64)


def _predict(fit: Linearized, cross: Any, prior: np.ndarray, client: Any) -> np.ndarray:
    """f₀(X) + Θ(X, D) β, (m, O), with an array or a stored matrix of test with training rows."""
    if not isinstance(cross, (str, os.PathLike)):
        return fit.predict(as_array(cross), prior)
    operator = StoredKernel(cross, client)
    coefficients = fit.coefficients.reshape(-1, 1) if fit.full else fit.coefficients
    expected = (prior.size if fit.full else len(prior), len(coefficients))
    if tuple(operator.shape) != expected:
        raise InputError(
            f"the kernel of test with training rows, {cross}, has shape {operator.shape}; expected {expected}."
        )
    return prior + (operator @ coefficients).reshape(prior.shape)
