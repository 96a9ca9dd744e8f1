"""kernel_matrix: the kernel's own values, lazily or stored once; one triangle; kills, refusals, memory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter as Counts
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from job_examples import Counter, Killed, stored

from ntkdask import files, kernels
from ntkdask.arrays import device_memory_bytes
from ntkdask.datasets import open_dataset
from ntkdask.datasets.rows import DatasetRows, MemoryRows
from ntkdask.errors import (
    DamagedTileError,
    DiskSpaceError,
    DtypeError,
    FingerprintError,
    InputError,
    MemoryBudgetError,
    StoreError,
)
from ntkdask.execution import cluster, workers
from ntkdask.execution.site import Site
from ntkdask.kernels import NNGP, NTK, ArcCosine, FlipAveraged
from ntkdask.networks import convolutional, fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.store import RECEIPTS, TileStore
from ntkdask.workflows.kernel_matrix.build import kernel_matrix, open_matrix
from ntkdask.workflows.kernel_matrix.fill import build_kernel_matrix
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan, MatrixShape, plan_matrix
from ntkdask.workflows.stream import FeatureStream

MIB, GIB = 2**20, 2**30
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
PAIR = kernels.both(fully_connected(2))


def kernel(depth: int = 2) -> NTK:
    return NTK(fully_connected(depth))


def rows(n: int = 60, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def close(found, expected: np.ndarray, dtype: str = "float32") -> bool:
    found = np.asarray(found)
    return found.dtype == dtype and np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


# values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "tile"), [(1, None), (1, 4), (60, None), (20, 1), (60, 17), (60, 60), (60, 100)])
@pytest.mark.parametrize("store", [False, True])
def test_symmetric_values(tmp_path, dtype, n, tile, store):
    x = rows(n)
    found = kernel_matrix(kernel(), x, url=tmp_path / "k" if store else None, plan=Plan(tile, dtype=dtype))
    assert isinstance(found, da.Array)
    assert found.shape == (n, n)
    assert found.dtype == dtype
    values = found.compute()
    assert close(values, kernel()(x), dtype)
    assert (values == values.T).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tiles", [(None, None), (7, 11), (1, 60), (100, 100)])
@pytest.mark.parametrize("store", [False, True])
def test_rectangular_values(tmp_path, dtype, tiles, store):
    x, y = rows(23, seed=1), rows(60)
    found = kernel_matrix(kernel(), x, y, url=tmp_path / "k" if store else None, plan=Plan(*tiles, dtype=dtype))
    assert found.shape == (23, 60)
    assert close(found.compute(), kernel()(x, y), dtype)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_pair_takes_one_pass(tmp_path, monkeypatch, store, symmetric):
    x, y, calls = rows(), None if symmetric else rows(23, seed=1), []
    call = type(PAIR).__call__
    monkeypatch.setattr(type(PAIR), "__call__", lambda self, x, y=None: calls.append(1) or call(self, x, y))
    found = kernel_matrix(PAIR, x, y, url=tmp_path / "pair" if store else None, plan=Plan(20, 20))
    assert isinstance(found, tuple)
    values = da.compute(*found, scheduler="synchronous")
    assert len(calls) == 6
    for part, expected in zip(values, (NNGP(PAIR.network)(x, y), NTK(PAIR.network)(x, y)), strict=True):
        assert close(part, expected, "float64")
    if store:
        assert (open_matrix(tmp_path / "pair" / "nngp").compute() == values[0]).all()
        assert (open_matrix(tmp_path / "pair" / "ntk").compute() == values[1]).all()


def test_the_view_slices_like_an_array(tmp_path):
    x = rows()
    found, expected = kernel_matrix(kernel(), x, url=tmp_path / "k", plan=Plan(17)), kernel()(x)
    for key in (
        np.s_[3:40, ::3],
        np.s_[5],
        np.s_[:, 59],
        np.s_[-1, 0],
        np.s_[::-1, 10:12],
        np.s_[30:30],
        np.s_[[50, 1, 20]],
        np.s_[:, [3, 60 - 1, 3]],
    ):
        assert np.allclose(found[key].compute(), expected[key], rtol=0, atol=1e-12)
        assert found[key].compute().shape == expected[key].shape
    assert np.allclose(found[[50, 1]][:, [3, 40]].compute(), expected[[50, 1]][:, [3, 40]])
    assert np.allclose((found @ np.ones(60)).compute(), expected @ np.ones(60))


def test_one_triangle_is_computed_and_stored(tmp_path, monkeypatch):
    calls = []
    call = NTK.__call__
    monkeypatch.setattr(NTK, "__call__", lambda self, x, y=None: calls.append(y is None) or call(self, x, y))
    kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(20))
    assert (len(calls), sum(calls)) == (6, 3)
    chunks = [p for p in (tmp_path / "k" / "c").rglob("*") if p.is_file()]
    assert len(chunks) == 6
    calls.clear()
    lazy = kernel_matrix(kernel(), rows(), plan=Plan(20))
    assert calls == []
    lazy[:20, 40:].compute(scheduler="synchronous")
    assert calls == [False]
    lazy.compute(scheduler="synchronous")
    assert len(calls) == 7


# inputs


def images(n: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)


def given(tmp_path: Path, x: np.ndarray, source: str):
    if source in ("dataset", "url"):
        dataset = stored(tmp_path / "given", x, np.zeros(len(x)), overwrite=True)
        return dataset if source == "dataset" else dataset.url
    return da.from_array(x, chunks=(25, 4, 2, 3)) if source == "dask" else x


@pytest.mark.parametrize("source", ["array", "dask", "dataset", "url"])
@pytest.mark.parametrize("store", [False, True])
def test_uint8_images_are_scaled(tmp_path, source, store):
    x = images()
    found = kernel_matrix(
        kernel(), given(tmp_path, x, source), x[:9], url=tmp_path / "k" if store else None, plan=Plan(20)
    )
    assert close(found.compute(), kernel()(x / 255, x[:9] / 255))
    if store:
        assert close(kernel_matrix(kernel(), given(tmp_path, x, source), plan=Plan(20)).compute(), kernel()(x / 255))


@pytest.mark.parametrize("dtype", ["float16", "int8", "int64", "bool"])
def test_other_numbers_are_cast(tmp_path, dtype):
    x = (4 * rows(12)).astype(dtype)
    expected = kernel()(x.astype("float64"))
    assert close(kernel_matrix(kernel(), x).compute(), expected)
    assert close(
        kernel_matrix(kernel(), x.tolist(), url=tmp_path / "k", plan=Plan(5, dtype="float32")).compute(), expected
    )


def test_rows_of_either_side_decide_the_dtype():
    assert kernel_matrix(kernel(), rows().astype("float32")).dtype == "float32"
    assert kernel_matrix(kernel(), rows().astype("float32"), rows()).dtype == "float64"
    assert kernel_matrix(kernel(), rows(), plan=Plan(dtype="float32")).dtype == "float32"


def test_selected_rows_of_streams(tmp_path):
    """Train × train and test × train of one dataset whose rows are dealt to parts, preprocessed on the way."""
    x = rows(50)
    parts = (np.arange(50) * 7 % 5).astype(np.int16)
    everything = MemoryRows(x, numbers=parts)
    train, test = everything.select(0, 1, 3), everything.select(2, 4)
    chain = FittedPreprocessor.for_rows((6,), "float64", "float64")
    streams = [FeatureStream(r, chain, None, None, batch_rows=7) for r in (train, test)]
    in_train = np.isin(parts, (0, 1, 3))
    n, m = int(in_train.sum()), int((~in_train).sum())
    for x_stream, y_stream, expected in (
        (streams[0], None, kernel()(x[in_train])),
        (streams[1], streams[0], kernel()(x[~in_train], x[in_train])),
    ):
        sizes = (n, None) if y_stream is None else (m, n)
        plan = plan_matrix(kernel(), MatrixShape(*sizes, (6,), 48, "float64"), tile_rows=8, tile_cols=8)
        (store,) = build_kernel_matrix(
            kernel(), x_stream, y_stream, plan, Site(tmp_path / f"{sizes}"), fingerprint={"kernel": "test"}
        )
        assert close(open_matrix(store.path).compute(), expected, "float64")
    with pytest.raises(InputError, match=r"the plan is for \(20, 30\) rows, \(30, None\) are selected"):
        build_kernel_matrix(kernel(), streams[0], None, plan, Site(tmp_path / "other"), fingerprint={})


# a cluster


@pytest.mark.parametrize("source", ["array", "dask", "url"])
def test_on_a_cluster(tmp_path, client, source):
    x, y = images(), images(9)
    plan, listener = Plan(20, 20, dtype="float64"), Counter()
    for name, other, tiles in (("symmetric", None, 6), ("rectangular", y, 3)):
        options = {"url": tmp_path / name, "client": client, "plan": plan}
        found = kernel_matrix(kernel(), given(tmp_path, x, source), other, **options)
        assert close(found.compute(), kernel()(x / 255, None if other is None else y / 255), "float64")
        receipts = TileStore.open(tmp_path / name).receipts.values()
        assert len(receipts) == tiles
        assert all(r.worker.startswith("tcp://") and r.peak_bytes > 0 for r in receipts)
        kernel_matrix(kernel(), given(tmp_path, x, source), other, listener=listener, **options)
    assert listener.labels == []


@pytest.mark.parametrize("kind", ["ntk", "nngp", "flips", "pair"])
def test_kernels_of_images(tmp_path, client, kind):
    """Rows keep their shape through datasets, preprocessing, tasks and lazy blocks."""
    network = convolutional(2)
    found = {
        "ntk": NTK(network),
        "nngp": NNGP(network),
        "flips": FlipAveraged(NTK(network)),
        "pair": kernels.both(network),
    }[kind]
    x, y, plan = images(25), images(40)[25:], Plan(10, 10, dtype="float64")
    for name, other in (("symmetric", None), ("rectangular", y)):
        expected = found(x / 255, None if other is None else y / 255)
        ways = {
            "cluster": kernel_matrix(
                found, given(tmp_path, x, "url"), other, url=tmp_path / name, client=client, plan=plan
            ),
            "lazy": kernel_matrix(found, x, other, plan=plan),
        }
        for values in ways.values():
            for part, wanted in zip(*(v if kind == "pair" else (v,) for v in (values, expected)), strict=True):
                assert close(part, wanted, "float64")


def test_images_that_a_network_does_not_take(tmp_path):
    for x, words in ((rows(), "takes images"), (images().transpose(0, 3, 1, 2).repeat(8, 2).repeat(8, 3), "NCHW")):
        with pytest.raises(InputError, match=words):
            kernel_matrix(NTK(convolutional(1)), x, url=tmp_path / "k")
        assert not (tmp_path / "k").exists()


def test_loop_and_cluster_give_equal_bits(tmp_path, client):
    x, plan = rows(300).astype("float32"), Plan(64)
    bits = [
        kernel_matrix(kernel(), x, url=tmp_path / name, client=runner, plan=plan, threads=1).compute().tobytes()
        for name, runner in (("loop", None), ("cluster", client))
    ]
    assert bits[0] == bits[1]


def test_a_worker_killed_mid_run(tmp_path):
    """Every tile has one receipt: what was lost had none, what had one was not computed again."""
    x, plan = rows(200, 20), Plan(16)
    whole = kernel_matrix(kernel(), x, url=tmp_path / "whole", plan=plan, threads=1)

    class Killer(Counter):
        def task(self, label, done):
            super().task(label, done)
            if len(self.labels) == 25:
                os.kill(pids[0], signal.SIGKILL)

    with cluster.connect(n_workers=2, cuda=False, worker_memory="1 GiB") as client:
        pids = sorted(client.run(os.getpid).values())
        found = kernel_matrix(kernel(), x, url=tmp_path / "k", client=client, plan=plan, threads=1, listener=Killer())
    assert computed(tmp_path / "k") == Counts(TileStore.open(tmp_path / "k").indices())
    assert found.compute().tobytes() == whole.compute().tobytes()


def computed(store: Path) -> Counts:
    """How often each tile has a receipt."""
    found: Counts = Counts()
    for line in (store / RECEIPTS).read_text().splitlines() if (store / RECEIPTS).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written, or never was
            found.update([tuple(json.loads(line)["index"])])
    return found


SCRIPT = """
import sys
from ntkdask import kernels
from ntkdask.execution import cluster
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.kernel_matrix.build import kernel_matrix

