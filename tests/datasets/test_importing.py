"""Importers: every format round trip, and what each says of truncated, unsafe, missing or misnamed files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ntkdask.datasets import Dataset, import_dataset, open_dataset, open_parts
from ntkdask.datasets.importing import detect_format
from ntkdask.errors import DataError, InputError, UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
COLOURS = {"cat": 30, "dog": 120, "elk": 220}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def everything(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    return dataset.rows(0, dataset.n), dataset.targets(0, dataset.n)


def refused(source: object, url: Path, words: str, **options) -> None:
    """Importing fails with a DataError that says `words`, and leaves nothing."""
    with pytest.raises(DataError, match=words):
        import_dataset(str(source), str(url), **options)
    assert not list(url.parent.glob(f"{url.name}*"))


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, {"gz": "w:gz", "xz": "w:xz", "bz2": "w:bz2"}.get(path.suffix[1:], "w")) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


# CIFAR-10


def cifar_arrays(n: int = 7) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    draw = generator(1)
    return {
        name: (draw.integers(0, 256, (n, 3072), dtype=np.uint8), draw.integers(0, 10, n, dtype=np.uint8))
        for name in names
    }


def cifar_binary() -> dict[str, bytes]:
    return {f"{k}.bin": np.concatenate([t[:, None], x], axis=1).tobytes() for k, (x, t) in cifar_arrays().items()}


def cifar_python() -> dict[str, bytes]:
    return {name: python2_pickle(x, t.tolist()) for name, (x, t) in cifar_arrays().items()}


def python2_pickle(x: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2's cPickle wrote at protocol 2 for {"data": x, "labels": labels}: byte strings throughout."""
    shape = b"".join(b"M" + struct.pack("<H", s) for s in x.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array = empty + b"(K\x01" + shape + b"\x86" + dtype + b"\x89T" + struct.pack("<I", x.nbytes) + x.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def test_pickles_of_python3_are_read_too(tmp_path: Path) -> None:
    arrays = cifar_arrays()
    for protocol in (0, 2, 4):
        files = {
            name: pickle.dumps({b"labels": t.tolist(), b"data": x, b"batch_label": b"one"}, protocol=protocol)
            for name, (x, t) in arrays.items()
        }
        source = write_folder(tmp_path / f"c{protocol}", files)
        parts = import_dataset(str(source), str(tmp_path / f"d{protocol}"))
        np.testing.assert_array_equal(parts["test"].targets(0, 7), arrays["test_batch"][1])


@pytest.mark.parametrize("files", [cifar_binary, cifar_python])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(tmp_path: Path, files: Callable[[], dict[str, bytes]], packed: bool) -> None:
    # the true archives hold the batches out of order, below one folder, among other files
    inside = {"readme.html": b"<p>", "batches.meta": b"x"} | dict(reversed(files().items()))
    inside = {f"cifar-10-batches/{name}": content for name, content in inside.items()}
    source = write_tar(tmp_path / "cifar.tar.gz", inside) if packed else write_folder(tmp_path / "cifar", inside)
    parts = import_dataset(str(source), str(tmp_path / "d"))
    assert list(parts) == ["train", "test"]
    assert parts == open_parts(tmp_path / "d")
    x, targets = everything(parts["train"])
    batches = list(cifar_arrays().values())
    np.testing.assert_array_equal(targets, np.concatenate([t for _, t in batches[:5]]))
    planes = np.concatenate([x for x, _ in batches[:5]]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(x, planes.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(parts["test"].targets(0, 7), batches[5][1])
    assert parts["test"].class_names[:2] == ("airplane", "automobile")
    assert (x.dtype, parts["test"].row_shape) == (np.uint8, (32, 32, 3))
    with pytest.raises(DataError, match=r"parts train, test.*d/train"):
        open_dataset(tmp_path / "d")


@pytest.mark.parametrize("files", [cifar_binary, cifar_python])
def test_damaged_cifar10_is_refused(tmp_path: Path, files: Callable[[], dict[str, bytes]]) -> None:
    inside, url = files(), tmp_path / "d"
    archive = write_tar(tmp_path / "whole.tar.gz", inside).read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive[: len(archive) // 2])
    refused(cut, url, "truncated or damaged.*download it again", format="cifar10-binary")
    refused(cut, url, "truncated or damaged.*download it again")
    first = next(iter(inside))
    refused(write_folder(tmp_path / "short", inside | {first: inside[first][:-9]}), url, "truncated")
    del inside[first]
    refused(write_tar(tmp_path / "five.tar", inside), url, f"lacks {first}")


def test_binary_labels_are_checked(tmp_path: Path) -> None:
    files = cifar_binary()
    files["data_batch_3.bin"] = b"\x0a" + files["data_batch_3.bin"][1:]
    refused(write_folder(tmp_path / "c", files), tmp_path / "d", "label 10")


class Malicious:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (lambda mark: Malicious(os.system, f"touch {mark}"), "system"),
        (lambda mark: Malicious(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (lambda mark: Malicious(getattr, "a", "upper"), "getattr"),
        (lambda mark: {b"data": np.array([Malicious(os.mkdir, str(mark))], object), b"labels": [1]}, "mkdir"),
        (lambda mark: Malicious(np.load, str(mark)), "load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickles_do_nothing(tmp_path: Path, payload, named: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    files = cifar_python() | {"data_batch_1": pickle.dumps(payload(mark), protocol=protocol)}
    refused(write_tar(tmp_path / "c.tar.gz", files), tmp_path / "d", f"asks for .*{named}.*Do not trust")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({b"data": np.zeros((2, 3072))}, protocol=2)]
    + [pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": bad}, protocol=2) for bad in ([1], [1, 10], 3)],
)
def test_pickles_of_another_content_are_refused(tmp_path: Path, content: bytes) -> None:
    files = cifar_python() | {"data_batch_2": content}
    refused(write_folder(tmp_path / "c", files), tmp_path / "d", "data_batch_2")


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files() -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    draw = generator(2)
    arrays, files = {}, {}
    for prefix, n in (("train", 30), ("t10k", 11)):
        arrays[f"{prefix}-x"], arrays[f"{prefix}-y"] = draw.integers(0, 256, (n, 28, 28)), draw.integers(0, 10, n)
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(arrays[f"{prefix}-x"])
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(arrays[f"{prefix}-y"])
    return files, arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path: Path, packed: bool) -> None:
    files, arrays = idx_files()
    if packed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    folder = write_folder(tmp_path / "mnist", files)
    parts = import_dataset(str(folder), str(tmp_path / "d"))
    for part, prefix in (("train", "train"), ("test", "t10k")):
        x, targets = everything(parts[part])
        np.testing.assert_array_equal(x, arrays[f"{prefix}-x"][..., None])
        np.testing.assert_array_equal(np.array(parts[part].class_names, int)[targets], arrays[f"{prefix}-y"])
    assert parts["train"].row_shape == (28, 28, 1)
    assert parts["train"].class_names == parts["test"].class_names

    single = folder / f"t10k-images-idx3-ubyte{'.gz' * packed}"
    assert import_dataset(str(single), str(tmp_path / "one"))["all"].n == 11


def test_damaged_idx_is_refused(tmp_path: Path) -> None:
    whole, _ = idx_files()
    url, images, labels = tmp_path / "d", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    changes = {
        "images has 30 images.*29 labels|has 30 images, but .* 29 labels": {labels: idx_bytes(np.zeros(29))},
        "truncated": {images: whole[images][:-1]},
        "more bytes": {images: whole[images] + b"x"},
        "cut": {images: whole[images][:9]},
        "begins with 00000903": {images: b"\0\0\x09\x03" + whole[images][4:]},
        "begins with 00000803": {labels: idx_bytes(np.zeros((30, 1, 1)))},
        "truncated or damaged": {images: gzip.compress(whole[images])[:-500]},
        "its shape is": {images: idx_bytes(np.zeros((0, 28, 28)))},
    }
    for i, (words, change) in enumerate(changes.items()):
        refused(write_folder(tmp_path / f"m{i}", whole | change), url, words)
    del whole[labels]
    refused(write_folder(tmp_path / "alone", whole), url, f"no labels file {labels}")


# images


def image_bytes(level: int, mode: str = "RGB", size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    pixel = level if len(mode) == 1 else (level, level // 2, 7) + (255,) * (len(mode) - 3)
    out = io.BytesIO()
    Image.new(mode, size, pixel).save(out, kind)
    return out.getvalue()


def class_folders(n: int = 5, mode: str = "RGB") -> dict[str, bytes]:
    return {f"{c}/{i}.png": image_bytes(v + i, mode) for c, v in COLOURS.items() for i in range(n)}


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


# tables


def test_csv(tmp_path: Path) -> None:
    x, targets = generator(7).standard_normal((50, 3)), generator(8).standard_normal(50)
    lines = [",".join(map(repr, [*row.tolist(), t])) for row, t in zip(x, targets.tolist(), strict=True)]
    plain = tmp_path / "a.csv"
    plain.write_text("\n".join(lines) + "\n\n")
    dataset = import_dataset(str(plain), str(tmp_path / "a"))["all"]
    assert (dataset.kind, dataset.dtype, dataset.row_shape) == ("regression", "float64", (3,))
    np.testing.assert_allclose(everything(dataset)[0], x, rtol=1e-15)
    np.testing.assert_allclose(everything(dataset)[1], targets, rtol=1e-15)

    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(("a,b,c,y\n" + "\n".join(lines)).encode()))
    assert import_dataset(str(packed), str(tmp_path / "b"))["all"].digest == dataset.digest
    by_name = import_dataset(str(packed), str(tmp_path / "c"), target="b")["all"]
    by_number = import_dataset(str(plain), str(tmp_path / "n"), target=1)["all"]
    from_the_end = import_dataset(str(plain), str(tmp_path / "e"), target="-3")["all"]
    assert by_name.digest == by_number.digest == from_the_end.digest
    np.testing.assert_allclose(by_name.targets(0, 50), x[:, 1], rtol=1e-15)
    np.testing.assert_allclose(by_name.rows(0, 50)[:, 2], targets, rtol=1e-15)
    unlabelled = import_dataset(str(plain), str(tmp_path / "u"), kind="unlabelled")["all"]
    assert (unlabelled.row_shape, unlabelled.target_shape) == ((4,), None)


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("5.1,3.5,setosa\n4.9,3.0,virginica\n4.7,3.2,setosa\n", ("setosa", "virginica"), [0, 1, 0]),
        ("a,b,species\n5.1,3.5,b c\n4.9,3.0,a\n", ("a", "b c"), [1, 0]),
        ("a;b;y\n1;2;10\n3;4;9\n", ("9", "10"), [1, 0]),
        ("1\t2\tNone\n3\t4\tNA\n", ("NA", "None"), [1, 0]),
        (" 1.0  2.0   1\n -1.5 4e3  0\n", ("0", "1"), [1, 0]),
        ('a,b,y\r\n1,2,"x, y"\r\n3,4,z\r\n', ("x, y", "z"), [0, 1]),
        ("\ufeffa,b,y\n1,2,0\n3,4,1\n", ("0", "1"), [0, 1]),
        ("1,2,3\n1,2,4\n1,2,x\n", ("3", "4", "x"), [0, 1, 2]),
    ],
)
def test_csv_classes_and_dialects(tmp_path: Path, text: str, names, labels) -> None:
    path = tmp_path / "a.data"
    path.write_text(text, newline="")
    dataset = import_dataset(str(path), str(tmp_path / "d"), format="csv")["all"]
    assert dataset.class_names == names
    assert dataset.targets(0, dataset.n).tolist() == labels


def test_csv_integer_targets_may_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,2,7\n3,4,9\n")
    assert import_dataset(str(path), str(tmp_path / "c"))["all"].kind == "classification"
    dataset = import_dataset(str(path), str(tmp_path / "r"), kind="regression")["all"]
    assert dataset.targets(0, 2).tolist() == [7.0, 9.0]
    path.write_text("".join(f"1,2,{i}\n" for i in range(1500)))
    with pytest.raises(InputError, match="kind='regression'"):
        import_dataset(str(path), str(tmp_path / "many"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,colour,y\n1,red,0\n2,blue,1\n", "column 'colour' holds 'red' in line 2"),
        ("1,2,0.5\n" * 9 + "1,x,0.5\n", "column '1' holds 'x' in line 10"),
        ("a,b,y\n1,,0\n2,3,1\n\nnan,1,1\n", "missing in lines 2, 5"),
        ("1,2,0.5\n3,4,\n", "missing in line 2"),
        ("1,2,0.5\n3,4,?\n", r"holds numbers, but '\?' in line 2"),
        ("1,2,3\n4,5,6,7\n", "Expected 3 fields in line 2"),
        ("1,2,3\n4,5\n", "missing in line 2"),
        ("", "empty"),
        ("a,b\n", "no rows"),
        ("1\n2\n", "one column"),
    ],
)
def test_tables_that_are_no_numbers_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    refused(path, tmp_path / "d", words)


def test_csv_targets_that_are_not_there(tmp_path: Path) -> None:
    path, url = tmp_path / "a.csv", tmp_path / "d"
    path.write_text("width,height,y\n1,2,0.5\n")
    refused(path, url, "did you mean 'height'", target="heigth")
    refused(path, url, "3 columns, no column 3", target=3)
    path.write_text("1,2,0.5\n")
    refused(path, url, "no header", target="y")
    path.write_bytes("1,2,café\n".encode("latin1"))
    refused(path, url, "UTF-8")
    path.write_text("1,2,text\n")
    refused(path, url, "holds text", kind="regression")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"1.5,2.25,3.125\n" * 9999)[:-40])
    refused(tmp_path / "b.csv.gz", url, "truncated or damaged")
    path.write_text("1,2,0.5\n1,inf,0.5\n")
    with pytest.raises(InputError, match="row 1 of x holds NaN"):
        import_dataset(str(path), str(url))


def test_csv_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    line = ",".join(f"{v:.2f}" for v in generator(9).standard_normal(100)) + "\n"
    path.write_text(line * 30_000)  # 24 MB as float64
    tracemalloc.start()
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.n * 99 * 8 > 23e6
    # one chunk of rows from pandas with its copies, one in the writer with its copies
    assert peak < 18 * 2**20


# NumPy files


def test_npy(tmp_path: Path) -> None:
    x, targets = generator(10).standard_normal((20, 4)).astype(np.float32), np.arange(20) % 3
    np.save(tmp_path / "a.npy", x)
    assert import_dataset(str(tmp_path / "a.npy"), str(tmp_path / "u"))["all"].kind == "unlabelled"
    np.save(tmp_path / "a_targets.npy", targets)
    dataset = import_dataset(str(tmp_path / "a.npy"), str(tmp_path / "d"))["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    np.testing.assert_array_equal(everything(dataset)[1], targets)
    np.save(tmp_path / "a_targets.npy", targets[:-1])
    refused(tmp_path / "a.npy", tmp_path / "e", "one target per row")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable) -> None:
    x, targets = generator(11).standard_normal((20, 4, 2)), np.arange(20) % 3
    save(tmp_path / "a.npz", X=np.asfortranarray(x), labels=targets)
    dataset = import_dataset(str(tmp_path / "a.npz"), str(tmp_path / "a"))["all"]
    np.testing.assert_array_equal(everything(dataset)[0], x)
    np.testing.assert_array_equal(everything(dataset)[1], targets)
    for i, names in enumerate((("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels"))):
        arrays = dict(zip(names, (x[:15], targets[:15].astype(str), x[15:], targets[15:].astype(str)), strict=False))
        save(tmp_path / "b.npz", **arrays)
        parts = import_dataset(str(tmp_path / "b.npz"), str(tmp_path / f"b{i}"))
        assert list(parts) == ["train", "test"][: len(names) // 2]
        np.testing.assert_array_equal(everything(parts["train"])[0], x[:15])
        np.testing.assert_array_equal(everything(parts["train"])[1], targets[:15])
    save(tmp_path / "c.npz", x=x, y=targets, depth=targets * 0.5)
    dataset = import_dataset(str(tmp_path / "c.npz"), str(tmp_path / "c"), target="depth")["all"]
    np.testing.assert_array_equal(everything(dataset)[1], targets * 0.5)


def test_numpy_files_that_are_refused(tmp_path: Path) -> None:
    url, x = tmp_path / "d", np.zeros((100, 40))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(tmp_path / "o.npy", url, "Python objects")
    np.savez(tmp_path / "o.npz", x=np.array([[None]], object))
    refused(tmp_path / "o.npz", url, "Python objects")
    np.save(tmp_path / "a.npy", x)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    refused(tmp_path / "a.npy", url, "truncated")
    np.savez_compressed(tmp_path / "a.npz", x=generator(1).standard_normal((100, 40)), y=np.zeros(100))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-200])
    refused(tmp_path / "cut.npz", url, "truncated or damaged")
    flipped = bytearray(whole)
    flipped[5000] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(tmp_path / "flipped.npz", url, "truncated or damaged")
    for arrays, words in (
        ({"a": x, "b": x}, "Name the rows x"),
        ({"x": x, "data": x}, "both 'x' and 'data'"),
        ({"x": x, "y": np.zeros(99)}, "one per row|targets has 99"),
        ({"x": np.array(3.0)}, "single number"),
    ):
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(UserError, match=words):
            import_dataset(str(tmp_path / "b.npz"), str(url))
    refused(tmp_path / "b.npz", url, "no array 'z'", target="z")


def test_npy_memory_is_bounded(tmp_path: Path) -> None:
    x = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (60_000, 256))  # 61 MB
    x[::1000] = 1
    x.flush()
    np.savez(tmp_path / "a.npz", x=x)
    for name in ("a.npy", "a.npz"):
        tracemalloc.start()
        import_dataset(str(tmp_path / name), str(tmp_path / f"{name}.zarr"))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 25 * 2**20
    assert open_dataset(tmp_path / "a.npy.zarr").digest == open_dataset(tmp_path / "a.npz.zarr").digest


