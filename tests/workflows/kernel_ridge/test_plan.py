"""Plans of kernel ridge: which solver and why, sizes that fit, refusals with numbers, and real workers that stay below them."""

import dataclasses
import math
import re

import numpy as np
import pytest
from job_examples import stored

from ntkdask.cache import DEFAULT_BYTES
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution import cluster, workers
from ntkdask.jobs.run import run_job
from ntkdask.jobs.training import SplitRule, TrainingJob
from ntkdask.kernels import NTK, RBF
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import BASE_BYTES, Resources, require_memory
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import parse_steps
from ntkdask.workflows.kernel_ridge.costs import kernel_costs
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan, KernelShape, plan_kernel_ridge
from ntkdask.workflows.kernel_ridge.recipe import KernelRidgeRecipe
from ntkdask.workflows.model import POINTS_BYTES

MIB, GIB = 2**20, 2**30
SIZES = (300, 3000, 12_000, 34_298, 100_000)
PATH = (0.01, 0.1, 1.0)


def shape(n=34_298, row_shape=(9,), k=1, n_runs=1):
    return KernelShape(n + n // 3, n, row_shape, 4 * math.prod(row_shape), k, n_runs, 5)


def planned(
    n=34_298,
    memory=2 * GIB,
    alphas=(1.0,),
    selection="auto",
    solver="auto",
    plan=None,
    steps=(),
    stored=True,
    slots=2,
    threads=1,
    **changes,
):
    choices = KernelRidgeOptions(alphas, selection=selection, solver=solver)
    resources = Resources(memory, 0, threads, 2, slots)
    sizes = shape(n, **changes)
    found = plan_kernel_ridge(sizes, RBF(0.1), choices, steps, plan=plan or Plan(), resources=resources, stored=stored)
    return found, kernel_costs(sizes, RBF(0.1), choices, steps, found)


@pytest.mark.parametrize("memory", [700 * MIB, 2 * GIB, 16 * GIB])
@pytest.mark.parametrize("solver", ["auto", "tiled_cholesky", "cg"])
@pytest.mark.parametrize(("alphas", "selection"), [((1.0,), "auto"), (PATH, "holdout"), (PATH, "gcv"), (PATH, "kfold")])
def test_what_is_planned_fits(memory, solver, alphas, selection):
    for n in SIZES:
        for row_shape, n_runs in (((9,), 4), ((28, 28, 1), 1)):
            plan, costs = planned(n, memory, alphas, selection, solver, row_shape=row_shape, n_runs=n_runs)
            assert costs.worker_bytes <= memory, (n, row_shape, costs.memory)
            require_memory(costs, Resources(memory))
            assert solver in ("auto", plan.solver)
            assert {"gather-rows", "predict", "kernel-tile"} < costs.memory.keys()
            assert min(costs.tasks, costs.disk_bytes, costs.flops) > 0
            # as the record keeps it
            assert KernelRidgePlan(**plan.to_json()) == plan


def test_auto_takes_the_spectrum_while_it_is_cheap_and_says_why():
    plan, _ = planned(1500, alphas=PATH)
    assert plan.solver == "eigh"
    for words in (r"about [\d.]+ s and \d+ MiB a worker", r"cholesky about", r"tiled_cholesky about", r"cg about"):
        assert re.search(words, plan.reason)


@pytest.mark.parametrize(
    ("n", "memory", "alphas", "solver", "why"),
    [
        (10_000, 16 * GIB, (1.0,), "cholesky", r"eigh about [\d.e+]+ s"),
        (6000, 700 * MIB, PATH, "tiled_cholesky", r"eigh needs 1\.\d+ GiB, cholesky needs \d+ MiB, cg about"),
        (
            34_298,
            2 * GIB,
            PATH,
            "cg",
            r"eigh needs 2[67]\.\d GiB, cholesky needs 1\d(\.\d+)? GiB, tiled_cholesky about",
        ),
    ],
)
def test_auto_leaves_what_does_not_fit(n, memory, alphas, solver, why):
    plan, _ = planned(n, memory, alphas)
    assert plan.solver == solver
    assert re.search(why, plan.reason), plan.reason


def test_a_solver_that_is_asked_for():
    for solver in ("eigh", "cholesky", "tiled_cholesky", "cg"):
        plan, _ = planned(500, solver=solver)
        assert (plan.solver, plan.reason) == (solver, "as asked")


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_dense_solvers_that_do_not_fit(solver):
    with pytest.raises(MemoryBudgetError) as refusal:
        planned(34_298, solver=solver)
    text = str(refusal.value)
    assert re.match(rf"solve of solver '{solver}' needs [\d.]+ GiB for 34298 training rows", text)
    assert "the process itself 320 MiB" in text
    assert "but a worker has 2 GiB" in text
    assert 'Out of core: solver="auto" with selection="holdout" or "gcv"' in text
    assert refusal.value.exit_code == 2


def test_leave_one_out_stays_in_memory():
    with pytest.raises(MemoryBudgetError, match='Out of core: solver="auto" with selection="holdout" or "gcv"'):
        planned(34_298, alphas=PATH, selection="loo")
    assert planned(3000, alphas=PATH, selection="loo")[0].solver in ("eigh", "cholesky")
    for solver in ("tiled_cholesky", "cg"):
        with pytest.raises(
            InputError, match=f"solver='{solver}' cannot choose among 3 alphas by 'loo'.*solver=\"eigh\""
        ):
            planned(3000, alphas=PATH, selection="loo", solver=solver)
        # nothing is chosen of one
        assert planned(3000, selection="loo", solver=solver)[0].solver == solver


def test_tiles_without_a_store():
    with pytest.raises(InputError, match="works on stored tiles: give a url"):
        planned(500, solver="tiled_cholesky", stored=False)
    assert planned(500, stored=False)[0].solver == "eigh"


def test_not_even_the_process_fits():
    for solver in ("auto", "tiled_cholesky", "cg", "eigh"):
        with pytest.raises(MemoryBudgetError, match=r"but a (worker|task) has 160 MiB"):
            planned(500, BASE_BYTES // 2, solver=solver)


def test_tiles_too_large_for_a_factorisation():
    with pytest.raises(MemoryBudgetError, match=r"cholesky-tile needs .*Store the matrix in tiles of at most \d+ rows"):
        planned(34_298, 450 * MIB, solver="tiled_cholesky", plan=Plan(tile_cols=2048))


def test_the_plans_own_limit_wins():
    plan, costs = planned(12_000, 64 * GIB, solver="tiled_cholesky", plan=Plan(memory_bytes=600 * MIB))
    assert plan.memory_bytes == 600 * MIB
    assert costs.worker_bytes <= 600 * MIB


def test_tiles_follow_the_job():
    assert planned(5000, plan=Plan(tile_cols=300))[0].matrix_tile == 300
    assert planned(34_298)[0].matrix_tile == 2048
    assert planned(50)[0].matrix_tile <= 50


def test_how_alpha_is_chosen_follows_the_solver():
    options = KernelRidgeOptions(PATH)
    assert [options.selection_of(s) for s in ("eigh", "cholesky", "tiled_cholesky", "cg")] == [
        "gcv",
        "gcv",
        "holdout",
        "holdout",
    ]
    assert [options.n_groups(s, 5) for s in ("eigh", "cg")] == [1, 2]
    assert KernelRidgeOptions(PATH, selection="kfold").n_groups("cg", 5) == 5
    assert KernelRidgeOptions((1.0,), selection="kfold").n_groups("cg", 5) == 1


def test_fits_are_counted():
    """Factorisations, or solutions, over the path: of each alpha and held-out group, and the last one on all rows."""
    for selection, expected in (("kfold", 3 * 5 + 1), ("holdout", 3 + 1), ("gcv", 3)):
        for solver in ("tiled_cholesky", "cg"):
            assert KernelRidgeOptions(PATH, selection=selection).n_fits(solver, 5) == expected
    assert KernelRidgeOptions(PATH, selection="kfold").n_fits("eigh", 5) == 1
    assert KernelRidgeOptions((1.0,)).n_fits("tiled_cholesky", 5) == 1


def test_costs_grow_with_what_they_count():
    for solver in ("tiled_cholesky", "cg", "eigh"):
        memory = 64 * GIB
        _, base = planned(4000, memory, PATH, "holdout" if solver != "eigh" else "gcv", solver)
        for changes, grows in (
            ({"n_runs": 4}, ("flops", "tasks", "disk_bytes")),
            ({"n": 8000}, ("flops", "disk_bytes", "worker_bytes")),
            ({"k": 50}, ("disk_bytes",)),
        ):
            given = {"n": 4000, **changes}
            _, found = planned(given.pop("n"), memory, PATH, "holdout" if solver != "eigh" else "gcv", solver, **given)
            for name in grows:
                assert getattr(found, name) > getattr(base, name), (solver, changes, name)


@pytest.mark.parametrize("memory", [GIB, 2 * GIB])
def test_wide_rows(memory):
    """Rows of 120 000 bytes: smaller batches, rows that stay in the cache counted, tiles that leave room for them."""
    wide, narrow = ((30_000,), (30,))
    few, costs = planned(3000, memory, row_shape=wide, solver="cg")
    many, _ = planned(3000, memory, row_shape=narrow, solver="cg")
    assert few.batch_rows <= many.batch_rows
    assert few.block_rows == 64 * MIB // 120_000 < many.block_rows == 2048
    assert costs.worker_bytes <= memory
    assert few.held_bytes in (0, min(DEFAULT_BYTES, 3000 * 120_000))
    assert many.held_bytes == 3000 * 120
    # what predictions keep of the training rows, and a block of them on its way
    assert costs.memory["predict"] > BASE_BYTES + POINTS_BYTES + few.block_rows * 120_000
    larger = [planned(3000, m, row_shape=wide, solver="cg")[0].batch_rows for m in (GIB, 2 * GIB, 8 * GIB)]
    assert larger == sorted(larger)
    assert larger[0] < larger[-1]


def test_rows_too_wide_are_refused_with_numbers():
    with pytest.raises(MemoryBudgetError, match=r"needs .* but a (worker|task) has 500 MiB"):
        planned(3000, 500 * MIB, row_shape=(3_000_000,), solver="cg")


def test_zca_is_counted():
    steps = parse_steps(["zca"])
    _, costs = planned(3000, 4 * GIB, row_shape=(1024,), steps=steps)
    assert costs.memory["preprocess-fit"] >= BASE_BYTES + 9 * 8 * 1024**2


@pytest.mark.parametrize(
    "change",
    [
        {"alphas": ()},
        {"alphas": (-1.0,)},
        {"alphas": (np.nan,)},
        {"alphas": "many"},
        {"alphas": ((1.0, 2.0), (3.0, 4.0))},
        {"alphas": None},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"tolerance": "small"},
        {"tolerance": np.nan},
        {"max_iterations": 0},
        {"max_iterations": 2.5},
        {"max_iterations": True},
        {"max_iterations": "many"},
    ],
    ids=str,
)
def test_options_that_cannot_be(change):
    (name,) = change
    with pytest.raises(InputError, match=rf"^{name} (is|are) .*expected"):
        KernelRidgeOptions(**{"alphas": (1.0,), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solver": "eig"}, "unknown solver 'eig'; did you mean 'eigh'"),
        ({"solver": None}, "unknown solver None; there are"),
        ({"solver": "cholesk"}, "did you mean 'cholesky'"),
        ({"selection": "gvc"}, "unknown selection 'gvc'; did you mean 'gcv'"),
        ({"selection": ["gcv"]}, "unknown selection"),
    ],
)
def test_unknown_names(change, words):
    with pytest.raises(InputError, match=words):
        KernelRidgeOptions(**change)


def test_numbers_of_any_kind_are_taken():
    options = KernelRidgeOptions(np.float32(0.5), max_iterations=np.int64(7), tolerance=np.float64(1e-3))
    assert options.alphas == (0.5,)
    assert KernelRidgeOptions([1, 2]).alphas == (1.0, 2.0)


# real workers


def kernel_job(folder, n, d, solver, selection="holdout", dtype="float32", steps=(), kernel=None, tile=None, **changes):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)).astype(np.float32)
    y = np.sin(x[:, 0]) + 0.1 * rng.normal(size=n)
    options = KernelRidgeOptions((0.1, 1.0), selection=selection, solver=solver, tolerance=1e-3)
    return TrainingJob(
        "tiny",
        stored(folder, x, y),
        None,
        SplitRule(test=0.1),
        steps,
        KernelRidgeRecipe(kernel or NTK(fully_connected(1)), options),
        plan=Plan(None, tile, dtype=dtype),
        **changes,
    )


