"""Tiled Cholesky against LAPACK: any tiles and blocks, scales and dtypes, resumed, refused, and what its factor solves."""

import json
import multiprocessing
import os
import signal
import sys
import time
import tracemalloc
from collections import Counter as Count

import cloudpickle
import numpy as np
import pytest
import scipy.linalg
from job_examples import Counter, Killed, damage

from ntkdask.errors import DamagedTileError, FingerprintError, InputError, MemoryBudgetError, StoreError
from ntkdask.execution import cluster
from ntkdask.execution.map_reduce import TASK_BYTES
from ntkdask.matrices import factor as factor_module
from ntkdask.matrices import factorize as factorize_module
from ntkdask.matrices import factorize_plan
from ntkdask.matrices.factor import Factor, open_factor
from ntkdask.matrices.factorize import factorize
from ntkdask.matrices.factorize_plan import blocks_of, feeding, plan_factorize, reads_of
from ntkdask.planning.resources import BASE_BYTES, Resources
from ntkdask.solvers.refinement import refine
from ntkdask.store import RECEIPTS, TileStore

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])

N = 90
SIDE = 6  # tiles of 16 rows, the last one ragged
TILES = SIDE * (SIDE + 1) // 2


def kernel(n=N, d=4, seed=0, repeat=()):
    """A Gaussian kernel matrix of n rows; repeat: pairs (i, j), row j is row i again."""
    x = np.random.default_rng(seed).standard_normal((n, d))
    for i, j in repeat:
        x[j] = x[i]
    square = (x**2).sum(1)
    return np.exp(-np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / d)


def store_matrix(folder, matrix, tile=16, dtype="float64", name="matrix"):
    store = TileStore.create(
        folder / name,
        shape=matrix.shape,
        tile_shape=(tile, tile),
        dtype=dtype,
        fingerprint={"seed": 0},
        triangle="symmetric",
    )
    for index in store.indices():
        store.record(store.commit(index, np.ascontiguousarray(matrix[store.slices(index)], dtype=dtype)))
    return store.path


def lower(url):
    return np.asarray(TileStore.open(url).zarr_array()[:])


def close(found, expected, tolerance=1e-10):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def naive(matrix, alpha, scale=None):
    s = np.ones(len(matrix)) if scale is None else scale
    return s[:, None] * np.asarray(matrix, float) * s + alpha * np.eye(len(matrix))


def right_sides(n=N, k=3, seed=1):
    return np.random.default_rng(seed).standard_normal((n, k))


@pytest.fixture
def matrix(tmp_path):
    return store_matrix(tmp_path, kernel())


def blocked(monkeypatch, tiles):
    """Let tasks compute blocks of `tiles` × `tiles` tiles, whatever the planner would choose."""
    monkeypatch.setattr(factorize_module, "plan_factorize", lambda *a, **k: _with_block(plan_factorize(*a, **k), tiles))


