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

from ntkdask import registry
from ntkdask.arrays import as_array, host_cores, is_dask, to_device, to_host
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import Rows
from ntkdask.errors import InputError
from ntkdask.execution.progress import Listener, Record, Silent
from ntkdask.execution.site import Site
from ntkdask.files import local_path
from ntkdask.matrices.operator import StoredKernel
from ntkdask.matrices.stored import PANEL_BYTES, StoredMatrix
from ntkdask.modules.optional import require_torch
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.solvers.kernel_measures import accuracy
from ntkdask.solvers.linearized import Linearized, is_full, one_hot
from ntkdask.solvers.preconditioners import rank_for_bytes
from ntkdask.states import content_digest, load_state, save_state
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.kernel_ridge.choose import Sizes, candidates, choose_solver
from ntkdask.workflows.kernel_ridge.gather import Gathered
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.path import convergence_note
from ntkdask.workflows.kernel_ridge.plan import MAX_RANK, RANK_BYTES, RANK_SHARE, SHARE_CACHED, KernelRidgePlan
from ntkdask.workflows.kernel_ridge.solve import solve_stored
from ntkdask.workflows.sources import as_source, row_shape_of, rows_of
from ntkdask.workflows.stream import FeatureStream

KERNELS = ("pntk", "entk")
OUTPUT_ROWS = 1024
"""Rows whose outputs are computed at a time."""


@dataclass(frozen=True, eq=False)
class LinearizedPrediction:
    """predictions (m, O) = f_lin(X) and prior (m, O) = f₀(X), float64; accuracy and prior_accuracy of the two, None without labels.

    full: whether Θ is the full eNTK (eq. 5) or the pseudo-NTK (eq. 6). facts: how it was solved; `note` of a solve that stopped short.
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
        """What to know of conjugate gradients that did not converge; "" for nothing."""
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
    """f_lin on x_test of `module` (a torch.nn.Module in eval mode, or a description of one), linearised at its weights.

    x_train, x_test: arrays (n, *s), dask arrays, datasets or their urls, cast as `kernel_matrix` casts them; x_test=None is x_train.
    targets: numbers (n, O), or labels 0..C−1 with n_classes=C, which become zeros and ones as in the paper; None takes the dataset's.
    test_targets: labels (m,) to score; None takes those of a dataset. kernel: "pntk" (eq. 6), "entk" (eq. 5, (n·O)² numbers), or a
    PseudoNTK or EmpiricalNTK of the module with arguments of its own, input_layout among them. alpha: 0 in the paper. solver: "auto",
    "cholesky", "eigh" (which at alpha=0 takes the least solution of a singular kernel), and with a url "tiled_cholesky" and "cg".

    url: a folder that keeps tiles and solutions, and resumes; without, everything is in this process, on its GPU where there is
    one. client: a Dask client (needs a url). plan: as of `kernel_matrix`; its memory_bytes is also what a task of the solve may take.
    resources: of the solve; None: this process, or the client's workers.
    Raises InputError for shapes that disagree and for kernels that are singular or indefinite at alpha, saying which alpha would do.
    Source: Mohamadi & Sutherland 2023, eqs. 5 and 6.
    """
    require_torch("predict_linearized")
    from ntkdask.modules.outputs import on_gpu

    plan, folder = plan or Plan(), _folder(url, client)
    train = as_source(x_train, "x_train")
    test = None if x_test is None else as_source(x_test, "x_test")
    if test is not None and row_shape_of(test) != row_shape_of(train):
        raise InputError(
            f"x_test has rows of shape {row_shape_of(test)} and x_train of {row_shape_of(train)}; they must agree."
        )
    theta = _kernel(kernel, module, input_layout)
    input_layout = theta.input_layout
    y = _encoded(train, targets, n_classes)
    scored = test if x_test is not None else train
    labels = _labels(scored, test_targets)
    dtype = plan.dtype or ("float64" if train.dtype == np.float64 else "float32")
    streams = [_stream(s, folder, dtype, n) for s, n in ((train, "x_train"), (test, "x_test")) if s is not None]
    priors = [_outputs(module, stream, input_layout) for stream in streams]
    if folder is None:
        rows = [to_device(stream.selected_rows(0, stream.n_selected), on_gpu()) for stream in streams]
        matrix = theta(rows[0])
        cross = matrix if test is None else theta(rows[1], rows[0])
    else:
        keywords = {"client": client, "plan": plan, "listener": listener}
        kernel_matrix(theta, _shared(streams[0]), url=folder / "train", **keywords)
        matrix = cross = folder / "train"
        if test is not None:
            kernel_matrix(theta, _shared(streams[1]), _shared(streams[0]), url=folder / "test", **keywords)
            cross = folder / "test"
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

    matrix: Θ̂ (n, n), or Θ as (n, n, O, O) or (n·O, n·O); cross: the same of test with training rows. prior (n, O), prior_test (m, O):
    f₀ of training and test rows. Other arguments as there; without a url a stored matrix is read whole into this process.
    """
    f0, f0_test = (np.asarray(to_host(as_array(p)), np.float64) for p in (prior, prior_test))
    y = _numbers(targets, n_classes)
    if f0.ndim != 2 or y.shape != f0.shape:
        raise InputError(
            f"predict_linearized: targets have shape {y.shape} and the network's outputs {f0.shape}; they must agree. Give labels "
            "with n_classes, or a column for each output."
        )
    check_finite_rows(f0, name="the network's outputs")
    labels = _labels(None, test_targets)
    if labels is not None and labels.shape != (len(f0_test),):
        raise InputError(
            f"test_targets have shape {labels.shape}; give labels ({len(f0_test)},), one for each test row."
        )
    folder = _folder(url, client)
    stored = isinstance(matrix, (str, os.PathLike))
    if stored and folder is not None:
        opened = StoredMatrix.open(matrix)
        fit, name, facts = _solve_stored(
            opened, y - f0, alpha, solver, folder, client, plan or Plan(), resources, listener or Silent()
        )
    else:
        array = StoredMatrix.open(matrix).read() if stored else as_array(matrix)
        name = "cholesky" if solver == "auto" else solver
        fit, facts = Linearized.fit(array, y - f0, alpha, solver=name, overwrite=stored), {}
    predicted = _predict(fit, cross, f0_test, client)
    own, before = (None if labels is None else accuracy(f, labels) for f in (predicted, f0_test))
    return LinearizedPrediction(predicted, f0_test, alpha, fit.full, name, own, before, facts)


