"""Files of sweeps: what they build, what they refuse, and the command that runs one."""

import numpy as np
import pytest
from typer.testing import CliRunner

from ntkdask.cli.commands import app
from ntkdask.datasets import write_dataset
from ntkdask.errors import JobError, UserError
from ntkdask.jobs.sweep_spec import load_sweep
from ntkdask.modules.descriptions import FiniteNetwork, ResNet18, WideResNet
from ntkdask.networks import convolutional, fully_connected

HEAD = """
name = "small"
[data]
train = "{folder}/train.zarr"
test = "{folder}/test.zarr"
train_rows = 12
preprocess = ["standardize_channels"]
"""
NETWORKS = """
[[networks]]
name = "FCN"
widths = [8, 16]
module = { type = "FiniteNetwork", network = { preset = "fully_connected", depth = 2 } }
[[networks]]
name = "ResNet18"
widths = [1, 4]
module = { type = "ResNet18", width = { times_width = 16 } }
[[networks]]
name = "WideResNet"
widths = [2]
module = { type = "WideResNet", groups = 2, stem_width = { times_width = 16 } }
"""
REST = """
[sweep]
seeds = [0, 3]
kernels = ["pntk"]
alpha = 0.01
[protocol]
epochs = 4
checkpoints = [0, 4]
batch = 5
[run]
dtype = "float64"
worker_memory = "2 GiB"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, n in (("train", 18), ("test", 6)):
        x = rng.integers(0, 255, (n, 4, 4, 3), dtype=np.uint8)
        write_dataset(path / f"{part}.zarr", x, np.arange(n) % 3, kind="classification", class_names=("a", "b", "c"))
    return path


def write(folder, text, path):
    path.write_text(text.replace("{folder}", str(folder)))
    return path


def test_what_a_file_builds(folder, tmp_path):
    spec, sweep, data = load_sweep(write(folder, HEAD + NETWORKS + REST, tmp_path / "sweep.toml"))
    assert data.x.shape == (12, 4, 4, 3)
    assert data.x_test.shape == (6, 4, 4, 3)
    assert data.x.dtype == "float64"
    np.testing.assert_allclose(data.x.mean((0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(data.x.std((0, 1, 2)), 1, atol=1e-12)
    assert (sweep.seeds, sweep.kernels, sweep.alpha, sweep.dtype) == ((0, 3), ("pntk",), 0.01, "float64")
    assert (sweep.protocol.epochs, sweep.protocol.batch, sweep.epochs) == (4, 5, (0, 4))
    shape = (4, 4, 3)
    assert sweep.networks["FCN"] == {w: FiniteNetwork(fully_connected(2), w, 3, shape) for w in (8, 16)}
    assert sweep.networks["ResNet18"] == {w: ResNet18(16 * w, 3) for w in (1, 4)}
    assert sweep.networks["WideResNet"] == {2: WideResNet(16, 2, 3, groups=2, stem_width=32)}
    assert spec.folder.name == "small"
    assert spec.plan.memory_bytes == 2 * 2**30


def test_rows_are_chosen_by_the_seed(folder, tmp_path):
    same = [load_sweep(write(folder, HEAD + NETWORKS + REST, tmp_path / "sweep.toml"))[2] for _ in range(2)]
    assert same[0].digest == same[1].digest
    other = load_sweep(write(folder, HEAD + NETWORKS + REST + "seed = 1", tmp_path / "other.toml"))[2]
    assert other.digest != same[0].digest


def test_without_sections_the_defaults_hold(folder, tmp_path):
    _, sweep, data = load_sweep(write(folder, HEAD + NETWORKS, tmp_path / "sweep.toml"))
    assert (sweep.seeds, sweep.kernels, sweep.protocol, sweep.epochs) == ((0, 1, 2), ("pntk", "entk"), None, (0,))
    assert data.x.dtype == "float32"
    text = HEAD + NETWORKS.replace('preset = "fully_connected", depth = 2', 'preset = "convolutional", depth = 3')
    _, sweep, _ = load_sweep(write(folder, text, tmp_path / "other.toml"))
    assert sweep.networks["FCN"][8].network == convolutional(3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "small"', 'name = "a/b"', "name is 'a/b'"),
        ("train_rows = 12", "train_rows = 19", "expected 1 to 18"),
        ("train_rows = 12", "train_row = 12", "unknown key 'data.train_row'; did you mean 'train_rows'"),
        ("train_rows = 12", "split = { test = 0.2 }", "and no split"),
        ("widths = [8, 16]", "width = [8, 16]", "unknown key 'networks.0.width'; did you mean 'widths'"),
        ("seeds = [0, 3]", "seed = [0, 3]", "unknown key 'sweep.seed'; did you mean 'seeds'"),
        ('test = "{folder}/test.zarr"', "", "needs url"),
        ('test = "{folder}/test.zarr"', 'test = "{folder}/none.zarr"', "none.zarr"),
        ("widths = [8, 16]", 'widths = "many"', "networks.0.widths"),
        ("widths = [8, 16]", "widths = []", "at least one network with one width"),
        ('name = "ResNet18"', 'name = "FCN"', "two are named 'FCN'"),
        ('type = "ResNet18"', 'type = "ResNet19"', "did you mean 'ResNet18'"),
        ("groups = 2", "group = 2", "unknown key 'group'"),
        ("groups = 2", "seed = 2", "has 'seed'"),
        ("groups = 2", "widening = 2", "is set by `widths`"),
        ("{ times_width = 16 }", "{ times_width = 0.5 }", "an integer >= 1"),
        ('preset = "fully_connected"', 'preset = "fully"', "unknown network preset"),
        ("epochs = 4", "epoch = 4", "unknown key 'epoch'"),
        ("checkpoints = [0, 4]", "checkpoints = [0, 9]", "checkpoints"),
        ('kernels = ["pntk"]', 'kernels = ["ntk"]', "a sweep's kernels"),
        ('dtype = "float64"', 'dtype = "float16"', "float16"),
        ('worker_memory = "2 GiB"', 'worker_memory = "2 bananas"', "worker_memory"),
        ("[protocol]", "[protocol", "not valid TOML"),
    ],
)
def test_what_is_refused(folder, tmp_path, old, new, message):
    text = HEAD + NETWORKS + REST
    assert old in text
    path = write(folder, text.replace(old, new), tmp_path / "sweep.toml")
    with pytest.raises(UserError, match=r"sweep\.toml") as found:
        load_sweep(path)
    assert message in str(found.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(JobError, match=r"does not exist\. Examples are in jobs"):
        load_sweep(tmp_path / "none.toml")


def test_the_command(folder, tmp_path):
    """Cells, table and figures; a second run computes nothing."""
    pytest.importorskip("torch")
    networks = NETWORKS[: NETWORKS.index('[[networks]]\nname = "ResNet18"')]
    rest = '[sweep]\nseeds = [0]\n[run]\ndtype = "float64"\n'
    path = write(folder, HEAD + networks + rest, tmp_path / "sweep.toml")
    first = CliRunner().invoke(app, ["sweep", str(path), "--folder", str(tmp_path / "run")])
    assert first.exit_code == 0, first.output
    assert "2 cells" in first.output
    cells = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "cells").iterdir()}
    assert len(cells) == 2
    assert (tmp_path / "run" / "table.csv").exists()
    assert (tmp_path / "run" / "figures" / "figure-3-frobenius-by-width.svg").exists()
    assert CliRunner().invoke(app, ["sweep", str(path), "--folder", str(tmp_path / "run")]).exit_code == 0
    assert cells == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "cells").iterdir()}