def _with_block(plan, tiles):
    count = sum(1 for _ in blocks_of(-(-plan.n // plan.tile_rows), tiles))
    return type(plan)(**{**vars(plan), "block_tiles": tiles, "tasks": count})


# --- against LAPACK -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [16, 13, 45, 90, 200, 1])
@pytest.mark.parametrize("n", [1, 2, 40, N])
def test_any_tiles(tmp_path, n, tile):
    if tile == 1 and n > 2:
        n = 9
    matrix = kernel(n)
    factor = factorize(store_matrix(tmp_path, matrix, tile), 0.1, url=tmp_path / "factor")
    a, b = naive(matrix, 0.1), right_sides(n)
    expected = scipy.linalg.cho_factor(a, lower=True)
    close(lower(factor.url), np.tril(expected[0]))
    close(factor.solve(b), scipy.linalg.cho_solve(expected, b))
    close(factor.half_solve(b), np.linalg.solve(np.tril(expected[0]), b))
    close(factor.diagonal(), np.diag(expected[0]))
    assert factor.log_determinant() == pytest.approx(np.linalg.slogdet(a)[1], abs=1e-10 * n)
    assert (factor.n, factor.alpha, factor.dtype) == (n, 0.1, np.float64)
    assert TileStore.open(factor.url).damaged() == []


def test_the_solution_of_a_badly_conditioned_matrix(tmp_path):
    """κ = 1e7: LAPACK's own solution differs from the exact one by κ·ε; ours agrees with it to 1e-8."""
    matrix = kernel(d=3)
    factor = factorize(store_matrix(tmp_path, matrix), 1e-5, url=tmp_path / "factor")
    b = right_sides()
    expected = scipy.linalg.cho_solve(scipy.linalg.cho_factor(naive(matrix, 1e-5)), b)
    close(factor.solve(b), expected, 1e-8)


@pytest.mark.parametrize("rows", [(N,), (N, 1), (N, 0), (N, 5)])
def test_shapes_of_right_hand_sides(tmp_path, matrix, rows):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor")
    b = np.ones(rows, int)
    for found, expected in (
        (factor.solve(b), np.linalg.solve(naive(kernel(), 0.1), b)),
        (factor.half_solve(b), np.linalg.solve(lower(factor.url), b)),
    ):
        assert found.shape == rows
        assert found.dtype == "float64"
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_columns_in_several_tasks(tmp_path, matrix):
    b = right_sides(k=7)
    factor = Factor(factorize(matrix, 0.1, url=tmp_path / "factor").url, columns=3)
    close(factor.solve(b), np.linalg.solve(naive(kernel(), 0.1), b))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_with_rows_left_out(tmp_path, matrix, dtype):
    """A row of scale 0 keeps alpha alone: the others' solution is that without it."""
    scale = np.sqrt(np.random.default_rng(3).uniform(0.1, 3, N))
    left_out = np.r_[0, 17:40, N - 1]
    scale[left_out] = 0
    factor = factorize(matrix, 0.3, url=tmp_path / "factor", scale=scale, dtype=dtype)
    b, a, tolerance = right_sides(), naive(kernel(), 0.3, scale), 1e-12 if dtype == "float64" else 1e-4
    found = factor.solve(b)
    close(found, np.linalg.solve(a, b), tolerance)
    kept = np.setdiff1d(np.arange(N), left_out)
    close(found[kept], np.linalg.solve(a[np.ix_(kept, kept)], b[kept]), tolerance)
    close(found[left_out], b[left_out] / 0.3, tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_float32_matrix(tmp_path, dtype):
    matrix = kernel().astype("float32")
    factor = factorize(store_matrix(tmp_path, matrix, dtype="float32"), 0.01, url=tmp_path / "factor", dtype=dtype)
    expected = np.linalg.cholesky(naive(matrix, 0.01))
    assert lower(factor.url).dtype == dtype
    close(lower(factor.url), expected, 1e-12 if dtype == "float64" else 1e-5)


def test_a_float32_factor_is_refined(tmp_path, matrix):
    alpha, b = 1e-3, right_sides()
    factor = factorize(matrix, alpha, url=tmp_path / "factor", dtype="float32")
    exact = np.linalg.solve(naive(kernel(), alpha), b)
    assert np.abs(factor.solve(b) - exact).max() > 1e-5 * np.abs(exact).max()
    found = refine(kernel(), factor.solve, b, alpha=factor.alpha, tolerance=1e-12)
    assert found.converged
    assert found.residuals.max() <= 1e-12
    close(found.solution, exact, 1e-8)


def test_tiny_right_hand_sides_survive_float32(tmp_path, matrix):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor", dtype="float32")
    b = right_sides() * [1e-60, 1.0, 1e60]
    exact = np.linalg.solve(naive(kernel(), 0.1), b)
    for column in range(3):
        close(factor.solve(b)[:, column], exact[:, column], 1e-4)


# --- plan ---------------------------------------------------------------------------------------------------------


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


# --- equal bits, resumed ------------------------------------------------------------------------------------------


def test_blocks_do_not_change_the_bits(tmp_path, matrix, monkeypatch):
    factors = set()
    for tiles in (1, 2, 4, 6):
        blocked(monkeypatch, tiles)
        factors.add(lower(factorize(matrix, 0.1, url=tmp_path / f"factor-{tiles}", threads=1).url).tobytes())
    assert len(factors) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loop_and_workers_give_equal_bits(tmp_path, matrix, client, dtype):
    scale, b = np.linspace(0, 2, N), right_sides()
    found = []
    for name, runner in (("loop", None), ("cluster", client)):
        factor = factorize(matrix, 0.1, url=tmp_path / name, scale=scale, dtype=dtype, client=runner, threads=1)
        found.append((lower(factor.url).tobytes(), factor.solve(b).tobytes(), factor.diagonal().tobytes()))
        assert TileStore.open(factor.url).pending() == []
    assert found[0] == found[1]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 9, 20])
@pytest.mark.parametrize("tiles", [1, 2])
def test_resume_goes_on_where_it_stopped(tmp_path, matrix, monkeypatch, stop_at, tiles):
    blocked(monkeypatch, tiles)
    stop_at = stop_at if tiles == 1 else min(stop_at, 5)
    whole = lower(factorize(matrix, 0.1, url=tmp_path / "whole").url)
    with pytest.raises(Killed):
        factorize(matrix, 0.1, url=tmp_path / "factor", listener=Counter(stop_at))
    listener = Counter()
    factor = factorize(matrix, 0.1, url=tmp_path / "factor", listener=listener)
    assert (lower(factor.url) == whole).all()
    total = 21 if tiles == 1 else 6
    assert len(listener.labels) == total - stop_at
    assert listener.stages == [("cholesky-tile", total, stop_at)]
    assert receipts(tmp_path / "factor") == dict.fromkeys(TileStore.open(factor.url).indices(), 1)


def receipts(url):
    """How often each tile has a receipt."""
    lines = (url / RECEIPTS).read_text().splitlines()
    return dict(Count(tuple(json.loads(line)["index"]) for line in lines))


def test_a_finished_factor_is_not_computed_again(tmp_path, matrix):
    factorize(matrix, 0.1, url=tmp_path / "factor")
    listener = Counter()
    factorize(matrix, 0.1, url=tmp_path / "factor", listener=listener)
    assert listener.labels == []


@pytest.mark.parametrize("tiles", [1, 2])
def test_lost_tiles_alone_are_computed_again(tmp_path, matrix, monkeypatch, tiles):
    blocked(monkeypatch, tiles)
    url = tmp_path / "factor"
    whole = lower(factorize(matrix, 0.1, url=url).url)
    TileStore.open(url).forget([(3, 1), (5, 5), (2, 2)])
    factor = factorize(matrix, 0.1, url=url)
    assert (lower(factor.url) == whole).all()
    assert sum(receipts(url).values()) == TILES


def test_a_large_scale_travels_through_the_store(tmp_path, matrix, client, monkeypatch):
    monkeypatch.setattr(factorize_module, "SMALL_BYTES", 100)
    scale = np.linspace(0.5, 2, N)
    factor = factorize(matrix, 0.1, url=tmp_path / "factor", scale=scale, client=client)
    close(lower(factor.url), np.linalg.cholesky(naive(kernel(), 0.1, scale)))
    assert len(list((tmp_path / "factor.inputs" / "state").iterdir())) == 1


def test_large_right_hand_sides_travel_through_the_store(tmp_path, matrix, client, monkeypatch):
    monkeypatch.setattr(factor_module, "SMALL_BYTES", 100)
    url, b = factorize(matrix, 0.1, url=tmp_path / "factor").url, right_sides(k=7)
    remote, here = (open_factor(url, c, threads=1, columns=3) for c in (client, None))
    assert (remote.solve(b) == here.solve(b)).all()
    assert (remote.half_solve(b) == here.half_solve(b)).all()
    assert (remote.solve(b[:, 0]) == here.solve(b[:, 0])).all()
    assert list((tmp_path / "factor.solves").iterdir()) == []


def test_right_hand_sides_beyond_what_a_task_may_carry(tmp_path, matrix, client):
    url = factorize(matrix, 0.1, url=tmp_path / "factor").url
    b = right_sides(k=TASK_BYTES // 8 // N + 1)
    close(open_factor(url, client).solve(b), np.linalg.solve(naive(kernel(), 0.1), b))


def test_labels_on_the_dashboard(tmp_path, matrix, client):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor", client=client)
    factor.solve(np.ones(N))
    factor.diagonal()
    assert {"cholesky-tile", "substitute", "cholesky-pivots"} <= set(client.cluster.scheduler.task_prefixes)


# --- not positive definite ----------------------------------------------------------------------------------------


def advised(error):
    return float(str(error.value).split("Use alpha >= ")[1].split()[0].rstrip(".,"))


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 40), (60, 89)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_repeated_rows_without_a_ridge(tmp_path, first, second, dtype):
    """Reported at the tile of the repetition, with an alpha that works; what was committed stays."""
    matrix = store_matrix(tmp_path, kernel(d=60, repeat=[(first, second)]), dtype=dtype)
    tile = second // 16
    rows = rf"rows {tile * 16}:{min(tile * 16 + 16, N)} \(first at row {second}\)"
    with pytest.raises(
        InputError, match=rf"alpha=0 is not positive definite to rounding in {rows}.*Repeated rows"
    ) as error:
        factorize(matrix, 0.0, url=tmp_path / "factor")
    store = TileStore.open(tmp_path / "factor")
    assert [i for i in range(SIDE) if not store.pending([(i, i)])] == list(range(tile))
    alpha = advised(error)
    assert 0 < alpha < (1e-3 if dtype == "float32" else 1e-10)
    factorize(matrix, alpha, url=tmp_path / "factor", overwrite=True)


def test_the_error_names_the_eigenvalue_and_the_tile_on_a_cluster(tmp_path, client):
    matrix = kernel(d=60)
    matrix[50, 50] -= 2.0
    schur = matrix[50, 50] - matrix[50, :50] @ np.linalg.solve(matrix[:50, :50], matrix[:50, 50])
    with pytest.raises(InputError, match=r"rows 48:64 \(first at row 50\).*smallest eigenvalue -") as error:
        factorize(store_matrix(tmp_path, matrix), 0.0, url=tmp_path / "factor", client=client)
    assert any("cholesky-tile: block (3, 3)" in note for note in error.value.__notes__)
    assert advised(error) >= -schur
    factorize(tmp_path / "matrix", advised(error), url=tmp_path / "larger")


def test_a_float32_matrix_with_slightly_negative_eigenvalues(tmp_path):
    """Smooth kernels in float32 do this: eigenvalues fall below rounding, -1e-7·λ_max; the advice is of that size."""
    matrix = kernel(d=2).astype("float32")
    values = np.linalg.eigvalsh(matrix.astype(float))
    assert -1e-6 * values[-1] < values[0] < 0
    with pytest.raises(
        InputError, match=r"float32 entries and a float64 factor.*or a matrix and a factor in float64"
    ) as error:
        factorize(store_matrix(tmp_path, matrix, dtype="float32"), 0.0, url=tmp_path / "factor")
    assert -values[0] < advised(error) < 1e-5 * values[-1]
    factorize(tmp_path / "matrix", advised(error), url=tmp_path / "larger")


def test_values_that_are_no_numbers_are_named(tmp_path):
    matrix = kernel()
    matrix[40, 20] = matrix[20, 40] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinite values in rows 32:48"):
        factorize(store_matrix(tmp_path, matrix), 0.1, url=tmp_path / "factor")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"alpha": 0.2}, "alpha: stored 0.1, asked 0.2"),
        ({"scale": np.full(N, 2.0)}, "scale: stored None"),
        ({"dtype": "float32"}, "dtype: stored 'float64', asked 'float32'"),
        ({"fingerprint": {"run": 2}}, "run: stored None, asked 2"),
    ],
)
def test_a_factor_of_something_else_is_refused(tmp_path, matrix, changes, line):
    url = tmp_path / "factor"
    before = lower(factorize(matrix, 0.1, url=url).url)
    with pytest.raises(FingerprintError, match=line):
        factorize(matrix, **{"alpha": 0.1, "url": url, **changes})
    assert (lower(url) == before).all()
    factor = factorize(matrix, **{"alpha": 0.1, "url": url, **changes}, overwrite=True)
    assert (lower(factor.url) != before).any() or "fingerprint" in changes


