"""TLS files: what is no certificate, and certificates that do not fit the scheduler's."""

import asyncio
import shutil
import subprocess
import threading

import pytest
from distributed import Scheduler

from ntkdask.errors import ClusterError, UserError
from ntkdask.execution import cluster
from ntkdask.execution.certificates import security_of

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")


@pytest.fixture
def served():
    """served(security, protocol): the address of a scheduler without workers, in a thread of this process."""
    started = []

    def serve(security, protocol):
        loop, scheduler, ready = asyncio.new_event_loop(), [], threading.Event()

        async def live():
            arguments = {
                "host": "127.0.0.1",
                "port": 0,
                "protocol": protocol,
                "security": security,
                "dashboard_address": ":0",
            }
            async with Scheduler(**arguments) as found:
                scheduler.append(found)
                ready.set()
                await found.finished()

        thread = threading.Thread(target=lambda: loop.run_until_complete(live()), daemon=True)
        thread.start()
        assert ready.wait(60)
        started.append((loop, scheduler[0], thread))
        return scheduler[0].address

    yield serve
    for loop, scheduler, thread in started:
        asyncio.run_coroutine_threadsafe(scheduler.close(), loop)
        thread.join(60)
        loop.close()


def make_certificates(folder):
    """(authority, certificate, key) made by the commands of the deployment guide."""
    folder.mkdir(exist_ok=True)
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for command in (
        f"req -x509 {key} -days 2 -subj /CN=ntkdask-ca -keyout ca.key -out ca.pem",
        f"req {key} -subj /CN=ntkdask -keyout key.pem -out cert.csr",
        "x509 -req -in cert.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out cert.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem", folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Certificates of two authorities that do not know each other."""
    folder = tmp_path_factory.mktemp("certificates")
    return make_certificates(folder / "ours"), make_certificates(folder / "others")


@needs_openssl
def test_files_that_are_no_certificates_are_named_before_a_connection(two_sets):
    (ca, certificate, key), (*_, other_key) = two_sets
    request = certificate.with_name("cert.csr")
    for files, said in (
        ((ca, certificate, other_key), f"the key {other_key} does not belong to the certificate {certificate}"),
        ((request, certificate, key), f"{request} is no certificate of an authority"),
        ((ca, certificate, request), "are no certificate and key in PEM format"),
        ((ca, key, key), "are no certificate and key in PEM format"),
        ((ca, certificate), "security is .*Expected security=.ca, certificate, key"),
        ("ca.pem", "security is 'ca.pem'"),
    ):
        with pytest.raises(UserError, match=said):
            cluster.connect("tls://127.0.0.1:1", security=files, timeout=1)
    with pytest.raises(UserError, match=r"tcp://127\.0\.0\.1:1 is not encrypted, but certificates were given"):
        cluster.connect("tcp://127.0.0.1:1", security=two_sets[0], timeout=1)


@needs_openssl
def test_certificates_that_do_not_fit_the_scheduler_are_no_scheduler_that_is_missing(two_sets, served):
    (ca, certificate, key), (other_ca, other_certificate, other_key) = two_sets
    address = served(security_of(two_sets[0]), "tls://")
    for files, said in (
        ((other_ca, certificate, key), "answers, but the scheduler's certificate is not signed by the authority"),
        ((ca, other_certificate, other_key), "answers, but .* does not accept the certificate"),
    ):
        with pytest.raises(ClusterError, match=said):
            cluster.connect(address, security=files, timeout=5)
    with pytest.raises(ClusterError, match="answers, but it speaks no TLS"):
        cluster.connect(served(None, "tcp://").replace("tcp://", "tls://"), security=two_sets[0], timeout=5)
