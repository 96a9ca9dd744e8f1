"""The pass of leave-one-out is kept slab by slab: a kill repeats neither it nor the factorisation before it."""

import json

import pytest
from job_examples import Counter, Killed, class_data, ridge_job, run, stored

from ntkdask.jobs.inspect import status, verify
from ntkdask.planning.tiles import Plan
from ntkdask.workflows.ridge.fit import RidgeOptions


class KilledAt(Counter):
    """Dies at the task number `count` of a stage."""

    def __init__(self, label, count):
        super().__init__()
        self._label, self._at = label, count

    def task(self, label, done):
        super().task(label, done)
        if self.count(self._label) == self._at:
            raise Killed


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_kill_in_the_pass(tmp_path, count):
    data = stored(tmp_path, *class_data())
    options = RidgeOptions((0.1, 10.0), selection="loo")
    job = ridge_job(data, options=options, plan=Plan(tile_rows=40, dtype="float32"))
    whole = run(job, tmp_path / "whole", listener=(all_of := Counter()))["folds"]
    # four slabs and three sums; a factorisation and a choice
    assert (all_of.count("loo-slab"), all_of.count("solve")) == (7, 2)
    with pytest.raises(Killed):
        run(job, tmp_path / "cut", listener=KilledAt("loo-slab", count))
    assert verify(tmp_path / "cut") == []
    again = Counter()
    found = run(job, tmp_path / "cut", listener=again)["folds"]
    assert (again.count("loo-slab"), again.count("solve"), again.count("gram-slab")) == (7 - count, 1, 0)
    paths = [json.dumps(folds[0]["alpha_path"]) for folds in (found, whole)]
    assert paths[0] == paths[1]
    assert found[0]["test"] == whole[0]["test"]
    assert all(stage.finished for stage in status(tmp_path / "cut"))