def _kernel(kernel: Any, module: Any, layout: str | None) -> Any:
    """The kernel that was asked for, by name or itself."""
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


def _folder(url: str | os.PathLike[str] | None, client: Any) -> Path | None:
    if url is None and client is not None:
        raise InputError("predictions on a cluster go through a folder that its workers share: give a url.")
    return None if url is None else local_path(url)


def _encoded(source: Any, targets: Any, n_classes: int | None) -> np.ndarray:
    """(n, O) of what the caller gave, or of the dataset."""
    n = source.n if isinstance(source, Dataset) else int(source.shape[0])
    if targets is None:
        if not isinstance(source, Dataset) or source.kind == "unlabelled":
            raise InputError("there are no targets: give them, or a dataset that holds some as x_train.")
        targets = source.targets(0, n)
        n_classes = n_classes or (len(source.class_names or ()) if source.kind == "classification" else None)
    y = _numbers(targets, n_classes)
    if len(y) != n:
        raise InputError(f"x_train has {n} rows and there are {len(y)} targets; give one for each row.")
    return y


def _numbers(targets: Any, n_classes: int | None) -> np.ndarray:
    """(n, O) float64 targets: labels as zeros and ones, numbers as they are."""
    y = to_host(as_array(targets.compute() if is_dask(targets) else targets))
    if n_classes is not None:
        return one_hot(y, n_classes)
    if y.ndim not in (1, 2) or not len(y) or y.dtype.kind not in "buif":
        raise InputError(
            f"targets have shape {y.shape} and dtype {y.dtype}; give numbers (n,) or (n, O), or labels with n_classes."
        )
    y = np.ascontiguousarray(y.reshape(len(y), -1), np.float64)
    check_finite_rows(y, name="targets")
    return y


def _labels(source: Any, targets: Any) -> np.ndarray | None:
    """Labels to score: those that were given, or a labelled dataset's."""
    if targets is None and isinstance(source, Dataset) and source.kind == "classification":
        targets = source.targets(0, source.n)
    return None if targets is None else np.asarray(to_host(as_array(targets)))


def _stream(source: Any, folder: Path | None, dtype: str, name: str) -> FeatureStream:
    """Rows as the kernel takes them, from where they can be read; a dask array without a folder is computed into memory."""
    if is_dask(source) and folder is None:
        source = source.compute()
    if not is_dask(source) and not isinstance(source, Dataset):
        check_finite_rows(source, name=name)
    rows: Rows = rows_of(source, Path() if folder is None else folder / "inputs", False, name)[0]
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, dtype)
    return FeatureStream(rows, fitted, None, None, OUTPUT_ROWS)


