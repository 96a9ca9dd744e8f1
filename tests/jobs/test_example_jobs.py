"""The job and sweep files in jobs/ are ones that can be run: named after themselves, every key known, networks and maps built."""

from pathlib import Path

import numpy as np
import pytest

from ntkdask.datasets import write_dataset
from ntkdask.datasets.writer import write_parts
from ntkdask.jobs.spec import load_job
from ntkdask.jobs.sweep_spec import load_sweep

FOLDER = Path(__file__).parents[2] / "jobs"
FILES = sorted(FOLDER.glob("*.toml"))
JOBS = [path for path in FILES if not path.name.endswith(".sweep.toml")]
SWEEPS = [path for path in FILES if path.name.endswith(".sweep.toml")]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_jobs(path):
    if "PseudoNTK" in path.read_text():
        pytest.importorskip("torch")
    job = load_job(path)
    assert job.spec.name == path.name.removesuffix(".toml")
    assert (job.features is None) != (job.kernel is None)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_sweeps(path, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    text = path.read_text()
    for part in ("train", "test"):
        write_dataset(f"data/cifar10.zarr/{part}", images, np.arange(60) % 10)
    write_parts(Path("data/cifar10.zarr"), ["train", "test"])
    # of a dataset this small no more can be taken
    few = tmp_path / path.name
    few.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("train_rows", "test_rows"))))
    spec, sweep, _ = load_sweep(few)
    assert spec.name == path.name.removesuffix(".sweep.toml")
    assert len(sweep.networks) > 1
