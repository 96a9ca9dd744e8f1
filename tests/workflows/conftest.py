"""The cluster of the workflows' tests."""

import pytest


@pytest.fixture(scope="module")
def client(two_workers):
    return two_workers