if __name__ == "__main__":
    with cluster.connect(n_workers=2, cuda=False, worker_memory="1 GiB") as client:
        kernel_matrix(
            kernels.both(fully_connected(2)), sys.argv[1], url=sys.argv[2], client=client, plan=Plan(8), threads=1
        )
"""


def test_the_driver_killed_mid_run_and_resumed(tmp_path):
    """SIGKILL of driver, scheduler and workers at once; nothing that was committed is computed again, in either part."""
    x = rows(120, 20)
    (tmp_path / "run.py").write_text(SCRIPT)
    data, url = stored(tmp_path, x, np.zeros(120)).url, tmp_path / "pair"
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), data, str(url)], start_new_session=True, cwd=tmp_path
    )
    deadline = time.monotonic() + 90
    while len(computed(url / "nngp")) < 30 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(20)
    # the kill may fall between a tile's two receipts, so the parts may differ by one
    before = [computed(url / part) for part in ("nngp", "ntk")]
    total = 15 * 16 // 2
    assert 30 <= len(before[0]) < total
    listener = Counter()
    found = kernel_matrix(PAIR, data, url=url, plan=Plan(8), listener=listener, threads=1)
    assert listener.stages == [("kernel-tile", total, min(map(len, before)))]
    assert [computed(url / part) for part in ("nngp", "ntk")] == [Counts(TileStore.open(url / "ntk").indices())] * 2
    whole = kernel_matrix(PAIR, data, url=tmp_path / "whole", plan=Plan(8), threads=1)
    for part, expected in zip(found, whole, strict=True):
        assert part.compute().tobytes() == expected.compute().tobytes()


# resume and refusal


def test_resume_computes_what_is_missing(tmp_path):
    x, plan = rows(), Plan(10)
    whole = kernel_matrix(kernel(), x, url=tmp_path / "whole", plan=plan).compute()
    with pytest.raises(Killed):
        kernel_matrix(kernel(), x, url=tmp_path / "k", plan=plan, listener=Counter(8))
    with pytest.raises(StoreError, match="has 8 of its 21 tiles"):
        open_matrix(tmp_path / "k")
    TileStore.open(tmp_path / "k").chunk_path((1, 0)).unlink()
    listener = Counter()
    found = kernel_matrix(kernel(), x, url=tmp_path / "k", plan=plan, listener=listener)
    assert listener.stages == [("kernel-tile", 21, 7)]
    assert len(listener.labels) == 14
    assert found.compute().tobytes() == whole.tobytes()


def test_parts_cut_off_between_their_receipts(tmp_path, monkeypatch):
    record, records = TileStore.record, []

    def dying(self, receipt):
        if len(records) == 3:
            raise Killed
        records.append(receipt)
        record(self, receipt)

    monkeypatch.setattr(TileStore, "record", dying)
    with pytest.raises(Killed):
        kernel_matrix(PAIR, rows(), url=tmp_path / "pair", plan=Plan(20))
    monkeypatch.undo()
    found = kernel_matrix(PAIR, rows(), url=tmp_path / "pair", plan=Plan(20))
    for part in ("nngp", "ntk"):
        assert set(computed(tmp_path / "pair" / part).values()) == {1}
    assert close(found[1].compute(), kernel()(rows()), "float64")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": kernel(3)}, r"kernel\.network\.layers: stored"),
        ({"kernel": NNGP(fully_connected(2))}, r"kernel\.type: stored 'NTK', asked 'NNGP'"),
        ({"x": rows() + 1e-12}, "x: stored"),
        ({"y": rows(60, seed=1)}, "y: stored None"),
        ({"plan": Plan(20, dtype="float32")}, "dtype: stored 'float64', asked 'float32'"),
        ({"plan": Plan(30)}, "tile_shape"),
    ],
)
def test_another_matrix_is_refused(tmp_path, change, words):
    arguments = {"kernel": kernel(), "x": rows(), "plan": Plan(20)}
    before = kernel_matrix(**arguments, url=tmp_path / "k").compute()
    with pytest.raises(FingerprintError, match=words):
        kernel_matrix(**{**arguments, **change}, url=tmp_path / "k")
    assert (open_matrix(tmp_path / "k").compute() == before).all()


def test_tiles_of_an_earlier_run_are_kept(tmp_path):
    """Other memory would cut the matrix otherwise; a run that goes on keeps the first one's tiles, or says that it cannot."""
    kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(20))
    listener = Counter()
    assert kernel_matrix(kernel(), rows(), url=tmp_path / "k", listener=listener).chunks[0] == (20, 20, 20)
    assert listener.labels == []
    needed = plan_of(60, row_shape=(6,), row_bytes=48, dtype="float64", tile_rows=20).memory_bytes
    with pytest.raises(MemoryBudgetError, match="for tiles of 20 x 20"):
        kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(memory_bytes=needed - 5000))
    kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(memory_bytes=needed))


