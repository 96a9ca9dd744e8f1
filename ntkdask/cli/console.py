"""What the command line prints and starts: progress bars, plans, clusters for a run, benchmarks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from ntkdask.cli.terminal import facts, plain_console, text_column
from ntkdask.errors import DiskSpaceError, UserError, nearest
from ntkdask.execution import cluster, workers
from ntkdask.execution.site import Site
from ntkdask.execution.window import Done
from ntkdask.files import free_bytes
from ntkdask.jobs.run import run_job
from ntkdask.jobs.spec import Job, memory_bytes
from ntkdask.jobs.training import TrainingJob
from ntkdask.planning.resources import Resources
from ntkdask.report.page import write_report
from ntkdask.wording import format_bytes, printable

console = plain_console()


class Bars:
    """A listener of a run that draws a live progress bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def stage(self, label: str, total: int, done: int = 0) -> None:
        """Begin the bar of a stage; `done` of its `total` tasks were done by an earlier run."""
        words = printable(label) + (" (resumed)" if done else "")
        self._task = self._progress.add_task(words, total=total, completed=done)

    def task(self, label: str, done: Done) -> None:
        """Advance the current bar by one task."""
        self._progress.advance(self._task)


def progress_bars() -> Progress:
    """Live bars, one for each stage."""
    return Progress(
        text_column("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def run_on_cluster(
    job: TrainingJob,
    folder: Path,
    resolved: Job,
    *,
    scheduler: str | None,
    scheduler_file: Path | None,
    n_workers: int | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Run a job with live bars, write its report and print its result; on a cluster that runs, else on a local one.

    Parameters
    ----------
    job : TrainingJob
        What is run.
    folder : Path
        Folder of the run.
    resolved : Job
        The job file with every default, for the size of a local cluster and for the report.
    scheduler : str or None
        Address of a running scheduler.
    scheduler_file : Path or None
        File of a running scheduler.
    n_workers : int or None
        Workers of a local cluster; None: as the job file says.
    overwrite : bool
        Delete the run that is there and begin again.

    Returns
    -------
    dict
        The content of metrics.json.
    """
    attached = scheduler is not None or scheduler_file is not None
    options: dict[str, Any] = {}
    if not attached:
        run = resolved.spec.run
        options = {"n_workers": n_workers or run.n_workers, "worker_memory": memory_bytes(run.worker_memory)}
    with cluster.connect(scheduler, scheduler_file=scheduler_file, **options) as client:
        console.print(printable(workers.describe(client), lines=True), soft_wrap=True)
        with progress_bars() as progress:
            metrics = run_job(
                job,
                folder,
                resources=workers.resources(client),
                client=client,
                listener=Bars(progress),
                overwrite=overwrite,
                resolved=resolved.to_config(),
            )
    console.print(printable(f"report: {write_report(folder)}"), soft_wrap=True)
    for line in _result_lines(metrics):
        console.print(printable(line))
    return metrics


def run_sweep(file: Path, folder: Path | None, *, scheduler: str | None, scheduler_file: Path | None) -> None:
    """Run a sweep with a live bar, in this process or on a cluster that runs; writes its table and figures.

    `folder` is where they go, None: where the sweep's file says. `scheduler` or `scheduler_file` name the cluster.
    """
    from ntkdask.jobs.sweep_spec import load_sweep
    from ntkdask.report.figures_empirical import write_figures
    from ntkdask.workflows.empirical.sweep import run_pntk_sweep

    spec, sweep, data = load_sweep(file)
    sweep_folder = folder or spec.folder
    attached = scheduler is not None or scheduler_file is not None
    connection = cluster.connect(scheduler, scheduler_file=scheduler_file) if attached else contextlib.nullcontext()
    with connection as client, progress_bars() as progress:
        rows = run_pntk_sweep(sweep, data, sweep_folder, client=client, plan=spec.plan, listener=Bars(progress))
    figures = write_figures(rows, sweep_folder / "figures")
    words = f"{len(rows)} cells: {sweep_folder / 'table.csv'}, {len(figures)} figures"
    console.print(printable(words), soft_wrap=True)


def _result_lines(metrics: dict[str, Any]) -> list[str]:
    """The test error, the chosen alphas, time and memory of a run, as lines for the terminal."""
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
    """Print what a job will take.

    Parameters
    ----------
    job : TrainingJob
        The job; nothing of it is run.
    folder : Path
        Folder of its run, whose disk must have room.
    resources : Resources
        The workers that it will run on.
    client : distributed.Client, optional
        The cluster, where there is one.
    slots : int, optional
        Plan for so many tasks at a time, on workers of the size that `resources` describe.
    calibrate : bool, optional
        Measure the job's kernel, on the client's workers or here, to predict the time.

    Raises
    ------
    MemoryBudgetError, DiskSpaceError
        Where the job cannot run; the message has the numbers.
    """
    request, recipe = job.request(), job.recipe
    if calibrate:
        resources = recipe.measured(request, resources, Site(client=client), always=True)
    resources = replace(resources, slots=slots or resources.slots)
    plan = recipe.plan(request, resources)
    costs = recipe.costs(request, plan)
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
    console.print(facts(f"plan of {job.name}", rows))
    if costs.disk_bytes > free_bytes(folder):
        raise DiskSpaceError(
            f"{folder} has {format_bytes(free_bytes(folder))} free, the run writes {format_bytes(costs.disk_bytes)}."
        )


def run_benchmarks(names: list[str]) -> None:
    """Run benchmarks/<name>.py of the checkout in the current folder, each in its own process; all of them where `names` is empty."""
    folder = Path("benchmarks")
    available = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if not available:
        raise UserError("there is no folder benchmarks/ here: run this in a checkout of ntkdask.")
    for name in names:
        if name not in available:
            raise UserError(f"unknown benchmark {name!r}{nearest(name, available)}")
    for name in names or available:
        console.rule(printable(name))
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False)
