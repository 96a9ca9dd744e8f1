"""Images in class folders, on disk or in a tar or zip archive: `cat/0001.jpg`, or `train/cat/0001.jpg` and `test/cat/...`.

The folder's name is the class; the folders of parts may be called training, valid, val or testing, too, in any case of letters. All
images have one size; rows are (h, w, 3) uint8, or (h, w, 1) where all are greyscale. Pixels are taken as they are stored: an EXIF
orientation, with which cameras ask viewers to turn a picture, is not applied, and the provenance counts the images that have one.
(That of a TIFF file is a part of the format, and applied.)
An archive is read in its own order, without unpacking. Images usually lie sorted by class, so splits must shuffle.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from ntkdask.arrays import host_cores
from ntkdask.datasets.source import (
    ALL,
    Batch,
    Request,
    Source,
    file_digest,
    files_under,
    open_tar,
    part_of,
    reading,
    tar_files,
    tar_read,
    zip_file_read,
    zip_names,
)
from ntkdask.errors import DataError
from ntkdask.wording import format_bytes

MAX_PIXELS = 4096 * 4096
MAX_FILE_BYTES = 2**27
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# named one by one: Pillow also reads PostScript, for which it starts another program
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_EXIF_ORIENTATION = 0x0112
_BATCH_ROWS = 1024
_BATCH_BYTES = 4 * 2**20
_WAITING_BYTES = 2**26


class Encoded(NamedTuple):
    """An image file: its part, its class, its name and its bytes, which are not decoded yet."""

    part: str
    label: str
    name: str
    content: bytes


def open_source(path: Path, request: Request) -> Source:
    """The images of `path`, a folder or a tar archive."""
    source = Source(iter(()), file_digest(path), kind="classification")
    source.batches = _batches(path, source)
    return source


def _batches(path: Path, source: Source) -> Iterator[Batch]:
    """The images in batches, decoded by several threads; adds to the source's notes."""
    with reading(path), contextlib.closing(_encoded(path, source)) as images:
        first = next(images, None)
        if first is None:
            raise DataError(
                f"{path} holds no images ({', '.join(sorted(_SUFFIXES))}) in class folders. Check the path."
            )
        with _opened(path, first) as image:
            size = image.size
        mode = "L" if _all_grey(path) else "RGB"
        decode = _Decoder(path, size, mode)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // (size[0] * size[1] * len(mode))))
        threads = max(2, min(host_cores(), 16))
        with ThreadPoolExecutor(threads) as pool:
            waiting, encoded_bytes = [first], len(first.content)
            for image_file in images:
                waiting.append(image_file)
                encoded_bytes += len(image_file.content)
                if len(waiting) >= rows or encoded_bytes >= _WAITING_BYTES:
                    yield from _decoded(waiting, decode, pool, threads)
                    waiting, encoded_bytes = [], 0
            if waiting:
                yield from _decoded(waiting, decode, pool, threads)
        if decode.turned:
            source.notes["exif_orientation"] = f"not applied; {len(decode.turned):,} images have one"


