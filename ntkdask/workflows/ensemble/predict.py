"""What an infinitely wide network predicts: mean and uncertainty of an ensemble at any training time, and the NNGP posterior.

    Θ_DD, K_DD  ← kernels of the training rows             (tiles on the cluster, where there is a url)
    UΛUᵀ, UᵀK_DD U, UᵀY                                     (one task; stored, reused for other times, ridges and test rows)
    for every tile of test rows (a task):  z, w ← Θ_TD U, K_TD U, evaluated where they are used, never stored
                                           mean, variance at every time from z, w
    for every pair of tiles (a task), if asked:  a block of the covariance

`solvers/gradient_flow.py` states the formulas and the convention; this is neural-tangents' `gradient_descent_mse_ensemble` out of
core. In a folder (url) every stage resumes: kernel tiles, the decomposition, tiles of predictions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.datasets.rows import DatasetRows, Rows
from ntkdask.errors import InputError
from ntkdask.execution.progress import Listener
from ntkdask.execution.site import Site
from ntkdask.kernels import NNGP, NTK, both
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.networks import Network
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.solvers.gradient_flow import check_times
from ntkdask.workflows.ensemble.kernels import ComputedKernels, EnsembleMatrices, Kernels, StoredKernels, open_matrices
from ntkdask.workflows.ensemble.plan import EnsemblePlan, Training, plan_ensemble
from ntkdask.workflows.ensemble.run import EnsemblePrediction, EnsembleRun
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.sources import (
    as_source,
    encoded_targets,
    located_rows,
    require_alike,
    row_count_of,
    row_shape_of,
    targets_of,
    working_dtype,
)
from ntkdask.workflows.stream import FeatureStream


def predict_ensemble(
    network: Network,
    x_train: Any,
    targets: Any = None,
    x_test: Any = None,
    *,
    kind: str = "ntk",
    times: float | Sequence[float] = math.inf,
    output: str = "variance",
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = True,
    learning_rate: float | None = None,
    n_classes: int | None = None,
    url: str | os.PathLike[str] | None = None,
    client: Any = None,
    plan: Plan | None = None,
    resources: Resources | None = None,
    listener: Listener | None = None,
) -> EnsemblePrediction:
    """Predictions of infinitely many infinitely wide networks after training, on x_test, or (None) on x_train.

    Parameters
    ----------
    network : Network
        The architecture.
    x_train : array (n, *s), dask array, Dataset or its url
        Training rows, cast as `featurize` casts them: all but float64 to float32, uint8 images divided by 255.
    targets : array (n,) or (n, k), or None
        Numbers, or labels 0..C−1 with `n_classes`. None takes the dataset's own.
    x_test : array (m, *s), dask array, Dataset, its url or None
        Rows to predict. None: the training rows.
    kind : str
        "ntk": every parameter is trained; "nngp": the last layer alone, which converges to the NNGP posterior with noise variance r.
    times : float or sequence of float
        Training times >= 0, math.inf for convergence.
    output : str
        "mean", "variance" (of each row) or "covariance" (between rows); each gives what is before it, too.
    diag_reg : float
        The ridge r >= 0.
    diag_reg_absolute_scale : bool
        Whether r is `diag_reg` itself, or `diag_reg` times the mean of the kernel's diagonal.
    learning_rate : float or None
        None: times are of gradient flow on the summed loss. A number: neural-tangents' times, of the mean loss with that rate.
    n_classes : int or None
        C of the labels, which become zero-mean one-hot targets. None: targets are numbers.
    url : str, path or None
        A folder that keeps the kernels, the decomposition and the predictions. Every stage resumes; other times, ridges and test rows
        reuse the decomposition. A folder of other training rows, targets or network is refused.
    client : distributed.Client or None
        Whose workers run the tasks; needs a url, which they share. None: a loop in this process.
    plan : Plan or None
        tile_rows of test rows, tile_cols of training rows that they meet at a time, memory_bytes of a task, dtype of the kernels (the
        decomposition is float64).
    resources : Resources or None
        Memory, threads and GPU of a task. None: with a client the memory of the smallest worker, the threads that it has, and no GPU.
    listener : Listener or None
        Hears of stages and tasks.

    Returns
    -------
    EnsemblePrediction
        mean (T, m, k), variance (T, m), covariance (T, m, m), float64; dask arrays where there is a url.

    Raises
    ------
    InputError
        For rows of different shapes, NaN, targets of another length, and a posterior that duplicate rows rule out.
    MemoryBudgetError
        Before anything runs, when the n × n float64 matrices of the decomposition (4, or 3 of kind "nngp") do not fit a task.
    FingerprintError
        When the folder holds another training set, naming the keys that differ.

    References
    ----------
    Lee et al. 2019, §2.3; `solvers/gradient_flow.py` states the formulas.
    """
    training = Training(kind, check_times(times), output, diag_reg, diag_reg_absolute_scale, learning_rate)
    plan, site = plan or Plan(), Site.at(url, client, listener)
    # tasks elsewhere need a folder; without one everything stays here
    folder = site.folder if client is None else site.home
    if not isinstance(network, Network):
        raise InputError(f"predict_ensemble: network is {network!r}; give a Network, for example fully_connected(1).")
    source = as_source(x_train, "x_train")
    test_source = None if x_test is None else as_source(x_test, "x_test")
    require_alike(test_source, source)
    y = targets_of(source, targets, n_classes)
    dtype, n_rows = working_dtype(plan, source), row_count_of(source if test_source is None else test_source)
    kernel = NNGP(network) if training.last_layer else NTK(network)
    itemsize, row_shape = np.dtype(dtype).itemsize, row_shape_of(source)
    sizes = plan_ensemble(
        training,
        row_count_of(source),
        n_rows,
        y.shape[1],
        dtype=dtype,
        plan=_bounded(plan, site, resources),
        resources=resources,
        kernel_bytes=lambda rows, columns: kernel.workspace_bytes(rows, columns, itemsize, row_shape),
    )
    inputs = None if folder is None else folder / "inputs"
    train, digest = _located(source, inputs, client, "x_train", sizes)
    test, test_digest = (None, "") if test_source is None else _located(test_source, inputs, client, "x_test", sizes)
    kernels = ComputedKernels(network, training.last_layer, train, test, sizes.width)
    site = replace(site, threads=sizes.threads or site.threads)
    matrix_plan = Plan(memory_bytes=plan.memory_bytes, dtype=dtype)
    run = EnsembleRun(
        training,
        kernels,
        lambda: kernels if site.folder is None else _build(kernels, site, matrix_plan),
        sizes,
        training.flow_times(*y.shape),
        n_rows,
        test is None,
        site,
    )
    identity = {"network": registry.to_config(network), "kind": kind, "train": digest, "dtype": dtype}
    return run.predict(y, identity, test_digest)


def predict_stored_ensemble(
    matrices: EnsembleMatrices,
    targets: Any,
    *,
    kind: str = "ntk",
    times: float | Sequence[float] = math.inf,
    output: str = "variance",
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = True,
    learning_rate: float | None = None,
    n_classes: int | None = None,
    url: str | os.PathLike[str] | None = None,
    client: Any = None,
    plan: Plan | None = None,
    resources: Resources | None = None,
    listener: Listener | None = None,
) -> EnsemblePrediction:
    """`predict_ensemble` from matrices of any kernel that are stored already.

    Parameters
    ----------
    matrices : EnsembleMatrices
        Where they are. The covariance needs nngp_tt as a matrix, the variance that or its diagonal.
    targets : array (n,) or (n, k)
        Numbers, or labels 0..C−1 with `n_classes`.
    kind, times, output, diag_reg, diag_reg_absolute_scale, learning_rate, n_classes
        As of `predict_ensemble`.
    url : str, path or None
        A folder that keeps the decomposition and the predictions, and resumes.
    client, plan, resources, listener
        As of `predict_ensemble`; plan.dtype has no effect, the matrices have theirs.

    Returns
    -------
    EnsemblePrediction
        As of `predict_ensemble`.

    Raises
    ------
    InputError
        For shapes that do not belong together.
    MemoryBudgetError
        As of `predict_ensemble`.
    """
    training = Training(kind, check_times(times), output, diag_reg, diag_reg_absolute_scale, learning_rate)
    plan, site = plan or Plan(), Site.at(url, client, listener)
    # tasks elsewhere need a folder; without one everything stays here
    folder = site.folder if client is None else site.home
    kernels, digests = open_matrices(matrices, training, plan)
    y = encoded_targets(targets, n_classes, kernels.n)
    m = kernels.n if kernels.theta_td is None else kernels.theta_td.shape[0]
    itemsize, tile = kernels.theta_dd.dtype.itemsize, max(kernels.theta_dd.tile_shape)
    sizes = plan_ensemble(
        training,
        kernels.n,
        m,
        y.shape[1],
        dtype=kernels.theta_dd.dtype.name,
        plan=_bounded(plan, site, resources),
        resources=resources,
        # whole tiles are read for any of their rows and columns
        kernel_bytes=lambda rows, columns: itemsize * (3 * tile * tile + 2 * rows * columns),
    )
    run = EnsembleRun(
        training,
        kernels if folder is None else kernels.for_tasks(site.states),
        lambda: kernels,
        sizes,
        training.flow_times(*y.shape),
        m,
        kernels.theta_td is None,
        replace(site, threads=sizes.threads or site.threads),
    )
    return run.predict(y, {"kind": kind, "matrices": digests[:2]}, digests[2:])


def _bounded(plan: Plan, site: Site, resources: Resources | None) -> Plan:
    """The plan with the workers' memory as a task's budget, where the caller states no resources."""
    # their memory alone: without resources tasks keep the threads that their worker has, which decide the bits, and no GPU
    return site.bounded(plan) if resources is None else plan


def _build(kernels: ComputedKernels, site: Site, plan: Plan) -> Kernels:
    """Θ_DD and K_DD in tiles under the site's folder/kernel, resumed, and what reads them."""
    rows, url = kernels.train.rows, site.home / "kernel"
    x = rows.url if isinstance(rows, DatasetRows) else rows.x  # type: ignore[attr-defined]
    kernel = NNGP(kernels.network) if kernels.last_layer else both(kernels.network)
    kernel_matrix(kernel, x, url=url, client=site.client, plan=plan, listener=site.listener, threads=site.threads)
    if kernels.last_layer:
        return StoredKernels(StoredMatrix.open(url), None, None, None, None, kernels.width)
    nngp, ntk = (StoredMatrix.open(url / part) for part in ("nngp", "ntk"))
    return StoredKernels(ntk, nngp, None, None, None, kernels.width)


def _located(
    source: Any, inputs: Path | None, client: Any, name: str, sizes: EnsemblePlan
) -> tuple[FeatureStream, str]:
    """(rows of `source` as kernels take them, digest of their content)."""
    rows, digest = located_rows(source, inputs, client is not None, name)
    return _stream(rows, sizes), digest


def _stream(rows: Rows, sizes: EnsemblePlan) -> FeatureStream:
    """Rows as the kernels take them."""
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, sizes.dtype)
    return FeatureStream(rows, fitted, None, None, max(sizes.width, sizes.tile_rows), sizes.device)
