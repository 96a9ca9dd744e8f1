"""Runs of the first release: finished ones open, verify and predict, whatever has moved in the code since; matrices go on.

fixtures/first_release.tar.gz was made by its code: a ridge run cut off in the middle, a finished one, a kernel matrix cut off in the
middle, and what they should end in. Absolute paths in it are written @RUN@. When numerics or formats change, unfinished runs are
refused with the key that says so; finished ones still open.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from job_examples import ONE_THREAD, Counter, site_of

import ntkdask as nd
from ntkdask.datasets.rows import MemoryRows
from ntkdask.errors import FingerprintError
from ntkdask.jobs.inspect import status, verify
from ntkdask.jobs.run import run_job
from ntkdask.jobs.spec import build_job, to_training_job
from ntkdask.planning.resources import RidgePlan
from ntkdask.store import TileStore
from ntkdask.workflows.model import load_model
from ntkdask.workflows.predict import predict

ARCHIVE = Path(__file__).parent / "fixtures" / "first_release.tar.gz"


@pytest.fixture
def release(tmp_path):
    """The folder of the old runs, and what they should end in."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "first_release"
    for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
        path.write_text(path.read_text().replace("@RUN@", str(folder)))
    with np.load(folder / "expected.npz") as found:
        return folder, dict(found)


def job_of(folder):
    table = json.loads((folder / "job.json").read_text())
    table["data"]["url"] = str(folder / "data.zarr")
    return to_training_job(build_job(table))


def test_an_unfinished_run_is_refused_by_the_key_that_differs(release):
    """Its sums are about the origin, those of today about a centre: they do not add."""
    folder, _ = release
    before = TileStore.open(folder / "ridge-cut" / "fold-0" / "gram-0").receipts
    with pytest.raises(FingerprintError, match=r"numerics: stored 2, asked \d+\nGive the run another name"):
        run_job(job_of(folder), folder / "ridge-cut", resources=ONE_THREAD)
    assert before == TileStore.open(folder / "ridge-cut" / "fold-0" / "gram-0").receipts
    assert verify(folder / "ridge-cut") == []


def test_a_finished_run_opens_verifies_and_predicts(release):
    folder, expected = release
    run = folder / "ridge"
    assert verify(run) == []
    assert all(stage.finished for stage in status(run))
    metrics = json.loads((run / "metrics.json").read_text())
    plan = RidgePlan("float64", 60, 60, 60, threads=1, solve_threads=1, device=False)
    found = predict(load_model(metrics["folds"][0]["model"]), MemoryRows(expected["x"]), plan, 2, site_of())
    np.testing.assert_allclose(found, expected["predictions"], rtol=0, atol=1e-12)


def test_an_unfinished_kernel_matrix_goes_on(release):
    folder, expected = release
    before = TileStore.open(folder / "matrix-cut").receipts
    kernel, plan = nd.kernels.NTK(nd.fully_connected(2)), nd.Plan(16, dtype="float64")
    found = nd.kernel_matrix(
        kernel, expected["x"], url=folder / "matrix-cut", plan=plan, listener=(listener := Counter())
    )
    assert listener.count("kernel-tile") == 10 - len(before)
    np.testing.assert_allclose(found.compute(), expected["matrix"], rtol=0, atol=1e-12)
