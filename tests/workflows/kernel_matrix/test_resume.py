"""Matrices on a cluster: equal bits, killed workers and drivers, resumes, refusals and damage."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter as Counts
from pathlib import Path

import numpy as np
import pytest
from job_examples import Counter, Killed, stored
from matrix_examples import PAIR, close, given, images, kernel, plan_of, rows

from ntkdask import kernels
from ntkdask.datasets import open_dataset
from ntkdask.errors import DamagedTileError, FingerprintError, InputError, MemoryBudgetError, StoreError
from ntkdask.execution import cluster
from ntkdask.kernels import NNGP, NTK, FlipAveraged
from ntkdask.networks import convolutional, fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.store import RECEIPTS, TileStore
from ntkdask.workflows.kernel_matrix.build import kernel_matrix, open_matrix

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
import time
from ntkdask import kernels
from ntkdask.execution import cluster
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.kernel_matrix.build import kernel_matrix


class Held:
    # waits, after 40 tasks, for the kill

    tasks = 0

    def stage(self, label, total, done=0):
        pass

    def task(self, label, done):
        self.tasks += 1
        if self.tasks == 40:
            time.sleep(600)


if __name__ == "__main__":
    with cluster.connect(n_workers=2, cuda=False, worker_memory="1 GiB") as client:
        kernel_matrix(
            kernels.both(fully_connected(2)),
            sys.argv[1],
            url=sys.argv[2],
            client=client,
            plan=Plan(8),
            threads=1,
            listener=Held(),
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
    deadline = time.monotonic() + 240
    while len(computed(url / "nngp")) < 30 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(120)
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
