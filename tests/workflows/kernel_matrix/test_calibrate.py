"""Measuring what time a kernel takes, against a clock that the kernel itself turns; plans of matrices and of kernel ridge."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from job_examples import Counter, class_data, stored

from ntkdask.errors import InputError
from ntkdask.estimators import KernelRidgeClassifier
from ntkdask.execution import site as site_module
from ntkdask.execution.map_reduce import map_tiles
from ntkdask.execution.site import Site
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule, TrainingJob
from ntkdask.kernels import NTK, RBF, both
from ntkdask.networks import convolutional, fully_connected
from ntkdask.planning.pace import Pace
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_matrix import calibrate as module
from ntkdask.workflows.kernel_matrix.build import kernel_matrix, plan_kernel_matrix
from ntkdask.workflows.kernel_matrix.calibrate import calibrate
from ntkdask.workflows.kernel_matrix.plan import MatrixShape, plan_matrix
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.recipe import KernelRidgeRecipe

MILLISECOND, MICROSECOND = 1e-3, 1e-6


IMAGES = NTK(convolutional(1))


def pace(entry_seconds=MILLISECOND, share=1.0, row_seconds=0.0) -> Pace:
    return Pace(entry_seconds, share, row_seconds, 8, 1)


def images(n=30, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 6, 6, 2)).astype(np.float32)


# tiles of a plan


def planned(n=4000, m=None, **changes):
    return plan_matrix(RBF(0.1), MatrixShape(n, m, (10,), 40, "float32"), **changes)


def test_a_fast_kernel_keeps_its_tiles():
    assert planned(pace=pace(1e-8), slots=8).tile_rows == planned().tile_rows
    assert planned(pace=pace(1e-8), slots=8).tile_cols == planned().tile_cols


def test_a_slow_kernel_gets_smaller_ones():
    found = planned(pace=pace(), slots=2)
    assert found.tile_rows == found.tile_cols == 256
    assert found.tiles == found.tasks == 136
    assert found.tile_seconds == pytest.approx(65.536)
    assert found.work_seconds == pytest.approx(MILLISECOND * (4000**2 + 15 * 256**2 + 160**2) / 2)
    assert found.seconds == pytest.approx(found.work_seconds / 2)
    assert found.peak_bytes == found.memory_bytes
    json.dumps(found.to_json())


def test_tiles_that_were_asked_for_stay():
    assert planned(tile_rows=1000, pace=pace(), slots=2).tile_rows == 1000
    assert planned(n=1000, m=500, tile_rows=1000, tile_cols=500, pace=pace()).tile_cols == 500


def test_without_a_pace_there_are_no_seconds():
    found = planned()
    assert (found.tile_seconds, found.work_seconds, found.seconds) == (None, None, None)


# measuring


@dataclass
class Clock:
    """Stands still but for what kernels add to it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Costly:
    """A kernel of which an entry takes entry_seconds of a clock, `share` of it in a symmetric call.

    That takes its diagonal besides, a row as long as row_entries entries. Each kind of call takes `first` more at its first time.
    """

    clock: Clock = field(compare=False)
    entry_seconds: float
    calls: list = field(default_factory=list, compare=False)
    share: float = 0.5
    row_entries: float = 0.0
    first: float = 30.0

    def __call__(self, x, y=None):
        if y is None:
            self._spend("symmetric", len(x), self.share * len(x) ** 2 + self.row_entries * len(x))
        else:
            self._spend("rectangular", len(x), len(x) * len(y))
        return np.zeros((len(x), len(x if y is None else y)), x.dtype)

    def diagonal(self, x):
        self._spend("diagonal", len(x), self.row_entries * len(x))
        return np.zeros(len(x), x.dtype)

    def _spend(self, kind, rows, entries):
        self.clock.now += 0.0 if kind in (k for k, _ in self.calls) else self.first
        self.calls.append((kind, rows))
        self.clock.now += self.entry_seconds * entries

    def workspace_bytes(self, n, m, itemsize, row_shape=None):
        return n * m * itemsize


