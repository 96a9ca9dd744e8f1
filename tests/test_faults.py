"""Kills during a real run of the command line: it goes on, nothing finished is computed twice, the model is the same bits."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from job_examples import COMMAND, job_text

from ntkdask.datasets import import_dataset
from ntkdask.jobs.inspect import verify
from ntkdask.store import RECEIPTS
from ntkdask.workflows.model import load_model

JOB = job_text(
    "faults",
    data={"url": "digits.zarr"},
    network={"depth": 2},
    features={"n_components": 256},
    run={"n_workers": 2, "slab_rows": 24},
)
NODES = 2 * 75 - 1  # 1797 rows in slabs of 24


class Run:
    """`ntkdask run` in a process group of its own."""

    def __init__(self, folder: Path, name: str, job: str = "job.toml") -> None:
        self.folder = folder / name
        self.receipts = self.folder / "fold-0" / "gram-0" / RECEIPTS
        self.log = open(folder / f"{name}.log", "a")  # noqa: SIM115 (closed in finish)
        self.process = subprocess.Popen(
            [*COMMAND, job, "--folder", name], cwd=folder, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def computed(self) -> Counter:
        """How often each node of the Gram's tree has a receipt."""
        found: Counter = Counter()
        for line in self.receipts.read_text().splitlines() if self.receipts.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the end of a line that is being written, or never was
                row = json.loads(line)
                found.update(row["index"][:1] if "checksum" in row else [])
        return found

    def wait_for(self, condition, seconds: float = 90.0) -> bool:
        """True once the condition holds, False when the run ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.01)
        return True

    def workers(self) -> list[psutil.Process]:
        """The worker processes: children that multiprocessing spawned."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def kill_group(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        self.log.close()

    def finish(self, seconds: float = 120.0) -> dict:
        """The metrics of a run that ends well."""
        try:
            code = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.log.close()
        assert code == 0, self.text()
        return json.loads((self.folder / "metrics.json").read_text())

    def text(self) -> str:
        return Path(self.log.name).read_text()[-3000:]


def model(metrics: dict) -> str:
    """The model's content address: preprocessing, map, weights, intercept, alpha."""
    return Path(metrics["folds"][0]["model"]).name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder with data and job, metrics of a run without faults)"""
    folder = tmp_path_factory.mktemp("faults")
    import_dataset("sklearn:digits", folder / "digits.zarr")
    (folder / "job.toml").write_text(JOB)
    run = Run(folder, "undisturbed")
    metrics = run.finish()
    assert run.computed() == Counter(range(NODES))
    return folder, metrics


def test_a_worker_killed_mid_run(undisturbed):
    folder, expected = undisturbed
    run = Run(folder, "worker")
    assert run.wait_for(lambda: len(run.computed()) >= NODES // 4)
    run.workers()[0].kill()
    metrics = run.finish()
    assert model(metrics) == model(expected)
    assert metrics["test"] == expected["test"]
    # one receipt a node: what was lost had none, what had one was not done again
    assert run.computed() == Counter(range(NODES))
    assert metrics["tasks"]["gram-slab"]["count"] == NODES
    assert verify(run.folder) == []


def test_the_driver_killed_mid_run_and_resumed(undisturbed):
    """SIGKILL of driver, scheduler and workers at once, twice, at a third and two thirds of the slabs."""
    folder, expected = undisturbed
    for share in (3, 1.5):
        run = Run(folder, "driver")
        assert run.wait_for(lambda run=run, share=share: len(run.computed()) >= NODES / share)
        run.kill_group()
        assert not psutil.pid_exists(run.process.pid)
        assert len(run.computed()) < NODES
    # half a receipt and a writer's temporary file, as a kill may leave them
    with open(run.receipts, "a") as manifest:
        manifest.write('{"index": [7, 0], "checks')
    (run.receipts.parent / "c" / "0").mkdir(parents=True, exist_ok=True)
    (run.receipts.parent / "c" / "0" / "0.abc.partial").write_bytes(b"half")
    run = Run(folder, "driver")
    metrics = run.finish()
    assert model(metrics) == model(expected)
    assert metrics["test"] == expected["test"]
    assert run.computed() == Counter(range(NODES))
    assert metrics["tasks"]["gram-slab"]["count"] < NODES / 2
    assert verify(run.folder) == []


@pytest.mark.slow
def test_five_kills_at_random_moments(undisturbed):
    """Seeded moments over the whole run, from the first import to the report."""
    folder, expected = undisturbed
    rng = np.random.default_rng(20)
    duration, kills = expected["seconds"]["total"] + 3, 0
    for _ in range(5):
        run = Run(folder, "random")
        moment = time.monotonic() + rng.uniform(1.5, duration)
        run.wait_for(lambda moment=moment: time.monotonic() > moment)
        if run.process.poll() is None:
            run.kill_group()
            kills += 1
        else:
            run.finish()
    run = Run(folder, "random")
    metrics = run.finish()
    assert kills >= 2
    assert model(metrics) == model(expected)
    assert metrics["test"] == expected["test"]
    assert run.computed() == Counter(range(NODES))
    assert verify(run.folder) == []


# a kernel matrix and its factorisation


KERNEL_JOB = job_text(
    "kernel",
    data={"url": "digits.zarr", "preprocess": ["unit_norm"]},
    features=None,
    kernel={"type": "NTK"},
    solver={"alphas": [0.01], "solver": "tiled_cholesky"},
    run={"n_workers": 2, "tile_rows": 120},
)
SIDE = 12  # 1 437 training rows in tiles of 120
TRIANGLE = SIDE * (SIDE + 1) // 2


class KernelRun(Run):
    """A run of the kernel job; receipts of its matrix, or of its factor while it is there."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name, "kernel.toml")

    def receipts_of(self, what: str) -> Counter:
        found = self.folder.glob(f"fold-0/{what}/{RECEIPTS}")
        return sum((_indices(path) for path in found), Counter())


