"""Descriptions in zarr.json that were changed are errors, never other numbers; whole ones are mended from what is beside them."""

import json
from pathlib import Path

import numpy as np
import pytest
from store_examples import create, fill, values

from ntkdask.datasets import open_dataset, open_parts, write_dataset
from ntkdask.errors import DamagedTileError, StoreError
from ntkdask.jobs.inspect import verify, without_checksum
from ntkdask.store import TileStore

NOT_JSON = [b"", b"\xff\xfe{}", b"[]", b"null", b"5", b'{"a"', b"[" * 100_000]


def edit(marker: Path, change) -> None:
    table = json.loads(marker.read_text())
    change(table)
    marker.write_text(json.dumps(table))


def endian(table) -> None:
    table["codecs"][0]["configuration"]["endian"] = "big"


def other_dtype(table) -> None:
    table["data_type"] = {"float64": "int64", "int64": "float64", "float32": "int32", "uint8": "int8"}[
        table["data_type"]
    ]


def fewer_rows(table) -> None:
    table["shape"][0] -= 1


def negative_rows(table) -> None:
    table["shape"][0] = -1


def other_chunks(table) -> None:
    table["chunk_grid"]["configuration"]["chunk_shape"][0] += 1


def no_chunks(table) -> None:
    table["chunk_grid"]["configuration"]["chunk_shape"][0] = 0


def no_crc(table) -> None:
    table["codecs"].pop()


def other_files(table) -> None:
    table["chunk_key_encoding"] = {"name": "v2"}


ARRAYS = pytest.mark.parametrize(
    "change", [endian, other_dtype, fewer_rows, negative_rows, other_chunks, no_chunks, no_crc, other_files]
)


# stores


@ARRAYS
def test_a_changed_description_of_a_store_is_named_and_mended(tmp_path, change):
    fill(create(tmp_path / "k"))
    edit(tmp_path / "k" / "zarr.json", change)
    with pytest.raises(StoreError, match=r"k/zarr\.json is damaged.*verify --repair"):
        TileStore.open(tmp_path / "k")
    (found,) = verify(tmp_path, repair=True)
    assert found.path == tmp_path / "k" / "zarr.json"
    assert verify(tmp_path) == []
    assert TileStore.open(tmp_path / "k").pending() == []
    np.testing.assert_array_equal(TileStore.open(tmp_path / "k").zarr_array()[...], values())


@pytest.mark.parametrize("key", ["seed", "shape", "tile_shape", "dtype", "triangle"])
def test_a_changed_fingerprint_is_named_and_its_store_dropped(tmp_path, key):
    fill(create(tmp_path / "k"))
    wrong = {"seed": 1, "shape": [10, 6], "tile_shape": [5, 3], "dtype": "float32", "triangle": "lower"}[key]
    edit(tmp_path / "k" / "zarr.json", lambda t: t["attributes"]["ntkdask"]["fingerprint"].update({key: wrong}))
    with pytest.raises(StoreError, match=r"fingerprint does not match its checksum"):
        TileStore.open(tmp_path / "k")
    assert len(verify(tmp_path, repair=True)) == 1
    assert create(tmp_path / "k").pending()


@pytest.mark.parametrize("text", NOT_JSON)
def test_what_is_no_description_is_named(tmp_path, text):
    fill(create(tmp_path / "k"))
    write_dataset(tmp_path / "d", np.ones((4, 2)), np.arange(4.0))
    for marker in ("k/zarr.json", "d/zarr.json", "d/x/zarr.json"):
        whole = (tmp_path / marker).read_bytes()
        (tmp_path / marker).write_bytes(text)
        look = TileStore.open if marker.startswith("k") else open_dataset
        with pytest.raises(StoreError, match=rf"{marker} is damaged"):
            look(tmp_path / marker[0])
        (found,) = verify(tmp_path)
        assert marker.split("/")[0] in str(found)
        (tmp_path / marker).write_bytes(whole)
    assert verify(tmp_path) == []


def test_a_store_of_an_earlier_release_opens(tmp_path):
    fill(create(tmp_path / "k"))
    edit(tmp_path / "k" / "zarr.json", lambda t: t["attributes"]["ntkdask"].pop("checksum"))
    lines = (tmp_path / "k" / "receipts.jsonl").read_text().splitlines()
    unchecked = [json.dumps({k: v for k, v in json.loads(line).items() if k != "check"}) for line in lines]
    (tmp_path / "k" / "receipts.jsonl").write_text("\n".join(unchecked) + "\n")
    assert create(tmp_path / "k").pending() == []
    assert verify(tmp_path) == []
    assert without_checksum(tmp_path) == [tmp_path / "k" / "zarr.json", tmp_path / "k" / "receipts.jsonl"]
    edit(tmp_path / "k" / "zarr.json", endian)
    with pytest.raises(StoreError, match="codecs: written"):
        TileStore.open(tmp_path / "k")