@pytest.fixture
def costly(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    return lambda entry_seconds, **changes: Costly(clock, entry_seconds, **changes)


@pytest.mark.parametrize("entry_seconds", [1e-9, MICROSECOND, MILLISECOND, 0.05, 10.0])
@pytest.mark.parametrize("most", [1, 3, 40, 2048])
def test_the_pace_without_compilation_in_a_second(costly, entry_seconds, most):
    kernel = costly(entry_seconds)
    found = calibrate(kernel, (3,), "float32", most, site=Site(threads=1))
    assert found.entry_seconds == pytest.approx(entry_seconds)
    assert found.symmetric_share == pytest.approx(0.5, rel=1e-4)
    assert found.threads == 1
    assert found.rows <= most
    smallest = min(most, 2)
    spent = kernel.clock.now - 3 * kernel.first
    assert spent <= max(2 * module.SECONDS, 4 * entry_seconds * smallest**2)
    # as large as a second allows
    assert found.rows == most or 21 * found.rows**2 * entry_seconds > 4 * module.SECONDS
    assert max(n for _, n in kernel.calls) == found.rows


@pytest.mark.parametrize(("share", "row_entries"), [(0.5, 0.0), (0.5, 40.0), (1.0, 1.0), (1.3, 0.5)])
def test_a_symmetric_tile_is_told_from_its_diagonal(costly, share, row_entries):
    """So that what a small tile took holds for a large one."""
    found = calibrate(
        costly(MILLISECOND, share=share, row_entries=row_entries), (3,), "float32", 2048, site=Site(threads=1)
    )
    assert found.rows < 40
    assert found.symmetric_share == pytest.approx(share, rel=1e-6)
    assert found.row_seconds == pytest.approx(row_entries * MILLISECOND, abs=1e-9)


def test_no_symmetric_tile_takes_less_than_a_triangle(costly):
    """A diagonal that took longer by itself than within the call, as on a busy machine."""
    kernel = costly(MILLISECOND, share=0.1, row_entries=1.0)
    found = calibrate(kernel, (3,), "float32", 16, site=Site(threads=1))
    assert found.symmetric_share == 0.5
    assert found.row_seconds == 0.0


def test_measuring_does_not_rival_the_matrix(costly):
    kernel = costly(MILLISECOND)
    calibrate(kernel, (3,), "float32", 100, entries=5000, site=Site(threads=1))
    assert kernel.clock.now - 3 * kernel.first <= 0.25 * 5


def test_every_thread_finds_something_to_do(costly):
    kernel = costly(1.0)
    calibrate(kernel, (3,), "float32", 100, site=Site(threads=16))
    assert kernel.calls[0] == ("rectangular", 8)


def test_rows_have_the_shape_and_dtype_of_the_data(costly):
    seen = []

    class Looking(Costly):
        def __call__(self, x, y=None):
            seen.append((x.shape[1:], x.dtype.name, np.shares_memory(x, x if y is None else y)))
            return super().__call__(x, y)

    base = costly(1.0)
    calibrate(Looking(base.clock, 1.0), (4, 5, 3), "float32", 2)
    assert {(shape, dtype) for shape, dtype, _ in seen} == {((4, 5, 3), "float32")}
    assert [shared for *_, shared in seen] == [False, True, False, True]


def test_a_kernel_refuses_its_rows_before_anything_is_planned():
    with pytest.raises(InputError, match=r"the network takes images, \(n, H, W, C\)"):
        calibrate(IMAGES, (10,), "float32", 8)


def test_a_real_kernel_in_this_process():
    found = calibrate(NTK(fully_connected(1)), (10,), "float64", 64, site=Site(threads=1))
    assert found.entry_seconds > 0
    assert found.symmetric_share > 0
    assert (found.rows, found.threads) == (64, 1)


def test_a_kernel_of_several_parts():
    assert calibrate(both(fully_connected(1)), (10,), "float32", 16).entry_seconds > 0


def test_on_the_workers(client):
    found = calibrate(RBF(0.1), (10,), "float32", 32, site=Site(client=client, threads=1), slots=2)
    assert (found.rows, found.threads) == (32, 1)


def test_every_slot_measures_at_once(monkeypatch):
    seen = []

    def spied(task, tiles, client, **keywords):
        seen.append(list(tiles))
        map_tiles(task, seen[-1], None, **keywords)

    monkeypatch.setattr(site_module, "map_tiles", spied)
    for slots, tasks in ((1, 1), (3, 3), (500, site_module.MOST_SAMPLES)):
        calibrate(RBF(0.1), (4,), "float32", 4, site=Site(client="a cluster"), slots=slots)
        assert len(seen.pop()) == tasks
    calibrate(RBF(0.1), (4,), "float32", 4, slots=8)
    assert len(seen.pop()) == 1


# matrices


def counted(monkeypatch, found: Pace) -> list:
    """Measurements that anyone takes: each gives `found`."""
    calls = []
    replacement = lambda *a, **k: calls.append((a, k)) or found  # noqa: E731
    for caller in ("kernel_matrix.sizes", "kernel_ridge.plan"):
        monkeypatch.setattr(f"ntkdask.workflows.{caller}.calibrate", replacement)
    return calls


def test_planning_a_matrix(monkeypatch):
    calls = counted(monkeypatch, pace(2 * MILLISECOND))
    x = np.zeros((3000, 6, 6, 2), np.uint8)
    found = plan_kernel_matrix(IMAGES, x)
    assert (found.n, found.m, found.dtype, found.slots) == (3000, None, "float32", 1)
    assert found.tile_rows == 192
    assert found.tile_seconds == pytest.approx(2 * MILLISECOND * 192**2)
    assert found.seconds == found.work_seconds
    many = plan_kernel_matrix(IMAGES, x, workers=8)
    assert many.slots == 8
    assert many.seconds < found.seconds / 7
    assert len(calls) == 2
    rectangular = plan_kernel_matrix(IMAGES, x, x[:100], plan=Plan(50, 50))
    assert (rectangular.m, rectangular.tiles) == (100, 120)
    assert rectangular.work_seconds == pytest.approx(2 * MILLISECOND * 3000 * 100)


def test_planning_without_measuring(monkeypatch):
    calls = counted(monkeypatch, pace())
    found = plan_kernel_matrix(RBF(0.1), np.zeros((3000, 10)), calibrate=False)
    assert (found.seconds, found.tile_rows, found.dtype) == (None, 768, "float64")
    assert not calls


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_are_counted(workers):
    with pytest.raises(InputError, match=r"workers is .* expected an integer >= 1"):
        plan_kernel_matrix(RBF(0.1), np.zeros((3, 10)), workers=workers)


def test_planning_for_a_cluster(client):
    here = plan_kernel_matrix(RBF(0.1), np.zeros((300, 10)), client=client)
    assert here.slots == 2
    assert here.seconds > 0
    assert plan_kernel_matrix(RBF(0.1), np.zeros((300, 10)), client=client, workers=6).slots == 6


def test_a_stored_matrix_takes_the_tiles_that_time_allows(tmp_path, monkeypatch):
    x = images(80)
    calls = counted(monkeypatch, pace(0.2))
    found = kernel_matrix(IMAGES, x, url=tmp_path / "k")
    assert found.chunksize == (16, 16)
    assert len(calls) == 1
    np.testing.assert_allclose(found.compute(), IMAGES(x), rtol=1e-5)
    stored_fingerprint = TileStore.open(tmp_path / "k").fingerprint
    assert "pace" not in json.dumps(stored_fingerprint)


def test_a_resumed_matrix_keeps_its_tiles_and_is_not_measured(tmp_path, monkeypatch):
    counted(monkeypatch, pace(0.2))
    first = kernel_matrix(IMAGES, images(40), url=tmp_path / "k").compute()
    calls = counted(monkeypatch, pace(MICROSECOND))
    again = kernel_matrix(IMAGES, images(40), url=tmp_path / "k")
    assert not calls
    assert (again.compute() == first).all()
    kernel_matrix(IMAGES, images(40), url=tmp_path / "asked", plan=Plan(20))
    kernel_matrix(RBF(0.1), images(40), url=tmp_path / "fast")
    assert not calls


# kernel ridge


def job(data, kernel=IMAGES, **changes) -> TrainingJob:
    recipe = KernelRidgeRecipe(kernel, KernelRidgeOptions((0.1, 1.0)))
    return TrainingJob("images", data, None, SplitRule(test=0.25), (), recipe, **changes)


@pytest.fixture
def data(tmp_path):
    _, labels = class_data(60)
    return stored(tmp_path, images(60), labels, kind="classification")


def test_a_job_is_measured_once_and_keeps_its_plan(tmp_path, monkeypatch, data):
    calls = counted(monkeypatch, pace(0.2))
    first = run_job(job(data), tmp_path / "run", listener=(heard := Counter()))
    assert len(calls) == 1
    assert first["plan"]["matrix_tile"] == 11
    assert first["plan"]["tile_rows"] == 7  # predictions: ⌊60 / 8⌋ rows
    assert heard.count("kernel-tile") == 15
    assert heard.count("predict") == 9
    assert "pace" not in first["plan"]
    calls = counted(monkeypatch, pace(MICROSECOND))
    again = run_job(job(data), tmp_path / "run")
    assert not calls
    assert again["plan"]["matrix_tile"] == 11
    assert again["folds"] == first["folds"]


def test_values_do_not_depend_on_the_pace(tmp_path, monkeypatch, data):
    counted(monkeypatch, pace(0.2))
    slow = run_job(job(data), tmp_path / "slow")
    counted(monkeypatch, pace(MICROSECOND))
    fast = run_job(job(data), tmp_path / "fast")
    assert fast["plan"]["matrix_tile"] != slow["plan"]["matrix_tile"]
    assert fast["test"]["mse"] == pytest.approx(slow["test"]["mse"], rel=1e-4)


def test_fast_kernels_are_measured_only_when_asked(monkeypatch, data):
    calls = counted(monkeypatch, pace())
    fast = job(data, RBF(0.1))
    assert fast.recipe.measured(fast.request(), Resources(), Site()).pace is None
    assert not calls
    assert fast.recipe.measured(fast.request(), Resources(), Site(), always=True).pace == pace()


def test_words_of_time(data):
    one = job(data)
    resources = Resources(None, 0, 1, 1, 2, pace(MILLISECOND))
    plan = one.recipe.plan(one.request(), resources)
    words = one.recipe.time_words(one.request(), plan, resources)
    assert words["pace"] == "1 ms an entry, measured on tiles of 8 × 8 with 1 thread"
    assert words["time of predict"] == "675 ms on 2 slots: 0.000187 slot-hours"  # 15 rows, 45 of training
    assert words["time of kernel-tile"].startswith("1.02 s a tile, ")  # 32²
    assert one.recipe.time_words(one.request(), plan, Resources()) == {}


def test_estimators_measure_what_they_store(tmp_path, monkeypatch):
    x, labels = images(60), class_data(60)[1]
    calls = counted(monkeypatch, pace(0.2))
    stored_fit = KernelRidgeClassifier(IMAGES, alphas=(0.1,), url=tmp_path / "fit").fit(x, labels)
    assert len(calls) == 1
    assert TileStore.open(tmp_path / "fit" / "kernel").tile_shape == (15, 15)
    KernelRidgeClassifier(IMAGES, alphas=(0.1,), url=tmp_path / "fit").fit(x, labels)
    here = KernelRidgeClassifier(IMAGES, alphas=(0.1,)).fit(x, labels)
    assert len(calls) == 1
    np.testing.assert_allclose(here.decision_function(x), stored_fit.decision_function(x), atol=1e-3)


def test_estimators_on_a_cluster(client):
    """Images through fit and predict of a real kernel, measured and computed by workers."""
    x, labels = images(40), class_data(40)[1]
    here = KernelRidgeClassifier(IMAGES, alphas=(1.0,)).fit(x, labels)
    there = KernelRidgeClassifier(IMAGES, alphas=(1.0,), client=client).fit(x, labels)
    np.testing.assert_allclose(there.decision_function(x), here.decision_function(x), atol=1e-4)
    assert there.score(x, labels) == here.score(x, labels)


def test_a_cluster_is_asked_once_what_it_offers(client, monkeypatch):
    asked, offered = [], Resources(2**30, 10 * 2**20, 1, 1, 4)
    monkeypatch.setattr("ntkdask.execution.workers.resources", lambda c: asked.append(c) or offered)
    found = plan_kernel_matrix(RBF(0.1), np.zeros((3000, 10)), client=client, calibrate=False)
    assert (asked, found.slots) == ([client], 4)
    assert found.memory_bytes <= 2**30
    # tiles are for the GPU that every worker has, and leave a tenth of it
    assert 0 < found.device_bytes <= 9 * 2**20
    # four slots of two workers are two of each
    assert plan_kernel_matrix(RBF(0.1), np.zeros((30, 10)), client=client, calibrate=False, workers=5).slots == 10
