"""Importing: formats found by their content, bundled sets, provenance, and what each format says of damaged files."""

from __future__ import annotations

import bz2
import lzma
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from import_examples import DATA, cifar_binary, cifar_python, class_folders, generator, refused, write_folder, write_tar

from ntkdask.datasets import import_dataset
from ntkdask.datasets.importing import detect_format
from ntkdask.errors import DataError, InputError, UserError


@pytest.mark.parametrize(
    ("name", "n", "shape", "kind"),
    [
        ("digits", 1797, (64,), "classification"),
        ("iris", 150, (4,), "classification"),
        ("wine", 178, (13,), "classification"),
        ("breast_cancer", 569, (30,), "classification"),
        ("diabetes", 442, (10,), "regression"),
    ],
)
def test_bundled(tmp_path: Path, name: str, n: int, shape: tuple[int, ...], kind: str) -> None:
    dataset = import_dataset(f"sklearn:{name}", str(tmp_path / "d"))["all"]
    assert (dataset.n, dataset.row_shape, dataset.kind) == (n, shape, kind)
    assert dataset.dtype == ("float32" if name == "digits" else "float64")
    refused("sklearn:digit", tmp_path / "e", "did you mean 'digits'")


def test_formats_are_found_by_content(tmp_path: Path) -> None:
    write_tar(tmp_path / "odd-name", class_folders())
    (tmp_path / "table").write_text("1,2,3\n")
    (tmp_path / "sparse.txt").write_text("1 1:0.5 7:1\n")
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    os.rename(tmp_path / "x.npy", tmp_path / "array.bin")
    (tmp_path / "table.bz2").write_bytes(bz2.compress(b"1,2,3\n"))
    (tmp_path / "table.xz").write_bytes(lzma.compress(b"1,2,3\n"))
    write_tar(tmp_path / "c.tar.gz", cifar_python())
    for name, found in (
        ("odd-name", "images"),
        ("table", "csv"),
        ("sparse.txt", "svmlight"),
        ("array.bin", "numpy"),
        ("table.bz2", "csv"),
        ("table.xz", "csv"),
        ("c.tar.gz", "cifar10-python"),
    ):
        assert detect_format(tmp_path / name) == found


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    url = tmp_path / "d"
    refused(tmp_path / "nothing", url, "no file or folder")
    (tmp_path / "page.tar.gz").write_bytes(b"<!doctype html><title>404")
    refused(tmp_path / "page.tar.gz", url, "not what its name says")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    refused(
        tmp_path / "noise",
        url,
        "cannot tell.*cifar10-binary, cifar10-python, .*, csv, hdf5, idx, images, netcdf, numpy",
    )
    refused(tmp_path / "noise", url, "did you mean 'images'", format="image")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", url, "cannot tell")
    refused("sklearn:iris", url, "Leave it out", target="y")
    for name in ("idx", "images", "cifar10-binary", "cifar10-python", "numpy", "svmlight", "csv"):
        with pytest.raises(UserError):
            import_dataset(str(tmp_path / "noise"), str(url), format=name)
        with pytest.raises(DataError):
            import_dataset(str(tmp_path / "nothing"), str(url), format=name)
    with pytest.raises(InputError, match="did you mean"):
        import_dataset("sklearn:iris", str(url), kind="clasification")


def test_provenance_says_where_it_came_from(tmp_path: Path) -> None:
    files = class_folders()
    first = import_dataset(str(write_folder(tmp_path / "f", files)), str(tmp_path / "d"))["all"]
    again = import_dataset(str(write_folder(tmp_path / "g", files)), str(tmp_path / "e"))["all"]
    assert first.provenance["source"] == str(tmp_path / "f")
    assert first.provenance["source_digest"] == again.provenance["source_digest"]
    assert first.digest == again.digest
    os.rename(tmp_path / "g" / "elk", tmp_path / "g" / "owl")
    renamed = import_dataset(str(tmp_path / "g"), str(tmp_path / "h"))["all"]
    assert renamed.provenance["source_digest"] != first.provenance["source_digest"]
    assert renamed.digest != first.digest


