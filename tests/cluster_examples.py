"""A cluster on paper: it answers what plans ask of a client and runs nothing, so that large ones can be planned for."""

import asyncio

from ntkdask.arrays import device_memory_bytes, host_cores


class PaperCluster:
    """`hosts` workers of one task slot, each alone on a host with `cores` cores, `memory_limit` and a GPU of `gpu_bytes`."""

    def __init__(self, hosts=4, cores=16, memory_limit=64 * 2**30, gpu_bytes=0):
        self.hosts, self.cores, self.memory_limit, self.gpu_bytes = hosts, cores, memory_limit, gpu_bytes
        self.asked = 0
        """How often all workers were asked what they are."""

    @property
    def addresses(self):
        return [f"tcp://host-{i}:1" for i in range(self.hosts)]

    def nthreads(self):
        return dict.fromkeys(self.addresses, 1)

    def scheduler_info(self, n_workers=-1):
        return {
            "address": "tcp://paper:1",
            "workers": {a: {"nthreads": 1, "memory_limit": self.memory_limit} for a in self.addresses},
        }

    def sync(self, function):
        self.asked += 1
        return asyncio.run(function())

    async def run(self, function, workers, on_error):
        simple = {host_cores: self.cores, device_memory_bytes: self.gpu_bytes}
        if function in simple:
            return dict.fromkeys(workers, simple[function])
        assert function.__name__ == "_facts_here", function
        return {address: self._facts(address) for address in workers}

    def _facts(self, address):
        return {
            "host": address,
            "affinity": list(range(self.cores)),
            "cores": self.cores,
            "numba_threads": self.cores,
            "versions": {},
            "gpu": {"name": "paper", "bytes": self.gpu_bytes} if self.gpu_bytes else None,
        }
