"""The experiments of Mohamadi & Sutherland: pseudo-NTK beside full eNTK over networks, widths, training epochs and seeds.

    for every network, width and seed:  train, weights kept at the protocol's epochs                (`workflows/train.py`)
        for every epoch (a cell):       Θ, Θ̂ of the training rows → their measures                   (Figures 2 to 6)
                                        f_lin of the test rows with either → differences, accuracy   (Figures 7 to 12)

A cell is one JSON file, written whole when it is done, beside what was asked for: a sweep goes on where it stopped, and grows by more
widths, seeds or networks. `sweep_rows` reads the cells as one table; `figures_empirical` draws it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, to_device, to_host
from ntkdask.errors import FingerprintError, InputError, MemoryBudgetError, StoreError
from ntkdask.execution.progress import DRIVER, Listener, Silent
from ntkdask.execution.window import Done, peak_bytes
from ntkdask.files import local_path, write_text
from ntkdask.modules.optional import require_torch
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.planning.tiles import Plan
from ntkdask.solvers.kernel_measures import accuracy, prediction_difference, pseudo_of
from ntkdask.solvers.linearized import Linearized, one_hot, safe_alpha
from ntkdask.states import content_digest
from ntkdask.wording import format_bytes
from ntkdask.workflows.empirical.comparison import Ends, compare_kernels
from ntkdask.workflows.empirical.linearized import predict_stored_linearized
from ntkdask.workflows.empirical.train import train

LABEL = "sweep-cell"
KERNELS = ("pntk", "entk")


@dataclass(frozen=True, eq=False)
class SweepData:
    """Standardised rows x (n, *s), x_test (m, *s), floating, images NHWC, and their labels 0..C−1."""

    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    n_classes: int

    def __post_init__(self) -> None:
        for name, rows, labels in (("x", self.x, self.labels), ("x_test", self.x_test, self.labels_test)):
            if not len(rows) or len(rows) != len(labels) or rows.dtype.kind != "f":
                raise InputError(
                    f"the sweep's {name} has shape {rows.shape} and dtype {rows.dtype} for {len(labels)} labels; give floating rows, "
                    "one for each label."
                )
            one_hot(labels, self.n_classes)

    @property
    def digest(self) -> str:
        """Of everything in it."""
        return content_digest(self.x, self.labels, self.x_test, self.labels_test)


@dataclass(frozen=True)
class PntkSweep:
    """What is swept.

    networks: {name: {width: description}}, descriptions of modules whose outputs are the classes; their seed is replaced by each of
    `seeds`, which also orders training. protocol: training on the rows of the kernels, whose checkpoints are the epochs; None:
    initial weights alone. kernels: ("pntk", "entk"), or ("pntk",) where (n·O)² numbers are too many: no differences then.
    alpha: of f_lin, 0 in the paper; where a kernel is singular to rounding the least safe one, which its cell records.
    dtype: of rows and kernels; float64 tells smaller eigenvalues from rounding.
    """

    networks: Mapping[str, Mapping[int, Any]]
    seeds: Sequence[int] = (0, 1, 2)
    protocol: TrainingProtocol | None = None
    kernels: Sequence[str] = KERNELS
    alpha: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.networks or not all(self.networks.values()) or not self.seeds:
            raise InputError("a sweep takes at least one network with one width, and one seed.")
        for name, by_width in self.networks.items():
            bad = [w for w, d in by_width.items() if not (isinstance(w, int) and w > 0 and hasattr(d, "build"))]
            if bad or not name or set(name) & set("/\\"):
                raise InputError(
                    f"network {name!r} of the sweep: give {{width: description}} under a plain name, such as "
                    f'{{"FCN": {{64: FiniteNetwork(...)}}}}; found {bad or name!r}.'
                )
        if not set(self.kernels) <= set(KERNELS) or "pntk" not in self.kernels:
            raise InputError(f'a sweep\'s kernels are {tuple(self.kernels)}; use ("pntk", "entk") or ("pntk",).')
        if self.dtype not in ("float32", "float64") or not 0 <= self.alpha < math.inf:
            raise InputError(
                f"a sweep's dtype is {self.dtype!r} and alpha {self.alpha}; use 'float32' or 'float64', alpha >= 0."
            )

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs at which there is a cell."""
        return (0,) if self.protocol is None else self.protocol.checkpoints


