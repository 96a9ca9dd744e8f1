"""Ensembles of infinitely wide networks: tiles, stores and clusters give what dense formulas give; resumed, reused, refused."""

import math

import dask.array as da
import numpy as np
import pytest
from cluster_examples import PaperCluster
from job_examples import Counter, Killed

from ntkdask import kernels
from ntkdask.datasets import write_dataset
from ntkdask.errors import FingerprintError, InputError, MemoryBudgetError
from ntkdask.matrices.factorize import factorize
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import BASE_BYTES, Resources
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing.targets import encode_targets
from ntkdask.store import TileStore
from ntkdask.workflows.ensemble.converged import predict_converged
from ntkdask.workflows.ensemble.kernels import EnsembleMatrices
from ntkdask.workflows.ensemble.plan import Training, plan_ensemble
from ntkdask.workflows.ensemble.predict import predict_ensemble, predict_stored_ensemble
from ntkdask.workflows.ensemble.run import EnsembleRun
from ntkdask.workflows.kernel_matrix.build import kernel_matrix

NETWORK = fully_connected(2, bias_variance=0.1)
TIMES = (0.0, 0.05, 2.0, math.inf)
N, M, REG = 40, 23, 0.05
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
KINDS = pytest.mark.parametrize("kind", ["ntk", "nngp"])


def rows(n, seed, dtype="float64"):
    return (np.random.default_rng(seed).standard_normal((n, 6)) / 2).astype(dtype)


def problem(dtype="float64"):
    """(x_train, targets (N, 2), x_test)."""
    x = rows(N, 0, dtype)
    return x, np.stack([np.sin(3 * x[:, 0]), x[:, 1] * x[:, 2]], axis=1).astype("float64"), rows(M, 1, dtype)


def dense(kind, x, y, tested, times=TIMES, reg=REG):
    """(mean (T, m, k), covariance (T, m, m)) by the formulas with inverses, float64."""
    x, tested = x.astype("float64"), tested.astype("float64")
    k_dd, theta_dd = kernels.both(NETWORK, x)
    k_td, theta_td = kernels.both(NETWORK, tested, x)
    k_tt = kernels.NNGP(NETWORK)(tested)
    if kind == "nngp":
        theta_dd, theta_td = k_dd, k_td
    regularised = theta_dd + reg * np.eye(len(x))
    values, vectors = np.linalg.eigh(regularised)
    inverse = np.linalg.inv(regularised)
    means, covariances = [], []
    for t in times:
        gain = theta_td @ inverse @ (np.eye(len(x)) - vectors * np.exp(-values * t) @ vectors.T)
        means.append(gain @ y)
        if kind == "nngp":
            gain = theta_td @ inverse @ (np.eye(len(x)) - vectors * np.exp(-2 * values * t) @ vectors.T)
            covariances.append(k_tt - gain @ k_td.T)
        else:
            covariances.append(k_tt + gain @ k_dd @ gain.T - gain @ k_td.T - k_td @ gain.T)
    return np.stack(means), np.stack(covariances)


def assert_predicts(found, mean, covariance, tolerance=1e-9):
    """What was asked for, against the dense formulas."""
    __tracebackhide__ = True
    expected = {"mean": mean, "variance": np.einsum("tii->ti", covariance), "covariance": covariance}
    for name, value in expected.items():
        given = getattr(found, name)
        if given is not None:
            assert given.shape == value.shape, name
            assert np.abs(np.asarray(given) - value).max() <= tolerance, name


