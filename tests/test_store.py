"""Tiles: whole or not there, refused when they are another's, named when they are damaged."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from job_examples import flip_bit
from store_examples import PARAMETERS, SHAPE, create, fill, spawn, values

from ntkdask import cache, files, states, store
from ntkdask.errors import DamagedTileError, FingerprintError, StoreError
from ntkdask.store import RECEIPTS, Receipt, TileStore


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)


# tiles


def test_commit_record_read(tmp_path):
    tiles = create(tmp_path / "k")
    assert tiles.grid == (3, 3)
    assert tiles.pending() == tiles.indices()
    full = fill(tiles)
    assert tiles.pending() == []
    for index in tiles.indices():
        assert np.array_equal(tiles.read(index), full[tiles.slices(index)])
    assert np.array_equal(tiles.zarr_array()[...], full)
    again = TileStore.open(tmp_path / "k")
    assert again.receipts == tiles.receipts
    assert again.pending() == []
    assert again.damaged() == []


def test_an_array_is_opened_once_however_many_tiles_are_read(tmp_path, monkeypatch):
    full = fill(create(tmp_path / "k"))
    opened = []
    original = store.open_array
    monkeypatch.setattr(store, "open_array", lambda *given: opened.append(given) or original(*given))
    tiles = TileStore.open(tmp_path / "k")
    for index in tiles.indices():
        assert np.array_equal(tiles.read(index), full[tiles.slices(index)])
    assert len(opened) == 1
    # what is committed later, by another process or store, is read as well
    create(tmp_path / "k").commit((1, 1), np.ones((4, 3)))
    assert np.array_equal(tiles.read((1, 1)), np.ones((4, 3)))


@pytest.mark.parametrize("triangle", ["symmetric", "lower"])
def test_a_triangle_reads_as_the_whole_matrix(tmp_path, triangle):
    tiles = create(tmp_path / "k", shape=(10, 10), tile_shape=(4, 4), triangle=triangle)
    assert tiles.pending() == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    full = np.random.default_rng(0).normal(size=(10, 10))
    full = full + full.T if triangle == "symmetric" else np.tril(full)
    for index in tiles.indices():
        tiles.record(tiles.commit(index, np.ascontiguousarray(full[tiles.slices(index)])))
    again = TileStore.open(tmp_path / "k")
    assert again.pending() == []
    assert again.triangle == triangle
    for index in np.ndindex(3, 3):
        assert np.array_equal(again.read(index), full[again.slices(index)])
    with pytest.raises(FingerprintError, match="triangle"):
        create(tmp_path / "k", shape=(10, 10), tile_shape=(4, 4))
    with pytest.raises(StoreError, match=r"square tiles, got \(10, 7\)"):
        create(tmp_path / "l", triangle=triangle)


def test_tiles_cover_every_entry_once(tmp_path):
    tiles = create(tmp_path / "k")
    count = np.zeros(SHAPE, int)
    for index in tiles.indices():
        count[tiles.slices(index)] += 1
    assert (count == 1).all()


@pytest.mark.parametrize(("shape", "tile_shape"), [((1, 1), (1, 1)), ((1, 5), (4, 9)), ((5, 0), (2, 4))])
def test_degenerate_shapes(tmp_path, shape, tile_shape):
    tiles = create(tmp_path / "k", shape=shape, tile_shape=tile_shape)
    for index in tiles.indices():
        tiles.record(tiles.commit(index, np.ones([s.stop - s.start for s in tiles.slices(index)])))
    assert TileStore.open(tmp_path / "k").pending() == []


def test_a_chunk_without_receipt_is_pending(tmp_path):
    tiles = create(tmp_path / "k")
    tiles.commit((1, 1), values()[tiles.slices((1, 1))])
    assert TileStore.open(tmp_path / "k").pending() == tiles.indices()


def test_a_receipt_without_chunk_is_pending_and_named(tmp_path):
    tiles = create(tmp_path / "k")
    fill(tiles)
    tiles.chunk_path((2, 0)).unlink()
    reopened = create(tmp_path / "k")
    assert reopened.pending() == [(2, 0)]
    assert reopened.damaged() == [(2, 0)]
    # Zarr itself would read zeros
    with pytest.raises(DamagedTileError, match=r"tile \(2, 0\) .* is not there"):
        reopened.read((2, 0))


@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_flipped_bit_is_found_and_named(tmp_path, position):
    tiles = create(tmp_path / "k")
    full = fill(tiles)
    flip_bit(tiles.chunk_path((0, 1)), position)
    assert tiles.damaged() == [(0, 1)]
    with pytest.raises(DamagedTileError, match=r"tile \(0, 1\) .* is damaged"):
        tiles.read((0, 1))
    tiles.forget(tiles.damaged())
    reopened = create(tmp_path / "k")
    assert reopened.pending() == [(0, 1)]
    fill(reopened, [(0, 1)])
    assert reopened.damaged() == []
    assert np.array_equal(reopened.zarr_array()[...], full)


def test_a_truncated_chunk_is_found(tmp_path):
    tiles = create(tmp_path / "k")
    fill(tiles)
    chunk = tiles.chunk_path((1, 0))
    chunk.write_bytes(chunk.read_bytes()[:40])
    assert tiles.damaged() == [(1, 0)]


def test_a_whole_chunk_of_another_tile_is_found(tmp_path):
    """Its own CRC fits, the receipt's does not."""
    tiles = create(tmp_path / "k")
    fill(tiles)
    tiles.chunk_path((0, 0)).write_bytes(tiles.chunk_path((1, 1)).read_bytes())
    assert tiles.damaged() == [(0, 0)]


