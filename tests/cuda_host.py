"""CUDA sources of passes over planes as host C++: what the tests need to run device code and its launches without a GPU.

A block of general.cu is as many threads of the host, with real barriers. In folded.cu a warp is one such thread, whose
values are `Lanes`: 32 numbers with the operations of one.
"""

import ctypes
import hashlib
import shutil
import subprocess

import numpy as np
import pytest

FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-pthread"]

RUNTIME = """
#include <barrier>
#include <thread>
#include <vector>
struct Index { int x, y; };
thread_local Index threadIdx, blockIdx;
Index blockDim, gridDim;
double shared[1 << 16];
static std::barrier<>* meeting;
extern "C" void synchronise() { meeting->arrive_and_wait(); }
// Threads of a block, `apart` of whose indices each stands for, take the blocks one after the other.
extern "C" void run_grid(int grid_x, int grid_y, int block, int apart, void (*body)(void*), void* context) {
    gridDim = {grid_x, grid_y};
    blockDim = {block, 1};
    std::barrier<> together(block / apart);
    meeting = &together;
    auto work = [=](int thread) {
        threadIdx = {thread * apart, 0};
        for (int y = 0; y < grid_y; ++y)
            for (int x = 0; x < grid_x; ++x) {
                blockIdx = {x, y};
                body(context);
                meeting->arrive_and_wait();
            }
    };
    std::vector<std::thread> threads;
    for (int k = 1; k < block / apart; ++k) threads.emplace_back(work, k);
    work(0);
    for (auto& thread : threads) thread.join();
}
"""

SHIM = """
#include <math.h>
struct Index { int x, y; };
extern thread_local Index threadIdx, blockIdx;
extern Index blockDim, gridDim;
extern "C" void synchronise();
extern "C" void run_grid(int, int, int, int, void (*)(void*), void*);
static void __syncthreads() { synchronise(); }
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define PLANES_HOST
#define __constant__ static const
#define __shared__
#define __launch_bounds__(...)
#define LANE_CODE inline
#define ENTRY static void

template <typename R> struct Lanes {
    R v[32];
    Lanes() = default;
    Lanes(R x) { for (R& value : v) value = x; }
    template <typename F> static Lanes each(F f) { Lanes r; for (int l = 0; l < 32; ++l) r.v[l] = f(l); return r; }
    #define BINARY(NAME, EXPRESSION) \\
        friend Lanes NAME(const Lanes& a, const Lanes& b) { return each([&](int l) { R x = a.v[l], y = b.v[l]; return EXPRESSION; }); }
    #define UNARY(NAME, EXPRESSION) \\
        friend Lanes NAME(const Lanes& a) { return each([&](int l) { R x = a.v[l]; return EXPRESSION; }); }
    BINARY(operator+, x + y) BINARY(operator-, x - y) BINARY(operator*, x * y) BINARY(operator/, x / y)
    BINARY(larger, x > y ? x : y) BINARY(smaller, x < y ? x : y) BINARY(signed_as, (R)copysign(x, y))
    UNARY(operator-, -x) UNARY(root, (R)sqrt(x)) UNARY(magnitude, (R)fabs(x)) UNARY(reciprocal, 1 / x)
    UNARY(reciprocal_root, 1 / (R)sqrt(x))
    friend Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
        return each([&](int l) { return a.v[l] * b.v[l] + c.v[l]; });
    }
    friend Lanes select_above(const Lanes& a, R limit, R then, const Lanes& b) {
        return each([&](int l) { return a.v[l] > limit ? then : b.v[l]; });
    }
};
template <typename R> struct OfLanes { typedef Lanes<R> type; };
template <typename R, typename F> static Lanes<R> per_lane(F f) { return Lanes<R>::each(f); }
template <typename F> static void for_each_lane(F f) { for (int l = 0; l < 32; ++l) f(l); }
template <typename R> static R lane_value(const Lanes<R>& a, int lane) { return a.v[lane]; }
template <typename R> static Lanes<R> shuffle(const Lanes<R>& a, const Lanes<int>& source) {
    return Lanes<R>::each([&](int l) { return a.v[source.v[l]]; });
}
static double lane_total(Lanes<double> a) {
    for (int step = 16; step; step /= 2) a = a + shuffle(a, per_lane<int>([&](int l) { return l ^ step; }));
    return a.v[0];
}

// Arguments come as a launch takes them: pointers to values of the kernel's own types.
template <typename... A> struct Call {
    void (*kernel)(A...);
    void** values;
    static void run(void* self) { ((Call*)self)->with(numbers<sizeof...(A)>()); }
    template <int... K> struct Numbers {};
    template <int N, int... K> struct Count : Count<N - 1, N - 1, K...> {};
    template <int... K> struct Count<0, K...> { typedef Numbers<K...> type; };
    template <int N> static typename Count<N>::type numbers() { return {}; }
    template <int... K> void with(Numbers<K...>) { kernel(*(A*)values[K]...); }
};
template <typename... A> static void launch(void (*kernel)(A...), int x, int y, int block, int apart, void** values) {
    Call<A...> call = {kernel, values};
    run_grid(x, y, block, apart, &Call<A...>::run, &call);
}
"""

EXPORT = """
extern "C" void run_{name}(int x, int y, int block, void** values) {{ launch({name}, x, y, block, {apart}, values); }}
"""


class HostModules:
    """`arrays.cuda_module` for the host: sources compiled once each, kernels launched as CuPy launches them."""

    def __init__(self, folder):
        self.folder, self.libraries = folder, {}
        self.compiler = shutil.which("g++") or shutil.which("clang++")
        if self.compiler is None:
            pytest.skip("no C++ compiler (g++ or clang++) on the PATH")
        self.runtime = self._build("runtime", RUNTIME)

    def __call__(self, source, options=()):
        name = hashlib.sha1(source.encode()).hexdigest()
        if name not in self.libraries:
            self.libraries[name] = ctypes.CDLL(str(self._build(name, SHIM + source + exports(source), self.runtime)))
        return HostModule(self.libraries[name])

    def _build(self, name, text, *others):
        path, library = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        path.write_text(text)
        command = [self.compiler, *FLAGS, str(path), *map(str, others), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[:4000]
        return library


def exports(source):
    """The kernels of a source; in the one of warps a thread of the host stands for 32."""
    if "PLANE_SEGMENT" in source:
        names, apart = ["slab_sums" if "#define PLANE_POOL_H 0" in source else "slab_pools"], 32
    else:
        names, apart = ["plane_steps", "pool_planes"], 1
    return "".join(EXPORT.format(name=name, apart=apart) for name in names)


class HostModule:
    """A compiled source. Every launch is checked as a driver would not: arrays contiguous, scalars NumPy's."""

    def __init__(self, library):
        self.library = library

    def get_function(self, name):
        return HostKernel(getattr(self.library, f"run_{name}"))


class HostKernel:
    """A kernel, called as (grid, block, arguments)."""

    def __init__(self, function):
        self.function, self.max_dynamic_shared_size_bytes = function, 48 * 1024

    def __call__(self, grid, block, arguments, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        values = [value_of(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.function(grid[0], grid[1] if len(grid) > 1 else 1, block[0], pointers)


SCALARS = {"float32": ctypes.c_float, "float64": ctypes.c_double, "int32": ctypes.c_int32, "int64": ctypes.c_int64}


def value_of(argument):
    """What a launch hands over: an array as the address of its memory, a NumPy scalar by its own width."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, np.uintp):
        return ctypes.c_void_p(int(argument))
    return SCALARS[argument.dtype.name](argument.item())