# svmlight, bundled sets, detection


@pytest.mark.parametrize("first", [0, 1])
def test_svmlight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr("ntkdask.datasets.svmlight._TEXT_BYTES", 200)
    monkeypatch.setattr("ntkdask.datasets.svmlight._DENSE_BYTES", 100)
    draw = generator(12)
    x = np.where(draw.random((40, 6)) < 0.4, draw.integers(1, 9, (40, 6)) / 4, 0)
    x[3, 0] = 1.25
    targets = draw.choice([-1, 1], 40)
    lines = ["# a comment"]
    for row, t in zip(x, targets, strict=True):
        lines.append(f"{t:+d} " + " ".join(f"{j + first}:{row[j]}" for j in np.flatnonzero(row)))
    path = tmp_path / "a.svm.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    assert dataset.dtype == "float32"
    assert dataset.class_names == ("-1", "1")
    np.testing.assert_array_equal(everything(dataset)[0], x[:, : np.flatnonzero(x.any(axis=0)).max() + 1])
    np.testing.assert_array_equal(everything(dataset)[1], (targets + 1) // 2)


def test_svmlight_regression_and_damage(tmp_path: Path) -> None:
    path, url = tmp_path / "a.libsvm", tmp_path / "d"
    path.write_text("0.5 1:2 2:3\n1.5 2:1\n")
    dataset = import_dataset(str(path), str(tmp_path / "r"))["all"]
    assert (dataset.kind, dataset.targets(0, 2).tolist()) == ("regression", [0.5, 1.5])
    for text, words in (("1 1:2\n1 a:3\n", "lines 1 to 2"), ("", "no rows"), ("1\n2\n", "no rows with features")):
        path.write_text(text)
        refused(path, url, words)


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
    refused(tmp_path / "noise", url, "cannot tell.*cifar10-binary, cifar10-python, csv, idx, images, numpy")
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


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10-images.tar.xz").exists(), reason="the shared data are not here")
def test_cifar10_images(tmp_path: Path) -> None:
    parts = import_dataset(str(DATA / "cifar10-images.tar.xz"), str(tmp_path / "d"))
    assert {name: part.n for name, part in parts.items()} == {"train": 50_000, "test": 10_000}
    assert set(parts["train"].provenance["counts"].values()) == {5000}


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
