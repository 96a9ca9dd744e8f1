"""Job files of empirical kernels: networks and weights by name, and checkpoints that run no code."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from empirical_examples import classes

torch = pytest.importorskip("torch")
from job_examples import ONE_THREAD, Counter, flip_bit, stored  # noqa: E402

import ntkdask as nd  # noqa: E402
from ntkdask.errors import DataError, FingerprintError, JobError  # noqa: E402
from ntkdask.jobs.inspect import verify  # noqa: E402
from ntkdask.jobs.run import run_job  # noqa: E402
from ntkdask.jobs.spec import load_job, to_training_job  # noqa: E402
from ntkdask.kernels.empirical import PseudoNTK  # noqa: E402
from ntkdask.modules import ResNet18  # noqa: E402
from ntkdask.modules.state.weights import save_weights  # noqa: E402
from ntkdask.workflows.model import load_model  # noqa: E402

JOB = """
name = "pntk"
[data]
url = "{data}"
split = {{ test = 0.25 }}
[kernel]
type = "PseudoNTK"
module = {{ type = "ResNet18", width = 2, n_outputs = 3{weights} }}
[solver]
alphas = [0.1, 1.0]
selection = "kfold"
folds = 2
[run]
dtype = "float32"
"""


def write_job(tmp_path, weights="", **changes):
    data = tmp_path / "d.zarr"
    if not data.exists():
        stored(
            tmp_path,
            np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype(np.float32),
            classes(32),
            "d.zarr",
            kind="classification",
            class_names=["a", "b", "c"],
        )
    text = JOB.format(data=data, weights=f', weights = "{weights}"' if weights else "")
    for old, new in changes.items():
        text = text.replace(old, new)
    (tmp_path / "jobs").mkdir(exist_ok=True)
    (tmp_path / "jobs" / "job.toml").write_text(text)
    return tmp_path / "jobs" / "job.toml"


def test_a_job_names_its_network(tmp_path):
    job = load_job(write_job(tmp_path))
    assert job.kernel == PseudoNTK(ResNet18(width=2, n_outputs=3, seed=0))
    metrics = run_job(to_training_job(job), tmp_path / "run", resources=ONE_THREAD, resolved=job.to_config())
    assert 0 <= metrics["test"]["accuracy"] <= 1
    assert json.loads((tmp_path / "run" / "record.json").read_text())["fingerprint"]["kernel"]["module"]["width"] == 2
    from ntkdask.jobs.spec import build_job

    assert build_job(json.loads(json.dumps(job.to_config()))).kernel == job.kernel


def test_weights_are_relative_to_the_job_and_belong_to_the_fingerprint(tmp_path):
    path = write_job(tmp_path, weights="weights.safetensors")
    with pytest.raises(JobError, match=r"weights of ResNet18: there is no file .*jobs/weights\.safetensors"):
        load_job(path)
    save_weights(ResNet18(width=2, n_outputs=3, seed=5).build(), tmp_path / "jobs" / "weights.safetensors")
    job = load_job(path)
    run_job(to_training_job(job), tmp_path / "run", resources=ONE_THREAD)
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(job.kernel(x), PseudoNTK(ResNet18(width=2, n_outputs=3, seed=5))(x))
    save_weights(ResNet18(width=2, n_outputs=3, seed=6).build(), tmp_path / "jobs" / "weights.safetensors")
    with pytest.raises(FingerprintError, match=r"kernel\.module\.weights_digest: stored"):
        run_job(to_training_job(load_job(path)), tmp_path / "run", resources=ONE_THREAD)


class Bomb:
    """What a malicious checkpoint holds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    path = write_job(tmp_path, weights="weights.pt")
    torch.save({"state_dict": Bomb(str(tmp_path / "boom"))}, tmp_path / "jobs" / "weights.pt")
    job = load_job(path)
    with pytest.raises(Exception, match="whose loading could run code"):
        run_job(to_training_job(job), tmp_path / "run", resources=ONE_THREAD)
    assert not (tmp_path / "boom").exists()


def test_a_job_that_misspells_its_network_is_told(tmp_path):
    for old, new, words in (
        ('"ResNet18"', '"ResNet81"', r"unknown module 'ResNet81'.*did you mean 'ResNet18'"),
        ("width = 2", "widht = 2", r"unknown key 'widht' for ResNet18.*did you mean 'width'"),
        ('"PseudoNTK"', '"PseudoNKT"', r"did you mean 'PseudoNTK'"),
    ):
        with pytest.raises(JobError, match=words):
            load_job(write_job(tmp_path, **{old: new}))


def test_a_job_gives_its_network_to_the_module(tmp_path):
    path = write_job(
        tmp_path,
        **{
            '"ResNet18", width = 2, n_outputs = 3': '"FiniteNetwork", width = 4, n_outputs = 3, row_shape = [8, 8, 3]',
            "[solver]": '[network]\npreset = "convolutional"\ndepth = 2\n[solver]',
        },
    )
    kernel = load_job(path).kernel
    assert kernel.module.network == nd.convolutional(2)
    assert kernel.module.row_shape == (8, 8, 3)


def test_weights_move_with_the_run(tmp_path):
    """A run keeps a copy of the file of weights, by its digest: neither its fingerprint nor its model holds a path."""
    save_weights(ResNet18(width=2, n_outputs=3, seed=5).build(), tmp_path / "w.safetensors")
    job = load_job(write_job(tmp_path, weights="../w.safetensors"))
    metrics = run_job(to_training_job(job), tmp_path / "runs" / "a", resources=ONE_THREAD)
    (tmp_path / "runs").rename(tmp_path / "archive")
    (tmp_path / "w.safetensors").rename(tmp_path / "v.safetensors")
    place = tmp_path / "archive" / "a"
    model = place / Path(metrics["folds"][0]["model"]).relative_to(tmp_path / "runs" / "a")
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    found = load_model(str(model)).kernel
    assert Path(found.module.weights).is_relative_to(place)
    np.testing.assert_array_equal(found(x), PseudoNTK(ResNet18(width=2, n_outputs=3, seed=5))(x))
    listener = Counter()
    renamed = load_job(write_job(tmp_path, weights="../v.safetensors"))
    again = run_job(to_training_job(renamed), place, resources=ONE_THREAD, listener=listener)
    assert not listener.labels
    assert again["test"] == metrics["test"]
    for path in place.rglob("*.json"):
        if path.name != "metrics.json":
            assert "w.safetensors" not in path.read_text()
    flip_bit(next(place.rglob("state/*.safetensors")))
    assert [str(d).endswith("other weights") for d in verify(place)] == [True]
    with pytest.raises(DataError, match="is not known: give its path"):
        replace(found.module, weights=None).build()
