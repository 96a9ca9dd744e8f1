"""A Dask client: local processes on CPU cores or GPUs, or attached to a running scheduler; errors come before work.

`connect` starts or finds the cluster and checks that its workers can run this package's tasks; `workers.py` says what it is
made of. Nothing here schedules: `execution.py` does. Estimators,
workflows and the command line take the client that `connect` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from dask.utils import parse_bytes
from distributed import Client, LocalCluster, Security, Status, comm

from ntkdask.arrays import gpu_status, host_cores
from ntkdask.errors import ClusterError, UserError
from ntkdask.execution.workers import check_versions

LOOPBACK = "127.0.0.1"
TlsFiles = tuple[str | os.PathLike[str], str | os.PathLike[str], str | os.PathLike[str]]
"""Paths of the certificate authority, the certificate and its key, in PEM format."""

# Numba is not among them: its pool may be set once per process, and `threads.limited` sets how much of it a task uses.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Results are receipts of a few bytes: a worker near its limit is busy computing, and spilling them would not help.
_NO_SPILLING = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}
_GUARD = "In a script, call it below `if __name__ == '__main__':`, since worker processes import the script."


def connect(
    address: str | None = None,
    *,
    scheduler_file: str | os.PathLike[str] | None = None,
    n_workers: int | None = None,
    threads_per_worker: int = 1,
    worker_memory: int | str | None = None,
    cuda: bool | None = None,
    security: Security | TlsFiles | None = None,
    dashboard_port: int = 8787,
    timeout: float = 10.0,
    local_directory: str | os.PathLike[str] | None = None,
) -> Client:
    """A client of the scheduler at `address` or in `scheduler_file`; of a new local cluster when neither is given.

    A local cluster listens on 127.0.0.1 alone and ends with its client (`client.close()`, or the `with` block).
    n_workers: processes; default one per GPU, else one per core up to 4 cores, else a quarter of them (BLAS takes the
    rest). threads_per_worker: task slots of each. worker_memory: bytes or text such as "2 GiB" per worker; default an
    equal share of the host's. cuda: None takes the GPUs where they are usable, True insists, False leaves them alone.
    dashboard_port: any free one where this one is taken. local_directory: workers' scratch; default the system's
    temporary folder. These describe a local cluster; an existing one is as it is.

    timeout: seconds to wait for a scheduler file, then for its scheduler, then for a first worker.
    security: for tls:// addresses, and to encrypt a local cluster.

    Raises UserError for arguments that contradict each other; ClusterError when a GPU was asked for and cannot be used,
    nothing answers in time, or a worker has other versions of the packages that results depend on.

    A script calls this below `if __name__ == "__main__":`, since worker processes import the script first; notebooks
    and the command line need nothing.
    """
    if address is not None and scheduler_file is not None:
        raise UserError(
            f"connect was given the address {address} and the scheduler file {scheduler_file}. Give one of them."
        )
    tls = _security(security)
    if address is not None:
        client = _attach(address, tls, timeout)
    elif scheduler_file is not None:
        client = _attach(_address_in(Path(scheduler_file), timeout), tls, timeout, f" (from {scheduler_file})")
    else:
        client = _start_local(n_workers, threads_per_worker, worker_memory, cuda, tls, dashboard_port, local_directory)
    try:
        _require_workers(client, timeout)
        check_versions(client)
    except BaseException:
        client.close()
        raise
    return client


def port_is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on `host:port` now."""
    with socket.socket() as probe:
        # as servers do: a port whose last connection is still winding down counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


class _LocalClient(Client):
    """A client that takes its local cluster down with it."""

    def close(self, *args: Any, **kwargs: Any) -> None:
        cluster = self.cluster
        super().close(*args, **kwargs)
        # once: the garbage collector closes again, at any moment, and a closed cluster's close still takes a lock of Dask's
        if cluster is not None and cluster.status != Status.closed:
            cluster.close()


