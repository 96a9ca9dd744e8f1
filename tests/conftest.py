"""What all tests share: clusters (see `clusters`), torch in one thread, and the reason where a test marked `gpu` cannot run."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Read by what is imported below. With a BLAS thread for every core in every process of pytest-xdist, they wait for each other:
    # of two processes on two cores, five times longer than they compute.
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(share))

# torch 2.13's oneDNN writes past small blocks in the backward pass of convolutions with its AVX2 code (heap corruption, seen on AMD
# processors without AVX-512; the code for AVX does not). Read when torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

import clusters

from ntkdask import arrays


@pytest.fixture
def one_worker():
    """A client of one worker, which has every core; tests that kill or measure workers start their own."""
    with clusters.ALL[1].awake() as client:
        yield client


@pytest.fixture
def two_workers():
    """A client of two workers; tests that kill or measure workers start their own."""
    with clusters.ALL[2].awake() as client:
        yield client


@pytest.fixture
def client(two_workers):
    return two_workers


@pytest.fixture
def one_torch_thread():
    """torch in one thread, for tests of small tensors: where cores are shared, waiting for a second one takes far longer."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    usable, reason = arrays.gpu_status()
    if not usable:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Collections leave alone what the imports of all tests have made, 800 000 objects that they took 0.4 s to look at each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    for shared in clusters.ALL.values():
        shared.close()
