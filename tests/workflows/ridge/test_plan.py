"""Plans: sizes that fit, refusals with numbers and advice that holds, and real workers that stay below them."""

import dataclasses
import re

import numpy as np
import pytest
from job_examples import class_data, feature_map, ridge_job, stored

from ntkdask.errors import MemoryBudgetError
from ntkdask.execution import cluster, workers
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule
from ntkdask.planning.resources import BASE_BYTES, Costs, Resources, require_memory
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import parse_steps
from ntkdask.workflows.ridge.fit import RidgeOptions
from ntkdask.workflows.ridge.plan import RidgeShape, costs_of, plan_ridge

MIB, GIB = 2**20, 2**30


def shape(m: int = 2048, **changes) -> RidgeShape:
    values = {
        "n_total": 50_000,
        "n_train": 40_000,
        "row_shape": (100,),
        "row_bytes": 400,
        "m": m,
        "k": 10,
        "n_groups": 1,
        "selection": "gcv",
    }
    return RidgeShape(**{**values, **changes})


def planned(memory_bytes, m=2048, steps=(), plan=None, **changes):
    resources = Resources(memory_bytes, 0, 1, 2, 2)
    return plan_ridge(shape(m, **changes), feature_map(m), steps, plan=plan or Plan(), resources=resources)


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold"])
@pytest.mark.parametrize("budget", [600 * MIB, GIB, 4 * GIB, None])
def test_what_is_planned_fits(budget, selection):
    groups = 5 if selection == "kfold" else 1
    plan = planned(budget, m=1024, selection=selection, n_groups=groups)
    costs = costs_of(shape(1024, selection=selection, n_groups=groups), feature_map(1024), (), plan)
    assert budget is None or costs.worker_bytes <= budget
    assert plan.batch_rows <= plan.slab_rows
    assert costs.tasks > 0
    assert costs.disk_bytes > 0


def test_more_memory_gives_larger_batches_up_to_a_bound():
    """Rows of 60 000 numbers: batches are what takes the memory."""
    long = {"m": 256, "row_shape": (60_000,), "row_bytes": 240_000}
    rows = [planned(b, **long).batch_rows for b in (GIB, 2 * GIB, 4 * GIB, 64 * GIB)]
    assert rows == sorted(rows)
    assert 1 <= rows[0] < rows[1] < rows[-1]
    assert rows[-1] == planned(None, **long).batch_rows == 4096


