"""The doctor: what it finds on this machine, what it says when something is broken, that it leaves nothing behind."""

import os
import socket

import pytest

from ntkdask.cli import doctor
from ntkdask.errors import StoreError


@pytest.fixture
def findings(tmp_path):
    return {f.name: f for f in doctor.diagnose(tmp_path)}


def test_a_healthy_machine_has_no_broken_finding(findings, tmp_path):
    assert [f for f in findings.values() if f.ok is False] == []
    names = {
        "python",
        "ntkdask",
        "numpy",
        "zarr",
        "numba",
        "cores",
        "memory",
        "BLAS",
        "memory copy",
        "GPU",
        "store write",
    }
    assert names <= set(findings)
    assert "GFLOP/s" in findings["BLAS"].detail
    assert "GB/s" in findings["store write"].detail
    assert os.listdir(tmp_path) == []


def test_gpu_says_why_it_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_status", lambda: (False, "no driver today"))
    (finding,) = doctor._gpu()
    assert (finding.ok, finding.detail) == (None, "not used: no driver today")


def test_folders_that_take_no_store(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for folder in (tmp_path / "nowhere", file):
        assert {f.name: f.ok for f in doctor._storage(folder)} == {"free disk": True, "store write": False}

    def refuse(*_, **__):
        raise StoreError("no permission to write here")

    monkeypatch.setattr(doctor.TileStore, "create", refuse)
    assert "no permission" in next(f for f in doctor._storage(tmp_path) if f.name == "store write").detail
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_returns_other_bytes_is_broken(tmp_path, monkeypatch):
    read = doctor.TileStore.read
    monkeypatch.setattr(doctor.TileStore, "read", lambda store, index: read(store, index) + 1)
    (finding,) = (f for f in doctor._storage(tmp_path) if f.name == "store write")
    assert finding.ok is False
    assert "check the disk" in finding.advice


def test_a_full_disk_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 1000)
    assert [f.ok for f in doctor._storage(tmp_path)] == [False, False]
    assert os.listdir(tmp_path) == []


def test_old_and_missing_packages_come_with_the_command_that_mends_them(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda p: {"numpy": "1.26.4", "ntkdask": "0.1.0"}.get(p))
    found = {f.name: f for f in doctor._versions()}
    assert (found["numpy"].ok, found["zarr"].ok) == (False, False)
    assert found["numpy"].advice.startswith("pip install 'numpy>=")
    assert found["zarr"].detail == "not installed"
    assert "torch" not in found


def test_openblas_coretype_is_warned_about(monkeypatch):
    monkeypatch.setattr(doctor, "_matmul_rate", lambda *_, **__: 100.0)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    found = {f.name: f for f in doctor._blas()}
    assert found["OPENBLAS_CORETYPE"].detail == "Haswell"
    assert "unset" in found["OPENBLAS_CORETYPE"].advice
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    assert [f.name for f in doctor._blas()] == ["BLAS"]


def test_a_taken_dashboard_port_is_a_warning():
    with socket.create_server(("127.0.0.1", 0)) as server:
        (finding,) = doctor._dashboard(server.getsockname()[1])
    assert finding.ok is None
    assert finding.advice


def test_a_check_that_breaks_does_not_hide_the_others(tmp_path, monkeypatch):
    def broken():
        raise OSError("libcuda is a directory")

    monkeypatch.setattr(doctor, "gpu_status", broken)
    found = {f.name: f for f in doctor.diagnose(tmp_path)}
    assert (found["GPU"].ok, found["store write"].ok) == (False, True)
    assert "libcuda is a directory" in found["GPU"].detail


def test_what_torch_sees(monkeypatch):
    pytest.importorskip("torch")
    from ntkdask.modules import tensors as devices

    assert [f.name for f in doctor._torch()] == ["torch CUDA"]
    monkeypatch.setattr(devices, "cuda_words", lambda: "a build without CUDA: modules run on the CPU")
    monkeypatch.setattr(doctor, "gpu_status", lambda: (True, "a GPU"))
    (finding,) = doctor._torch()
    assert "Install a build of torch" in finding.advice
    monkeypatch.setattr(doctor, "_installed", lambda package: None)
    assert list(doctor._torch()) == []
