"""Files from strangers that claim more than they hold, or hold more than a machine takes: an error at once, in little memory."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from import_examples import image_bytes, refused, write_folder

from ntkdask.datasets import bounds, images, import_dataset, svmlight, table_layout, tables
from ntkdask.errors import DataError

PEAK_BYTES = 2**26


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Smaller bounds, so that small files reach them; whatever is read, the peak stays small."""
    monkeypatch.setattr(bounds.BoundedStream.__init__, "__defaults__", (2**20,))
    monkeypatch.setattr(bounds, "MAX_ROW_BYTES", 2**22)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 2**20)
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PEAK_BYTES


def packed(path: Path, pieces: Callable[[], Iterator[bytes]]) -> Path:
    with gzip.open(path, "wb", 1) as stream:
        for piece in pieces():
            stream.write(piece)
    return path


def zeros(start: bytes, end: bytes = b"") -> Callable[[], Iterator[bytes]]:
    """`start`, 2⁷ MiB of the digit 0 or of what is given, and `end`."""
    return lambda: iter([start, *[b"0" * 2**20] * 128, end])


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("header.csv.gz", b"a,b"),
        ("first.csv.gz", b"a,b\n1,"),
        ("later.csv.gz", b"a,b\n" + b"1.5,2.5\n" * 200_000 + b"3,"),
        ("quote.csv.gz", b'a,b\n1,"x\n'),
        ("one.svm.gz", b"1 1:"),
        ("later.svm.gz", b"1 1:2 2:3\n" * 200_000 + b"1 1:"),
    ],
)
def test_a_line_that_does_not_end(tmp_path: Path, name: str, start: bytes) -> None:
    text = zeros(start) if "quote" not in name else lambda: iter([start, *[b"1,2\n" * 2**18] * 128])
    refused(packed(tmp_path / name, text), tmp_path / "d", "more than 64 MiB")


def test_long_files_of_short_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for a block of lines, not for a file; quoted quotes and line ends are within it."""
    monkeypatch.setattr(tables, "_CELLS", 2**14)
    rows = b'1.5,"it is 5"" or\nmore"\n' * 60_000
    assert len(rows) > 2**20
    parts = import_dataset(packed(tmp_path / "t.csv.gz", lambda: iter([b"a,b\n", rows])), tmp_path / "d")
    assert parts["all"].n == 60_000


def test_more_columns_than_a_table_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_layout, "MAX_COLUMNS", 1000)
    for separator in (",", " "):
        (tmp_path / "t.csv").write_text("\n".join([separator.join(["1"] * 2000)] * 3))
        refused(tmp_path / "t.csv", tmp_path / "d", "more than 1,000 columns", format="csv")


def test_a_field_that_csv_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a," + "b" * 200_000 + "\n1,2\n")
    refused(tmp_path / "t.csv", tmp_path / "d", "Check the file")


def test_an_index_that_no_dense_row_has(tmp_path: Path) -> None:
    (tmp_path / "t.svm").write_text(f"1 1:1 {svmlight.MAX_FEATURES}:1\n0 2:1\n")
    refused(tmp_path / "t.svm", tmp_path / "d", "stored dense")


def npz(path: Path, header: dict, content: bytes = b"", version: tuple[int, int] = (1, 0), length: int = 0) -> Path:
    """An archive with the array x that a header claims, and targets y."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, **header})
    claimed = head.getvalue() + content
    if length:
        claimed = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + b"{" + b" " * 2**22
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", claimed)
        y = io.BytesIO()
        np.save(y, np.arange(3))
        archive.writestr("y.npy", y.getvalue())
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"shape": (3, 2**40)}, "a row of 8 TiB"),
        ({"shape": (2**40, 3), "fortran_order": True}, "x has 1099511627776 rows, y has 3"),
        ({"shape": (3, 0)}, "hold nothing"),
        ({"shape": (-3, 2)}, "hold nothing"),
        ({"shape": (2**60, 3)}, "x has 1152921504606846976 rows, y has 3"),
        ({"shape": (3, 1), "descr": "<U0"}, "hold nothing"),
        ({"shape": (3, 1), "descr": "|V2000000000"}, "a row of"),
    ],
)
def test_arrays_that_claim_too_much(tmp_path: Path, header: dict, words: str) -> None:
    refused(npz(tmp_path / "t.npz", header, bytes(48)), tmp_path / "d", words)


