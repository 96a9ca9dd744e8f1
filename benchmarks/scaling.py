"""Whole-job time and peak memory against the number of rows: doubling rows should take twice the time in the same memory.

    python -m benchmarks.scaling [--rows 40000 80000 160000] [--components 2048] [--features 256]

Each size is a complete run (import aside) on a fresh local cluster: preprocessing, Gram, solve, predictions. Also prints how
busy the cores were: CPU seconds of the workers' tasks ÷ (wall seconds × slots) during the Gram stage.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from ntkdask import write_dataset
from ntkdask.execution import cluster
from ntkdask.execution.workers import resources
from ntkdask.features import NTKRandomFeatures
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule, TrainingJob
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import Standardize
from ntkdask.wording import format_bytes
from ntkdask.workflows.ridge.fit import RidgeOptions
from ntkdask.workflows.ridge.recipe import RidgeRecipe


def one_run(folder: Path, n: int, d: int, m: int) -> dict:
    """Metrics of one run on n synthetic rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    y = np.sin(x[:, :8].sum(axis=1)).astype(np.float64)
    data = write_dataset(str(folder / f"data-{n}"), x, y, kind="regression")
    job = TrainingJob(
        f"scaling-{n}",
        data,
        None,
        SplitRule(test=0.1),
        (Standardize(),),
        RidgeRecipe(NTKRandomFeatures(fully_connected(1), m), RidgeOptions(tuple(np.logspace(-2, 4, 7)))),
        plan=Plan(dtype="float32"),
    )
    with cluster.connect(cuda=False) as client:
        return run_job(job, folder / f"run-{n}", resources=resources(client), client=client)


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[40000, 80000, 160000])
    parser.add_argument("--components", type=int, default=2048)
    parser.add_argument("--features", type=int, default=256)
    a = parser.parse_args()
    before = None
    print(
        f"{'rows':>8} {'total s':>8} {'no solve':>8} {'ratio':>6} {'gram s':>7} {'busy':>5} {'peak':>9} {'planned':>9}  load"
    )
    with tempfile.TemporaryDirectory() as folder:
        for n in a.rows:
            metrics = one_run(Path(folder), n, a.features, a.components)
            seconds, tasks = metrics["seconds"], metrics["tasks"]["gram-slab"]["seconds"]
            streamed = seconds["total"] - seconds["solve"]
            busy = sum(tasks) / (seconds["gram-slab"] * metrics["workers"])
            ratio = "" if before is None else f"{streamed / before:.2f}"
            peak = format_bytes(metrics["tasks"]["gram-slab"]["peak_bytes"])
            print(
                f"{n:>8} {seconds['total']:>8.2f} {streamed:>8.2f} {ratio:>6} {seconds['gram-slab']:>7.2f} {busy:>5.2f} "
                f"{peak:>9} {format_bytes(metrics['plan']['worker_bytes']):>9}  {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            before = streamed


if __name__ == "__main__":
    main()
