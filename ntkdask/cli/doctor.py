"""What this machine offers a run, measured in a few seconds: packages, cores, BLAS, memory, GPU, storage, dashboard.

Each check gives a `Finding` and never raises: a broken GPU driver must not hide a full disk. The command line prints
them as a table.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from dask.system import CPU_COUNT
from distributed.system import memory_limit
from packaging.requirements import Requirement

from ntkdask import threads
from ntkdask.arrays import Array, gpu_status, host_cores, namespace, to_device, to_host
from ntkdask.execution.cluster import port_is_free
from ntkdask.files import free_bytes, local_path
from ntkdask.store import TileStore
from ntkdask.wording import format_bytes

_PACKAGES = ("numpy", "scipy", "dask", "distributed", "zarr", "numba")
_OPTIONAL = ("cupy-cuda13x", "cupy-cuda12x", "cupy", "dask-cuda", "torch")
_TILE_ROWS = 4096
_LITTLE_SPACE_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Parameters
    ----------
    name : str
        What was looked at.
    ok : bool or None
        True: it is fine; False: it is broken; None: a fact, or a warning where there is advice.
    detail : str
        What was found.
    advice : str, optional
        What to do; empty where there is nothing to do.
    """

    name: str
    ok: bool | None
    detail: str
    advice: str = ""


