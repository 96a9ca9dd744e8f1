"""What the benchmark of empirical kernels counts and compares with, and a run of it on few rows."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import empirical  # noqa: E402
from ntkdask.kernels import PseudoNTK  # noqa: E402


def test_networks_have_the_stated_sizes():
    assert empirical.n_parameters(empirical.NETWORKS["cnn"]()) == 94_538
    assert empirical.n_parameters(empirical.NETWORKS["resnet18"]()) == 701_466


def test_torch_func_is_the_same_kernel():
    module, x = empirical.small_cnn(2), empirical.images(7)
    k = PseudoNTK(module)(x)
    np.testing.assert_allclose(empirical.with_torch_func(module, x, chunk=3), k, rtol=0, atol=1e-5 * np.abs(k).max())


def test_layers_are_counted_by_hand():
    shapes = empirical.layer_shapes(empirical.small_cnn(2))
    assert shapes == [(2, 27, 32 * 32), (4, 18, 16 * 16), (8, 36, 8 * 8), (10, 8, 1)]


def test_the_floor_has_every_part():
    module = empirical.small_cnn(2)
    parts = empirical.floor_parts(module, 4, 1)
    assert list(parts) == ["forward", "backward", "gradients", "products"]
    assert min(parts["forward"], parts["gradients"], parts["products"]) > 0
    assert all(p.requires_grad for p in module.parameters())


def test_errors_of_precisions():
    rows = np.random.default_rng(0).integers(0, 256, (5, *empirical.SHAPE)).astype(np.uint8)
    assert 0 < empirical.sampled_error(empirical.small_cnn(2), None, rows, device=False) < 1e-5
    assert 1e-5 < empirical.sampled_error(empirical.small_cnn(2), "bfloat16", rows, device=False) < 0.05


def test_what_does_not_fit_is_skipped(monkeypatch):
    class Little:
        available = 2**20

    monkeypatch.setattr(empirical.psutil, "virtual_memory", lambda: Little)
    assert "gradients take" in empirical.measure("torch.func", "tiny", 1000, 1)["skipped"]


@pytest.mark.slow
def test_a_run(tmp_path, capfd):
    empirical.main(
        ["--networks", "tiny", "--rows", "6", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "r")]
    )
    printed = capfd.readouterr().out
    assert "tiny, n = 6" in printed
    assert "of the floor" in printed
    (found,) = json.loads((tmp_path / "r").read_text())
    assert found["PseudoNTK"]["seconds"] > 0
    assert found["torch.func"]["peak_bytes"] >= 0
