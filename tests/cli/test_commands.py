"""The command line as a user meets it: exit codes, messages without tracebacks, a whole small run."""

import functools
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import numpy as np
import pytest
from job_examples import COMMAND, class_data, damage, job_text, regression_data, stored
from typer.testing import CliRunner

from ntkdask.cli import commands as cli
from ntkdask.cli.commands import app
from ntkdask.datasets import open_dataset, write_dataset
from ntkdask.execution import cluster

JOB = job_text("tiny", run={"slab_rows": 32})
KERNEL_JOB = job_text(
    "kernel",
    network=None,
    features=None,
    kernel={"type": "RBF", "gamma": 0.2},
    solver={"alphas": {"logspace": [-3, 1, 5]}},
    run={"tile_rows": 40},
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a dataset d.zarr and a job file job.toml, where commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKDASK_DEBUG", raising=False)
    stored(tmp_path, *class_data(), "d.zarr")
    Path("job.toml").write_text(JOB)
    return tmp_path


class Answer:
    """Exit code and texts of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"ntkdask {importlib.metadata.version('ntkdask')}\n"


def ntkdask(*arguments: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Answer:
    """Run the entry point in this process."""
    monkeypatch.setattr(sys, "argv", ["ntkdask", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return Answer(code, out, err)


@pytest.fixture
def attached(one_worker):
    """The option that attaches a run to a scheduler, whose worker is at home in another folder."""
    return "--scheduler", one_worker.scheduler_info(n_workers=0)["address"]


@pytest.fixture
def call(monkeypatch, capfd):
    return lambda *arguments: ntkdask(*arguments, monkeypatch=monkeypatch, capfd=capfd)


# mistakes of the user: exit code 2, one message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.toml"], "JobError: job file nowhere.toml does not exist"),
        (["run", "job.toml", "--set", "solver.alpha=1.0"], "unknown key 'solver.alpha'; did you mean 'alphas'?"),
        (["run", "job.toml", "--set", "solver.alphas=[0.0]"], "all positive and finite"),
        (["run", "job.toml", "--set", "data.url=nowhere.zarr"], "there is no dataset at nowhere.zarr"),
        (["run", "job.toml", "--set", "data.url=job.toml"], "is not a dataset of ntkdask"),
        (["run", "job.toml", "--local", "--scheduler", "tcp://127.0.0.1:1"], "Give one of them"),
        (["plan", "job.toml", "--set", "features.n_components=20000"], "but a worker has"),
        (["plan", "job.toml", "--set", "data.split.test=2.0"], "between 0 and 1"),
        (["data", "import", "nowhere.csv", "e.zarr"], "DataError: there is no file or folder nowhere.csv"),
        (["data", "import", "sklearn:digits", "d.zarr"], "exists already"),
        (["data", "import", "sklearn:digit", "e.zarr"], "digit"),
        (["data", "info", "nowhere.zarr"], "there is no dataset"),
        (["status", "runs/nowhere"], "holds no run"),
        (["verify", "runs/nowhere"], "holds no"),
        (["bench"], "no folder benchmarks/"),
    ],
)
def test_mistakes(call, arguments, words):
    answer = call(*arguments)
    assert answer.code == 2
    assert words in answer.err
    assert answer.err.startswith("ntkdask: ")
    assert answer.err.count("\n") <= 3


def test_a_job_without_a_split(call):
    Path("job.toml").write_text(job_text("tiny", data={"split": None}))
    answer = call("run", "job.toml")
    assert answer.code == 2
    assert "no train and test parts: add split" in answer.err


def test_lines_with_nan_are_named_by_number(call):
    x, y = regression_data(20)
    x[[3, 8], 1] = np.nan
    np.savetxt("bad.csv", np.column_stack([x, y]), delimiter=",")
    answer = call("data", "import", "bad.csv", "bad.zarr")
    assert answer.code == 2
    assert "lines 4, 9" in answer.err  # of the file, counted from 1 as an editor does
    assert not Path("bad.zarr").exists()


def test_rows_that_overflow_are_named_by_number(call, attached):
    """Finite in the dataset, infinite in the job's dtype: found on a worker, told here, still a mistake of the user."""
    x, y = regression_data(100)
    x[77, 2] = 1e300
    write_dataset("d.zarr", x, y, overwrite=True)
    answer = call("run", "job.toml", "--set", "data.preprocess=[]", *attached)
    assert answer.code == 2
    assert "NaN or infinite values in row 77" in answer.err


def test_one_class_only(call):
    x, labels = class_data()
    write_dataset("d.zarr", x, 0 * labels, overwrite=True)
    answer = call("run", "job.toml")
    assert answer.code == 2
    assert "one class only" in answer.err


def test_train_and_test_of_other_shapes(call, tmp_path):
    x, labels = class_data()
    stored(tmp_path, x[:, :4], labels, "narrow.zarr")
    data = {"url": None, "split": None, "train": "d.zarr", "test": "narrow.zarr"}
    Path("job.toml").write_text(job_text("tiny", data=data))
    answer = call("run", "job.toml")
    assert answer.code == 2
    assert "row_shape is (6,)" in answer.err
    assert "(4,)" in answer.err


def test_usage_errors_of_the_shell(call):
    assert call("run").code == 2
    assert call("rum").code == 2
    assert call("run", "job.toml", "--overwrit").code == 2
    assert call("--help").code == 0


# failures: exit code 1


def test_a_scheduler_that_does_not_answer(call, monkeypatch):
    monkeypatch.setattr(cluster, "connect", functools.partial(cluster.connect, timeout=1.0))
    # were it left to Dask, the test would run into its own time limit
    with dask.config.set({"distributed.comm.timeouts.connect": "1h"}), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        answer = call("run", "job.toml", "--scheduler", f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert answer.code == 1
    assert "ClusterError: no scheduler answers" in answer.err
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_written(call):
    Path("file").write_text("")
    answer = call("run", "job.toml", "--folder", "file/run")
    assert answer.code == 1
    assert "StoreError" in answer.err


def test_unexpected_errors_are_one_line_unless_debugging(call, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("the unforeseen")

    monkeypatch.setattr("ntkdask.jobs.spec.load_job", broken)
    answer = call("plan", "job.toml")
    assert answer.code == 1
    assert "unexpected RuntimeError: the unforeseen" in answer.err
    assert "--debug" in answer.err
    monkeypatch.setenv("NTKDASK_DEBUG", "1")
    with pytest.raises(RuntimeError, match="the unforeseen"):
        call("plan", "job.toml")


def test_debug_shows_the_traceback():
    found = CliRunner().invoke(app, ["--debug", "plan", "nowhere.toml"])
    os.environ.pop("NTKDASK_DEBUG")
    assert type(found.exception).__name__ == "JobError"


# what works


def test_import_and_info(call):
    answer = call("data", "import", "sklearn:digits", "digits.zarr")
    assert answer.code == 0
    assert "all: 1,797 rows of (64,)" in answer.out
    answer = call("data", "info", "digits.zarr")
    assert answer.code == 0
    for words in ("1,797", "classification", open_dataset("digits.zarr").digest[:16]):
        assert words in answer.out
    assert call("data", "import", "sklearn:digits", "digits.zarr", "--overwrite").code == 0


def test_import_of_a_table_by_column_name(call):
    Path("t.csv").write_text("a,b,c\n1,2.5,3\n4,5.5,6\n7,8.5,9\n")
    assert call("data", "import", "t.csv", "t.zarr", "--target", "b").code == 0
    assert open_dataset("t.zarr").targets(0, 3).tolist() == [2.5, 5.5, 8.5]


def test_plan_prints_numbers_and_runs_nothing(call):
    answer = call("plan", "job.toml", "--n-workers", "2")
    assert answer.code == 0
    for words in (
        "150 (120 train a fit)",
        "5 of 32 rows",
        "2 slots",
        "flops",
        "free",
        "memory of gram-slab",
        "MiB of 922 MiB",
    ):
        assert words in answer.out
    assert not Path("runs").exists()


def test_doctor(call):
    answer = call("doctor")
    assert answer.code == 0
    for words in ("numpy", "BLAS", "GPU", "GB/s"):
        assert words in answer.out


def test_a_run_from_beginning_to_end(call, attached):
    """run on a cluster of its own, status, report, verify, damage, repair, run again elsewhere; then another job in the folder."""
    answer = call("run", "job.toml")
    assert answer.code == 0, answer.err
    assert "dashboard  http://127.0.0.1:" in answer.out
    assert "test accuracy" in answer.out
    run = Path("runs/tiny")
    first = json.loads((run / "metrics.json").read_text())
    assert first["job"]["name"] == "tiny"
    assert "<svg" in (run / "report.html").read_text()

    answer = call("status", "tiny")
    assert answer.code == 0
    assert "pending" not in answer.out
    assert "fold-0/predictions" in answer.out

    (run / "report.html").unlink()
    assert call("report", "tiny").code == 0
    assert (run / "report.html").exists()

    assert "every tile and state is whole" in call("verify", "tiny").out
    damage(run / "fold-0" / "predictions", (2, 0))
    answer = call("verify", "tiny")
    assert answer.code == 1
    assert "predictions tile (2, 0)" in answer.out
    assert "--repair" in answer.out
    assert call("verify", "tiny", "--repair").code == 0
    assert call("status", "tiny").out.count("pending") == 1

    assert call("run", "job.toml", *attached).code == 0
    again = json.loads((run / "metrics.json").read_text())
    assert again["folds"] == first["folds"]
    assert call("verify", "tiny").code == 0

    answer = call("run", "job.toml", "--set", "run.seed=1", *attached)
    assert answer.code == 2
    assert "seed: stored 0, asked 1" in answer.err
    assert "--overwrite" in answer.err
    assert call("run", "job.toml", "--set", "run.seed=1", "--overwrite", *attached).code == 0
    assert json.loads((run / "metrics.json").read_text())["folds"] != first["folds"]


def test_a_kernel_job_from_beginning_to_end(call, attached):
    """plan, run, status, report, a damaged tile, repair, run again; another gamma in the same folder."""
    Path("kernel.toml").write_text(KERNEL_JOB)
    answer = call("plan", "kernel.toml")
    assert answer.code == 0, answer.err
    for words in ("120 × 120 (float32)", "6 of 40 × 40, one triangle", "eigh (about", "memory of kernel-tile"):
        assert words in answer.out
    answer = call("run", "kernel.toml", *attached)
    assert answer.code == 0, answer.err
    assert "test accuracy" in answer.out
    run = Path("runs/kernel")
    first = json.loads((run / "metrics.json").read_text())
    assert first["job"]["kernel"] == {"type": "RBF", "gamma": 0.2}
    assert first["folds"][0]["solver"] == "eigh"
    assert "RBF" in (run / "report.html").read_text()
    answer = call("status", "kernel")
    assert "fold-0/kernel" in answer.out
    assert "pending" not in answer.out

    damage(run / "fold-0" / "kernel", (2, 1))
    answer = call("verify", "kernel")
    assert answer.code == 1
    assert "fold-0/kernel tile (2, 1)" in answer.out
    assert call("verify", "kernel", "--repair").code == 0
    assert call("run", "kernel.toml", *attached).code == 0
    again = json.loads((run / "metrics.json").read_text())
    assert again["folds"] == first["folds"]
    assert again["tasks"]["kernel-tile"]["count"] == 1

    answer = call("run", "kernel.toml", "--set", "kernel.gamma=0.3", *attached)
    assert answer.code == 2
    assert "kernel.gamma: stored 0.2, asked 0.3" in answer.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["kernel.type=RBFF"], "unknown kernel 'RBFF'; did you mean 'RBF'?"),
        (["solver.solver=chol"], "unknown solver 'chol'; did you mean 'cholesky'?"),
        (["solver.solver=eigh", "run.worker_memory=300 MiB"], "but a task has 270 MiB"),
    ],
)
def test_mistakes_in_a_kernel_job(call, settings, words):
    Path("kernel.toml").write_text(KERNEL_JOB)
    answer = call("plan", "kernel.toml", *[a for s in settings for a in ("--set", s)])
    assert answer.code == 2
    assert words in answer.err


def test_interrupting_a_run_says_how_to_go_on(folder):
    """Ctrl-C as a terminal sends it, to the command and all its processes: no traceback of any, and what to do next."""
    x, labels = class_data(2400, 32)
    write_dataset(folder / "d.zarr", x, labels, overwrite=True)
    process = subprocess.Popen(
        [*COMMAND, "job.toml", "--set", "run.slab_rows=4", "--set", "data.preprocess=[]"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        receipts = folder / "runs/tiny/fold-0/gram-0/receipts.jsonl"
        while not (receipts.exists() and receipts.stat().st_size):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    finally:
        timer.cancel()
        process.kill()
    assert process.returncode == 130
    assert err.strip() == ("ntkdask: interrupted; everything committed is kept: run the same command again to go on.")
