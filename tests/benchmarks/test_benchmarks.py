"""What the benchmarks of convolutional kernels count, measure with and read: operations, probes of arithmetic, images, subsets."""

import itertools
import sys

import numpy as np
import pytest
from numba import types
from PIL import Image

import ntkdask as nd
from benchmarks import _arithmetic, _operations, cifar_cntk, convolutional
from ntkdask.errors import DataError


@pytest.mark.parametrize(("shape", "reach"), [((4, 5), (3, 4)), ((4, 5), (0, 0)), ((6, 3), (2, 1)), ((1, 1), (0, 0))])
def test_entries_are_the_pairs_of_pixels_within_reach(shape, reach):
    pixels = list(itertools.product(*map(range, shape)))
    expected = sum(all(abs(a - b) <= r for a, b, r in zip(p, q, reach, strict=True)) for p in pixels for q in pixels)
    assert _operations.entries(shape, reach) == expected


def test_operations_of_one_and_two_layers_by_hand():
    one = _operations.count(nd.convolutional(1), (4, 4), 3, "float32")
    # product 1 + 2 fused, box 4, rectify 11 + 9 fused + 2 roots, readout 2
    assert (one.simple, one.fused, one.roots) == (256 * (1 + 4 + 11 + 2), 256 * (2 + 9), 256 * 2)
    assert one.flops == 256 * (18 + 2 * 11 + 2)
    two = _operations.count(nd.convolutional(2), (4, 4), 3, "float32")
    # the second convolution: two boxes and their sum
    assert (two.simple - one.simple, two.fused - one.fused, two.roots - one.roots) == (256 * (9 + 11), 256 * 9, 256 * 2)


def test_operations_follow_dtype_readout_and_pooling():
    single, double = (_operations.count(nd.convolutional(3), (8, 8), 3, dtype) for dtype in ("float32", "float64"))
    assert double.fused - single.fused == 3 * 64**2 * 10
    flat = _operations.count(nd.convolutional(3, readout="flatten"), (8, 8), 3, "float32")
    assert single.flops == 64 * flat.flops
    pooled = _operations.count(nd.myrtle(5), (8, 8), 3, "float32")
    assert pooled.roots == 2 * (2 * 64**2 + 16**2 + 4**2)


def test_operations_that_are_not_counted_are_refused():
    networks = (
        nd.convolutional(1, activation="tanh"),
        nd.convolutional(1, padding="valid"),
        nd.Network((nd.Conv(stride=2), nd.Activation(), nd.GlobalAvgPool(), nd.Dense())),
        nd.Network((nd.Conv(), nd.LayerNorm(), nd.Activation(), nd.GlobalAvgPool(), nd.Dense())),
    )
    for network in networks:
        with pytest.raises(ValueError, match="not counted"):
            _operations.count(network, (8, 8), 3, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probes_of_arithmetic_do_the_steps_that_are_counted(dtype):
    rounds, kind, number = 37, getattr(types, dtype), np.dtype(dtype).type
    a, b = number(0.9990234375), number(0.0009765625)
    steps = {
        _arithmetic._fused: lambda x: (x.astype(np.float64) * a + b).astype(dtype),
        _arithmetic._root: lambda x: np.sqrt(x + a),
    }
    for step, naive in steps.items():
        x = number(0.5) + np.arange(_arithmetic.CHAINS, dtype=dtype)
        for _ in range(rounds):
            x = naive(x)
        found = _arithmetic._burst(kind, dtype, step)(rounds, number(0.5))
        np.testing.assert_allclose(found, x.sum(), rtol={"float32": 1e-5, "float64": 1e-13}[dtype])


def test_images_are_standardised_and_smooth_ones_have_flat_patches():
    for make in convolutional.KINDS.values():
        x = make(16, np.random.default_rng(0)).astype(np.float64)
        assert x.shape == (16, 32, 32, 3)
        assert make(1, np.random.default_rng(0)).dtype == np.float32
        np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)
    flat = [
        np.mean(np.all(np.diff(make(16, np.random.default_rng(0)), axis=1) == 0, axis=-1))
        for make in convolutional.KINDS.values()
    ]
    assert flat[0] == 0
    assert 0.02 < flat[1] < 0.5


