"""Calls that run once in every worker process of a cluster: in those that run now, and in those that start later or again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distributed import WorkerPlugin


@dataclass(eq=False)
class _Setup(WorkerPlugin):
    """Runs `call()` when a worker starts, and now in those that run."""

    call: Callable[[], None]
    name: str

    def setup(self, worker: Any) -> None:
        """See `distributed.WorkerPlugin`."""
        self.call()


def set_up_workers(client: Any, call: Callable[[], None], name: str) -> None:
    """Run a call once in every worker process of the cluster, now or when it joins.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    call : function without arguments
        Picklable. It is sent once to the scheduler and from there to each worker, so that tasks need not carry what it sets up.
    name : str
        Equal names are the same call.
    """
    client.register_plugin(_Setup(call, name), name=name)