def test_a_factor_of_another_matrix_is_refused(tmp_path, matrix):
    factorize(matrix, 0.1, url=tmp_path / "factor")
    other = store_matrix(tmp_path, kernel(), tile=32, name="other")
    with pytest.raises(FingerprintError, match="tile_shape"):
        factorize(other, 0.1, url=tmp_path / "factor")


def test_a_damaged_tile_is_named(tmp_path, matrix):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor")
    calls = {
        tmp_path / "factor": lambda: factor.solve(np.ones(N)),
        matrix: lambda: factorize(matrix, 1.0, url=tmp_path / "b"),
    }
    for url, call in calls.items():
        damage(url, (4, 2))
        with pytest.raises(DamagedTileError, match=r"tile \(4, 2\) of .* is damaged"):
            call()


@pytest.mark.parametrize("alpha", [-1.0, np.nan, np.inf, "1", None, True, [1.0]])
def test_alphas_that_make_no_sense(tmp_path, matrix, alpha):
    with pytest.raises(InputError, match="alpha is"):
        factorize(matrix, alpha, url=tmp_path / "factor")


@pytest.mark.parametrize("scale", [np.ones(N - 1), np.ones((N, 1)), np.full(N, -1.0), np.full(N, np.nan)])
def test_scales_that_make_no_sense(tmp_path, matrix, scale):
    with pytest.raises(InputError, match=rf"scale has shape .* expected \({N},\)"):
        factorize(matrix, 0.1, url=tmp_path / "factor", scale=scale)


