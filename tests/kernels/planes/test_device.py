"""The passes over planes on a GPU, without one: every CUDA source by NVRTC, and the whole readout as host C++ against a naive twin."""

import itertools
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from cuda_host import HostModules

from ntkdask import activations
from ntkdask.kernels.planes import cuda_source as plane_sources
from ntkdask.kernels.planes import device as plane_device
from ntkdask.kernels.planes import program as stages
from ntkdask.kernels.planes import reference as planes
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Network,
    Residual,
    convolutional,
    myrtle,
)

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
SHARED = 160 * 1024
LEAKY = activations.get("leaky_relu", slope=0.3)


# --- the naive twin: MATH.md §1 on whole arrays S[h, w, h', w'] ------------------------------------------------------


@dataclass
class Walk:
    """S of the pairs (x, x), (y, y) and (x, y), T of (x, y), and the variances seen on the way."""

    s: list
    t: np.ndarray
    nodes: list = field(default_factory=list)

    def copy(self):
        return Walk([a.copy() for a in self.s], self.t.copy(), self.nodes)


def twin_convolved(a, conv):
    (h, w), (q, r), (sy, sx) = a.shape[:2], conv.filter, conv.strides
    (oh, ow), (top, left) = conv.output_shape((h, w)), conv.before((h, w))
    pads = [(top, (oh - 1) * sy + q), (left, (ow - 1) * sx + r)] * 2
    padded = np.pad(a, pads, mode="wrap" if conv.padding == "circular" else "constant")
    out = np.zeros((oh, ow, oh, ow))
    for top, left in itertools.product(range(q), range(r)):
        rows, columns = slice(top, top + (oh - 1) * sy + 1, sy), slice(left, left + (ow - 1) * sx + 1, sx)
        out += padded[rows, columns, rows, columns]
    return out / (q * r)


def variances(a):
    h, w = a.shape[:2]
    return np.einsum("hwhw->hw", a).reshape(h, w)


def twin_walk(layers, walk):
    for layer in layers:
        if isinstance(layer, Conv):
            walk.s = [layer.weight_variance * twin_convolved(a, layer) + layer.bias_variance for a in walk.s]
            walk.t = layer.weight_variance * twin_convolved(walk.t, layer) + (walk.s[2] if layer.trainable else 0)
        elif isinstance(layer, (Activation, LayerNorm)):
            v = [variances(a) for a in walk.s[:2]]
            walk.nodes.append(v)
            sizes = [np.sqrt(v[i][:, :, None, None] * v[j][None, None]) for i, j in ((0, 0), (1, 1), (0, 1))]
            c = [np.divide(a, d, out=np.zeros_like(a), where=d > 0) for a, d in zip(walk.s, sizes, strict=True)]
            if isinstance(layer, LayerNorm):
                walk.s = c
                walk.t = np.divide(walk.t, sizes[2], out=np.zeros_like(walk.t), where=sizes[2] > 0)
                continue
            # the twin's own rounding of equal patches
            c = [np.where(np.abs(a) > 1 - 1e-13, np.sign(a), a) for a in c]
            a, b = layer.sigma.slopes
            curve, line = layer.gain * (a + b) ** 2 / 2, layer.gain * a * b
            kappa0 = [1 - np.arccos(x) / np.pi for x in c]
            kappa1 = [x * k + np.sqrt(1 - x * x) / np.pi for x, k in zip(c, kappa0, strict=True)]
            walk.s = [d * (curve * k - line * x) for d, k, x in zip(sizes, kappa1, c, strict=True)]
            walk.t = walk.t * (curve * kappa0[2] - line)
        elif isinstance(layer, AvgPool):
            walk.s, walk.t = [pooled(a, layer.window) for a in walk.s], pooled(walk.t, layer.window)
        else:
            start = walk.copy()
            branch = twin_walk(layer.branch, walk)
            shortcut = twin_walk(layer.shortcut, start)
            walk = Walk([a + b for a, b in zip(branch.s, shortcut.s, strict=True)], branch.t + shortcut.t, walk.nodes)
    return walk


def pooled(a, window):
    h, w = a.shape[0] // window[0], a.shape[1] // window[1]
    return a.reshape(h, window[0], w, window[1], h, window[0], w, window[1]).mean((1, 3, 5, 7))