@pytest.mark.parametrize(
    ("solver", "n", "d", "memory", "changes"),
    [
        ("cg", 1500, 32, "700 MiB", {}),
        pytest.param("tiled_cholesky", 2000, 32, "700 MiB", {}, marks=pytest.mark.slow),
        pytest.param("cg", 1000, 12_000, "900 MiB", {"kernel": RBF(1e-4)}, marks=pytest.mark.slow),
        pytest.param("eigh", 2500, 32, "900 MiB", {"selection": "gcv"}, marks=pytest.mark.slow),
        pytest.param("cholesky", 3500, 32, "900 MiB", {"dtype": "float64"}, marks=pytest.mark.slow),
        pytest.param("tiled_cholesky", 6000, 32, "700 MiB", {"selection": "gcv"}, marks=pytest.mark.slow),
        pytest.param("cg", 6000, 32, "700 MiB", {"selection": "kfold", "inner_folds": 3}, marks=pytest.mark.slow),
    ],
)
def test_workers_stay_below_the_plan(tmp_path, solver, n, d, memory, changes):
    """The highest memory that a fresh worker ever held, against what was promised before it ran."""
    job = kernel_job(tmp_path, n, d, solver, **changes)
    with cluster.connect(n_workers=2, cuda=False, worker_memory=memory, dashboard_port=0) as client:
        metrics = run_job(job, tmp_path / "run", resources=workers.resources(client), client=client)
    # products of conjugate gradients, which have no label of their own in the metrics, count too
    held = metrics["memory"]
    assert metrics["plan"]["solver"] == solver
    assert held["measured_peak_bytes"] <= held["planned_bytes"] <= held["budget_bytes"]
    # a promise that nothing could break is no promise
    assert held["planned_bytes"] < 3 * held["measured_peak_bytes"]
    label = {"cg": "kernel-tile", "tiled_cholesky": "cholesky-tile"}.get(solver, "solve")
    assert metrics["tasks"][label]["peak_bytes"] > 0