def test_a_left_out_row_without_a_ridge(tmp_path, matrix):
    with pytest.raises(InputError, match=r"scale is 0 in 2 rows \(first 5\) and alpha is 0"):
        factorize(matrix, 0.0, url=tmp_path / "factor", scale=np.where(np.isin(np.arange(N), (5, 9)), 0.0, 1.0))


def test_matrices_that_cannot_be_factorised(tmp_path, matrix):
    full = TileStore.create(tmp_path / "full", shape=(4, 4), tile_shape=(2, 2), dtype="float64", fingerprint={})
    with pytest.raises(InputError, match="not stored as a symmetric matrix"):
        factorize(full.path, 0.1, url=tmp_path / "factor")
    with pytest.raises(StoreError, match="holds no Zarr array"):
        factorize(tmp_path / "nowhere", 0.1, url=tmp_path / "factor")
    with pytest.raises(InputError, match="a factor in 'float16'"):
        factorize(matrix, 0.1, url=tmp_path / "factor", dtype="float16")
    TileStore.open(matrix).forget([(2, 1)])
    with pytest.raises(StoreError, match=r"1 tiles of .* not computed yet"):
        factorize(matrix, 0.1, url=tmp_path / "factor")
    assert not (tmp_path / "factor").exists()


def test_factors_that_are_none(tmp_path, matrix):
    with pytest.raises(InputError, match="not a Cholesky factor"):
        Factor(str(matrix))
    with pytest.raises(Killed):
        factorize(matrix, 0.1, url=tmp_path / "factor", listener=Counter(2))
    with pytest.raises(StoreError, match=r"not computed yet. Run `factorize` again"):
        open_factor(tmp_path / "factor")