def test_tiles_of_zeros_are_written(tmp_path):
    tiles = create(tmp_path / "k")
    index = (0, 0)
    tiles.record(tiles.commit(index, np.zeros((4, 3))))
    assert tiles.chunk_path(index).exists()
    assert index not in TileStore.open(tmp_path / "k").pending()
    # overwriting a tile by zeros must not delete it either
    tiles.record(tiles.commit(index, np.ones((4, 3))))
    tiles.record(tiles.commit(index, np.zeros((4, 3))))
    assert np.array_equal(tiles.read(index), np.zeros((4, 3)))
    assert tiles.damaged() == []


def test_discard_frees_the_chunk_and_is_remembered(tmp_path):
    tiles = create(tmp_path / "k")
    fill(tiles)
    tiles.discard((0, 0))
    tiles.discard((0, 0))
    for one in (tiles, TileStore.open(tmp_path / "k")):
        assert (0, 0) in one.pending()
        assert not one.chunk_path((0, 0)).exists()
    fill(tiles, [(0, 0)])
    assert TileStore.open(tmp_path / "k").pending() == []


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4)), r"got \(4, 4\) float64"),
        (np.zeros((4, 3), np.float32), r"float32, expected \(4, 3\) float64"),
    ],
)
def test_a_tile_of_another_shape_or_dtype_is_refused(tmp_path, array, words):
    tiles = create(tmp_path / "k")
    with pytest.raises(StoreError, match=words):
        tiles.commit((0, 0), array)
    assert not tiles.chunk_path((0, 0)).exists()


def test_checksum_is_of_the_bytes_in_c_order():
    array = np.arange(12.0).reshape(3, 4)
    assert store.checksum(array) == store.checksum(np.asfortranarray(array))
    assert store.checksum(array) != store.checksum(array.T)
    assert store.checksum(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # the CRC-32C check value
    large = np.random.default_rng(1).integers(0, 256, 3 * 2**20 + 17, dtype=np.uint8)  # several pieces
    changed = large.copy()
    changed[-1] ^= 1
    assert store.checksum(large) != store.checksum(changed)


# fingerprints


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fingerprint": {**PARAMETERS, "seed": 1}}, "seed: stored 0, asked 1"),
        (
            {"fingerprint": {**PARAMETERS, "map": {"type": "NTKSketch", "n_components": 8}}},
            "map.n_components: stored 7, asked 8",
        ),
        ({"fingerprint": {**PARAMETERS, "data": "ab"}}, "data: stored None, asked 'ab'"),
        ({"dtype": "float32"}, "dtype: stored 'float64', asked 'float32'"),
        ({"tile_shape": (5, 3)}, r"tile_shape: stored \[4, 3\], asked \[5, 3\]"),
        ({"shape": (11, 7)}, r"shape: stored \[10, 7\], asked \[11, 7\]"),
    ],
)
def test_another_fingerprint_is_refused_by_key(tmp_path, changes, line):
    fill(create(tmp_path / "k"))
    with pytest.raises(FingerprintError, match=line) as refusal:
        create(tmp_path / "k", **changes)
    assert len([row for row in str(refusal.value).splitlines() if "stored" in row]) == 1
    assert "--overwrite" in str(refusal.value)
    assert create(tmp_path / "k").pending() == []
    assert len(create(tmp_path / "k", overwrite=True, **changes).receipts) == 0


def test_equal_fingerprints_open_tuples_and_numpy_numbers(tmp_path):
    create(tmp_path / "k", fingerprint={"alphas": (0.1, 1e-300, 1 / 3), "n": 3})
    create(tmp_path / "k", fingerprint={"alphas": [0.1, 1e-300, 1 / 3], "n": 3})


@pytest.mark.parametrize("url", ["s3://bucket/k", "gs://bucket/k", "http://host/k"])
def test_remote_schemes_are_refused(url):
    with pytest.raises(StoreError, match="Give a path"):
        files.local_path(url)


def test_file_scheme_is_a_path(tmp_path):
    assert files.local_path(f"file://{tmp_path}/k") == tmp_path / "k"


def test_what_is_no_tile_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no Zarr array"):
        TileStore.open(tmp_path / "nothing")
    store.create_array(tmp_path / "plain", (3,), (3,), "float64")
    with pytest.raises(StoreError, match="no fingerprint"):
        TileStore.open(tmp_path / "plain")


# a driver that is killed


