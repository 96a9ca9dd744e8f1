"""Receipts: every line has a checksum; a changed one counts as none, half a last one is what a kill leaves."""

import json

import pytest
from store_examples import create, fill

from ntkdask.jobs.inspect import verify
from ntkdask.receipts import Receipt, end_torn_line, read_manifest
from ntkdask.store import RECEIPTS, TileStore


@pytest.mark.parametrize("receipt", [Receipt((0, 1), 2**32 - 1), Receipt((3,), 0, 1 / 3, 2**40, "tcp://ä:1", 2)])
def test_lines_round_trip(tmp_path, receipt):
    path = tmp_path / RECEIPTS
    path.write_text(receipt.to_line())
    found = read_manifest(path)
    assert found.receipts == {receipt.index: receipt}
    assert (found.damaged, found.unchecked) == ([], 0)


@pytest.mark.parametrize(
    ("key", "value"), [("index", [0, 1]), ("checksum", 7), ("seconds", 0.25), ("worker", "me"), ("check", 7)]
)
def test_an_edited_line_is_pending_again(tmp_path, key, value):
    tiles = create(tmp_path / "k")
    fill(tiles)
    manifest = tmp_path / "k" / RECEIPTS
    lines = manifest.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), key: value})
    manifest.write_text("\n".join(lines) + "\n")
    assert TileStore.open(tmp_path / "k").pending() == [(0, 0)]
    (found,) = verify(tmp_path, repair=True)
    assert str(found).endswith(f"{RECEIPTS}: line 1 changed since it was written")
    assert verify(tmp_path) == []
    resumed = create(tmp_path / "k")
    fill(resumed, resumed.pending())
    assert TileStore.open(tmp_path / "k").pending() == verify(tmp_path) == []


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"null\n", b"[" * 100_000 + b"\n", b'{"index": 5}\n', b'{"index"\n'])
def test_lines_that_are_none_are_named(tmp_path, line):
    tiles = create(tmp_path / "k")
    fill(tiles)
    manifest = tmp_path / "k" / RECEIPTS
    manifest.write_bytes(line + manifest.read_bytes())
    assert TileStore.open(tmp_path / "k").receipts == tiles.receipts
    assert [str(d).split(": ")[-1] for d in verify(tmp_path)] == ["line 1 changed since it was written"]


def test_half_a_last_line_is_no_damage(tmp_path):
    tiles = create(tmp_path / "k")
    fill(tiles)
    manifest = tmp_path / "k" / RECEIPTS
    whole = manifest.read_bytes()
    for lost in range(2, 60):
        manifest.write_bytes(whole[:-lost])
        assert verify(tmp_path) == []
        assert TileStore.open(tmp_path / "k").pending() == [(2, 2)]
        end_torn_line(manifest)
        assert whole.startswith(manifest.read_bytes())
        assert manifest.read_bytes().endswith(b"\n")
    manifest.write_bytes(whole[:-1])
    end_torn_line(manifest)
    assert manifest.read_bytes() == whole
