"""Clusters that the tests of a process share: started when first asked for, asleep while no test uses them.

Starting one takes several processor seconds, and thirty files of tests want one. An idle cluster is not quite still: scheduler and
workers exchange heartbeats, and what its threads allocate would count where a test measures memory. So its event loop waits between
the tests that use it, and its client is then not the one that Dask computes lazy arrays with.
"""

import contextlib
import functools
import threading
from unittest import mock

import dask

from ntkdask.execution import cluster


class Shared:
    """A cluster of `n_workers`, and its client."""

    def __init__(self, n_workers):
        self.n_workers = n_workers
        self.client = None
        self.wake = threading.Event()

    @contextlib.contextmanager
    def awake(self):
        """Its client, for the body; a new one where a test before has killed or closed what it was given."""
        self.wake.set()
        if self.client is not None and not self._is_whole():
            self.close()
        if self.client is None:
            self._start()
        try:
            with self.client.as_current(), dask.config.set(scheduler="dask.distributed"):
                yield self.client
        finally:
            if self.client.status == "running":
                self._sleep()

    def close(self):
        self.wake.set()
        if self.client is not None:
            self.client.close()
            self.client = None

    def _start(self):
        # a scheduler that slept takes no worker for dead
        # Dask's default client for nobody: tests that ask for no cluster compute lazy arrays in their own process
        hidden = functools.partial(cluster._LocalClient, set_as_default=False)
        with (
            dask.config.set({"distributed.scheduler.worker-ttl": None}),
            mock.patch.object(cluster, "_LocalClient", hidden),
        ):
            self.client = cluster.connect(n_workers=self.n_workers, cuda=False, worker_memory="2 GiB", dashboard_port=0)

    def _is_whole(self):
        return self.client.status == "running" and len(self.client.cluster.scheduler.workers) == self.n_workers

    def _sleep(self):
        """The event loop stands still until `wake`."""
        self.wake, stands = threading.Event(), threading.Event()
        wake = self.wake

        def wait():
            stands.set()
            wake.wait()

        self.client.loop.add_callback(wait)
        stands.wait()


ALL = {n: Shared(n) for n in (1, 2)}
