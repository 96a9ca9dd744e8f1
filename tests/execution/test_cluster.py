"""Clusters: what connect starts, finds, refuses; that it listens on loopback alone and leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import cloudpickle
import dask
import psutil
import pytest

from ntkdask.arrays import host_cores
from ntkdask.errors import ClusterError, UserError
from ntkdask.execution import cluster, workers

# deployed workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DEPLOY = Path(__file__).parents[2] / "deploy" / "local"
CORES = host_cores()


@pytest.fixture(scope="module")
def client():
    with cluster.connect(n_workers=2, worker_memory="1 GiB", cuda=False) as client:
        yield client


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """The address and the scheduler file of a scheduler and two workers started by the scripts of deploy/local."""
    folder = tmp_path_factory.mktemp("deployed")
    port, dashboard_port = free_ports(2)
    environment = os.environ | {
        # the interpreter that runs the tests may not be the one that is first on the path
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NTKDASK_PORT": str(port),
        "NTKDASK_DASHBOARD_PORT": str(dashboard_port),
        "NTKDASK_SCHEDULER_FILE": str(folder / "scheduler.json"),
        "NTKDASK_WORKERS": "2",
        "NTKDASK_MEMORY": "1GiB",
    }
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen([DEPLOY / name], env=environment, cwd=folder, stdout=log, stderr=log)
            for name in ("scheduler.sh", "worker.sh")
        ]
        try:
            with cluster.connect(scheduler_file=folder / "scheduler.json", timeout=120) as client:
                client.wait_for_workers(2, timeout=120)
            yield f"127.0.0.1:{port}", folder / "scheduler.json", processes
        finally:
            scheduler, workers = processes
            scheduler.terminate()
            scheduler.wait(120)
            try:
                workers.wait(120)  # they leave by themselves, as the README says
            finally:
                workers.kill()
                workers.wait()


@pytest.fixture
def mute_server():
    """The address of a server that accepts connections and never says a word, as a stopped scheduler does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def listening(process):
    """Addresses that a process and its descendants listen on."""
    family = [process, *process.children(recursive=True)]
    return [c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def blas_threads():
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_info

    return {row["num_threads"] for row in threadpool_info() if row["user_api"] == "blas"}


def spilling():
    import dask

    return [dask.config.get(f"distributed.worker.memory.{name}") for name in ("target", "spill", "pause", "terminate")]


def deaf_to_interrupts():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# a local cluster


def test_everything_listens_on_loopback_alone(client):
    addresses = listening(psutil.Process())
    assert len(addresses) >= 6  # scheduler, dashboard, two workers, two nannies
    assert {a.ip for a in addresses} == {"127.0.0.1"}
    assert client.dashboard_link.startswith("http://127.0.0.1:")
    assert all(a.startswith("tcp://127.0.0.1:") for a in client.scheduler_info(n_workers=-1)["workers"])


def test_workers_are_what_was_asked_for(client):
    facts = workers.worker_facts(client)
    assert len(facts) == 2
    for fact in facts:
        assert fact["slots"] == 1
        assert fact["memory_limit"] == 2**30
        assert fact["cores"] == len(fact["affinity"])
        assert fact["versions"]["ntkdask"] == workers._versions_here()["ntkdask"]
        assert fact["gpu"] is None  # cuda=False hides them
    assert workers.threads_per_task(client) == max(1, facts[0]["cores"] // 2)


def test_workers_share_the_cores_and_do_not_spill(client):
    assert list(client.run(blas_threads).values()) == [{max(1, CORES // 2)}] * 2
    assert list(client.run(spilling).values()) == [[False, False, False, 0.95]] * 2


def test_interrupts_go_to_the_driver_alone(client):
    """A terminal sends Ctrl-C to every process; the driver ends its workers."""
    assert list(client.run(deaf_to_interrupts).values()) == [True] * 2
    assert not deaf_to_interrupts()


def test_an_interrupt_while_a_cluster_starts_ends_it(monkeypatch):
    """It is held back until there is something to close."""
    started = []
    # a test process that another one directs may ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupted(cluster.LocalCluster):
        def __init__(self, **options):
            signal.raise_signal(signal.SIGINT)
            super().__init__(**options)
            started.append(self)

    monkeypatch.setattr(cluster, "LocalCluster", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster.connect(n_workers=1, cuda=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [c.status.name for c in started] == ["closed"]


def test_a_worker_that_died_comes_back_as_it_was(client):
    victim, process = next(iter(client.run(os.getpid).items()))
    psutil.Process(process).kill()
    deadline = time.monotonic() + 120
    while victim in (workers := client.scheduler_info(n_workers=-1)["workers"]) or len(workers) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(client.run(spilling).values()) == [[False, False, False, 0.95]] * 2
    assert list(client.run(blas_threads).values()) == [{max(1, CORES // 2)}] * 2
    assert list(client.run(deaf_to_interrupts).values()) == [True] * 2


def test_workers_write_outside_the_current_folder(client):
    folders = client.run(lambda dask_worker: dask_worker.local_directory)
    assert not any(Path(f).is_relative_to(Path.cwd()) for f in folders.values())


def test_description_begins_with_the_dashboard(client):
    lines = workers.describe(client).splitlines()
    assert lines[0] == f"dashboard  {client.dashboard_link}"
    assert lines[1].startswith("scheduler  tcp://127.0.0.1:")
    assert "2 on 1 host, 2 task slots" in lines[2]
    assert "1 GiB each, CPU only" in lines[2]


def test_closing_the_client_ends_the_cluster_and_restores_the_environment(tmp_path, monkeypatch):
    before = {c.pid for c in psutil.Process().children(recursive=True)}
    watched = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "MALLOC_TRIM_THRESHOLD_", "DASK_LOGGING")
    environment = {name: os.environ.get(name) for name in watched}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        client = cluster.connect(n_workers=1, cuda=False, dashboard_port=port, local_directory=tmp_path)
        try:
            assert f":{port}/" not in client.dashboard_link
            assert {name: os.environ.get(name) for name in watched} == environment
            # one worker gets every core; Dask's own default would be one thread
            assert list(client.run(blas_threads).values()) == [{CORES}]
            scratch = next(iter(client.run(lambda dask_worker: dask_worker.local_directory).values()))
            assert Path(scratch).is_relative_to(tmp_path)
        finally:
            client.close()
    assert client.status == "closed"
    assert client.cluster.status.name == "closed"
    # the garbage collector closes once more, maybe while Dask holds the lock that a cluster's close takes
    monkeypatch.setattr(client.cluster, "close", lambda: pytest.fail("closed twice"))
    client.close()
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    # multiprocessing keeps one process for its semaphores until the interpreter ends
    assert [p for p in started if "resource_tracker" not in " ".join(p.cmdline())] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_workers": 0}, "n_workers is 0"),
        ({"threads_per_worker": -1}, "threads_per_worker is -1"),
        ({"worker_memory": "2 elephants"}, "worker_memory is '2 elephants'"),
        ({"worker_memory": 2}, "at least 1 MiB"),
        ({"security": ("ca.pem", "cert.pem", "no-key.pem")}, "no-key.pem"),
        ({"address": "tcp://127.0.0.1:1", "scheduler_file": "s.json"}, "Give one of them"),
        ({"address": "tcp://127.0.0.1"}, "missing port"),
        ({"address": "http://127.0.0.1:1"}, "Expected tcp://HOST:PORT"),
        ({"address": "tls://127.0.0.1:1"}, "no certificates"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        cluster.connect(**arguments, timeout=1)


def test_cuda_that_cannot_be_used_says_why(monkeypatch):
    monkeypatch.setattr(cluster, "gpu_status", lambda: (False, "no driver today"))
    with pytest.raises(ClusterError, match="no driver today"):
        cluster.connect(cuda=True)


def test_a_gpu_without_dask_cuda_is_refused_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(cluster, "gpu_status", lambda: (True, "H200"))
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ClusterError, match="H200, but dask-cuda cannot be imported"):
        cluster.connect(cuda=True)
    assert cluster._cluster_kind(3, None)[:2] == (cluster.LocalCluster, 3)


class CudaCluster:
    """What a cluster of dask-cuda says of its next worker: it fills `config` itself and takes none."""

    def new_worker_spec(self):
        return {0: {"options": {"config": {"distributed.comm.ucx": {}}, "env": {"CUDA_VISIBLE_DEVICES": "0"}}}}


def test_gpu_workers_that_start_again_do_not_spill_either():
    """Their nannies keep what the option says, and not the configuration around the start of the cluster."""
    options = cluster._without_spilling(CudaCluster)().new_worker_spec()[0]["options"]
    assert options["env"] == {"CUDA_VISIBLE_DEVICES": "0"}
    assert options["config"] == {"distributed.comm.ucx": {}, **cluster._NO_SPILLING}


def test_one_process_per_gpu(monkeypatch):
    package, utils = ModuleType("dask_cuda"), ModuleType("dask_cuda.utils")
    package.LocalCUDACluster, utils.get_n_gpus = CudaCluster, lambda: 4
    monkeypatch.setitem(sys.modules, "dask_cuda", package)
    monkeypatch.setitem(sys.modules, "dask_cuda.utils", utils)
    monkeypatch.setattr(cluster, "gpu_status", lambda: (True, "H200"))
    kind, *rest = cluster._cluster_kind(None, None)
    assert issubclass(kind, CudaCluster)
    assert rest == [4, {}]
    assert cluster._cluster_kind(2, True)[1:] == (2, {})
    assert cluster._cluster_kind(2, False)[0] is cluster.LocalCluster
    with pytest.raises(UserError, match="shows 4 GPUs"):
        cluster._cluster_kind(5, True)


# schedulers elsewhere


def test_attach_by_address_and_by_file(deployed):
    address, path, _ = deployed
    for where in ({"address": address}, {"address": f"tcp://{address}"}, {"scheduler_file": path}):
        with cluster.connect(**where) as client:
            assert client.submit(sum, [1, 2]).result(timeout=120) == 3
            assert client.scheduler_info(n_workers=0)["address"] == f"tcp://{address}"
    assert json.loads(path.read_text())["address"] == f"tcp://{address}"


def test_deployed_processes_listen_on_loopback_share_the_cores_and_do_not_spill(deployed):
    address, _, processes = deployed
    for process in processes:
        addresses = listening(psutil.Process(process.pid))
        assert addresses
        assert {a.ip for a in addresses} == {"127.0.0.1"}
    with cluster.connect(address) as client:
        facts = workers.worker_facts(client)
        assert [(f["slots"], f["memory_limit"], f["gpu"]) for f in facts] == [(1, 2**30, None)] * 2
        assert {f["numba_threads"] for f in facts} == {max(1, CORES // 2)}
        assert list(client.run(blas_threads).values()) == [{max(1, CORES // 2)}] * 2
        assert list(client.run(spilling).values()) == [[False, False, False, 0.95]] * 2


def test_an_attached_client_leaves_the_cluster_running(deployed):
    address, _, processes = deployed
    cluster.connect(address).close()
    assert [p.poll() for p in processes] == [None, None]
    cluster.connect(address).close()


def test_a_scheduler_that_does_not_answer_is_named_in_time(mute_server):
    """Were it left to Dask, the test would run into its own time limit."""
    (nobody,) = free_ports(1)
    for address in (f"127.0.0.1:{nobody}", mute_server):
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "1h"}),
            pytest.raises(
                ClusterError, match=f"no scheduler answers at tcp://{address} within 1 s.*firewall"
            ) as caught,
        ):
            cluster.connect(address, timeout=1)
        assert caught.value.exit_code == 1


def test_scheduler_files_that_are_missing_wrong_or_stale(tmp_path):
    path = tmp_path / "scheduler.json"
    for text, words in (
        (None, "appeared within 0.2 s"),
        ("[]", "is not a scheduler file"),
        ("{", "is not a scheduler file"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ClusterError, match=words):
            cluster.connect(scheduler_file=path, timeout=0.2)
    with pytest.raises(ClusterError, match="cannot be read"):
        cluster.connect(scheduler_file=tmp_path, timeout=0.2)
    path.write_text(json.dumps({"address": f"tcp://127.0.0.1:{free_ports(1)[0]}"}))
    with pytest.raises(ClusterError, match=r"from .*scheduler\.json"):
        cluster.connect(scheduler_file=path, timeout=0.2)


def test_a_scheduler_file_may_be_written_while_connect_waits(deployed, tmp_path):
    late = tmp_path / "scheduler.json"
    timer = threading.Timer(0.3, shutil.copy, (deployed[1], late))
    timer.start()
    cluster.connect(scheduler_file=late).close()
    timer.join()


def test_a_scheduler_without_workers_is_refused(client, monkeypatch):
    def nobody(n, timeout):
        raise TimeoutError

    monkeypatch.setattr(client, "wait_for_workers", nobody)
    with pytest.raises(ClusterError, match="no workers after 1 s"):
        cluster._require_workers(client, 1)


def test_a_worker_that_does_not_answer_is_named(client):
    address = client.scheduler_info(n_workers=0)["address"]
    silent, process = max(client.run(os.getpid).items())
    os.kill(process, signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match=r"of 2 workers did not answer within 3 s: .*interpreter lock") as caught:
            cluster.connect(address, timeout=1)
        assert silent in str(caught.value)
    finally:
        os.kill(process, signal.SIGCONT)
    cluster.connect(address).close()


# versions


def test_workers_of_another_version_are_refused(deployed, monkeypatch):
    here = workers._versions_here()
    monkeypatch.setattr(workers, "_versions_here", lambda: {**here, "numpy": "0.1", "dask": "0.2"})
    with pytest.raises(ClusterError, match=r"numpy is 0\.1 here") as caught:
        cluster.connect(deployed[0])
    lines = str(caught.value).splitlines()[1:-1]
    assert len(lines) == 3
    assert all("tcp://127.0.0.1:" in line for line in lines[:2])
    assert lines[2].endswith("on the scheduler")


def test_mismatches_are_grouped_by_what_was_found():
    here = {"ntkdask": "1.0", "numpy": "2.4"}
    there = {f"w{i}": {"ntkdask": "1.0", "numpy": "2.3"} for i in range(6)} | {"w6": {"numpy": "2.4"}}
    assert workers.version_mismatches(here, there, ("ntkdask", "numpy")) == [
        "ntkdask is 1.0 here, not installed on w6",
        "numpy is 2.4 here, 2.3 on w0, w1, w2, w3 and 2 more",
    ]
    assert workers.version_mismatches(here, {"w": here}, ("ntkdask", "numpy")) == []


# threads


def fact(host, affinity, slots=1, numba_threads=1000):
    return {
        "host": host,
        "affinity": list(affinity),
        "cores": len(affinity),
        "slots": slots,
        "numba_threads": numba_threads,
    }


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([], 1),
        ([fact("a", range(16))], 16),
        ([fact("a", range(16))] * 4, 4),
        ([fact("a", range(16), slots=4)], 4),
        ([fact("a", range(2))] * 3, 1),
        ([fact("a", range(16)), fact("b", range(16)), fact("b", range(16))], 8),
        # dask-cuda pins each worker to the cores near its GPU
        ([fact("a", range(8)), fact("a", range(8, 16))], 8),
        ([fact("a", range(4)), fact("a", range(4, 16))], 4),
        # the first of four workers that share 16 cores has arrived
        ([fact("a", range(16), numba_threads=4)], 4),
    ],
)
def test_threads_per_task_is_the_least_share(facts, expected):
    assert workers._threads_per_task(facts) == expected


def test_a_port_is_free_until_someone_listens():
    (port,) = free_ports(1)
    assert cluster.port_is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not cluster.port_is_free(port)


# encryption


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")
def test_tls_as_the_deployment_guide_says(tmp_path):
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ntkdask-ca -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=ntkdask -keyout key.pem -out cert.csr",
        "x509 -req -in cert.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out cert.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    files = (tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")
    with cluster.connect(n_workers=1, cuda=False, security=files) as owner:
        address = owner.scheduler_info(n_workers=0)["address"]
        assert address.startswith("tls://127.0.0.1:")
        with cluster.connect(address, security=files) as client:
            assert client.submit(sum, [1, 2]).result(timeout=120) == 3
        with pytest.raises(ClusterError, match="no scheduler answers"):
            cluster.connect(address.replace("tls", "tcp"), timeout=1)
