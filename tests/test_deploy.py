"""What the scripts of deploy/local call dask with; tests/execution/test_cluster.py runs them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy" / "local"


def arguments_of(script, tmp_path, **environment):
    """What a script calls `dask` with, as {option: value}."""
    dask_ = tmp_path / "dask"
    dask_.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    dask_.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "NTKDASK_CORES": "2", "CUDA_VISIBLE_DEVICES": "0", **environment}
    lines = subprocess.check_output([DEPLOY / script], env=environment, text=True).splitlines()
    return dict(itertools.pairwise(lines))


@pytest.mark.parametrize(
    ("host", "dashboard"), [("tls://10.0.0.1", "127.0.0.1"), ("tcp://10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1")]
)
def test_the_dashboard_of_a_deployed_scheduler(tmp_path, host, dashboard):
    found = arguments_of("scheduler.sh", tmp_path, NTKDASK_HOST=host)
    assert (found["--host"], found["--dashboard-address"]) == (host, f"{dashboard}:8787")


@pytest.mark.parametrize("script", ["worker.sh", "cuda-worker.sh"])
def test_deployed_workers_leave_when_they_find_no_scheduler(tmp_path, script):
    found = arguments_of(script, tmp_path, NTKDASK_HOST="tls://10.0.0.2")
    assert float(found["--death-timeout"]) > 0
    assert (found["--host"], found["--dashboard-address"]) == ("10.0.0.2", "10.0.0.2:0")