def test_a_pair_and_a_single_kernel_do_not_share_a_url(tmp_path):
    kernel_matrix(kernel(), rows(), url=tmp_path / "one")
    with pytest.raises(FingerprintError, match="holds one matrix, nngp and ntk were asked for"):
        kernel_matrix(PAIR, rows(), url=tmp_path / "one")
    kernel_matrix(PAIR, rows(), url=tmp_path / "two")
    with pytest.raises(StoreError, match="holds the matrices nngp, ntk"):
        kernel_matrix(kernel(), rows(), url=tmp_path / "two")
    assert open_matrix(tmp_path / "two" / "ntk").shape == (60, 60)


@pytest.mark.parametrize("k", [kernel(), PAIR])
def test_what_stands_at_the_url_is_never_deleted(tmp_path, k):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("words")
    dataset = stored(tmp_path, rows(), np.zeros(60), "data.zarr")
    for url in ("folder", "folder/thesis.tex", "data.zarr"):
        with pytest.raises((StoreError, FingerprintError)):
            kernel_matrix(k, rows(), url=tmp_path / url)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "words"
    assert open_dataset(dataset.url).digest == dataset.digest


def test_a_damaged_tile_is_an_error_not_a_number(tmp_path):
    found = kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(20))
    chunk = TileStore.open(tmp_path / "k").chunk_path((2, 1))
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    chunk.write_bytes(content)
    for part in (np.s_[40:, 20:40], np.s_[20:40, 40:]):
        with pytest.raises(DamagedTileError, match=r"tile \(2, 1\)"):
            found[part].compute()
    assert found[:20].compute().shape == (20, 60)


