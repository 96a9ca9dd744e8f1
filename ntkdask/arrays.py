"""Where an array lives: NumPy on the host, CuPy on a GPU.

The only module that imports CuPy, and only when it is asked to.

Numerics ask an array for its namespace and write one code path. `import ntkdask` never imports CuPy: the functions
here look at `sys.modules` first, so an array that is not CuPy's never triggers the import.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from ntkdask.errors import DtypeError, InputError

Array = Any
"""A NumPy or CuPy array. The array API has no common static type."""

FLOAT_DTYPES = ("float32", "float64")


def _cupy() -> ModuleType:
    import cupy

    return cupy


def is_device_array(x: Any) -> bool:
    """True for a CuPy array; does not import CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def namespace(x: Array) -> ModuleType:
    """The module whose functions apply to `x`: `numpy` or `cupy`."""
    return _cupy() if is_device_array(x) else np


def special(x: Array) -> ModuleType:
    """The module of special functions (erf, erfcx, ndtr, expit) for `x`: `scipy.special` or `cupyx.scipy.special`."""
    if is_device_array(x):
        import cupyx.scipy.special

        return cupyx.scipy.special
    import scipy.special

    return scipy.special


def gpu_status() -> tuple[bool, str]:
    """Whether a GPU can be used, and why or why not in one line."""
    if importlib.util.find_spec("cupy") is None:
        return False, "CuPy is not installed: pip install 'ntkdask[cuda13]' (or cuda12)"
    try:
        cupy = _cupy()
        if not cupy.cuda.is_available():
            return False, "CuPy is installed, but no CUDA driver or device is visible"
        device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
        name = properties["name"].decode()
        return True, f"{name}, compute capability {device.compute_capability}, {device.mem_info[1] / 2**30:.0f} GiB"
    except Exception as error:  # a broken driver raises anything from OSError to CUDARuntimeError
        return False, f"CuPy cannot use the GPU: {type(error).__name__}: {error}"


def gpu_usable() -> bool:
    """Whether arrays may be moved to a GPU here."""
    return gpu_status()[0]


def device_memory_bytes() -> int:
    """Total bytes of the current GPU; 0 without one."""
    return int(_cupy().cuda.Device().mem_info[1]) if gpu_usable() else 0


def release_device_memory() -> None:
    """Give back what CuPy's pool and torch's allocator keep on the current GPU for later; nothing without either."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and gpu_usable():
        cupy.get_default_memory_pool().free_all_blocks()
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@functools.cache
def cuda_module(source: str, options: tuple[str, ...] = ("--std=c++17",)) -> Any:
    """A `cupy.RawModule` of the CUDA C++ `source`, whose kernels are extern "C"; compiled at the first `get_function`."""
    return _cupy().RawModule(code=source, options=options)


def block_shared_bytes() -> int:
    """Bytes of shared memory that one thread block of the current GPU may ask for."""
    return int(_cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


def host_cores() -> int:
    """Cores this process may use: its affinity mask, and a container's quota where that is smaller."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(mask, CPU_COUNT)


def to_device(x: np.ndarray, device: bool = True) -> Array:
    """`x` on the GPU where `device` is true, else `x` itself; copied through pinned memory, at the rate of the bus."""
    if not device or is_device_array(x):
        return x
    cupy = _cupy()
    x = np.ascontiguousarray(x)
    memory = cupy.cuda.alloc_pinned_memory(x.nbytes)
    pinned = np.frombuffer(memory, x.dtype, x.size).reshape(x.shape)
    pinned[...] = x
    out = cupy.empty(x.shape, x.dtype)
    out.set(pinned)
    return out


def to_host(x: Array, name: str = "the array") -> np.ndarray:
    """`x` as a NumPy array as `as_array` makes it; copied only where it lies on a GPU or in foreign byte order."""
    return _cupy().asnumpy(x) if is_device_array(x) else _plain(x, name)


def as_array(x: Any, name: str = "the array") -> Array:
    """`x` as a CuPy array, or as a plain NumPy array in this machine's byte order.

    Arrays that are so already are returned as they are, what speaks DLPack (torch tensors) is taken over without a copy, anything
    else goes through `np.asarray`. Tensors that require gradients give their values, bfloat16 is widened to float32. InputError,
    which calls the array `name`, for masked entries, sparse matrices, and tensors without plain numbers.
    """
    if is_device_array(x):
        return x
    if is_sparse(x):
        raise sparse_refused(x, name)
    if hasattr(x, "__dlpack_device__") and not isinstance(x, np.ndarray):
        return _from_dlpack(x, name)
    return _plain(x, name)