def _indices(path: Path) -> Counter:
    """How often each tile has a receipt."""
    found: Counter = Counter()
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if "checksum" in row:
                    found[tuple(row["index"])] += 1
    return found


@pytest.fixture(scope="module")
def kernel_run(undisturbed):
    """(folder with data and both jobs, metrics of the kernel job without faults)"""
    folder, _ = undisturbed
    (folder / "kernel.toml").write_text(KERNEL_JOB)
    run = KernelRun(folder, "kernel-undisturbed")
    metrics = run.finish()
    assert set(run.receipts_of("kernel").values()) == {1}
    assert run.receipts_of("kernel").total() == TRIANGLE
    return folder, metrics


def coefficients(metrics: dict) -> np.ndarray:
    found = load_model(metrics["folds"][0]["model"])
    return np.concatenate([found.coefficients, found.intercept[None]])


@pytest.mark.slow
def test_kernel_run_killed_in_its_matrix_and_in_its_factorisation(kernel_run):
    """SIGKILL of driver, scheduler and workers: half the matrix, then half the factor, then a worker alone."""
    folder, expected = kernel_run
    run = KernelRun(folder, "kernel-driver")
    assert run.wait_for(lambda: run.receipts_of("kernel").total() >= TRIANGLE // 2)
    run.kill_group()
    assert run.receipts_of("kernel").total() < TRIANGLE
    run = KernelRun(folder, "kernel-driver")
    assert run.wait_for(lambda: run.receipts_of("factors/*").total() >= TRIANGLE // 3)
    run.kill_group()
    kept = run.receipts_of("factors/*")
    assert 0 < kept.total() < TRIANGLE
    run = KernelRun(folder, "kernel-driver")
    seen: list[Counter] = []

    def further() -> bool:
        seen.append(run.receipts_of("factors/*"))
        return seen[-1].total() > kept.total()

    if run.wait_for(further):
        run.workers()[0].kill()
    metrics = run.finish()
    np.testing.assert_array_equal(coefficients(metrics), coefficients(expected))
    assert metrics["test"] == expected["test"]
    # one receipt a tile: what had one was not computed again
    assert run.receipts_of("kernel") == Counter(dict.fromkeys(run.receipts_of("kernel"), 1))
    assert run.receipts_of("kernel").total() == TRIANGLE
    assert all(set(counter.values()) == {1} for counter in seen if counter)
    assert "kernel-tile" not in metrics["tasks"]
    assert not list(run.folder.glob("fold-0/factors/*"))
    assert verify(run.folder) == []
