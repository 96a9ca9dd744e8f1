"""What the command line prints and starts: progress bars, plans, clusters for a run, benchmarks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ntkdask.errors import DiskSpaceError, UserError, nearest
from ntkdask.execution import cluster, workers
from ntkdask.execution.map_reduce import Done
from ntkdask.execution.site import Site
from ntkdask.files import free_bytes
from ntkdask.jobs.run import run_job
from ntkdask.jobs.spec import Job, memory_bytes
from ntkdask.jobs.training import TrainingJob
from ntkdask.planning.resources import Resources
from ntkdask.report.page import write_report
from ntkdask.wording import format_bytes

console = Console()


class Bars:
    """A listener that draws one live progress bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def stage(self, label: str, total: int, done: int = 0) -> None:
        """A new bar, `done` of its tasks by an earlier run."""
        self._task = self._progress.add_task(label + (" (resumed)" if done else ""), total=total, completed=done)

    def task(self, label: str, done: Done) -> None:
        """One step of the current bar."""
        self._progress.advance(self._task)


def progress_bars() -> Progress:
    """Live bars, one for each stage."""
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def run_on_cluster(
    job: TrainingJob,
    folder: Path,
    spec: Job,
    *,
    scheduler: str | None,
    scheduler_file: Path | None,
    n_workers: int | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Run a job on an attached or a local cluster with live bars; writes the report and prints the result."""
    run = spec.spec.run
    attached = scheduler is not None or scheduler_file is not None
    options: dict[str, Any] = (
        {} if attached else {"n_workers": n_workers or run.n_workers, "worker_memory": memory_bytes(run.worker_memory)}
    )
    with cluster.connect(scheduler, scheduler_file=scheduler_file, **options) as client:
        console.print(workers.describe(client), highlight=False, soft_wrap=True)
        with progress_bars() as progress:
            metrics = run_job(
                job,
                folder,
                resources=workers.resources(client),
                client=client,
                listener=Bars(progress),
                overwrite=overwrite,
                resolved=spec.to_config(),
            )
    console.print(f"report: {write_report(folder)}", highlight=False, soft_wrap=True)
    for line in _result_lines(metrics):
        console.print(line, highlight=False)
    return metrics


def run_sweep(file: Path, folder: Path | None, *, scheduler: str | None, scheduler_file: Path | None) -> None:
    """Run a sweep with a live bar, in this process or with an attached cluster; writes its table and figures."""
    from ntkdask.jobs.sweep_spec import load_sweep
    from ntkdask.report.figures_empirical import write_figures
    from ntkdask.workflows.empirical.sweep import run_pntk_sweep

    spec, sweep, data = load_sweep(file)
    where = folder or spec.folder
    attached = scheduler is not None or scheduler_file is not None
    cluster_of = cluster.connect(scheduler, scheduler_file=scheduler_file) if attached else contextlib.nullcontext()
    with cluster_of as client, progress_bars() as progress:
        rows = run_pntk_sweep(sweep, data, where, client=client, plan=spec.plan, listener=Bars(progress))
    drawn = write_figures(rows, where / "figures")
    console.print(f"{len(rows)} cells: {where / 'table.csv'}, {len(drawn)} figures", highlight=False, soft_wrap=True)


def _result_lines(metrics: dict[str, Any]) -> list[str]:
    test, lines = metrics["test"], []
    alphas = ", ".join(f"{f['alpha']:.4g}" for f in metrics["folds"])
    if "accuracy" in test:
        spread = f" ± {100 * test['accuracy_std']:.2f}" if len(metrics["folds"]) > 1 else ""
        lines.append(f"test accuracy {100 * test['accuracy']:.2f} %{spread}, alpha {alphas}")
    else:
        lines.append(f"test MSE {test['mse']:.5g}, R² {test['r2']:.4f}, alpha {alphas}")
    memory = metrics["memory"]
    if memory["measured_peak_bytes"]:
        lines.append(
            f"{metrics['seconds']['total']:.1f} s, peak memory of a worker {format_bytes(memory['measured_peak_bytes'])}, "
            f"planned {format_bytes(memory['planned_bytes'])}"
        )
    return lines


def print_plan(
    job: TrainingJob,
    folder: Path,
    resources: Resources,
    *,
    client: Any = None,
    slots: int | None = None,
    calibrate: bool = True,
) -> None:
    """Print what a job will take; MemoryBudgetError or DiskSpaceError, with the numbers, when it cannot run.

    calibrate: measure its kernel, on the client's workers or here, and predict time. slots: plan for so many tasks at once, on workers
    like those that `resources` describe.
    """
    request, recipe = job.request(), job.recipe
    if calibrate:
        resources = recipe.measured(request, resources, Site(client=client), always=True)
    resources = replace(resources, slots=slots or resources.slots)
    plan = recipe.plan(request, resources)
    costs = recipe.costs(request, plan)
    table = Table(title=f"plan of {job.name}", show_header=False)
    rows = {
        "rows": f"{job.train.n:,} ({job.n_train:,} train a fit), {job.train.row_shape}",
        **recipe.size_words(request, plan),
        "tasks": f"{costs.tasks:,} on {resources.slots} slots, {plan.threads} threads each (solve: {plan.solve_threads})",
        "flops": f"{costs.flops:.3g}",
        **recipe.time_words(request, plan, resources),
        "disk": f"{format_bytes(costs.disk_bytes)} at most, {format_bytes(free_bytes(folder))} free",
    }
    budget = "unbounded" if resources.memory_bytes is None else format_bytes(resources.memory_bytes)
    for name, size in costs.memory.items():
        rows[f"memory of {name}"] = f"{format_bytes(size)} of {budget} a worker"
    if plan.device:
        rows["device memory"] = f"{format_bytes(costs.device_memory)} of {format_bytes(resources.device_bytes)}"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if costs.disk_bytes > free_bytes(folder):
        raise DiskSpaceError(
            f"{folder} has {format_bytes(free_bytes(folder))} free, the run writes {format_bytes(costs.disk_bytes)}."
        )


def run_benchmarks(names: list[str]) -> None:
    """Run benchmarks/<name>.py of the checkout this is called in, each in a process of its own."""
    folder = Path("benchmarks")
    known = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if not known:
        raise UserError("there is no folder benchmarks/ here: run this in a checkout of ntkdask.")
    for name in names:
        if name not in known:
            raise UserError(f"unknown benchmark {name!r}{nearest(name, known)}")
    for name in names or known:
        console.rule(name)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False)
