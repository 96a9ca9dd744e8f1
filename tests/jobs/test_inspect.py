"""verify finds what is damaged, repair and a second run give the same results; status counts."""

import itertools
import json
from pathlib import Path

import pytest
from job_examples import ONE_THREAD, Counter, Killed, class_data, flip_bit, ridge_job, stored
from kernel_job_examples import job_of as kernel_job

from ntkdask import cache
from ntkdask.errors import DamagedTileError, FingerprintError, NtkdaskError, StoreError, UserError
from ntkdask.files import remove
from ntkdask.jobs.inspect import open_record, status, verify, without_checksum
from ntkdask.jobs.run import run_job
from ntkdask.planning.tiles import Plan
from ntkdask.states import list_states
from ntkdask.store import TileStore
from ntkdask.workflows.ridge.fit import RidgeOptions


def run(tmp_path, name="rün", listener=None):
    url = tmp_path / "data.zarr"
    data = run.data[str(tmp_path)] if str(tmp_path) in run.data else stored(tmp_path, *class_data())
    assert Path(data.url) == url
    run.data = {str(tmp_path): data}
    job = ridge_job(data, options=RidgeOptions((0.1, 10.0)), plan=Plan(tile_rows=40, dtype="float32"))
    cache.shared.clear()  # as a new process
    return run_job(job, tmp_path / name, resources=ONE_THREAD, listener=listener)


run.data = {}


def results(metrics) -> tuple:
    fold = metrics["folds"][0]
    return metrics["test"], fold["test"], Path(fold["model"]).name, fold["alpha_path"]


def test_a_whole_run_is_whole(tmp_path):
    run(tmp_path)
    assert verify(tmp_path / "rün") == []


@pytest.mark.parametrize("action", [flip_bit, remove])
@pytest.mark.parametrize("what", ["predictions", "gram-0", "model", "split"])
def test_damage_is_found_repaired_and_computed_again(tmp_path, what, action):
    whole = results(run(tmp_path))
    folder = tmp_path / "rün"
    stages = open_record(folder)["stages"]
    chunk = {
        "predictions": folder / "fold-0" / "predictions" / "c" / "1" / "0",
        "gram-0": TileStore.open(folder / "fold-0" / "gram-0").chunk_path((6, 0)),
        "model": Path(stages["fold-0/solve"]["model"]) / "weights" / "c" / "0" / "0",
        "split": Path(stages["split"]) / "part" / "c" / "0",
    }[what]
    assert chunk.exists()
    action(chunk)
    (found,) = verify(folder)
    assert found.path in chunk.parents
    assert (found.index is None) == (what in ("model", "split"))
    assert str(found.path) in str(found)
    assert verify(folder) == [found]  # looking changes nothing
    assert verify(folder, repair=True) == [found]
    assert verify(folder) == []
    listener = Counter()
    assert results(run(tmp_path, listener=listener)) == whole
    assert listener.labels or what == "split"
    assert verify(folder) == []


@pytest.mark.parametrize("what", ["predictions", "model"])
def test_damage_without_repair_is_an_error_not_a_number(tmp_path, what):
    metrics = run(tmp_path)
    if what == "model":
        flip_bit(Path(metrics["folds"][0]["model"]) / "weights" / "c" / "0" / "0")
    else:
        flip_bit(tmp_path / "rün" / "fold-0" / "predictions" / "c" / "0" / "0")
    with pytest.raises(DamagedTileError, match=r"is damaged.*verify --repair"):
        run(tmp_path)


def test_a_damaged_preprocessing_state(tmp_path):
    """Every state of a run is one that verify reads."""
    run(tmp_path)
    for state in list_states(tmp_path / "rün"):
        flip_bit(next(p for p in state.rglob("c/*") if p.is_file())) if list(state.rglob("c/*")) else None
    assert {d.path for d in verify(tmp_path / "rün")} == {
        s for s in list_states(tmp_path / "rün") if list(s.rglob("c"))
    }


def test_status_counts(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, listener=Counter(3))
    rows = {s.name: s for s in status(tmp_path / "rün")}
    assert rows["split"].finished
    gram = rows["fold-0/gram-0"]
    assert (gram.total, gram.finished) == (7, False)
    assert 0 < gram.done < 7
    assert "fold-0/predictions" not in rows
    run(tmp_path)
    rows = status(tmp_path / "rün")
    assert all(s.finished for s in rows)
    stages = {"split", "fold-0/preprocess", "fold-0/centre", "fold-0/solve"}
    assert stages | {"fold-0/gram-0", "fold-0/predictions"} == {s.name for s in rows}