def _start_local(
    n_workers: int | None,
    threads_per_worker: int,
    worker_memory: int | str | None,
    cuda: bool | None,
    security: Security | None,
    dashboard_port: int,
    local_directory: str | os.PathLike[str] | None,
) -> Client:
    """A client that owns a new cluster on this machine; see `connect`."""
    if _script_is_being_imported():
        raise UserError(f"connect was called by a worker process that is importing this script. {_GUARD}")
    for name, value in (("n_workers", n_workers), ("threads_per_worker", threads_per_worker)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; a local cluster needs at least 1. Leave it out for the default.")
    cluster_class, processes, options = _cluster_kind(n_workers, cuda)
    options |= {
        "n_workers": processes,
        "threads_per_worker": threads_per_worker,
        "memory_limit": "auto" if worker_memory is None else _bytes(worker_memory),
        "host": LOOPBACK,
        "dashboard_address": f"{LOOPBACK}:{dashboard_port if port_is_free(dashboard_port) else 0}",
        "local_directory": None if local_directory is None else os.fspath(local_directory),
        "security": security,
    }
    client: Client | None = None
    try:
        with _interrupts_held(), _spawn_environment(host_cores() // (processes * threads_per_worker)):
            client = _LocalClient(cluster_class(**options))
    except KeyboardInterrupt:  # it was held back until here
        if client is not None:
            client.close()
        raise
    except Exception as error:  # whatever a child process, the operating system or a GPU driver raises
        raise ClusterError(f"the local cluster did not start: {type(error).__name__}: {error}. {_GUARD}") from error
    return client


def _cluster_kind(n_workers: int | None, cuda: bool | None) -> tuple[type[LocalCluster], int, dict[str, Any]]:
    """(class, number of processes, options of its own): GPUs where asked for and usable, else CPU cores."""
    cores = host_cores()
    on_cpu = n_workers or (cores if cores <= 4 else cores // 4)
    # without CUDA_VISIBLE_DEVICES, CPU workers on a GPU machine would all move their arrays to the first GPU;
    # config reaches workers that are started again after a death, the ambient configuration only the first ones
    cpu_kind = (LocalCluster, on_cpu, {"env": {"CUDA_VISIBLE_DEVICES": ""}, "config": _NO_SPILLING})
    if cuda is False:
        return cpu_kind
    usable, reason = gpu_status()
    if usable:
        try:
            from dask_cuda import LocalCUDACluster
            from dask_cuda.utils import get_n_gpus

            gpus = get_n_gpus()
            if (n_workers or gpus) > gpus:
                raise UserError(
                    f"n_workers is {n_workers}, but this machine shows {gpus} GPUs. Ask for that many or fewer."
                )
            return LocalCUDACluster, n_workers or gpus, {}
        except ImportError as error:
            reason = f"{reason}, but dask-cuda cannot be imported ({error}): pip install 'ntkdask[cuda13]' (or cuda12)"
    if cuda:
        raise ClusterError(f"cuda=True was asked for, but no GPU can be used: {reason}. `ntkdask doctor` shows more.")
    return cpu_kind


def _attach(address: str, security: Security | None, timeout: float, source: str = "") -> Client:
    """A client of the scheduler at `address`; ClusterError when none answers within `timeout` seconds."""
    if "://" not in address:
        address = f"{'tls' if security else 'tcp'}://{address}"
    if address.startswith("tls://") and security is None and not Security().require_encryption:
        raise UserError(
            f"{address} is encrypted, but no certificates were given. Pass security=(ca, certificate, key)."
        )
    try:
        # in a thread of its own, since a notebook's has an event loop already
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _greet(address, security or Security(), timeout)).result()
        return Client(address, security=security, timeout=timeout)
    except (ValueError, TypeError, RuntimeError) as error:  # a malformed address; tcp:// where encryption is required
        raise UserError(
            f"cannot connect to {address}{source}: {error}. Expected tcp://HOST:PORT or tls://HOST:PORT."
        ) from error
    except ImportError as error:  # how Dask reports versions that cannot talk to each other
        raise ClusterError(f"the scheduler at {address}{source} runs another Dask: {error}") from error
    except OSError as error:
        raise ClusterError(
            f"no scheduler answers at {address}{source} within {timeout:g} s. Is it running? Check the address, the "
            "port, the firewall, and that both sides use TLS or neither does."
        ) from error


async def _greet(address: str, security: Security, timeout: float) -> None:
    """Shake hands with a scheduler and leave; TimeoutError when something listens there but does not speak Dask.

    Client's own timeout covers the connection, not the handshake: it would wait for ever on a stopped process.
    """
    greeting = comm.connect(address, timeout=timeout, **security.get_connection_args("client"))
    connection = await asyncio.wait_for(greeting, timeout)
    await connection.close()


def _address_in(path: Path, timeout: float) -> str:
    """The scheduler's address in a scheduler file, which may be about to be written."""
    deadline = time.monotonic() + timeout
    cause: Exception
    while True:
        try:
            return str(json.loads(path.read_text())["address"])
        except FileNotFoundError as error:
            cause, problem = error, f"no scheduler file {path} appeared within {timeout:g} s"
        except (ValueError, KeyError, TypeError) as error:
            cause, problem = error, f"{path} is not a scheduler file (JSON with the key 'address')"
        except OSError as error:
            cause, problem = error, f"the scheduler file {path} cannot be read: {error}"
        if time.monotonic() > deadline:
            advice = f"`dask scheduler --scheduler-file {path}` writes it: is it running?"
            raise ClusterError(f"{problem}. {advice}") from cause
        time.sleep(0.05)


def _require_workers(client: Client, timeout: float) -> None:
    """Wait for a first worker; ClusterError after `timeout` seconds without one."""
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError as error:
        where = client.scheduler_info(n_workers=0)["address"]
        raise ClusterError(
            f"the scheduler at {where} has no workers after {timeout:g} s. Start some: `dask worker {where}`."
        ) from error


def _security(given: Security | TlsFiles | None) -> Security | None:
    """Dask's Security of a triple of PEM files."""
    if given is None or isinstance(given, Security):
        return given
    ca, certificate, key = (os.fspath(p) for p in given)
    missing = [p for p in (ca, certificate, key) if not Path(p).is_file()]
    if missing:
        raise UserError(
            f"TLS files that are not there: {', '.join(missing)}. Expected security=(ca, certificate, key)."
        )
    parts = {"cert": certificate, "key": key}
    roles = {f"tls_{role}_{part}": parts[part] for role in ("client", "scheduler", "worker") for part in parts}
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


def _bytes(given: int | str) -> int:
    """Bytes of a worker's memory limit from a number or text."""
    try:
        size = int(parse_bytes(given))
    except ValueError as error:
        raise UserError(f"worker_memory is {given!r}: {error}. Expected bytes or text such as '2 GiB'.") from error
    if size < 2**20:
        raise UserError(f"worker_memory is {size} bytes; a worker needs at least 1 MiB, in practice 1 GiB.")
    return size


_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(256 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}
"""glibc in workers: Dask's own 64 KiB hands every batch's arrays back to the system, and its pages are zeroed again for the next
one (a Gram slab took a fifth longer); 32 MiB is the largest array that the heap may keep."""

_LOGGING = {"DASK_LOGGING": "{'distributed.worker': 'critical', 'distributed.worker.memory': 'warning'}"}
"""A worker that is told to leave while it works logs tracebacks of what it could not finish, a heartbeat for one. How tasks end is
told by `execution.py`, how workers die by their nannies."""


@contextlib.contextmanager
def _spawn_environment(threads: int) -> Iterator[None]:
    """Start worker processes with `threads` BLAS threads, keeping memory between batches, saying little; ours is put back.

    Dask's default is one thread. The libraries read the variables when they are loaded, so they must be there before the
    process starts: the nanny copies them into its own environment, and lets values that are there already win.
    """
    ours = {name: str(max(1, threads)) for name in _THREAD_VARIABLES}
    ours |= {name: os.environ.get(name, value) for name, value in (_ALLOCATOR | _LOGGING).items()}
    spawn = {**dask.config.get("distributed.nanny.pre-spawn-environ"), **ours}
    before = {name: os.environ.get(name) for name in (*spawn, "PYTHONHASHSEED")}
    os.environ.update(ours)
    try:
        with dask.config.set({"distributed.nanny.pre-spawn-environ": spawn, **_NO_SPILLING}):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a cluster starts, and keep it from its worker processes for good.

    A terminal sends it to every process of a command, but it is the driver that ends its workers: they would die with
    tracebacks. Threads and processes inherit the blocked signal from the thread that starts them, so workers that come later
    have it too.
    """
    resource_tracker.ensure_running()  # starting it unblocks the signal in the thread that does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _script_is_being_imported() -> bool:
    """Whether the call comes from a script that a starting worker process imports (multiprocessing's `__mp_main__`)."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "__mp_main__" and frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
