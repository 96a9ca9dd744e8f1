"""Runs of kernel ridge that are killed or damaged: the numbers of a run that was not."""

import json

import pytest
from job_examples import Counter, Killed, class_data, damage, run, stored
from kernel_job_examples import assert_equal_models, job_of

from ntkdask.cache import shared
from ntkdask.errors import NtkdaskError
from ntkdask.execution import cluster
from ntkdask.jobs.inspect import status, verify
from ntkdask.matrices.operator import StoredKernel
from ntkdask.states import list_states
from ntkdask.workflows.kernel_ridge import systems as dual_systems


def stop_and_go_on(job, folder, stops):
    """Kill the driver at those tasks, then let it finish; (metrics, labels of all tasks that any run did, kills)."""
    labels, kills = [], 0
    for stop_at in stops:
        listener = Counter(stop_at)
        try:
            run(job, folder, listener=listener)
        except Killed:
            kills += 1
        labels += listener.labels
    last = Counter()
    metrics = run(job, folder, listener=last)
    return metrics, labels + last.labels, kills


@pytest.mark.parametrize("solver", ["tiled_cholesky", "cg", "eigh"])
def test_a_killed_run_goes_on(tmp_path, solver):
    """Killed after tasks of every stage; what has a receipt is not computed again."""
    job = job_of(stored(tmp_path, *class_data(110)), solver=solver, selection="kfold")
    whole = Counter()
    expected = run(job, tmp_path / "whole", listener=whole)
    n_first = whole.labels.index("kernel-tile")
    n_solve = len(whole.labels) - whole.count("predict")
    stops = [n_first + 1, 4, {"tiled_cholesky": 12}.get(solver, 3), n_solve + 1]
    found, labels, kills = stop_and_go_on(job, tmp_path / "killed", stops)
    assert kills >= 3
    assert_equal_models(found, expected)
    for label in ("kernel-tile", "cholesky-tile", "predict"):
        assert labels.count(label) == whole.count(label), label
    again = Counter()
    assert_equal_models(run(job, tmp_path / "killed", listener=again), expected)
    assert again.labels == []
    assert verify(tmp_path / "killed") == []


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_killed_within_a_factorisation(tmp_path, share):
    """In the middle of cholesky tiles: each tile of each factor once, in all runs together."""
    job = job_of(stored(tmp_path, *class_data(110)), solver="tiled_cholesky", selection="holdout")
    whole = Counter()
    expected = run(job, tmp_path / "whole", listener=whole)
    places = [i for i, label in enumerate(whole.labels) if label == "cholesky-tile"]
    killed = Counter(places[int(share * len(places))] + 1)
    with pytest.raises(Killed):
        run(job, tmp_path / "killed", listener=killed)
    pending = [s for s in status(tmp_path / "killed") if not s.finished]
    assert any("factors" in s.name and 0 < s.done < s.total for s in pending)
    resumed = Counter()
    found = run(job, tmp_path / "killed", listener=resumed)
    assert killed.count("cholesky-tile") + resumed.count("cholesky-tile") == whole.count("cholesky-tile")
    assert resumed.count("kernel-tile") == 0
    assert_equal_models(found, expected)
    assert not list((tmp_path / "killed").glob("fold-0/factors/*"))


