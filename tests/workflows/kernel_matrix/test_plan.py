"""Sizes of tiles: even, within the budget, refused with numbers; workers stay below the plan."""

import numpy as np
import pytest
from job_examples import stored
from matrix_examples import PAIR, kernel, plan_of, rows

from ntkdask import files
from ntkdask.datasets.rows import DatasetRows
from ntkdask.errors import DiskSpaceError, MemoryBudgetError
from ntkdask.execution import cluster, workers
from ntkdask.kernels import ArcCosine
from ntkdask.planning.tiles import Plan
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.kernel_matrix.plan import MatrixShape, plan_matrix

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 1000, 4000, 8192, 34_298, 60_000])
def test_tiles_are_even_and_a_few_when_n_is_small(n):
    plan = plan_of(n)
    blocks = -(-n // plan.tile_rows)
    assert plan.tile_rows == plan.tile_cols <= 2048
    assert plan.tasks == blocks * (blocks + 1) // 2
    assert blocks >= min(4, -(-n // 256)) - 1
    assert n < 2**13 or plan.tile_rows > 1900


def test_tiles_follow_the_budget():
    small, large = plan_of(budget=360 * MIB), plan_of(budget=2 * GIB)
    assert small.tile_rows < large.tile_rows == 2048
    assert small.memory_bytes <= 360 * MIB
    assert large.memory_bytes <= 2 * GIB
    assert plan_of(budget=64 * GIB) == large
    assert plan_of(1000, 300).tasks == 4 * 2
    assert plan_of(60_000, dtype="float32").disk_bytes == pytest.approx(60_000**2 * 4 / 2, rel=0.1)
    images = {"row_shape": (32, 32, 3), "row_bytes": 3072}
    assert not plan_of(60_000, budget=800 * MIB, **images).keeps_rows
    assert plan_of(60_000, budget=4 * GIB, **images).keeps_rows


def test_nothing_fits():
    with pytest.raises(
        MemoryBudgetError, match=r"kernel-tile of NTK \(row_shape=\(9,\), float32\), the process itself 320 MiB"
    ):
        plan_of(budget=320 * MIB)
    with pytest.raises(
        MemoryBudgetError, match=r"for tiles of 8192 x 8192 .* a task has 512 MiB. Use tile_rows <= \d+"
    ):
        plan_of(budget=512 * MIB, tile_rows=8192)
    with pytest.raises(MemoryBudgetError, match=r"on the device.* for one row, but a task has 100 B. Give a GPU"):
        plan_of(device_budget=100)


def test_the_device_bounds_tiles_too():
    plan = plan_of(device_budget=8 * MIB)
    assert plan.tile_rows < 2048
    assert 0 < plan.device_bytes <= 8 * MIB
    assert plan_of().device_bytes == 0


def test_a_run_that_does_not_fit_starts_nothing(tmp_path, monkeypatch):
    with pytest.raises(MemoryBudgetError):
        kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(memory_bytes=300 * MIB))
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(DiskSpaceError, match=r"takes up to 28.1 KiB at .*, where 1,000 B are free"):
        kernel_matrix(kernel(), rows(), url=tmp_path / "k")
    assert not (tmp_path / "k" / "c").exists()


@pytest.mark.parametrize("k", [kernel(3), ArcCosine(1), PAIR])
def test_workers_stay_below_the_plan(tmp_path, k):
    """The highest memory that a fresh worker ever held, against what was promised before it ran."""
    x = rows(2500, 512).astype("float32")
    with cluster.connect(n_workers=1, cuda=False, worker_memory="2 GiB") as client:
        budget = workers.resources(client).memory_bytes
        kernel_matrix(k, x, url=tmp_path / "k", client=client, plan=Plan(1280))
    plan = plan_matrix(k, MatrixShape(2500, None, (512,), 2048, "float32"), budget, tile_rows=1280)
    store = TileStore.open(tmp_path / "k" / "ntk" if k is PAIR else tmp_path / "k")
    peak = max(r.peak_bytes for r in store.receipts.values())
    assert peak <= plan.memory_bytes <= budget
    # a promise that nothing could break is no promise
    assert plan.memory_bytes < 3 * peak


def test_rows_are_read_once_a_process(tmp_path, monkeypatch):
    reads = []
    batches = DatasetRows.batches
    monkeypatch.setattr(
        DatasetRows, "batches", lambda self, start, stop, size: reads.append(start) or batches(self, start, stop, size)
    )
    kernel_matrix(kernel(), stored(tmp_path, rows(), np.zeros(60)), url=tmp_path / "k", plan=Plan(10))
    assert sorted(reads) == [0, 10, 20, 30, 40, 50]