def test_the_peer_is_told_the_same_layers():
    layers = convolutional.peer_layers(nd.myrtle(5, filter_size=5))
    conv = [("conv", 5), ("relu", 0)]
    assert layers == [*conv, *conv, ("avgpool", 2), *conv, ("avgpool", 2), *conv, ("gap", 0), ("dense", 0)]
    assert convolutional.peer_layers(nd.convolutional(1, readout="flatten")) == [
        ("conv", 3),
        ("relu", 0),
        ("flatten", 0),
        ("dense", 0),
    ]


def test_a_line_of_the_table():
    ours = {"noise": [1e-3, 3e-3, 2e-3], "smooth": [2e-3, 2e-3, 2e-3]}
    reply = {"seconds_per_pair": [0.2, 0.3, 0.4], "batch": 2}
    row = convolutional.Measured("convolutional(3)", "float32", 256, ours, 1e8, 6e6, 4e11, 5e-4, reply, 1e-6, 2e-6)
    cells = [cell.strip() for cell in convolutional.line(row).strip("|").split("|")]
    assert cells == [
        "convolutional(3)",
        "float32",
        "1e+03 (2e+03)",
        "2e+03 (2e+03)",
        "100",
        "25%",
        "500",
        "50%",
        "200 (300), batch 2",
        "200 (150)",
        "1.0e-06, 2.0e-06",
    ]


def test_balanced_orders_are_nested_and_balanced():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 20))
    small, large = (cifar_cntk.balanced(labels, n, np.random.default_rng(1)) for n in (10, 53))
    np.testing.assert_array_equal(small, large[:10])
    assert len(set(large.tolist())) == 53
    assert np.bincount(labels[small]).tolist() == [2] * 5
    assert set(np.bincount(labels[large]).tolist()) == {10, 11}
    with pytest.raises(DataError, match="there are 100"):
        cifar_cntk.balanced(labels, 101, np.random.default_rng(1))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """8×8 images in class folders: two classes that a kernel tells apart, brighter on the left or on the right."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 8)):
        for label in ("left", "right"):
            (folder / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[:, :4] += np.uint8(100 if label == "left" else 0)
                pixels[:, 4:] += np.uint8(0 if label == "left" else 100)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


@pytest.mark.slow
def test_the_cifar_benchmark_runs_and_takes_up_what_is_stored(archive, tmp_path, monkeypatch, capsys):
    arguments = [
        "--data",
        f"{tmp_path}/data.zarr",
        "--train",
        "16",
        "--test",
        "10",
        "--folder",
        f"{tmp_path}/runs",
        "--threads",
        "1",
    ]
    arguments += ["--kernels", "ntk-1", "rbf", "cntk-3"]
    monkeypatch.setattr(sys, "argv", ["cifar_cntk", *arguments])
    cifar_cntk.main()
    assert "skipped" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["cifar_cntk", "--import", str(archive), *arguments])
    cifar_cntk.main()
    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith("16 training and 10 test images, 2 classes")
    assert [line.split()[0] for line in first[1:]] == ["ntk-1", "rbf", "cntk-3"]
    assert all("296 pairs" in line for line in first[1:])
    assert float(first[1].split()[2].rstrip("%,")) >= 80
    monkeypatch.setattr(sys, "argv", ["cifar_cntk", *arguments])
    cifar_cntk.main()
    # seconds are those of the stored tiles, so nothing was computed again
    assert capsys.readouterr().out.splitlines()[1:] == first[1:]


@pytest.mark.parametrize(("real", "instruction"), [("float", "fma.rn.f32"), ("double", "fma.rn.f64")])
def test_the_probe_of_a_gpu_compiles_to_the_fused_multiply_adds_that_are_counted(real, instruction):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy without an NVRTC library raises its own RuntimeError or an OSError
        pytest.skip(f"NVRTC is not installed (test extra): {error}")
    for arch in ("80", "90"):
        program = nvrtc.createProgram(_arithmetic.cuda_source(real), "burst.cu", [], [])
        nvrtc.compileProgram(program, [f"--gpu-architecture=compute_{arch}", "--std=c++17"])
        found = nvrtc.getPTX(program).count(instruction.encode())
        nvrtc.destroyProgram(program)
        assert found > 0
        assert found % _arithmetic.DEVICE_CHAINS == 0