def diagnose(folder: str | os.PathLike[str] = ".", *, dashboard_port: int = 8787) -> list[Finding]:
    """Look at this machine and at `folder`, where stores will be written; takes 2 to 5 seconds and leaves nothing behind.

    A product of n×n matrices counts as 2 n³ operations. A GB is 1e9 bytes; a copy counts the bytes that it reads and those that it
    writes.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "cores and memory": _cores_and_memory,
        "BLAS": _blas,
        "memory copy": _memory_copy,
        "GPU": _gpu,
        "torch": _torch,
        "storage": lambda: _storage(local_path(folder)),
        "dashboard": lambda: _dashboard(dashboard_port),
    }
    return [finding for name, check in checks.items() for finding in _findings(name, check)]


def _findings(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of one check; where it fails, the failure is the last of them."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:  # whatever breaks on this machine is the diagnosis
        failure = f"the check failed: {type(error).__name__}: {error}"
        findings.append(Finding(name, False, failure, "Please report this."))
    return findings


def _installed(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _versions() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} on {platform.platform()}")
    own = _installed("ntkdask")
    yield Finding("ntkdask", own is not None, own or "not installed", "" if own else "pip install ntkdask")
    required = {
        r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("ntkdask") or []) if not r.marker
    }
    for package in (*_PACKAGES, *_OPTIONAL):
        version = _installed(package)
        if version is None and package in _OPTIONAL:
            continue
        fits = version is not None and (
            package not in required or required[package].contains(version, prereleases=True)
        )
        advice = "" if fits else f"pip install '{package}{required.get(package, '')}'"
        yield Finding(package, fits, version or "not installed", advice)


def _cores_and_memory() -> Iterator[Finding]:
    cores, quota = host_cores(), CPU_COUNT
    advice = ""
    if quota < cores:
        advice = f"This container pays for {quota} of them; local clusters use {quota}."
    yield Finding("cores", None, f"{cores} usable of {os.cpu_count()}", advice)
    limit, available = memory_limit(), psutil.virtual_memory().available
    yield Finding("memory", None, f"{format_bytes(min(available, limit))} available of {format_bytes(limit)}")


def _blas() -> Iterator[Finding]:
    cores = min(host_cores(), CPU_COUNT)
    all_cores, one_core = _matmul_rate(np.asarray, cores), _matmul_rate(np.asarray, 1)
    rates = f"float32 product {all_cores:.0f} GFLOP/s on {cores} cores, {one_core:.0f} on one"
    advice = ""
    if cores > 1 and all_cores < 1.2 * one_core:
        advice = "More cores bring nothing: other programs may be using them, or this BLAS has one thread only."
    yield Finding("BLAS", None, f"{threads.blas_name()}; {rates}", advice)
    core_type = os.environ.get("OPENBLAS_CORETYPE")
    if core_type is not None:
        advice = (
            "It pins OpenBLAS to one kind of CPU and can halve its rate: unset it unless you need its exact results."
        )
        yield Finding("OPENBLAS_CORETYPE", None, core_type, advice)


def _matmul_rate(place: Callable[[np.ndarray], Array], n_threads: int, n: int = 1024, seconds: float = 0.2) -> float:
    """The best rate, in GFLOP/s, of float32 products of n×n matrices within `seconds`; `place` puts the matrices on a device."""
    a = place(np.ones((n, n), np.float32))
    out = namespace(a).empty_like(a)
    best, deadline = np.inf, time.perf_counter() + seconds
    with threads.limited(n_threads):
        while True:
            started = time.perf_counter()
            namespace(a).matmul(a, a, out=out)
            to_host(out[:1, :1])  # waits for a GPU
            now = time.perf_counter()
            best = min(best, now - started)
            if now > deadline:
                return 2 * n**3 / best / 1e9


def _memory_copy() -> Iterator[Finding]:
    source = np.ones(2**24, np.float64)
    target = np.ones_like(source)
    best = min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))
    yield Finding("memory copy", None, f"{2 * source.nbytes / best / 1e9:.1f} GB/s on one core")


def _gpu() -> Iterator[Finding]:
    usable, reason = gpu_status()
    if not usable:
        yield Finding("GPU", None, f"not used: {reason}")
        return
    rate = _matmul_rate(to_device, 1, n=4096, seconds=0.5)
    yield Finding("GPU", True, f"{reason}; float32 product {rate:.0f} GFLOP/s")
    try:
        import dask_cuda  # noqa: F401
    except ImportError as error:
        advice = "One process uses the first GPU; for a local cluster on all of them pip install 'ntkdask[cuda13]'."
        yield Finding("dask-cuda", None, f"cannot be imported: {error}", advice)


def _torch() -> Iterator[Finding]:
    """Whether torch can use the GPU that CuPy uses: without it empirical kernels would run on the CPU."""
    if _installed("torch") is None:
        return
    from ntkdask.modules.tensors import cuda_words

    words = cuda_words()
    lacking = gpu_status()[0] and "CPU" in words
    yield Finding("torch CUDA", None, words, "Install a build of torch for this GPU's CUDA." if lacking else "")


def _storage(folder: Path) -> Iterator[Finding]:
    free = free_bytes(folder)
    advice = "Stores of kernels and features are large: choose another folder." if free < _LITTLE_SPACE_BYTES else ""
    yield Finding("free disk", free >= _LITTLE_SPACE_BYTES, f"{format_bytes(free)} at {folder}", advice)
    if not folder.is_dir():
        yield Finding("store write", False, f"{folder} is not a folder", "Create it, or name another one.")
        return
    array = np.arange(_TILE_ROWS * _TILE_ROWS, dtype=np.float32).reshape(_TILE_ROWS, _TILE_ROWS)
    if free < 2 * array.nbytes:
        yield Finding("store write", False, "not tried: the disk is full", "Free some disk space.")
        return
    try:
        yield _write_test(folder, array)
    except Exception as error:  # OSError and StoreError say why this folder takes no stores
        advice = "Choose another folder, or change its permissions."
        yield Finding("store write", False, f"{type(error).__name__}: {error}", advice)


def _write_test(folder: Path, array: np.ndarray) -> Finding:
    """Write one tile into a temporary store in `folder`, read it back, compare."""
    scratch = Path(tempfile.mkdtemp(prefix=".ntkdask-doctor-", dir=folder))
    try:
        store = TileStore.create(
            scratch / "tile", shape=array.shape, tile_shape=array.shape, dtype=array.dtype, fingerprint={"test": True}
        )
        write = _seconds(lambda: store.record(store.commit((0, 0), array)))
        tiles_read: list[np.ndarray] = []
        read = _seconds(lambda: tiles_read.append(store.read((0, 0))))
        same = np.array_equal(tiles_read[0], array)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rates = f"one tile of {format_bytes(array.nbytes)}: write {array.nbytes / write / 1e9:.2f} GB/s"
    detail = f"{rates}, read {array.nbytes / read / 1e9:.2f} GB/s (cached)"
    return Finding(
        "store write", same, detail, "" if same else "What was read is not what was written: check the disk."
    )


def _dashboard(port: int) -> Iterator[Finding]:
    free = port_is_free(port)
    advice = "" if free else "A local cluster takes another port and prints it; or stop what is running there."
    yield Finding("dashboard", True if free else None, f"port {port} is {'free' if free else 'taken'}", advice)


def _seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
