"""`ntkdask plan`: the time it predicts, for the workers there are and for others."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from ntkdask.cli import commands as cli
from ntkdask.datasets import write_dataset

JOB = """
name = "images"
[data]
url = "images.zarr"
train_rows = 30
test_rows = 6
split = { test = 0.25 }
preprocess = ["standardize_channels"]
[network]
preset = "convolutional"
depth = 1
[kernel]
type = "FlipAveraged"
kernel = { type = "NTK" }
[run]
n_workers = 2
worker_memory = "1 GiB"
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Runs `ntkdask plan job.toml` with options in a folder with a small dataset of images; the words, however wide the table."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3)).astype(np.uint8)
    write_dataset("images.zarr", x, np.arange(50) % 3)
    (tmp_path / "job.toml").write_text(JOB)

    def call(*options: str, code: int = 0) -> str:
        found = CliRunner().invoke(cli.app, ["plan", "job.toml", *options])
        assert found.exit_code == code, found.output
        return re.sub(r"[\s│]+", " ", found.output)

    return call


def test_time_is_predicted(plan, tmp_path):
    text = plan()
    assert "30 × 30" in text
    assert re.search(r"pace .* an entry, measured on tiles of \d+ × \d+ with \d+ threads? ", text)
    assert re.search(r"time of kernel-tile .* a tile, .* on 2 slots: .* slot-hours", text)
    assert re.search(r"time of predict .* on 2 slots: .* slot-hours", text)
    assert not (tmp_path / "runs").exists()


def test_for_other_workers(plan):
    text = plan("--workers", "16")
    assert "on 16 slots" in text
    assert re.search(r"time of kernel-tile .* on 16 slots", text)


def test_without_measuring(plan):
    text = plan("--no-calibrate")
    assert "time of" not in text
    assert "pace" not in text
    assert "memory of kernel-tile" in text


def test_a_fast_kernel_is_measured_too(plan):
    text = plan("--set", 'kernel.kernel={ type = "NTK" }', "--set", "network.preset=fully_connected")
    assert "time of kernel-tile" in text


FEATURES = """
name = "ridge"
data = { url = "images.zarr", split = { test = 0.2 } }
[network]
preset = "fully_connected"
depth = 1
[features]
type = "NTKRandomFeatures"
n_components = 32
"""


def test_time_of_features_is_predicted(plan, tmp_path):
    (tmp_path / "job.toml").write_text(FEATURES)
    text = plan("--workers", "3")
    assert re.search(r"pace \d.* a row of features, measured on batches of \d+ with \d+ threads? ", text)
    assert re.search(r"time of gram-slab .* on 3 slots: features \d.*, products \d", text)
    assert re.search(r"time of predict .* on 3 slots", text)
    assert "time of" not in plan("--no-calibrate")


def test_rows_themselves_are_their_features(plan, tmp_path):
    (tmp_path / "job.toml").write_text(FEATURES[: FEATURES.index("[network]")])
    assert re.search(r"time of gram-slab .*: features 0 s, products \d", plan())


def test_a_map_that_learns_tells_no_time(plan, tmp_path):
    (tmp_path / "job.toml").write_text(FEATURES + 'sampling = "optimized"\n')
    text = plan()
    assert "memory of features-slab" in text
    assert "time of" not in text
