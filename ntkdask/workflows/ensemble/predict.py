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
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import as_array, is_dask, to_host
from ntkdask.datasets import Dataset
from ntkdask.datasets.rows import DatasetRows, Rows
from ntkdask.errors import InputError
from ntkdask.execution.progress import Listener, Silent
from ntkdask.files import local_path
from ntkdask.kernels import NNGP, NTK, both
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.networks import Network
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.solvers.gradient_flow import check_times
from ntkdask.workflows.ensemble.kernels import ComputedKernels, EnsembleMatrices, Kernels, StoredKernels, open_matrices
from ntkdask.workflows.ensemble.plan import EnsemblePlan, Training, plan_ensemble
from ntkdask.workflows.ensemble.run import EnsemblePrediction, EnsembleRun
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.sources import as_source, row_shape_of, rows_of
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

    x_train, x_test: arrays, dask arrays, datasets or their urls, cast as `featurize` casts them. targets: numbers (n,) or (n, k);
    labels 0..C−1 with n_classes=C, which become zero-mean one-hot targets; or None to take the dataset's own. kind, times,
    output ("mean", "variance": of each row, or "covariance"), diag_reg, diag_reg_absolute_scale, learning_rate: see `Training`.

    url: a folder that keeps the kernels, the decomposition and the predictions; every stage resumes, and other times, ridges and test
    rows reuse the decomposition. A folder of other training rows, targets or network is refused. client: a Dask client (needs a
    url: the workers share it), None for a loop here. plan: tile_rows of test rows, tile_cols of training rows met at a time,
    memory_bytes of a task, dtype of the kernels (the decomposition is float64). resources: threads, memory and GPU of a task.

    Raises InputError for widths that differ, NaN, targets of another length, or a posterior that duplicate rows rule out;
    MemoryBudgetError when n² float64 does not fit as often as the decomposition takes.
    """
    training = Training(kind, check_times(times), output, diag_reg, diag_reg_absolute_scale, learning_rate)
    plan, listener, folder = plan or Plan(), listener or Silent(), _folder(url, client)
    if not isinstance(network, Network):
        raise InputError(f"predict_ensemble: network is {network!r}; give a Network, for example fully_connected(1).")
    inputs = Path() if folder is None else folder / "inputs"
    source = as_source(x_train, "x_train")
    y = _targets_of(source, targets, n_classes)
    tested = None if x_test is None else _alike(as_source(x_test, "x_test"), source)
    train, digest = _located(source, inputs, folder, client, "x_train")
    test, test_digest = (None, "") if tested is None else _located(tested, inputs, folder, client, "x_test")
    dtype = plan.dtype or ("float64" if train.dtype == "float64" else "float32")
    n_rows, itemsize = (test or train).n_total, np.dtype(dtype).itemsize
    kernel = NNGP(network) if training.last_layer else NTK(network)
    sizes = plan_ensemble(
        training,
        train.n_total,
        n_rows,
        y.shape[1],
        dtype=dtype,
        plan=plan,
        resources=resources,
        kernel_bytes=lambda rows, columns: kernel.workspace_bytes(rows, columns, itemsize, train.row_shape),
    )
    streams = _stream(train, sizes), None if test is None else _stream(test, sizes)
    kernels = ComputedKernels(network, training.last_layer, *streams, sizes.width)
    small = Plan(memory_bytes=plan.memory_bytes, dtype=dtype)
    run = EnsembleRun(
        training,
        kernels,
        lambda: kernels if folder is None else _build(kernels, folder, client, small, listener, sizes.threads),
        sizes,
        training.flow_times(*y.shape),
        n_rows,
        test is None,
        folder,
        client,
        listener,
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
    """`predict_ensemble` from matrices that are stored already, of any kernel; arguments as there.

    The covariance needs nngp_tt as a matrix; the variance that or its diagonal. InputError for shapes that do not belong together.
    """
    training = Training(kind, check_times(times), output, diag_reg, diag_reg_absolute_scale, learning_rate)
    plan, folder = plan or Plan(), _folder(url, client)
    kernels, digests = open_matrices(matrices, training, folder, plan)
    y = encoded_targets(targets, n_classes, kernels.n)
    m = kernels.n if kernels.theta_td is None else kernels.theta_td.shape[0]
    itemsize, tile = kernels.theta_dd.dtype.itemsize, max(kernels.theta_dd.tile_shape)
    sizes = plan_ensemble(
        training,
        kernels.n,
        m,
        y.shape[1],
        dtype=kernels.theta_dd.dtype.name,
        plan=plan,
        resources=resources,
        # whole tiles are read for the rows and columns that are wanted
        kernel_bytes=lambda rows, columns: itemsize * (3 * tile * tile + 2 * rows * columns),
    )
    run = EnsembleRun(
        training,
        kernels,
        lambda: kernels,
        sizes,
        training.flow_times(*y.shape),
        m,
        kernels.theta_td is None,
        folder,
        client,
        listener or Silent(),
    )
    return run.predict(y, {"kind": kind, "matrices": digests[:2]}, digests[2:])


def _build(
    kernels: ComputedKernels, folder: Path, client: Any, plan: Plan, listener: Listener, threads: int | None
) -> Kernels:
    """Θ_DD and K_DD in tiles under folder/kernel, resumed, and what reads them."""
    rows, url = kernels.train.rows, folder / "kernel"
    x = rows.url if isinstance(rows, DatasetRows) else rows.x  # type: ignore[attr-defined]
    if kernels.last_layer:
        kernel_matrix(NNGP(kernels.network), x, url=url, client=client, plan=plan, listener=listener, threads=threads)
        return StoredKernels(StoredMatrix.open(url), None, None, None, None, kernels.width)
    kernel_matrix(both(kernels.network), x, url=url, client=client, plan=plan, listener=listener, threads=threads)
    nngp, ntk = (StoredMatrix.open(url / part) for part in ("nngp", "ntk"))
    return StoredKernels(ntk, nngp, None, None, None, kernels.width)


def _folder(url: str | os.PathLike[str] | None, client: Any) -> Path | None:
    if url is None and client is not None:
        raise InputError("predictions on a cluster go through a folder that its workers share: give a url.")
    return None if url is None else local_path(url)


def _located(source: Any, inputs: Path, folder: Path | None, client: Any, name: str) -> tuple[Rows, str]:
    """Rows that tasks can read, and their digest; a dask array without a folder is computed into memory."""
    if is_dask(source) and folder is None:
        source = source.compute()
    if not is_dask(source) and not isinstance(source, Dataset):
        check_finite_rows(source, name=name)
    return rows_of(source, inputs, client is not None, name)


def _stream(rows: Rows, sizes: EnsemblePlan) -> FeatureStream:
    fitted = FittedPreprocessor.for_rows(rows.row_shape, rows.dtype, sizes.dtype)
    return FeatureStream(rows, fitted, None, None, max(sizes.width, sizes.tile_rows), sizes.device)


def _alike(test: Any, train: Any) -> Any:
    """`test` when its rows have the shape of `train`'s."""
    shapes = row_shape_of(test), row_shape_of(train)
    if shapes[0] != shapes[1]:
        raise InputError(f"x_test has rows of shape {shapes[0]} and x_train of {shapes[1]}; they must agree.")
    return test


