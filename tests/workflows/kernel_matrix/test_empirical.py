"""Empirical kernels of torch modules out of core: stores, workers, kills, other weights, too small a device, plans."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from empirical_examples import OUTPUTS, images, network

torch = pytest.importorskip("torch")
from job_examples import Counter, Killed, stored  # noqa: E402
from torch import nn  # noqa: E402

import ntkdask as nd  # noqa: E402
from ntkdask.errors import FingerprintError, InputError  # noqa: E402
from ntkdask.features.projected import ProjectedGradients  # noqa: E402
from ntkdask.kernels.empirical import EmpiricalNTK, PseudoNTK  # noqa: E402
from ntkdask.planning.pace import Pace  # noqa: E402
from ntkdask.planning.tiles import Plan  # noqa: E402
from ntkdask.store import RECEIPTS  # noqa: E402
from ntkdask.workflows.kernel_matrix import tile as tile_compute  # noqa: E402
from ntkdask.workflows.kernel_matrix.build import kernel_matrix, open_matrix, plan_kernel_matrix  # noqa: E402
from ntkdask.workflows.kernel_matrix.calibrate import LEAST_SHARE, _entry_seconds  # noqa: E402

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}


def blocks(values):
    """(n, m, k, k) as a matrix in the order i·k + o."""
    n, m, k, _ = values.shape
    return np.array([[values[i // k, j // k, i % k, j % k] for j in range(m * k)] for i in range(n * k)])


def close(found, expected, dtype="float32"):
    found = np.asarray(found)
    return found.dtype == dtype and np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


def kernels_of(module):
    return {
        "pseudo": PseudoNTK(module),
        "trace": EmpiricalNTK(module, output="trace"),
        "logit": EmpiricalNTK(module, output=1),
        "full": EmpiricalNTK(module),
    }


every_kernel = pytest.mark.parametrize("name", ["pseudo", "trace", "logit", "full"])


# --- values -------------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("store", [False, True])
def test_stored_and_lazy_matrices_are_the_kernel(tmp_path, name, dtype, store):
    kernel, x, y = kernels_of(network())[name], images(11, dtype=dtype), images(5, 1, dtype)
    for other, plan in ((None, Plan(4)), (y, Plan(4, 3))):
        exact = kernel(x) if other is None else kernel(x, other)
        exact = blocks(exact) if name == "full" else exact
        url = tmp_path / str(other is None) if store else None
        found = kernel_matrix(kernel, x, other, url=url, plan=plan)
        assert found.shape == exact.shape
        assert close(found.compute(scheduler="synchronous"), exact, dtype)


def test_a_full_matrix_keeps_the_blocks_of_a_row_in_one_tile(tmp_path):
    found = kernel_matrix(EmpiricalNTK(network()), images(11), url=tmp_path / "k", plan=Plan(4))
    assert found.chunks == ((12, 12, 9), (12, 12, 9))
    values = found.compute()
    assert (values == values.T).all()
    listener = Counter()
    again = kernel_matrix(EmpiricalNTK(network()), images(11), url=tmp_path / "k", listener=listener)
    assert listener.labels == []
    assert again.chunks == found.chunks
    plan = plan_kernel_matrix(EmpiricalNTK(network()), images(2000), calibrate=False)
    assert plan.entry == OUTPUTS
    assert plan.tile_rows * OUTPUTS <= 2048


def test_uint8_images_are_scaled_and_stay_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3)).astype(np.uint8)
    data = stored(tmp_path, x, np.zeros(9))
    found = kernel_matrix(PseudoNTK(network()), data.url, url=tmp_path / "k", plan=Plan(4))
    assert close(found.compute(), PseudoNTK(network())((x / np.float32(255)).astype(np.float32)))


# --- workers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pseudo", "full"])
def test_workers_give_the_bits_of_a_loop(tmp_path, client, name):
    kernel, plan = kernels_of(network())[name], Plan(7)
    x = stored(tmp_path, images(), np.zeros(24)).url
    here = kernel_matrix(kernel, x, url=tmp_path / "here", plan=plan, threads=1).compute()
    there = kernel_matrix(kernel, x, url=tmp_path / "there", plan=plan, client=client, threads=1).compute()
    assert here.tobytes() == there.tobytes()
    # resumed without a client, and the other way round: the address is the same
    listener = Counter()
    kernel_matrix(kernel, x, url=tmp_path / "there", listener=listener)
    kernel_matrix(kernel, x, url=tmp_path / "here", listener=listener, client=client)
    assert listener.labels == []
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_large_weights_do_not_travel_with_tasks(tmp_path, client):
    module = nn.Sequential(nn.Flatten(), nn.Linear(108, 4000), nn.ReLU(), nn.Linear(4000, 2)).eval()
    assert sum(p.numel() * 4 for p in module.parameters()) > 2**20
    found = kernel_matrix(PseudoNTK(module), images(8), url=tmp_path / "k", client=client, plan=Plan(4))
    assert close(found.compute(), PseudoNTK(module)(images(8)))


def test_classes_that_workers_cannot_import_are_refused_by_name(tmp_path, client, monkeypatch):
    (tmp_path / "own_layers.py").write_text("import torch\n\n\nclass Doubled(torch.nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = nn.Sequential(nn.Flatten(), importlib.import_module("own_layers").Doubled(108, 2)).eval()
    with pytest.raises(InputError, match=r"cannot import own_layers\.Doubled\. Put the class into a module"):
        kernel_matrix(PseudoNTK(module), images(8), url=tmp_path / "k", client=client)
    with pytest.raises(InputError, match=r"own_layers\.Doubled"):
        nd.featurize(ProjectedGradients(module, 8), images(8), url=tmp_path / "f", client=client)
    with pytest.raises(InputError, match=r"own_layers\.Doubled"):
        nd.KernelRidgeRegressor(PseudoNTK(module), client=client, url=tmp_path / "r").fit(images(8), np.arange(8.0))
    assert not (tmp_path / "k").exists()
    assert not (tmp_path / "k.inputs").exists()
    # here it runs
    found = kernel_matrix(PseudoNTK(module), images(8), url=tmp_path / "k").compute()
    assert close(found, PseudoNTK(module)(images(8)))


SCRIPT = """
import sys
import time
import torch
from ntkdask.execution import cluster
from ntkdask.kernels.empirical import PseudoNTK
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.kernel_matrix.build import kernel_matrix


