"""CIFAR-10 and CIFAR-100, binary version: records of one or two label bytes and 3 072 bytes of pixels (three 32×32 planes).

`cifar-10-binary.tar.gz` or a folder with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`; `cifar-100-binary.tar.gz` or
a folder with `train.bin` and `test.bin`. Parts train and test, rows (32, 32, 3) uint8, in the order of the batches' numbers
whatever the order in the archive. The classes of CIFAR-100 are its 100 fine ones, or by `target="coarse"` its 20 coarse ones.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from ntkdask.datasets.source import (
    Batch,
    Request,
    Source,
    file_digest,
    files_under,
    open_tar,
    read_blocks,
    reading,
    tar_files,
)
from ntkdask.errors import DataError, nearest


@dataclass(frozen=True)
class Cifar:
    """What a dataset of this family has in its files.

    Parameters
    ----------
    name : str
        For messages.
    files : tuple of (str, str)
        Part and name, without suffix, of each file in order.
    class_names : tuple of str
        The classes of the labels that are wanted.
    label : int
        Which of the label bytes they are.
    label_bytes : int
        Label bytes of a record.
    key : bytes
        Their key in the pickled dictionary.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    label: int
    label_bytes: int
    key: bytes


CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_COARSE = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture insects
    large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
    non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""
_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
    hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_BATCHES = (*(("train", f"data_batch_{i}") for i in range(1, 6)), ("test", "test_batch"))
_WHOLE = (("train", "train"), ("test", "test"))
_PIXEL_BYTES = 3 * 32 * 32
CIFAR10 = Cifar("CIFAR-10", _BATCHES, CLASS_NAMES, 0, 1, b"labels")
_CIFAR100 = {
    "fine": Cifar("CIFAR-100", _WHOLE, tuple(_FINE.split()), 1, 2, b"fine_labels"),
    "coarse": Cifar("CIFAR-100", _WHOLE, tuple(_COARSE.split()), 0, 2, b"coarse_labels"),
}


def open_source(path: Path, request: Request) -> Source:
    """The images of `path`, an archive or a folder."""
    cifar = cifar_of(request)
    notes = {"target": cifar.key.decode()}
    return Source(
        _batches(path, cifar), file_digest(path), kind="classification", class_names=cifar.class_names, notes=notes
    )


def cifar_of(request: Request) -> Cifar:
    """The dataset, and of CIFAR-100 the labels, that were asked for."""
    if not (request.format or "").startswith("cifar100"):
        return CIFAR10
    wanted = "fine" if request.target is None else str(request.target)
    if wanted not in _CIFAR100:
        raise DataError(f"CIFAR-100 has no labels {wanted!r}{nearest(wanted, _CIFAR100)}")
    return _CIFAR100[wanted]


def to_nhwc(planes: np.ndarray) -> np.ndarray:
    """Images (b, 32, 32, 3) from rows (b, 3072) of three colour planes each."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def batch_files(path: Path, cifar: Cifar, suffix: str) -> Iterator[tuple[str, str, IO[bytes], int]]:
    """(part, name, open stream, size in bytes) of the batch files in order; DataError names those that are missing."""
    wanted = [(part, name + suffix) for part, name in cifar.files]
    with contextlib.ExitStack() as stack:
        entries: dict[str, Path | tarfile.TarInfo] = {}
        if path.is_dir():
            entries.update((file.name, file) for _, file in files_under(path, max_depth=1))
        else:
            archive = stack.enter_context(open_tar(path))
            entries.update((PurePosixPath(m.name).name, m) for m in tar_files(path, archive))
        missing = [name for _, name in wanted if name not in entries]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}. Download {cifar.name} again, or unpack it completely.")
        for part, name in wanted:
            entry = entries[name]
            if isinstance(entry, Path):
                with open(entry, "rb") as file:
                    yield part, name, file, entry.stat().st_size
            else:
                member = archive.extractfile(entry)
                if member is not None:
                    yield part, name, member, entry.size


def _batches(path: Path, cifar: Cifar) -> Iterator[Batch]:
    """The images and labels of the batch files; DataError where a file is no sequence of records, or a label is too large."""
    record = cifar.label_bytes + _PIXEL_BYTES
    with reading(path):
        for part, name, stream, size in batch_files(path, cifar, ".bin"):
            if size == 0 or size % record:
                raise DataError(
                    f"{path}: {name} has {size} bytes, not a multiple of {record}. It is truncated or another format; "
                    "download it again."
                )
            for block in read_blocks(stream, size // record, record):
                records = np.frombuffer(block, np.uint8).reshape(-1, record)
                labels, last = records[:, cifar.label], len(cifar.class_names) - 1
                if labels.max() > last:
                    raise DataError(
                        f"{path}: {name} has a label {labels.max()}; {cifar.name} has 0 to {last}. It is damaged."
                    )
                yield Batch(part, to_nhwc(records[:, cifar.label_bytes :]), labels)