def predict(kind, *, times=TIMES, diag_reg=REG, **keywords):
    x, y, tested = problem()
    return predict_ensemble(NETWORK, x, y, tested, kind=kind, times=times, diag_reg=diag_reg, **keywords)


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("plan", [Plan(), Plan(tile_rows=7, tile_cols=9), Plan(tile_rows=1, tile_cols=40)])
@KINDS
def test_in_memory_with_any_tiles(kind, plan, dtype):
    x, y, tested = problem(dtype)
    found = predict_ensemble(
        NETWORK, x, y, tested, kind=kind, times=TIMES, diag_reg=REG, output="covariance", plan=plan
    )
    assert_predicts(found, *dense(kind, x, y, tested), TOLERANCE[dtype])
    assert np.array_equal(found.covariance, found.covariance.transpose(0, 2, 1))
    assert found.times == TIMES
    assert found.unlearned == 0.0


@pytest.mark.parametrize("output", ["mean", "variance", "covariance"])
@KINDS
def test_stored_is_what_memory_gives(tmp_path, kind, output):
    plan = Plan(tile_rows=9, tile_cols=16)
    found = predict(kind, output=output, plan=plan, url=tmp_path / "run")
    whole = predict(kind, output=output, plan=plan)
    for name in ("mean", "variance", "covariance"):
        stored, kept = getattr(found, name), getattr(whole, name)
        assert (stored is None) == (kept is None)
        if kept is not None:
            assert isinstance(stored, da.Array)
            # other tiles of the kernel of the training rows, other rounding
            assert np.abs(stored.compute() - kept).max() <= 1e-11
    assert (whole.variance is None) == (output == "mean")
    assert (whole.covariance is None) == (output != "covariance")


@KINDS
def test_on_a_cluster_as_in_a_loop(tmp_path, client, kind):
    keywords = {"output": "covariance", "plan": Plan(tile_rows=9, tile_cols=16), "resources": Resources(threads=1)}
    there = predict(kind, url=tmp_path / "cluster", client=client, **keywords)
    here = predict(kind, url=tmp_path / "loop", **keywords)
    for name in ("mean", "variance", "covariance"):
        assert getattr(there, name).compute().tobytes() == getattr(here, name).compute().tobytes()
    receipts = TileStore.open(f"{there.url}/values").receipts
    assert len(receipts) == 3
    assert all(r.worker.startswith("tcp://") for r in receipts.values())
    assert not (tmp_path / "cluster" / "predictions" / there.url / "factors").exists()


@pytest.mark.parametrize("where", ["memory", "folder"])
@KINDS
def test_the_training_rows_themselves(tmp_path, kind, where):
    x, y, _ = problem()
    keywords = {"kind": kind, "times": TIMES, "diag_reg": REG, "output": "covariance", "plan": Plan(tile_rows=11)}
    found = predict_ensemble(NETWORK, x, y, **keywords, url=tmp_path / "run" if where == "folder" else None)
    assert_predicts(found, *dense(kind, x, y, x))
    trained = predict_ensemble(NETWORK, x, y, kind=kind, output="covariance")
    assert np.abs(trained.mean[0] - y).max() <= 1e-9
    assert np.abs(trained.covariance).max() <= 1e-12


