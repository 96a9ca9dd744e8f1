"""Job and sweep files from strangers: an error at once, in a sentence, whatever is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from spec_examples import table

from ntkdask.cli.commands import _run_folder
from ntkdask.errors import JobError, StoreError, UserError
from ntkdask.files import local_path
from ntkdask.jobs.spec import build_job, load_job, memory_bytes
from ntkdask.jobs.sweep_spec import load_sweep
from ntkdask.jobs.tables import MAX_FILE_BYTES

LONG = "n" * 300
JOB = """
name = "small"
data = { url = "d.zarr", split = { test = 0.2 } }
network = { preset = "fully_connected", depth = 1 }
features = { type = "NTKRandomFeatures", n_components = 64 }
"""
HOSTILE = {
    "x = " + "[" * 5000 + "]" * 5000: "deep",
    "x = " + "{a=" * 5000 + "1" + "}" * 5000: "deep",
    "x = " + "[" * 40 + "]" * 40: "x ... nests tables or lists more than 32 deep",
    ".".join("a" * 5000) + " = 1": "deep",
    f"[{'.'.join('a' * 5000)}]": "deep",
    "seed = " + "9" * 5000: "not valid TOML",
    "seed = " + "9" * 50: "64 bits",
    "seed = 2020-01-01": "a date or a time",
    "x = inf": "x is inf, expected a finite number",
    "x = { y = [nan] }": "x.y is nan, expected a finite number",
    'x = "a\\u0000b"': "NUL",
    "x = 1 y": "not valid TOML",
}


@pytest.mark.parametrize("load", [load_job, load_sweep])
@pytest.mark.parametrize(("text", "words"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_hostile_files(tmp_path: Path, load: Any, text: str, words: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(JobError, match=words) as found:
        load(path)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("load", [load_job, load_sweep])
def test_files_that_are_no_files(tmp_path: Path, load: Any) -> None:
    with pytest.raises(JobError, match="is a folder or a device, not a"):
        load(tmp_path)
    for name in (LONG, "a\0b", "nowhere"):
        with pytest.raises(JobError, match="does not exist"):
            load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(JobError, match="a device"):
        load(tmp_path / "pipe")
    (tmp_path / "large.toml").write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(JobError, match="at most 1,048,576"):
        load(tmp_path / "large.toml")
    (tmp_path / "latin1.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(JobError, match="not valid TOML"):
        load(tmp_path / "latin1.toml")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("solver.alphas=" + "[" * 5000 + "]" * 5000, "deep"),
        (".".join("a" * 5000) + "=1", "deep"),
        ("run.seed=" + "9" * 5000, "digits"),
        ("run.seed=inf", "run.seed is inf, expected a finite number"),
        ("run.folder=" + LONG, "no path"),
        ('run.folder="a\\u0000b"', "NUL"),
        ("solver.alphas={ logspace = [0, 1, 1000000000] }", "at most 10,000"),
        ("solver.alphas={ logspace = [0, 1, true] }", "at most 10,000"),
        ("solver.alphas={ logspace = [true, 1, 3] }", "at most 10,000"),
        ("solver.alphas={ logspace = [0, 400, 3] }", "exponents from -300 to 300"),
        ("network.depth=1000000000", "network.depth is 1000000000, expected at most 10,000"),
    ],
)
def test_hostile_settings(tmp_path: Path, setting: str, words: str) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    load_job(tmp_path / "job.toml")
    with pytest.raises(JobError, match=words) as found:
        load_job(tmp_path / "job.toml", [setting])
    assert len(str(found.value)) < 1000


def test_more_alphas_than_anyone_needs() -> None:
    with pytest.raises(JobError, match=r"10,001 values"):
        build_job(table(solver={"alphas": [1.0] * 10_001}))


@pytest.mark.parametrize("name", [LONG, "é" * 101])
def test_names_longer_than_a_folder_has(name: str) -> None:
    with pytest.raises(JobError, match="at most 200 bytes"):
        build_job(table(name=name))
    assert build_job(table(name="é" * 100)).spec.name == "é" * 100


@pytest.mark.parametrize("url", [LONG, f"a/{LONG}/b", "a\0b", "é" * 128])
def test_paths_that_no_file_system_takes(url: str) -> None:
    for data in ({"url": url}, {"train": url, "test": "b"}, {"train": "a", "test": url}):
        with pytest.raises(JobError, match="no path: names have at most 255 bytes"):
            build_job({"name": "small", "data": data})
    with pytest.raises(JobError, match=r"run\.folder is"):
        build_job(table(run={"folder": url}))
    with pytest.raises(StoreError, match="no path"):
        local_path(url)
    assert _run_folder(Path(url)) == Path(url)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"url": "d.zarr", "train_rows": True}},
        {"data": {"url": "d.zarr", "split": {"test": True}}},
        {"data": {"url": "d.zarr", "split": {"folds": True}}},
        {"data": {"url": "d.zarr", "split": {"test": 0.2, "shuffle": 1}}},
        {"solver": {"alphas": True}},
        {"solver": {"alphas": [1.0, True]}},
        {"solver": {"alphas": "1.0"}},
        {"solver": {"folds": True}},
        {"solver": {"folds": "5"}},
        {"solver": {"holdout": True}},
        {"solver": {"fit_intercept": 1}},
        {"solver": {"fit_intercept": "yes"}},
        {"run": {"seed": True}},
        {"run": {"seed": "7"}},
        {"run": {"n_workers": True}},
        {"run": {"slab_rows": True}},
        {"features": {"type": "NTKRandomFeatures", "n_components": True}},
        {"features": {"type": "NTKRandomFeatures", "n_components": "64"}},
        {"features": {"type": "NTKRandomFeatures", "n_components": 64, "seed": True}},
        {"network": {"preset": "fully_connected", "depth": True}},
        {"network": {"preset": "fully_connected", "depth": 1, "normalize": 1}},
        {"network": {"preset": "fully_connected", "depth": 1, "normalize": "false"}},
        {"network": {"preset": "fully_connected", "depth": 1, "weight_variance": True}},
        {"network": {"preset": "fully_connected", "depth": 1, "weight_variance": float("inf")}},
        {"network": {"preset": "fully_connected", "depth": 1, "activation": {"name": "leaky_relu", "slope": True}}},
        {"network": {"layers": [{"type": "Dense", "weight_variance": True}]}},
        {"data": {"url": "d.zarr", "preprocess": [{"type": "ZCA", "regularization": True}]}},
    ],
    ids=json.dumps,
)
def test_true_is_no_number_and_a_number_is_not_true(sections: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected (a number|a finite|an integer)|true or false|valid boolean"):
        build_job(table(**sections))


def test_numbers_that_overflow() -> None:
    activation = {"name": "leaky_relu", "slope": 1e308}
    with pytest.raises(JobError, match="out of range"):
        build_job(table(network={"preset": "fully_connected", "depth": 1, "activation": activation}))


def test_whole_numbers_may_be_written_as_floats() -> None:
    job = build_job(table(run={"slab_rows": 1e3}, solver={"alphas": [1, 2.5], "fit_intercept": False}))
    assert (job.spec.run.slab_rows, job.options.alphas, job.options.fit_intercept) == (1000, (1.0, 2.5), False)


@pytest.mark.parametrize("text", ["1e400 GiB", "nan", "9" * 5000, "-1 GiB", "true"])
def test_memory_that_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="worker_memory"):
        memory_bytes(text)
