"""Zarr, HDF5 and NetCDF: rows and targets by their names, parts, what is refused, and the memory that reading takes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray
import zarr
from import_examples import everything, generator, refused

from ntkdask.datasets import import_dataset, open_dataset, write_dataset
from ntkdask.errors import DataError
from ntkdask.store import ATTRIBUTE, create_array, open_array

LABELS = np.array(["b", "é", "b", "a", "é"])


def write_zarr(path: Path, arrays: dict[str, np.ndarray], version: int) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=version)
    for name, values in arrays.items():
        dtype = "string" if values.dtype.kind == "U" else values.dtype
        stored = group.create_array(name, shape=values.shape, dtype=dtype, chunks=(2, *values.shape[1:]))
        stored[:] = values.astype(object) if dtype == "string" else values
    return path


def write_hdf5(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values.dtype.kind == "U":
                file.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype())
            else:
                file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    return path


def write_netcdf(path: Path, arrays: dict[str, np.ndarray], engine: str) -> Path:
    variables = {n: ([f"{n}_{i}" for i in range(v.ndim)], v) for n, v in arrays.items()}
    xarray.Dataset(variables).to_netcdf(path, engine=engine)
    return path


WRITERS = {
    "zarr2": lambda folder, arrays: write_zarr(folder / "a.zarr", arrays, 2),
    "zarr3": lambda folder, arrays: write_zarr(folder / "a.zarr", arrays, 3),
    "hdf5": lambda folder, arrays: write_hdf5(folder / "a.h5", arrays),
    "netcdf3": lambda folder, arrays: write_netcdf(folder / "a.nc", arrays, "scipy"),
    "netcdf4": lambda folder, arrays: write_netcdf(folder / "a.nc", arrays, "h5netcdf"),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
def test_arrays_by_their_names(tmp_path: Path, form: str, dtype: str) -> None:
    x = generator(1).standard_normal((5, 3, 2)).astype(dtype)
    path = WRITERS[form](tmp_path, {"X": x, "labels": np.array([1, 2, 1, 0, 2], ">i4"), "mean": np.zeros(3)})
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    rows, targets = everything(dataset)
    np.testing.assert_array_equal(rows, x)
    assert (rows.dtype, targets.tolist()) == (x.dtype.newbyteorder("="), [1, 2, 1, 0, 2])
    told = dataset.provenance
    assert (told["rows"], told["target"], told["arrays_left_out"]) == ("X", "labels", ["mean"])
    assert told["importer"] == form.rstrip("234")


@pytest.mark.parametrize("form", ["zarr2", "zarr3", "hdf5", "netcdf4"])
def test_parts_and_text(tmp_path: Path, form: str) -> None:
    x = generator(2).integers(0, 9, (5, 4))
    between = "_" if form == "netcdf4" else "/"
    arrays = {}
    for part, rows in (("train", slice(0, 3)), ("val", slice(3, 4)), ("Testing", slice(4, 5))):
        arrays |= {f"{part}{between}x": x[rows], f"{part}{between}y": LABELS[rows]}
    parts = import_dataset(str(WRITERS[form](tmp_path, arrays)), str(tmp_path / "d"))
    assert list(parts) == ["train", "validation", "test"]
    assert parts["test"].class_names == ("a", "b", "é")
    np.testing.assert_array_equal(np.concatenate([everything(p)[0] for p in parts.values()]), x)
    assert np.concatenate([everything(p)[1] for p in parts.values()]).tolist() == [1, 2, 1, 0, 2]


@pytest.mark.parametrize("form", ["zarr3", "hdf5", "netcdf3"])
def test_arrays_of_other_names(tmp_path: Path, form: str) -> None:
    x = generator(3).standard_normal((5, 2))
    path, url = WRITERS[form](tmp_path, {"fields": x, "response": x[:, 0], "other": x[:3]}), tmp_path / "d"
    refused(path, url, "has the arrays .*--rows NAME and --target NAME")
    refused(path, url, "no array 'feilds' for rows; did you mean 'fields'", rows="feilds")
    refused(path, url, "fields has 5 rows, other has 3. Give one per row", rows="fields", target="other")
    dataset = import_dataset(str(path), str(url), rows="fields", target="response")["all"]
    np.testing.assert_array_equal(everything(dataset)[1], x[:, 0])
    assert dataset.kind == "regression"


@pytest.mark.parametrize("version", [2, 3])
def test_a_single_zarr_array(tmp_path: Path, version: int) -> None:
    x = generator(4).standard_normal((7, 3))
    for name, values in (("a.zarr", x), ("a_targets.zarr", np.arange(7) % 2)):
        zarr.create_array(tmp_path / name, data=values, chunks=(2, *values.shape[1:]), zarr_format=version)
    dataset = import_dataset(str(tmp_path / "a.zarr"), str(tmp_path / "d"))["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    assert everything(dataset)[1].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_what_ntkdask_wrote_is_not_imported(tmp_path: Path) -> None:
    write_dataset(tmp_path / "own", np.eye(3), np.arange(3))
    refused(tmp_path / "own", tmp_path / "d", "a dataset of ntkdask already. Use it as it is")
    create_array(tmp_path / "tiles", (4, 4), (2, 4), "f8", {ATTRIBUTE: {"format": "tiles"}})
    refused(tmp_path / "tiles", tmp_path / "d", "that ntkdask stored, no dataset.*nd.write_dataset")


def test_a_foreign_zarr_group_names_an_import_that_works(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", {"x": np.eye(3), "y": np.arange(3)}, 3)
    with pytest.raises(DataError, match=f"ntkdask data import {path}"):
        open_dataset(path)
    assert import_dataset(str(path), str(tmp_path / "d"))["all"].n == 3


def test_packed_values_are_unpacked(tmp_path: Path) -> None:
    x = np.array([[1.0, 2.5], [3.0, 4.0]])
    encoding = {"x": {"dtype": "i2", "scale_factor": 0.5, "add_offset": 1.0, "_FillValue": -1}}
    written = xarray.Dataset({"x": (("n", "d"), x), "y": (("n",), [0.5, 1.5])})
    written.to_netcdf(tmp_path / "a.nc", engine="h5netcdf", encoding=encoding)
    dataset = import_dataset(str(tmp_path / "a.nc"), str(tmp_path / "d"))["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    (tmp_path / "a.nc").rename(tmp_path / "a.h5")
    refused(tmp_path / "a.h5", tmp_path / "e", "x is packed.*--format netcdf")


def test_integers_that_may_be_missing_stay_labels(tmp_path: Path) -> None:
    for labels, kind in (([3, 1], "classification"), ([2**53, 1], None)):
        y = xarray.Variable(("n",), np.array(labels), encoding={"_FillValue": -1})
        xarray.Dataset({"x": (("n", "d"), np.eye(2)), "y": y}).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
        if kind:
            dataset = import_dataset(str(tmp_path / "a.nc"), str(tmp_path / "d"))["all"]
            assert (dataset.kind, dataset.class_names) == (kind, ("1", "3"))
        else:
            refused(tmp_path / "a.nc", tmp_path / "e", "lose digits. Write them without")


def test_no_link_leads_out_of_a_file(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "other.h5", {"x": np.eye(3)})
    layout = h5py.VirtualLayout((3, 3), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (3, 3))
    for name, change in (
        ("link", lambda f: f.__setitem__("x", h5py.ExternalLink(str(tmp_path / "other.h5"), "x"))),
        ("soft", lambda f: f.__setitem__("x", h5py.SoftLink("/nowhere"))),
        ("virtual", lambda f: f.create_virtual_dataset("x", layout)),
        ("raw", lambda f: f.create_dataset("x", (2, 2), "f8", external=[(str(tmp_path / "other.h5"), 0, 32)])),
    ):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            change(file)
        refused(tmp_path / f"{name}.h5", tmp_path / "d", "what lies in the file itself")
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file.create_dataset("x", (2, 2**36), "f8", chunks=(1, 2**20))
    refused(tmp_path / "wide.h5", tmp_path / "d", "a row of .* is claimed")
    with h5py.File(tmp_path / "circle.h5", "w") as file:
        group = file.create_group("a")
        group["b"] = group
    refused(tmp_path / "circle.h5", tmp_path / "d", "one in itself")


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    x, y = generator(5).standard_normal((40, 30)), np.arange(40) % 2
    for form in ("hdf5", "netcdf4", "netcdf3"):
        path = WRITERS[form](tmp_path, {"x": x, "y": y})
        content = path.read_bytes()
        for cut in (20, len(content) // 2):
            path.write_bytes(content[:cut])
            refused(path, tmp_path / "d", "truncated|damaged|cannot be read")
        path.unlink()
    for version in (2, 3):
        path = write_zarr(tmp_path / f"{version}.zarr", {"x": x, "y": y}, version)
        chunk = path / "x" / ("0.0" if version == 2 else "c/0/0")
        chunk.write_bytes(chunk.read_bytes()[:-50])
        refused(path, tmp_path / "d", "rows 0 to .* of x cannot be read|not as long as its header says")
        meta = path / "x" / (".zarray" if version == 2 else "zarr.json")
        meta.write_text(meta.read_text()[:-20])
        refused(path, tmp_path / "d", "is damaged")


def test_arrays_without_rows_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = np.zeros((0, 3)), np.zeros(0)
    refused(tmp_path / "a.h5", tmp_path / "d", "x has 0 rows")
    with h5py.File(tmp_path / "a.h5", "w"):
        pass
    refused(tmp_path / "a.h5", tmp_path / "d", "no arrays")


@pytest.mark.parametrize("form", ["zarr3", "netcdf4"])
def test_memory_is_bounded(tmp_path: Path, form: str) -> None:
    n, d = 16_000, 256  # 33 MB
    if form == "zarr3":
        zarr.create_array(tmp_path / "a.zarr", shape=(n, d), chunks=(500, d), dtype="f8", fill_value=1)
        path = tmp_path / "a.zarr"
    else:
        path = tmp_path / "a.nc"
        with h5py.File(path, "w") as file:
            file.create_dataset("x", (n, d), "f8", chunks=(500, d), fillvalue=1)
            for i, size in enumerate((n, d)):
                file.create_dataset(f"axis{i}", data=np.zeros(size)).make_scale(f"axis{i}")
                file["x"].dims[i].attach_scale(file[f"axis{i}"])
    tracemalloc.start()
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.n == n
    assert peak < 25 * 2**20
    assert json.loads((tmp_path / "d" / "x" / "zarr.json").read_text())["shape"] == [n, d]
    assert open_array(tmp_path / "d" / "x")[n - 1, d - 1] == 1
