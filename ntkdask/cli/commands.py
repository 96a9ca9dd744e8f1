"""The command line: `ntkdask data | plan | run | sweep | status | verify | report | doctor | bench`.

Exit codes: 0 done, 1 a failure of the machine or the run, 2 a mistake of the user. Errors are one message without a traceback;
`--debug` (or NTKDASK_DEBUG=1) shows it. Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

_INTERRUPTED = 130

app = typer.Typer(
    help="Neural tangent kernels at any scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Import datasets into Zarr and look at them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file (TOML); examples in jobs/.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, runs/<name>, or its name.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value (a TOML value).")]
Folder = Annotated[Path | None, typer.Option(help="Where the run goes; runs/<name> by default.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a running scheduler, tcp://host:8786.")]
SchedulerFile = Annotated[Path | None, typer.Option(help="Scheduler file of a running scheduler.")]
Local = Annotated[bool, typer.Option("--local", help="Start a cluster on this machine (the default).")]
Workers = Annotated[int | None, typer.Option(help="Workers of a local cluster.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ntkdask {importlib.metadata.version('ntkdask')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    if debug:
        os.environ["NTKDASK_DEBUG"] = "1"


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(help="A file, folder or archive, or sklearn:digits.")],
    url: Annotated[str, typer.Argument(help="Where the Zarr dataset goes.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Target: column of a table by name or index (default: the last), or array of a file by name."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="classification, regression or unlabelled (default: told by the targets).")
    ] = None,
    header: Annotated[
        str | None,
        typer.Option(help="yes or no: whether a CSV begins with names of columns (default: told by its lines)."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Array of rows in an .npz, HDF5, NetCDF or Zarr file, by name (default: x).")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format, when the name does not tell.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is there.")] = False,
) -> None:
    """Read a dataset in its own format and write it to Zarr, streaming; archives are never unpacked to disk."""
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    from ntkdask.cli.terminal import say, text_column
    from ntkdask.datasets import import_dataset

    with Progress(
        SpinnerColumn(), text_column("importing"), text_column("{task.completed:,.0f} rows"), TimeElapsedColumn()
    ) as bar:
        task = bar.add_task("import", total=None)
        parts = import_dataset(
            source,
            url,
            format=format,
            target=target,
            kind=kind,
            header=header,
            rows=rows,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for name, dataset in parts.items():
        say(f"{name}: {dataset.n:,} rows of {dataset.row_shape} {dataset.dtype} -> {dataset.url}")
    for fact in _what_was_taken(next(iter(parts.values()))):
        say(fact)


def _what_was_taken(dataset: Any) -> list[str]:
    """What an import found out by itself, a line each: the target and its kind, the header, what was left out."""
    told = dataset.provenance
    target = repr(told["target"]) if "target" in told else "as the format has it"
    if "target_column" in told:
        target = f"column {target}, number {told['target_column']}"
    classes = dataset.class_names or ()
    named = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
    kind = f"{dataset.kind}, {len(classes)} classes ({named})" if classes else dataset.kind
    lines = ["no target: unlabelled" if dataset.kind == "unlabelled" else f"target: {target}; {kind}"]
    if "header" in told:
        lines.append(
            "header: yes, the first line names the columns" if told["header"] else "header: no, the first line is a row"
        )
    for key, words in (
        ("columns_left_out", "columns left out"),
        ("arrays_left_out", "arrays left out"),
        ("exif_orientation", "EXIF orientation"),
    ):
        if key in told:
            value = told[key]
            lines.append(f"{words}: {', '.join(map(repr, value)) if isinstance(value, list) else value}")
    return lines


@data_app.command("info")
def data_info(url: Annotated[str, typer.Argument(help="A dataset's url.")]) -> None:
    """Shape, classes, digest and provenance of a dataset."""
    from ntkdask.cli.terminal import facts, plain_console
    from ntkdask.datasets import open_parts

    for name, dataset in open_parts(url).items():
        rows: dict[str, Any] = {
            "rows": f"{dataset.n:,}",
            "row": f"{dataset.row_shape} {dataset.dtype}",
            "kind": dataset.kind,
            "classes": ", ".join(dataset.class_names or ()) or "none",
            "digest": dataset.digest,
            **dataset.provenance,
        }
        plain_console().print(facts(f"{url} ({name})", rows))


def _training_job(file: Path, settings: list[str] | None, folder: Path | None) -> tuple[Any, Path, Any]:
    """(job to run, folder of its run, resolved job file); the job is one of ridge on features or of kernel ridge."""
    from ntkdask.files import home_expanded
    from ntkdask.jobs.spec import load_job, to_training_job

    resolved = load_job(file, settings or ())
    run_folder = folder or home_expanded(resolved.spec.run.folder or Path("runs") / resolved.spec.name)
    return to_training_job(resolved), run_folder, resolved


@app.command()
def plan(
    job: JobFile,
    set_: Settings = None,
    folder: Folder = None,
    scheduler: Scheduler = None,
    scheduler_file: SchedulerFile = None,
    n_workers: Workers = None,
    workers_: Annotated[
        int | None, typer.Option("--workers", min=1, help="Plan for so many workers of the same size.")
    ] = None,
    calibrate: Annotated[bool, typer.Option(help="Measure the kernel for a second to predict time.")] = True,
) -> None:
    """What a job will take, before it runs: tiles, time, tasks, flops, disk, and each worker's memory against its budget."""
    from ntkdask.cli.console import print_plan
    from ntkdask.execution import cluster, workers
    from ntkdask.jobs.spec import memory_bytes

    training, run_folder, resolved = _training_job(job, set_, folder)
    if scheduler or scheduler_file:
        with cluster.connect(scheduler, scheduler_file=scheduler_file) as client:
            resources = workers.resources(client)
            slots_of_one = max(1, resources.slots // len(workers.worker_facts(client)))
            slots = workers_ and workers_ * slots_of_one
            print_plan(training, run_folder, resources, client=client, slots=slots, calibrate=calibrate)
        return
    options = resolved.spec.run
    resources = workers.local_resources(n_workers or options.n_workers, memory_bytes(options.worker_memory))
    print_plan(training, run_folder, resources, slots=workers_, calibrate=calibrate)


@app.command()
def run(
    job: JobFile,
    set_: Settings = None,
    folder: Folder = None,
    scheduler: Scheduler = None,
    scheduler_file: SchedulerFile = None,
    local: Local = False,
    n_workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, deleting the run that is there.")
    ] = False,
) -> None:
    """Run a job, or go on with it where it stopped; writes metrics.json and report.html to its folder."""
    from ntkdask.cli.console import run_on_cluster
    from ntkdask.errors import JobError

    if local and (scheduler or scheduler_file):
        raise JobError(
            "--local starts a cluster here; --scheduler and --scheduler-file use one that runs. Give one of them."
        )
    training, run_folder, resolved = _training_job(job, set_, folder)
    run_on_cluster(
        training,
        run_folder,
        resolved,
        scheduler=scheduler,
        scheduler_file=scheduler_file,
        n_workers=n_workers,
        overwrite=overwrite,
    )


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file (TOML): jobs/*-pseudo-ntk.toml.")],
    folder: Folder = None,
    scheduler: Scheduler = None,
    scheduler_file: SchedulerFile = None,
) -> None:
    """Compare pseudo-NTK and empirical NTK over networks, widths and epochs, or go on with it; writes a table and figures."""
    from ntkdask.cli.console import run_sweep

    run_sweep(file, folder, scheduler=scheduler, scheduler_file=scheduler_file)


@app.command()
def status(run: RunFolder) -> None:
    """How far a run has come, stage by stage."""
    from rich.table import Table
    from rich.text import Text

    from ntkdask.cli.terminal import plain_console
    from ntkdask.jobs import inspect
    from ntkdask.wording import printable

    table = Table("stage", "done", "state", title=printable(_run_folder(run)))
    for stage in inspect.status(_run_folder(run)):
        state = "finished" if stage.finished else Text("pending", style="yellow")
        table.add_row(printable(stage.name), f"{stage.done}/{stage.total}", state)
    plain_console().print(table)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder or name; or a dataset, a stored matrix.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended, mark the rest to be computed again.")
    ] = False,
) -> None:
    """Read everything that is stored and check it against its checksums; exit code 1 when something is damaged.

    Of a dataset every row is read and its digest computed again.
    """
    from ntkdask.cli.terminal import say
    from ntkdask.jobs import inspect

    damage = inspect.verify(_run_folder(run), repair)
    for item in damage:
        say(f"damaged: {item}")
    for path in inspect.without_checksum(_run_folder(run)):
        say(f"no checksum recorded: {path} (of an earlier release)")
    if damage:
        typer.echo(
            "mended, or marked as pending: run the job again to compute what is missing."
            if repair
            else "run again with --repair to have it mended or computed again; a dataset is imported again with --overwrite."
        )
        raise typer.Exit(0 if repair else 1)
    typer.echo("every tile and state is whole.")


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html from a finished run's metrics.json."""
    from ntkdask.cli.terminal import say
    from ntkdask.report.page import write_report

    say(write_report(_run_folder(run)))


@app.command()
def doctor(folder: Annotated[Path, typer.Argument(help="Folder for the store write test.")] = Path(".")) -> None:
    """What this machine offers: versions, cores, memory, BLAS and its rate, the GPU or why it is not used, a test of the disk."""
    from rich.table import Table
    from rich.text import Text

    from ntkdask.cli.doctor import diagnose
    from ntkdask.cli.terminal import plain_console
    from ntkdask.wording import printable

    table = Table("check", "", "found", "advice")
    marks = {True: Text("ok", style="green"), False: Text("no", style="red"), None: Text()}
    for f in diagnose(folder):
        table.add_row(printable(f.name), marks[f.ok], printable(f.detail), printable(f.advice or ""))
    plain_console().print(table)


@app.command()
def bench(names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run; all by default.")] = None) -> None:
    """Run the benchmarks of a checkout (benchmarks/); each compares with other programs, or with what the machine can do at most."""
    from ntkdask.cli.console import run_benchmarks

    run_benchmarks(names or [])


def _run_folder(run: Path) -> Path:
    """The folder of a run that was given by its folder or by its name."""
    from ntkdask.files import home_expanded

    run = home_expanded(run)
    # os.path.exists is False for a name that no file can have, where Path.exists raises
    return run if os.path.exists(run) or not os.path.exists(Path("runs") / run) else Path("runs") / run


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: ends the command, without the messages of Dask, Tornado and asyncio about the cluster that stops."""
    logging.disable()
    signal.default_int_handler(number, frame)


def main() -> None:
    """Run the command line; an error becomes one message and an exit code."""
    from ntkdask.cli.terminal import say
    from ntkdask.errors import NtkdaskError

    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except NtkdaskError as error:
        if os.environ.get("NTKDASK_DEBUG"):
            raise
        say(f"ntkdask: {type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # Typer turns Ctrl-C into this without a word
            typer.echo(
                "ntkdask: interrupted; everything committed is kept: run the same command again to go on.", err=True
            )
        raise
    except Exception as error:
        if os.environ.get("NTKDASK_DEBUG"):
            raise
        say(f"ntkdask: unexpected {type(error).__name__}: {error}\nRun again with --debug for the traceback.", err=True)
        sys.exit(1)