def test_a_header_of_an_array_that_claims_too_much(tmp_path: Path) -> None:
    refused(npz(tmp_path / "t.npz", {"shape": (3, 2)}, length=2**32 - 1), tmp_path / "d", "no NumPy array")


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 2**32 - 1, 2**32 - 1), "a row of"), ((2**32 - 1, 2, 2), "truncated or damaged"), ((3, 2**20, 5), "a row of")],
)
def test_idx_headers_that_claim_too_much(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    head = b"\x00\x00\x08\x03" + struct.pack(">3I", *shape)
    labels = b"\x00\x00\x08\x01" + struct.pack(">I", shape[0]) + bytes(3)
    files = {"train-images-idx3-ubyte": head + bytes(64), "train-labels-idx1-ubyte": labels}
    refused(write_folder(tmp_path / "i", files), tmp_path / "d", words)


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_headers_of_an_archive_that_go_on(tmp_path: Path, kind: bytes, first: bool) -> None:
    """Names and attributes of gigabytes: tarfile would take them into memory."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content in {"cat/1.png": image_bytes(9), "dog/1.png": image_bytes(3)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        end = archive.offset
    before = b"" if first else whole.getvalue()[:end]
    path = packed(tmp_path / "t.tar.gz", zeros(before + header(kind, 2**27)))
    refused(path, tmp_path / "d", "headers of more than 4 MiB", format="images")


def test_many_headers_of_an_archive_in_a_row(tmp_path: Path) -> None:
    block = header(tarfile.XGLTYPE, 512) + b"20 comment=aaaaaaaa\n".ljust(512, b"\0")
    path = packed(tmp_path / "t.tar.gz", lambda: iter([block * 10_000]))
    refused(path, tmp_path / "d", "headers of more than 4 MiB|damaged", format="images")


def test_a_sparse_file_in_an_archive(tmp_path: Path) -> None:
    """tarfile would look for a position that its map does not cover, for ever."""
    member = bytearray(header(tarfile.GNUTYPE_SPARSE, 512, "cat/1.png"))
    member[386:482] = b"".join(f"{n:011o}\0".encode() for n in (512, 512)) + bytes(72)
    member[483:495] = f"{2**20:011o}\0".encode()
    member[148:156] = b" " * 8
    member[148:156] = f"{sum(member):06o}\0 ".encode()
    (tmp_path / "t.tar").write_bytes(member + bytes(512) * 3)
    refused(tmp_path / "t.tar", tmp_path / "d", "a sparse file", format="images")


def test_image_files_larger_than_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "i", {"cat/1.png": image_bytes(9), "dog/1.png": image_bytes(3) + bytes(2**21)})
    refused(folder, tmp_path / "d", "images have at most 1 MiB")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(folder, arcname=".")
    refused(tmp_path / "t.tar", tmp_path / "d", "more than 1048576")


def test_images_wait_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images with much beside their pixels are decoded before they fill the memory."""
    monkeypatch.setattr(images, "_WAITING_BYTES", 2**22)
    padded = image_bytes(9) + bytes(2**20 - 2**12)
    folder = write_folder(tmp_path / "i", {f"{c}/{i}.png": padded for c in ("cat", "dog") for i in range(60)})
    assert import_dataset(folder, tmp_path / "d")["all"].n == 120


@pytest.mark.parametrize("place", ["pipe", "folder/cat/1.png"])
@pytest.mark.parametrize("format", [None, "csv", "images"])
def test_special_files_are_not_opened(tmp_path: Path, place: str, format: str | None) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    words = "special file" if place == "pipe" or format == "images" else "special file|truncated|format"
    refused(tmp_path / place.split("/")[0], tmp_path / "d", words, format=format)


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for name in ("n" * 300, "a\0b"):
        refused(name, tmp_path / "d", "there is no file or folder")


def test_telling_a_format_takes_no_time(tmp_path: Path) -> None:
    """A line of separators before a control character: the search for a table's line went back at each of them."""
    (tmp_path / "t").write_bytes(b"," * (2**16 - 1) + b"\x01")
    refused(tmp_path / "t", tmp_path / "d", "cannot tell the format")


def test_bounded_streams() -> None:
    stream = bounds.BoundedStream(io.BytesIO(bytes(100)), "too much", 10)
    assert len(stream.read(10)) == 10
    with pytest.raises(DataError, match="too much"):
        stream.read(1)
    stream.refill()
    with pytest.raises(DataError, match="too much"):
        stream.read(-1)
    stream.refill(unlimited=True)
    assert len(stream.read(1000)) == 90
