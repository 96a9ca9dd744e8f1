"""What every worker of a cluster is told before it computes: those that are there, and those that come later or again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distributed import WorkerPlugin


@dataclass(eq=False)
class _Setup(WorkerPlugin):
    """Calls `call()` when a worker starts, or now on those that run."""

    call: Callable[[], None]
    name: str

    def setup(self, worker: Any) -> None:
        """See `distributed.WorkerPlugin`."""
        self.call()


def set_up_workers(client: Any, call: Callable[[], None], name: str) -> None:
    """Run `call()` once in every worker process of the cluster, now or when it joins; equal names are the same call.

    call: picklable; it travels once to the scheduler and from there to each worker, and tasks need not carry what it brings.
    """
    client.register_plugin(_Setup(call, name), name=name)