class Held:
    # waits, after 30 tasks, for the kill

    tasks = 0

    def stage(self, label, total, done=0):
        pass

    def task(self, label, done):
        self.tasks += 1
        if self.tasks == 30:
            time.sleep(600)


if __name__ == "__main__":
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    with cluster.connect(n_workers=2, cuda=False, worker_memory="1 GiB", dashboard_port=0) as client:
        kernel_matrix(
            PseudoNTK(module), sys.argv[1], url=sys.argv[2], client=client, plan=Plan(4), threads=1, listener=Held()
        )
"""


def receipts(url):
    path = url / RECEIPTS
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


@pytest.mark.slow
def test_everything_killed_and_resumed(tmp_path):
    """SIGKILL of driver, scheduler and workers at once; the module comes again with the resumed run."""
    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    data, url = stored(tmp_path, x, np.zeros(80)).url, tmp_path / "k"
    (tmp_path / "run.py").write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), data, str(url)], start_new_session=True, cwd=tmp_path
    )
    deadline = time.monotonic() + 240
    while len(receipts(url)) < 20 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(120)
    done = len(receipts(url))
    assert 20 <= done < 210
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    listener = Counter()
    found = kernel_matrix(PseudoNTK(module), data, url=url, plan=Plan(4), listener=listener, threads=1)
    assert len(listener.labels) <= 210 - done
    whole = kernel_matrix(PseudoNTK(module), data, url=tmp_path / "whole", plan=Plan(4), threads=1)
    assert found.compute().tobytes() == whole.compute().tobytes()


# --- resume and refusal -------------------------------------------------------------------------------------------


def test_resume_computes_what_is_missing(tmp_path):
    x, plan = images(), Plan(6)
    whole = kernel_matrix(PseudoNTK(network()), x, url=tmp_path / "whole", plan=plan).compute()
    with pytest.raises(Killed):
        kernel_matrix(PseudoNTK(network()), x, url=tmp_path / "k", plan=plan, listener=Counter(4))
    listener = Counter()
    found = kernel_matrix(PseudoNTK(network()), x, url=tmp_path / "k", plan=plan, listener=listener)
    assert len(listener.labels) == 10 - 4
    assert found.compute().tobytes() == whole.tobytes()


def other_weights():
    return network(1)


def trained_a_little():
    module = network()
    module[6].bias.data += 1e-6
    return module


def other_stride():
    module = network()
    module[3].padding = (1, 1)
    module[6] = nn.Linear(54, OUTPUTS)
    return module


def frozen():
    module = network()
    module[0].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("make", "key"),
    [(other_weights, "weights"), (trained_a_little, "weights"), (other_stride, "structure"), (frozen, "structure")],
)
def test_other_modules_are_refused(tmp_path, make, key):
    before = kernel_matrix(PseudoNTK(network()), images(), url=tmp_path / "k").compute()
    with pytest.raises(FingerprintError, match=rf"kernel\.module\.{key}: stored"):
        kernel_matrix(PseudoNTK(make()), images(), url=tmp_path / "k")
    with pytest.raises(FingerprintError, match=r"kernel\.precision: stored None, asked 'float64'"):
        kernel_matrix(PseudoNTK(network(), precision="float64"), images(), url=tmp_path / "k")
    assert (open_matrix(tmp_path / "k").compute() == before).all()


# --- too small a device -------------------------------------------------------------------------------------------


class Small:
    """A kernel on a device that has room for `most` entries at once."""

    def __init__(self, kernel, most):
        self.kernel, self.most, self.refused = kernel, most, 0

    def __call__(self, x, y=None):
        if len(x) * len(x if y is None else y) > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.kernel(x) if y is None else self.kernel(x, y)


@pytest.mark.parametrize("name", ["pseudo", "full"])
@pytest.mark.parametrize(("n", "m"), [(30, None), (30, 20), (9, 40)])
def test_tiles_that_do_not_fit_are_halved(name, n, m):
    kernel = kernels_of(network())[name]
    x, y = images(n), None if m is None else images(m, 1)
    small = Small(kernel, 150)
    (found,), halvings = tile_compute.compute_tile(small, x, y)
    (whole,), none = tile_compute.compute_tile(kernel, x, y)
    assert halvings >= 1
    assert none == 0
    assert close(found, whole)
    if m is None:
        assert (found == found.T).all()


def test_a_device_without_room_for_a_few_rows_is_an_error():
    small = Small(PseudoNTK(network()), 0)
    with pytest.raises(torch.OutOfMemoryError):
        tile_compute.compute_tile(small, images(32))
    assert small.refused >= 3

    def broken(x, y=None):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        tile_compute.compute_tile(broken, images(32))


def test_halvings_are_recorded(tmp_path, monkeypatch):
    call, failed = PseudoNTK.__call__, []

    def once(self, x, y=None):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(self, x, y)

    expected = kernel_matrix(PseudoNTK(network()), images(), url=tmp_path / "whole", plan=Plan(12)).compute()
    monkeypatch.setattr(PseudoNTK, "__call__", once)
    found = kernel_matrix(PseudoNTK(network()), images(), url=tmp_path / "k", plan=Plan(12))
    assert sorted(r.get("halvings", 0) for r in receipts(tmp_path / "k")) == [0, 0, 1]
    assert close(found.compute(), expected)


# --- plans --------------------------------------------------------------------------------------------------------


def test_plans_are_measured():
    found = plan_kernel_matrix(PseudoNTK(network()), images(200))
    assert found.seconds > 0
    assert found.pace.side_seconds > 0
    assert found.tile_rows <= 200
    assert found.peak_bytes >= PseudoNTK(network()).workspace_bytes(found.tile_rows, found.tile_cols, 4, (6, 6, 3))


def test_passes_over_rows_are_part_of_the_pace():
    """t(r) = e·r² + 2f·r through two sizes; work is the sum over the tiles."""
    e, f = 2e-6, 3e-3
    assert _entry_seconds((64, e * 64**2 + 2 * f * 64), (32, e * 32**2 + 2 * f * 32)) == pytest.approx(e)
    # noise, or one size alone: a stated share
    assert _entry_seconds((64, 1.0), (32, 0.9)) == _entry_seconds((64, 1.0), (0, 0.0)) == LEAST_SHARE / 64**2
    pace = Pace(e, 0.5, 0.0, 64, 1, f)
    tiles = [(i, j) for i in range(4) for j in range(i + 1)]
    rows = [100, 100, 100, 50]
    work = sum(e * rows[i] ** 2 / 2 + f * rows[i] if i == j else pace.tile_seconds(rows[i], rows[j]) for i, j in tiles)
    assert pace.work_seconds(350, None, 100) == pytest.approx(work, rel=0.1)
    assert pace.tile_seconds(1, 1) == pytest.approx(e + 2 * f)
    side = pace._square_rows(90.0)
    assert pace.tile_seconds(side, side) == pytest.approx(90.0)