@dataclass(frozen=True)
class Cell:
    """One network at one width, seed and epoch."""

    network: str
    width: int
    seed: int
    epoch: int
    description: Any

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.network}-w{self.width:05d}-s{self.seed}-e{self.epoch:04d}"


def cells_of(sweep: PntkSweep) -> Iterator[list[Cell]]:
    """The cells of one training at a time, by epoch."""
    for network, by_width in sweep.networks.items():
        for width, description in by_width.items():
            for seed in sweep.seeds:
                own = dataclasses.replace(description, seed=seed)
                yield [Cell(network, width, seed, epoch, own) for epoch in sweep.epochs]


def run_pntk_sweep(
    sweep: PntkSweep,
    data: SweepData,
    folder: str | os.PathLike[str],
    *,
    client: Any = None,
    plan: Plan | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Compute the cells that are not there yet; all of the folder's cells as flat rows (`sweep_rows`), also in folder/table.csv.

    folder: cells/*.json, training/*; with a client or plan.tile_rows and kernels=("pntk",) also kernels/* in tiles, resumed. client:
    kernels and solves of such cells run there. plan: memory_bytes of this process, tile sizes.
    Raises FingerprintError naming the keys where a cell of other data or options is there, MemoryBudgetError when Θ does not fit
    plan.memory_bytes, InputError of networks that do not fit the data.
    """
    require_torch("run_pntk_sweep")
    folder, plan, listener = local_path(folder), plan or Plan(), listener or Silent()
    if client is not None and "entk" in sweep.kernels:
        raise InputError('full eNTKs of a sweep are computed in this process. With a client use kernels=("pntk",).')
    _require_memory(sweep, data, plan.memory_bytes)
    digest = data.digest
    groups = [[(cell, _asked(sweep, cell, digest)) for cell in cells] for cells in cells_of(sweep)]
    done = {cell.name for cells in groups for cell, asked in cells if _is_done(folder, cell, asked)}
    listener.stage(LABEL, sum(map(len, groups)), len(done))
    for cells in groups:
        if all(cell.name in done for cell, _ in cells):
            continue
        modules = _Modules(sweep, cells[0][0], data, folder)
        for cell, asked in cells:
            if cell.name in done:
                continue
            started = time.perf_counter()
            module, facts = modules.at(cell.epoch)
            stored = folder / "kernels" / cell.name if client is not None or plan.tile_rows else None
            found = _measured(module, sweep, data, stored, client, plan)
            seconds = time.perf_counter() - started
            kept = {"asked": asked, "found": _plain(facts | found | {"seconds": seconds})}
            write_text(_path(folder, cell), json.dumps(kept, indent=1, allow_nan=False))
            listener.task(LABEL, Done(None, seconds, peak_bytes(), DRIVER))
    rows = sweep_rows(folder)
    write_text(folder / "table.csv", _csv(rows))
    return rows


def sweep_rows(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every finished cell as a flat row, by network, width, seed and epoch; nested numbers as `entk_lambda_min`.

    StoreError where there are no cells, or a damaged one.
    """
    paths = sorted((local_path(folder) / "cells").glob("*.json"))
    if not paths:
        raise StoreError(f"{folder} has no cells of a sweep yet. Run it first.")
    rows = []
    for path in paths:
        kept = _read(path)
        keys = {key: kept["asked"][key] for key in ("network", "width", "seed", "epoch")}
        rows.append(keys | _flat(kept["found"]))
    return sorted(rows, key=lambda r: (r["network"], r["width"], r["seed"], r["epoch"]))


def _path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _asked(sweep: PntkSweep, cell: Cell, digest: str) -> dict[str, Any]:
    """Everything that decides a cell."""
    protocol = registry.to_config(sweep.protocol) if cell.epoch else None
    if protocol is not None:
        # training as far as this epoch is the same whatever is kept of it
        protocol = {key: value for key, value in protocol.items() if key not in ("epochs", "checkpoints")}
    return {
        "network": cell.network,
        "width": cell.width,
        "seed": cell.seed,
        "epoch": cell.epoch,
        "data": digest,
        "description": registry.to_config(cell.description),
        "protocol": protocol,
        "kernels": list(sweep.kernels),
        "alpha": sweep.alpha,
        "dtype": sweep.dtype,
    }


def _is_done(folder: Path, cell: Cell, asked: Mapping[str, Any]) -> bool:
    path = _path(folder, cell)
    if not path.exists():
        return False
    lines = registry.differences(_read(path)["asked"], json.loads(json.dumps(asked)))
    if lines:
        raise FingerprintError(
            f"{path} is a cell of another sweep:\n  "
            + "\n  ".join(lines)
            + "\nUse another folder, or delete that one's cells."
        )
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not {"network", "width", "seed", "epoch"} <= set(kept["asked"]) or not isinstance(kept["found"], dict):
            raise ValueError("it says nothing of a cell")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it; the sweep computes it again.") from error
    return kept


class _Modules:
    """A network as it was built, and as training left it at the epochs of the protocol; trained when it is first asked for."""

    def __init__(self, sweep: PntkSweep, cell: Cell, data: SweepData, folder: Path) -> None:
        self._sweep, self._cell, self._data = sweep, cell, data
        self._folder = folder / "training" / f"{cell.network}-w{cell.width:05d}-s{cell.seed}"

    def at(self, epoch: int) -> tuple[Any, dict[str, Any]]:
        """(the module in eval mode, what is known of its training)."""
        sweep, data, module = self._sweep, self._data, self._cell.description.build()
        facts: dict[str, Any] = {"parameters": sum(p.numel() for p in module.parameters() if p.requires_grad)}
        if not epoch:
            return module, facts
        from ntkdask.modules.outputs import on_gpu
        from ntkdask.modules.state.weights import load_weights

        start = self._cell.description.build().to("cuda" if on_gpu() else "cpu")
        rows, seed = data.x.astype("float32"), self._cell.seed
        trained = train(start, rows, data.labels, self._folder, sweep.protocol, seed=seed)
        load_weights(module, trained.checkpoint(epoch))
        return module.eval(), facts | {"learning_rate": trained.learning_rate}


def _measured(
    module: Any, sweep: PntkSweep, data: SweepData, stored: Path | None, client: Any, plan: Plan
) -> dict[str, Any]:
    """Everything that a cell says of a module."""
    from ntkdask.modules.outputs import on_gpu, outputs

    device = stored is None and on_gpu()  # tiles go there by themselves
    x, x_test = (to_device(side.astype(sweep.dtype), device) for side in (data.x, data.x_test))
    f0, f0_test = (to_host(outputs(module, side)).astype(np.float64) for side in (x, x_test))
    if f0.shape[1] != data.n_classes:
        raise InputError(f"the network has {f0.shape[1]} outputs for {data.n_classes} classes; they must agree.")
    found: dict[str, Any] = {
        "accuracy": accuracy(f0_test, data.labels_test),
        "train_accuracy": accuracy(f0, data.labels),
    }
    rows = _Rows(x, x_test, one_hot(data.labels, data.n_classes) - f0, f0_test)
    measure = _with_full if "entk" in sweep.kernels else _pseudo_alone
    predicted, said = measure(module, sweep, rows, stored, client, plan)
    for name, f in predicted.items():
        said[name]["accuracy"] = accuracy(f, data.labels_test)
        # what linearising here gains over the network as it is: Figure 11
        said[name]["gain"] = said[name]["accuracy"] - found["accuracy"]
    if len(predicted) > 1:
        said["prediction_difference"] = prediction_difference(predicted["pntk"], predicted["entk"])
        said["accuracy_difference"] = said["pntk"]["accuracy"] - said["entk"]["accuracy"]
    return found | said


@dataclass(frozen=True, eq=False)
class _Rows:
    x: Array
    x_test: Array
    residual: np.ndarray
    prior: np.ndarray


Said = tuple[dict[str, np.ndarray], dict[str, Any]]


def _with_full(module: Any, sweep: PntkSweep, rows: _Rows, stored: Path | None, client: Any, plan: Plan) -> Said:
    """Both kernels, in memory."""
    from ntkdask.kernels.empirical import EmpiricalNTK

    kernel = EmpiricalNTK(module, output="full")
    theta = kernel(rows.x)
    pseudo = pseudo_of(theta)
    comparison = compare_kernels(theta, pseudo)
    said = comparison.to_json()
    predicted, fits = {}, {}
    for name, matrix, ends in (("pntk", pseudo, comparison.pseudo), ("entk", theta, comparison.full)):
        alpha = _alpha(sweep, ends)
        fits[name] = Linearized.fit(matrix, rows.residual, alpha)
        said[name] = {"alpha": alpha, "resolved": None if ends is None else ends.resolved, **said.pop(_SIDES[name])}
    del theta
    cross = kernel(rows.x_test, rows.x)
    for name, matrix in (("pntk", pseudo_of(cross)), ("entk", cross)):
        predicted[name] = fits[name].predict(matrix, rows.prior)
    return predicted, said


_SIDES = {"pntk": "pseudo", "entk": "full"}


def _pseudo_alone(module: Any, sweep: PntkSweep, rows: _Rows, stored: Path | None, client: Any, plan: Plan) -> Said:
    """The pseudo-NTK, in memory or in tiles."""
    from ntkdask.kernels.empirical import PseudoNTK
    from ntkdask.matrices.spectrum import spectrum
    from ntkdask.workflows.kernel_matrix.build import kernel_matrix

    kernel = PseudoNTK(module)
    matrix: Any
    cross: Any
    if stored is None:
        matrix, cross = kernel(rows.x), kernel(rows.x_test, rows.x)
    else:
        plan = dataclasses.replace(plan, dtype=sweep.dtype)
        matrix, cross = stored / "train", stored / "test"
        kernel_matrix(kernel, rows.x, url=matrix, client=client, plan=plan)
        kernel_matrix(kernel, rows.x_test, rows.x, url=cross, client=client, plan=plan)
    found = spectrum(matrix, 1, client=client, plan=plan)
    ends = Ends(
        found.lambda_max, found.lambda_min, found.condition, float(np.finfo(sweep.dtype).eps) * found.lambda_max
    )
    alpha = _alpha(sweep, ends)
    fit = predict_stored_linearized(
        matrix,
        cross,
        rows.residual,
        np.zeros_like(rows.residual),
        rows.prior,
        alpha=alpha,
        url=stored,
        client=client,
        plan=plan,
    )
    said = {"alpha": alpha, "resolved": ends.resolved, **dataclasses.asdict(ends)}
    return {"pntk": fit.predictions}, {"pntk": said}


def _alpha(sweep: PntkSweep, ends: Ends | None) -> float:
    """The sweep's alpha, or the least at which rounding does not decide."""
    if ends is None:
        return sweep.alpha
    return max(sweep.alpha, safe_alpha(ends.lambda_min, ends.lambda_max, float(np.finfo(sweep.dtype).eps)))


def _require_memory(sweep: PntkSweep, data: SweepData, limit: int | None) -> None:
    """MemoryBudgetError where a cell's matrices do not fit."""
    if limit is None or "entk" not in sweep.kernels:
        return
    rows, columns = len(data.x) * data.n_classes, len(data.x_test) * data.n_classes
    itemsize = np.dtype(sweep.dtype).itemsize
    # Θ, its copy in matrix order, and float64 to decompose; then Θ of the test rows
    needed = BASE_BYTES + (2 * itemsize + 8) * rows * rows + 2 * itemsize * rows * columns
    if needed > limit:
        raise MemoryBudgetError(
            f"a cell of the sweep needs {format_bytes(needed)} for full eNTKs of {len(data.x)} rows and {data.n_classes} outputs but "
            f'has {format_bytes(limit)}. Use fewer rows, or kernels=("pntk",).'
        )


def _plain(value: Any) -> Any:
    """Numbers that JSON has; None for others."""
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