FILES = [
    "record.json",
    "metrics.json",
    "fold-0/predictions/zarr.json",
    "fold-0/predictions/receipts.jsonl",
    "fold-0/kernel/zarr.json",
    "fold-0/kernel/receipts.jsonl",
    "fold-0/points/zarr.json",
    "fold-0/points/x/zarr.json",
    "fold-0/state/*/zarr.json",
    "fold-0/state/*/coefficients/zarr.json",
    "state/*/part/zarr.json",
]


@pytest.mark.parametrize(("name", "text"), [*zip(FILES, itertools.cycle([b"{", b"\xff\xfe\x00"]), strict=False)])
def test_what_is_no_json_is_named_and_mended(tmp_path, name, text):
    """Whatever looks at it says which file it is, or does without it; repair and a second run give the same results."""
    job = kernel_job(stored(tmp_path, *class_data()), alphas=(0.1, 1.0))
    folder = tmp_path / "run"
    first = run_job(job, folder, resources=ONE_THREAD)
    path = sorted(folder.glob(name))[-1]
    path.write_bytes(text + (b"\n" if path.suffix == ".jsonl" else b""))
    cache.shared.clear()
    for error in (error_of(status, folder), error_of(run_job, job, folder, resources=ONE_THREAD)):
        assert error is None or (str(path.parent) in error and "repair" in error)
    named = [str(damage) for damage in verify(folder, repair=True)]
    # a run does without metrics and receipts, and has written them again
    if path.suffix != ".jsonl" and name != "metrics.json":
        assert any(str(path.parent) in line or line == str(path.parent.parent) for line in named)
    again = run_job(job, folder, resources=ONE_THREAD)
    assert again["test"] == first["test"]
    assert again["folds"][0]["alpha_path"] == first["folds"][0]["alpha_path"]
    assert verify(folder) == []


def error_of(look, *arguments, **keywords):
    """What it says of a damaged file; None where it does without that file."""
    try:
        look(*arguments, **keywords)
    except NtkdaskError as error:
        return str(error)
    return None


def test_edited_scores_do_not_reach_the_metrics(tmp_path):
    first = run(tmp_path)
    record = tmp_path / "rün" / "record.json"
    table = json.loads(record.read_text())
    table["stages"]["fold-0/solve"]["path"][0]["score"] = 1e-9
    record.write_text(json.dumps(table))
    with pytest.raises(StoreError, match=r"record\.json is damaged: stage fold-0/solve changed"):
        run(tmp_path)
    (found,) = verify(tmp_path / "rün", repair=True)
    assert str(found).endswith("record.json: stage fold-0/solve changed since it was written")
    listener = Counter()
    assert results(run(tmp_path, listener=listener)) == results(first)
    assert set(listener.labels) == {"solve"}


@pytest.mark.parametrize(
    "change", [{"tile_rows": 0}, {"batch_rows": -3}, {"slab_rows": 1.5}, {"threads": None}, {"more": 1}]
)
def test_a_plan_that_cannot_be_is_named(tmp_path, change):
    """In a record without checksums, of an earlier release."""
    run(tmp_path)
    record = tmp_path / "rün" / "record.json"
    table = json.loads(record.read_text())
    del table["checksums"]
    table["stages"]["plan"] |= change
    record.write_text(json.dumps(table))
    with pytest.raises(StoreError, match=rf"the plan in record\.json is damaged: .*{next(iter(change))}"):
        run(tmp_path)
    assert without_checksum(tmp_path / "rün") == [record]


def test_changed_slabs_are_refused(tmp_path):
    run(tmp_path)
    record = tmp_path / "rün" / "record.json"
    table = json.loads(record.read_text())
    del table["checksums"], table["stages"]["fold-0/solve"]
    table["stages"]["plan"]["slab_rows"] = 20
    record.write_text(json.dumps(table))
    with pytest.raises(FingerprintError, match="shape: stored"):
        run(tmp_path)


def test_a_dataset_is_verified_alone(tmp_path):
    data = stored(tmp_path, *class_data())
    assert verify(data.url) == []
    flip_bit(Path(data.url) / "x" / "c" / "0" / "0")
    (found,) = verify(data.url, repair=True)
    assert "rows 0 to" in str(found)
    assert (Path(data.url) / "x").exists()


def test_folders_that_hold_no_run(tmp_path):
    for look in (status, verify, open_record):
        with pytest.raises(UserError, match="holds no run"):
            look(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps([])[:1])
    with pytest.raises(StoreError, match="is damaged"):
        status(tmp_path)