@pytest.mark.skipif(not (DATA / "uci-protein.csv.gz").exists(), reason="the shared data are not here")
def test_protein(tmp_path: Path) -> None:
    dataset = import_dataset(str(DATA / "uci-protein.csv.gz"), str(tmp_path / "d"))["all"]
    assert (dataset.n, dataset.row_shape, dataset.kind) == (45_730, (9,), "regression")
    targets = dataset.targets(0, dataset.n)
    assert abs(np.expm1(targets - targets.min()).var() - 37.4) < 0.1


def test_random_damage_gives_no_other_errors(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((50, 3)), y=np.arange(50) % 2)
    np.save(tmp_path / "a.npy", np.ones((50, 3)))
    whole = {name: (tmp_path / name).read_bytes() for name in ("a.npz", "a.npy")}
    whole |= {"a.csv": b"a,b,y\n" + b"1,2,0.5\n" * 50, "a.svm": b"1 1:2 3:4\n-1 2:3\n" * 20}
    for name, files in (("i.tar", class_folders()), ("b.tar.gz", cifar_binary()), ("p.tar", cifar_python())):
        whole[name] = write_tar(tmp_path / name, files).read_bytes()
    draw, refusals = generator(13), 0
    for _ in range(50):
        for name, content in whole.items():
            damaged = bytearray(content)
            for at in draw.integers(0, min(len(content), int(draw.choice([100, 1000, 10**6]))), 3):
                damaged[at] = draw.integers(256)
            (tmp_path / name).write_bytes(damaged[: draw.integers(1, len(content)) if draw.random() < 0.3 else None])
            try:
                import_dataset(str(tmp_path / name), str(tmp_path / "d"), overwrite=True)
            except UserError:
                refusals += 1
    assert refusals > 200


def test_tar_archives_before_ustar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        for name, content in class_folders(2).items():
            header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
            header[124:136] = b"%011o\0" % len(content)
            header[257:512] = bytes(255)  # version 7 has nothing after the name of a link
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    assert path.read_bytes()[257:262] != b"ustar"
    assert import_dataset(str(path), str(tmp_path / "d"))["all"].class_names == ("cat", "dog", "elk")


def test_a_zip_of_one_file_is_read_as_that_file(tmp_path: Path) -> None:
    def packed(name: str, files: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for inside, content in files.items():
                archive.writestr(inside, content)
        return tmp_path / name

    for name, files, found in (
        ("a.csv.zip", {"a.csv": b"a,b,y\n1,2,u\n3,4,v\n"}, "csv"),
        ("b.zip", {"data/b.csv": b"1,2,u\n3,4,v\n", "__MACOSX/data/._b.csv": b"x"}, "csv"),
        ("c.zip", {"c.svm": b"1 1:0.5 2:1\n0 1:2\n"}, "svmlight"),
    ):
        path = packed(name, files)
        assert detect_format(path) == found
        dataset = import_dataset(str(path), str(tmp_path / "d"), overwrite=True)["all"]
        assert (dataset.n, dataset.row_shape) == (2, (2,))
    refused(
        packed("e.zip", {"a.csv": b"1,2", "b.csv": b"1,2"}), tmp_path / "out", "zip archive of a.csv, b.csv. Unpack it"
    )
    refused(
        packed("f.xlsx", {"[Content_Types].xml": b"", "x": b""}),
        tmp_path / "out",
        "Office document. Save its table as CSV",
    )
    content = bytearray((tmp_path / "a.csv.zip").read_bytes())
    content[6] |= 1  # the mark of encryption, in the header of the file and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "g.csv.zip").write_bytes(content)
    refused(tmp_path / "g.csv.zip", tmp_path / "out", "cannot be unpacked.*password")


def test_one_kind_for_all_parts(tmp_path: Path) -> None:
    x = np.ones((2, 3))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.array([0, 1]), x_test=x, y_test=np.array([0.5, 1.0]))
    with pytest.raises(InputError, match="no class label"):
        import_dataset(str(tmp_path / "a.npz"), str(tmp_path / "d"))
    parts = import_dataset(str(tmp_path / "a.npz"), str(tmp_path / "d"), kind="regression")
    assert {p.kind for p in parts.values()} == {"regression"}


def test_a_folder_with_a_file_names_the_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"data.csv": b"1,2,3\n"})
    refused(folder, tmp_path / "d", "Give the file itself: .*data.csv")


def test_formats_of_the_extra_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ntkdask.datasets.containers.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "a.parquet", tmp_path / "d", "read by pyarrow.*pip install 'ntkdask.formats.'")
