"""What time features and Gram sums take: measuring against a clock that the map itself turns, and a job's words."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from job_examples import class_data, feature_map, ridge_job, stored

from ntkdask.errors import InputError
from ntkdask.features import NTKRandomFeatures
from ntkdask.jobs.training import SplitRule
from ntkdask.networks import fully_connected
from ntkdask.planning.pace import RowPace
from ntkdask.planning.resources import Resources
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


@pytest.mark.parametrize("row_seconds", [1e-9, 1e-3, 0.05, 10.0])
@pytest.mark.parametrize("batch_rows", [1, 3, 40, 4096])
def test_the_pace_without_the_first_call_in_about_a_second(clock, row_seconds, batch_rows):
    clock.products = 0.5
    features = Costly(clock, row_seconds)
    found = calibrate_features(features, (2, 5), "float32", batch_rows, 3, n_threads=1)
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
    found = calibrate_features(None, (2,), "float32", 10, 100_000)
    assert found.product_rate == pytest.approx(10 * module.MOST_COLUMNS**2 / 2.0)
    assert found.row_seconds == 0.0


def test_a_real_map_on_a_cluster(one_worker):
    found = calibrate_features(feature_map(), (6,), "float32", 64, 48, client=one_worker, slots=1, n_threads=1)
    assert found.row_seconds > 0
    assert found.product_rate > 0
    assert found.threads == 1


def test_rows_that_do_not_fit_are_the_maps_error():
    first = replace(feature_map(), network=fully_connected(1))
    with pytest.raises(InputError):
        calibrate_features(first, (), "float32", 8, 48)


def test_words_of_time(tmp_path):
    data = stored(tmp_path, *class_data(120))
    resources = Resources(None, 0, 1, 1, 2, row_pace=RowPace(0.5, 48.0**2, 16, 1))
    job = ridge_job(data, split=SplitRule(folds=4))
    words = job.time_words(job.plan_for(resources)[0], resources)
    assert words["pace"] == "500 ms a row of features, measured on batches of 16 with 1 thread"
    # four fits of 90 rows, half a second of features and one of product a row, a slab a fit and so two rounds of two
    assert words["time of gram-slab"] == "4 min 30 s on 2 slots: features 90 s, products 3 min 00 s"
    assert words["time of predict"] == "60 s on 2 slots"
    assert job.time_words(job.plan_for(resources)[0], Resources()) == {}
    again = ridge_job(data, split=SplitRule(folds=4), options=RidgeOptions((0.1, 1.0), selection="loo"))
    words = again.time_words(again.plan_for(resources)[0], resources)
    assert words["time of gram-slab"].startswith("9 min 00 s")


def test_only_told_where_asked(tmp_path):
    job = ridge_job(stored(tmp_path, *class_data(120)))
    assert job.measured(Resources()) == Resources()
    assert job.measured(Resources(), always=True).row_pace is not None
    learned = replace(job, features=NTKRandomFeatures(fully_connected(1), n_components=8, sampling="optimized"))
    assert learned.measured(Resources(), always=True).row_pace is None
