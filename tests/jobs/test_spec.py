"""Job files: every key, what is refused and with which words."""

import json
import math
import re

import numpy as np
import pytest
from spec_examples import refusal, table

from ntkdask import activations, registry
from ntkdask.errors import JobError, UserError
from ntkdask.features import NTKRandomFeatures
from ntkdask.jobs.spec import build_job, load_job, memory_bytes, to_training_job
from ntkdask.networks import Network, fully_connected
from ntkdask.preprocessing import ZCA, Standardize
from ntkdask.report.job_words import describe_job

WHOLE = """
name = "whole-1.0_b"
[data]
url = "data/digits.zarr"
split = { folds = 4, shuffle = false }
preprocess = ["standardize", { type = "ZCA", regularization = 0.5 }]
[network]
preset = "fully_connected"
depth = 2
activation = "relu"
weight_variance = 2.0
bias_variance = 0.1
normalize = false
[features]
type = "NTKRandomFeatures"
n_components = 512
sampling = "spherical"
n_relu = 200
[solver]
alphas = [0.1, 1.0]
selection = "kfold"
solver = "cholesky"
fit_intercept = false
folds = 3
holdout = 0.3
[run]
seed = 7
dtype = "float64"
worker_memory = "2 GiB"
n_workers = 2
slab_rows = 128
folder = "elsewhere"
"""


def test_every_key(tmp_path):
    path = tmp_path / "whole.toml"
    path.write_text(WHOLE)
    job = load_job(path)
    spec = job.spec
    assert (spec.name, spec.data.url) == ("whole-1.0_b", "data/digits.zarr")
    assert (spec.data.split.folds, spec.data.split.test, spec.data.split.shuffle) == (4, None, False)
    assert job.steps == (Standardize(), ZCA(regularization=0.5))
    assert isinstance(job.features, NTKRandomFeatures)
    assert (job.features.n_components, job.features.seed, job.features.n_relu) == (512, 7, 200)
    assert job.features.network == fully_connected(2, weight_variance=2.0, bias_variance=0.1, normalize=False)
    assert job.options.alphas == (0.1, 1.0)
    assert (job.options.selection, job.options.solver, job.options.fit_intercept) == ("kfold", "cholesky", False)
    assert (spec.solver.folds, spec.solver.holdout) == (3, 0.3)
    run = spec.run
    assert (run.seed, run.dtype, run.n_workers, run.slab_rows, run.folder) == (7, "float64", 2, 128, "elsewhere")
    assert memory_bytes(run.worker_memory) == 2**31
    json.dumps(job.to_config(), allow_nan=False)


def test_defaults():
    job = build_job({"name": "least", "data": {"train": "a.zarr", "test": "b.zarr"}})
    assert job.features is None
    assert job.steps == ()
    assert (job.options.alphas, job.options.selection, job.options.solver) == ((1.0,), "gcv", "auto")
    assert (job.spec.run.seed, job.spec.run.dtype, job.spec.run.worker_memory) == (0, "float32", None)


def test_layers_in_place_of_a_preset():
    layers = [{"type": "Dense"}, {"type": "Activation", "function": "relu"}, {"type": "Dense", "weight_variance": 2.0}]
    job = build_job(table(network={"layers": layers, "scale_inputs": True}))
    network = job.features.network
    assert isinstance(network, Network)
    assert network.scale_inputs
    assert network.layers[2].weight_variance == 2.0


@pytest.mark.parametrize(
    "activation",
    [{"name": "leaky_relu", "slope": 0.1}, {"type": "LeakyReLU", "slope": 0.1}, activations.LeakyReLU(0.1)],
)
def test_an_activation_with_parameters(activation):
    """By its name, or as a resolved job spells it."""
    network = {"preset": "fully_connected", "depth": 1, "activation": activation}
    job = build_job({k: v for k, v in table(network=network, kernel={"type": "NTK"}).items() if k != "features"})
    assert job.kernel.network.layers[1].sigma == activations.LeakyReLU(0.1)
    assert registry.from_config(registry.to_config(job.kernel)) == job.kernel


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        ({"slope": 0.1}, "write a name"),
        ({"name": "leaky_relu", "slop": 0.1}, "does not take 'slop'; it takes slope"),
        ({"name": "leakyrelu"}, "did you mean 'leaky_relu'?"),
        ({"type": "LeakyRelu"}, "did you mean 'LeakyReLU'?"),
    ],
)
def test_activation_tables_that_say_too_little(activation, words):
    with pytest.raises(UserError, match=re.escape(words)):
        build_job(table(network={"preset": "fully_connected", "depth": 1, "activation": activation}))


def test_the_maps_own_seed_wins():
    features = {"type": "NTKRandomFeatures", "n_components": 64, "seed": 3}
    assert build_job(table(features=features, run={"seed": 9})).features.seed == 3
    assert build_job(table(run={"seed": 9})).features.seed == 9


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        (0.5, (0.5,)),
        (2, (2.0,)),
        ([1, 0.1], (1.0, 0.1)),
        ({"logspace": [-6, 3, 19]}, tuple(np.logspace(-6, 3, 19))),
        ({"logspace": [-0.5, 0.5, 1]}, (10**-0.5,)),
    ],
)
def test_forms_of_alphas(alphas, expected):
    assert build_job(table(solver={"alphas": alphas})).options.alphas == pytest.approx(expected)


