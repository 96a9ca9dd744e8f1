"""Questions to the workers of a cluster that are not answered; the others are in test_cluster."""

import pytest
from cluster_examples import PaperCluster

from ntkdask.errors import ClusterError
from ntkdask.execution import workers


def test_a_cluster_that_lost_its_last_worker_is_named():
    for question in (workers.resources, workers.threads_per_task, workers.describe, workers.worker_facts):
        with pytest.raises(ClusterError, match="the scheduler at tcp://paper:1 has no workers any more"):
            question(PaperCluster(hosts=0))


class Leaving(PaperCluster):
    """Its workers leave while they are asked."""

    async def run(self, function, workers, on_error):
        self.hosts = 0
        return dict.fromkeys(workers, OSError("connection closed"))


def test_workers_that_leave_while_they_are_asked_are_no_answer():
    with pytest.raises(ClusterError, match="no workers any more"):
        workers.resources(Leaving())
