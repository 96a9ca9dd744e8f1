"""Tiled Cholesky against LAPACK: any tiles and blocks, scales and dtypes; equal bits in a loop, on workers and after kills."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter as Count

import cloudpickle
import numpy as np
import pytest
import scipy.linalg
from factor_examples import SIDE, N, blocked, kernel, lower, store_matrix
from job_examples import Counter, Held, Killed

from ntkdask.errors import MemoryBudgetError
from ntkdask.execution import cluster
from ntkdask.execution.map_reduce import TASK_BYTES
from ntkdask.matrices import factor as factor_module
from ntkdask.matrices import factorize as factorize_module
from ntkdask.matrices.factor import Factor, open_factor
from ntkdask.matrices.factorize import factorize
from ntkdask.planning.resources import BASE_BYTES, Resources
from ntkdask.solvers.refinement import refine
from ntkdask.store import RECEIPTS, TileStore

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])

TILES = SIDE * (SIDE + 1) // 2


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


# --- kills --------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


@pytest.mark.slow
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


def _run_alone(matrix, url, tasks):
    factorize(matrix, 0.1, url=url, threads=1, listener=Held(tasks))


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
        process = context.Process(target=_run_alone, args=(matrix, url, total // share))
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
