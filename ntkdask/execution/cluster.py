"""A Dask client of a new local cluster, on CPU cores or GPUs, or of a running scheduler; errors come before work.

`connect` starts or finds the cluster and checks that its workers can run this package's tasks; `workers.py` says what it is made of.
Nothing here schedules: `map_reduce.py` does. Estimators, workflows and the command line take the client that `connect` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
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
from ntkdask.execution.certificates import mismatch, security_of
from ntkdask.execution.main_guard import GUARD, require_guard
from ntkdask.execution.workers import ANSWER_SECONDS, check_versions
from ntkdask.files import home_expanded

LOOPBACK = "127.0.0.1"
TlsFiles = tuple[str | os.PathLike[str], str | os.PathLike[str], str | os.PathLike[str]]
"""Paths of the certificate authority, the certificate and its key, in PEM format."""

# Numba is not among them: its pool may be set once per process, and `threads.limited` sets how much of it a task uses.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Results are receipts of a few bytes: spilling them frees nothing when a task fills a worker's memory.
_NO_SPILLING = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}


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
    """Connect to a running cluster, or start one on this machine when neither address nor scheduler file is given.

    Parameters
    ----------
    address : str or None
        Of a running scheduler, "tcp://HOST:PORT" or "tls://HOST:PORT".
    scheduler_file : str, Path or None
        The file that a running scheduler wrote its address to.
    n_workers : int or None
        Processes of a local cluster. None: one per GPU, else one per core up to 4 cores, else a quarter of them (BLAS takes the rest).
    threads_per_worker : int
        Task slots of each local worker.
    worker_memory : int, str or None
        Of each local worker, bytes or text such as "2 GiB". None: an equal share of the host's.
    cuda : bool or None
        None: local workers take the GPUs where they are usable; True: they must; False: they leave them alone.
    security : Security, (ca, certificate, key) or None
        TLS of a tls:// address, or to encrypt a local cluster; paths of PEM files, or Dask's object.
    dashboard_port : int
        Port of a local cluster's dashboard; any free one where it is taken.
    timeout : float
        Seconds to wait for a scheduler file, then for its scheduler, then for a first worker. Three times as long for the first
        answers of all workers, which import this package for it; workers of a local cluster have two minutes.
    local_directory : str, Path or None
        Scratch folder of local workers. None: the system's temporary folder.

    Returns
    -------
    distributed.Client
        A local cluster listens on 127.0.0.1 alone and ends with its client: `client.close()`, or the end of a `with` block.

    Raises
    ------
    UserError
        For arguments that contradict each other.
    ClusterError
        When a GPU was asked for and cannot be used, when the scheduler or a worker does not answer in time, or when a worker has other
        versions of the packages that results depend on.

    Notes
    -----
    A script calls this below `if __name__ == "__main__":`, since worker processes import the script first; notebooks and the command
    line need no such guard.
    """
    if address is not None and scheduler_file is not None:
        raise UserError(
            f"connect was given the address {address} and the scheduler file {scheduler_file}. Give one of them."
        )
    tls = security_of(security)
    patience = 3 * timeout
    if address is not None:
        client = _attach(address, tls, timeout)
    elif scheduler_file is not None:
        client = _attach(_address_in(home_expanded(scheduler_file), timeout), tls, timeout, f" (from {scheduler_file})")
    else:
        client = _start_local(n_workers, threads_per_worker, worker_memory, cuda, tls, dashboard_port, local_directory)
        patience = ANSWER_SECONDS
    try:
        _require_workers(client, timeout)
        check_versions(client, patience)
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
    """A client that closes its local cluster when it is closed."""

    def close(self, *args: Any, **kwargs: Any) -> None:
        cluster = self.cluster
        super().close(*args, **kwargs)
        # once: the garbage collector closes the client again, at any moment, and closing a closed cluster still takes a lock of Dask's
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
    require_guard()
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
        "local_directory": None if local_directory is None else os.fspath(home_expanded(local_directory)),
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
        raise ClusterError(f"the local cluster did not start: {type(error).__name__}: {error}. {GUARD}") from error
    return client


def _cluster_kind(n_workers: int | None, cuda: bool | None) -> tuple[type[LocalCluster], int, dict[str, Any]]:
    """(class, number of processes, further options) of a local cluster: GPUs where asked for and usable, else CPU cores."""
    cores = host_cores()
    on_cpu = n_workers or (cores if cores <= 4 else cores // 4)
    # with the GPUs visible, all CPU workers of a GPU machine would move their arrays to the first one;
    # `config` also reaches workers that are started again after a death, the ambient configuration only the first ones
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
            return _without_spilling(LocalCUDACluster), n_workers or gpus, {}
        except ImportError as error:
            reason = f"{reason}, but dask-cuda cannot be imported ({error}): pip install 'ntkdask[cuda13]' (or cuda12)"
    if cuda:
        raise ClusterError(f"cuda=True was asked for, but no GPU can be used: {reason}. `ntkdask doctor` shows more.")
    return cpu_kind


def _without_spilling(kind: type[LocalCluster]) -> type[LocalCluster]:
    """A class of clusters that fills the option `config` of its workers itself, as dask-cuda's does: with no spilling added to it."""

    class WithoutSpilling(kind):  # type: ignore[valid-type,misc]
        def new_worker_spec(self) -> dict[Any, Any]:
            """See `distributed.SpecCluster`. The ambient configuration reaches the first workers alone, not restarted ones."""
            specs: dict[Any, Any] = super().new_worker_spec()
            for spec in specs.values():
                spec["options"]["config"] = {**spec["options"].get("config", {}), **_NO_SPILLING}
            return specs

    return WithoutSpilling


