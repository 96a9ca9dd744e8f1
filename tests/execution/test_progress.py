"""The record of a run: entries with checksums, paths of its own folder, nothing written before the first stage."""

import json

import pytest

from ntkdask.errors import FingerprintError, StoreError
from ntkdask.execution.progress import Record


def filled(folder):
    record = Record.open(folder, {"seed": 0, "alphas": (0.1, 1.0)})
    record.put("split", f"{folder}/state/a")
    solved = {"model": f"{folder}/state/b", "path": [{"alpha": 0.1, "score": float("nan")}]}
    record.put("fold-0/solve", solved)
    return record


def edit(folder, change):
    table = json.loads((folder / "record.json").read_text())
    change(table)
    (folder / "record.json").write_text(json.dumps(table))


def test_nothing_is_written_before_the_first_stage(tmp_path):
    record = Record.open(tmp_path, {"seed": 0})
    with pytest.raises(ZeroDivisionError):
        record.once("plan", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())
    Record.open(tmp_path, {"seed": 1}).begin()
    with pytest.raises(FingerprintError, match="seed: stored 1, asked 0"):
        Record.open(tmp_path, {"seed": 0})


def test_paths_are_those_of_the_folder(tmp_path):
    record = filled(tmp_path / "a")
    assert str(tmp_path) not in (tmp_path / "a" / "record.json").read_text()
    assert json.dumps(Record.open(tmp_path / "a", record.fingerprint).stages) == json.dumps(record.stages)
    (tmp_path / "a").rename(tmp_path / "b")
    assert Record.open(tmp_path / "b", record.fingerprint).stages["split"] == f"{tmp_path}/b/state/a"


def test_paths_are_those_of_a_root_above(tmp_path):
    record = Record.open(tmp_path / "a" / "own", {}, tmp_path / "a")
    record.put("split", f"{tmp_path}/a/state/a")
    (tmp_path / "a").rename(tmp_path / "b")
    again = Record.open(tmp_path / "b" / "own", {}, tmp_path / "b")
    assert again.stages == {"split": f"{tmp_path}/b/state/a"}


def alpha(table):
    table["stages"]["fold-0/solve"]["path"][0]["alpha"] = 0.2


def score(table):
    table["stages"]["fold-0/solve"]["path"][0]["score"] = 0.0


def stage(table):
    table["stages"]["fold-0/solve"] = table["stages"]["split"]


def one_checksum(table):
    del table["checksums"]["stage fold-0/solve"]


@pytest.mark.parametrize("change", [alpha, score, stage, one_checksum])
def test_an_edited_stage_is_named(tmp_path, change):
    record = filled(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(StoreError, match=r"record\.json is damaged: stage fold-0/solve changed.*verify --repair"):
        Record.open(tmp_path, record.fingerprint)
    found, damaged = Record.examine(tmp_path / "record.json")
    assert damaged == ["stage fold-0/solve"]
    found.drop(["fold-0/solve"])
    assert list(Record.open(tmp_path, record.fingerprint).stages) == ["split"]


def test_an_edited_fingerprint_is_named(tmp_path):
    filled(tmp_path)
    edit(tmp_path, lambda table: table["fingerprint"].update(seed=1))
    for seed in (0, 1):
        with pytest.raises(StoreError, match="the fingerprint changed"):
            Record.open(tmp_path, {"seed": seed, "alphas": [0.1, 1.0]})


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"null", b"{}", b'{"fingerprint": 1, "stages": {}}', b"[" * 100_000, b'{"stages": {}']
)
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"record\.json is damaged.*verify --repair.*--overwrite"):
        Record.open(tmp_path, {})


def test_a_record_of_an_earlier_release_opens_and_gets_checksums(tmp_path):
    record = filled(tmp_path)
    edit(tmp_path, lambda table: table.pop("checksums"))
    again = Record.open(tmp_path, record.fingerprint)
    assert again.stages["split"] == record.stages["split"]
    again.put("more", 1)
    edit(tmp_path, alpha)
    with pytest.raises(StoreError, match="changed since it was written"):
        Record.open(tmp_path, record.fingerprint)


def test_files_of_weights_are_known_by_their_digest(tmp_path):
    """Their path is no part of a fingerprint, nor is that of a state."""
    module = {"type": "ResNet18", "weights": "/here/w.safetensors", "weights_digest": "ab"}
    Record.open(tmp_path, {"module": module, "model": "/here/run/state/0123456789abcdef"}).begin()
    moved = {"module": {**module, "weights": "/there/v.safetensors"}, "model": "/run/state/0123456789abcdef"}
    Record.open(tmp_path, moved)
    with pytest.raises(FingerprintError, match="weights_digest: stored 'ab', asked 'cd'"):
        Record.open(tmp_path, {**moved, "module": {**module, "weights_digest": "cd"}})
    with pytest.raises(FingerprintError, match="model: stored"):
        Record.open(tmp_path, {**moved, "model": "/here/run/state/fedcba9876543210"})
