"""Small files of every format that can be imported, and ways to pack and read them."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ntkdask.datasets import Dataset, import_dataset
from ntkdask.errors import DataError

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


def image_bytes(level: int, mode: str = "RGB", size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    pixel = level if len(mode) == 1 else (level, level // 2, 7) + (255,) * (len(mode) - 3)
    out = io.BytesIO()
    Image.new(mode, size, pixel).save(out, kind)
    return out.getvalue()


def class_folders(n: int = 5, mode: str = "RGB") -> dict[str, bytes]:
    return {f"{c}/{i}.png": image_bytes(v + i, mode) for c, v in COLOURS.items() for i in range(n)}