def test_killed_within_conjugate_gradients(tmp_path, monkeypatch):
    """With a checkpoint after every product: the rest of the products, equal bits, no checkpoint left behind."""
    monkeypatch.setattr(dual_systems, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("ntkdask.workflows.kernel_ridge.plan.MAX_RANK", 3)
    job = job_of(stored(tmp_path, *class_data(110)), solver="cg", selection="gcv")
    product, counts = StoredKernel.__matmul__, {"products": 0, "stop": None}

    def counted(operator, v):
        counts["products"] += 1
        if counts["products"] == counts["stop"]:
            raise Killed
        return product(operator, v)

    monkeypatch.setattr(StoredKernel, "__matmul__", counted)
    expected = run(job, tmp_path / "whole")
    counts.update(total=counts["products"], products=0, stop=counts["products"] - 1)
    with pytest.raises(Killed):
        run(job, tmp_path / "killed")
    counts.update(products=0, stop=None)
    found = run(job, tmp_path / "killed")
    assert (
        counts["products"] == 2
    )  # the last solve went on where it stood; how many it takes in all depends on the BLAS
    assert_equal_models(found, expected)
    assert len(list_states(tmp_path / "killed")) == len(list_states(tmp_path / "whole"))


def test_killed_within_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr("ntkdask.workflows.kernel_ridge.plan.slab_rows", lambda n: 16)
    job = job_of(stored(tmp_path, *class_data(110)), solver="cg")
    whole = Counter()
    expected = run(job, tmp_path / "whole", listener=whole)
    assert whole.count("predict") == 7
    with pytest.raises(Killed):
        run(job, tmp_path / "killed", listener=Counter(len(whole.labels) - 4))
    resumed = Counter()
    assert_equal_models(run(job, tmp_path / "killed", listener=resumed), expected)
    assert resumed.labels == ["predict"] * 4


def test_status_of_a_killed_run(tmp_path):
    job = job_of(stored(tmp_path, *class_data(110)), solver="tiled_cholesky", alphas=(0.1,))
    with pytest.raises(Killed):
        run(job, tmp_path / "run", listener=Counter(4))
    rows = {s.name: s for s in status(tmp_path / "run")}
    assert rows["fold-0/kernel"].total == 6  # 82 or 83 rows in tiles of 30
    assert 0 < rows["fold-0/kernel"].done < 6
    assert not rows["fold-0/kernel"].finished
    assert {"split", "fold-0/preprocess", "fold-0/gather"} <= rows.keys()
    run(job, tmp_path / "run")
    rows = {s.name: s for s in status(tmp_path / "run")}
    assert all(s.finished for s in rows.values())
    assert {"fold-0/kernel", "fold-0/solve", "fold-0/predictions"} <= rows.keys()
    assert any("all rows" in name for name in rows)


@pytest.mark.parametrize("solver", ["eigh", "cg"])
def test_a_damaged_tile_is_named_and_mended(tmp_path, solver):
    """Found by `verify` in a finished run, and by the solver of a run that was cut off before it."""
    job = job_of(stored(tmp_path, *class_data(110)), solver=solver)
    expected = run(job, tmp_path / "run")
    damage(tmp_path / "run" / "fold-0" / "kernel", (2, 1))
    (found,) = verify(tmp_path / "run")
    assert str(found) == f"{tmp_path / 'run' / 'fold-0' / 'kernel'} tile (2, 1)"
    assert verify(tmp_path / "run", repair=True) == [found]
    again = Counter()
    assert_equal_models(run(job, tmp_path / "run", listener=again), expected)
    assert again.labels == ["kernel-tile"]
    assert verify(tmp_path / "run") == []
    whole = Counter()
    run(job, tmp_path / "other", listener=whole)
    with pytest.raises(Killed):
        run(job, tmp_path / "cut", listener=Counter(len(whole.labels) - whole.count("predict") - (solver == "eigh")))
    damage(tmp_path / "cut" / "fold-0" / "kernel", (2, 2))
    record = tmp_path / "cut" / "record.json"
    stages = json.loads(record.read_text())
    stages["stages"] = {k: v for k, v in stages["stages"].items() if "solve" not in k}
    record.write_text(json.dumps(stages))
    shared.clear()  # tiles that this process kept are whole
    with pytest.raises(NtkdaskError, match=r"tile \(2, 2\) of .*fold-0/kernel is damaged.*--repair"):
        run(job, tmp_path / "cut")
    verify(tmp_path / "cut", repair=True)
    assert_equal_models(run(job, tmp_path / "cut"), expected)


def test_a_worker_that_dies(tmp_path):
    """One of two workers killed between tasks: the run ends, with equal bits."""
    job = job_of(stored(tmp_path, *class_data(110)), solver="tiled_cholesky")
    expected = run(job, tmp_path / "whole")
    with cluster.connect(n_workers=2, cuda=False, worker_memory="1 GiB", dashboard_port=0) as own:
        found = run(job, tmp_path / "run", own, listener=_Assassin(own, "cholesky-tile", 5))
    assert_equal_models(found, expected)
    assert verify(tmp_path / "run") == []


class _Assassin(Counter):
    """Kills a worker process when it has heard of so many tasks of a label."""

    def __init__(self, client, label, at) -> None:
        super().__init__()
        self._pids, self._label, self._at = list(client.run(_pid).values()), label, at

    def task(self, label, done) -> None:
        import os
        import signal

        super().task(label, done)
        if label == self._label and self.count(label) == self._at:
            os.kill(self._pids[0], signal.SIGKILL)


def _pid() -> int:
    import os

    return os.getpid()