def twin(network, x, y):
    """S, T (n, m) at the readout, and the variance maps of x and of y."""
    position = network.readout_position
    n, m = len(x), len(y)
    s, t = np.zeros((n, m)), np.zeros((n, m))
    scales = np.zeros(n), np.zeros(m)
    maps = {}
    for i, j in itertools.product(range(n), range(m)):
        left, right = x[i].astype(float), y[j].astype(float)
        starts = [np.einsum("hwc,klc->hwkl", a, b) for a, b in ((left, left), (right, right), (left, right))]
        walk = twin_walk(network.layers[:position], Walk(starts, np.zeros_like(starts[2])))
        gap = isinstance(network.layers[position], GlobalAvgPool)
        read = (lambda a: a.mean()) if gap else (lambda a: variances(a).mean())
        s[i, j], t[i, j] = read(walk.s[2]), read(walk.t)
        scales[0][i], scales[1][j] = read(walk.s[0]), read(walk.s[1])
        for node, v in enumerate(walk.nodes):
            maps[0, i, node], maps[1, j, node] = v
    sides = [
        [np.stack([maps[side, i, node] for i in range(count)]) for node in range(len(walk.nodes))]
        for side, count in enumerate((n, m))
    ]
    return s, t, sides, scales


# --- networks and images ------------------------------------------------------------------------------------------


def resnet(**conv):
    block = (Conv(3, stride=2, **conv), LayerNorm(), Activation(), Conv(3, bias_variance=0.1, **conv))
    return Network(
        (
            Conv(3, **conv),
            Residual((Activation(), Conv(3, **conv))),
            Residual(block, (Conv(1, stride=2, weight_variance=0.7),)),
            Activation(LEAKY),
            GlobalAvgPool(),
            Dense(),
        )
    )


NETWORKS = {
    # network, images, whether folded.cu runs each stage
    "depth 2": (convolutional(2, bias_variance=0.05), (6, 5), [True]),
    "flatten": (convolutional(3, readout="flatten"), (4, 5), [True]),
    "circular": (convolutional(2, 5, "circular", activation="abs"), (6, 4), [True]),
    "even filter": (convolutional(2, (2, 4), activation=LEAKY), (5, 9), [True]),
    "depth 0": (convolutional(0), (3, 4), [True]),
    "LayerNorm": (
        Network((Conv(), LayerNorm(), Activation(), Conv((3, 1)), Activation(), GlobalAvgPool(), Dense())),
        (5, 17),
        [True],
    ),
    "myrtle": (myrtle(5, trainable_ends=False), (8, 12), [True, True, True]),
    "windows": (
        Network(
            (
                Conv(),
                Activation(),
                AvgPool((3, 2)),
                Conv(padding="circular"),
                Activation(LEAKY),
                AvgPool((1, 3)),
                Conv(),
                Activation(),
                GlobalAvgPool(),
                Dense(),
            )
        ),
        (6, 12),
        [True, True, True],
    ),
    "pooled flatten": (
        Network(
            (
                Conv(),
                Activation(),
                AvgPool(2),
                Conv(),
                Activation(),
                AvgPool(2),
                Conv(),
                Activation(),
                Flatten(),
                Dense(),
            )
        ),
        (8, 8),
        [False, False, True],
    ),
    "residual": (resnet(), (8, 6), [False]),
    "residual, odd strides": (resnet(), (7, 5), [False]),
    "residual, circular": (resnet(padding="circular"), (6, 4), [False]),
    "valid": (
        Network(
            (
                Conv(2, "valid"),
                Activation(),
                AvgPool((2, 1)),
                Conv(3, "valid", stride=(1, 2)),
                Activation(),
                GlobalAvgPool(),
                Dense(),
            )
        ),
        (7, 8),
        [False, False],
    ),
    "wide": (
        Network(
            (Conv(3, stride=(1, 5)), Activation(), AvgPool((1, 2)), Conv(), Activation(), GlobalAvgPool(), Dense())
        ),
        (3, 40),
        [False, True],
    ),
}


