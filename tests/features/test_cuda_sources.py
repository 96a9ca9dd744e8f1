"""CUDA sources without a GPU: compiled by NVRTC for sm_80 and sm_90, and hadamard.cu run as host C++ against NumPy."""

import ctypes
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
from scipy.linalg import hadamard

import ntkdask

SOURCES = sorted(resources.files(ntkdask).rglob("*.cu"))
INCLUDES = [f"-I{folder}" for folder in sorted({str(source.parent) for source in SOURCES})]

# One block of a grid at a time; PHASES runs the threads of a phase one after the other, as the barriers allow.
SHIM = """
#define HADAMARD_HOST
#define __device__
#define __shared__
struct index3 { int x, y, z; };
static index3 blockIdx, gridDim;
static int threads, thread;
#define THREAD thread
#define THREADS threads
#define PHASES(statement) for (thread = 0; thread < threads; ++thread) { statement; }
#define ENTRY static void
// What a kernel declares as dynamic shared memory; double-aligned like the kernel's own declaration.
double shared[1 << 16];
#include "hadamard.cu"
#define RUN(grid_x, grid_y, block, call)                                                   \\
    threads = block; gridDim = {grid_x, grid_y, 1};                                        \\
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)                                \\
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) call;
#define HOST(T, NAME)                                                                                                 \\
    extern "C" void rows_##NAME(const T* x, long long stride, const T* signs, int d, T* out, long long stride_out,    \\
                                int n, int size, int chunks, int block) {                                             \\
        RUN(n * chunks, 1, block, hadamard_rows_##NAME(x, stride, signs, d, out, stride_out, size, chunks))           \\
    }                                                                                                                 \\
    extern "C" void pass_##NAME(const T* x, long long stride, const T* signs, int d, T* out, long long stride_out,    \\
                                int n, int size, int low, int bits, int block, int blocks_y) {                        \\
        RUN(((size >> bits) + block - 1) / block, blocks_y, block,                                                    \\
            hadamard_pass_##NAME(x, stride, signs, d, out, stride_out, n, size, low, bits))                           \\
    }                                                                                                                 \\
    extern "C" void sampled_##NAME(const T* x, const T* signs_x, int d_x, int size_x, const unsigned* rows_x,         \\
                                   const T* y, const T* signs_y, int d_y, int size_y, const unsigned* rows_y,         \\
                                   int n, int m, T scale, T* out, long long stride_out, int block) {                  \\
        RUN(n, 1, block, sampled_rows_##NAME(x, d_x, signs_x, d_x, size_x, rows_x, y, d_y, signs_y, d_y, size_y,      \\
                                             rows_y, m, scale, out, stride_out))                                      \\
    }                                                                                                                 \\
    extern "C" void gather_##NAME(const T* a, int size_a, const unsigned* rows_a, const T* b, int size_b,             \\
                                  const unsigned* rows_b, int n, int m, T scale, T* out, long long stride_out,        \\
                                  int block) {                                                                        \\
        RUN(n, 1, block, gather_samples_##NAME(a, size_a, rows_a, b, size_b, rows_b, m, scale, out, stride_out))      \\
    }
HOST(float, float32)
HOST(double, float64)
"""
SCALARS = {"float32": ctypes.c_float, "float64": ctypes.c_double}
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_nvrtc_compiles(source, architecture):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed (test extra)")
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy without an NVRTC library raises its own RuntimeError or an OSError
        pytest.skip(f"NVRTC is not installed (test extra): {error}")
    program = nvrtc.createProgram(source.read_text(), source.name, [], [])
    try:
        nvrtc.compileProgram(program, [f"--gpu-architecture={architecture}", "--std=c++17", *INCLUDES])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert nvrtc.getCUBIN(program)[1:4] == b"ELF"
    nvrtc.destroyProgram(program)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """hadamard.cu as a shared library for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on the PATH")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "host.cpp").write_text(SHIM)
    library = folder / "host.so"
    include = resources.files("ntkdask.features.sketching")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{include}"]
    built = subprocess.run(
        [compiler, *flags, str(folder / "host.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


def call(function, *arguments):
    """`function` with arrays as pointers, None as a null pointer, NumPy floats by their own width."""
    converted = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            converted.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, np.floating):
            converted.append(SCALARS[argument.dtype.name](argument))
        else:
            converted.append(ctypes.c_void_p(None) if argument is None else ctypes.c_longlong(argument))
    function(*converted)


def operand(n, d, dtype, seed):
    """x (n, d), signs (d,), rows (m = 37,) and the float64 (H D x)[rows]."""
    rng = np.random.default_rng(seed)
    size = 1 << max(0, d - 1).bit_length()
    x, signs = rng.standard_normal((n, d)).astype(dtype), rng.choice([-1.0, 1.0], d).astype(dtype)
    rows = rng.integers(0, size, 37).astype(np.uint32)
    padded = np.zeros((n, size))
    padded[:, :d] = x * signs
    transformed = padded @ hadamard(size)
    return x, signs, rows, size, transformed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [1, 32, 96])
@pytest.mark.parametrize("d", [1, 2, 9, 100, 1024])
def test_rows_on_the_host(host, d, block, dtype):
    x, signs, _, size, expected = operand(3, d, dtype, d)
    out = np.full((3, size + 5), 7, dtype)
    call(getattr(host, f"rows_{dtype}"), x, d, signs, d, out, size + 5, 3, size, 1, block)
    np.testing.assert_allclose(out[:, :size], expected, atol=TOLERANCE[dtype] * size)
    assert (out[:, size:] == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("d", "chunk"), [(1000, 128), (513, 64), (1024, 16), (300, 256)])
def test_passes_through_global_memory_on_the_host(host, d, chunk, dtype):
    x, signs, _, size, expected = operand(5, d, dtype, d)
    out = np.full((5, size), 7, dtype)
    source, width, high = x, d, size.bit_length() - 1
    while 1 << high > chunk:
        bits = min(3, high - chunk.bit_length() + 1)
        high -= bits
        call(getattr(host, f"pass_{dtype}"), source, width, signs, width, out, size, 5, size, high, bits, 32, 2)
        source, signs, width = out, None, size
    call(getattr(host, f"rows_{dtype}"), out, size, None, size, out, size, 5, chunk, size // chunk, 32)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("d1", "d2"), [(1, 9), (9, 784), (1000, 300)])
def test_samples_on_the_host(host, d1, d2, dtype):
    x, signs_x, rows_x, size_x, left = operand(4, d1, dtype, 1)
    y, signs_y, rows_y, size_y, right = operand(4, d2, dtype, 2)
    scale, atol = np.dtype(dtype).type(0.5), TOLERANCE[dtype] * size_x * size_y
    product, single, gathered = np.full((4, 40), 7, dtype), np.empty((4, 37), dtype), np.empty((4, 37), dtype)
    sampled = getattr(host, f"sampled_{dtype}")
    call(sampled, x, signs_x, d1, size_x, rows_x, y, signs_y, d2, size_y, rows_y, 4, 37, scale, product, 40, 64)
    np.testing.assert_allclose(product[:, :37], 0.5 * left[:, rows_x] * right[:, rows_y], atol=atol)
    assert (product[:, 37:] == 7).all()
    call(sampled, x, signs_x, d1, size_x, rows_x, None, None, 0, 0, None, 4, 37, scale, single, 37, 64)
    np.testing.assert_allclose(single, 0.5 * left[:, rows_x], atol=atol)
    a, b = left.astype(dtype), right.astype(dtype)
    call(getattr(host, f"gather_{dtype}"), a, size_x, rows_x, b, size_y, rows_y, 4, 37, scale, gathered, 37, 64)
    np.testing.assert_allclose(gathered, 0.5 * left[:, rows_x] * right[:, rows_y], atol=atol)