@KINDS
def test_stored_matrices(tmp_path, client, kind):
    x, y, tested = problem()
    plan, urls = Plan(tile_rows=12, tile_cols=12), {}
    for name, kernel in (("nngp", kernels.NNGP(NETWORK)), ("ntk", kernels.NTK(NETWORK))):
        for suffix, rectangle in (("dd", (x, None)), ("td", (tested, x)), ("tt", (tested, None))):
            urls[f"{name}_{suffix}"] = tmp_path / f"{name}_{suffix}"
            kernel_matrix(kernel, *rectangle, url=urls[f"{name}_{suffix}"], plan=plan)
    del urls["ntk_tt"]
    asked = {"kind": kind, "times": TIMES, "diag_reg": REG, "plan": Plan(tile_rows=10, tile_cols=17)}
    expected = dense(kind, x, y, tested)
    matrices = EnsembleMatrices(**urls)
    assert_predicts(predict_stored_ensemble(matrices, y, output="covariance", **asked), *expected)
    found = predict_stored_ensemble(matrices, y, output="covariance", **asked, url=tmp_path / "run", client=client)
    assert_predicts(found, *expected)
    only_diagonal = EnsembleMatrices(**{**urls, "nngp_tt": kernels.NNGP(NETWORK).diagonal(tested)})
    assert_predicts(predict_stored_ensemble(only_diagonal, y, **asked), *expected)
    found = predict_stored_ensemble(only_diagonal, y, **asked, url=tmp_path / "diagonal", client=client)
    assert_predicts(found, *expected)
    bare = EnsembleMatrices(**{k: v for k, v in urls.items() if k.endswith("dd")})
    assert_predicts(predict_stored_ensemble(bare, y, output="covariance", **asked), *dense(kind, x, y, x))
    with pytest.raises(InputError, match=r"takes nngp_tt, the url of the NNGP of the 23 test rows"):
        predict_stored_ensemble(only_diagonal, y, output="covariance", **asked)
    with pytest.raises(InputError, match=r"got an array of shape \(22,\)"):
        predict_stored_ensemble(EnsembleMatrices(**{**urls, "nngp_tt": np.ones(22)}), y, **asked)
    with pytest.raises(InputError, match=r"nngp_td has shape \(40, 40\); .* must be \(40, 40\)|nngp_tt has shape"):
        predict_stored_ensemble(
            EnsembleMatrices(**{**urls, "nngp_td": urls["nngp_dd"], "ntk_td": urls["ntk_dd"]}), y, **asked
        )
    with pytest.raises(InputError, match=r"nngp_dd has shape \(23, 40\); .* must be \(23, 23\)"):
        predict_stored_ensemble(EnsembleMatrices(**{**urls, "nngp_dd": urls["nngp_td"]}), y, **asked)


def stored_matrices(folder):
    """(x, y, tested, EnsembleMatrices) with tiles of 12."""
    x, y, tested = problem()
    for name, rectangle in (("dd", (x, None)), ("td", (tested, x))):
        kernel_matrix(kernels.both(NETWORK), *rectangle, url=folder / name, plan=Plan(tile_rows=12, tile_cols=12))
    urls = {f"{part}_{name}": folder / name / part for part in ("nngp", "ntk") for name in ("dd", "td")}
    return x, y, tested, EnsembleMatrices(**urls, nngp_tt=kernels.NNGP(NETWORK).diagonal(tested))


@pytest.mark.parametrize("on_cluster", [False, True])
@KINDS
def test_convergence_from_a_factor(tmp_path, client, kind, on_cluster):
    x, y, tested, matrices = stored_matrices(tmp_path)
    client = client if on_cluster else None
    factor = factorize(tmp_path / "dd" / kind, REG, url=tmp_path / "factor", client=client)
    found = predict_converged(factor, matrices, y, kind=kind, client=client, plan=Plan(tile_rows=10))
    assert_predicts(found, *dense(kind, x, y, tested, [math.inf]))
    assert found.variance is not None
    assert found.diag_reg == REG
    assert predict_converged(factor, matrices, y, kind=kind, output="mean").variance is None


def test_a_factor_of_something_else_is_refused(tmp_path):
    _, y, _, matrices = stored_matrices(tmp_path)
    factor = factorize(tmp_path / "dd" / "nngp", REG, url=tmp_path / "factor")
    with pytest.raises(InputError, match=r"is not one of ntk \+ rI"):
        predict_converged(factor, matrices, y)
    with pytest.raises(InputError, match="predict_stored_ensemble"):
        predict_converged(factor, matrices, y, kind="nngp", output="covariance")
    scaled = factorize(tmp_path / "dd" / "nngp", REG, url=tmp_path / "scaled", scale=np.full(N, 2.0))
    with pytest.raises(InputError, match="without scale"):
        predict_converged(scaled, matrices, y, kind="nngp")