def images(shape, dtype, n=3, seed=0, channels=3):
    """Random images; the last is constant but for a corner of zeros."""
    x = np.random.default_rng(seed).standard_normal((n, *shape, channels)).astype(dtype)
    x[-1] = 0.7
    x[-1, : shape[0] // 2 + 1, : shape[1] // 2 + 1] = 0
    return x


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return HostModules(tmp_path_factory.mktemp("planes"))


@pytest.fixture
def on_the_host(modules, monkeypatch):
    """Launches run here: kernels as host C++, blocks of general.cu of few threads."""
    monkeypatch.setattr(plane_device, "cuda_module", modules)
    monkeypatch.setattr(plane_device, "to_device", lambda x: x)
    monkeypatch.setattr(plane_device, "block_shared_bytes", lambda: SHARED)
    monkeypatch.setattr(plane_device, "POOL_THREADS", 4)
    monkeypatch.setattr(plane_sources, "GENERAL_THREADS", 4)


def normwise(found, expected, scales):
    assert np.isfinite(found).all()
    bound = np.sqrt(scales[0][:, None] * scales[1][None])
    return (np.abs(found - expected) / np.where(bound > 0, bound, 1)).max()


EVERY_DAY = ("windows", "residual", "circular", "LayerNorm", "even filter", "valid")
"""One network for each branch of the sources; a host compiler takes seconds for each, so the others are slow tests."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in NETWORKS]
)
def test_readout_is_the_twins(name, dtype, on_the_host):
    network, shape, folded = NETWORKS[name]
    x, y = images(shape, dtype), images(shape, dtype, 2, 1)
    y[0] = x[1]
    program = stages.program(network, shape)
    codes = plane_sources.stage_codes(program, x.dtype.itemsize, True, SHARED)
    assert [code.folded for code in codes] == folded
    assert plane_device.supports(program, x.dtype.itemsize, True)
    s, t, maps, scales = twin(network, x, y)
    found = plane_device.readout(program, x, y, *maps, 1.0, True)
    depth = max(1, network.depth)
    assert normwise(found[0], s, scales) <= TOLERANCE[dtype]
    assert normwise(found[1], t, scales) <= TOLERANCE[dtype] * depth


def pass_of(network, x, y=None, tangent=True):
    """The readout of images, with the variance maps of the general path."""
    program = stages.program(network, x.shape[1:3])
    maps = [planes.variance_maps(network, images) for images in (x, x if y is None else y)]
    return plane_device.readout(program, x, y, *maps, 1.0, tangent)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_whole_image_is_the_general_paths(dtype, on_the_host):
    """32×32: a slab fills a warp. Two images share a strip of equal patches; the pair of equal images is in doubt."""
    network = convolutional(2)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(dtype)
    x[:, :6] = 1.5
    y = x[1:].copy()
    maps = [planes.variance_maps(network, images) for images in (x, y)]
    expected = planes.readout_pairs(network, x.astype(float), y.astype(float), *maps, True)
    own = [planes.image_diagonals(network, images, m, True) for images, m in zip((x, y), maps, strict=True)]
    for found, whole, part in zip(pass_of(network, x, y), expected, (0, 1), strict=True):
        assert normwise(found, whole, [side[part] for side in own]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["depth 2", "myrtle", "residual, odd strides"])
def test_symmetric_calls_and_batches_give_the_same_bits(name, on_the_host, monkeypatch):
    network, shape, _ = NETWORKS[name]
    x = images(shape, "float32", 4)
    whole = pass_of(network, x, x.copy())
    mirrored = pass_of(network, x)
    monkeypatch.setattr(plane_device, "BATCH_PAIRS", 3)
    cut = pass_of(network, x)
    lower = np.tril_indices(4)
    for a, b, c in zip(whole, mirrored, cut, strict=True):
        np.testing.assert_array_equal(b, b.T)
        np.testing.assert_array_equal(b[lower], a[lower])
        np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("name", ["depth 2", "myrtle", "residual"])
def test_the_nngp_alone(name, on_the_host):
    network, shape, _ = NETWORKS[name]
    x = images(shape, "float64")
    s, t = pass_of(network, x, tangent=False)
    assert t is None
    np.testing.assert_allclose(s, pass_of(network, x)[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["depth 2", "LayerNorm", "myrtle", "residual"])
def test_zero_images_give_what_the_limit_is(name, on_the_host):
    network, shape, _ = NETWORKS[name]
    x = images(shape, "float32")
    x[0] = 0
    s, t, maps, scales = twin(network, x, x[:1])
    found = plane_device.readout(stages.program(network, shape), x, x[:1], *maps, 1.0, True)
    scales = [np.maximum(scale, 1e-30) for scale in scales]
    assert normwise(found[0], s, scales) <= TOLERANCE["float32"]
    assert normwise(found[1], t, scales) <= TOLERANCE["float32"] * network.depth


def test_no_rows_give_no_entries(on_the_host):
    network, shape, _ = NETWORKS["depth 2"]
    x = images(shape, "float64")
    assert [part.shape for part in pass_of(network, x[:0], x)] == [(0, 3)] * 2
    assert [part.shape for part in pass_of(network, x[:0])] == [(0, 0)] * 2


def test_equal_images_are_doubted_and_generic_ones_are_not(on_the_host, monkeypatch):
    network, shape = convolutional(3, readout="flatten"), (8, 8)
    x = np.random.default_rng(3).standard_normal((5, *shape, 3)).astype("float32")
    x[3] = x[0]
    sizes = []
    original = plane_device._Run.means

    def means(run, i, j):
        sizes.append((run.dtype.name, len(i)))
        return original(run, i, j)

    monkeypatch.setattr(plane_device._Run, "means", means)
    pass_of(network, x)
    # the images with themselves for the scale, all pairs, and of those the five with themselves and the two equal ones
    assert sizes == [("float32", 5), ("float32", 15), ("float64", 6)]


# --- what is taken and what is refused ---------------------------------------------------------------------------


def test_pooled_planes_that_do_not_fit_take_the_general_source(on_the_host, monkeypatch):
    network, shape, _ = NETWORKS["myrtle"]
    x = images(shape, "float64")
    roomy = pass_of(network, x)
    monkeypatch.setattr(plane_device, "block_shared_bytes", lambda: 8 * 4 + 8 * 4 * 96 + 100)
    codes = plane_sources.stage_codes(stages.program(network, shape), 8, True, plane_device.block_shared_bytes())
    assert [code.folded for code in codes] == [False, True, True]
    for a, b in zip(pass_of(network, x), roomy, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_refusals_say_why(on_the_host, monkeypatch):
    mixed = Network((Conv(2, "valid"), Activation(), Conv(padding="circular"), Activation(), GlobalAvgPool(), Dense()))
    program = stages.program(mixed, (6, 6))
    assert "circular" in plane_sources.refusal(program, 4, True, SHARED)
    assert not plane_device.supports(program, 4, True)
    uneven = Network((Conv(3, "circular", stride=2), Activation(), GlobalAvgPool(), Dense()))
    assert not plane_device.supports(stages.program(uneven, (5, 6)), 4, True)
    large = stages.program(convolutional(1), (120, 120))
    assert not plane_device.supports(large, 4, True)
    assert f"a block has {SHARED}" in plane_sources.refusal(large, 8, True, SHARED)


def test_workspace_counts_inputs_and_a_batch():
    program = stages.program(myrtle(5), (32, 32))
    small, more = (plane_device.workspace_bytes(program, n, 10, 3, 4, True) for n in (10, 20))
    assert more - small >= 10 * 32 * 32 * 3 * 12
    assert small >= plane_device.BATCH_BYTES


# --- NVRTC ------------------------------------------------------------------------------------------------------------

COMPILED = {
    "convolutional": (convolutional(3), (32, 32), 4),
    "convolutional float64": (convolutional(3), (9, 9), 8),
    "circular": (convolutional(2, 5, "circular", activation="abs"), (12, 20), 4),
    "flatten": (convolutional(3, readout="flatten"), (14, 28), 4),
    "myrtle": (myrtle(5), (32, 32), 4),
    "myrtle float64": (myrtle(5), (8, 8), 8),
    "residual": (resnet(), (32, 32), 4),
    "residual float64": (resnet(), (33, 31), 8),
    "valid": (*NETWORKS["valid"][:2], 8),
}
SPILLED_BYTES = 512
"""Of a thread, at most: registers that a kernel puts by in local memory, loads and stores each."""


@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("convolutional", "myrtle float64", "valid") else pytest.mark.slow)
        for n in COMPILED
    ],
)
def test_nvrtc_compiles_within_the_registers(name, architecture):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed (test extra)")
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy without an NVRTC library raises its own RuntimeError or an OSError
        pytest.skip(f"NVRTC is not installed (test extra): {error}")
    network, shape, itemsize = COMPILED[name]
    for code in plane_sources.stage_codes(stages.program(network, shape), itemsize, True, SHARED):
        assert code.shared_bytes <= SHARED
        program = nvrtc.createProgram(code.source, "planes.cu", [], [])
        options = [f"--gpu-architecture={architecture}", "--ptxas-options=-v", *plane_device.OPTIONS]
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program))
        log = nvrtc.getProgramLog(program)
        assert max(map(int, re.findall(r"(\d+) bytes spill", log))) <= SPILLED_BYTES, log
        assert max(map(int, re.findall(r"Used (\d+) registers", log))) * code.threads <= 2**16, log
        nvrtc.destroyProgram(program)