def _plain(x: Any, name: str) -> np.ndarray:
    """`x` as a NumPy array without subclass, mask or foreign byte order; InputError where entries are masked."""
    if type(x) is np.ndarray and x.dtype.isnative:
        return x
    if isinstance(x, np.ma.MaskedArray) or (
        isinstance(x, (list, tuple)) and any(isinstance(row, np.ma.MaskedArray) for row in x)
    ):
        masked = int(np.count_nonzero(np.ma.getmaskarray(np.ma.array(x))))
        if masked:
            raise InputError(
                f"{name} is a masked array with {masked} masked {'entry' if masked == 1 else 'entries'}, which hold no numbers to "
                "compute with. Fill them in, for example by .filled(0.0), or leave these rows out."
            )
    x = np.asarray(x)
    # what follows compares dtypes, and compiled loops read this machine's byte order alone
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _from_dlpack(x: Any, name: str) -> Array:
    """A tensor as an array that shares its memory, where it has such memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.layout != torch.strided:
            raise InputError(
                f"{name} is a sparse tensor ({x.layout}), but dense rows are needed here. Use {name}.to_dense()."
            )
        x = x.detach()
        if x.dtype == torch.bfloat16:
            x = x.to(torch.float32)  # NumPy has no bfloat16; every value of it is a float32
    try:
        kind, _ = x.__dlpack_device__()
        return np.from_dlpack(x) if int(kind) == 1 else _cupy().from_dlpack(x)  # 1: kDLCPU
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} is a {type(x).__name__} of dtype {x.dtype} that cannot be read as an array: {error}. Give its values as float32 "
            "in the memory of the host or of a CUDA device."
        ) from error


def is_sparse(x: Any) -> bool:
    """Whether x is a sparse matrix or array of SciPy or CuPy; imports neither."""
    return hasattr(x, "toarray") and hasattr(x, "nnz")


def sparse_refused(x: Any, name: str) -> InputError:
    """The error for a sparse matrix where only dense rows will do."""
    return InputError(
        f"{name} is a sparse {type(x).__name__}, but dense rows are needed here. Use {name}.toarray(), or a map that takes sparse "
        "rows: NTKSketch or HomogeneousSketch with leaves='count'."
    )


def require_float(x: Any, name: str = "x") -> Array:
    """`x` as an array of float32 or float64; DtypeError for another dtype, InputError for a sparse matrix.

    Kernels and feature maps call this on their inputs. Workflows and estimators cast integers, bool and float16 first. Errors
    call the array `name`.
    """
    x = as_array(x, name)
    if x.dtype.name not in FLOAT_DTYPES:
        raise DtypeError(
            f"{name} has dtype {x.dtype}, but kernels and feature maps take float32 or float64. "
            f"Cast it first: {name}.astype('float32')."
        )
    return x


def same_dtype(x: Array, y: Array) -> tuple[Array, Array]:
    """Both arrays in `np.result_type` of their dtypes; copied only where that is not their own."""
    dtype = np.result_type(x.dtype, y.dtype)
    return x.astype(dtype, copy=False), y.astype(dtype, copy=False)


def float_dtype(dtype: Any) -> str:
    """The dtype in which rows of `dtype` are computed where nothing else is asked for: float64 for wide floats, else float32."""
    kind = np.dtype(dtype)
    return "float64" if kind.kind == "f" and kind.itemsize >= 8 else "float32"


def require_rows(x: Array, name: str = "x") -> Array:
    """`x` itself where it has two or more axes, an example a row; InputError otherwise."""
    if x.ndim < 2:
        raise InputError(f"{name} has shape {x.shape}; expected (n, ...) with one example per row. Reshape it first.")
    return x


def flatten_rows(x: Array) -> Array:
    """`x` (n, *s) as (n, prod(s)); a view where the layout of its memory allows one."""
    return require_rows(x).reshape(x.shape[0], math.prod(x.shape[1:])) if x.ndim != 2 else x


def is_dask(x: Any) -> bool:
    """Whether x is a dask array; imports nothing."""
    return type(x).__module__.startswith("dask.array")