# bad input


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.zeros(5)}, InputError, r"x has shape \(5,\); expected \(n, ...\)"),
        ({"x": np.zeros((0, 3))}, InputError, "at least one row"),
        ({"y": np.zeros((0, 6))}, InputError, "y has shape"),
        ({"y": rows(5, 7)}, InputError, r"rows of shape \(6,\) and y of \(7,\); they must agree"),
        ({"x": np.array([["a", "b"]])}, DtypeError, "rows are real numbers"),
        ({"x": rows().astype("complex128")}, DtypeError, "complex128"),
        ({"kernel": "ntk"}, InputError, "kernel is 'ntk'"),
        ({"kernel": lambda x, y=None: x}, InputError, "give one of ntkdask.kernels"),
        ({"kernel": fully_connected(1)}, InputError, "give one of ntkdask.kernels"),
        ({"plan": Plan(10, 20)}, InputError, "a symmetric matrix has square tiles"),
    ],
)
def test_bad_input(tmp_path, change, error, words, store):
    with pytest.raises(error, match=words):
        kernel_matrix(**{"kernel": kernel(), "x": rows(), **change}, url=tmp_path / "k" if store else None)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_number_of_rows_is_refused():
    x = da.from_array(rows(), chunks=(20, 6))
    with pytest.raises(InputError, match=r"Call x\.compute_chunk_sizes\(\)"):
        kernel_matrix(kernel(), x[x[:, 0] > 0])


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("source", ["array", "dask", "lazy"])
def test_rows_with_nan_are_named(tmp_path, side, source):
    bad = rows()
    bad[[4, 33], 1] = [np.nan, np.inf]
    if source == "dask":
        bad = da.from_array(bad, chunks=(25, 6))
    pair = (bad, rows(50)) if side == "x" else (rows(50), bad)
    words = {
        "array": f"{side} has NaN or infinite values in rows 4, 33",
        # whichever block is prepared first
        "lazy": rf"{side} has NaN or infinite values in row (4|33)\b",
        "dask": "^rows 4, 33 of x hold NaN" if side == "x" else "^y as a dataset of its own: rows 4, 33",
    }
    with pytest.raises(InputError, match=words[source]):
        kernel_matrix(kernel(), *pair, url=None if source == "lazy" else tmp_path / "k", plan=Plan(20, 20)).compute()


