"""Job files of kernels: every key, kernels and back, what is refused."""

import json

import pytest
from spec_examples import refusal, table

from ntkdask.errors import JobError
from ntkdask.jobs.spec import build_job, load_job, to_training_job
from ntkdask.kernels import NNGP, NTK, RBF, ArcCosine
from ntkdask.networks import fully_connected

KERNEL_JOB = """
name = "kernel"
[data]
url = "data/digits.zarr"
split = { test = 0.2 }
[kernel]
type = "RBF"
gamma = 0.1
[solver]
alphas = [0.0, 1.0]
selection = "holdout"
solver = "cg"
tolerance = 1e-4
max_iterations = 50
[run]
tile_rows = 512
"""


def kernel_table(**sections):
    """The tables of a small job on a kernel, sections replaced."""
    return table(**{"features": None, "network": None, "kernel": {"type": "RBF", "gamma": 0.1}, **sections})


def kernel_refusal(**sections) -> str:
    return refusal(**kernel_table(**sections))


def test_every_key_of_a_kernel_job(tmp_path):
    from job_examples import class_data, stored

    path = tmp_path / "kernel.toml"
    data = stored(tmp_path, *class_data())
    path.write_text(KERNEL_JOB.replace("data/digits.zarr", data.url))
    job = load_job(path)
    assert job.features is None
    assert job.kernel == RBF(0.1)
    options = job.options
    assert (options.alphas, options.selection, options.solver) == ((0.0, 1.0), "holdout", "cg")
    assert (options.tolerance, options.max_iterations, options.fit_intercept) == (1e-4, 50, True)
    training = to_training_job(job)
    assert type(training.recipe).__name__ == "KernelRidgeRecipe"
    assert (training.recipe.kernel, training.recipe.options) == (RBF(0.1), options)
    assert (training.plan.tile_cols, training.plan.tile_rows, training.plan.dtype) == (512, None, "float32")
    assert training.fingerprint()["kernel"] == {"type": "RBF", "gamma": 0.1}


def test_defaults_of_a_kernel_job():
    options = build_job(kernel_table()).options
    assert (options.alphas, options.selection, options.solver) == ((1.0,), "auto", "auto")
    assert (options.tolerance, options.max_iterations) == (1e-6, 1000)


