"""The one pass on a GPU. Without one: rectified.cu as host C++ under the Python that launches it, against the CPU's pass. With
one: every kernel on both. `features/test_cuda_sources.py` compiles the source by NVRTC."""

import ctypes
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
from contracts import GENERAL, normwise, rows

from ntkdask import activations, arrays
from ntkdask.errors import InputError
from ntkdask.kernels import NNGP, NTK, RBF, ArcCosine, both, correlations, general, rectified
from ntkdask.kernels import rectified_device as device
from ntkdask.networks import fully_connected

TOLERANCE = {"float32": 2e-6, "float64": 1e-12}
NETWORKS = {
    "depth 0": fully_connected(0),
    "depth 3": fully_connected(3),
    "depth 12": fully_connected(12, bias_variance=0.1),
    "general": GENERAL,
    "abs": fully_connected(2, "abs"),
    "leaky": fully_connected(3, activations.get("leaky_relu", slope=0.9), bias_variance=0.2),
}

# Threads of a grid one after the other: entries do not meet, but for the sum of the counts.
SHIM = """
#include <math.h>
#define RECTIFIED_HOST
#define __device__
static int column;
static long long first_row, row_step;
#define COLUMN column
#define FIRST_ROW first_row
#define ROW_STEP row_step
#define ENTRY static void
static void atomicAdd(unsigned long long* count, unsigned long long value) { *count += value; }
#include "rectified.cu"
#define RUN(call)                                                                   \\
    row_step = grid_y;                                                              \\
    for (first_row = 0; first_row < grid_y; ++first_row)                            \\
        for (column = 0; column < grid_x * threads; ++column) call;
#define HOST(T, NAME)                                                                                                  \\
    extern "C" void run_half_deficits_##NAME(int grid_x, int grid_y, int threads, T* v, int n, int m, T near,          \\
                                             int symmetric, unsigned long long* count) {                               \\
        RUN(half_deficits_##NAME(v, n, m, near, symmetric, count))                                                     \\
    }                                                                                                                  \\
    extern "C" void run_recursion_##NAME(int grid_x, int grid_y, int threads, const T* v, T* nngp, T* ntk, int n,      \\
                                         int m, int symmetric, int steps, const int* kinds, const T* constants,        \\
                                         const T* alpha, const T* beta, const T* deviations, const T* alpha_y,         \\
                                         const T* beta_y, const T* deviations_y) {                                     \\
        RUN(recursion_##NAME(v, nngp, ntk, n, m, symmetric, steps, kinds, constants, alpha, beta, deviations, alpha_y, \\
                             beta_y, deviations_y))                                                                    \\
    }
HOST(float, float32)
HOST(double, float64)
"""


class HostModule:
    """`arrays.cuda_module` for the host: functions called as (grid, block, arguments)."""

    def __init__(self, library):
        self.library = library

    def get_function(self, name):
        function = getattr(self.library, f"run_{name}")

        def launch(grid, block, arguments):
            function(*grid, *block, *map(converted, arguments))

        return launch


def converted(argument):
    """Arrays as pointers to memory that the kernel may take, NumPy scalars by their own width."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, np.uintp):
        return ctypes.c_void_p(int(argument))
    kind = {"float32": ctypes.c_float, "float64": ctypes.c_double, "int32": ctypes.c_int}[argument.dtype.name]
    return kind(argument)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """rectified.cu as a shared library for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on the PATH")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "host.cpp").write_text(SHIM)
    include = resources.files("ntkdask.kernels")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{include}"]
    command = [compiler, *flags, str(folder / "host.cpp"), "-o", str(folder / "host.so")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.fixture
def as_device(library, monkeypatch):
    """NumPy arrays take the path of CuPy's, and kernels run on the host."""
    for module in (rectified, correlations, general):
        monkeypatch.setattr(module, "is_device_array", lambda x: True)
    monkeypatch.setattr(device, "cuda_module", lambda source: HostModule(library))
    monkeypatch.setattr(device, "to_device", lambda x: x)


def inputs(dtype):
    """Rows with zero, duplicate, opposite and near rows, also across x and y."""
    x, y = rows(40, dtype, width=20), rows(23, dtype, seed=1, width=20)
    y[:8] = x[:8]
    y[8:12] = -x[8:12]
    y[12:16] = np.nextafter(x[12:16], np.array(np.inf, dtype))
    return x, y


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_cuda_pass_on_the_host(name, dtype, request):
    network, (x, y) = NETWORKS[name], inputs(dtype)
    pair = both(network)
    here = [pair(x, y), pair(x), (NNGP(network)(x), NTK(network)(x))]
    scales = pair.diagonal(x), pair.diagonal(y)
    request.getfixturevalue("as_device")
    there = [pair(x, y), pair(x), (NNGP(network)(x), NTK(network)(x))]
    for ours, theirs, columns in zip(here, there, (1, 0, 0), strict=True):
        for part in (0, 1):
            error = normwise(theirs[part], ours[part].astype(float), scales[0][part], scales[columns][part])
            assert error <= TOLERANCE[dtype]
    for k in (*there[1], *there[2]):
        np.testing.assert_array_equal(k, k.T)


def test_many_near_rows_on_the_device(request):
    x = (1 + 1e-3 * np.random.default_rng(0).standard_normal((60, 20))).astype("float32")
    kernel = NTK(fully_connected(3))
    here, diagonal = kernel(x), kernel.diagonal(x)
    request.getfixturevalue("as_device")
    assert normwise(kernel(x), here.astype(float), diagonal, diagonal) <= TOLERANCE["float32"]


def test_no_rows_on_the_device(as_device):
    assert NTK(fully_connected(1))(np.ones((0, 3))).shape == (0, 0)
    assert NTK(fully_connected(1))(np.ones((2, 3)), np.ones((0, 3))).shape == (2, 0)


# --- with a GPU ---------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not arrays.gpu_usable(), reason=arrays.gpu_status()[1])


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(
    "kernel",
    [
        *(NTK(network) for network in NETWORKS.values()),
        NNGP(GENERAL),
        NTK(fully_connected(2, "erf", bias_variance=0.1)),
        ArcCosine(0),
        ArcCosine(3),
        RBF(0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_on_a_gpu(kernel, dtype):
    x, y = inputs(dtype)
    there_x, there_y = arrays.to_device(x), arrays.to_device(y)
    diagonal = kernel.diagonal(x), kernel.diagonal(y)
    # κ₀ of float64 cosines near ±1 in ArcCosine
    tolerance = max(TOLERANCE[dtype], 1e-7 if isinstance(kernel, ArcCosine) else 0)
    whole = arrays.to_host(kernel(there_x))
    assert normwise(whole, kernel(x).astype(float), diagonal[0], diagonal[0]) <= tolerance
    assert normwise(arrays.to_host(kernel(there_x, there_y)), kernel(x, y).astype(float), *diagonal) <= tolerance
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(arrays.to_host(kernel.diagonal(there_x)), diagonal[0], rtol=TOLERANCE[dtype])


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_and_a_host_array_are_refused_together():
    x = np.ones((3, 2))
    with pytest.raises(InputError, match="different devices"):
        NTK(fully_connected(1))(arrays.to_device(x), x)