def test_a_run_that_does_not_fit_starts_nothing(tmp_path):
    job = kernel_job(tmp_path, 300, 4, "eigh")
    with pytest.raises(MemoryBudgetError, match=r"needs .* but a (worker|task) has 321 MiB"):
        run_job(job, tmp_path / "run", resources=Resources(321 * MIB))
    assert not (tmp_path / "run" / "fold-0").exists()


def test_a_stored_plan_that_no_longer_fits_is_refused(tmp_path):
    job = kernel_job(tmp_path, 300, 4, "cg")
    run_job(job, tmp_path / "run", resources=Resources(GIB))
    with pytest.raises(MemoryBudgetError, match=r"of the run's stored plan needs .* but a worker has 330 MiB"):
        run_job(job, tmp_path / "run", resources=Resources(330 * MIB))


def test_printed_sizes(tmp_path):
    job = kernel_job(tmp_path, 300, 4, "auto", tile=100)
    plan = job.recipe.plan(job.request(), Resources(2 * GIB, slots=2))
    words = job.recipe.size_words(job.request(), plan)
    assert words["matrix"] == "270 × 270 (float32), targets 1, fits 1"
    assert words["tiles"] == "6 of 100 × 100, one triangle"
    assert words["solver"].startswith("eigh (about")
    assert words["alphas"] == "2, chosen by holdout"
    one_alpha = dataclasses.replace(job.recipe, options=KernelRidgeOptions((1.0,)))
    alone = dataclasses.replace(job, recipe=one_alpha)
    assert "alphas" not in alone.recipe.size_words(alone.request(), plan)