def _decoded(images: list[Encoded], decode: _Decoder, pool: ThreadPoolExecutor, threads: int) -> Iterator[Batch]:
    """Some images, decoded, in a batch for each part."""
    # slices, not single images: passing one to a thread costs as much as decoding 32×32 pixels
    step = -(-len(images) // threads)
    slices = [images[i : i + step] for i in range(0, len(images), step)]
    x = np.concatenate(list(pool.map(decode, slices)))
    parts = np.array([i.part for i in images])
    labels = np.array([i.label for i in images])
    for part in sorted(set(parts.tolist())):
        chosen = parts == part
        yield Batch(part, x[chosen], labels[chosen])


class _Decoder:
    """Decodes images of one size into one array; called from several threads at once (Pillow releases the GIL)."""

    def __init__(self, path: Path, size: tuple[int, int], mode: str) -> None:
        self.path, self.size, self.mode = path, size, mode
        self.turned: list[str] = []

    def __call__(self, images: Sequence[Encoded]) -> np.ndarray:
        width, height = self.size
        out = np.empty((len(images), height, width, len(self.mode)), np.uint8)
        for row, encoded in zip(out, images, strict=True):
            with _opened(self.path, encoded) as image:
                if image.size != self.size:
                    raise DataError(
                        f"{self.path}: {encoded.name} is {image.size[0]}×{image.size[1]}, the first image "
                        f"{width}×{height} pixels. Resize them to one size."
                    )
                try:
                    if _is_turned(image):
                        self.turned.append(encoded.name)
                    pixels = image
                    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                        # the same colours; Pillow warns where such a palette loses its transparency in one step
                        pixels = image.convert("RGBA")
                    pixels = pixels if pixels.mode == self.mode else pixels.convert(self.mode)
                    row[...] = np.asarray(pixels).reshape(row.shape)
                except Exception as error:  # decoders raise anything from OSError to struct.error
                    raise DataError(f"{self.path}: {encoded.name} is truncated or damaged ({error}).") from error
        return out


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of an image ask to turn or mirror it; not where they are damaged."""
    if not image.info.get("exif"):
        return False
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF data raise anything, and say nothing
        return False


@contextlib.contextmanager
def _opened(path: Path, encoded: Encoded) -> Iterator[Image.Image]:
    """An image whose header is read and whose pixels are not: its size is checked before the pixels are decoded."""
    try:
        image = Image.open(io.BytesIO(encoded.content), formats=_FORMATS)
    # the warning comes where warnings are errors; elsewhere the limit below refuses the same images
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: {encoded.name} has too many pixels: {error}") from error
    except Exception as error:  # a damaged header raises anything from UnidentifiedImageError to OverflowError
        formats = ", ".join(_FORMATS)
        raise DataError(f"{path}: {encoded.name} is damaged, or no image of the formats {formats}.") from error
    with image:
        width, height = image.size
        if not 0 < width * height <= MAX_PIXELS:
            raise DataError(f"{path}: {encoded.name} claims {width}×{height} pixels; the limit is 4096×4096.")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise DataError(f"{path}: {encoded.name} has mode {image.mode}; only 8-bit images are read. Convert it.")
        yield image


def _all_grey(path: Path) -> bool:
    """Whether all images are greyscale. Reading ends at the first image in colour."""
    with contextlib.closing(_encoded(path, Source(iter(()), ""))) as images:
        for encoded in images:
            with _opened(path, encoded) as image:
                if image.mode not in ("1", "L"):
                    return False
    return True


def _encoded(path: Path, source: Source) -> Generator[Encoded]:
    """The image files of `path` in its own order; the source's notes get the number of files that are no images."""
    layout = _Layout(path)
    others = 0
    for name, content in _files(path):
        if content is None:
            others += 1
        else:
            part, label = layout.place(name)
            yield Encoded(part, label, name, content)
    layout.require_classes()
    source.notes["files_that_are_no_images"] = others


def _files(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """(relative name, content) of every file; the content of a file that is no image is None."""
    if path.is_dir():
        for name, file in files_under(path):
            yield name, _read(file) if file.suffix.lower() in _SUFFIXES else None
        return
    if (names := zip_names(path)) is not None:
        with zipfile.ZipFile(path) as zipped:
            for name in names:
                inside = PurePosixPath(name)
                if not any(p.startswith(".") for p in inside.parts):
                    yield (
                        name,
                        zip_file_read(path, zipped, name, MAX_FILE_BYTES)
                        if inside.suffix.lower() in _SUFFIXES
                        else None,
                    )
        return
    with open_tar(path) as archive:
        for member in tar_files(path, archive):
            inside = PurePosixPath(member.name)
            if not any(p.startswith(".") for p in inside.parts):
                yield (
                    str(inside),
                    tar_read(archive, member, MAX_FILE_BYTES) if inside.suffix.lower() in _SUFFIXES else None,
                )


def _read(file: Path) -> bytes:
    """The content of an image file; DataError where it is larger than any image that is read."""
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise DataError(f"{file} has {format_bytes(size)}; images have at most {format_bytes(MAX_FILE_BYTES)}.")
    return file.read_bytes()


class _Layout:
    """Finds the part and the class of an image from its folders; all images must lie at one depth, under one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[PurePosixPath, tuple[str, str]] = {}
        self._first: tuple[tuple[str, ...], bool] | None = None
        self._parts: dict[str, str] = {}

    def require_classes(self) -> None:
        """DataError where all folders of images have the names of parts: then classes are missing, and parts would become classes."""
        folders = sorted(folder.name for folder in self._places)
        if folders and all(map(part_of, folders)) and not self._parts:
            raise DataError(
                f"{self.path}: images lie in {', '.join(folders)} themselves. Sort them into class folders, train/cat and so on."
            )

    def place(self, name: str) -> tuple[str, str]:
        """(part, class) of the image called `name`."""
        folder = PurePosixPath(name).parent
        if folder not in self._places:
            self._places[folder] = self._read(folder.parts, name)
        return self._places[folder]

    def _read(self, folders: tuple[str, ...], name: str) -> tuple[str, str]:
        """(part, class) from the names of the folders; DataError where they are not nested as those before."""
        if not folders:
            raise DataError(f"{self.path}: {name} lies in no class folder. Sort the images into one folder per class.")
        *above, label = folders
        part = (part_of(above[-1]) if above else None) or ALL
        if part != ALL:
            named = self._parts.setdefault(part, above[-1])
            if named != above.pop():
                raise DataError(
                    f"{self.path} holds the folders {named} and {folders[-2]}, which both name the part {part}. Merge them."
                )
        nesting = (tuple(above), part != ALL)
        self._first = self._first or nesting
        if nesting != self._first:
            raise DataError(
                f"{self.path}: {name} lies at another depth than the images before it. "
                "Use class/image, or train/class/image and test/class/image, throughout."
            )
        return part, label
