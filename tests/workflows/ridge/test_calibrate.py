"""What time features and Gram sums take: measuring against a clock that the map itself turns, and a job's words."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from job_examples import ONE_THREAD, Counter, Killed, class_data, feature_map, ridge_job, site_of, stored

from ntkdask.errors import InputError
from ntkdask.features import NTKRandomFeatures, Nystrom
from ntkdask.features.base import FeatureMapBase
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule
from ntkdask.kernels import NTK
from ntkdask.networks import convolutional, fully_connected
from ntkdask.planning.pace import Pace, RowPace
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.registry import register
from ntkdask.workflows.ridge import calibrate as module
from ntkdask.workflows.ridge.calibrate import calibrate_features
from ntkdask.workflows.ridge.fit import RidgeOptions


@dataclass(frozen=True)
class Costly:
    """A map of which a row takes row_seconds of a clock, and the first call `first` more."""

    clock: SimpleNamespace = field(compare=False)
    row_seconds: float
    calls: list = field(default_factory=list, compare=False)
    first: float = 30.0
    n_components = 3

    def __call__(self, x):
        self.clock.now += (0.0 if self.calls else self.first) + self.row_seconds * len(x)
        self.calls.append(x.shape)
        return np.zeros((len(x), self.n_components), x.dtype)


@register("feature map")
@dataclass(frozen=True)
class Slow(FeatureMapBase):
    """Rows repeated, at a pace that is no parameter of the map."""

    n_components: int
    clock: ClassVar[SimpleNamespace]
    row_seconds: ClassVar[float]

    def __call__(self, x):
        self.clock.now += self.row_seconds * len(x)
        return np.tile(x, (1, self.n_components // x.shape[1]))

    def workspace_bytes(self, n, itemsize, row_shape=None):
        return n * self.n_components * itemsize


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what maps, and products in `sums`, add to it."""
    found = SimpleNamespace(now=0.0, products=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: found.now))

    class Sums(module.GramSums):
        def add(self, phi, y, weights=None, product=None):
            found.now += found.products
            super().add(phi, y, weights, product)

    monkeypatch.setattr(module, "GramSums", Sums)
    return found


def time_words(job, resources):
    request = job.request()
    return job.recipe.time_words(request, job.recipe.plan(request, resources), resources)


@pytest.mark.parametrize("row_seconds", [1e-9, 1e-3, 0.05, 10.0])
@pytest.mark.parametrize("batch_rows", [1, 3, 40, 4096])
def test_the_pace_without_the_first_call_in_about_a_second(clock, row_seconds, batch_rows):
    clock.products = 0.5
    features = Costly(clock, row_seconds)
    found = calibrate_features(features, (2, 5), "float32", batch_rows, 3, site=site_of())
    assert found.row_seconds == pytest.approx(row_seconds, rel=1e-4)
    assert found.product_rate == pytest.approx(batch_rows * 9 / 0.5)
    assert found.threads == 1
    assert found.rows <= batch_rows
    assert all(shape[1:] == (2, 5) for shape in features.calls)
    mapped = clock.now - features.first - 2 * clock.products
    assert mapped <= max(2 * module.SECONDS, 4 * row_seconds)
    # as large as a second allows
    assert found.rows == batch_rows or 4 * found.rows * row_seconds > module.SECONDS


def test_large_products_are_measured_on_fewer_columns(clock):
    clock.products = 2.0
    found = calibrate_features(None, (2,), "float32", 10, 100_000, site=site_of())
    assert found.product_rate == pytest.approx(10 * module.MOST_COLUMNS**2 / 2.0)
    assert found.row_seconds == 0.0


def test_a_real_map_on_a_cluster(one_worker):
    found = calibrate_features(feature_map(), (6,), "float32", 64, 48, site=site_of(client=one_worker), slots=1)
    assert found.row_seconds > 0
    assert found.product_rate > 0
    assert found.threads == 1


def test_rows_that_do_not_fit_are_the_maps_error():
    first = replace(feature_map(), network=fully_connected(1))
    with pytest.raises(InputError):
        calibrate_features(first, (), "float32", 8, 48, site=site_of())


