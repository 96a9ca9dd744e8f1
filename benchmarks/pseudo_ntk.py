"""Pseudo-NTK beside full empirical NTK: Theorem 1, the linearisation error, and the paper's Figures 2 to 8 on a CIFAR-10 subset.

    python -m benchmarks.pseudo_ntk theorem       [--widths 32 64 128 256] [--seeds 3] [--rows 20] [--outputs 10]
    python -m benchmarks.pseudo_ntk linearization [--widths 32 64 128 256] [--seeds 3]
    python -m benchmarks.pseudo_ntk cifar         [--data data/cifar10.zarr] [--train 1000] [--test 500] [--seeds 1]
                                                  [--networks FCN:256 ResNet18:8] [--epochs 0 5] [--folder runs/pseudo-ntk-benchmark]

theorem: ‖Θ − Θ̂⊗I‖_F/‖Θ‖_F, the off-diagonal ratio, λ_max and f_lin of fully connected ReLU networks in NTK parameterisation (float64,
Gaussian rows) against width, and the slope of its logarithm; −1/2 is what eqs. 3, 4 and 7 of Mohamadi & Sutherland bound it by.
linearization: f − f_lin after gradient descent, and at the worst parameters as far away (`modules/linearization.py`).
cifar: images as `benchmarks.cifar_cntk` imports them, standardised per channel; the networks of the paper, trained on the subset.
Cells are kept in the folder and not computed again. Seconds are wall clock.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar_cntk import read_split
from ntkdask import threads
from ntkdask.errors import UserError
from ntkdask.modules.descriptions import FiniteNetwork, ResNet18, WideResNet, convnet8, fcn3
from ntkdask.modules.linearization import linearization_error
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.networks import fully_connected
from ntkdask.report.figures_empirical import write_figures
from ntkdask.solvers.kernel_measures import power_law
from ntkdask.workflows.empirical.sweep import run_pntk_sweep
from ntkdask.workflows.empirical.sweep_cells import PntkSweep, SweepData

NETWORKS: dict[str, Callable[[int, int, tuple[int, ...]], Any]] = {
    "FCN": fcn3,
    "ConvNet": convnet8,
    "ResNet18": lambda width, outputs, _: ResNet18(width, outputs),
    "WideResNet": lambda k, outputs, _: WideResNet(16, k, outputs, groups=2, stem_width=16 * k),
}
"""The paper's networks by width (of layers, of the first group's channels, or the widening factor), outputs and shape of a row."""

COLUMNS = (
    "off_diagonal_ratio",
    "frobenius",
    "lambda_max_difference",
    "lambda_min_difference",
    "prediction_difference",
    "accuracy",
    "pntk_accuracy",
    "entk_accuracy",
    "seconds",
)


def theorem_data(rows: int, outputs: int, d: int = 20) -> SweepData:
    """Gaussian rows with labels in turn; half as many to predict."""
    rng = np.random.default_rng(0)
    x, x_test = rng.standard_normal((rows, d)), rng.standard_normal((max(outputs, rows // 2), d))
    return SweepData(x, np.arange(rows) % outputs, x_test, np.arange(len(x_test)) % outputs, outputs)


def theorem(
    widths: Sequence[int], seeds: int, folder: Path, rows: int = 20, outputs: int = 10, depth: int = 2
) -> dict[str, float]:
    """Slopes by measure, printed beside the means."""
    data = theorem_data(rows, outputs)
    networks = {"FCN": {w: FiniteNetwork(fully_connected(depth), w, outputs, data.x.shape[1:]) for w in widths}}
    found = run_pntk_sweep(PntkSweep(networks, range(seeds), dtype="float64"), data, folder)
    keys = ("frobenius", "off_diagonal_ratio", "lambda_max_difference", "prediction_difference")
    values = {
        key: np.array(
            [[row[key] for row in found if row["seed"] == s and row["width"] in widths] for s in range(seeds)]
        )
        for key in keys
    }
    return _reported(f"{depth} hidden layers, {rows} rows, {outputs} outputs, {seeds} seeds", widths, values)


def linearization(widths: Sequence[int], seeds: int, depth: int = 1, steps: int = 20) -> dict[str, float]:
    """Slopes by error, printed beside the means."""
    data = theorem_data(8, 3, 5)
    network, y = fully_connected(depth, activation="tanh"), np.eye(3)[data.labels]
    found = [
        [
            linearization_error(
                FiniteNetwork(network, w, 3, data.x.shape[1:], seed).build().double(),
                data.x,
                y,
                data.x_test,
                steps=steps,
            )
            for w in widths
        ]
        for seed in range(seeds)
    ]
    values = {
        n: np.array([[getattr(e, n) for e in row] for row in found]) for n in ("taylor", "dynamics", "worst", "moved")
    }
    return _reported(f"tanh, {depth} hidden layers, {steps} steps of gradient descent, {seeds} seeds", widths, values)


def _reported(what: str, widths: Sequence[int], values: dict[str, np.ndarray]) -> dict[str, float]:
    slopes = {name: power_law(widths, found) for name, found in values.items()}
    print(f"{what}\n{'width':24s}" + "".join(f"{w:>10d}" for w in widths) + "     slope")
    for name, found in values.items():
        print(f"{name:24s}" + "".join(f"{v:10.4f}" for v in found.mean(axis=0)) + f"{slopes[name]:10.3f}", flush=True)
    return slopes


def cifar(
    url: str, n: int, n_test: int, networks: Sequence[str], epochs: Sequence[int], seeds: int, folder: Path
) -> list[dict[str, Any]]:
    """The sweep's rows, printed; table.csv and figures in the folder."""
    split = read_split(url, n, n_test)
    data = SweepData(split.x, split.labels, split.x_test, split.labels_test, split.classes)
    by_name: dict[str, dict[int, Any]] = {}
    for name, _, width in (text.partition(":") for text in networks):
        by_name.setdefault(name, {})[int(width)] = NETWORKS[name](int(width), split.classes, split.x.shape[1:])
    protocol = TrainingProtocol(epochs=max(epochs), checkpoints=tuple(epochs)) if max(epochs) else None
    rows = run_pntk_sweep(PntkSweep(by_name, range(seeds), protocol), data, folder)
    print(
        f"{n} training and {n_test} test images\n{'network':14s}{'width':>6s}{'seed':>5s}{'epoch':>6s}  "
        + "  ".join(COLUMNS)
    )
    for row in rows:
        numbers = (f"{row.get(c) if row.get(c) is not None else float('nan'):>{len(c)}.4g}" for c in COLUMNS)
        print(
            f"{row['network']:14s}{row['width']:6d}{row['seed']:5d}{row['epoch']:6d}  " + "  ".join(numbers), flush=True
        )
    write_figures(rows, folder / "figures")
    return rows


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("theorem", "linearization", "cifar"), nargs="?", default="theorem")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--outputs", type=int, default=10)
    parser.add_argument("--data", default="data/cifar10.zarr")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--networks", nargs="+", default=["FCN:256", "ResNet18:8"], metavar="NAME:WIDTH")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/pseudo-ntk-benchmark"))
    parser.add_argument("--threads", type=int, default=threads.current())
    found = parser.parse_args(arguments)
    unknown = [n for n in found.networks if n.partition(":")[0] not in NETWORKS or not n.partition(":")[2].isdigit()]
    if unknown:
        parser.error(f"network {unknown[0]!r}: write NAME:WIDTH with one of {', '.join(NETWORKS)}.")
    return found


def main() -> None:
    """Measure and print."""
    a = parsed()
    print(f"{a.threads} threads, load {os.getloadavg()}")
    with threads.limited(a.threads):
        if a.what == "theorem":
            theorem(a.widths, a.seeds, a.folder / "theorem", a.rows, a.outputs)
        elif a.what == "linearization":
            linearization(a.widths, a.seeds)
        else:
            try:
                cifar(a.data, a.train, a.test, a.networks, a.epochs, a.seeds, a.folder / f"cifar-{a.train}-{a.test}")
            except UserError as error:
                print(f"skipped: {error}")


if __name__ == "__main__":
    main()