# datasets


def a_dataset(tmp_path: Path, dtype: str = "float32"):
    x = np.arange(60).reshape(20, 3).astype(dtype)
    return write_dataset(
        tmp_path / "d", x, np.arange(20) % 3, weights=np.ones(20), kind="classification", class_names=["a", "b", "c"]
    )


@ARRAYS
@pytest.mark.parametrize("name", ["x", "targets", "weights"])
def test_a_changed_array_of_a_dataset_is_named(tmp_path, change, name):
    dataset = a_dataset(tmp_path)
    edit(tmp_path / "d" / name / "zarr.json", change)
    with pytest.raises(StoreError, match=rf"d/{name}/zarr\.json is damaged"):
        open_dataset(tmp_path / "d")
    with pytest.raises(DamagedTileError, match=rf"of {name} in dataset .*/d are damaged"):
        dataset._read(name, 0, 5)  # one that was opened before
    (found,) = verify(tmp_path)
    assert f"{name}/zarr.json" in str(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n", 19),
        ("n", -1),
        ("n", "20"),
        ("row_shape", [1, 3]),
        ("dtype", "int32"),
        ("kind", "regression"),
        ("class_names", ["b", "a", "c"]),
        ("has_weights", False),
        ("target_shape", None),
        ("digest", "0" * 64),
        ("version", "1"),
        ("arrays", {}),
    ],
)
def test_a_changed_description_of_a_dataset_is_named(tmp_path, key, value):
    a_dataset(tmp_path)
    edit(tmp_path / "d" / "zarr.json", lambda t: t["attributes"]["ntkdask"].update({key: value}))
    with pytest.raises(StoreError, match=r"d/zarr\.json is damaged: the description does not match its checksum"):
        open_dataset(tmp_path / "d")
    assert len(verify(tmp_path)) == 1
    a = write_dataset(tmp_path / "d", np.ones((2, 3)), overwrite=True)  # as the error advises
    assert verify(tmp_path) == []
    assert open_parts(tmp_path / "d") == {"all": a}


def of_an_earlier_release(tmp_path: Path) -> None:
    def strip(table) -> None:
        for key in ("checksum", "arrays"):
            del table["attributes"]["ntkdask"][key]

    edit(tmp_path / "d" / "zarr.json", strip)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_a_dataset_of_an_earlier_release_opens(tmp_path, dtype):
    dataset = a_dataset(tmp_path, dtype)
    of_an_earlier_release(tmp_path)
    assert open_dataset(tmp_path / "d") == dataset
    assert verify(tmp_path) == []
    assert without_checksum(tmp_path) == [tmp_path / "d" / "zarr.json"]


@pytest.mark.parametrize("change", [endian, other_dtype, fewer_rows, negative_rows, no_chunks, no_crc, other_files])
def test_its_arrays_are_checked_against_its_shape_and_dtype(tmp_path, change):
    a_dataset(tmp_path)
    of_an_earlier_release(tmp_path)
    edit(tmp_path / "d" / "x" / "zarr.json", change)
    with pytest.raises(StoreError, match=r"d/x/zarr\.json is damaged"):
        open_dataset(tmp_path / "d")


@pytest.mark.parametrize(("key", "value"), [("class_names", ["b", "a", "c"]), ("digest", "0" * 64)])
def test_verify_recomputes_its_digest(tmp_path, key, value):
    """An order of class names that no checksum covers is found in the digest."""
    a_dataset(tmp_path)
    of_an_earlier_release(tmp_path)
    edit(tmp_path / "d" / "zarr.json", lambda t: t["attributes"]["ntkdask"].update({key: value}))
    (found,) = verify(tmp_path / "d")
    assert "another digest" in str(found)


def test_verify_reads_every_row(tmp_path):
    """A chunk that was exchanged for another whole one."""
    a_dataset(tmp_path)
    other = write_dataset(tmp_path / "other", np.ones((20, 3), np.float32))
    (tmp_path / "d" / "x" / "c" / "0" / "0").write_bytes((Path(other.url) / "x" / "c" / "0" / "0").read_bytes())
    (found,) = verify(tmp_path / "d")
    assert "another digest" in str(found)