@pytest.mark.parametrize(
    ("rhs", "message"),
    [
        (np.ones(N + 1), rf"expected \({N},\)"),
        (np.ones((N, 2, 2)), "shape"),
        (3.0, "shape"),
        (np.where(np.arange(N) == 7, np.nan, 1.0), "row 7"),
    ],
)
def test_right_hand_sides_that_make_no_sense(tmp_path, matrix, rhs, message):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor")
    with pytest.raises(InputError, match=message):
        factor.solve(rhs)


# --- kills --------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


def test_a_worker_killed_in_the_middle(tmp_path, matrix, monkeypatch):
    """What was committed is not computed again, and the bits are those of an undisturbed run."""
    blocked(monkeypatch, 1)
    whole = lower(factorize(matrix, 0.1, url=tmp_path / "whole", threads=1).url)

    class KillAt(Counter):
        def task(self, label, done):
            super().task(label, done)
            if len(self.labels) == 6:
                os.kill(pids[done.worker], signal.SIGKILL)

    with cluster.connect(n_workers=2, cuda=False, worker_memory="2 GiB") as client:
        pids = client.run(os.getpid)
        listener = KillAt()
        factor = factorize(matrix, 0.1, url=tmp_path / "factor", client=client, threads=1, listener=listener)
    assert (lower(factor.url) == whole).all()
    assert receipts(tmp_path / "factor") == dict.fromkeys(TileStore.open(factor.url).indices(), 1)
    assert len(listener.labels) == TILES