def test_an_ntk_needs_both_matrices(tmp_path):
    x, y, _ = problem()
    kernel_matrix(kernels.NNGP(NETWORK), x, url=tmp_path / "k")
    with pytest.raises(InputError, match="ntk_dd beside nngp_dd"):
        predict_stored_ensemble(EnsembleMatrices(nngp_dd=tmp_path / "k"), y)
    assert predict_stored_ensemble(EnsembleMatrices(nngp_dd=tmp_path / "k"), y, kind="nngp").mean.shape == (1, N, 2)


def test_neural_tangents_time_and_regularisation():
    """Its loss is divided by n·k, its regularisation multiplies the mean of the diagonal."""
    x, y, tested = problem()
    found = predict("ntk", times=500.0, learning_rate=0.2, diag_reg=1e-3, diag_reg_absolute_scale=False)
    reg = 1e-3 * np.trace(kernels.NTK(NETWORK)(x)) / N
    assert found.diag_reg == pytest.approx(reg, rel=1e-12)
    assert found.times == (500.0,)
    assert_predicts(found, *dense("ntk", x, y, tested, [500.0 * 0.2 / (N * 2)], reg))


# --- what goes in -------------------------------------------------------------------------------------------------


def test_labels_are_encoded(tmp_path):
    x, _, tested = problem()
    labels = np.arange(N) % 3
    expected, covariance = dense("ntk", x, encode_targets(labels, 3, "float64"), tested)
    asked = {"times": TIMES, "diag_reg": REG}
    assert_predicts(predict_ensemble(NETWORK, x, labels, tested, n_classes=3, **asked), expected, covariance)
    data = write_dataset(tmp_path / "data.zarr", x, labels, kind="classification", class_names=["a", "b", "c"])
    assert_predicts(predict_ensemble(NETWORK, data.url, None, tested, **asked), expected, covariance)
    # without n_classes integers are numbers
    assert predict_ensemble(NETWORK, x, labels, tested).mean.shape == (1, M, 1)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("source", ["dask", "dataset"])
def test_other_sources(tmp_path, source, folder):
    x, y, tested = problem()
    if source == "dask":
        given = da.from_array(x, chunks=(13, 6)), da.from_array(y, chunks=(20, 2)), da.from_array(tested, chunks=(5, 3))
    else:
        given = (
            write_dataset(tmp_path / "a.zarr", x, y),
            None,
            write_dataset(tmp_path / "b.zarr", tested, np.zeros(M)).url,
        )
    url = tmp_path / "run" if folder else None
    found = predict_ensemble(NETWORK, *given, kind="nngp", times=TIMES, diag_reg=REG, url=url)
    assert_predicts(found, *dense("nngp", x, y, tested))


def test_integer_rows_are_cast():
    x = np.arange(12).reshape(6, 2)
    found = predict_ensemble(NETWORK, x, np.arange(6), x[:2], diag_reg=0.1)
    expected = dense("ntk", x, np.arange(6.0)[:, None], x[:2], [math.inf], 0.1)
    assert np.abs(found.mean - expected[0]).max() <= 1e-2


# --- folders: resume, reuse, refuse -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("kind", ["nngp"])
def test_a_killed_run_goes_on(tmp_path, kind, stop_at):
    plan = Plan(tile_rows=9)
    counter = Counter()
    whole = predict(kind, output="covariance", plan=plan, url=tmp_path / "whole", listener=counter)
    assert len(counter.labels) == 1 + 1 + 3 + 6  # kernel-tile, factorise, predict, pairs of tiles
    with pytest.raises(Killed):
        predict(kind, output="covariance", plan=plan, url=tmp_path / "run", listener=Counter(stop_at))
    rest = Counter()
    found = predict(kind, output="covariance", plan=plan, url=tmp_path / "run", listener=rest)
    # the record of the decomposition is written after its listener hears of it
    repeated = 1 if stop_at == 2 else 0
    assert len(rest.labels) == 11 - stop_at + repeated
    for name in ("mean", "variance", "covariance"):
        assert getattr(found, name).compute().tobytes() == getattr(whole, name).compute().tobytes()
    again = Counter()
    predict(kind, output="covariance", plan=plan, url=tmp_path / "run", listener=again)
    assert again.labels == []