@pytest.mark.parametrize("selection", ["gcv", "loo", "kfold"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_refusals_give_numbers_and_advice_that_fits(selection, dtype):
    groups = 5 if selection == "kfold" else 1
    changes = {"selection": selection, "n_groups": groups, "plan": Plan(dtype=dtype)}
    with pytest.raises(MemoryBudgetError) as refusal:
        planned(2 * GIB, m=16384, **changes)
    text = str(refusal.value)
    assert refusal.value.exit_code == 2
    assert re.match(r"[a-z-]+ needs [\d.]+ GiB \(rows=1, n_components=16384, targets=10, " + dtype, text)
    assert "but a worker has 2 GiB" in text
    advised = int(re.search(r"n_components <= (\d+)", text).group(1))
    assert advised >= 2048
    planned(2 * GIB, m=advised, **changes)


def test_not_even_the_process_fits():
    with pytest.raises(MemoryBudgetError, match="the process itself"):
        planned(BASE_BYTES // 2, m=64)


def test_zca_of_large_rows_is_counted():
    steps, images = parse_steps(["zca"]), {"row_shape": (64, 64, 3), "row_bytes": 12288}
    with pytest.raises(MemoryBudgetError, match=r"^preprocess-fit needs 10"):
        planned(4 * GIB, m=256, steps=steps, **images)
    assert planned(4 * GIB, m=256, **images)


def test_plan_memory_bytes_wins():
    with pytest.raises(MemoryBudgetError, match="a worker has 400 MiB"):
        planned(64 * GIB, m=8192, plan=Plan(memory_bytes=400 * MIB))


def test_slabs_follow_the_rows_alone():
    """The number of workers and their memory must not change bits."""
    plans = [
        plan_ridge(shape(256), feature_map(256), (), plan=Plan(), resources=Resources(memory, 0, 1, 1, slots))
        for memory, slots in ((None, 1), (16 * GIB, 2), (64 * GIB, 100))
    ]
    assert len(set(plans)) == 1
    for n in (1, 100, 5000, 10**5, 10**7):
        rows = planned(None, n_total=n, n_train=n).slab_rows
        assert min(n, 512) <= rows <= 8192
        assert -(-n // rows) <= max(8, n // 4096)


def test_costs_grow_with_what_they_count():
    plan = planned(None)
    base = costs_of(shape(), feature_map(2048), (), plan)
    for changes, grows in (
        ({"n_runs": 4}, ("flops", "tasks", "disk_bytes")),
        ({"n_total": 100_000, "n_train": 80_000}, ("flops", "tasks", "disk_bytes")),
        ({"m": 4096}, ("flops", "disk_bytes", "worker_bytes")),
        ({"n_groups": 5, "selection": "kfold"}, ("tasks", "disk_bytes", "worker_bytes")),
        ({"selection": "loo"}, ("worker_bytes",)),
    ):
        found = costs_of(dataclasses.replace(shape(), **changes), feature_map(changes.get("m", 2048)), (), plan)
        for name in grows:
            assert getattr(found, name) >= getattr(base, name), (changes, name)


@pytest.mark.parametrize(
    ("selection", "dtype", "m", "steps"),
    [
        ("gcv", "float32", 2048, ["standardize"]),
        ("loo", "float32", 1024, []),
        pytest.param("gcv", "float64", 1536, [], marks=pytest.mark.slow),
        pytest.param("kfold", "float32", 1024, [], marks=pytest.mark.slow),
        ("gcv", "float32", 256, ["zca"]),
    ],
)
def test_workers_stay_below_the_plan(tmp_path, selection, dtype, m, steps):
    """The highest memory that a fresh worker ever held, against what was promised before it ran."""
    n, d = (1500, 1024) if "zca" in steps else (6000, 64)
    x, labels = class_data(n, d)
    job = ridge_job(
        stored(tmp_path, x, labels),
        split=SplitRule(test=0.1),
        steps=parse_steps(steps),
        features=feature_map(m),
        options=RidgeOptions((0.1, 10.0), selection=selection),
        inner_folds=3,
        plan=Plan(dtype=dtype),
    )
    with cluster.connect(n_workers=1, cuda=False, worker_memory="2 GiB") as client:
        metrics = run_job(job, tmp_path / "run", resources=workers.resources(client), client=client)
    memory = metrics["memory"]
    assert memory["measured_peak_bytes"] <= memory["planned_bytes"] <= memory["budget_bytes"]
    # a promise that nothing could break is no promise
    assert memory["planned_bytes"] < 3 * memory["measured_peak_bytes"]
    assert metrics["tasks"]["gram-slab"]["peak_bytes"] > 0


def test_a_run_that_does_not_fit_starts_nothing(tmp_path):
    x, labels = class_data(200, 6)
    job = ridge_job(stored(tmp_path, x, labels), features=feature_map(8192))
    with pytest.raises(MemoryBudgetError, match=r"needs .* GiB .* but a worker has 1 GiB"):
        run_job(job, tmp_path / "run", resources=Resources(GIB))
    assert not (tmp_path / "run" / "fold-0").exists()
    assert np.isfinite(x).all()


def test_a_stored_plan_that_no_longer_fits_is_refused():
    costs = Costs({"gram-slab": 3 * GIB, "solve": 2 * GIB}, 0, 1.0, 1, 1)
    require_memory(costs, Resources(4 * GIB))
    require_memory(costs, Resources(None))
    with pytest.raises(
        MemoryBudgetError, match=r"gram-slab of the run's stored plan needs 3 GiB but a worker has 2 GiB"
    ):
        require_memory(costs, Resources(2 * GIB))