@pytest.mark.parametrize(
    ("alphas", "words"),
    [
        ([], "at least one"),
        (0.0, "all positive"),
        ([1.0, -1.0], "all positive"),
        (math.inf, "all positive and finite"),
        ("many", "alphas"),
        ([[1.0]], "alphas"),
        ({"logspce": [0, 1, 2]}, "logspace = [-6, 3, 19]"),
        ({"logspace": [0, 1]}, "logspace = [-6, 3, 19]"),
        ({"logspace": [0, 1, 0]}, "how many >= 1"),
        ({"logspace": [0, 1, 2.5]}, "how many >= 1"),
        ({"logspace": [0, math.nan, 2]}, "how many >= 1"),
        ({"logspace": ["a", 1, 2]}, "logspace"),
        ({"logspace": [0, 1, 2], "linspace": [0, 1, 2]}, "logspace = [-6, 3, 19]"),
    ],
)
def test_alphas_that_cannot_be(alphas, words):
    assert words in refusal(solver={"alphas": alphas})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"solvr": {}}, "unknown key 'solvr'; did you mean 'solver'?"),
        ({"data": {"urll": "d.zarr"}}, "unknown key 'data.urll'; did you mean 'url'?"),
        ({"data": {"url": "d", "split": {"fold": 3}}}, "did you mean 'folds'?"),
        ({"solver": {"alpha": 1.0}}, "unknown key 'solver.alpha'; did you mean 'alphas'?"),
        ({"run": {"sed": 1}}, "unknown key 'run.sed'; did you mean 'seed'?"),
        ({"network": {"preset": "fully_conected"}}, "did you mean 'fully_connected'?"),
        ({"network": {"preset": "fully_connected", "dept": 2}}, "did you mean 'depth'?"),
        ({"network": {"depth": 2}}, "unknown network preset None"),
        ({"network": {"preset": "fully_connected", "depth": 1, "activation": "relo"}}, "did you mean 'relu'?"),
        ({"network": {"layers": [{"type": "Dens"}]}}, "did you mean 'Dense'?"),
        ({"network": {"layers": [{"type": "Dense", "width": 2}]}}, "unknown key 'width' for Dense"),
        ({"features": {"type": "NTKRandomFeature", "n_components": 8}}, "did you mean 'NTKRandomFeatures'?"),
        ({"features": {"type": "NTKRandomFeatures", "n_component": 8}}, "did you mean 'n_components'?"),
        ({"features": {"type": "NTKRandomFeatures"}}, "n_components"),
        ({"features": {"n_components": 8}}, "feature map"),
        ({"features": {"type": "Dense"}}, "unknown feature map 'Dense'"),
        ({"features": {"type": "NTKRandomFeatures", "n_components": 0}}, "n_components is 0"),
        ({"data": {"url": "d", "preprocess": ["standardise"]}}, "did you mean 'standardize'?"),
        ({"solver": {"selection": "gvc"}}, "did you mean 'gcv'?"),
        ({"solver": {"solver": "eig"}}, "did you mean 'eigh'?"),
        ({"run": {"dtype": "float16"}}, "run.dtype is 'float16'"),
    ],
)
def test_the_nearest_name_is_named(sections, words):
    assert words in refusal(**sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"name": ""}, "letters, digits"),
        ({"name": "../up"}, "letters, digits"),
        ({"name": ".hidden"}, "letters, digits"),
        ({"name": "a b"}, "letters, digits"),
        ({"name": 7}, "name"),
        ({"data": {}}, "either url, or train and test"),
        ({"data": {"url": "a", "train": "b", "test": "c"}}, "either url, or train and test"),
        ({"data": {"train": "b"}}, "train needs test beside it"),
        ({"data": {"train": "b", "test": "c", "split": {"test": 0.2}}}, "no split"),
        ({"data": {"url": "a", "split": {}}}, "either folds or test"),
        ({"data": {"url": "a", "split": {"folds": 3, "test": 0.2}}}, "either folds or test"),
        ({"data": {"url": "a", "split": {"folds": 1}}}, "expected 2 to 100"),
        ({"data": {"url": "a", "split": {"folds": 2.5}}}, "data.split"),
        ({"data": {"url": "a", "split": {"test": 1.5}}}, "between 0 and 1"),
        ({"data": {"url": "a", "split": {"test": 0}}}, "between 0 and 1"),
        ({"data": {"url": 3}}, "data.url is 3"),
        ({"data": "d.zarr"}, "data is 'd.zarr'"),
        ({"data": {"url": "a", "preprocess": "standardize"}}, "preprocess"),
        ({"solver": {"folds": 1}}, "solver.folds is 1"),
        ({"solver": {"holdout": 1.0}}, "between 0 and 1"),
        ({"solver": {"alphas": [1.0, 2.0], "solver": "cholesky"}}, "no spectrum"),
        ({"run": {"worker_memory": "2 elephants"}}, 'write it as "2 GiB"'),
        ({"run": {"worker_memory": "2"}}, "less than a MiB"),
        ({"run": {"n_workers": 0}}, "run.n_workers is 0"),
        ({"run": {"slab_rows": 0}}, "run.slab_rows is 0"),
        ({"run": {"seed": "zero"}}, "run.seed is 'zero'"),
        ({"features": None}, "say whether its kernel is approximated or computed"),
        ({"network": None}, "NTKRandomFeatures needs a [network] section"),
        ({"network": {"preset": "fully_connected"}}, "depth"),
        ({"network": {"preset": "fully_connected", "depth": 0}}, "at least one activation"),
    ],
)
def test_values_that_cannot_be(sections, words):
    assert words in refusal(**sections)