def _targets_of(source: Any, targets: Any, n_classes: int | None) -> np.ndarray:
    """(n, k) float64 of what the caller gave, or of the dataset."""
    n = source.n if isinstance(source, Dataset) else source.shape[0]
    if targets is None:
        if not isinstance(source, Dataset) or source.kind == "unlabelled":
            raise InputError("there are no targets: give them, or a dataset that holds some as x_train.")
        targets = source.targets(0, n)
        n_classes = n_classes or (len(source.class_names or ()) if source.kind == "classification" else None)
    return encoded_targets(targets, n_classes, n)


def encoded_targets(targets: Any, n_classes: int | None, n: int) -> np.ndarray:
    """Targets of n training rows, as `predict_ensemble` takes them, as (n, k) float64; InputError where they are not."""
    y = to_host(as_array(targets.compute() if hasattr(targets, "compute") else targets))
    if n_classes is not None:
        y = encode_targets(y, n_classes, "float64")
    if y.ndim not in (1, 2) or len(y) != n or y.dtype.kind not in "buif":
        raise InputError(
            f"targets have shape {y.shape} and dtype {y.dtype} for {n} training rows; give numbers (n,) or (n, k), or labels "
            "with n_classes."
        )
    y = np.ascontiguousarray(y.reshape(n, -1), np.float64)
    check_finite_rows(y, name="targets")
    return y