def test_a_folder_answers_other_questions_with_its_decomposition(tmp_path):
    x, y, tested = problem()
    predict("ntk", url=tmp_path / "run")
    counter = Counter()
    asked = {"times": (0.3, 7.0), "diag_reg": 0.5, "url": tmp_path / "run", "listener": counter}
    found = predict_ensemble(NETWORK, x, y, tested[:5], **asked)
    assert set(counter.labels) == {"predict"}
    assert_predicts(found, *dense("ntk", x, y, tested[:5], (0.3, 7.0), 0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": fully_connected(1)}, "network"),
        ({"targets": np.zeros(N)}, "targets: stored"),
        ({"x_train": rows(N, 5)}, "train: stored"),
        ({"kind": "nngp"}, "kind: stored 'ntk', asked 'nngp'"),
        ({"plan": Plan(dtype="float32")}, "dtype"),
    ],
)
def test_a_folder_of_another_training_set_is_refused(tmp_path, change, words):
    x, y, tested = problem()
    arguments = {"network": NETWORK, "x_train": x, "targets": y, "x_test": tested}
    predict_ensemble(**arguments, url=tmp_path / "run")
    with pytest.raises(FingerprintError, match=words):
        predict_ensemble(**{**arguments, **change}, url=tmp_path / "run")


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "matrices"), [("ntk", 4), ("nngp", 3)])
def test_a_decomposition_that_does_not_fit_is_refused_with_the_numbers(kind, matrices):
    training = Training(kind)
    sizes = {"n": 20_000, "m": 1000, "k": 1, "dtype": "float64", "kernel_bytes": lambda r, c: 64 * r * c}
    with pytest.raises(
        MemoryBudgetError, match=rf"20000 training rows needs .* \({matrices} matrices of 20000"
    ) as caught:
        plan_ensemble(training, **sizes, plan=Plan(memory_bytes=4 * 2**30), resources=None)
    assert "predict_converged" in str(caught.value)
    advised = int(str(caught.value).split("at most ")[1].split()[0])
    plan_ensemble(training, **{**sizes, "n": advised}, plan=Plan(memory_bytes=4 * 2**30), resources=None)
    fits = plan_ensemble(training, **sizes, plan=Plan(), resources=Resources(memory_bytes=64 * 2**30))
    assert max(fits.memory.values()) <= 64 * 2**30
    with pytest.raises(MemoryBudgetError):
        plan_ensemble(training, **sizes, plan=Plan(), resources=Resources(memory_bytes=4 * 2**30))


def test_tiles_follow_the_budget():
    training = Training(output="covariance", times=TIMES)
    sizes = {
        "n": 4000,
        "m": 5000,
        "k": 10,
        "dtype": "float64",
        "kernel_bytes": lambda r, c: 64 * r * c,
        "resources": None,
    }
    large = plan_ensemble(training, **sizes, plan=Plan())
    small = plan_ensemble(training, **sizes, plan=Plan(memory_bytes=1100 * 2**20))
    assert 1 <= small.tile_rows < large.tile_rows
    assert max(small.memory.values()) <= 1100 * 2**20


def test_a_gpu_is_used_where_everything_fits_it():
    sizes = {"n": 4000, "m": 5000, "k": 10, "dtype": "float64", "kernel_bytes": lambda r, c: 64 * r * c, "plan": Plan()}
    for device_bytes, used in ((0, False), (2**28, False), (2**34, True)):
        assert plan_ensemble(Training(), **sizes, resources=Resources(device_bytes=device_bytes)).device is used
    assert not plan_ensemble(Training(), **sizes, resources=None).device


