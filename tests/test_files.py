"""Files of runs: old debris, locks of folders, what the operating system refuses, free space."""

import errno
import os
import subprocess
import sys
import time

import pytest

from ntkdask import files
from ntkdask.errors import StoreError


@pytest.mark.parametrize("url", ["s3://bucket/k", "gs://bucket/k", "http://host/k"])
def test_remote_schemes_are_refused(url):
    with pytest.raises(StoreError, match="Give a path"):
        files.local_path(url)


def test_file_scheme_is_a_path(tmp_path):
    assert files.local_path(f"file://{tmp_path}/k") == tmp_path / "k"


def test_sweep_takes_old_debris_alone(tmp_path):
    chunks = tmp_path / "k" / "c" / "0"
    chunks.mkdir(parents=True)
    chunk, old, new = chunks / "0", chunks / "1.0abc.partial", tmp_path / "k" / ".receipts.jsonl.1.tmp"
    for path in (chunk, old, new):
        path.write_bytes(b"half")
    os.utime(chunk, (time.time() - 7200,) * 2)
    os.utime(old, (time.time() - 7200,) * 2)
    assert files.sweep(tmp_path) == 1
    assert not old.exists()
    assert new.exists()
    assert chunk.exists()


# one driver at a time

HOLD = """
import sys, time
from ntkdask.files import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_driver(tmp_path):
    with files.exclusive(tmp_path), pytest.raises(StoreError, match="in use by another run"), files.exclusive(tmp_path):
        pass
    with files.exclusive(tmp_path / "new" / "run"):
        pass


def test_the_lock_goes_with_a_killed_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="in use by another run"), files.exclusive(tmp_path):
            pass
        holder.kill()
        holder.wait(20)
    with files.exclusive(tmp_path):
        pass


# the operating system says no


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way(tmp_path, name):
    (tmp_path / "file").write_text("")
    for action in (
        lambda: files.write_text(tmp_path / name / "record.json", "{}"),
        lambda: files.exclusive(tmp_path / name / "run").__enter__(),
    ):
        with pytest.raises(StoreError, match=r"a file stands in the way|no permission"):
            action()


def test_other_errors_of_the_system_pass(tmp_path):
    with pytest.raises(InterruptedError), files.writing(tmp_path):
        raise InterruptedError(errno.EINTR, "interrupted")


def test_free_bytes_of_what_is_not_there_yet(tmp_path):
    here = os.statvfs(tmp_path)
    assert files.free_bytes(tmp_path / "a" / "b") == pytest.approx(here.f_bavail * here.f_frsize, rel=0.05)


def test_remove(tmp_path):
    (tmp_path / "file").write_text("x")
    files.write_text(tmp_path / "k" / "c" / "zarr.json", "{}")
    (tmp_path / "link").symlink_to(tmp_path / "k")
    files.remove(tmp_path / "link")
    assert (tmp_path / "k" / "c" / "zarr.json").exists()
    for name in ("file", "k", "nothing"):
        files.remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