def test_a_torn_receipt_is_pending_and_the_next_ones_count(tmp_path):
    tiles = create(tmp_path / "k")
    fill(tiles)
    manifest = tmp_path / "k" / RECEIPTS
    whole = manifest.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for kept in range(len(last)):  # killed after any number of bytes
        manifest.write_bytes(whole[: len(whole) - len(last) + kept])
        resumed = create(tmp_path / "k")
        # a line that only lacks its end is a receipt
        assert resumed.pending() == ([] if kept == len(last) - 1 else [(2, 2)])
        fill(resumed, [(2, 2)])
        assert TileStore.open(tmp_path / "k").pending() == []


def test_readers_never_write_the_manifest(tmp_path):
    """A worker or `ntkdask status` may look while the driver is in the middle of a line."""
    tiles = create(tmp_path / "k")
    fill(tiles)
    manifest = tmp_path / "k" / RECEIPTS
    with open(manifest, "ab") as driver:
        driver.write(b'{"index": [0, 0], "chec')
        driver.flush()
        before = manifest.stat()
        assert len(TileStore.open(tmp_path / "k").receipts) == 9
        after = manifest.stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        driver.write(b'ksum": 7}\n')
    assert TileStore.open(tmp_path / "k").receipts[(0, 0)].checksum == 7


def test_garbage_lines_are_skipped(tmp_path):
    tiles = create(tmp_path / "k")
    fill(tiles)
    with open(tmp_path / "k" / RECEIPTS, "a") as manifest:
        manifest.write('\n{"index": [0, 0]}\nnull\n[1]\n{"later_format": true}\n')
    assert TileStore.open(tmp_path / "k").receipts == tiles.receipts


# several writers, and kills


def _commit_many(path: Path, value: float, times: int) -> None:
    tiles = TileStore.open(path)
    for _ in range(times):
        tiles.commit((0, 0), np.full(tiles.tile_shape, value))


def test_concurrent_commits_of_one_tile_leave_a_whole_one(tmp_path):
    create(tmp_path / "k", shape=(256, 256), tile_shape=(256, 256))
    writers = [spawn(_commit_many, tmp_path / "k", float(i), 15) for i in range(1, 4)]
    seen = set()
    while any(w.is_alive() for w in writers):
        with contextlib.suppress(DamagedTileError):  # before the first commit
            seen |= set(np.unique(TileStore.open(tmp_path / "k").read((0, 0))))
    assert [w.exitcode for w in writers] == [0, 0, 0]
    final = np.unique(TileStore.open(tmp_path / "k").read((0, 0)))
    assert final.size == 1
    assert seen | set(final) <= {1.0, 2.0, 3.0}
    assert not list((tmp_path / "k").rglob("*.partial"))


def test_a_kill_during_commits_leaves_no_torn_chunk(tmp_path):
    tiles = create(tmp_path / "k", shape=(512, 512), tile_shape=(512, 512))
    chunk = tiles.chunk_path((0, 0))
    rng = np.random.default_rng(0)
    for attempt in range(8):
        before = chunk.stat().st_mtime_ns if chunk.exists() else 0
        writer = spawn(_commit_many, tmp_path / "k", float(attempt), 10**6)
        wait_until(lambda before=before: chunk.exists() and chunk.stat().st_mtime_ns != before)
        time.sleep(rng.uniform(0, 0.005))  # where in a write the kill falls, not whether
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert np.unique(tiles.read((0, 0))).tolist() == [float(attempt)]


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


def test_sweep_takes_half_written_states_once_nobody_writes_them(tmp_path):
    for name, hours in (("a", 2), ("b", 0)):
        state = tmp_path / "state" / f"{name}.partial"
        (state / "x").mkdir(parents=True)
        (state / "x" / "c").write_bytes(b"half")
        for path in (state, state / "x", *([state / "x" / "c"] if hours else [])):
            os.utime(path, (time.time() - 7200,) * 2)
    assert files.sweep(tmp_path) == 1
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["b.partial"]


@pytest.fixture(autouse=True)
def fresh_cache():
    cache.shared.clear()
    yield
    cache.shared.clear()


def test_every_tile_store_of_a_folder(tmp_path):
    paths = [create(tmp_path / "fold-0" / name).path for name in ("gram-0", "predictions")]
    states.save_state(tmp_path / "state", {"weights": values()})
    store.create_array(tmp_path / "plain", (3,), (3,), "float64")
    assert [s.path for s in store.tile_stores(tmp_path)] == paths


def test_content_digest():
    x = np.arange(6.0).reshape(2, 3)
    assert states.content_digest(x) == states.content_digest(np.asfortranarray(x), None)
    others = [x.astype(np.float32), x.reshape(3, 2), x + 1, x.T]
    assert len({states.content_digest(o) for o in [x, *others]}) == 5


def test_receipts_are_json(tmp_path):
    tiles = create(tmp_path / "k")
    tiles.record(Receipt((0, 1), 7, 0.5, 2**40, "tcp://a:1"))
    line = json.loads((tmp_path / "k" / RECEIPTS).read_text())
    line.pop("check")
    assert line == {"index": [0, 1], "checksum": 7, "seconds": 0.5, "peak_bytes": 2**40, "worker": "tcp://a:1"}