def test_the_call_itself_refuses_before_anything_runs(tmp_path):
    with pytest.raises(MemoryBudgetError, match="40 training rows"):
        predict("ntk", url=tmp_path / "run", plan=Plan(memory_bytes=2**20))
    assert not (tmp_path / "run").exists()


def test_tiles_that_were_asked_for_and_do_not_fit_are_refused():
    sizes = {"n": 1000, "m": 50_000, "k": 10, "dtype": "float64", "kernel_bytes": lambda r, c: 64 * r * c}
    limit = {"resources": Resources(memory_bytes=2**30)}
    with pytest.raises(MemoryBudgetError, match=r"for 50000 rows .* Use Plan.tile_rows <= ") as caught:
        plan_ensemble(Training(), **sizes, plan=Plan(tile_rows=50_000), **limit)
    advised = int(str(caught.value).split("<= ")[1].rstrip("."))
    fits = plan_ensemble(Training(), **sizes, plan=Plan(tile_rows=advised), **limit)
    assert fits.tile_rows == advised
    assert max(fits.memory.values()) <= 2**30


def test_with_a_client_the_workers_memory_decides_before_anything_runs(tmp_path):
    """Their share of 64 GiB, which the caller did not state; the rows are not even written."""
    workers = PaperCluster()
    x = np.zeros((100_000, 2), "float32")
    with pytest.raises(MemoryBudgetError, match=r"100000 training rows needs 299.* but a task has 57\.6"):
        predict_ensemble(NETWORK, x, np.zeros(len(x)), x[:5], url=tmp_path / "run", client=workers)
    assert workers.asked == 1
    assert not (tmp_path / "run").exists()
    # what the caller states counts instead, and nobody is asked
    for stated in ({"plan": Plan(memory_bytes=2**30)}, {"resources": Resources(memory_bytes=2**30)}):
        with pytest.raises(MemoryBudgetError, match=r"but a task has 1 GiB"):
            predict_ensemble(NETWORK, x, np.zeros(len(x)), x[:5], url=tmp_path / "run", client=workers, **stated)
    assert workers.asked == 1


def test_stored_matrices_with_a_client_are_refused_by_the_workers_memory(tmp_path):
    _, y, _, matrices = stored_matrices(tmp_path)
    workers = PaperCluster(memory_limit=2**28)
    with pytest.raises(MemoryBudgetError, match=r"40 training rows needs .* but a task has 230 MiB"):
        predict_stored_ensemble(matrices, y, url=tmp_path / "run", client=workers)
    assert workers.asked == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stored", [False, True])
def test_without_resources_tasks_keep_their_workers_threads_and_no_gpu(tmp_path, monkeypatch, stored):
    """Threads decide the bits; the workers' memory alone is taken from them."""
    monkeypatch.setattr(EnsembleRun, "predict", lambda run, *_: run)
    asked = {"url": tmp_path / "run", "client": PaperCluster(gpu_bytes=80 * 2**30)}
    if stored:
        _, y, _, matrices = stored_matrices(tmp_path)
        run = predict_stored_ensemble(matrices, y, **asked)
    else:
        run = predict("ntk", **asked)
    assert (run.sizes.threads, run.sizes.solve_threads, run.site.threads, run.sizes.device) == (None, None, None, False)