def test_values_beyond_float32_are_named(tmp_path):
    x = rows()
    x[27, 0] = 1e200
    for name, pair in (("x", (x,)), ("y", (rows(), x))):
        with pytest.raises(InputError, match=f"{name} has .* in row 27"), np.errstate(over="ignore"):
            kernel_matrix(kernel(), *pair, url=tmp_path / name, plan=Plan(20, 20, dtype="float32"))


# sizes


def plan_of(n: int = 34_298, m: int | None = None, **changes) -> MatrixPlan:
    options = {"row_shape": (9,), "row_bytes": 72, "dtype": "float32"}
    sizes = {name: changes.pop(name, value) for name, value in options.items()}
    return plan_matrix(kernel(), MatrixShape(n, m, **sizes), **changes)


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 1000, 4000, 8192, 34_298, 60_000])
def test_tiles_are_even_and_a_few_when_n_is_small(n):
    plan = plan_of(n)
    blocks = -(-n // plan.tile_rows)
    assert plan.tile_rows == plan.tile_cols <= 2048
    assert plan.tasks == blocks * (blocks + 1) // 2
    assert blocks >= min(4, -(-n // 256)) - 1
    assert n < 2**13 or plan.tile_rows > 1900


def test_tiles_follow_the_budget():
    small, large = plan_of(budget=360 * MIB), plan_of(budget=2 * GIB)
    assert small.tile_rows < large.tile_rows == 2048
    assert small.memory_bytes <= 360 * MIB
    assert large.memory_bytes <= 2 * GIB
    assert plan_of(budget=64 * GIB) == large
    assert plan_of(1000, 300).tasks == 4 * 2
    assert plan_of(60_000, dtype="float32").disk_bytes == pytest.approx(60_000**2 * 4 / 2, rel=0.1)
    images = {"row_shape": (32, 32, 3), "row_bytes": 3072}
    assert not plan_of(60_000, budget=800 * MIB, **images).keeps_rows
    assert plan_of(60_000, budget=4 * GIB, **images).keeps_rows


def test_nothing_fits():
    with pytest.raises(
        MemoryBudgetError, match=r"kernel-tile of NTK \(row_shape=\(9,\), float32\), the process itself 320 MiB"
    ):
        plan_of(budget=320 * MIB)
    with pytest.raises(
        MemoryBudgetError, match=r"for tiles of 8192 x 8192 .* a task has 512 MiB. Use tile_rows <= \d+"
    ):
        plan_of(budget=512 * MIB, tile_rows=8192)
    with pytest.raises(MemoryBudgetError, match=r"on the device.* for one row, but a task has 100 B. Give a GPU"):
        plan_of(device_budget=100)


def test_the_device_bounds_tiles_too():
    plan = plan_of(device_budget=8 * MIB)
    assert plan.tile_rows < 2048
    assert 0 < plan.device_bytes <= 8 * MIB
    assert plan_of().device_bytes == 0


def test_a_run_that_does_not_fit_starts_nothing(tmp_path, monkeypatch):
    with pytest.raises(MemoryBudgetError):
        kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(memory_bytes=300 * MIB))
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(DiskSpaceError, match=r"takes up to 28.1 KiB at .*, where 1,000 B are free"):
        kernel_matrix(kernel(), rows(), url=tmp_path / "k")
    assert not (tmp_path / "k" / "c").exists()


@pytest.mark.parametrize("k", [kernel(3), ArcCosine(1), PAIR])
def test_workers_stay_below_the_plan(tmp_path, k):
    """The highest memory that a fresh worker ever held, against what was promised before it ran."""
    x = rows(2500, 512).astype("float32")
    with cluster.connect(n_workers=1, cuda=False, worker_memory="2 GiB") as client:
        budget = workers.resources(client).memory_bytes
        kernel_matrix(k, x, url=tmp_path / "k", client=client, plan=Plan(1280))
    plan = plan_matrix(k, MatrixShape(2500, None, (512,), 2048, "float32"), budget, tile_rows=1280)
    store = TileStore.open(tmp_path / "k" / "ntk" if k is PAIR else tmp_path / "k")
    peak = max(r.peak_bytes for r in store.receipts.values())
    assert peak <= plan.memory_bytes <= budget
    # a promise that nothing could break is no promise
    assert plan.memory_bytes < 3 * peak


def test_rows_are_read_once_a_process(tmp_path, monkeypatch):
    reads = []
    batches = DatasetRows.batches
    monkeypatch.setattr(
        DatasetRows, "batches", lambda self, start, stop, size: reads.append(start) or batches(self, start, stop, size)
    )
    kernel_matrix(kernel(), stored(tmp_path, rows(), np.zeros(60)), url=tmp_path / "k", plan=Plan(10))
    assert sorted(reads) == [0, 10, 20, 30, 40, 50]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_the_gpu(tmp_path, dtype):
    assert device_memory_bytes() > 0
    x = rows(500, 20)
    found = kernel_matrix(kernel(), x, url=tmp_path / "k", plan=Plan(128, dtype=dtype))
    assert np.abs(found.compute() - kernel()(x)).max() <= 10 * TOLERANCE[dtype] * np.abs(kernel()(x)).max()
