"""States: whole or not there, addressed by their content, named when they are damaged."""

from pathlib import Path

import numpy as np
import pytest
from job_examples import flip_bit
from store_examples import arrays

from ntkdask import cache, files, states
from ntkdask.errors import DamagedTileError, StoreError


@pytest.fixture(autouse=True)
def fresh_cache():
    cache.shared.clear()
    yield
    cache.shared.clear()


def test_states_round_trip(tmp_path):
    attributes = {"alpha": 1 / 3, "steps": [{"type": "Center"}], "none": None}
    url = states.save_state(tmp_path / "state", arrays(), attributes)
    found, kept = states.load_state(url)
    assert kept == attributes
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert not states.is_damaged(Path(url))
    assert states.list_states(tmp_path) == [Path(url)]


def test_a_state_takes_the_bytes_of_its_arrays(tmp_path, monkeypatch):
    """Zarr writes chunks whole: one larger than its array would be mostly padding."""
    url = Path(states.save_state(tmp_path, arrays()))
    nbytes = sum(a.nbytes for a in arrays().values())
    stored = [p for p in url.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in stored if p.name != "zarr.json") < nbytes + 8 * len(stored)
    monkeypatch.setattr(states, "_CHUNK_BYTES", 256)  # an array of several chunks, the last one ragged
    url = Path(states.save_state(tmp_path / "cut", arrays()))
    chunks = list((url / "weights" / "c").rglob("0"))
    assert len([p for p in (url / "weights" / "c").rglob("*") if p.is_file()]) == 4
    assert all(p.stat().st_size <= 256 + 8 for p in chunks if p.is_file())
    assert np.array_equal(states.load_state(str(url))[0]["weights"], arrays()["weights"])


def test_equal_content_has_an_equal_address_and_is_written_once(tmp_path):
    url = states.save_state(tmp_path, arrays(), {"a": 1, "b": 2})
    before = {p: p.stat().st_mtime_ns for p in Path(url).rglob("*")}
    assert states.save_state(tmp_path, dict(reversed(arrays().items())), {"b": 2, "a": 1}) == url
    assert {p: p.stat().st_mtime_ns for p in Path(url).rglob("*")} == before


def test_other_content_has_another_address(tmp_path):
    nudged = arrays()
    nudged["weights"][0, 0] = np.nextafter(nudged["weights"][0, 0], np.inf)
    others = [
        nudged,
        arrays() | {"scalar": np.array(2.5, np.float32)},
        arrays() | {"weights": arrays()["weights"].reshape(4, 30)},
        {("other" if name == "weights" else name): a for name, a in arrays().items()},
        {name: a for name, a in arrays().items() if name != "empty"},
    ]
    urls = [states.save_state(tmp_path, a) for a in [arrays(), *others]]
    assert len({*urls, states.save_state(tmp_path, arrays(), {"a": 1})}) == 7


def test_a_damaged_state_is_found_and_named(tmp_path):
    url = Path(states.save_state(tmp_path, arrays()))
    flip_bit(url / "weights" / "c" / "0" / "0")
    assert states.is_damaged(url)
    with pytest.raises(DamagedTileError, match=url.name):
        states.load_state(str(url))


@pytest.mark.parametrize("lost", ["weights/c/0/0", "scalar/c", "weights/zarr.json", "weights", "zarr.json"])
def test_a_state_that_lost_a_file_is_damaged(tmp_path, lost):
    """Zarr reads a chunk that is not there as zeros: a model of zeros would predict without a word."""
    url = Path(states.save_state(tmp_path, arrays()))
    files.remove(url / lost)
    assert states.is_damaged(url)
    if lost != "weights":  # whoever loads it asks for the array by name
        with pytest.raises((DamagedTileError, StoreError)):
            states.load_state(str(url))


def test_a_state_that_lost_a_file_can_be_saved_again(tmp_path):
    url = Path(states.save_state(tmp_path, arrays()))
    files.remove(url)
    assert states.save_state(tmp_path, arrays()) == str(url)
    assert not states.is_damaged(url)


def test_two_writers_of_one_state(tmp_path, monkeypatch):
    """The second begins and ends while the first one writes: both get the one state, whole, and nothing is left beside it."""
    written, create = [], states.create_array

    def meanwhile(*arguments, **keywords):
        if not written:
            written.append(None)
            written.append(states.save_state(tmp_path, arrays()))
        return create(*arguments, **keywords)

    monkeypatch.setattr(states, "create_array", meanwhile)
    url = states.save_state(tmp_path, arrays())
    assert written[1] == url
    assert not states.is_damaged(Path(url))
    assert list(tmp_path.iterdir()) == [Path(url)]