def test_words_of_time(tmp_path):
    data = stored(tmp_path, *class_data(120))
    resources = Resources(None, 0, 1, 1, 2, row_pace=RowPace(0.5, 48.0**2, 16, 1))
    job = ridge_job(data, split=SplitRule(folds=4))
    words = time_words(job, resources)
    assert words["pace"] == "500 ms a row of features, measured on batches of 16 with 1 thread"
    # four fits of 90 rows, half a second of features and one of product a row, a slab a fit and so two rounds of two
    assert words["time of gram-slab"] == "4 min 30 s on 2 slots: features 90 s, products 3 min 00 s"
    assert words["time of predict"] == "60 s on 2 slots"
    assert job.recipe.time_words(job.request(), job.recipe.plan(job.request(), resources), Resources()) == {}
    again = ridge_job(data, split=SplitRule(folds=4), options=RidgeOptions((0.1, 1.0), selection="loo"))
    words = time_words(again, resources)
    assert words["time of gram-slab"].startswith("9 min 00 s")


@pytest.mark.parametrize(("row_seconds", "count"), [(0.0, 1), (0.1, 1), (0.5, 4), (5.0, 31), (50.0, 400)])
def test_slow_features_cut_slabs_and_predictions_by_time(tmp_path, clock, row_seconds, count):
    """Of 400 rows, one slab: 2^i slabs of at most 90 s, a row each where even that takes longer."""
    job = ridge_job(stored(tmp_path, *class_data(400)), features=Costly(clock, row_seconds))
    request, here = job.request(), Resources()
    measured = job.recipe.measured(request, here, site_of())
    # the pace of fast maps is not told, so that it decides nothing
    assert (measured == here) == (count == 1)
    plan = job.recipe.plan(request, measured)
    assert -(-400 // plan.slab_rows) == count
    assert plan.slab_rows * row_seconds <= 90 or plan.slab_rows == 1
    assert max(plan.batch_rows, plan.tile_rows) <= plan.slab_rows
    asked = replace(request, plan=Plan(tile_rows=300))
    assert job.recipe.measured(asked, here, site_of()) == here


def test_fast_features_are_told_by_two_calls(clock):
    features = Costly(clock, 1e-3)
    found = calibrate_features(features, (2,), "float32", 4096, 3, site=site_of(), enough=0.02)
    assert found.row_seconds == pytest.approx(1e-3)
    assert [shape[0] for shape in features.calls] == [2, 2]


def test_a_run_keeps_the_slabs_of_its_first_pace(tmp_path, clock, monkeypatch):
    """The second run measures nothing, whatever the pace is then."""
    data = stored(tmp_path, *class_data(400))
    monkeypatch.setattr(Slow, "clock", clock, raising=False)

    def go(row_seconds, listener):
        monkeypatch.setattr(Slow, "row_seconds", row_seconds, raising=False)
        return run_job(ridge_job(data, features=Slow(48)), tmp_path / "run", resources=ONE_THREAD, listener=listener)

    with pytest.raises(Killed):
        go(0.5, before := Counter(4))
    metrics = go(1e-6, again := Counter())
    assert metrics["plan"]["slab_rows"] == 100
    assert before.count("gram-slab") > 0
    # four slabs and three sums
    assert again.count("gram-slab") == 7 - before.count("gram-slab")


def test_nystrom_features_of_a_slow_kernel_have_its_pace(monkeypatch):
    network = convolutional(2)
    features = Nystrom(NTK(network), n_components=50)
    monkeypatch.setattr(module, "calibrate", lambda *a, **k: Pace(0.01, 0.5, 0.0, 8, 1))
    found = calibrate_features(features, (4, 4, 3), "float32", 30, 50, site=site_of(), enough=0.1)
    assert found.row_seconds == pytest.approx(50 * 0.01)
    assert calibrate_features(Nystrom(NTK(fully_connected(1)), 50), (4,), "float32", 30, 50, site=site_of()) is None


def test_only_told_where_asked(tmp_path):
    job = ridge_job(stored(tmp_path, *class_data(120)))
    assert job.recipe.measured(job.request(), Resources(), site_of()) == Resources()
    assert job.recipe.measured(job.request(), Resources(), site_of(), always=True).row_pace is not None
    learning = NTKRandomFeatures(fully_connected(1), n_components=8, sampling="optimized")
    learned = replace(job, recipe=replace(job.recipe, features=learning))
    assert learned.recipe.measured(learned.request(), Resources(), site_of(), always=True).row_pace is None