def _run_alone(matrix, url):
    factorize(matrix, 0.1, url=url, threads=1)


def test_the_driver_killed_in_the_middle(tmp_path):
    """SIGKILL of the process, twice; the third run computes what is pending and nothing else."""
    matrix = store_matrix(tmp_path, kernel(120), 10)
    total = 12 * 13 // 2
    whole = lower(factorize(matrix, 0.1, url=tmp_path / "whole", threads=1).url)
    url, context = tmp_path / "factor", multiprocessing.get_context("spawn")

    def committed():
        path = url / RECEIPTS
        return path.read_text().count("\n") if path.exists() else 0

    for share in (10, 3):
        process = context.Process(target=_run_alone, args=(matrix, url))
        process.start()
        wait_for(lambda share=share, process=process: committed() >= total // share or not process.is_alive())
        process.kill()
        process.join()
        assert committed() < total
    done = committed()
    listener = Counter()
    factor = factorize(matrix, 0.1, url=url, threads=1, listener=listener)
    assert (lower(factor.url) == whole).all()
    store = TileStore.open(url)
    assert store.damaged() == []
    assert set(receipts(url).values()) == {1}
    assert 0 < done < total == len(store.receipts)
    assert len(listener.labels) == listener.stages[0][1] - listener.stages[0][2]


def test_workers_are_asked_what_fits(tmp_path, matrix, client, monkeypatch):
    """Before anything is stored: what is asked for, what there is, what to do; a budget of the caller's own is taken as it is."""
    asked = []
    for memory in (BASE_BYTES + 1000, None):
        monkeypatch.setattr(
            "ntkdask.execution.workers.resources",
            lambda client, memory=memory: asked.append(client) or Resources(memory),
        )
        if memory is None:
            factorize(matrix, 0.1, url=tmp_path / "factor", client=client)
            continue
        with pytest.raises(
            MemoryBudgetError, match=r"cholesky-tile needs .* but a task has .*Store the matrix in tiles of"
        ):
            factorize(matrix, 0.1, url=tmp_path / "factor", client=client)
        assert not (tmp_path / "factor").exists()
        factorize(matrix, 0.1, url=tmp_path / "own", client=client, memory_bytes=2**30)
    assert asked == [client, client]
