"""Images in folders and archives: classes and parts by folder, any mode, and archives that are truncated or lead elsewhere."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from import_examples import (
    COLOURS,
    DATA,
    class_folders,
    everything,
    generator,
    image_bytes,
    refused,
    write_folder,
    write_tar,
)
from PIL import Image

from ntkdask.datasets import import_dataset


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2", "folder"])
def test_images_in_class_folders(tmp_path: Path, name: str) -> None:
    files = class_folders() | {"README.txt": b"hello", ".DS_Store": b"\0", "cat/._0.png": b"resource fork"}
    source = (write_folder if name == "folder" else write_tar)(tmp_path / name, files)
    seen: list[tuple[int, int | None]] = []
    dataset = import_dataset(str(source), str(tmp_path / "d"), progress=lambda *a: seen.append(a))["all"]
    x, targets = everything(dataset)
    assert dataset.class_names == ("cat", "dog", "elk")
    assert targets.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert x.shape == (15, 6, 8, 3)
    np.testing.assert_array_equal(x[:, 2, 3, 0], [v + i for v in COLOURS.values() for i in range(5)])
    assert dataset.provenance["files_that_are_no_images"] == 1
    assert dataset.provenance["importer"] == "images"
    assert seen[-1] == (15, None)


@pytest.mark.parametrize("packed", [True, False])
def test_images_in_parts_in_any_order(tmp_path: Path, packed: bool) -> None:
    # elk is in no test folder: the parts still agree on the labels
    files = {f"root/train/{name}": content for name, content in class_folders().items()}
    files |= {f"root/test/{c}/{i}.png": image_bytes(COLOURS[c] + i) for c in ("dog", "cat") for i in range(3)}
    names = generator(4).permutation(sorted(files)).tolist()
    files = {name: files[name] for name in names}
    source = (write_tar if packed else write_folder)(tmp_path / ("a.tar.xz" if packed else "folder"), files)
    parts = import_dataset(str(source), str(tmp_path / "d"))
    assert list(parts) == ["train", "test"]
    for part, n in (("train", 15), ("test", 6)):
        x, targets = everything(parts[part])
        assert parts[part].class_names == ("cat", "dog", "elk")
        assert len(x) == n
        levels = np.array(list(COLOURS.values()))[targets]
        assert ((x[:, 0, 0, 0] - levels) < 5).all()
        order = [n for n in (names if packed else sorted(names)) if f"/{part}/" in n]
        assert [parts[part].class_names[t] for t in targets] == [n.split("/")[2] for n in order]


def test_greyscale_and_mixed_modes(tmp_path: Path) -> None:
    grey = write_tar(tmp_path / "grey.tar", class_folders(mode="L"))
    assert import_dataset(str(grey), str(tmp_path / "g"))["all"].row_shape == (6, 8, 1)
    mixed = class_folders(mode="L") | {"elk/9.png": image_bytes(200), "elk/a.png": image_bytes(9, "RGBA")}
    dataset = import_dataset(str(write_tar(tmp_path / "mixed.tar", mixed)), str(tmp_path / "m"))["all"]
    assert dataset.row_shape == (6, 8, 3)
    np.testing.assert_array_equal(dataset.rows(0, 1)[0, 0, 0], [30, 30, 30])
    np.testing.assert_array_equal(dataset.rows(15, 17)[:, 0, 0], [[200, 100, 7], [9, 4, 7]])


def test_jpeg_pixels_are_pillows(tmp_path: Path) -> None:
    noise = Image.fromarray(generator(5).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, "JPEG", quality=90)
    source = write_folder(tmp_path / "f", {"a/0.jpg": out.getvalue(), "b/0.JPEG": out.getvalue()})
    dataset = import_dataset(str(source), str(tmp_path / "d"))["all"]
    np.testing.assert_array_equal(dataset.rows(1, 2)[0], np.asarray(Image.open(io.BytesIO(out.getvalue()))))


def test_images_that_cannot_be_rows_are_refused(tmp_path: Path) -> None:
    url, whole = tmp_path / "d", class_folders()
    huge, large = (bytearray(image_bytes(1)) for _ in range(2))
    for image, side in ((huge, 60_000), (large, 5000)):
        image[16:24] = struct.pack(">II", side, side)
        image[29:33] = struct.pack(">I", zlib.crc32(image[12:29]))
    sixteen = io.BytesIO()
    Image.new("I;16", (8, 6)).save(sixteen, "PNG")
    for i, (change, words) in enumerate(
        (
            ({"dog/9.png": image_bytes(3, size=(9, 6))}, "dog/9.png is 9×6, the first image 8×6 pixels"),
            ({"dog/9.png": b"no image"}, "dog/9.png is damaged, or no image"),
            ({"dog/9.png": image_bytes(3)[:-30]}, "dog/9.png is truncated or damaged"),
            ({"dog/9.png": bytes(huge)}, "dog/9.png has too many pixels"),
            ({"cat/0.png": bytes(large)}, "5000×5000 pixels; the limit"),
            ({"cat/9.png": sixteen.getvalue()}, "only 8-bit"),
            ({"top.png": image_bytes(3)}, "no class folder"),
            ({"dog/deep/9.png": image_bytes(3)}, "another depth"),
            ({"train/dog/9.png": image_bytes(3)}, "another depth"),
        )
    ):
        refused(write_tar(tmp_path / f"{i}.tar", whole | change), url, words)
    refused(write_tar(tmp_path / "none.tar", {"a/b.txt": b"x"}), url, "holds no images")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
def test_truncated_archives_are_refused(tmp_path: Path, name: str) -> None:
    draw = generator(6)
    files = {}
    for i in range(40):
        out = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, "PNG")
        files[f"train/{'ab'[i % 2]}/{i:02}.png"] = out.getvalue()
    content = write_tar(tmp_path / name, files).read_bytes()
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / name
    # also between two members, where a plain archive reads as complete: 40 members of 512 + 1024 bytes
    for size in (len(content) // 2, len(content) - len(content) // 3 - 5, 20 * 1536, 300, 100, 12):
        cut.write_bytes(content[:size])
        refused(cut, tmp_path / "d", "truncated or damaged|not what its name says")
    if name != "a.tar":
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0xFF
        cut.write_bytes(flipped)
        refused(cut, tmp_path / "d", "damaged")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("../x.png", tarfile.REGTYPE, "leads out"),
        ("cat/../../x.png", tarfile.REGTYPE, "leads out"),
        ("/etc/x.png", tarfile.REGTYPE, "leads out"),
        ("cat\\..\\..\\x.png", tarfile.REGTYPE, "leads out"),
        ("cat/x.png", tarfile.SYMTYPE, "a link"),
        ("cat/x.png", tarfile.LNKTYPE, "a link"),
        ("cat/x.png", tarfile.CHRTYPE, "a device"),
        ("cat/x.png", tarfile.FIFOTYPE, "a device"),
    ],
)
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path: Path, name: str, kind: bytes, words: str) -> None:
    path = write_tar(tmp_path / "a.tar", class_folders())
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    refused(path, tmp_path / "d", f"{words}.*")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"0.png": image_bytes(9)})
    folder = write_folder(tmp_path / "f", {"cat/0.png": image_bytes(3)})
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    assert import_dataset(str(folder), str(tmp_path / "d"))["all"].class_names == ("cat", "dog")
    (folder / "dog" / "again").symlink_to(folder)
    refused(folder, tmp_path / "z", "folders deep")


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10-images.tar.xz").exists(), reason="the shared data are not here")
def test_cifar10_images(tmp_path: Path) -> None:
    parts = import_dataset(str(DATA / "cifar10-images.tar.xz"), str(tmp_path / "d"))
    assert {name: part.n for name, part in parts.items()} == {"train": 50_000, "test": 10_000}
    assert set(parts["train"].provenance["counts"].values()) == {5000}


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train", "valid"), ["train", "validation"]),
        (("train", "val"), ["train", "validation"]),
        (("Train", "Test"), ["train", "test"]),
        (("training", "testing"), ["train", "test"]),
        (("TRAIN", "Validation", "TEST"), ["train", "validation", "test"]),
    ],
)
def test_folders_of_parts_by_their_common_names(tmp_path: Path, names: tuple[str, ...], parts: list[str]) -> None:
    files = {f"{name}/{inside}": content for name in names for inside, content in class_folders(2).items()}
    found = import_dataset(str(write_folder(tmp_path / "f", files)), str(tmp_path / "d"))
    assert {name: (p.n, p.class_names) for name, p in found.items()} == dict.fromkeys(parts, (6, ("cat", "dog", "elk")))
    assert list(found) == parts


def test_folders_that_name_one_part_twice_or_no_class_are_refused(tmp_path: Path) -> None:
    files = {f"{part}/cat/{i}.png": image_bytes(i) for i, part in enumerate(("train", "val", "valid"))}
    refused(write_folder(tmp_path / "twice", files), tmp_path / "d", "folders val and valid, which both name the part")
    files = {f"{part}/{i}.png": image_bytes(i) for i, part in enumerate(("train", "test"))}
    refused(write_tar(tmp_path / "flat.tar", files), tmp_path / "d", "images lie in test, train themselves")


def test_composed_and_decomposed_folders_are_one_class(tmp_path: Path) -> None:
    files = {f"{name}/{i}.png": image_bytes(i) for i, name in enumerate(("Caf\u00e9", "Cafe\u0301", "Bar"))}
    dataset = import_dataset(str(write_tar(tmp_path / "a.tar", files)), str(tmp_path / "d"))["all"]
    assert (dataset.class_names, everything(dataset)[1].tolist()) == (("Bar", "Caf\u00e9"), [1, 1, 0])


def test_exif_orientation_is_said_and_not_applied(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:3] = 250
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    files = {}
    for name, options in (("cat/0.jpg", {"exif": exif}), ("cat/1.jpg", {}), ("dog/0.png", {"exif": exif})):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG" if name.endswith("png") else "JPEG", **options)
        files[name] = out.getvalue()
    dataset = import_dataset(str(write_folder(tmp_path / "f", files)), str(tmp_path / "d"))["all"]
    assert (dataset.rows(0, 3)[:, 0] > 200).all()
    assert dataset.provenance["exif_orientation"] == "not applied; 2 images have one"


def test_images_in_a_zip_archive(tmp_path: Path) -> None:
    files = {f"root/Train/{n}": c for n, c in class_folders().items()} | {"__MACOSX/._x.png": b"x", "root/a.txt": b"x"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    dataset = import_dataset(str(tmp_path / "a.zip"), str(tmp_path / "d"))["train"]
    levels = [v + i for v in COLOURS.values() for i in range(5)]
    np.testing.assert_array_equal(dataset.rows(0, 15)[:, 0, 0, 0], levels)
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-40])
    refused(tmp_path / "a.zip", tmp_path / "e", "truncated or damaged")


def test_palettes_lose_their_transparency_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 200, 100, 7])
    out = io.BytesIO()
    image.save(out, "PNG", transparency=b"\x80\x10")
    files = {"a/0.png": out.getvalue(), "b/0.png": image_bytes(9)}
    dataset = import_dataset(str(write_folder(tmp_path / "f", files)), str(tmp_path / "d"))["all"]
    assert dataset.rows(0, 1)[0, 0, 0].tolist() == [200, 100, 7]
