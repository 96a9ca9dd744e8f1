"""One cluster of two workers for the workflows' tests; modules that kill workers start their own."""

import pytest

from ntkdask import cluster


@pytest.fixture(scope="session")
def client():
    with cluster.connect(n_workers=2, cuda=False, worker_memory="2 GiB") as client:
        yield client
