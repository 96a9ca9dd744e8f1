"""Plans of a tiled Cholesky: blocks, reads, memory and refusals; real peaks stay below them."""

import sys
import tracemalloc
from collections import Counter as Count

import cloudpickle
import numpy as np
import pytest
from factor_examples import N, _with_block, blocked, kernel, store_matrix
from job_examples import Counter

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.matrices import factorize_plan
from ntkdask.matrices.factorize import factorize
from ntkdask.matrices.factorize_plan import blocks_of, feeding, plan_factorize, reads_of
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.store import TileStore

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def matrix(tmp_path):
    return store_matrix(tmp_path, kernel())


@pytest.mark.parametrize("n_tiles", [1, 2, 5, 8])
@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_blocks_cover_the_triangle_and_read_what_is_committed(n_tiles, block):
    blocks = list(blocks_of(n_tiles, block))
    targets = Count(t for b in blocks for t in b.targets)
    assert targets == Count((i, j) for i in range(n_tiles) for j in range(i + 1))
    home = {t: b for b in blocks for t in b.targets}
    before = feeding(blocks)
    for b in blocks:
        read = {home[r, k] for k in range(n_tiles) for r in reads_of(b, k)}
        assert read <= set(before[b])
        # every product's two factors, and the diagonal tile of a solve
        needed = {t for i, j in b.targets for k in range(j) for t in ((i, k), (j, k))} | {(j, j) for _, j in b.targets}
        assert {(r, k) for k in range(n_tiles) for r in reads_of(b, k)} == needed - set(b.targets)


def test_what_is_committed_is_no_target():
    blocks = list(blocks_of(4, 2, [(3, 2), (1, 0)]))
    assert [b.targets for b in blocks] == [((1, 0),), ((3, 2),)]
    assert reads_of(blocks[1], 1) == [2, 3]
    assert reads_of(blocks[1], 2) == [2]


def test_plan_counts(matrix, tmp_path, monkeypatch):
    """Reads and writes of a run are those planned."""
    plan = plan_factorize(N, 16, matrix_dtype="float64")
    read, written = Count(), Count()
    original = (TileStore.read, TileStore.commit)
    monkeypatch.setattr(TileStore, "read", lambda s, i: read.update([s.path.name]) or original[0](s, i))
    monkeypatch.setattr(TileStore, "commit", lambda s, i, *a: written.update([i]) or original[1](s, i, *a))
    listener = Counter()
    factorize(matrix, 0.1, url=tmp_path / "factor", listener=listener)
    assert (read["factor"] + read["matrix"]) * 16**2 * 8 == plan.read_bytes
    assert sum(written.values()) * 16**2 * 8 == plan.written_bytes
    assert set(written.values()) == {1}
    assert len(listener.labels) == plan.tasks
    assert plan.flops == N**3 / 3


def test_blocks_follow_memory_and_workers():
    def size(**options):
        return plan_factorize(65536, 1024, "float64", **options).block_tiles

    assert size() == 8
    assert size(slots=2) == 4
    assert size(slots=4) == 2
    assert size(slots=64) == 1
    small = [size(memory_bytes=int(g * 2**30)) for g in (0.5, 0.75, 1, 1.5)]
    assert small == sorted(small)
    assert small[0] < small[-1]
    assert size(device_bytes=2**28) < size(device_bytes=2**36)


def test_memory_that_does_not_suffice_is_refused_with_what_would():
    text = r"cholesky-tile needs .* \(tiles of 8192 x 8192, float64\) but a task has 1 GiB.* at most (\d+) rows"
    with pytest.raises(MemoryBudgetError, match=text) as failure:
        plan_factorize(65536, 8192, "float64", 2**30)
    rows = int(str(failure.value).split("at most ")[1].split()[0])
    assert plan_factorize(65536, rows, "float64", 2**30).worker_bytes <= 2**30
    with pytest.raises(MemoryBudgetError):
        plan_factorize(65536, 8192, "float64", device_bytes=2**30)
    with pytest.raises(InputError, match="at least 1"):
        plan_factorize(0, 16)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(
    ("matrix_dtype", "dtype"), [("float64", "float64"), ("float32", "float64"), ("float32", "float32")]
)
def test_peaks_stay_below_the_plan(tmp_path, monkeypatch, block, matrix_dtype, dtype):
    """What a factorisation and a substitution allocate beyond the process, measured and planned; the plan is not twice too large."""
    n, tile = 1280, 320
    matrix = store_matrix(tmp_path, kernel(n), tile, matrix_dtype)
    blocked(monkeypatch, block)
    small = 2**20  # receipts, metadata, Python's own
    plan = _with_block(plan_factorize(n, tile, dtype, matrix_dtype=matrix_dtype), block)
    planned = factorize_plan._peaks(n, tile, dtype, matrix_dtype, block)
    factorize(
        matrix, 0.1, url=tmp_path / "first", dtype=dtype, threads=1
    )  # what is imported and cached once is not the task's
    peak, factor = allocated(lambda: factorize(matrix, 0.1, url=tmp_path / "factor", dtype=dtype, threads=1))
    assert 0.5 * (planned[0] - BASE_BYTES) < peak < planned[0] - BASE_BYTES + small
    b = np.ones((n, plan.columns))
    peak, _ = allocated(lambda: factor.solve(b))
    assert peak < planned[1] - BASE_BYTES + 4 * b.nbytes + small


def allocated(call):
    """(peak bytes allocated during the call, what it returned)"""
    tracemalloc.start()
    try:
        found = call()
        return tracemalloc.get_traced_memory()[1], found
    finally:
        tracemalloc.stop()


def test_a_budget_limits_the_columns_of_a_substitution():
    plan = plan_factorize(1_000_000, 512, memory_bytes=2**30)
    assert 1 <= plan.columns < 256
    assert plan.worker_bytes <= 2**30