@pytest.mark.parametrize(
    ("kernel", "network", "expected"),
    [
        ({"type": "RBF", "gamma": 0.25}, None, RBF(0.25)),
        ({"type": "ArcCosine", "order": 2}, None, ArcCosine(2)),
        (
            {"type": "NTK"},
            {"preset": "fully_connected", "depth": 2, "activation": "erf"},
            NTK(fully_connected(2, "erf")),
        ),
        (
            {"type": "NNGP"},
            {"preset": "fully_connected", "depth": 1, "bias_variance": 0.1},
            NNGP(fully_connected(1, bias_variance=0.1)),
        ),
        (
            {"type": "NTK"},
            {"layers": [{"type": "Dense"}, {"type": "Activation", "function": "relu"}, {"type": "Dense"}]},
            NTK(fully_connected(1)),
        ),
    ],
    ids=lambda v: v.get("type") if isinstance(v, dict) else None,
)
def test_kernels_and_back(kernel, network, expected):
    """A job's tables, written out again, make the same job."""
    job = build_job(
        kernel_table(kernel=kernel, network=network, solver={"alphas": [0.1, 1.0], "folds": 4, "max_iterations": 9})
    )
    assert job.kernel == expected
    config = json.loads(json.dumps(job.to_config(), allow_nan=False))
    assert ("network" in config) == (network is not None)
    assert "features" not in config
    back = build_job(config)
    assert (back.kernel, back.options, back.steps) == (job.kernel, job.options, job.steps)
    assert back.to_config() == config
    assert (back.spec.solver.folds, config["solver"]["tolerance"]) == (4, 1e-6)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"kernel": {"type": "RBFF", "gamma": 1.0}}, "unknown kernel 'RBFF'; did you mean 'RBF'?"),
        ({"kernel": {"type": "Dense"}}, "unknown kernel 'Dense'"),
        ({"kernel": {"gamma": 1.0}}, "unknown kernel 'None'"),
        ({"kernel": {"type": "RBF", "gama": 1.0}}, "unknown key 'gama' for RBF; did you mean 'gamma'?"),
        ({"kernel": {"type": "RBF", "gamma": -1.0}}, "gamma is -1.0, expected a positive number"),
        ({"kernel": {"type": "ArcCosine", "order": -1}}, "order"),
        ({"kernel": {"type": "NTK"}}, "NTK needs a [network] section"),
        ({"network": {"preset": "fully_connected", "depth": 1}}, "RBF takes no network: drop the [network] section"),
        ({"features": {"type": "NTKRandomFeatures", "n_components": 8}}, "[features] and [kernel] are both there"),
        (
            {"kernel": None, "network": {"preset": "fully_connected", "depth": 1}},
            "[network] needs [features] or [kernel]",
        ),
        ({"kernel": "NTK"}, "kernel is 'NTK'"),
        ({"kernal": {"type": "NTK"}}, "unknown key 'kernal'; did you mean 'kernel'?"),
        ({"solver": {"solver": "eig"}}, "did you mean 'eigh'?"),
        ({"solver": {"solver": "tridiagonal"}}, "unknown solver 'tridiagonal'"),
        ({"solver": {"selection": "lo"}}, "did you mean 'loo'?"),
        ({"solver": {"tolerance": 2.0}}, "tolerance is 2.0, expected a number between 0 and 1"),
        ({"solver": {"tolerance": "small"}}, "solver.tolerance is 'small'"),
        ({"solver": {"max_iterations": 0}}, "max_iterations is 0, expected an integer >= 1"),
        ({"solver": {"max_iterations": 1.5}}, "solver.max_iterations is 1.5"),
        ({"solver": {"max_iteration": 5}}, "did you mean 'max_iterations'?"),
        ({"solver": {"alphas": [-1.0]}}, "none negative"),
        ({"solver": {"alphas": []}}, "at least one"),
        (
            {"solver": {"alphas": [1.0, 2.0], "solver": "cg", "selection": "loo"}},
            "cannot choose among 2 alphas by 'loo'",
        ),
        ({"run": {"tile_rows": 0}}, "run.tile_rows is 0"),
        ({"run": {"tile_row": 5}}, "did you mean 'tile_rows'?"),
    ],
    ids=str,
)
def test_kernel_jobs_that_cannot_be(sections, words):
    assert words in kernel_refusal(**sections)


@pytest.mark.parametrize(("key", "value"), [("tolerance", 1e-3), ("max_iterations", 10)])
def test_what_iterates_is_a_kernels(key, value):
    assert f"solver.{key} is for conjugate gradients on a [kernel]" in refusal(solver={key: value})


@pytest.mark.parametrize(
    ("setting", "look", "expected"),
    [
        ("kernel.gamma=0.2", lambda j: j.kernel, RBF(0.2)),
        ("kernel={ type = 'ArcCosine', order = 1 }", lambda j: j.kernel, ArcCosine(1)),
        ("solver.solver=tiled_cholesky", lambda j: j.options.solver, "tiled_cholesky"),
        ("solver.tolerance=1e-9", lambda j: j.options.tolerance, 1e-9),
        ("run.tile_rows=64", lambda j: j.spec.run.tile_rows, 64),
    ],
)
def test_settings_override_a_kernel(tmp_path, setting, look, expected):
    path = tmp_path / "kernel.toml"
    path.write_text(KERNEL_JOB)
    assert look(load_job(path, [setting])) == expected
    with pytest.raises(JobError, match="did you mean 'gamma'"):
        load_job(path, ["kernel.gama=0.2"])
