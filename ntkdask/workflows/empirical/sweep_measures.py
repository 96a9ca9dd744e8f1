"""What one cell of a sweep measures of a network: its kernels, its linearised predictions, and their differences.

    Θ, Θ̂ of the training rows → their measures                                    (Figures 2 to 6)
    f_lin of the test rows with either → differences, accuracy                     (Figures 7 to 12)

Called by `sweep.py`, once a cell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ntkdask.arrays import Array, to_device, to_host
from ntkdask.errors import InputError
from ntkdask.execution.site import Site
from ntkdask.planning.tiles import Plan
from ntkdask.solvers.kernel_measures import accuracy, prediction_difference, pseudo_of
from ntkdask.solvers.linearized import Linearized, one_hot, safe_alpha
from ntkdask.workflows.empirical.comparison import Ends, compare_kernels, ends_of
from ntkdask.workflows.empirical.linearized import predict_stored_linearized
from ntkdask.workflows.empirical.sweep_cells import PntkSweep, SweepData

Measured = tuple[dict[str, np.ndarray], dict[str, Any]]
"""(predictions (m, O) by kernel, measures)"""

SIDES = {"pntk": "pseudo", "entk": "full"}
"""What `KernelComparison` calls the two kernels."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a cell on the device that computes; Y − f₀ of the training rows and f₀ of the test rows, on the host."""

    x: Array
    x_test: Array
    residual: np.ndarray
    prior: np.ndarray


def measure(module: Any, sweep: PntkSweep, data: SweepData, site: Site, plan: Plan) -> dict[str, Any]:
    """Everything that a cell says of a module in eval mode, as a table. A site without a folder: in this process, in memory."""
    from ntkdask.modules.outputs import on_gpu, outputs

    device = site.folder is None and on_gpu()  # tasks move tiles to the GPU themselves
    x, x_test = (to_device(side.astype(sweep.dtype), device) for side in (data.x, data.x_test))
    f0, f0_test = (to_host(outputs(module, side)).astype(np.float64) for side in (x, x_test))
    if f0.shape[1] != data.n_classes:
        raise InputError(f"the network has {f0.shape[1]} outputs for {data.n_classes} classes; they must agree.")
    own = {"accuracy": accuracy(f0_test, data.labels_test), "train_accuracy": accuracy(f0, data.labels)}
    rows = _Rows(x, x_test, one_hot(data.labels, data.n_classes) - f0, f0_test)
    if "entk" in sweep.kernels:
        predicted, measures = _with_full(module, sweep, rows)
    else:
        predicted, measures = _pseudo_alone(module, sweep, rows, site, plan)
    for name, f in predicted.items():
        measures[name]["accuracy"] = accuracy(f, data.labels_test)
        # what linearising here gains over the network as it is: Figure 11
        measures[name]["gain"] = measures[name]["accuracy"] - own["accuracy"]
    if len(predicted) > 1:
        measures["prediction_difference"] = prediction_difference(predicted["pntk"], predicted["entk"])
        measures["accuracy_difference"] = measures["pntk"]["accuracy"] - measures["entk"]["accuracy"]
    return own | measures


def _with_full(module: Any, sweep: PntkSweep, rows: _Rows) -> Measured:
    """Both kernels, in memory."""
    from ntkdask.kernels.empirical import EmpiricalNTK

    kernel = EmpiricalNTK(module, output="full")
    theta = kernel(rows.x)
    pseudo = pseudo_of(theta)
    comparison = compare_kernels(theta, pseudo)
    measures = comparison.to_json()
    predicted, fits = {}, {}
    for name, matrix, ends in (("pntk", pseudo, comparison.pseudo), ("entk", theta, comparison.full)):
        alpha = _alpha(sweep, ends)
        fits[name] = Linearized.fit(matrix, rows.residual, alpha)
        resolved = None if ends is None else ends.resolved
        measures[name] = {"alpha": alpha, "resolved": resolved, **measures.pop(SIDES[name])}
    del theta
    cross = kernel(rows.x_test, rows.x)
    for name, matrix in (("pntk", pseudo_of(cross)), ("entk", cross)):
        predicted[name] = fits[name].predict(matrix, rows.prior)
    return predicted, measures


def _pseudo_alone(module: Any, sweep: PntkSweep, rows: _Rows, site: Site, plan: Plan) -> Measured:
    """The pseudo-NTK alone, in memory or in tiles."""
    from ntkdask.kernels.empirical import PseudoNTK
    from ntkdask.workflows.kernel_matrix.build import kernel_matrix

    kernel = PseudoNTK(module)
    matrix: Any
    cross: Any
    if site.folder is None:
        matrix, cross = kernel(rows.x), kernel(rows.x_test, rows.x)
    else:
        plan = replace(plan, dtype=sweep.dtype)
        matrix, cross = site.folder / "train", site.folder / "test"
        kernel_matrix(kernel, rows.x, url=matrix, client=site.client, plan=plan)
        kernel_matrix(kernel, rows.x_test, rows.x, url=cross, client=site.client, plan=plan)
    ends = ends_of(matrix, site, plan)
    alpha = _alpha(sweep, ends)
    fit = predict_stored_linearized(
        matrix,
        cross,
        rows.residual,
        np.zeros_like(rows.residual),
        rows.prior,
        alpha=alpha,
        url=site.folder,
        client=site.client,
        plan=plan,
    )
    measures = {"alpha": alpha, "resolved": ends.resolved, **asdict(ends)}
    return {"pntk": fit.predictions}, {"pntk": measures}


def _alpha(sweep: PntkSweep, ends: Ends | None) -> float:
    """The sweep's alpha, or the least at which rounding does not decide."""
    if ends is None:
        return sweep.alpha
    return max(sweep.alpha, safe_alpha(ends.lambda_min, ends.lambda_max, float(np.finfo(sweep.dtype).eps)))
