"""Tests marked `gpu` run where there is one, else the reason is given; clusters that all tests share which do no harm to them."""

import pytest

from ntkdask import arrays, cluster


@pytest.fixture(scope="module")
def one_worker():
    """A client of one worker, which has every core; tests that kill or measure workers start their own."""
    with cluster.connect(n_workers=1, cuda=False, worker_memory="2 GiB", dashboard_port=0) as client:
        yield client


@pytest.fixture(scope="module")
def two_workers():
    """A client of two workers; tests that kill or measure workers start their own."""
    with cluster.connect(n_workers=2, cuda=False, worker_memory="2 GiB", dashboard_port=0) as client:
        yield client


def pytest_collection_modifyitems(items):
    usable, reason = arrays.gpu_status()
    if not usable:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