def test_several_problems_are_told_at_once():
    text = refusal(solvr={}, run={"sed": 1})
    assert "solvr" in text
    assert "sed" in text


# files


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(JobError, match=r"nowhere.toml does not exist"):
        load_job(tmp_path / "nowhere.toml")
    path = tmp_path / "broken.toml"
    for content in (b"name = ", b"name = '\xff'"):
        path.write_bytes(content)
        with pytest.raises(JobError, match=r"broken.toml is not valid TOML"):
            load_job(path)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(WHOLE.replace("alphas = [0.1, 1.0]", "alphas = [-1.0]"))
    with pytest.raises(UserError, match=re.escape(f"{path}: alphas are")):
        load_job(path)


@pytest.mark.parametrize(
    ("setting", "look", "expected"),
    [
        ("features.n_components=100", lambda j: j.features.n_components, 100),
        ("features.sampling=gaussian", lambda j: j.features.sampling, "gaussian"),
        ('features.sampling="gaussian"', lambda j: j.features.sampling, "gaussian"),
        ("solver.alphas=[1.0, 2.0]", lambda j: j.options.alphas, (1.0, 2.0)),
        ("solver.alphas={ logspace = [0, 1, 2] }", lambda j: j.options.alphas, (1.0, 10.0)),
        ("data.split={ test = 0.5 }", lambda j: (j.spec.data.split.folds, j.spec.data.split.test), (None, 0.5)),
        ("data.split.folds=5", lambda j: j.spec.data.split.folds, 5),
        ("name=other", lambda j: j.spec.name, "other"),
        (" run.seed = 3", lambda j: j.spec.run.seed, 3),
        ("run.worker_memory=1 GiB", lambda j: memory_bytes(j.spec.run.worker_memory), 2**30),
        ("solver.fit_intercept=true", lambda j: j.options.fit_intercept, True),
    ],
)
def test_settings_override(tmp_path, setting, look, expected):
    path = tmp_path / "job.toml"
    path.write_text(WHOLE.replace("n_relu = 200", ""))
    assert look(load_job(path, [setting])) == expected


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("features.n_components", "section.key=value"),
        ("=3", "section.key=value"),
        ("name.first=3", "name is not a section"),
        ("features.n_componets=3", "did you mean 'n_components'"),
        ("runn.seed=3", "did you mean 'run'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, setting, words):
    path = tmp_path / "job.toml"
    path.write_text(WHOLE)
    with pytest.raises(JobError, match=words):
        load_job(path, [setting])


def test_the_last_setting_wins(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(WHOLE)
    assert load_job(path, ["run.seed=1", "run.seed=2"]).spec.run.seed == 2


def test_the_workflows_job(tmp_path):
    from job_examples import class_data, stored

    data = stored(tmp_path, *class_data())
    job = to_training_job(
        build_job(
            table(data={"url": data.url, "split": {"folds": 3}}, run={"seed": 4, "dtype": "float64", "slab_rows": 32})
        )
    )
    assert job.train.digest == data.digest
    assert job.test is None
    assert (job.split.folds, job.seed, job.plan.tile_rows, job.plan.dtype) == (3, 4, 32, "float64")
    assert (job.inner_folds, job.holdout) == (5, 0.2)


# part of the rows


def test_part_of_the_rows():
    job = build_job(table(data={"url": "d.zarr", "train_rows": 100, "test_rows": 10, "split": {"test": 0.2}}))
    assert (job.spec.data.train_rows, job.spec.data.test_rows) == (100, 10)
    assert "at random: train rows 100, test rows 10" in dict(describe_job(job.to_config()))["data"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train_rows": 0}, "data.train_rows is 0, expected at least 1"),
        ({"test_rows": -3}, "data.test_rows is -3, expected at least 1"),
        ({"train_rows": 10, "split": {"folds": 3}}, "with data.split.folds, leave them out"),
        ({"trainrows": 10}, "unknown key 'data.trainrows'; did you mean 'train_rows'"),
    ],
)
def test_mistakes_in_part_of_the_rows(data, words):
    assert words in refusal(data={"url": "d.zarr", **data})
