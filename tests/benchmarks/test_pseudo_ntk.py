"""What the benchmark of pseudo- and empirical NTKs measures, at sizes that take seconds."""

import numpy as np
import pytest
from module_examples import one_thread

torch = pytest.importorskip("torch")

from benchmarks import pseudo_ntk  # noqa: E402
from ntkdask.datasets import write_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def test_theorem_1_slopes(tmp_path, capsys):
    """Four widths, three seeds: relative differences of kernels fall like 1/√width."""
    slopes = pseudo_ntk.theorem((16, 32, 64, 128), 3, tmp_path, rows=8, outputs=5, depth=1)
    assert -0.65 <= slopes["frobenius"] <= -0.35
    assert -0.65 <= slopes["off_diagonal_ratio"] <= -0.35
    printed = capsys.readouterr().out
    assert f"{slopes['frobenius']:.3f}" in printed
    assert len(printed.splitlines()) == 2 + len(slopes)


def test_linearization_slopes(capsys):
    slopes = pseudo_ntk.linearization((16, 64, 256), 3, steps=10)
    assert -0.7 <= slopes["worst"] <= -0.3
    assert slopes["taylor"] < -0.35
    assert abs(slopes["moved"]) < 0.2


def test_a_subset_of_images(tmp_path, capsys):
    """Two networks of the paper on 8×8 images, before and after an epoch."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 10)):
        x = rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)
        names = tuple("abcdefghij")
        write_dataset(tmp_path / "data.zarr" / part, x, np.arange(n) % 10, kind="classification", class_names=names)
    parts = {"train": str(tmp_path / "data.zarr/train"), "test": str(tmp_path / "data.zarr/test")}
    with pytest.MonkeyPatch.context() as patch:
        from benchmarks import cifar_cntk
        from ntkdask.datasets import open_dataset

        patch.setattr(cifar_cntk, "open_parts", lambda url: {k: open_dataset(v) for k, v in parts.items()})
        rows = pseudo_ntk.cifar("data", 10, 10, ["FCN:8", "ResNet18:2"], [0, 1], 1, tmp_path / "run")
    assert [(r["network"], r["epoch"]) for r in rows] == [("FCN", 0), ("FCN", 1), ("ResNet18", 0), ("ResNet18", 1)]
    assert "10 training and 10 test images" in capsys.readouterr().out
    assert (tmp_path / "run" / "figures").exists()


def test_arguments(capsys):
    assert pseudo_ntk.parsed([]).what == "theorem"
    assert pseudo_ntk.parsed(["cifar", "--networks", "ConvNet:8"]).networks == ["ConvNet:8"]
    for wrong in ("VGG:8", "FCN", "FCN:wide"):
        with pytest.raises(SystemExit):
            pseudo_ntk.parsed(["cifar", "--networks", wrong])
        assert "write NAME:WIDTH" in capsys.readouterr().err
    for make in pseudo_ntk.NETWORKS.values():
        assert make(2, 7, (8, 8, 3)).n_outputs == 7
