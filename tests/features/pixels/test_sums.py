"""Shifted sums over filters: geometry and numbers against loops, on the host and as the CUDA source compiled for the host."""

import ctypes
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
from reference import filter_pixels

from ntkdask.features.pixels.sums import draw_shifts, neighbours, shift_units, shifted_sums
from ntkdask.kernels import NTK
from ntkdask.kernels.planes import reference as planes
from ntkdask.networks import Activation, AvgPool, Conv, Dense, Flatten, Network

SHIM = """
#define PIXEL_SUMS_HOST
#define __device__
static long long entry;
#define ENTRY_INDEX entry
#define ENTRY static void
#include "sums.cu"
#define HOST(T, NAME)                                                                                                         \\
    extern "C" void sums_##NAME(const T* source, long long rows_in, long long rows_out, const int* pixels, const int* filter, \\
                                const int* counts, long long size, const int* shifts, const T* weights, const T* addend,      \\
                                const T* addend_weights, T* out, long long width, long long first, long long rows) {          \\
        for (entry = 0; entry < rows * width + 3; ++entry)                                                                    \\
            shifted_sums_##NAME(source, rows_in, rows_out, pixels, filter, counts, (int)size, shifts, weights, addend,        \\
                                addend_weights, out, (int)width, first, rows);                                                \\
    }
HOST(float, float32)
HOST(double, float64)
"""
CONVS = [
    Conv(3),
    Conv((1, 2), "valid"),
    Conv((3, 5), "circular"),
    Conv(4, "circular", 2),
    Conv(2, stride=(2, 1)),
    Conv(1),
    Conv((2, 4), "same"),
]
SHAPE = (3, 4)
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
every_conv = pytest.mark.parametrize("conv", CONVS, ids=lambda conv: f"{conv.filter_size}-{conv.padding}-{conv.stride}")


def looped(conv, source, shifts):
    """(images·H'·W', width): Σ_a roll(source[p + a], −shifts[a])."""
    h, w = SHAPE
    rows, columns = (filter_pixels(*axis, conv.padding) for axis in zip(SHAPE, conv.filter, conv.strides, strict=True))
    sums = []
    for image in source.reshape(-1, h, w, source.shape[1]).astype("float64"):
        for y in range(len(rows[0])):
            for x in range(len(columns[0])):
                total = np.zeros(source.shape[1])
                for a, shift in enumerate(shifts):
                    i, j = rows[a // conv.filter[1]][y], columns[a % conv.filter[1]][x]
                    if i < h and j < w:
                        total += np.roll(image[i, j], -shift)
                sums.append(total)
    return np.array(sums)


def operands(conv, dtype, width=64):
    rng = np.random.default_rng(0)
    neighbourhood = neighbours(conv, SHAPE)
    source = rng.standard_normal((2 * neighbourhood.rows_in, width)).astype(dtype)
    weights, addend_weights = rng.standard_normal((2, width)).astype(dtype)
    addend = rng.standard_normal((2 * neighbourhood.rows_out, width)).astype(dtype)
    return (
        neighbourhood,
        source,
        draw_shifts(3, ("shifts",), neighbourhood.pixels.shape[1], width),
        weights,
        addend,
        addend_weights,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_conv
def test_sums(conv, dtype):
    neighbourhood, source, shifts, weights, addend, addend_weights = operands(conv, dtype)
    sums = looped(conv, source, shifts)
    assert conv.output_shape(SHAPE) == (
        neighbourhood.rows_out // conv.output_shape(SHAPE)[1],
        conv.output_shape(SHAPE)[1],
    )
    out = shifted_sums(source, neighbourhood, shifts, weights, 0, np.empty_like(addend))
    np.testing.assert_allclose(out, sums * weights, rtol=0, atol=TOLERANCE[dtype] * 20)
    both = shifted_sums(source, neighbourhood, shifts, weights, 0, np.empty_like(addend), addend, addend_weights)
    np.testing.assert_allclose(both, sums * weights + addend * addend_weights, rtol=0, atol=TOLERANCE[dtype] * 20)
    middle = slice(1, len(both) - 1)  # across the border between the images
    part = shifted_sums(
        source, neighbourhood, shifts, weights, 1, np.empty_like(addend[middle]), addend[middle], addend_weights
    )
    np.testing.assert_array_equal(part, both[middle])


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """pixel_sums.cu as a shared library for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on the PATH")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "host.cpp").write_text(SHIM)
    include = resources.files("ntkdask.features.pixels")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", f"-I{include}", str(folder / "host.cpp")]
    built = subprocess.run([*command, "-o", str(folder / "host.so")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_conv
def test_the_cuda_source_on_the_host(host, conv, dtype):
    neighbourhood, source, shifts, weights, addend, addend_weights = operands(conv, dtype)
    first, rows = 1, 2 * neighbourhood.rows_out - 2
    for extra in ((None, None), (np.ascontiguousarray(addend[first : first + rows]), addend_weights)):
        expected = shifted_sums(source, neighbourhood, shifts, weights, first, np.empty((rows, 64), dtype), *extra)
        out = np.full((rows + 1, 64), 7, dtype)
        arrays = [
            source,
            neighbourhood.pixels,
            neighbourhood.filter,
            neighbourhood.counts,
            shifts,
            weights,
            *extra,
            out,
        ]
        source_, pixels, numbers, counts, moved, scale, other, other_scale, target = (
            ctypes.c_void_p(None if a is None else a.ctypes.data) for a in arrays
        )
        numbers_of = [
            ctypes.c_longlong(v)
            for v in (neighbourhood.rows_in, neighbourhood.rows_out, neighbourhood.pixels.shape[1], 64, first, rows)
        ]
        getattr(host, f"sums_{dtype}")(
            source_,
            *numbers_of[:2],
            pixels,
            numbers,
            counts,
            numbers_of[2],
            moved,
            scale,
            other,
            other_scale,
            target,
            *numbers_of[3:],
        )
        np.testing.assert_allclose(out[:-1], expected, rtol=0, atol=TOLERANCE[dtype] * 20)
        assert (out[-1] == 7).all()


def test_shifts_differ_and_fit():
    for count, width in ((9, 64), (9, 4096), (1, 64), (25, 128), (81, 512)):
        assert width >= shift_units(count)
        shifts = draw_shifts(0, ("a",), count, width)
        assert len(set(shifts.tolist())) == count
        assert (shifts >= 0).all()
        assert (shifts < width).all()
        assert (np.diff(shifts) > 0).all()
    assert (draw_shifts(0, ("a",), 9, 64) != draw_shifts(1, ("a",), 9, 64)).any()


def test_tangent_maps_are_the_diagonals_of_shorter_networks():
    layers = (
        Conv(3, trainable=False),
        Activation("relu"),
        Conv(2),
        AvgPool(2),
        Activation("abs"),
        Conv(3, "circular"),
        Activation("relu"),
    )
    network = Network((*layers, Flatten(), Dense()))
    x = np.random.default_rng(0).standard_normal((3, 4, 6, 2))
    maps = planes.tangent_maps(network, x)
    assert len(maps) == 3
    for (s, t), variances, end in zip(maps, planes.variance_maps(network, x), (1, 4, 6), strict=True):
        np.testing.assert_array_equal(s, variances)
        shorter = Network((*layers[:end], Flatten()))
        np.testing.assert_allclose(t.mean(axis=(1, 2)), NTK(shorter).diagonal(x), rtol=1e-12, atol=0)
