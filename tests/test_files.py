"""Files: one driver a folder, and what to do when the operating system says no."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_examples import arrays, create, fill, spawn

from ntkdask import files, states, store
from ntkdask.errors import DiskSpaceError, StoreError
from ntkdask.store import TileStore

# one driver at a time

HOLD = """
import sys, time
from ntkdask.files import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
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
        holder.wait(120)
    with files.exclusive(tmp_path):
        pass


def test_a_lock_beside_a_store_goes_with_the_block(tmp_path):
    """Also where the holder was killed: its file is taken over, and then goes."""
    url = tmp_path / "k"
    with files.exclusive(url, beside=True):
        assert {p.name for p in tmp_path.iterdir()} == {".k.lock"}
        with pytest.raises(StoreError, match="in use by another run"), files.exclusive(url, beside=True):
            pass
        # other stores in the folder, and the folder itself, are free
        with files.exclusive(tmp_path / "other", beside=True), files.exclusive(url):
            pass
    assert not (tmp_path / ".k.lock").exists()
    (tmp_path / ".k.lock").touch()
    with files.exclusive(url, beside=True):
        pass
    assert not (tmp_path / ".k.lock").exists()


def test_a_lock_that_went_while_it_was_waited_for_is_none(tmp_path, monkeypatch):
    """Who opens the file of a lock that its holder then deletes holds nothing, and asks again."""
    lock, flock = tmp_path / ".k.lock", files.fcntl.flock
    gone = []

    def late(file, how):
        if not gone:
            gone.append(lock.unlink())
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.exclusive(tmp_path / "k", beside=True):
        assert lock.exists()
        with pytest.raises(StoreError, match="in use by another run"), files.exclusive(tmp_path / "k", beside=True):
            pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(StoreError, match="grants no locks"), files.exclusive(tmp_path):
        pass


# the operating system says no


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (
        lambda: create(tmp_path / "file" / "k"),
        lambda: store.write_text(tmp_path / "file" / "record.json", "{}"),
        lambda: files.exclusive(tmp_path / "file" / "run").__enter__(),
        lambda: states.save_state(tmp_path / "file", arrays()),
    ):
        with pytest.raises(StoreError, match=r"a file stands in the way|no permission"):
            action()


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, StoreError, "no permission to write"),
        (errno.EROFS, StoreError, "no permission to write"),
        (errno.ENOSPC, DiskSpaceError, "everything committed so far is kept"),
        (errno.EDQUOT, DiskSpaceError, "no space left"),
    ],
)
def test_refusals_to_write_say_what_to_do(tmp_path, monkeypatch, number, kind, words):
    tiles = create(tmp_path / "k")
    fill(tiles, [(0, 0)])
    replace = os.replace

    def refuse(source, target, **keywords):
        if str(target).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(target))
        return replace(source, target, **keywords)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "replace", lambda source, target: refuse(source, target))
    with pytest.raises(kind, match=words) as refusal:
        tiles.commit((0, 1), np.ones((4, 3)))
    assert refusal.type is kind
    assert isinstance(refusal.value.__cause__, OSError)
    monkeypatch.undo()
    resumed = create(tmp_path / "k")
    assert (0, 0) not in resumed.pending()
    assert (0, 1) in resumed.pending()


def _fill_a_limited_disk(path: Path, answers) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    try:
        TileStore.open(path).commit((0, 0), np.ones((256, 256)))
    except DiskSpaceError as error:
        answers.put(str(error))


def test_a_file_that_may_not_grow(tmp_path):
    """A real write that the kernel cuts short: no chunk, no debris that counts, an error that says so."""
    create(tmp_path / "k", shape=(256, 256), tile_shape=(256, 256))
    answers = multiprocessing.get_context("fork").Queue()
    writer = spawn(_fill_a_limited_disk, tmp_path / "k", answers)
    assert "no space left" in answers.get(timeout=120)
    writer.join()
    assert TileStore.open(tmp_path / "k").pending() == [(0, 0)]


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


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """In every path that a user writes; a name that no user has stays a name."""
    from ntkdask import import_dataset, open_dataset, write_dataset
    from ntkdask.jobs.spec import load_job

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    stored = write_dataset("~/x", np.eye(4, 2), np.arange(4.0))
    assert Path(stored.url) == tmp_path / "x"
    assert open_dataset("~/x").digest == stored.digest
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,5\n")
    assert import_dataset("~/a.csv", "~/y")["all"].url == str(tmp_path / "y")
    (tmp_path / "job.toml").write_text(
        'name = "j"\n[data]\nurl = "~/x"\nsplit = { test = 0.5 }\n[solver]\nalphas = [1.0]\n'
    )
    assert load_job("~/job.toml").spec.name == "j"
    assert files.local_path("file://~/x") == tmp_path / "x"
    assert files.local_path("~nobody-of-this-name/x") == tmp_path / "~nobody-of-this-name" / "x"
    assert not (tmp_path / "~").exists()