@KINDS
def test_convergence_within_a_budget(tmp_path, kind):
    """Fewer right-hand sides a substitution, or fewer test rows a product, give the same; not even one is refused."""
    x, y, tested, matrices = stored_matrices(tmp_path)
    factor = factorize(tmp_path / "dd" / kind, REG, url=tmp_path / "factor")
    one_column = BASE_BYTES + 4 * 12 * 12 * 8 + 4 * 8 * N
    least = {"nngp": one_column, "ntk": BASE_BYTES + 2**20}[kind]
    found = predict_converged(factor, matrices, y, kind=kind, plan=Plan(memory_bytes=least))
    assert_predicts(found, *dense(kind, x, y, tested, [math.inf]))
    with pytest.raises(MemoryBudgetError, match="a substitution with the factor of 40 training rows needs"):
        predict_converged(factor, matrices, y, kind=kind, plan=Plan(memory_bytes=one_column - 1))
    workers = PaperCluster(memory_limit=2**28)
    if kind == "ntk":
        with pytest.raises(MemoryBudgetError, match="a product with the prior's kernel of 40 training rows needs"):
            predict_converged(factor, matrices, y, kind=kind, client=workers)
        assert workers.asked == 1
    elsewhere = factorize(tmp_path / "dd" / kind, REG, url=tmp_path / "factor")
    object.__setattr__(elsewhere, "client", workers)
    with pytest.raises(MemoryBudgetError, match="a substitution"):
        predict_converged(elsewhere, matrices, y, kind=kind)


# --- bad input ----------------------------------------------------------------------------------------------------


def with_nan(a):
    a = a.copy()
    a[3, 0] = np.nan
    return a


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": "relu"}, "network is 'relu'"),
        ({"x_train": np.zeros((0, 6))}, r"x_train has shape \(0, 6\)"),
        ({"x_train": with_nan(rows(N, 0))}, "x_train has NaN or infinite values in row 3"),
        ({"x_test": with_nan(rows(M, 0))}, "x_test has NaN or infinite values in row 3"),
        ({"x_test": np.zeros((3, 7))}, r"x_test has rows of shape \(7,\) and x_train of \(6,\)"),
        ({"targets": None}, "no targets"),
        ({"targets": np.zeros(N - 1)}, r"targets have shape \(39,\).* 40 training rows"),
        ({"targets": np.array(["a"] * N)}, "labels with n_classes"),
        ({"targets": with_nan(np.zeros((N, 2)))}, "targets has NaN or infinite values in row 3"),
        ({"targets": np.full(N, 3), "n_classes": 3}, r"labels outside 0\.\.2"),
        ({"times": -1.0}, "times are -1.0"),
        ({"times": [1.0, math.nan]}, "times are"),
        ({"kind": "ntkk"}, "unknown kind 'ntkk'; did you mean 'ntk'"),
        ({"output": "std"}, "unknown output 'std'"),
        ({"diag_reg": -1.0}, "diag_reg is -1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_bad_input(tmp_path, change, words, folder):
    x, y, tested = problem()
    arguments = {"network": NETWORK, "x_train": x, "targets": y, "x_test": tested, **change}
    with pytest.raises(InputError, match=words):
        predict_ensemble(**arguments, url=tmp_path / "run" if folder else None)


def test_a_cluster_needs_a_folder():
    with pytest.raises(InputError, match="give a url"):
        predict("ntk", client=object())


@pytest.mark.parametrize("folder", [False, True])
def test_duplicates_with_different_targets(tmp_path, folder):
    """No posterior without noise; a network settles on their mean and says what share it never learns."""
    x, y, tested = problem()
    x[-2:] = x[:2]
    url = tmp_path / "nngp" if folder else None
    with pytest.raises(InputError, match=r"singular to rounding .* 38.*duplicate rows"):
        predict_ensemble(NETWORK, x, y, tested, kind="nngp", url=url)
    found = predict_ensemble(NETWORK, x, y, tested, kind="nngp", diag_reg=1e-3, url=url)
    assert_predicts(found, *dense("nngp", x, y, tested, [math.inf], 1e-3), 1e-8)
    merged = y[:-2].copy()
    merged[:2] = (y[:2] + y[-2:]) / 2
    found = predict_ensemble(NETWORK, x, y, tested, url=tmp_path / "ntk" if folder else None)
    assert_predicts(found, *dense("ntk", x[:-2], merged, tested, [math.inf], 0.0), 1e-8)
    assert found.unlearned == pytest.approx(((y[:2] - y[-2:]) ** 2).sum() / 2 / (y**2).sum(), rel=1e-6)