def _shared(stream: FeatureStream) -> Any:
    """What `kernel_matrix` is given: the array, or the url of the dataset."""
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


def _solve_stored(
    matrix: StoredMatrix,
    residual: np.ndarray,
    alpha: float,
    solver: str,
    folder: Path,
    client: Any,
    plan: Plan,
    resources: Resources | None,
    listener: Listener,
) -> tuple[Linearized, str, dict[str, Any]]:
    """(fit, solver, facts) on tiles; what was solved before is read."""
    full = is_full(matrix.shape, residual.shape, square=True)
    right = residual.reshape(-1, 1) if full else residual
    options = KernelRidgeOptions((alpha,), fit_intercept=False, solver=solver)
    sizes = _plan(matrix, right.shape[1], options, plan, resources or _found(client))
    labels = save_state(folder / "state", {"targets": right}, {"bounds": [0, len(right)]})
    record = Record.open(folder / "linearized", {"matrix": matrix.token})
    name = f"{registry.digest([content_digest(right), solver, alpha])} "

    def solve() -> dict[str, Any]:
        site = Site(folder, client, listener, record, name, sizes.threads)
        fit = solve_stored(Path(matrix.url), Gathered("", labels), options, sizes, site)
        kept = save_state(folder / "state", {"coefficients": fit.solution.coefficients})
        return {"coefficients": kept, "solver": sizes.solver, "facts": {"solver_reason": sizes.reason, **fit.facts}}

    found = record.once(f"{name}solution", solve)
    coefficients = load_state(found["coefficients"])[0]["coefficients"].reshape(residual.shape)
    return Linearized(coefficients, alpha, full), found["solver"], found["facts"]


def _plan(
    matrix: StoredMatrix, k: int, options: KernelRidgeOptions, plan: Plan, resources: Resources
) -> KernelRidgePlan:
    """The solver that fits, as `plan_kernel_ridge` chooses it, for a matrix that is there."""
    n, tile, itemsize = matrix.shape[0], matrix.tile_shape[0], matrix.dtype.itemsize
    limit = plan.memory_bytes or resources.memory_bytes
    resources = Resources(limit, 0, resources.threads, resources.solve_threads, resources.slots)
    found = candidates(options, Sizes(n, k, itemsize, tile, 1), resources, stored=matrix.is_symmetric)
    best, reason = choose_solver(found, limit, n)
    cache = 0
    if best.solver == "cg":
        whole = -(-n * n * itemsize // PANEL_BYTES) * PANEL_BYTES
        cache = whole if limit is None else min(whole, max(0, int(SHARE_CACHED * (limit - best.bytes))))
    return KernelRidgePlan(
        dtype=matrix.dtype.name,
        slab_rows=tile,
        batch_rows=tile,
        tile_rows=tile,
        threads=resources.threads,
        solve_threads=resources.solve_threads,
        device=False,
        matrix_tile=tile,
        solver=best.solver,
        reason=reason,
        rank=max(1, rank_for_bytes(n, RANK_BYTES, min(MAX_RANK, n // RANK_SHARE))),
        cache_bytes=cache,
        memory_bytes=limit,
    )


def _found(client: Any) -> Resources:
    """What the solve may count on when the caller does not say."""
    if client is None:
        return Resources.here()
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [w["memory_limit"] // w["nthreads"] for w in workers if w["memory_limit"]]
    cores, slots = min(client.run(host_cores).values()), sum(client.nthreads().values())
    return Resources(min(limits, default=None), 0, max(1, cores // slots), cores, slots)


def _predict(fit: Linearized, cross: Any, prior: np.ndarray, client: Any) -> np.ndarray:
    if not isinstance(cross, (str, os.PathLike)):
        return fit.predict(as_array(cross), prior)
    operator = StoredKernel(cross, client)
    coefficients = fit.coefficients.reshape(-1, 1) if fit.full else fit.coefficients
    wanted = (prior.size if fit.full else len(prior), len(coefficients))
    if tuple(operator.shape) != wanted:
        raise InputError(
            f"the kernel of test with training rows, {cross}, has shape {operator.shape}; expected {wanted}."
        )
    return prior + (operator @ coefficients).reshape(prior.shape)
