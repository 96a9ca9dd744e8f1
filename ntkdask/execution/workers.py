"""The workers of a cluster: their cores, memory, GPUs and versions, and the resources that a plan may use.

Every question is one call on every worker, and nothing is cached: workers come and go. A worker that does not answer in time is named.
`cluster.connect` checks versions with it; the command line and the estimators plan with `resources`.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numba
from distributed import Client
from distributed.system import memory_limit
from distributed.versions import get_versions

from ntkdask.arrays import device_memory_bytes, gpu_status, host_cores
from ntkdask.errors import ClusterError
from ntkdask.planning.resources import Resources
from ntkdask.wording import format_bytes

_SAME_ON_WORKERS = ("python", "ntkdask", "numpy", "zarr", "dask", "distributed")
_SAME_ON_SCHEDULER = ("python", "dask", "distributed")
USABLE = 0.9
"""Share of a worker's memory limit that plans give to tasks; the nanny ends the process at 0.95."""

ANSWER_SECONDS = 120.0
"""How long a worker may take to answer a question. Its first answer imports this package."""


def ask(client: Client, question: Callable[[], Any], timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """What `question()` returns in every worker, by address; workers that leave meanwhile are left out.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    question : function without arguments
        Picklable.
    timeout : float
        Seconds to wait for the answers.

    Returns
    -------
    dict
        An answer for each address; an exception that the question raised is an answer, too.

    Raises
    ------
    ClusterError
        When a worker does not answer in time, naming it; when there are no workers.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"]

    async def answers() -> dict[str, Any]:
        # in the client's event loop, where `run` can be awaited
        asked: dict[str, Any] = {
            w: asyncio.ensure_future(client.run(question, workers=[w], on_error="return")) for w in workers
        }
        if asked:
            await asyncio.wait(asked.values(), timeout=timeout)
        found = {w: future.result()[w] if future.done() else None for w, future in asked.items()}
        silent = [w for w, future in asked.items() if not future.done()]
        for worker in silent:
            asked[worker].cancel()
        if silent:
            raise _silent(silent, len(asked), timeout)
        return found

    found: dict[str, Any] = client.sync(answers)
    # an error of the connection is that of a worker which has left
    found = {worker: answer for worker, answer in found.items() if not isinstance(answer, OSError)}
    if not found:
        raise no_workers(client)
    return found


def no_workers(client: Client) -> ClusterError:
    """The error for a cluster whose last worker has left."""
    where = client.scheduler_info(n_workers=0)["address"]
    return ClusterError(
        f"the scheduler at {where} has no workers any more: the last one left or died. Look at its log (out of memory?), "
        f"start some, `dask worker {where}`, and run again: everything committed is kept."
    )


def _silent(workers: list[str], of: int, timeout: float) -> ClusterError:
    named = ", ".join(sorted(workers)[:4]) + (f" and {len(workers) - 4} more" if len(workers) > 4 else "")
    return ClusterError(
        f"{len(workers)} of {of} workers did not answer within {timeout:g} s: {named}. They are stopped, unreachable, or run "
        "code that keeps Python's interpreter lock. Look at their logs, end or restart them, and try again."
    )


def worker_facts(client: Client) -> list[dict[str, Any]]:
    """The facts of each worker, sorted by address, from one call on every worker.

    Returns
    -------
    list of dict
        With the keys

        - address: of the worker
        - host: name of its machine
        - affinity: indices of the cores that it may use
        - cores: their number
        - slots: tasks that it runs at a time
        - numba_threads: the most that NUMBA_NUM_THREADS allows
        - memory_limit: bytes, 0 for none
        - versions: by package
        - gpu: None, or its name and bytes

    Raises
    ------
    ClusterError
        When a worker does not answer, or when there are none.
    """
    answers = ask(client, _facts_here)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    facts = [
        {
            "address": a,
            "slots": workers[a]["nthreads"],
            "memory_limit": workers[a]["memory_limit"] or 0,
            **_fact(answer),
        }
        for a, answer in answers.items()
        if a in workers
    ]
    if not facts:
        raise no_workers(client)
    return sorted(facts, key=lambda f: f["address"])


def _fact(answer: Any) -> dict[str, Any]:
    if isinstance(answer, BaseException):
        raise answer
    return dict(answer)


def threads_per_task(client: Client) -> int:
    """BLAS, OpenMP and Numba threads for one task: the cores of a host ÷ its task slots, the least of all hosts, at least 1.

    Workers that are still starting are not counted. A smaller NUMBA_NUM_THREADS is used instead: deploy/local/worker.sh sets it to the
    final share, so that the number does not depend on which workers have joined.
    """
    return _threads_per_task(worker_facts(client))


def describe(client: Client) -> str:
    """Three lines to print before a run: the dashboard's address, the scheduler's, the workers."""
    facts = worker_facts(client)
    hosts, slots = len({f["host"] for f in facts}), sum(f["slots"] for f in facts)
    memory = min((f["memory_limit"] for f in facts if f["memory_limit"]), default=0)
    gpus = sorted({f["gpu"]["name"] for f in facts if f["gpu"]})
    parts = [
        f"{len(facts)} on {hosts} host{'s' if hosts != 1 else ''}",
        f"{slots} task slot{'s' if slots != 1 else ''}",
        f"{_threads_per_task(facts)} BLAS threads per task",
        f"{format_bytes(memory)} each" if memory else "no memory limit",
        f"GPU {', '.join(gpus)}" if gpus else "CPU only",
    ]
    return (
        f"dashboard  {client.dashboard_link or 'not running'}\n"
        f"scheduler  {client.scheduler_info(n_workers=0)['address']}\n"
        f"workers    {', '.join(parts)}"
    )


def resources(client: Client) -> Resources:
    """The resources of every task: the least memory of a slot, the smallest GPU, the threads, and how many tasks run at once."""
    facts = worker_facts(client)
    limits = [int(USABLE * f["memory_limit"] / f["slots"]) for f in facts if f["memory_limit"]]
    devices = [f["gpu"]["bytes"] if f["gpu"] else 0 for f in facts]
    hosts = defaultdict(set)
    for fact in facts:
        hosts[fact["host"]].update(fact["affinity"])
    return Resources(
        min(limits, default=None),
        min(devices, default=0),
        _threads_per_task(facts),
        min((len(cores) for cores in hosts.values()), default=1),
        sum(f["slots"] for f in facts),
    )


def local_resources(n_workers: int | None, worker_memory: int | None) -> Resources:
    """The resources of `cluster.connect(n_workers=..., worker_memory=...)` on this machine, without starting the cluster."""
    cores = host_cores()
    workers = n_workers or (cores if cores <= 4 else cores // 4)
    memory = worker_memory or memory_limit() // workers
    return Resources(int(USABLE * memory), device_memory_bytes(), max(1, cores // workers), cores, workers)


def check_versions(client: Client, timeout: float = ANSWER_SECONDS) -> None:
    """ClusterError when the scheduler or a worker has other versions than this process, with a line for each; see `ask`."""
    # Dask's own function: a worker without this package can answer, too
    question = partial(get_versions, packages=_SAME_ON_WORKERS[1:])
    here, found = _versions_here(), ask(client, question, timeout)
    lines = version_mismatches(here, {a: _packages(_fact(v)) for a, v in found.items()}, _SAME_ON_WORKERS)
    scheduler: Any = client.run_on_scheduler(question)
    lines += version_mismatches(here, {"the scheduler": _packages(scheduler)}, _SAME_ON_SCHEDULER)
    if lines:
        raise ClusterError(
            "the cluster has other versions than this process, so its results could differ:\n  "
            + "\n  ".join(lines)
            + "\nInstall the same versions everywhere, restart the workers, connect again."
        )


def version_mismatches(
    here: Mapping[str, str | None], there: Mapping[str, Mapping[str, str | None]], packages: tuple[str, ...]
) -> list[str]:
    """One line for each package and differing version: the version here, the version there, and where that is.

    >>> version_mismatches({"numpy": "2.4.6"}, {"tcp://a:1": {"numpy": "2.3.0"}}, ("numpy",))
    ['numpy is 2.4.6 here, 2.3.0 on tcp://a:1']
    """
    lines = []
    for package in packages:
        others = defaultdict(list)
        for name, versions in there.items():
            if versions.get(package) != here[package]:
                others[versions.get(package)].append(name)
        for version, names in others.items():
            who = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"{package} is {here[package]} here, {version or 'not installed'} on {who}")
    return lines


def _facts_here() -> dict[str, Any]:
    """The facts of the process it runs in, a worker's."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(host_cores()))
    usable, text = gpu_status()
    return {
        "host": platform.node(),
        # a container's quota does not shorten the affinity mask: count no more cores than the quota allows
        "affinity": affinity[: host_cores()],
        "cores": len(affinity[: host_cores()]),
        "numba_threads": int(numba.config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
        "versions": _versions_here(),
        "gpu": {"name": text.partition(",")[0], "bytes": device_memory_bytes()} if usable else None,
    }


def _threads_per_task(facts: list[dict[str, Any]]) -> int:
    """As `threads_per_task`. dask-cuda gives the workers of one host different cores: the host has their union."""
    hosts = defaultdict(list)
    for fact in facts:
        hosts[fact["host"]].append(fact)
    shares = [len({c for f in on for c in f["affinity"]}) // sum(f["slots"] for f in on) for on in hosts.values()]
    shares += [min(f["cores"] // f["slots"], f["numba_threads"]) for f in facts]
    return max(1, min(shares, default=1))


def _packages(found: Mapping[str, Any]) -> dict[str, str | None]:
    """Versions by package from Dask's report; Python's without the patch level."""
    packages = dict(found["packages"])
    return {**packages, "python": ".".join(packages["python"].split(".")[:2])}


def _versions_here() -> dict[str, str | None]:
    """Versions in this process of the packages that results depend on; None where one is not installed."""
    packages = _packages(get_versions(packages=_SAME_ON_WORKERS[1:]))
    return {name: packages.get(name) for name in _SAME_ON_WORKERS}