def _attach(address: str, security: Security | None, timeout: float, source: str = "") -> Client:
    """A client of the scheduler at `address`; ClusterError when none answers within `timeout` seconds."""
    if "://" not in address:
        address = f"{'tls' if security else 'tcp'}://{address}"
    if address.startswith("tcp://") and security is not None and security.require_encryption:
        raise UserError(f"{address} is not encrypted, but certificates were given. Use tls://, or leave security out.")
    if address.startswith("tls://") and security is None and not Security().require_encryption:
        raise UserError(
            f"{address} is encrypted, but no certificates were given. Pass security=(ca, certificate, key)."
        )
    try:
        # in a separate thread, since a notebook's thread has an event loop already
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _greet(address, security or Security(), timeout)).result()
        return Client(address, security=security, timeout=timeout)
    except (ValueError, TypeError, RuntimeError) as error:  # a malformed address; tcp:// where encryption is required
        _raise_mismatch(error, f"{address}{source}")
        raise UserError(
            f"cannot connect to {address}{source}: {error}. Expected tcp://HOST:PORT or tls://HOST:PORT."
        ) from error
    except ImportError as error:  # how Dask reports versions that cannot talk to each other
        raise ClusterError(f"the scheduler at {address}{source} runs another Dask: {error}") from error
    except OSError as error:
        _raise_mismatch(error, f"{address}{source}")
        raise ClusterError(
            f"no scheduler answers at {address}{source} within {timeout:g} s. Is it running? Check the address, the "
            "port, the firewall, and that both sides use TLS or neither does."
        ) from error


def _raise_mismatch(error: BaseException, where: str) -> None:
    """ClusterError where the scheduler was there but its certificates and ours do not fit each other."""
    found = mismatch(error, where.startswith("tls://"))
    if found is not None:
        raise ClusterError(
            f"the scheduler at {where} answers, but {found}. Give security=(ca, certificate, key) with the authority that signed the "
            "certificates of scheduler and workers, and a certificate that it signed."
        ) from error


async def _greet(address: str, security: Security, timeout: float) -> None:
    """Shake hands with a scheduler and disconnect; TimeoutError when something listens there but does not speak Dask.

    The timeout of `Client` covers the connection, not the handshake: it would wait for ever on a stopped process.
    """
    greeting = comm.connect(address, timeout=timeout, **security.get_connection_args("client"))
    connection = await asyncio.wait_for(greeting, timeout)
    await connection.close()


def _address_in(path: Path, timeout: float) -> str:
    """The scheduler's address in a scheduler file, for which it waits up to `timeout` seconds."""
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
    """Wait for the first worker; ClusterError after `timeout` seconds without one."""
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError as error:
        where = client.scheduler_info(n_workers=0)["address"]
        raise ClusterError(
            f"the scheduler at {where} has no workers after {timeout:g} s. Start some: `dask worker {where}`."
        ) from error


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
"""Settings of glibc's allocator in workers. With Dask's trim threshold of 64 KiB the memory of every batch goes back to the system,
which zeroes its pages again for the next batch: a Gram slab took a fifth longer. 32 MiB is the largest array that the heap keeps."""

_LOGGING = {"DASK_LOGGING": "{'distributed.worker': 'critical', 'distributed.worker.memory': 'warning'}"}
"""Log levels in workers. A worker that is closed while it works logs tracebacks of what it could not finish, such as a heartbeat.
`map_reduce.py` reports how tasks end, nannies report how workers die."""


@contextlib.contextmanager
def _spawn_environment(threads: int) -> Iterator[None]:
    """Set the environment in which worker processes start, and restore ours afterwards.

    Workers get `threads` BLAS threads (Dask's default is one), keep memory between batches, and log little. The libraries read the
    variables when they are loaded, so the variables must be set before the process starts. The nanny copies them into its own
    environment, where values that are set already take precedence.
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
    """Block Ctrl-C while a cluster starts, and in its worker processes for as long as they live.

    A terminal sends Ctrl-C to every process of a command. The driver ends its workers; if the signal reached them, they would die with
    tracebacks. Threads and processes inherit the blocked signal from the thread that starts them, so workers that start later have it
    blocked, too.
    """
    resource_tracker.ensure_running()  # starting it unblocks the signal in the thread that does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
